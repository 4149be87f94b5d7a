"""How emails leave the service: to a mail server over SMTP, or in development to a folder."""

import contextlib
import re
import smtplib
import socket
import ssl
import threading
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import structlog
from flask import Flask

STEP_TIMEOUT = 10  # seconds to connect, and to wait for a part of a response
SEND_TIMEOUT = 30  # seconds for everything, however slowly the server responds
SHUTDOWN_INTERVAL = 0.1  # seconds
SUBMISSION_PORT, SUBMISSIONS_PORT = 587, 465  # RFC 6409, RFC 8314
GREETING = 220  # RFC 5321, 4.2.3: the server is ready

_CONFIDENTIAL = re.compile(r"\S*(?:@|://|eyJ)\S*")  # addresses, URLs, JWTs

log = structlog.get_logger()


class Rejected(Exception):
    """The email can never be sent, as after a 5xx response (RFC 5321, 4.2.1)."""


class Transport(Protocol):
    """Sends emails; threads may share it."""

    def send(self, message: EmailMessage, link: str | None) -> None:
        """Send a message, whose text contains `link`.

        Raise Rejected, or another exception if a later try may succeed.
        """


class FolderTransport:
    """Writes each email to a file in a folder, and logs its link: for development."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def send(self, message: EmailMessage, link: str | None) -> None:
        """Write the message."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self._folder / f"{message['Message-ID'].strip('<>').partition('@')[0]}.eml"
        file.touch(mode=0o600)
        file.write_bytes(bytes(message))
        log.info("mail_written", file=str(file), subject=message["Subject"], link=link)


class SmtpTransport:
    """Sends each email over a connection of its own, so that none is held up by another.

    Certificates are verified. Without STARTTLS from a server that is to support it, nothing is
    sent.
    """

    def __init__(self, url: str) -> None:
        """Send to the server of SMTP_URL."""
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._implicit_tls = parts.scheme == "smtps"
        self._starttls = parts.query == "starttls"
        self._port = parts.port or (SUBMISSIONS_PORT if self._implicit_tls else SUBMISSION_PORT)
        self._user, self._password = unquote(parts.username or ""), unquote(parts.password or "")

    def send(self, message: EmailMessage, link: str | None) -> None:
        """Send the message."""
        with self._connect() as smtp:
            try:
                smtp.send_message(message)
            except smtplib.SMTPRecipientsRefused as error:
                ((code, text),) = error.recipients.values()
                raise _refusal(code, text) from None
            except smtplib.SMTPDataError as error:
                raise _refusal(error.smtp_code, error.smtp_error) from None

    def check(self) -> None:
        """Connect and authenticate, and send nothing; raise what `send` would raise."""
        with self._connect():
            pass

    @contextlib.contextmanager
    def _connect(self) -> Iterator[smtplib.SMTP]:
        """Yield an authenticated connection that is shut down after SEND_TIMEOUT."""
        tls = ssl.create_default_context()
        # smtplib would look up the name of this host in the DNS.
        name = socket.gethostname()
        smtp: Any = (
            smtplib.SMTP_SSL(context=tls, timeout=STEP_TIMEOUT, local_hostname=name)
            if self._implicit_tls
            else smtplib.SMTP(timeout=STEP_TIMEOUT, local_hostname=name)
        )
        # The name in the certificate. smtplib sets it only if its constructor connects, which
        # would leave nothing to shut down.
        smtp._host = self._host
        done, late = threading.Event(), threading.Event()
        threading.Thread(target=_shut_down_late, args=(smtp, done, late), daemon=True).start()
        try:
            code, text = smtp.connect(self._host, self._port)
            if code != GREETING:
                raise smtplib.SMTPConnectError(code, text)
            if self._starttls:
                smtp.starttls(context=tls)
            if self._user:
                smtp.login(self._user, self._password)
            yield smtp
            # The message is sent, so that an error from here on does not matter.
            with contextlib.suppress(smtplib.SMTPException, OSError):
                smtp.quit()
        except Exception:
            if late.is_set():  # the error comes from the end of the connection
                raise TimeoutError(f"not sent in {SEND_TIMEOUT} s") from None
            raise
        finally:
            done.set()
            smtp.close()


def _refusal(code: int, text: bytes | str) -> Exception:
    """Return the error for a recipient or a message that the server refuses.

    Other refusals, such as that of the sender, are about the settings and not about this email:
    none of them is permanent.
    """
    if 500 <= code < 600:
        return Rejected(_in_words(code, text))
    return smtplib.SMTPResponseException(code, text)


def _in_words(code: int, text: bytes | str) -> str:
    return f"{code} {text.decode(errors='replace') if isinstance(text, bytes) else text}"


def _shut_down_late(smtp: smtplib.SMTP, done: threading.Event, late: threading.Event) -> None:
    """Shut down a connection on which a message is not sent after SEND_TIMEOUT.

    The timeout of a socket is that of one read: a server that sends a byte a second never reaches
    it.
    """
    if done.wait(SEND_TIMEOUT):
        return
    late.set()
    while not done.wait(SHUTDOWN_INTERVAL):
        # STARTTLS replaces the socket.
        with contextlib.suppress(OSError):
            if smtp.sock:
                socket.socket.shutdown(smtp.sock, socket.SHUT_RDWR)


def describe(error: Exception) -> str:
    """Return the reason why an email was not sent, in one line without secrets."""
    match error:
        case smtplib.SMTPAuthenticationError():
            # A server may repeat the credentials in its response.
            text = f"{error.smtp_code} the mail server refused user and password"
        case smtplib.SMTPResponseException():
            text = _in_words(error.smtp_code, error.smtp_error)
        case Rejected():
            text = str(error)
        case _:
            text = f"{type(error).__name__}: {error}"
    # A server may repeat the address or the link.
    text = _CONFIDENTIAL.sub("[removed]", text)
    return "".join(char if char.isprintable() else " " for char in text)


def of(app: Flask) -> Transport | None:
    """Return the transport of `app`, or None where emails cannot be sent."""
    if url := app.config["SMTP_URL"]:
        return SmtpTransport(url)
    folder = app.config["MAIL_FOLDER"]
    return FolderTransport(folder) if folder else None
