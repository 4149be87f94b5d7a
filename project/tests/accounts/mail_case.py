"""Shared by the tests of what users do with links from emails."""

import re
from email.message import EmailMessage
from typing import Any, ClassVar

from flask import Flask
from werkzeug.test import TestResponse

from project import errors
from project.accounts import mails
from project.mail.sender import Sender
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import add_user, start_session, stored_mails

BASE = "https://app.example/account"
# With a transport of the tests, nothing connects to the mail server.
MAIL_SETTINGS = {
    "SMTP_URL": "smtp://127.0.0.1:1",
    "MAIL_FROM": "Example <users@app.example>",
    "LINK_BASE_URL": BASE,
}
ON_ITS_WAY = "If there is an account with this address, an email is on its way."
_LINK = re.compile(rf"{BASE}/#/(\w+)\?token=(\S+)")


def body_of(message: EmailMessage, kind: str) -> str:
    """Return the text of a part of an email, "plain" or "html"."""
    part: Any = message.get_body((kind,))
    return str(part.get_content())


class Mailbox:
    """A transport that keeps the emails."""

    def __init__(self) -> None:
        self.messages: list[EmailMessage] = []

    def send(self, message: EmailMessage, link: str | None) -> None:
        """Keep the message."""
        self.messages.append(message)


def send_mail(app: Flask) -> list[EmailMessage]:
    """Send the emails that are due, and return them in the order of their addresses."""
    mailbox = Mailbox()
    Sender(app, mailbox, mails.compose).run_once()
    return sorted(mailbox.messages, key=lambda message: str(message["To"]))


class MailTestCase(BaseTestCase):
    """A test of an application that can send email, with a user and a stopped clock."""

    settings: ClassVar[dict[str, Any]] = MAIL_SETTINGS | {"TOKEN_EXPIRATION_SECONDS": 3_600}

    def setUp(self) -> None:
        """Add the user, log them in, and stop the clock."""
        super().setUp()
        self.user = add_user("ada", "ada@test.com", "test")
        self.token = start_session(self.user).auth_token
        self.move_clock(0)

    def post(self, path: str, caller: str | None = None, /, **body: object) -> TestResponse:
        """Return the response to a POST of a client of its own."""
        headers = bearer(caller) if caller else {}
        return self.app.test_client().post(path, json=body, headers=headers)

    def assert_done(self, response: TestResponse, message: str, status: int = 200) -> None:
        """Check that the response is a success with this message and nothing else."""
        self.assertEqual(status, response.status_code, response.get_data(as_text=True))
        self.assertEqual({"status": "success", "message": message}, response.get_json())

    def assert_link_invalid(self, path: str, token: str, **body: object) -> None:
        """Check that a link is refused."""
        self.assert_error(self.post(path, **{"token": token} | body), errors.LinkInvalid)

    def send_mail(self) -> list[EmailMessage]:
        """Send the emails that are due, all of them, and return them."""
        messages = send_mail(self.app)
        self.assertEqual([], stored_mails())
        return messages

    def link_in(self, message: EmailMessage, purpose: str) -> str:
        """Return the token of the link in an email, whose parts have the same link."""
        found = _LINK.findall(body_of(message, "plain"))
        self.assertEqual(1, len(found))
        self.assertEqual(purpose, found[0][0])
        self.assertIn(f'href="{BASE}/#/{purpose}?token={found[0][1]}"', body_of(message, "html"))
        return str(found[0][1])

    def receive(self, purpose: str, address: str = "ada@test.com") -> str:
        """Send the emails that are due: one, to this address; return the token of its link."""
        (message,) = self.send_mail()
        self.assertEqual(address, message["To"])
        return self.link_in(message, purpose)

    def log_in_status(self, password: str, email: str = "ada@test.com") -> int:
        """Return the status of the response to a login."""
        return self.login(email, password).status_code
