"""A mail server on loopback with STARTTLS and AUTH, and a certificate made by `openssl`."""

import asyncio
import atexit
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any, Self

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

USER, PASSWORD = "relay", "p:ss/w@rd-sesame"
CREDENTIALS = "relay:p%3Ass%2Fw%40rd-sesame"


@cache
def certificate() -> tuple[str, str]:
    """Return the files of a certificate for 127.0.0.1 and of its key, made once per process."""
    if not shutil.which("openssl"):
        raise RuntimeError("The certificate of the mail server needs openssl: install it.")
    folder = Path(tempfile.mkdtemp(prefix="certificate-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    files = str(folder / "certificate.pem"), str(folder / "key.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]),
        ],
        check=True,
        capture_output=True,
    )
    return files


class MailServer:
    """A mail server that keeps what it receives; `responses` are refusals by recipient.

    While `accepting` is not set, it keeps and acknowledges no message.
    """

    def __init__(self, *, tls: bool = True) -> None:
        self.greetings = 0  # the number of EHLO, two of each connection with STARTTLS
        self.arriving: list[str] = []  # the recipient of each message that has been transmitted
        self.received: list[tuple[str, bytes]] = []  # the recipient and the message
        self.responses: dict[str, str] = {}
        self.accepting = threading.Event()
        self.accepting.set()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        options: dict[str, Any] = {}
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate())
            options = {
                "tls_context": context,
                "require_starttls": True,
                "auth_required": True,
                "authenticator": self._authenticate,
            }
        self._controller = Controller(self, hostname="127.0.0.1", port=self.port, **options)

    def __enter__(self) -> Self:
        self._controller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.accepting.set()
        self._controller.stop()

    @property
    def url(self) -> str:
        """The SMTP_URL with STARTTLS, user and password."""
        return f"smtp://{CREDENTIALS}@127.0.0.1:{self.port}?starttls"

    def _authenticate(self, *arguments: Any) -> AuthResult:
        data = arguments[-1]
        right = (data.login, data.password) == (USER.encode(), PASSWORD.encode())
        return AuthResult(success=right, handled=False)

    async def handle_EHLO(  # noqa: N802  # the name that aiosmtpd calls
        self, _server: Any, session: Any, _envelope: Any, name: str, responses: list[str]
    ) -> list[str]:
        """Count a greeting."""
        self.greetings += 1
        session.host_name = name
        return responses

    async def handle_RCPT(  # noqa: N802
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        """Accept or refuse a recipient."""
        envelope.rcpt_tos.append(address)
        return self.responses.get(address, "250 OK")

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802
        """Keep a message."""
        (address,) = envelope.rcpt_tos
        self.arriving.append(address)
        if not self.accepting.is_set():
            await asyncio.to_thread(self.accepting.wait)
        self.received.append((address, envelope.original_content))
        return "250 OK"
