"""Rate limits on codes: how many wrong ones are looked at, and who is paused."""

from typing import Any, ClassVar
from unittest import mock

from werkzeug.test import TestResponse

from project import db, errors
from project.accounts import administration, rate_limits, sessions
from project.tests.accounts.mail_case import MAIL_SETTINGS, send_mail
from project.tests.accounts.second_factor_case import (
    AWAY,
    ELSEWHERE,
    HOME,
    NO_RECOVERY_CODE,
    SecondFactorTestCase,
    counted,
    stored,
)
from project.tests.rows import ORIGIN

PAUSES = [60, 120, 240, 480, 960, 1_920, 3_600]  # seconds
DAY = 86_400


class CodeLimitsTestCase(SecondFactorTestCase):
    """A test with production's limits; `ada` has an authenticator, and is known at HOME."""

    settings: ClassVar[dict[str, Any]] = (
        SecondFactorTestCase.settings
        | MAIL_SETTINGS
        | {"RATE_LIMITS": True, "TOKEN_EXPIRATION_SECONDS": 10 * DAY}
    )

    def setUp(self) -> None:
        """Set the authenticator up at HOME, and go AWAY."""
        super().setUp()
        self.store(email_verified=True)
        with self.at(HOME):
            self.enrol()
        send_mail(self.app)
        self.ip = AWAY

    def guess(self, times: int, code: str = "") -> None:
        """Log in with a wrong code this many times, none of which is refused by a limit."""
        for _ in range(times):
            self.assert_wrong(self.log_in(code=code or self.wrong_code()))

    def guess_in_second_step(self, times: int, token: str) -> None:
        """Send a wrong code in the second step this many times."""
        for _ in range(times):
            self.assert_wrong(self.second_step(token, self.wrong_code()))

    def change_password(self, **body: object) -> TestResponse:
        """Return the response to a change of the password, to the same one."""
        body = {"current_password": "test", "new_password": "test"} | body
        return self.send("POST", "/auth/password", self.tokens["ada"], **body)

    def assert_paused(self, response: TestResponse, seconds: int) -> None:
        """Check that a response is TooManyAttempts with this Retry-After."""
        self.assert_error(response, errors.TooManyAttempts)
        self.assertEqual(str(seconds), response.headers["Retry-After"])

    def codes_counted(self) -> int:
        """Return how many codes are counted, for whatever account."""
        return sum(number for key, number in counted().items() if key.startswith("code:"))

    def logins_counted(self) -> dict[str, int]:
        """Return how many logins are counted, for the account and for the address."""
        counts = {key: number for key, number in counted().items() if key.startswith("login:")}
        address = counts.pop(f"login:{self.ip}", 0)
        return {"account": sum(counts.values()), "address": address}


class TestGuesses(CodeLimitsTestCase):
    """Wrong codes after the right password."""

    def test_pause(self) -> None:
        """After five wrong codes the account pauses for a minute, for the right code too."""
        token = self.mfa_token()
        self.guess(3)
        self.guess_in_second_step(2, token)

        for code in (self.code(), self.wrong_code(), self.recovery_codes["ada"][0]):
            self.assert_paused(self.log_in(code=code), 60)
            self.assert_paused(self.second_step(token, code), 60)
        with self.at(ELSEWHERE):
            self.assert_paused(self.second_step(token, self.code()), 60)

        self.move_clock(59.5)
        self.assert_paused(self.second_step(token, self.code()), 1)
        self.move_clock(0.5)
        self.ok(self.second_step(token, self.code()))

    def test_refused_codes_are_not_used_up(self) -> None:
        """What is refused during a pause is not looked at: recovery codes stay."""
        token = self.mfa_token()
        self.guess_in_second_step(5, token)
        before = stored()

        for code in self.recovery_codes["ada"]:
            self.assert_paused(self.second_step(token, code), 60)

        self.assertEqual(before, stored())

    def test_pauses_double(self) -> None:
        """Each further wrong code doubles the pause, up to an hour."""
        self.guess_in_second_step(4, self.mfa_token())
        for pause in [*PAUSES, PAUSES[-1], PAUSES[-1]]:
            token = self.mfa_token()
            self.guess_in_second_step(1, token)
            self.assert_paused(self.second_step(token, self.code()), pause)
            self.move_clock(pause)

    def test_events(self) -> None:
        """The event of a wrong code says how long the pause is that it begins."""
        token = self.mfa_token()
        self.guess_in_second_step(5, token)
        self.move_clock(60)
        self.guess_in_second_step(1, token)

        refused = [details for kind, details in self.events() if kind == "login_refused"]
        pauses = [details["pause"] for details in refused if details["why"] == "wrong_code"]
        self.assertEqual([0, 0, 0, 0, 60, 120], pauses)

    def test_success_clears_the_count(self) -> None:
        """The right code clears the count, in one step, in two, and in a session."""
        for code in self.recovery_codes["ada"][:3]:
            self.guess(4)
            self.ok(self.log_in(code=self.next_code()))
            self.assertEqual(0, self.codes_counted())
            self.guess(4)
            self.ok(self.second_step(self.mfa_token(), code))
            self.assertEqual(0, self.codes_counted())
            self.guess(4)
            self.ok(self.change_password(code=self.next_code()))
            self.assertEqual(0, self.codes_counted())

    def test_days(self) -> None:
        """Wrong codes count until a right one, however long ago they were sent."""
        self.guess(4)
        self.move_clock(100 * DAY)
        self.guess(1)

        self.assert_paused(self.log_in(code=self.code()), 60)

    def test_replays(self) -> None:
        """A code that was used before counts like any wrong one."""
        used, recovery_code = self.code(), self.recovery_codes["ada"][0]
        self.ok(self.log_in(code=used))
        self.ok(self.log_in(code=recovery_code))
        self.guess(3, used)
        self.guess(2, recovery_code)

        self.assert_paused(self.log_in(code=self.next_code()), 30)

    def test_steps_and_sessions_together(self) -> None:
        """Wrong codes in one step, in two, and in a session have one count."""
        token = self.mfa_token()
        self.assert_wrong(self.log_in(code=self.wrong_code()))
        self.assert_wrong(self.second_step(token, NO_RECOVERY_CODE))
        self.assert_wrong(self.turn_off(code=self.wrong_code()))
        self.assert_wrong(self.replace_recovery_codes(code=self.wrong_code()))
        self.assert_wrong(self.change_password(code=self.wrong_code()))

        self.assert_paused(self.turn_off(code=self.code()), 60)
        self.assert_paused(self.second_step(token, self.code()), 60)

    def test_other_users(self) -> None:
        """Other users are not paused."""
        self.enrol("bob")
        self.guess(5)

        self.assert_wrong(self.log_in("bob", code=self.wrong_code("bob")))
        self.ok(self.log_in("bob", code=self.code("bob")))

    def test_ill_formed(self) -> None:
        """What has not the form of a code is not counted."""
        for _ in range(12):
            self.assert_ill_formed(self.log_in(code="12345"))
            answer = self.send("POST", "/auth/login/mfa", mfa_token=self.mfa_token(), code="x")
            self.assert_ill_formed(answer)
            self.ok(self.log_in(code=self.next_code()))

    def test_wrong_password(self) -> None:
        """A code after a wrong password is not counted: an attacker without it pauses no codes."""
        for _ in range(9):
            answer = self.log_in("ada", "wrong", code=self.code())
            self.assert_error(answer, errors.InvalidCredentials)
        self.assertEqual(0, self.codes_counted())
        with self.at(HOME):
            for _ in range(9):
                answer = self.turn_off(current_password="wrong", code=self.code())
                self.assert_error(answer, errors.WrongPassword)
        self.assertEqual(0, self.codes_counted())

    def test_invalid_token(self) -> None:
        """A code with an invalid `mfa_token` is not counted."""
        token = self.mfa_token()
        for forged in (f"{token}x", self.tokens["ada"], ""):
            for _ in range(6):
                answer = self.second_step(forged, self.wrong_code())
                self.assert_error(answer, errors.TokenInvalid)
        self.move_clock(300)
        for _ in range(6):
            self.assert_error(self.second_step(token, self.code()), errors.TokenExpired)

        self.assertEqual(0, self.codes_counted())
        self.ok(self.log_in(code=self.code()))

    def test_user_without_a_factor(self) -> None:
        """The code of a user without an authenticator is not counted."""
        for _ in range(12):
            self.ok(self.log_in("bob", code="123456"))

        self.assertEqual(0, self.codes_counted())

    def test_counts_hold_no_email(self) -> None:
        """The counts name no email."""
        self.guess(1)

        self.assertNotIn("ada@test.com", str(stored()["throttles"]))

    def test_change_in_between(self) -> None:
        """A code is counted once, also if the login is tried again as the account changes."""
        self.guess(4)
        start = sessions.start
        outcomes = iter([sessions.AccountChanged, sessions.AccountChanged])

        def changed(*arguments: Any) -> sessions.TokenPair:
            for error in outcomes:
                raise error
            return start(*arguments)

        with mock.patch.object(sessions, "start", changed):
            self.ok(self.log_in(code=self.code()))

    def test_unreadable_secret(self) -> None:
        """A code that the service cannot check counts neither as a wrong one nor as a login."""
        keys, self.app.config["ENCRYPTION_KEYS"] = self.app.config["ENCRYPTION_KEYS"], ()
        body = {"current_password": "test"}
        for _ in range(12):
            self.assert_error(self.log_in(code=self.code()), errors.MfaNotConfigured)
            begun = self.send("POST", "/auth/totp", self.tokens["bob"], **body)
            self.assert_error(begun, errors.MfaNotConfigured)
        self.ok(self.log_in(code=self.recovery_codes["ada"][0]))

        self.app.config["ENCRYPTION_KEYS"] = keys
        self.ok(self.log_in(code=self.code()))


class TestPasswords(CodeLimitsTestCase):
    """What the codes mean for the counts of logins."""

    def test_first_steps(self) -> None:
        """A right password without a code counts: ten pause the account."""
        for _ in range(10):
            self.mfa_token()

        self.assert_paused(self.log_in(), 60)
        self.assert_paused(self.log_in(code=self.code()), 60)
        with self.at(HOME):
            self.ok(self.log_in(code=self.code()))

    def test_first_steps_and_wrong_passwords(self) -> None:
        """Right and wrong passwords have one count: an answer gives none back."""
        for _ in range(5):
            self.assert_error(self.log_in("ada", "wrong"), errors.InvalidCredentials)
            self.mfa_token()

        self.assert_paused(self.log_in(), 60)

    def test_wrong_codes_count_as_logins(self) -> None:
        """A right password with a wrong code stays counted too."""
        self.guess(4)

        self.assertEqual({"account": 4, "address": 4}, self.logins_counted())

    def test_second_step_gives_back(self) -> None:
        """The right code clears the count of the account, and gives one back to the address."""
        for _ in range(2):
            self.assert_error(self.log_in("bob", "wrong"), errors.InvalidCredentials)
        before = self.logins_counted()
        for _ in range(3):
            token = self.mfa_token()
        self.assertEqual(
            {"account": before["account"] + 3, "address": before["address"] + 3},
            self.logins_counted(),
        )

        self.ok(self.second_step(token, self.code()))

        self.assertEqual(
            {"account": before["account"], "address": before["address"] + 2},
            self.logins_counted(),
        )

    def test_code_in_the_login_gives_back(self) -> None:
        """So does the right code in the login itself."""
        self.mfa_token()
        self.guess(2)
        self.assertEqual({"account": 3, "address": 3}, self.logins_counted())

        self.ok(self.log_in(code=self.code()))

        self.assertEqual({"account": 0, "address": 3}, self.logins_counted())

    def test_many_logins(self) -> None:
        """Logins in two steps are never paused, however many."""
        for _ in range(12):
            self.ok(self.second_step(self.mfa_token(), self.next_code()))

        self.assertEqual({"account": 0, "address": 0}, self.logins_counted())

    def test_second_steps_of_one_login(self) -> None:
        """A login gives back one attempt at most, however often its token is used."""
        self.app.config["KNOWN_ADDRESS_DAYS"] = 0
        rate_limits.init_app(self.app)
        for number in range(20):
            answer = self.log_in(f"nobody{number}", "wrong")
            self.assert_error(answer, errors.InvalidCredentials)
        token = self.mfa_token()
        for code in self.recovery_codes["ada"]:
            self.ok(self.second_step(token, code))

        self.assertEqual(20, self.logins_counted()["address"])

    def test_pause_of_logins(self) -> None:
        """A pause of logins does not stop the second step of a login before it."""
        token = self.mfa_token()
        for _ in range(9):
            self.assert_error(self.log_in("ada", "wrong"), errors.InvalidCredentials)
        self.assert_paused(self.log_in(), 60)

        self.ok(self.second_step(token, self.code()))

        self.assert_error(self.log_in(), errors.MfaRequired)

    def test_known_after_the_code(self) -> None:
        """An address is known after the right code, and not after the right password."""
        known = len(stored()["known_addresses"])
        token = self.mfa_token()
        self.guess_in_second_step(1, token)
        self.assertEqual(known, len(stored()["known_addresses"]))

        self.ok(self.second_step(token, self.code()))

        self.assertEqual(known + 1, len(stored()["known_addresses"]))

    def test_right_password_in_a_session(self) -> None:
        """In a session a right password with a wrong code stays counted, until the right one."""
        self.move_clock(600)
        for _ in range(4):
            self.assert_wrong(self.turn_off(code=self.wrong_code()))
        self.assertEqual({"account": 4, "address": 4}, self.logins_counted())

        self.ok(self.turn_off(code=self.code()))

        self.assertEqual({"account": 0, "address": 4}, self.logins_counted())

    def test_without_a_code_in_a_session(self) -> None:
        """Where a code is missing, not even the password is counted."""
        self.move_clock(600)
        for password in ("test", "wrong") * 12:
            answer = self.turn_off(current_password=password)
            self.assert_error(answer, errors.StepUpRequired)

        self.assertEqual({}, counted())


class TestKnownAddresses(CodeLimitsTestCase):
    """An attacker who knows the password, at another address than the user."""

    def test_attacker_elsewhere(self) -> None:
        """An attacker elsewhere does not pause the user at an address where they are known."""
        self.guess(5)

        with self.at(HOME):
            self.guess(4)
            self.ok(self.log_in(code=self.code()))
            self.ok(self.second_step(self.mfa_token(), self.next_code()))
        # Nor does that end the pause elsewhere.
        self.assert_paused(self.log_in(code=self.code()), 30)

    def test_attacker_at_a_known_address(self) -> None:
        """An attacker at a known address does not pause the user elsewhere."""
        with self.at(HOME):
            self.guess(5)
            self.assert_paused(self.log_in(code=self.code()), 60)

        self.ok(self.log_in(code=self.code()))

        with self.at(HOME):
            self.assert_paused(self.log_in(code=self.next_code()), 30)

    def test_two_known_addresses(self) -> None:
        """Each known address has a count of its own; all others have one together."""
        self.ok(self.log_in(code=self.code()))
        for ip in (HOME, AWAY):
            with self.at(ip):
                self.guess(5)
                self.assert_paused(self.log_in(code=self.code()), 60)
        for ip, times in ((ELSEWHERE, 2), ("2001:db8::1", 3)):
            with self.at(ip):
                self.guess(times)
        with self.at("203.0.113.100"):
            self.assert_paused(self.log_in(code=self.code()), 60)

    def test_session_at_another_address(self) -> None:
        """It is the address of the request that counts, not that of the session."""
        self.move_clock(600)
        for _ in range(5):
            self.assert_wrong(self.turn_off(code=self.wrong_code()))
        self.assert_paused(self.turn_off(code=self.code()), 60)

        with self.at(HOME):
            self.ok(self.turn_off(code=self.code()))

    def test_known_address_expires(self) -> None:
        """After thirty days an address is one like all others."""
        self.move_clock(30 * DAY)
        self.guess(5)

        with self.at(HOME):
            self.assert_paused(self.log_in(code=self.code()), 60)

    def test_user_without_known_addresses(self) -> None:
        """Where no address is ever known, the account has one count."""
        self.app.config["KNOWN_ADDRESS_DAYS"] = 0
        rate_limits.init_app(self.app)
        self.guess(5)

        with self.at(HOME):
            self.assert_paused(self.log_in(code=self.code()), 60)


class TestEnrolment(CodeLimitsTestCase):
    """The limits while a user sets an authenticator up."""

    def begin_again(self, password: str = "test") -> TestResponse:
        """Return the response to `bob`, who begins to set an authenticator up."""
        return self.send("POST", "/auth/totp", self.tokens["bob"], current_password=password)

    def test_wrong_passwords(self) -> None:
        """Wrong passwords count as failed logins; the right one gives them back."""
        for _ in range(9):
            self.assert_error(self.begin_again("wrong"), errors.WrongPassword)
        self.assertEqual({"account": 9, "address": 9}, self.logins_counted())
        self.ok(self.begin_again())
        self.assertEqual({"account": 0, "address": 9}, self.logins_counted())
        self.ip = ELSEWHERE
        for _ in range(10):
            self.assert_error(self.begin_again("wrong"), errors.WrongPassword)

        self.assert_paused(self.begin_again(), 60)
        self.assert_paused(self.log_in("bob"), 60)

    def test_wrong_codes(self) -> None:
        """Five wrong codes pause the enrolment; the right one clears the count."""
        self.begin("bob")
        for _ in range(4):
            self.assert_wrong(self.confirm(self.wrong_code("bob"), "bob"))
        self.begin("bob")
        self.assert_wrong(self.confirm(self.wrong_code("bob"), "bob"))
        refused = ("totp_refused", {"why": "wrong_code", "pause": 60})
        self.assertEqual(refused, self.events("bob")[-1])

        self.assert_paused(self.confirm(self.code("bob"), "bob"), 60)
        self.move_clock(60)
        self.ok(self.confirm(self.code("bob"), "bob"))

        self.assertEqual(0, self.codes_counted())
        self.assertEqual(["totp_enabled"], self.notices("bob"))

    def test_nothing_to_confirm(self) -> None:
        """A code that nothing is confirmed with is not counted."""
        for _ in range(6):
            self.assert_error(self.confirm("123456", "bob"), errors.TotpNotFound)
            self.assert_error(self.confirm("123456", "ada"), errors.TotpExists)

        self.assertEqual({}, counted())


class TestRelief(CodeLimitsTestCase):
    """What ends a pause before its time."""

    def setUp(self) -> None:
        """Pause codes and logins, both at HOME and AWAY."""
        super().setUp()
        for ip in (HOME, AWAY):
            with self.at(ip):
                self.guess(5)
                for _ in range(5):
                    self.assert_error(self.log_in("ada", "wrong"), errors.InvalidCredentials)
                self.assert_paused(self.log_in(), 60)
        send_mail(self.app)

    def follow_link(self, request: str, use: str, **body: object) -> None:
        """Request a link for `ada`, and use it."""
        self.ok(self.send("POST", request, email="ada@test.com"), 202)
        self.ok(self.send("POST", use, token=self.mailed_link(), **body))

    def test_reset_by_an_admin(self) -> None:
        """A reset of the authenticator by an admin ends the pauses of codes and of logins."""
        self.add("admin", admin=True)
        self.ok(self.send("DELETE", f"/users/{self.ids['ada']}/totp", self.tokens["admin"]))

        self.assert_no_pause()

    def test_reset_by_the_operator(self) -> None:
        """So does one by the operator."""
        administration.reset_totp_of("ada@test.com", ORIGIN)
        db.session.commit()

        self.assert_no_pause()

    def assert_no_pause(self) -> None:
        """Check that the user can set up another authenticator, and log in everywhere."""
        for ip in (HOME, AWAY):
            with self.at(ip):
                self.tokens["ada"] = self.ok(self.log_in())["auth_token"]
                self.assertEqual(0, self.codes_counted())
        self.enrol()
        for ip in (HOME, AWAY):
            with self.at(ip):
                self.ok(self.log_in(code=self.next_code()))

    def test_forgotten_password(self) -> None:
        """A reset of the password by mail ends the pause of logins, and none of codes."""
        known = stored()["known_addresses"]
        self.follow_link("/auth/password/forgot", "/auth/password/reset", new_password="another")

        for ip in (HOME, AWAY):
            with self.at(ip):
                token = self.mfa_token(password="another")
                self.assert_paused(self.second_step(token, self.code()), 60)
                self.assert_paused(self.log_in("ada", "another", code=self.code()), 60)
        self.assertEqual(known, stored()["known_addresses"])

    def test_forgotten_password_elsewhere(self) -> None:
        """A client that resets the password by mail gets no count of codes of its own there."""
        with self.at(ELSEWHERE):
            self.follow_link(
                "/auth/password/forgot", "/auth/password/reset", new_password="another"
            )
            token = self.mfa_token(password="another")
            self.assert_paused(self.second_step(token, self.code()), 60)

    def test_verification(self) -> None:
        """Neither does a client that confirms the email by a link."""
        self.store(email_verified=False)
        with self.at(ELSEWHERE):
            self.follow_link("/auth/verification", "/auth/verify")
            self.move_clock(60)  # the pause of logins
            token = self.mfa_token()
            known = [row["network"] for row in stored()["known_addresses"]]
            self.assertNotIn(ELSEWHERE, known)
            self.guess_in_second_step(1, token)
            self.assert_paused(self.second_step(token, self.code()), 120)

    def test_reset_that_removes_the_authenticator(self) -> None:
        """After a reset that removes the authenticator the address is known."""
        self.store(email_verified=False)
        with self.at(ELSEWHERE):
            self.follow_link(
                "/auth/password/forgot", "/auth/password/reset", new_password="another"
            )

        known = [row["network"] for row in stored()["known_addresses"]]
        self.assertIn(ELSEWHERE, known)
        self.ok(self.log_in("ada", "another"))

    def test_recovery_code(self) -> None:
        """A recovery code is paused like the others, and ends the pause after its time."""
        with self.at(HOME):
            code = self.recovery_codes["ada"][0]
            self.assert_paused(self.log_in(code=code), 60)
            self.move_clock(60)
            self.ok(self.log_in(code=code))
            self.guess(4)
            self.ok(self.log_in(code=self.code()))

    def test_deletion(self) -> None:
        """Nothing stays counted of an account that is deleted."""
        self.add("admin", admin=True)
        self.ok(self.send("DELETE", f"/users/{self.ids['ada']}", self.tokens["admin"]))

        self.assertEqual({"login:" + AWAY}, set(counted()))
        self.add("ada")
        self.enrol()
        self.ok(self.log_in(code=self.code()))

    def test_purge(self) -> None:
        """Counts are deleted once they have expired."""
        self.move_clock(366 * DAY)
        while rate_limits.delete_expired():
            db.session.commit()

        self.assertEqual([], stored()["throttles"])


class TestAddresses(CodeLimitsTestCase):
    """Addresses at which a user was known before they set an authenticator up."""

    def test_before_the_enrolment(self) -> None:
        """They have no counts of their own; the address of the enrolment has one."""
        networks = [f"203.0.113.{number}" for number in range(1, 5)]
        for address in networks:
            with self.at(address):
                self.ok(self.log_in("bob"))
        self.ok(self.log_in("bob"))
        self.tokens["bob"] = self.ok(self.log_in("bob"))["auth_token"]
        self.enrol("bob")
        self.ip = networks[0]
        for _ in range(5):
            self.assert_wrong(self.log_in("bob", code=self.wrong_code("bob")))

        for address in networks:
            with self.at(address):
                self.assert_paused(self.log_in("bob", code=self.code("bob")), 60)
        with self.at(AWAY):
            self.ok(self.log_in("bob", code=self.code("bob")))


class TestNotices(CodeLimitsTestCase):
    """The email that tells a user of wrong codes after the right password."""

    def assert_notified(self, *kinds: str) -> None:
        """Check which notices the user has got since the last check."""
        self.assertEqual(list(kinds), self.notices())
        send_mail(self.app)

    def test_when_the_pause_begins(self) -> None:
        """It is sent for each wrong code that begins a pause, and for none before or in it."""
        token = self.mfa_token()
        self.guess(4)
        self.assert_notified()
        self.guess(1)
        self.assert_notified("wrong_codes")
        self.assert_paused(self.log_in(code=self.wrong_code()), 60)
        self.assert_paused(self.second_step(token, self.wrong_code()), 60)
        self.assert_notified()
        self.move_clock(60)
        self.guess_in_second_step(1, token)
        self.assert_notified("wrong_codes")

    def test_at_a_known_address(self) -> None:
        """It is sent also for wrong codes at a known address, and in a session."""
        with self.at(HOME):
            self.move_clock(600)
            for _ in range(5):
                self.assert_wrong(self.turn_off(code=self.wrong_code()))
            self.assert_notified("wrong_codes")

    def test_of_an_admin(self) -> None:
        """It goes to the admin whose code it would be, not to the user of the act."""
        self.add("admin", admin=True)
        self.enrol("admin")
        self.move_clock(600)
        send_mail(self.app)
        for _ in range(5):
            answer = self.send(
                "DELETE",
                f"/users/{self.ids['bob']}",
                self.tokens["admin"],
                code=self.wrong_code("admin"),
            )
            self.assert_wrong(answer)

        self.assertEqual(["wrong_codes"], self.notices("admin"))
        self.assertEqual([], self.notices("bob"))

    def test_at_most_five_an_hour(self) -> None:
        """An attacker causes five of them an hour at most."""
        self.guess(4)
        token = self.mfa_token()
        for pause in PAUSES[:6]:
            self.guess_in_second_step(1, token)
            self.move_clock(pause)
            token = self.mfa_token()

        self.assertEqual(["wrong_codes"] * 5, self.notices())

    def test_wrong_passwords(self) -> None:
        """Wrong passwords cause none."""
        for _ in range(10):
            self.log_in("ada", "wrong", code=self.code())

        self.assert_notified()


class TestOff(SecondFactorTestCase):
    """With rate limits off."""

    def test_testing(self) -> None:
        """Nothing is counted, and no code is ever paused."""
        self.enrol()
        for _ in range(30):
            self.assert_wrong(self.log_in(code=self.wrong_code()))

        self.assertEqual([], stored()["throttles"])
        self.ok(self.log_in(code=self.code()))
