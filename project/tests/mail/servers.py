"""Mail servers on loopback, with a certificate made by `openssl`, and a case that uses them."""

import contextlib
import os
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from sqlalchemy import Row, select

from project import db
from project.accounts import mails
from project.lib import database
from project.mail import outbox, transport
from project.mail.sender import Sender
from project.models import mails_table
from project.tests.base import BaseTestCase
from project.tests.scratch import free_port

USER, PASSWORD = "relay", "p:ss/w@rd-sesame"
CREDENTIALS = "relay:p%3Ass%2Fw%40rd-sesame"
MAIL = {"MAIL_FROM": "Example <users@app.example>", "LINK_BASE_URL": "https://app.example"}


@cache
def certificate() -> tuple[str, str]:
    """Return the files of a certificate for 127.0.0.1 and of its key, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="certificate-"))
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
    """A mail server that keeps what it receives; `responses` are refusals by recipient."""

    def __init__(self, *, tls: bool = True) -> None:
        self.received: list[tuple[str, bytes]] = []  # the recipient and the message
        self.responses: dict[str, str] = {}
        self.port = free_port()
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

    def __enter__(self) -> "MailServer":
        self._controller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._controller.stop()

    @property
    def url(self) -> str:
        """The SMTP_URL with STARTTLS, user and password."""
        return f"smtp://{CREDENTIALS}@127.0.0.1:{self.port}?starttls"

    def _authenticate(self, *arguments: Any) -> AuthResult:
        data = arguments[-1]
        right = (data.login, data.password) == (USER.encode(), PASSWORD.encode())
        return AuthResult(success=right, handled=False)

    async def handle_RCPT(  # noqa: N802  # the name that aiosmtpd calls
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        """Accept or refuse a recipient."""
        envelope.rcpt_tos.append(address)
        return self.responses.get(address, "250 OK")

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802
        """Keep a message."""
        (address,) = envelope.rcpt_tos
        self.received.append((address, envelope.original_content))
        return "250 OK"


@contextlib.contextmanager
def raw_server(*, drip: bool) -> Iterator[int]:
    """Yield the port of a server that sends a byte at a time without end, or closes at once."""
    ended = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    while drip and not ended.wait(0.02):
                        connection.sendall(b"2")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


class MailServerTestCase(BaseTestCase):
    """A test with a mail server, whose certificate the application trusts."""

    settings: ClassVar[dict[str, Any]] = MAIL

    def setUp(self) -> None:
        """Start the mail server."""
        super().setUp()
        self.server = self.enterContext(MailServer())
        self.enterContext(mock.patch.dict(os.environ, {"SSL_CERT_FILE": certificate()[0]}))
        self.app.config["SMTP_URL"] = self.server.url

    def add(self, *addresses: str, kind: str = "account_deleted") -> None:
        """Add an email to each address, and commit."""
        for address in addresses:
            outbox.add(kind, address, "en")
        db.session.commit()

    def send(self, url: str | None = None) -> None:
        """Send the emails that are due, to the mail server or to another one."""
        channel = transport.SmtpTransport(url or self.server.url)
        Sender(self.app, channel, mails.compose).run_once()

    def rows(self) -> list[Row[Any]]:
        """Return the rows of the outbox in the order in which they were added."""
        return list(database.fetch_all(select(mails_table).order_by(mails_table.c.id)))
