"""Shared by the tests of the second factor: users with an authenticator, and its codes."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pyotp
from sqlalchemy import select, update
from werkzeug.test import TestResponse

from project import clock, db, errors
from project.accounts import rate_limits
from project.lib import database
from project.models import User
from project.tests.accounts.mail_case import send_mail
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import add_user, start_session, stored_events, stored_mails
from project.tests.tokens.claims import session_of

STEP = 30  # seconds for which an authenticator shows a code
HOME, AWAY, ELSEWHERE = "192.0.2.1", "198.51.100.2", "203.0.113.3"
RECOVERY_CODE = r"\A([A-Z2-7]{4}-){5}[A-Z2-7]{4}\Z"  # as it is shown
NO_RECOVERY_CODE = "ABCD-EFGH-IJKL-MNOP-QRST-2347"  # of this form, and no user's
Tokens = dict[str, Any]  # the answer to a login


class SecondFactorTestCase(BaseTestCase):
    """A test with two users, `ada` and `bob`, and a clock that stands still."""

    settings: ClassVar[dict[str, Any]] = {"TOKEN_EXPIRATION_SECONDS": 3_600}

    def setUp(self) -> None:
        """Add the users, log them in, and stop the clock."""
        super().setUp()
        rate_limits.init_app(self.app)  # with the settings of the test
        self.move_clock(0)
        self.ip = AWAY  # of the clients
        self.secrets: dict[str, str] = {}  # in base32, by the name of the user
        self.recovery_codes: dict[str, list[str]] = {}
        self.ids: dict[str, int] = {}
        self.tokens: dict[str, str] = {}
        for name in ("ada", "bob"):
            self.add(name)

    def add(self, name: str, **columns: Any) -> None:
        """Add a user with a session."""
        user = add_user(name, f"{name}@test.com", "test", **columns)
        self.ids[name], self.tokens[name] = user.id, start_session(user).auth_token

    @contextlib.contextmanager
    def at(self, ip: str) -> Iterator[None]:
        """Send the requests of the block from this address."""
        before, self.ip = self.ip, ip
        try:
            yield
        finally:
            self.ip = before

    def send(
        self, method: str, path: str, token: str | None = None, /, **body: object
    ) -> TestResponse:
        """Return the response to a client of its own, with the members of `body` as JSON."""
        return self.app.test_client().open(
            path,
            method=method,
            json=body or None,
            headers=bearer(token) if token else {},
            environ_overrides={"REMOTE_ADDR": self.ip},
        )

    def ok(self, response: TestResponse, status: int = 200) -> Any:
        """Check that a response is a success, and return its body."""
        self.assertEqual(status, response.status_code, response.get_data(as_text=True))
        return response.get_json()

    def begin(self, name: str = "ada") -> str:
        """Begin to set an authenticator up, and return its secret."""
        answer = self.send("POST", "/auth/totp", self.tokens[name], current_password="test")
        self.secrets[name] = self.ok(answer)["data"]["secret"]
        return self.secrets[name]

    def confirm(self, code: str, name: str = "ada") -> TestResponse:
        """Return the response to a code that confirms an authenticator."""
        return self.send("POST", "/auth/totp/confirm", self.tokens[name], code=code)

    def enrol(self, name: str = "ada") -> None:
        """Set an authenticator up, and move the clock so that its next code is another one."""
        self.begin(name)
        answer = self.confirm(self.code(name), name)
        self.recovery_codes[name] = self.ok(answer)["data"]["recovery_codes"]
        self.move_clock(STEP)

    def code(self, name: str = "ada", steps: int = 0) -> str:
        """Return the code that the authenticator of a user shows now, or some steps later."""
        return pyotp.TOTP(self.secrets[name]).at(clock.utcnow(), counter_offset=steps)

    def next_code(self, name: str = "ada") -> str:
        """Move the clock by a step, and return the code that the authenticator shows then."""
        self.move_clock(STEP)
        return self.code(name)

    def wrong_code(self, name: str = "ada") -> str:
        """Return six digits that are no code of the present steps."""
        near = {self.code(name, steps) for steps in (-1, 0, 1)}
        return next(f"{number:06}" for number in range(4) if f"{number:06}" not in near)

    def log_in(self, name: str = "ada", /, password: str = "test", **body: object) -> TestResponse:
        """Return the response to a login, with more members in its body."""
        return self.send("POST", "/auth/login", email=f"{name}@test.com", password=password, **body)

    def mfa_token(self, name: str = "ada", password: str = "test") -> str:
        """Return the token of the first step of a login."""
        answer = self.log_in(name, password)
        self.assertEqual(401, answer.status_code, answer.get_data(as_text=True))
        return str(answer.get_json()["mfa_token"])

    def second_step(self, mfa_token: str, code: str) -> TestResponse:
        """Return the response to the second step of a login."""
        return self.send("POST", "/auth/login/mfa", mfa_token=mfa_token, code=code)

    def refresh(self, pair: Tokens) -> Tokens:
        """Return the next token pair of a session."""
        answer = self.send("POST", "/auth/refresh", refresh_token=pair["refresh_token"])
        tokens: Tokens = self.ok(answer)
        return tokens

    def state(self, name: str = "ada") -> tuple[bool, int]:
        """Return whether a user has an authenticator, and how many recovery codes are left."""
        data = self.ok(self.send("GET", "/auth/totp", self.tokens[name]))["data"]
        self.assertEqual({"enabled", "recovery_codes_left"}, set(data))
        return data["enabled"], data["recovery_codes_left"]

    def amr_of(self, token: str) -> list[str]:
        """Return the `amr` of the session of a token in the user's list of sessions."""
        listed = self.ok(self.send("GET", "/auth/sessions", token))["data"]["sessions"]
        (amr,) = [one["amr"] for one in listed if one["id"] == session_of(token)]
        return list(amr)

    def events(self, name: str = "ada") -> list[tuple[str, dict[str, Any]]]:
        """Return the kind and the details of all events about a user, the oldest first."""
        theirs = [event for event in stored_events() if event["user_id"] == self.ids[name]]
        return [(event["kind"], event["details"]) for event in theirs]

    def notices(self, name: str = "ada") -> list[str]:
        """Return the kinds of the emails to a user that are in the outbox, the oldest first."""
        return [mail["kind"] for mail in stored_mails() if mail["address"] == f"{name}@test.com"]

    def assert_ill_formed(self, response: TestResponse) -> None:
        """Check that a response refuses the form of the code."""
        data = self.assert_error(response, errors.InvalidPayload)
        self.assertEqual(["code"], list(data["errors"]))

    def assert_wrong(self, response: TestResponse) -> None:
        """Check that a response refuses a code."""
        self.assert_error(response, errors.WrongCode)

    def store(self, name: str = "ada", **values: object) -> None:
        """Change columns of a user."""
        db.session.execute(update(User).where(User.id == self.ids[name]).values(values))
        db.session.commit()

    def mailed_link(self, address: str = "ada@test.com") -> str:
        """Send the emails that are due, and return the token of the link in that to an address."""
        (message,) = [mail for mail in send_mail(self.app) if mail["To"] == address]
        part: Any = message.get_body(("plain",))
        (token,) = re.findall(r"\?token=(\S+)", part.get_content())
        return str(token)

    def turn_off(self, **body: object) -> TestResponse:
        """Return the response to a user who turns their authenticator off."""
        body = {"current_password": "test"} | body
        return self.send("DELETE", "/auth/totp", self.tokens["ada"], **body)

    def replace_recovery_codes(self, **body: object) -> TestResponse:
        """Return the response to a user who asks for new recovery codes."""
        body = {"current_password": "test"} | body
        return self.send("POST", "/auth/recovery_codes", self.tokens["ada"], **body)


def stored(*but: str) -> dict[str, list[dict[str, Any]]]:
    """Return every committed row of every table, except for these tables."""
    tables = [table for table in db.metadata.sorted_tables if table.name not in but]
    return {
        table.name: [
            row._asdict()
            for row in database.fetch_all(select(table).order_by(*table.primary_key.columns))
        ]
        for table in tables
    }


def counted() -> dict[str, int]:
    """Return the attempts that are counted now, without emails, by the key of the count."""
    counts = {row["key"]: row["attempts"] for row in stored()["throttles"] if row["attempts"]}
    return {key: attempts for key, attempts in counts.items() if not key.startswith("mail:")}
