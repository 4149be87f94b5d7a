"""POST /auth/password/forgot and /auth/password/reset: a new password with a link from an email."""

import base64
import json
from typing import Any, ClassVar
from unittest import mock

import jwt
from sqlalchemy import event, update
from werkzeug.test import TestResponse

from project import db, errors
from project.accounts import administration, rate_limits
from project.models import User
from project.tests.accounts.cases import at_once
from project.tests.accounts.mail_case import ON_ITS_WAY, MailTestCase
from project.tests.base import BaseTestCase
from project.tests.rows import (
    ORIGIN,
    stored_events,
    stored_mails,
    stored_sessions,
    stored_users,
)

FORGOT, RESET = "/auth/password/forgot", "/auth/password/reset"
NEW = "correct-horse-battery"
DONE = "Password changed. Please log in."


class ResetTestCase(MailTestCase):
    """A test of resets."""

    def request_link(self, email: str = "ada@test.com") -> None:
        """Request a link for an address."""
        self.assert_done(self.post(FORGOT, email=email), ON_ITS_WAY, 202)

    def new_link(self) -> str:
        """Request a link, and return its token."""
        self.request_link()
        return self.receive("reset")

    def reset(self, token: str, password: str = NEW) -> TestResponse:
        """Return the response to a client that sends the token of a link."""
        return self.post(RESET, token=token, new_password=password)

    def store(self, **values: object) -> None:
        """Change columns of the user."""
        db.session.execute(update(User).values(values))
        db.session.commit()

    def assert_invalid(self, token: str) -> None:
        """Check that a token is refused, and the password stays."""
        before = stored_users()
        self.assert_link_invalid(RESET, token, new_password=NEW)
        self.assertEqual(before, stored_users())


class TestReset(ResetTestCase):
    """What a reset does."""

    def test_walk(self) -> None:
        """The new password logs in, the old one does not, and the old session is over."""
        token = self.new_link()

        self.assert_done(self.reset(token), DONE)

        self.assertEqual(200, self.log_in_status(NEW))
        self.assert_error(self.login("ada@test.com", "test"), errors.InvalidCredentials)
        self.assert_error(self.get("/auth/status", self.token), errors.SessionEnded)

    def test_once(self) -> None:
        """A link works once."""
        token = self.new_link()
        self.reset(token)

        self.assert_invalid(token)

    def test_email_is_verified(self) -> None:
        """The user has received the email, so their address is verified."""
        self.reset(self.new_link())

        self.assertTrue(stored_users()[0]["email_verified"])

    def test_event_and_notice(self) -> None:
        """The audit log has the reset with its sessions, and the user is told."""
        self.reset(self.new_link())

        event = stored_events()[-1]
        self.assertEqual(("password_reset", {"sessions": 1}), (event["kind"], event["details"]))
        self.assertEqual(self.user.id, event["user_id"])
        (notice,) = self.send_mail()
        self.assertEqual("Your password at Example was changed", notice["Subject"])
        self.assertEqual("ada@test.com", notice["To"])

    def test_weak_password(self) -> None:
        """A weak password is refused and does not use the link up."""
        self.app.config["PASSWORD_MIN_LENGTH"] = 12
        token = self.new_link()

        for weak in ("short", "password1234"):
            data = self.assert_error(self.reset(token, weak), errors.InvalidPayload)
            self.assertEqual(["new_password"], list(data["errors"]))

        self.assert_done(self.reset(token), DONE)

    def test_at_once(self) -> None:
        """Of fifty resets at once with one link, exactly one succeeds."""
        self.store(email_verified=True)
        token = self.new_link()

        answers = at_once(*[lambda n=n: self.reset(token, f"{NEW} {n}") for n in range(50)])

        statuses = [answer.status_code for answer in answers]
        self.assertEqual(1, statuses.count(200), statuses)
        winner = statuses.index(200)
        self.assertLessEqual(set(statuses), {200, 400, 503})
        self.assertEqual(200, self.log_in_status(f"{NEW} {winner}"))
        self.assertEqual(1, [one["kind"] for one in stored_events()].count("password_reset"))

    def test_get(self) -> None:
        """GET and HEAD requests, as of a scanner, do not use the link up."""
        token = self.new_link()
        for _ in range(100):
            for method in ("GET", "HEAD"):
                self.client.open(f"{RESET}?token={token}", method=method)

        self.assert_done(self.reset(token), DONE)


class TestInvalid(ResetTestCase):
    """Links that are refused."""

    def test_forged(self) -> None:
        """A token that the service did not sign, or that was changed, is refused."""
        token = self.new_link()
        header, payload, signature = token.split(".")
        claims = jwt.decode(token, options={"verify_signature": False})
        key = "0123456789abcdefghijklmnopqrstuvwxyz"
        other = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        for forged in (
            jwt.encode(claims, key, headers={"typ": "reset+jwt"}),
            f"{header}.{other}.{signature}",
            f"{header}.{payload}.",
            f"{header}.{payload}",
            "",
            "x" * 5_000,
            "\N{SNOWMAN}",
        ):
            with self.subTest(forged=forged[:30]):
                self.assert_invalid(forged)
        self.assert_done(self.reset(token), DONE)

    def test_reencoded(self) -> None:
        """A token whose signature is written with other unused bits is refused."""
        token = self.new_link()
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        last = alphabet.index(token[-1])
        same = [token[:-1] + alphabet[last ^ bits] for bits in (1, 2, 3)]

        for other in same:
            decoded = base64.urlsafe_b64decode(f"{other.rpartition('.')[2]}=")
            self.assertEqual(decoded, base64.urlsafe_b64decode(f"{token.rpartition('.')[2]}="))
            self.assert_invalid(other)

    def test_other_kinds(self) -> None:
        """Tokens of sessions and links for other purposes are refused, whatever their header."""
        key = self.app.config["SECRET_KEY"]
        token = self.new_link()
        claims = jwt.decode(token, options={"verify_signature": False})
        self.assert_invalid(self.token)
        for type_, audience in (
            ("reset+jwt", "verify"),
            ("verify+jwt", "reset"),
            ("verify+jwt", "verify"),
            ("email+jwt", "email"),
            ("mfa+jwt", "mfa"),
            ("mfa+jwt", "reset"),
            ("reset+jwt", "mfa"),
            ("JWT", "reset"),
            ("reset+jwt", ["reset"]),
            ("reset+jwt", None),
        ):
            with self.subTest(type=type_, audience=audience):
                other = claims | {"aud": audience}
                if audience is None:
                    del other["aud"]
                self.assert_invalid(jwt.encode(other, key, headers={"typ": type_}))

    def test_token_of_link_is_no_session(self) -> None:
        """A link's token is neither an auth token nor a refresh token."""
        token = self.new_link()

        self.assert_error(self.get("/auth/status", token), errors.TokenInvalid)
        refreshed = self.post("/auth/refresh", refresh_token=token)
        self.assert_error(refreshed, errors.TokenInvalid)

    def test_expired(self) -> None:
        """A link is valid for RESET_LINK_SECONDS from when it was sent."""
        self.request_link()
        self.move_clock(86_400)
        token = self.receive("reset")

        self.move_clock(1_799)
        self.assertEqual(400, self.reset(token, "").status_code)  # the password, not the link
        self.move_clock(1)
        self.assert_invalid(token)

    def test_state(self) -> None:
        """A change of password or email, or of `email_verified`, invalidates links from before."""
        changes: list[dict[str, Any]] = [
            {"password": "$2b$04$" + "x" * 53},
            {"email": "new@test.com"},
            {"email_verified": True},
        ]
        for change in changes:
            with self.subTest(change=change):
                token = self.new_link()
                before = stored_users()[0]
                self.store(**change)
                self.assert_invalid(token)
                self.store(**{name: before[name] for name in change})
        self.assert_done(self.reset(token), DONE)

    def test_changed_meanwhile(self) -> None:
        """If the account changes while the new password is hashed, the link is refused."""
        token = self.new_link()
        hashed = "$2b$04$" + "x" * 53
        before = stored_sessions()
        for values in ({"password": "another"}, {"active": False}, {"email": "new@test.com"}):

            def change(_password: str, values: dict[str, Any] = values) -> str:
                with db.engine.begin() as connection:
                    connection.execute(update(User).values(values))
                return hashed

            with self.subTest(values), mock.patch("project.lib.hashing.hash", change):
                stored = stored_users()[0]
                self.assert_link_invalid(RESET, token, new_password=NEW)
                self.assertNotEqual(hashed, stored_users()[0]["password"])
                self.assertEqual(before, stored_sessions())
                self.store(**{name: stored[name] for name in values})

    def test_deactivated(self) -> None:
        """A deactivated user gets no link, and a link from before is refused."""
        token = self.new_link()
        administration.set_active("ada@test.com", False, ORIGIN)
        db.session.commit()
        self.send_mail()  # the notice

        self.assert_invalid(token)
        self.request_link()
        self.assertEqual([], self.send_mail())

    def test_deleted(self) -> None:
        """The link of a deleted user is refused."""
        token = self.new_link()
        body = {"current_password": "test"}
        headers = {"Authorization": f"Bearer {self.token}"}
        self.client.delete("/auth/account", json=body, headers=headers)

        self.assert_link_invalid(RESET, token, new_password=NEW)

    def test_key_rotation(self) -> None:
        """A link still works when SECRET_KEY was replaced and the old key is a fallback."""
        token = self.new_link()
        key = self.app.config["SECRET_KEY"]
        self.app.config.update(SECRET_KEY="a new key for the tests", SECRET_KEY_FALLBACKS=(key,))

        self.assert_done(self.reset(token), DONE)


class TestForgot(ResetTestCase):
    """What a request for a link reveals and does."""

    def test_unknown(self) -> None:
        """An unknown address gets the same answer, and no email."""
        self.request_link("unknown@test.com")

        self.assertEqual([], self.send_mail())

    def test_statements(self) -> None:
        """A known and an unknown address cause the same statements."""
        self.app.config["RATE_LIMITS"] = True
        rate_limits.init_app(self.app)
        self.request_link()  # statements of a first request
        statements: dict[str, list[str]] = {}
        for email in ("ada@test.com", "unknown@test.com"):
            statements[email] = []

            def record(*arguments: Any, email: str = email) -> None:
                statements[email].append(arguments[2])

            for engine in db.engines.values():
                event.listen(engine, "before_cursor_execute", record)
            self.request_link(email)
            for engine in db.engines.values():
                event.remove(engine, "before_cursor_execute", record)

        self.assertEqual(*statements.values())
        self.assertTrue(any("INSERT INTO mails" in each for each in statements["ada@test.com"]))

    def test_outbox(self) -> None:
        """The outbox has the typed address in lower case, and no link and no user."""
        self.request_link("Unknown@Test.com")

        (mail,) = stored_mails()
        self.assertEqual(("reset", "unknown@test.com"), (mail["kind"], mail["address"]))
        self.assertEqual((None, {}), (mail["user_id"], mail["parameters"]))

    def test_host_header(self) -> None:
        """A link is made from LINK_BASE_URL, whatever the request's Host is."""
        body = {"email": "ada@test.com"}
        response = self.client.post(FORGOT, json=body, headers={"Host": "attacker.example"})

        self.assertEqual(202, response.status_code)
        self.receive("reset")

    def test_invalid_address(self) -> None:
        """What is no email address is refused; nothing is sent."""
        for email in ("ada", "ada@test.com\r\nBcc: eve@test.com", "", None, ["ada@test.com"]):
            with self.subTest(email=email):
                self.assert_error(self.post(FORGOT, email=email), errors.InvalidPayload)
        self.assertEqual([], stored_mails())

    def test_user_is_told_nothing_about_others(self) -> None:
        """A request by a client that is logged in as another user is the same."""
        response = self.post(FORGOT, self.token, email="unknown@test.com")

        self.assert_done(response, ON_ITS_WAY, 202)


class TestLimits(ResetTestCase):
    """How many emails clients can request."""

    settings: ClassVar[dict[str, Any]] = MailTestCase.settings | {"RATE_LIMITS": True}

    def setUp(self) -> None:
        """Set the rate limits up."""
        super().setUp()
        rate_limits.init_app(self.app)

    def test_per_address(self) -> None:
        """Three an hour for an address, whether it has an account or not."""
        for email in ("ada@test.com", "unknown@test.com"):
            for number in range(3):
                with self.subTest(email=email, number=number):
                    self.request_link(email)
            response = self.post(FORGOT, email=email)
            self.assert_error(response, errors.TooManyAttempts)
            self.assertEqual("3600", response.headers["Retry-After"])
            self.assert_done(self.post("/auth/verification", email=email), ON_ITS_WAY, 202)

        self.move_clock(3_600)
        self.request_link()

    def test_per_network(self) -> None:
        """Twenty an hour from a network."""
        for number in range(20):
            self.request_link(f"user{number}@test.com")

        response = self.post(FORGOT, email="another@test.com")
        self.assert_error(response, errors.TooManyAttempts)
        environ = {"REMOTE_ADDR": "192.0.2.7"}
        body = {"email": "another@test.com"}
        other = self.client.post(FORGOT, json=body, environ_overrides=environ)
        self.assert_done(other, ON_ITS_WAY, 202)

    def test_pause_is_lifted(self) -> None:
        """A reset ends the pause of the account."""
        for _ in range(self.app.config["LOGIN_FAILURES_PER_ACCOUNT"]):
            self.login("ada@test.com", "wrong")
        self.assert_error(self.login("ada@test.com", "test"), errors.TooManyAttempts)

        self.reset(self.new_link())

        self.assertEqual(200, self.log_in_status(NEW))


class TestNotConfigured(BaseTestCase):
    """A service that cannot send email."""

    def test_refused(self) -> None:
        """The routes that send email say so, and store nothing."""
        token = self.register()
        headers = {"Authorization": f"Bearer {token}"}
        email = {"email": "new@test.com", "current_password": "test"}
        for path, body in (
            (FORGOT, {"email": "test@test.com"}),
            ("/auth/verification", {"email": "test@test.com"}),
            ("/auth/email", email),
        ):
            with self.subTest(path):
                response = self.client.post(path, json=body, headers=headers)
                self.assert_error(response, errors.MailNotConfigured)
        self.assertEqual([], stored_mails())
