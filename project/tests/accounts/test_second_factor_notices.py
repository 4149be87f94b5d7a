"""Which emails tell users of their second factor."""

from typing import Any, ClassVar

from project import db, errors
from project.accounts import administration
from project.tests.accounts.mail_case import MAIL_SETTINGS, send_mail
from project.tests.accounts.second_factor_case import (
    ELSEWHERE,
    NO_RECOVERY_CODE,
    SecondFactorTestCase,
)
from project.tests.rows import (
    ORIGIN,
)


class TestNotices(SecondFactorTestCase):
    """Which emails tell a user of their second factor."""

    settings: ClassVar[dict[str, Any]] = (
        SecondFactorTestCase.settings | MAIL_SETTINGS | {"RATE_LIMITS": True}
    )

    def assert_notified(self, *kinds: str, name: str = "ada") -> None:
        """Check which notices a user has got since the last check."""
        self.assertEqual(list(kinds), self.notices(name))
        send_mail(self.app)

    def test_own_acts(self) -> None:
        """Turning it on and off, new recovery codes, and a recovery code that is used."""
        self.begin()
        self.assert_notified()
        self.ok(self.confirm(self.code()))
        self.assert_notified("totp_enabled")
        self.ok(self.replace_recovery_codes(code=self.next_code()))
        self.assert_notified("recovery_codes_replaced")
        self.ok(self.turn_off(code=self.next_code()))
        self.assert_notified("totp_disabled")

    def test_recovery_code(self) -> None:
        """A recovery code that is used, at a login or in a session."""
        self.enrol()
        self.assert_notified("totp_enabled")
        self.ok(self.log_in(code=self.recovery_codes["ada"][0]))
        self.assert_notified("recovery_code_used")
        self.ok(self.replace_recovery_codes(code=self.recovery_codes["ada"][1]))
        self.assert_notified("recovery_code_used", "recovery_codes_replaced")

    def test_wrong_attempts(self) -> None:
        """Nothing that is refused, before wrong codes begin a pause."""
        self.enrol()
        self.assert_notified("totp_enabled")
        self.assert_wrong(self.log_in(code=self.wrong_code()))
        self.assert_wrong(self.log_in(code=NO_RECOVERY_CODE))
        self.assert_wrong(self.turn_off(code=self.wrong_code()))
        self.assert_error(self.log_in("ada", "wrong"), errors.InvalidCredentials)
        self.assert_notified()

    def test_new_login(self) -> None:
        """A login at a new address is told of after the right code, and not before."""
        self.enrol()
        self.assert_notified("totp_enabled")
        self.ip = ELSEWHERE
        token = self.mfa_token()
        self.assert_wrong(self.second_step(token, self.wrong_code()))
        self.assert_wrong(self.log_in(code=self.wrong_code()))
        self.assert_notified()

        self.ok(self.second_step(token, self.code()))
        self.assert_notified("new_login")

        self.ok(self.second_step(self.mfa_token(), self.next_code()))
        self.ok(self.log_in(code=self.next_code()))
        self.assert_notified()

    def test_new_login_in_one_request(self) -> None:
        """So is one with password and code together."""
        self.enrol()
        send_mail(self.app)
        self.ip = ELSEWHERE

        self.ok(self.log_in(code=self.code()))

        self.assert_notified("new_login")

    def test_reset(self) -> None:
        """A reset by an admin or the operator; the admin's address is not named."""
        self.add("admin", admin=True)
        self.enrol()
        self.enrol("bob")
        send_mail(self.app)
        self.ok(self.send("DELETE", f"/users/{self.ids['ada']}/totp", self.tokens["admin"]))
        administration.reset_totp_of("bob@test.com", ORIGIN)
        db.session.commit()

        self.assertEqual(["totp_disabled"], self.notices("bob"))
        self.assertEqual(["totp_disabled"], self.notices())
        self.assertEqual([], self.notices("admin"))
        for message in send_mail(self.app):
            if message["To"] == "ada@test.com":
                self.assertNotIn(self.ip, message.as_string())

    def test_turned_off_notices(self) -> None:
        """Where security notices are off there are none."""
        self.app.config["SECURITY_NOTICES"] = False
        self.enrol()
        self.ok(self.log_in(code=self.recovery_codes["ada"][0]))
        self.ok(self.turn_off(code=self.next_code()))

        self.assert_notified()
