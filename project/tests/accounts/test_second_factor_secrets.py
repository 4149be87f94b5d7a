"""The secrets of authenticators: how they are stored, and where they never are."""

import hashlib
import re
from typing import Any, ClassVar
from unittest import mock

from sqlalchemy import update
from werkzeug.test import TestResponse

from project import db, errors
from project.models import TotpFactor
from project.tests.accounts.mail_case import MAIL_SETTINGS
from project.tests.accounts.second_factor_case import (
    NO_RECOVERY_CODE,
    SecondFactorTestCase,
    stored,
)
from project.tests.lib.log_capture import captured_output
from project.tests.rows import stored_sessions


class TestEncryption(SecondFactorTestCase):
    """How the secrets are stored, and what happens without the keys."""

    def set_keys(self, *keys: str) -> None:
        """Change ENCRYPTION_KEYS."""
        self.app.config["ENCRYPTION_KEYS"] = keys

    def assert_not_configured(self, response: TestResponse) -> None:
        """Check that a response says that authenticators cannot be used."""
        self.assert_error(response, errors.MfaNotConfigured)
        self.assertEqual("3600", response.headers["Retry-After"])

    def test_secret(self) -> None:
        """The stored secret is not readable, and of two users with one secret not the same."""
        with mock.patch("project.lib.codes.new_secret", return_value="A" * 32):
            self.begin()
            self.begin("bob")

        first, second = (row["secret"] for row in stored()["totp_factors"])
        self.assertNotEqual(first, second)
        for secret in (first, second):
            self.assertNotIn(b"AAAA", secret)
            self.assertNotIn(bytes(4), secret)  # as base32 decodes it

    def test_bound_to_the_user(self) -> None:
        """A secret that is copied to another user's row is of no use there."""
        self.enrol()
        self.enrol("bob")
        secret = stored()["totp_factors"][0]["secret"]
        of_bob = update(TotpFactor).where(TotpFactor.user_id == self.ids["bob"])
        db.session.execute(of_bob.values(secret=secret))
        db.session.commit()

        self.assert_not_configured(self.log_in("bob", code=self.code("ada")))

    def test_without_keys(self) -> None:
        """Without keys no authenticator can be set up; all else works."""
        keys = self.app.config["ENCRYPTION_KEYS"]
        self.begin("bob")
        self.set_keys()
        before = stored("events")

        answer = self.send("POST", "/auth/totp", self.tokens["ada"], current_password="test")
        self.assert_not_configured(answer)
        self.assert_not_configured(self.confirm(self.code("bob"), "bob"))

        self.assertEqual(before, stored("events"))
        self.ok(self.log_in())
        self.set_keys(*keys)
        self.ok(self.confirm(self.code("bob"), "bob"))

    def test_key_that_does_not_fit(self) -> None:
        """With another key codes are answered with a 503; recovery codes still work."""
        self.enrol()
        keys = self.app.config["ENCRYPTION_KEYS"]
        for other in ((), ("another key of at least 32 bytes",)):
            with self.subTest(other):
                self.set_keys(*other)
                sessions = stored_sessions()
                self.assert_not_configured(self.log_in(code=self.code()))
                self.assert_not_configured(self.second_step(self.mfa_token(), self.code()))
                self.assert_not_configured(self.turn_off(code=self.code()))
                self.assertEqual(sessions, stored_sessions())
                self.ok(self.log_in(code=self.recovery_codes["ada"].pop()))
                token = self.mfa_token()
                self.ok(self.second_step(token, self.recovery_codes["ada"].pop()))
        self.set_keys("another key of at least 32 bytes", *keys)
        self.ok(self.log_in(code=self.code()))

    def test_turn_off_without_keys(self) -> None:
        """A user whose secret cannot be decrypted turns it off with a recovery code."""
        self.enrol()
        self.set_keys("another key of at least 32 bytes")
        self.move_clock(600)

        self.ok(self.turn_off(code=self.recovery_codes["ada"][0]))

        self.enrol()
        self.ok(self.log_in(code=self.code()))

    def test_admin_without_keys(self) -> None:
        """An admin can reset it too."""
        self.add("admin", admin=True)
        self.enrol()
        self.set_keys()

        self.ok(self.send("DELETE", f"/users/{self.ids['ada']}/totp", self.tokens["admin"]))

        self.ok(self.log_in())


class TestSecrecy(SecondFactorTestCase):
    """Where the secrets never are."""

    settings: ClassVar[dict[str, Any]] = (
        SecondFactorTestCase.settings | MAIL_SETTINGS | {"RATE_LIMITS": True}
    )

    def test_secrets(self) -> None:
        """No secret, code or token of a first step is in the log, an event or an email."""
        with captured_output() as written:
            self.enrol()
            secrets = [self.secrets["ada"], self.code(steps=-1), *self.recovery_codes["ada"]]
            uri = f"secret={self.secrets['ada']}"
            token = self.mfa_token()
            secrets += [uri, token, token.split(".")[2], self.code()]
            wrong = self.wrong_code()
            self.assert_wrong(self.log_in(code=wrong))
            self.assert_wrong(self.second_step(token, NO_RECOVERY_CODE))
            self.ok(self.second_step(token, self.code()))
            self.ok(self.log_in(code=self.recovery_codes["ada"][0]))
            self.assert_ill_formed(self.log_in(code="secret word"))
            self.app.config["ENCRYPTION_KEYS"] = ("another key of at least 32 bytes",)
            self.assert_error(self.log_in(code=self.next_code()), errors.MfaNotConfigured)
            secrets += [wrong, NO_RECOVERY_CODE, self.code(), "secret word"]
            secrets += [secret.replace("-", "") for secret in secrets]
            secrets += [hashlib.sha256(secret.encode()).hexdigest() for secret in secrets]
        log = written.getvalue()
        self.assertIn("totp_secret_unreadable", log)
        self.assertIn("totp_enabled", log)
        self.assertIn("login_refused", log)
        rows = str(stored("recovery_codes", "totp_factors"))

        for secret in secrets:
            # Not as a part of a longer word: six digits may be in any number or token.
            found = re.compile(rf"(?<![\w.-]){re.escape(secret)}(?![\w-])")
            self.assertNotRegex(log, found)
            self.assertNotRegex(rows, found)
        self.assertNotIn(self.secrets["ada"], log + rows)

    def test_shown_once(self) -> None:
        """No response shows the secret or a recovery code again."""
        self.add("admin", admin=True)
        self.enrol()
        hidden = [self.secrets["ada"], *self.recovery_codes["ada"]]
        own, admin = self.tokens["ada"], self.tokens["admin"]
        path = f"/users/{self.ids['ada']}"
        for route, token in (
            ("/auth/totp", own),
            ("/auth/status", own),
            ("/auth/sessions", own),
            (path, own),
            (path, admin),
            (f"{path}/events", own),
            (f"{path}/events", admin),
            ("/users", admin),
        ):
            with self.subTest(route):
                answer = self.get(route, token)
                self.ok(answer)
                for secret in hidden:
                    self.assertNotIn(secret, answer.get_data(as_text=True))
                self.assertNotIn("mfa_enabled", answer.get_data(as_text=True))
