"""Turning an authenticator off, resetting one that is lost, and replacing recovery codes."""

from typing import Any, ClassVar

import pyotp
from werkzeug.test import TestResponse

from project import clock, db, errors
from project.accounts import administration
from project.tests.accounts.mail_case import MAIL_SETTINGS, send_mail
from project.tests.accounts.second_factor_case import (
    NO_RECOVERY_CODE,
    RECOVERY_CODE,
    SecondFactorTestCase,
    stored,
)
from project.tests.rows import (
    ORIGIN,
    stored_events,
    stored_users,
)
from project.tests.tokens.claims import claims_of, session_of


class TestTurningOff(SecondFactorTestCase):
    """DELETE /auth/totp."""

    def setUp(self) -> None:
        """Set the authenticator of `ada` up, long ago."""
        super().setUp()
        self.enrol()
        self.move_clock(600)

    def test_turn_off(self) -> None:
        """The secret and the recovery codes are gone, and logins need no code."""
        other = self.ok(self.log_in(code=self.code()))["auth_token"]

        answer = self.ok(self.turn_off(code=self.next_code()))

        self.assertEqual("Authenticator turned off.", answer["message"])
        self.assertEqual((False, 0), self.state())
        tables = stored()
        self.assertEqual(([], []), (tables["totp_factors"], tables["recovery_codes"]))
        pair = self.ok(self.log_in(code=self.recovery_codes["ada"][0]))
        self.assertEqual(["pwd"], claims_of(pair["auth_token"])["amr"])
        for token in (self.tokens["ada"], other):
            self.ok(self.get("/auth/status", token))

    def test_recovery_code(self) -> None:
        """A recovery code turns it off too."""
        self.ok(self.turn_off(code=self.recovery_codes["ada"][0]))

        self.assertEqual((False, 0), self.state())

    def test_event(self) -> None:
        """It is recorded, with the code that was given."""
        self.ok(self.turn_off(code=self.code()))

        expected = [("code_given", {"method": "otp"}), ("totp_disabled", {})]
        self.assertEqual(expected, self.events()[-2:])
        session_id = session_of(self.tokens["ada"])
        self.assertEqual({session_id}, {event["session_id"] for event in stored_events()[-2:]})

    def test_refusals(self) -> None:
        """A wrong password or a wrong code turns nothing off, and is recorded."""
        before, right = stored("events"), self.code()
        for body, error, why in (
            (
                {"current_password": "x", "code": self.code()},
                errors.WrongPassword,
                "wrong_password",
            ),
            ({"code": self.wrong_code()}, errors.WrongCode, "wrong_code"),
            ({"code": NO_RECOVERY_CODE}, errors.WrongCode, "wrong_code"),
        ):
            self.assert_error(self.turn_off(**body), error)
            self.assertEqual(("totp_refused", {"why": why, "pause": 0}), self.events()[-1])
        self.assertEqual(before, stored("events"))
        self.ok(self.turn_off(code=right))  # the wrong password has not used it up

    def test_no_authenticator(self) -> None:
        """Without an authenticator there is nothing to turn off, also while one is set up."""
        for _ in range(2):
            body = {"current_password": "test", "code": "123456"}
            for method, path in (("DELETE", "/auth/totp"), ("POST", "/auth/recovery_codes")):
                answer = self.send(method, path, self.tokens["bob"], **body)
                self.assert_error(answer, errors.TotpNotFound)
            self.begin("bob")
        self.ok(self.confirm(self.code("bob"), "bob"))

    def test_again(self) -> None:
        """A user sets another one up afterwards, and codes of the first secret are wrong."""
        before = self.code()
        self.ok(self.turn_off(code=before))
        old = self.secrets["ada"]
        old_recovery_codes = self.recovery_codes["ada"]

        self.enrol()

        self.assertNotEqual(old, self.secrets["ada"])
        wrong = pyotp.TOTP(old).at(clock.utcnow())
        for code in (wrong, old_recovery_codes[0]):
            self.assert_wrong(self.log_in(code=code))
        self.ok(self.log_in(code=self.code()))


class TestRecoveryCodes(SecondFactorTestCase):
    """POST /auth/recovery_codes."""

    def setUp(self) -> None:
        """Set the authenticator of `ada` up, long ago."""
        super().setUp()
        self.enrol()
        self.move_clock(600)

    def test_replace(self) -> None:
        """There are ten new ones; the old ones work no more."""
        old = self.recovery_codes["ada"]
        self.ok(self.log_in(code=old[0]))
        self.assertEqual((True, 9), self.state())

        answer = self.ok(self.replace_recovery_codes(code=self.code()))

        new = answer["data"]["recovery_codes"]
        self.assertEqual("Recovery codes replaced.", answer["message"])
        self.assertEqual(10, len(set(new) - set(old)))
        for code in new:
            self.assertRegex(code, RECOVERY_CODE)
        self.assertEqual((True, 10), self.state())
        for code in old:
            self.assert_wrong(self.log_in(code=code))
        self.ok(self.log_in(code=new[0]))
        self.ok(self.log_in(code=self.next_code()))

    def test_with_a_recovery_code(self) -> None:
        """A recovery code suffices, is used up, and ten are left."""
        code = self.recovery_codes["ada"][0]

        new = self.ok(self.replace_recovery_codes(code=code))["data"]["recovery_codes"]

        self.assertNotIn(code, new)
        self.assert_wrong(self.log_in(code=code))
        self.assertEqual((True, 10), self.state())

    def test_event(self) -> None:
        """It is recorded, with the code that was given."""
        self.ok(self.replace_recovery_codes(code=self.recovery_codes["ada"][0]))

        expected = [
            ("recovery_code_used", {}),
            ("code_given", {"method": "rc"}),
            ("recovery_codes_replaced", {}),
        ]
        self.assertEqual(expected, self.events()[-3:])

    def test_other_user(self) -> None:
        """Another user keeps theirs."""
        self.enrol("bob")
        self.ok(self.replace_recovery_codes(code=self.code()))

        self.assertEqual((True, 10), self.state("bob"))
        self.ok(self.log_in("bob", code=self.recovery_codes["bob"][0]))

    def test_refusals(self) -> None:
        """With a wrong password or a wrong code the old ones stay."""
        before = stored("events")
        answer = self.replace_recovery_codes(current_password="x", code=self.code())
        self.assert_error(answer, errors.WrongPassword)
        self.assert_wrong(self.replace_recovery_codes(code=self.wrong_code()))

        self.assertEqual(before, stored("events"))
        self.ok(self.log_in(code=self.recovery_codes["ada"][0]))


class TestResetByAnAdmin(SecondFactorTestCase):
    """DELETE /users/<id>/totp, and the command of the operator."""

    def setUp(self) -> None:
        """Add an admin, and set the authenticator of `ada` up."""
        super().setUp()
        self.add("admin", admin=True)
        self.enrol()

    def reset(self, name: str = "ada", caller: str = "admin") -> TestResponse:
        """Return the response to a caller who resets the authenticator of a user."""
        return self.send("DELETE", f"/users/{self.ids[name]}/totp", self.tokens[caller])

    def reset_by_operator(self, email: str = "ada@test.com") -> int:
        """Do what the command does; return how many sessions it ended."""
        ended = administration.reset_totp_of(email, ORIGIN)
        db.session.commit()
        return ended

    def assert_reset(self) -> None:
        """Check that the authenticator, the recovery codes and the sessions of `ada` are gone."""
        tables = stored()
        self.assertEqual(([], []), (tables["totp_factors"], tables["recovery_codes"]))
        self.assert_error(self.get("/auth/status", self.tokens["ada"]), errors.SessionEnded)
        self.ok(self.get("/auth/status", self.tokens["bob"]))
        pair = self.ok(self.log_in())
        self.assertEqual(["pwd"], claims_of(pair["auth_token"])["amr"])

    def test_admin(self) -> None:
        """An admin turns the authenticator of another user off, and ends their sessions."""
        self.ok(self.log_in(code=self.code()))

        answer = self.ok(self.reset())

        self.assertEqual("Authenticator turned off.", answer["message"])
        event = stored_events()[-1]
        self.assertEqual(("totp_reset", {"why": "admin", "sessions": 2}), self.events()[-1])
        self.assertEqual(
            (self.ids["ada"], self.ids["admin"], None),
            (event["user_id"], event["actor_id"], event["session_id"]),
        )
        self.assert_reset()
        self.ok(self.get("/auth/status", self.tokens["admin"]))

    def test_operator(self) -> None:
        """So does the operator."""
        self.assertEqual(1, self.reset_by_operator())

        self.assertEqual(("totp_reset", {"why": "operator", "sessions": 1}), self.events()[-1])
        self.assertIsNone(stored_events()[-1]["actor_id"])
        self.assert_reset()

    def test_no_authenticator(self) -> None:
        """Without an authenticator nothing happens, also while the user sets one up."""
        for _ in range(2):
            before = stored("events")
            self.assert_error(self.reset("bob"), errors.TotpNotFound)
            self.assertEqual(("totp_refused", {"why": "totp_not_found"}), self.events("bob")[-1])
            with self.assertRaises(errors.TotpNotFound):
                self.reset_by_operator("bob@test.com")
            db.session.rollback()
            self.assertEqual(before, stored("events"))
            self.begin("bob")

    def test_unknown_user(self) -> None:
        """An unknown user is not found."""
        for user_id in ("999999", "0", "x", "2147483648"):
            answer = self.send("DELETE", f"/users/{user_id}/totp", self.tokens["admin"])
            self.assert_error(answer, errors.UserNotFound)
        with self.assertRaises(errors.UserNotFound):
            self.reset_by_operator("nobody@test.com")

    def test_who_may(self) -> None:
        """No other user may, not even the user themselves."""
        before = stored()
        for caller in ("bob", "ada"):
            self.assert_error(self.reset("ada", caller), errors.PermissionDenied)
        answer = self.send("DELETE", f"/users/{self.ids['ada']}/totp")
        self.assert_error(answer, errors.TokenMissing)
        self.assertEqual(before, stored())


class TestForgottenPassword(SecondFactorTestCase):
    """What a reset of a forgotten password does to the second factor."""

    settings: ClassVar[dict[str, Any]] = SecondFactorTestCase.settings | MAIL_SETTINGS

    def reset(self, password: str = "another") -> None:
        """Set a new password with a link from an email."""
        self.follow("/auth/password/forgot", "/auth/password/reset", new_password=password)

    def verify(self) -> None:
        """Confirm the email with a link."""
        self.follow("/auth/verification", "/auth/verify")

    def follow(self, request: str, use: str, **body: object) -> None:
        """Request a link for `ada`, and use it."""
        send_mail(self.app)
        self.ok(self.send("POST", request, email="ada@test.com"), 202)
        self.ok(self.send("POST", use, token=self.mailed_link(), **body))

    def assert_kept(self) -> None:
        """Check that a login with the new password still needs a code."""
        self.assert_error(self.log_in("ada", "another"), errors.MfaRequired)
        self.ok(self.log_in("ada", "another", code=self.recovery_codes["ada"][0]))
        self.ok(self.log_in("ada", "another", code=self.next_code()))

    def assert_removed(self) -> None:
        """Check that a login with the new password needs no code, and that the user is told."""
        tables = stored()
        self.assertEqual(([], []), (tables["totp_factors"], tables["recovery_codes"]))
        expected = [
            ("password_reset", {"sessions": 1}),
            ("totp_reset", {"why": "password_reset", "sessions": 0}),
        ]
        self.assertEqual(expected, self.events()[-2:])
        self.assertEqual(["password_changed", "totp_disabled"], self.notices())
        pair = self.ok(self.log_in("ada", "another"))
        self.assertEqual(["pwd"], claims_of(pair["auth_token"])["amr"])

    def test_verified(self) -> None:
        """An authenticator that was set with a verified email stays, with its recovery codes."""
        self.store(email_verified=True)
        self.enrol()

        self.reset()

        self.assertEqual(["password_changed"], self.notices())
        self.assertEqual(("password_reset", {"sessions": 1}), self.events()[-1])
        self.assert_kept()

    def test_unverified(self) -> None:
        """One that was set while the email was not verified is removed."""
        self.enrol()

        self.reset()

        self.assert_removed()

    def test_verified_later(self) -> None:
        """It is also removed if the email was verified in the meantime, by its owner."""
        self.enrol()
        self.verify()

        self.reset()

        self.assert_removed()

    def test_verified_then_not(self) -> None:
        """So is one of a user whose email is not verified at the reset."""
        self.store(email_verified=True)
        self.enrol()
        self.store(email_verified=False)

        self.reset()

        self.assert_removed()

    def test_after_the_first_reset(self) -> None:
        """The reset verifies the email: what is set up after it stays at the next one."""
        self.enrol()
        self.reset("test")
        self.tokens["ada"] = self.ok(self.log_in())["auth_token"]
        self.enrol()

        self.reset()

        self.assert_kept()

    def test_not_confirmed(self) -> None:
        """An authenticator that was not confirmed causes no event and no notice."""
        self.begin()

        self.reset()

        self.assertEqual(["password_changed"], self.notices())
        self.assertEqual(("password_reset", {"sessions": 1}), self.events()[-1])
        self.ok(self.log_in("ada", "another"))

    def test_second_step(self) -> None:
        """A reset ends the login that has taken its first step."""
        self.store(email_verified=True)
        self.enrol()
        token = self.mfa_token()

        self.reset()

        self.assert_error(self.second_step(token, self.code()), errors.TokenInvalid)
        self.assert_kept()


class TestEmailChange(SecondFactorTestCase):
    """A change of the email that was requested before the authenticator was turned on."""

    settings: ClassVar[dict[str, Any]] = SecondFactorTestCase.settings | MAIL_SETTINGS

    def test_link_from_before(self) -> None:
        """Its link is invalid: an attacker who knows the password had it sent without a code."""
        body = {"current_password": "test", "email": "mallory@test.com"}
        self.ok(self.send("POST", "/auth/email", self.tokens["ada"], **body), 202)
        link = self.mailed_link("mallory@test.com")
        self.enrol()

        answer = self.send("POST", "/auth/email/confirm", token=link)

        self.assert_error(answer, errors.LinkInvalid)
        self.assertEqual("ada@test.com", stored_users()[0]["email"])

    def test_link_from_after(self) -> None:
        """One that was requested with a code works, and the authenticator stays."""
        self.enrol()
        body = {"current_password": "test", "email": "new@test.com", "code": self.code()}
        self.ok(self.send("POST", "/auth/email", self.tokens["ada"], **body), 202)

        self.ok(self.send("POST", "/auth/email/confirm", token=self.mailed_link("new@test.com")))

        self.assertEqual((True, 10), self.state())
        body = {"email": "new@test.com", "password": "test"}
        self.assert_error(self.send("POST", "/auth/login", **body), errors.MfaRequired)
        self.ok(self.send("POST", "/auth/login", **body, code=self.next_code()))


class TestDeletion(SecondFactorTestCase):
    """The deletion of an account."""

    def test_own(self) -> None:
        """Nothing of the second factor stays when the user deletes the account."""
        self.enrol()
        self.enrol("bob")

        body = {"current_password": "test", "code": self.code()}
        self.ok(self.send("DELETE", "/auth/account", self.tokens["ada"], **body))

        tables = stored()
        for table, number in (("totp_factors", 1), ("recovery_codes", 10)):
            owners = [row["user_id"] for row in tables[table]]
            self.assertEqual([self.ids["bob"]] * number, owners)
        self.ok(self.log_in("bob", code=self.code("bob")))

    def test_by_an_admin(self) -> None:
        """Nor when an admin deletes it, also while the user sets an authenticator up."""
        self.add("admin", admin=True)
        self.enrol()
        self.begin("bob")
        for name in ("ada", "bob"):
            self.ok(self.send("DELETE", f"/users/{self.ids[name]}", self.tokens["admin"]))

        tables = stored()
        self.assertEqual(([], []), (tables["totp_factors"], tables["recovery_codes"]))
