"""Ways round the second factor: without a code, an attacker with the password gets no session."""

import base64
import contextlib
import io
import json
import re
import secrets
import subprocess
import tempfile
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import jwt
import pyotp
from sqlalchemy import create_engine, delete, make_url, select, text, update
from werkzeug.test import TestResponse

from project import db, errors
from project.accounts import administration, links, rate_limits
from project.config import database_url
from project.lib import hashing
from project.models import User, totp_factors_table, users_table
from project.ops import import_export, import_export_commands
from project.tests import scratch
from project.tests.accounts.mail_case import MAIL_SETTINGS
from project.tests.accounts.second_factor_case import (
    ELSEWHERE,
    HOME,
    NO_RECOVERY_CODE,
    STEP,
    SecondFactorTestCase,
    counted,
    stored,
)
from project.tests.lib.log_capture import captured_output
from project.tests.rows import ORIGIN, add_user, start_session, stored_sessions
from project.tests.scratch import Service
from project.tests.tokens.claims import claims_of
from project.tokens.links import Purpose

LIMIT = 5  # wrong codes before a pause
LINK_ROUTES = {
    "/auth/verify": {},
    "/auth/password/reset": {"new_password": "another"},
    "/auth/email/confirm": {},
    "/auth/invitation": {"password": "another", "username": "new"},
}


class LinksTestCase(SecondFactorTestCase):
    """A test with links from emails."""

    def link(self, purpose: Purpose, name: str = "ada", new_email: str | None = None) -> str:
        """Return the token of a link, as the email of it has."""
        user: Any = links.user_by_email(f"{name}@test.com")
        return links.for_user(purpose, user, 600, new_email).url.partition("token=")[2]

    def reset_password(self, token: str, password: str = "another") -> TestResponse:
        """Return the response to a client that resets a password with a link."""
        return self.send("POST", "/auth/password/reset", token=token, new_password=password)


class AttacksTestCase(LinksTestCase):
    """A test in which `ada` has an authenticator."""

    def setUp(self) -> None:
        """Set the authenticator up."""
        super().setUp()
        self.enrol()

    def assert_closed(self, name: str = "ada", password: str = "test") -> None:
        """Check that the password alone starts no session, and that the password is right."""
        before = stored_sessions()
        self.assert_error(self.log_in(name, password), errors.MfaRequired)
        self.assert_wrong(self.log_in(name, password, code=self.wrong_code(name)))
        self.assertEqual(before, stored_sessions())


class TestSessionsFromBefore(SecondFactorTestCase):
    """Sessions that began before the authenticator was on."""

    def test_other_sessions(self) -> None:
        """No token of another session works, the refresh token included."""
        pairs = [self.ok(self.log_in()) for _ in range(2)]
        pairs.append(self.refresh(pairs.pop()))
        self.begin()
        self.ok(self.send("GET", "/auth/status", pairs[0]["auth_token"]))

        self.ok(self.confirm(self.code()))

        for pair in pairs:
            for path in ("/auth/status", "/auth/totp", "/auth/sessions"):
                answer = self.send("GET", path, pair["auth_token"])
                self.assert_error(answer, errors.SessionEnded)
            answer = self.send("POST", "/auth/refresh", refresh_token=pair["refresh_token"])
            self.assert_error(answer, errors.SessionEnded)

    def test_begun_in_another_session(self) -> None:
        """A session that began to set the authenticator up ends when another one confirms it."""
        mine = self.ok(self.log_in())
        self.begin()

        answer = self.send("POST", "/auth/totp/confirm", mine["auth_token"], code=self.code())

        self.ok(answer)
        refused = self.send("GET", "/auth/totp", self.tokens["ada"])
        self.assert_error(refused, errors.SessionEnded)

    def test_refresh_gives_no_code(self) -> None:
        """A refresh of the session that confirmed neither proves a code again nor forgets it."""
        pair = self.ok(self.log_in())
        self.tokens["ada"] = pair["auth_token"]
        self.enrol()
        self.move_clock(300)

        pair = self.refresh(pair)

        self.assertEqual(["pwd", "otp"], claims_of(pair["auth_token"])["amr"])
        self.tokens["ada"] = pair["auth_token"]
        self.assert_error(self.turn_off(), errors.StepUpRequired)


class TestPasswordReset(AttacksTestCase):
    """An attacker who can read the mailbox resets the password."""

    settings: ClassVar[dict[str, Any]] = (
        AttacksTestCase.settings | MAIL_SETTINGS | {"RATE_LIMITS": True}
    )

    def setUp(self) -> None:
        """Set the authenticator up with a verified email."""
        SecondFactorTestCase.setUp(self)
        self.store(email_verified=True)
        self.enrol()

    def test_factor_stays(self) -> None:
        """The new password starts no session without a code; the sessions have ended."""
        mfa_token, recovery_code = self.mfa_token(), self.recovery_codes["ada"][0]
        token = self.link(Purpose.RESET)

        self.ok(self.reset_password(token))

        self.assert_closed(password="another")
        self.assert_error(self.second_step(mfa_token, self.code()), errors.TokenInvalid)
        refused = self.send("GET", "/auth/status", self.tokens["ada"])
        self.assert_error(refused, errors.SessionEnded)
        self.ok(self.log_in(password="another", code=recovery_code))
        self.ok(self.log_in(password="another", code=self.code()))

    def test_guesses_do_not_start_again(self) -> None:
        """A reset ends a pause after wrong passwords, and none after wrong codes."""
        with self.at(ELSEWHERE):
            mfa_token = self.mfa_token()
            for _ in range(LIMIT):
                self.assert_wrong(self.second_step(mfa_token, self.wrong_code()))
            for number in range(3):
                self.ok(self.reset_password(self.link(Purpose.RESET), f"another {number}"))

                refused = self.log_in(password=f"another {number}", code=self.code())
                self.assert_error(refused, errors.TooManyAttempts)

    def test_set_while_unverified(self) -> None:
        """A factor from before the email was verified goes, also if it was verified since."""
        for name, is_verified in (("cho", True), ("dan", False)):
            with self.subTest(name):
                self.add(name)
                self.enrol(name)
                if is_verified:
                    token = self.link(Purpose.VERIFY, name)
                    self.ok(self.send("POST", "/auth/verify", token=token))
                    self.assert_error(self.log_in(name), errors.MfaRequired)

                self.ok(self.reset_password(self.link(Purpose.RESET, name)))

                pair = self.ok(self.log_in(name, "another"))
                self.tokens[name] = pair["auth_token"]
                self.assertEqual((False, 0), self.state(name))

    def test_begun_before_the_reset(self) -> None:
        """An attacker who began to set an authenticator up cannot confirm it after the reset."""
        self.begin("bob")
        code = self.code("bob")

        self.ok(self.reset_password(self.link(Purpose.RESET, "bob")))

        self.assert_error(self.confirm(code, "bob"), errors.SessionEnded)
        self.tokens["bob"] = self.ok(self.log_in("bob", "another"))["auth_token"]
        self.assertEqual((False, 0), self.state("bob"))
        self.assert_error(self.confirm(code, "bob"), errors.TotpNotFound)


class TestChanges(AttacksTestCase):
    """Requests that change a user, with members that they do not have."""

    def test_members_of_a_change(self) -> None:
        """No member of a PATCH touches a second factor; a change needs a code."""
        self.move_clock(300)
        path, before = f"/users/{self.ids['ada']}", stored("events", "throttles")
        members: dict[str, object] = {
            "mfa_enabled": False,
            "second_factor": None,
            "totp": None,
            "totp_factors": [],
            "recovery_codes": [],
            "last_step": 0,
            "amr": ["pwd", "otp"],
            "code_given_at": "2100-01-01T00:00:00Z",
            "STEP_UP_SECONDS": 86_400,
        }
        confirmed = {"current_password": "test"}
        self.assert_error(
            self.send("PATCH", path, self.tokens["ada"], **members, **confirmed),
            errors.InvalidPayload,
        )
        for change in (
            {"username": "eve"},
            {"email": "eve@test.com"},
            {"username": "ada"},
            {"username": "eve", "code": self.wrong_code()},
        ):
            with self.subTest(change):
                body = members | confirmed | change
                answer = self.send("PATCH", path, self.tokens["ada"], **body)

                refusal = errors.WrongCode if "code" in change else errors.StepUpRequired
                self.assert_error(answer, refusal)
        self.assert_error(
            self.send("PATCH", path, self.tokens["ada"], roles=["x"], **confirmed, **members),
            errors.PermissionDenied,
        )
        self.assertEqual(before, stored("events", "throttles"))

        body = members | confirmed | {"username": "eve", "code": self.code()}
        self.ok(self.send("PATCH", path, self.tokens["ada"], **body))

        self.assert_closed()
        self.assertEqual((True, 10), self.state())

    def test_members_of_a_new_user(self) -> None:
        """A user who registers or is added has no second factor, whatever the client sends."""
        for number, path in enumerate(("/auth/register", "/users")):
            name = f"new{number}"
            body = {"username": name, "email": f"{name}@test.com", "password": "test"}
            members = {"mfa_enabled": True, "second_factor": "x", "amr": ["pwd", "otp"]}

            self.ok(self.send("POST", path, **body, **members), 201)

            pair = self.ok(self.log_in(name))
            self.assertEqual(["pwd"], claims_of(pair["auth_token"])["amr"])

    def test_acts_on_the_own_account(self) -> None:
        """Without a code, each act that needs the password is refused, and changes nothing."""
        self.move_clock(300)
        user = f"/users/{self.ids['ada']}"
        for method, path, body in (
            ("POST", "/auth/password", {"new_password": "another"}),
            ("POST", "/auth/email", {"email": "eve@test.com"}),
            ("DELETE", "/auth/account", {}),
            ("DELETE", "/auth/totp", {}),
            ("POST", "/auth/recovery_codes", {}),
            ("PATCH", user, {"email": "eve@test.com"}),
            ("PATCH", user, {"username": "eve"}),
        ):
            with self.subTest(path, method=method), mock.patch.dict(self.app.config, MAIL_SETTINGS):
                before = stored("events", "throttles")
                for password in ("test", "wrong"):
                    sent = body | {"current_password": password}
                    answer = self.send(method, path, self.tokens["ada"], **sent)
                    self.assert_error(answer, errors.StepUpRequired)
                sent = body | {"current_password": "test"}
                for code in (self.wrong_code(), self.code(steps=1), NO_RECOVERY_CODE):
                    answer = self.send(method, path, self.tokens["ada"], **sent, code=code)
                    self.assert_wrong(answer)
                self.assertEqual(before, stored("events", "throttles"))

    def test_wrong_code_ends_the_interval(self) -> None:
        """A code that is sent is looked at, also while the session needs none."""
        self.assert_wrong(self.turn_off(code=self.wrong_code()))
        self.assertEqual((True, 10), self.state())


class TestImport(AttacksTestCase):
    """A file of users that names a user who exists, or has the second factor of another user."""

    def import_users(self, *lines: dict[str, Any]) -> tuple[int, int, list[dict[str, str]]]:
        """Import users; return how many were added, how many existed, and the refusals."""
        file = io.BytesIO("\n".join(map(json.dumps, lines)).encode())
        (batch,) = import_export.import_users(file, as_csv=False)
        db.session.commit()
        return batch.added, batch.existing, [refusal.errors for refusal in batch.refused]

    def exported(self) -> list[dict[str, Any]]:
        """Return the users as a file has them, with the second factor of `ada`."""
        return list(import_export.export_users(with_factors=True))

    def test_existing_user(self) -> None:
        """An existing user keeps the second factor, whatever the file has."""
        self.enrol("bob")
        ada, bob = self.exported()
        without = {name: value for name, value in ada.items() if name != "second_factor"}
        before = stored()
        for line in (
            without,
            without | {"password_hash": bob["password_hash"]},
            ada | {"email": "bob@test.com"},
            ada | {"username": "bob", "email": "bob@test.com"},
            ada | {"second_factor": bob["second_factor"]},
            ada | {"second_factor": None},
            ada | {"second_factor": ""},
            ada | {"mfa_enabled": False},
        ):
            with self.subTest(line):
                added, _, _ = self.import_users(line)

                self.assertEqual(0, added)
                self.assertEqual(before, stored())
        self.assert_closed()
        self.assert_closed("bob")

    def test_factor_of_another_user(self) -> None:
        """A second factor from the line of one user is refused in the line of another."""
        ada, _ = self.exported()
        administration.reset_totp_of("ada@test.com", ORIGIN)
        db.session.execute(delete(users_table))
        db.session.commit()
        refused = {"second_factor": "cannot be decrypted with ENCRYPTION_KEYS for this email"}
        for email in ("eve@test.com", "ada@test.com.example", "ada@test.co"):
            with self.subTest(email):
                outcome = self.import_users(ada | {"email": email})

                self.assertEqual((0, 0, [refused]), outcome)
        self.assertEqual((1, 0, []), self.import_users(ada | {"email": "ADA@TEST.com"}))
        self.assert_error(self.log_in(), errors.MfaRequired)

    def test_stored_secret_as_a_sealed_one(self) -> None:
        """The secret from the database is no second factor of a file, and vice versa."""
        ada, _ = self.exported()
        secret = db.session.scalars(select(totp_factors_table.c.secret)).one()
        line = ada | {"username": "eve", "email": "eve@test.com"}
        line["second_factor"] = base64.b64encode(secret).decode()
        self.assertEqual(["second_factor"], list(self.import_users(line)[2][0]))
        sealed = base64.b64decode(ada["second_factor"])
        db.session.execute(update(totp_factors_table).values(secret=sealed))
        db.session.commit()

        self.assert_error(self.log_in(code=self.code()), errors.MfaNotConfigured)


class TestAdmin(AttacksTestCase):
    """An admin's session without a code."""

    def setUp(self) -> None:
        """Add an admin with an authenticator, whose last code was some time ago."""
        super().setUp()
        self.add("root", admin=True)
        self.enrol("root")
        self.move_clock(300)

    def acts(self, name: str = "ada") -> Iterator[tuple[str, str, dict[str, object]]]:
        """Yield the method, the path and the body of each act of an admin on another account."""
        path = f"/users/{self.ids[name]}"
        for change in ({"active": False}, {"admin": True}, {"roles": ["x"]}, {"email": "e@x.y"}):
            yield "PATCH", path, dict(change)
        yield "DELETE", path, {}
        yield "DELETE", f"{path}/totp", {}

    def test_without_a_code(self) -> None:
        """Every act on another account is refused, and changes nothing."""
        before = stored("events", "throttles")
        for method, path, body in self.acts():
            with self.subTest(path, method=method, body=body):
                answer = self.send(method, path, self.tokens["root"], **body)
                self.assert_error(answer, errors.StepUpRequired)
                for code in (self.wrong_code("root"), NO_RECOVERY_CODE):
                    answer = self.send(method, path, self.tokens["root"], **body, code=code)
                    self.assert_wrong(answer)
                self.assertEqual(before, stored("events", "throttles"))

    def test_codes_of_the_other_account(self) -> None:
        """A code of the user whom the act is about is none of the admin, and is not used up."""
        for method, path, body in self.acts():
            with self.subTest(path, method=method, body=body):
                for code in (self.code("ada"), self.recovery_codes["ada"][0]):
                    answer = self.send(method, path, self.tokens["root"], **body, code=code)
                    self.assert_wrong(answer)
        self.ok(self.log_in(code=self.code()))
        self.ok(self.log_in(code=self.recovery_codes["ada"][0]))

    def test_own_factor(self) -> None:
        """An admin cannot turn their own authenticator off without the password."""
        path = f"/users/{self.ids['root']}/totp"
        for body in ({}, {"code": self.code("root")}, {"current_password": "test"}):
            answer = self.send("DELETE", path, self.tokens["root"], **body)
            self.assert_error(answer, errors.OwnTotp)
        self.assert_closed("root")

    def test_users_who_are_no_admins(self) -> None:
        """A user can reset neither another user's authenticator nor their own in this way."""
        self.enrol("bob")
        for name in ("ada", "bob"):
            path = f"/users/{self.ids[name]}/totp"
            answer = self.send("DELETE", path, self.tokens["bob"], code=self.code("bob"))
            self.assert_error(answer, errors.PermissionDenied)
        self.assert_error(self.send("DELETE", path), errors.TokenMissing)
        self.assert_closed()
        self.assert_closed("bob")

    def test_missing_user(self) -> None:
        """A right code for an act on a user who does not exist counts as no wrong code."""
        with mock.patch.dict(self.app.config, RATE_LIMITS=True):
            rate_limits.init_app(self.app)
            for path in ("/users/2147483647", "/users/2147483647/totp"):
                for _ in range(LIMIT):
                    code = self.next_code("root")
                    answer = self.send("DELETE", path, self.tokens["root"], code=code)
                    self.assert_error(answer, errors.UserNotFound)
            self.ok(self.log_in("root", code=self.next_code("root")))


class TestTokens(AttacksTestCase):
    """Tokens of one kind, sent as another."""

    settings: ClassVar[dict[str, Any]] = AttacksTestCase.settings | MAIL_SETTINGS

    def test_mfa_token_elsewhere(self) -> None:
        """The token of the first step is no auth token, no refresh token and no link."""
        token, before = self.mfa_token(), stored("events")
        self.assertEqual("mfa+jwt", jwt.get_unverified_header(token)["typ"])

        for method, path in (
            ("GET", "/auth/status"),
            ("GET", "/auth/totp"),
            ("POST", "/auth/logout"),
            ("GET", "/auth/sessions"),
            ("POST", "/auth/totp"),
            ("POST", "/auth/totp/confirm"),
            ("GET", f"/users/{self.ids['ada']}/events"),
        ):
            with self.subTest(path, method=method):
                self.assert_error(self.send(method, path, token), errors.TokenInvalid)
        answer = self.send("POST", "/auth/refresh", refresh_token=token)
        self.assert_error(answer, errors.TokenInvalid)
        for path, body in LINK_ROUTES.items():
            with self.subTest(path):
                answer = self.send("POST", path, token=token, **body)
                self.assert_error(answer, errors.LinkInvalid)
        self.assertEqual(before, stored("events"))

    def test_other_tokens_as_mfa_token(self) -> None:
        """No other token of the user is accepted in the second step, and no code is used up."""
        pair = self.ok(self.log_in(code=self.code()))
        others = {
            "auth token": pair["auth_token"],
            "refresh token": pair["refresh_token"],
            "reset": self.link(Purpose.RESET),
            "verification": self.link(Purpose.VERIFY),
            "change of email": self.link(Purpose.EMAIL, new_email="new@test.com"),
            "invitation": self.link(Purpose.INVITATION),
            "none": "x",
            "empty": "",
        }
        self.move_clock(STEP)
        before = stored()
        for name, token in others.items():
            with self.subTest(name):
                self.assert_error(self.second_step(token, self.code()), errors.TokenInvalid)
        self.assertEqual(before, stored())

    def test_codes_of_another_user(self) -> None:
        """The token of one user with the code of another one starts no session of either."""
        self.enrol("bob")
        token, before = self.mfa_token(), stored_sessions()

        for code in (self.code("bob"), self.recovery_codes["bob"][0]):
            self.assert_wrong(self.second_step(token, code))
            self.assert_wrong(self.log_in(code=code))

        self.assertEqual(before, stored_sessions())
        self.ok(self.log_in("bob", code=self.code("bob")))
        self.ok(self.log_in("bob", code=self.recovery_codes["bob"][0]))

    def test_token_for_another_user(self) -> None:
        """A token whose subject is another user is invalid, even under the key of the service."""
        self.enrol("bob")
        token = self.mfa_token()
        payload = jwt.decode(token, options={"verify_signature": False})
        header = {"typ": "mfa+jwt"}
        key = self.app.config["SECRET_KEY"]
        again = jwt.encode(payload, key, algorithm="HS256", headers=header)
        forged = payload | {"sub": str(self.ids["bob"])}

        refused = jwt.encode(forged, key, algorithm="HS256", headers=header)
        self.assert_error(self.second_step(refused, self.code("bob")), errors.TokenInvalid)
        unsigned = jwt.encode(payload, "", algorithm="none", headers=header)
        self.assert_error(self.second_step(unsigned, self.code()), errors.TokenInvalid)
        self.ok(self.second_step(again, self.code()))


class TestAccounts(AttacksTestCase):
    """What happens to the account meanwhile."""

    settings: ClassVar[dict[str, Any]] = AttacksTestCase.settings | {"RATE_LIMITS": True}

    def change_email(self, email: str, code: str) -> None:
        """Give `ada` another email."""
        body = {"email": email, "current_password": "test", "code": code}
        self.ok(self.send("PATCH", f"/users/{self.ids['ada']}", self.tokens["ada"], **body))

    def test_email(self) -> None:
        """After a change of the email the factor is still on, and guesses stay limited."""
        with self.at(ELSEWHERE):
            mfa_token = self.mfa_token()
            for _ in range(LIMIT):
                self.assert_wrong(self.second_step(mfa_token, self.wrong_code()))
        self.change_email("new@test.com", self.code())

        self.assertEqual((True, 10), self.state())
        with self.at(ELSEWHERE):
            self.assert_error(self.second_step(mfa_token, self.code()), errors.TokenInvalid)
            body = {"email": "new@test.com", "password": "test"}
            answer = self.send("POST", "/auth/login", **body)
            mfa_token = self.assert_error(answer, errors.MfaRequired)["mfa_token"]
            looked_at = 0
            while (answer := self.second_step(mfa_token, self.wrong_code())).status_code == 400:
                looked_at += 1
            self.assert_error(answer, errors.TooManyAttempts)
        self.assertLessEqual(looked_at, LIMIT)

    def test_email_and_back(self) -> None:
        """An attacker without a code cannot change the email, and so gets no new count."""
        self.move_clock(300)
        with self.at(ELSEWHERE):
            mfa_token = self.mfa_token()
            for _ in range(LIMIT):
                self.assert_wrong(self.second_step(mfa_token, self.wrong_code()))
            body = {"email": "new@test.com", "current_password": "test"}
            answer = self.send("PATCH", f"/users/{self.ids['ada']}", self.tokens["ada"], **body)
            self.assert_error(answer, errors.StepUpRequired)
            answer = self.second_step(mfa_token, self.code())
            self.assert_error(answer, errors.TooManyAttempts)

    def test_change_from_before(self) -> None:
        """A change of the email that was requested before the factor was on is void."""
        with mock.patch.dict(self.app.config, MAIL_SETTINGS):
            before = self.link(Purpose.EMAIL, "bob", "new@test.com")
            self.enrol("bob")
            refused = self.send("POST", "/auth/email/confirm", token=before)
            self.assert_error(refused, errors.LinkInvalid)
            after = self.link(Purpose.EMAIL, "bob", "new@test.com")
            self.ok(self.send("POST", "/auth/email/confirm", token=after))

    def test_next_owner_of_the_email(self) -> None:
        """Wrong codes of the account that had an email before do not count for its next user."""
        with self.at(ELSEWHERE):
            for _ in range(LIMIT):
                self.assert_wrong(self.log_in(code=self.wrong_code()))
        self.change_email("new@test.com", self.code())

        other = add_user("other", "ada@test.com", "test")
        self.ids["ada"], self.tokens["ada"] = other.id, start_session(other).auth_token
        self.enrol()
        with self.at(ELSEWHERE):
            self.ok(self.log_in(code=self.code()))

    def test_deactivation(self) -> None:
        """The factor is still on after a deactivation, and a code from before stays used."""
        used, mfa_token = self.code(), self.mfa_token()
        self.ok(self.log_in(code=used))
        for active in (False, True):
            administration.set_active("ada@test.com", active, ORIGIN)
            db.session.commit()
            if not active:
                self.assert_error(self.log_in(code=self.code()), errors.AccountInactive)
                self.assert_error(self.second_step(mfa_token, self.code()), errors.TokenInvalid)

        self.assert_closed()
        self.assert_wrong(self.log_in(code=used))
        self.assert_wrong(self.second_step(mfa_token, used))
        self.ok(self.log_in(code=self.next_code()))

    def test_deletion(self) -> None:
        """A new account with the email of a deleted one has no factor, and nothing of it works."""
        mfa_token, recovery_code = self.mfa_token(), self.recovery_codes["ada"][0]
        body = {"current_password": "test", "code": self.code()}
        self.ok(self.send("DELETE", "/auth/account", self.tokens["ada"], **body))
        tables = stored()
        self.assertEqual(([], []), (tables["totp_factors"], tables["recovery_codes"]))

        body = {"username": "ada", "email": "ada@test.com", "password": "test"}
        pair = self.ok(self.send("POST", "/auth/register", **body), 201)

        self.assert_error(self.second_step(mfa_token, self.next_code()), errors.TokenInvalid)
        self.assert_error(self.second_step(mfa_token, recovery_code), errors.TokenInvalid)
        self.assertEqual(["pwd"], claims_of(self.ok(self.log_in())["auth_token"])["amr"])
        self.tokens["ada"] = pair["auth_token"]
        self.assertEqual((False, 0), self.state())

    def test_turned_off_and_on(self) -> None:
        """Neither codes nor recovery codes of the factor from before work with the new one."""
        old, recovery_code = dict(self.secrets), self.recovery_codes["ada"][0]
        mfa_token = self.mfa_token()
        self.ok(self.turn_off(code=self.code()))
        self.move_clock(STEP)
        self.enrol()

        for code in (recovery_code, self.code()):
            genuine = code == self.code()
            self.secrets, new = old if genuine else self.secrets, dict(self.secrets)
            self.assert_wrong(self.log_in(code=self.code() if genuine else code))
            self.assert_wrong(self.second_step(mfa_token, self.code() if genuine else code))
            self.secrets = new
        self.ok(self.second_step(mfa_token, self.code()))


class TestPendingSecrets(SecondFactorTestCase):
    """A secret that was not confirmed yet."""

    def test_login(self) -> None:
        """Its code proves nothing: the session has none, and steps up to nothing."""
        self.begin()

        pair = self.ok(self.log_in(code=self.code()))

        self.assertEqual(["pwd"], claims_of(pair["auth_token"])["amr"])
        self.assertIsNone(stored_sessions()[-1]["code_given_at"])
        self.ok(self.confirm(self.code()))

    def test_second_step(self) -> None:
        """Its code does not complete a login that began with the factor from before."""
        self.enrol()
        mfa_token = self.mfa_token()
        self.ok(self.turn_off(code=self.code()))
        self.begin()
        before = stored_sessions()

        answer = self.second_step(mfa_token, self.code())

        self.assertIn(answer.status_code, {400, 401})
        self.assertEqual(before, stored_sessions())


class TestStoredSecrets(AttacksTestCase):
    """An attacker who can write to the database, and keys that were lost."""

    def store_secret(self, name: str, secret: bytes) -> None:
        """Replace the stored secret of a user."""
        theirs = totp_factors_table.c.user_id == self.ids[name]
        db.session.execute(update(totp_factors_table).where(theirs).values(secret=secret))
        db.session.commit()

    def secret_of(self, name: str) -> bytes:
        """Return the stored secret of a user."""
        theirs = totp_factors_table.c.user_id == self.ids[name]
        return bytes(db.session.scalars(select(totp_factors_table.c.secret).where(theirs)).one())

    def assert_unreadable(self, name: str) -> None:
        """Check that no code of an authenticator is accepted, and that this starts no session."""
        mfa_token, before = self.mfa_token(name), stored_sessions()
        for code in (self.code("ada"), self.code("bob"), self.wrong_code(name)):
            for answer in (self.log_in(name, code=code), self.second_step(mfa_token, code)):
                self.assert_error(answer, errors.MfaNotConfigured)
                self.assertIn("Retry-After", answer.headers)
        self.assertEqual(before, stored_sessions())

    def test_copied(self) -> None:
        """The encrypted secret of one user is none in the row of another."""
        self.enrol("bob")
        before = self.secret_of("bob")
        self.store_secret("bob", self.secret_of("ada"))

        self.assert_unreadable("bob")

        self.store_secret("bob", before)
        self.ok(self.log_in("bob", code=self.code("bob")))

    def test_copied_to_a_pending_one(self) -> None:
        """The encrypted secret of one user cannot be confirmed by another."""
        self.begin("bob")
        self.store_secret("bob", self.secret_of("ada"))

        self.assert_error(self.confirm(self.code("ada"), "bob"), errors.MfaNotConfigured)

        self.ok(self.log_in("bob"))

    def test_damaged(self) -> None:
        """A secret that cannot be decrypted closes the account; recovery codes open it."""
        self.enrol("bob")
        genuine = self.secret_of("ada")
        codes = iter(self.recovery_codes["ada"])
        for damaged in (b"", b"x", genuine[:-1], genuine + b"x", bytes(len(genuine))):
            with self.subTest(damaged):
                self.store_secret("ada", damaged)

                self.assert_unreadable("ada")

                self.ok(self.log_in(code=next(codes)))

    def test_lost_keys(self) -> None:
        """Without the key nothing is accepted but recovery codes; with it, codes are again."""
        self.enrol("bob")
        codes = iter(self.recovery_codes["ada"])
        keys = self.app.config["ENCRYPTION_KEYS"]
        for lost in ((), ("x" * 64,)):
            with self.subTest(lost), mock.patch.dict(self.app.config, ENCRYPTION_KEYS=lost):
                self.assert_unreadable("ada")
                self.ok(self.log_in(code=next(codes)))
                body = {"current_password": "test", "code": self.code()}
                self.move_clock(300)
                answer = self.send("DELETE", "/auth/totp", self.tokens["ada"], **body)
                self.assert_error(answer, errors.MfaNotConfigured)
        with mock.patch.dict(self.app.config, ENCRYPTION_KEYS=("x" * 64, *keys)):
            self.ok(self.log_in(code=self.code()))

    def test_flag_alone(self) -> None:
        """A user whose row says that there is a factor, but who has none, gets no session."""
        self.store("bob", mfa_enabled=True)

        mfa_token = self.mfa_token("bob")

        for code in (self.code(), "000000", self.recovery_codes["ada"][0]):
            self.assert_wrong(self.log_in("bob", code=code))
            self.assert_wrong(self.second_step(mfa_token, code))


class TestDump(AttacksTestCase):
    """An attacker who gets a copy of the database."""

    settings: ClassVar[dict[str, Any]] = AttacksTestCase.settings | MAIL_SETTINGS

    def dump(self) -> bytes:
        """Return all columns of all tables as text, and on SQLite the bytes of the files too."""
        lines = []
        for table in db.metadata.sorted_tables:
            if self.on_postgresql:
                rows = db.session.execute(text(f"SELECT x::text FROM {table.name} x"))  # noqa: S608
            else:
                rows = db.session.execute(text(f"SELECT * FROM {table.name}"))  # noqa: S608
            lines += [str(tuple(row)) for row in rows]
            columns = [column for column in table.columns if column.type.python_type is bytes]
            for row in db.session.execute(select(*columns)) if columns else ():
                lines += [value.hex() + value.decode("latin-1") for value in row]
        db.session.rollback()
        dumped = "\n".join(lines).encode("latin-1", "replace")
        if not self.on_postgresql:
            path = Path(make_url(self.app.config["SQLALCHEMY_DATABASE_URI"]).database or "")
            files = [path, path.with_name(f"{path.name}-wal")]
            # By another process: closing a file drops the locks that SQLite has on it in this one.
            existing = [file for file in files if file.exists()]
            dumped += subprocess.run(
                ["/bin/cat", *existing], capture_output=True, check=True
            ).stdout
        return dumped

    def test_secrets(self) -> None:
        """There is no secret, no recovery code, no code and no token in it, nor in the log."""
        with captured_output() as log:
            codes = self.use_everything()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "users.jsonl")
            with (
                contextlib.redirect_stderr(io.StringIO()),
                mock.patch("project.lib.database.set_answer_timeout"),
            ):
                import_export_commands.export_users(str(file), with_factors=True)
            exported = file.read_bytes()

        secret = self.secrets["ada"]
        raw = base64.b32decode(secret)
        forbidden = {secret, secret.lower(), raw.hex(), raw.hex().upper(), *codes["tokens"]}
        forbidden |= {base64.b64encode(raw).decode(), raw.decode("latin-1")}
        for code in codes["recovery"]:
            plain = code.replace("-", "")
            forbidden |= {code, plain, plain.lower(), base64.b32decode(plain).hex()}
        dumped = self.dump()
        self.assertGreater(dumped.count(b"wrong_code"), 0)
        for name, place in (
            ("database", dumped),
            ("export", exported),
            ("log", log.getvalue().encode()),
        ):
            for each in forbidden:
                self.assertNotIn(each.encode("latin-1"), place, name)
        texts = str([(row["details"], row["user_agent"]) for row in stored()["events"]])
        texts += str([(row["parameters"], row["error"]) for row in stored()["mails"]])
        self.assertEqual([], re.findall(r"(?<![0-9.])[0-9]{6}(?![0-9])", texts))
        for code in codes["totp"]:
            self.assertNotIn(f'"{code}"', log.getvalue())
            self.assertNotIn(code, texts)

    def use_everything(self) -> dict[str, list[str]]:
        """Use codes of all kinds in all ways; return them, and the tokens that were given."""
        self.store(email_verified=True)
        mfa_token = self.mfa_token()
        totp = [self.wrong_code()]
        self.assert_wrong(self.second_step(mfa_token, totp[0]))
        totp.append(self.code())
        pairs = [self.ok(self.second_step(mfa_token, totp[-1]))]
        self.assert_wrong(self.log_in(code=totp[-1]))
        recovery = list(self.recovery_codes["ada"])
        pairs.append(self.ok(self.log_in(code=recovery[0])))
        self.assert_wrong(self.log_in(code=recovery[0]))
        self.tokens["ada"] = pairs[0]["auth_token"]
        totp.append(self.next_code())
        answer = self.ok(self.replace_recovery_codes(code=totp[-1]))
        recovery += answer["data"]["recovery_codes"]
        self.move_clock(300)
        self.assert_error(self.turn_off(), errors.StepUpRequired)
        self.ok(self.send("POST", "/auth/password/forgot", email="ada@test.com"), 202)
        tokens = [mfa_token, self.mfa_token()]
        tokens += [pair[name] for pair in pairs for name in ("auth_token", "refresh_token")]
        return {"totp": totp, "recovery": recovery, "tokens": tokens}


class TestCounts(AttacksTestCase):
    """An attacker who knows the password guesses codes, and tries to begin the count again."""

    settings: ClassVar[dict[str, Any]] = AttacksTestCase.settings | {"RATE_LIMITS": True}

    def guess_all_ways(self, mfa_token: str, code: str) -> list[int]:
        """Return the statuses of the responses to a code that is sent in each way."""
        body = {"current_password": "test", "code": code}
        return [
            answer.status_code
            for answer in (
                self.log_in(code=code),
                self.second_step(mfa_token, code),
                self.turn_off(code=code),
                self.replace_recovery_codes(code=code),
                self.send("POST", "/auth/password", self.tokens["ada"], new_password="x", **body),
                self.send("DELETE", "/auth/account", self.tokens["ada"], **body),
            )
        ]

    def test_one_count_for_all_ways(self) -> None:
        """Guesses in a login, in its second step and in a step-up are counted together."""
        with self.at(ELSEWHERE):
            mfa_token = self.mfa_token()

            statuses = self.guess_all_ways(mfa_token, self.wrong_code())

            self.assertEqual([400] * LIMIT + [429], statuses)
            self.assertEqual([429] * 6, self.guess_all_ways(mfa_token, self.code()))

    def test_all_kinds_of_codes(self) -> None:
        """Replays and recovery codes are counted together with wrong codes."""
        used = self.code()
        self.ok(self.log_in(code=used))
        with self.at(ELSEWHERE):
            mfa_token = self.mfa_token()
            for code in (used, NO_RECOVERY_CODE, self.code(steps=1), used, NO_RECOVERY_CODE):
                self.assert_wrong(self.second_step(mfa_token, code))
            for code in (self.recovery_codes["ada"][0], self.next_code()):
                self.assert_error(self.second_step(mfa_token, code), errors.TooManyAttempts)

    def test_login_at_a_known_address(self) -> None:
        """A user who logs in at a known address gives the attacker elsewhere no new guesses."""
        with self.at(ELSEWHERE):
            for _ in range(LIMIT):
                self.assert_wrong(self.log_in(code=self.wrong_code()))
        self.ok(self.log_in(code=self.code()))

        with self.at(ELSEWHERE):
            self.assert_error(self.log_in(code=self.code()), errors.TooManyAttempts)

    def test_own_account_of_the_attacker(self) -> None:
        """A right code for one account gives no guesses for another."""
        self.enrol("bob")
        with self.at(ELSEWHERE):
            looked_at = 0
            for _ in range(LIMIT + 2):
                looked_at += self.log_in(code=self.wrong_code()).status_code == 400
                self.ok(self.log_in("bob", code=self.next_code("bob")))
        # The clock has moved by less than the first two pauses last.
        self.assertLessEqual(looked_at, LIMIT + 1)

    def test_first_steps(self) -> None:
        """A right password gives no attempt back before the code is right."""
        with self.at(ELSEWHERE):
            for _ in range(10):
                self.assert_error(self.log_in(), errors.MfaRequired)
            self.assert_error(self.log_in(), errors.TooManyAttempts)
            self.assert_error(self.log_in(password="wrong"), errors.TooManyAttempts)

    def test_wrong_passwords_use_no_codes_up(self) -> None:
        """An attacker without the password neither uses codes up nor causes their pause."""
        code = self.code()
        with self.at(ELSEWHERE):
            for _ in range(10):
                refused = self.log_in(password="wrong", code=code)
                self.assert_error(refused, errors.InvalidCredentials)
        self.assertEqual([], [key for key in counted() if key.startswith("code:")])
        self.ok(self.log_in(code=code))

    def test_second_step_at_another_address(self) -> None:
        """A second step takes nothing off an address where nothing was counted for the login."""
        self.enrol("bob")
        mfa_token = self.mfa_token("bob")
        with self.at(ELSEWHERE):
            for number in range(100):
                answer = self.send("POST", "/auth/login", email=f"{number}@x.y", password="x")
                self.assert_error(answer, errors.InvalidCredentials)
            self.assert_error(self.log_in(), errors.TooManyAttempts)

            self.ok(self.second_step(mfa_token, self.code("bob")))

            self.assert_error(self.log_in(), errors.TooManyAttempts)

    def test_second_steps_with_one_token(self) -> None:
        """Several second steps give back no more attempts than their one first step."""
        with mock.patch.dict(self.app.config, KNOWN_ADDRESS_DAYS=0):
            rate_limits.init_app(self.app)
            self.enrol("bob")
            with self.at(ELSEWHERE):
                for number in range(10):
                    self.send("POST", "/auth/login", email=f"{number}@x.y", password="x")
                mfa_token = self.mfa_token("bob")
                for code in self.recovery_codes["bob"][:LIMIT]:
                    self.ok(self.second_step(mfa_token, code))

            self.assertGreaterEqual(counted()[f"login:{ELSEWHERE}"], 10)

    def test_addresses_from_before(self) -> None:
        """Logins before the factor was on give the attacker no counts of codes of their own."""
        addresses = [f"198.51.100.{number}" for number in range(100, 104)]
        for ip in addresses:
            with self.at(ip):
                self.ok(self.log_in("bob"))
        with self.at(HOME):
            self.enrol("bob")

        looked_at = 0
        for ip in addresses:
            with self.at(ip):
                for _ in range(LIMIT):
                    answer = self.log_in("bob", code=self.wrong_code("bob"))
                    looked_at += answer.status_code == 400

        self.assertLessEqual(looked_at, LIMIT)

    def test_without_keys(self) -> None:
        """A right password that the service cannot act on counts as no wrong password."""
        with mock.patch.dict(self.app.config, ENCRYPTION_KEYS=()), self.at(ELSEWHERE):
            for _ in range(12):
                body = {"current_password": "test"}
                answer = self.send("POST", "/auth/totp", self.tokens["bob"], **body)
                self.assert_error(answer, errors.MfaNotConfigured)


class TestResetMeanwhile(LinksTestCase):
    """An authenticator that is turned on while a reset hashes the new password."""

    settings: ClassVar[dict[str, Any]] = (
        SecondFactorTestCase.settings | MAIL_SETTINGS | {"RATE_LIMITS": True}
    )

    def reset_while(self, act: Callable[[], object]) -> None:
        """Reset the password of `bob` from ELSEWHERE, and do something while it is hashed."""
        original, acts = hashing.hash, [act]

        def hash_slowly(password: str) -> str:
            if acts:
                acts.pop()()
            return original(password)

        with mock.patch.object(hashing, "hash", hash_slowly), self.at(ELSEWHERE):
            self.ok(self.reset_password(self.link(Purpose.RESET, "bob")))
        self.assertEqual([], acts)

    def confirm_at_home(self) -> None:
        """Turn the authenticator of `bob` on."""
        with self.at(HOME):
            self.ok(self.confirm(self.code("bob"), "bob"))

    def test_unverified(self) -> None:
        """A factor that an attacker turns on during the reset of the owner is not on after it."""
        self.begin("bob")

        self.reset_while(self.confirm_at_home)

        self.tokens["bob"] = self.ok(self.log_in("bob", "another"))["auth_token"]
        self.assertEqual((False, 0), self.state("bob"))

    def test_verified(self) -> None:
        """A factor that the owner turns on during the reset of an attacker is on after it.

        The attacker gets no count of codes of their own.
        """
        self.store("bob", email_verified=True)
        self.begin("bob")

        self.reset_while(self.confirm_at_home)

        self.assert_error(self.log_in("bob", "another"), errors.MfaRequired)
        networks = [row["network"] for row in stored()["known_addresses"]]
        self.assertEqual([HOME], networks)


class TestWire(unittest.TestCase):
    """Requests as they arrive at a real server, whose sessions need a code for every act."""

    def setUp(self) -> None:
        """Start the server, with an admin who has an authenticator."""
        url = self.enterContext(scratch.database())
        settings = {"ENCRYPTION_KEYS": secrets.token_hex(32), "STEP_UP_SECONDS": "0"}
        self.service = self.enterContext(Service(url, **settings))
        for name in ("root", "ada", "bob"):
            self.service.register(name)
        engine = create_engine(database_url(url))
        with engine.begin() as connection:
            connection.execute(update(User).where(User.username == "root").values(admin=True))
            ids = {
                name: number for number, name in connection.execute(select(User.id, User.username))
            }
        engine.dispose()
        self.path = f"/users/{ids['ada']}"
        self.token = self.service.login("root")[1]["auth_token"]
        body: dict[str, str] = {"current_password": "test"}
        secret = self.service.request("POST", "/auth/totp", body, self.token)[1]["data"]["secret"]
        body = {"code": pyotp.TOTP(secret).now()}
        answer = self.service.request("POST", "/auth/totp/confirm", body, self.token)[1]
        self.recovery_codes: list[str] = answer["data"]["recovery_codes"]

    def delete(self, *headers: str, body: bytes = b"") -> tuple[int, str]:
        """Return the status and the code of the response to a DELETE with these lines."""
        lines = (
            f"DELETE {self.path} HTTP/1.1",
            "Host: test",
            f"Authorization: Bearer {self.token}",
            "Connection: close",
            *headers,
        )
        answer = b""
        with self.service.connect() as connection:
            connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            while piece := connection.recv(65_536):
                answer += piece
        head, _, content = answer.rpartition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(content).get("code", "")

    def test_codes(self) -> None:
        """A code is read from the body however long it is said to be, and from nowhere else."""
        as_json, chunked = "Content-Type: application/json", "Transfer-Encoding: chunked"
        wrong = json.dumps({"code": NO_RECOVERY_CODE}).encode()
        right = json.dumps({"code": self.recovery_codes[0]}).encode()
        before = self.path
        for name, expected, headers, body in (
            ("no body", (403, "mfa_required"), [], b""),
            ("empty", (403, "mfa_required"), ["Content-Length: 0"], b""),
            ("empty chunks", (403, "mfa_required"), [chunked], b"0\r\n\r\n"),
            ("no code", (403, "mfa_required"), [as_json, "Content-Length: 2"], b"{}"),
            ("wrong", (400, "wrong_code"), [as_json, f"Content-Length: {len(wrong)}"], wrong),
            ("wrong in chunks", (400, "wrong_code"), [as_json, chunked], in_chunks(wrong)),
            ("no type", (400, "invalid_payload"), [f"Content-Length: {len(right)}"], right),
            ("too long", (413, "payload_too_large"), [as_json, chunked], in_chunks(b" " * 65_537)),
            ("header", (403, "mfa_required"), [f"Code: {self.recovery_codes[0]}"], b""),
        ):
            with self.subTest(name):
                self.assertEqual(expected, self.delete(*headers, body=body))
        self.path = f"{before}?code={self.recovery_codes[0]}"
        self.assertEqual((403, "mfa_required"), self.delete())
        self.path = before

        answer = self.delete(as_json, chunked, body=in_chunks(right))

        self.assertEqual((200, ""), answer)
        self.assertEqual(404, self.service.login("ada")[0])


def in_chunks(body: bytes) -> bytes:
    """Return a body in chunked transfer coding (RFC 9112, 7.1), in two chunks if possible."""
    halves = body[: len(body) // 2], body[len(body) // 2 :]
    return b"".join(b"%x\r\n%s\r\n" % (len(half), half) for half in halves) + b"0\r\n\r\n"
