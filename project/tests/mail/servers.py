"""Cases with a mail server on loopback, and servers that do not respond as they should."""

import contextlib
import os
import shutil
import socket
import threading
import unittest
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

from sqlalchemy import Row, select

from bench.mailserver import MailServer, certificate
from project import db
from project.accounts import mails
from project.lib import database
from project.mail import outbox, transport
from project.mail.sender import Sender
from project.models import mails_table
from project.tests.base import BaseTestCase

MAIL = {"MAIL_FROM": "Example <users@app.example>", "LINK_BASE_URL": "https://app.example"}

needs_openssl = unittest.skipUnless(shutil.which("openssl"), "openssl is not installed")


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


@needs_openssl
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
