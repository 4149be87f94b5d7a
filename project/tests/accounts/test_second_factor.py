"""The second factor: set an authenticator up, and log in with its codes."""

import hashlib
from unittest import mock

import pyotp
from werkzeug.test import TestResponse

from project import clock, db, errors
from project.accounts import administration
from project.lib import hashing
from project.tests.accounts.second_factor_case import (
    NO_RECOVERY_CODE,
    RECOVERY_CODE,
    STEP,
    SecondFactorTestCase,
    stored,
)
from project.tests.rows import (
    ORIGIN,
    stored_events,
    stored_sessions,
    stored_users,
)
from project.tests.tokens.claims import claims_of, decode, session_of

ILL_FORMED = [
    *("", " ", "12345", "1234567", "12345a", "12.345", "+12345", "123456\n", "1" * 24),
    *("A" * 23, "A" * 25, "１２３４５６", "\u0661\u0662\u0663\u0664\u0665\u0666", "\uff21" * 24),  # noqa: RUF001  # other digits
    *(123456, 1234.5, None, True, ["123456"], {"code": "123456"}),
]


def same_code(code: str) -> list[str]:
    """Return other ways in which a user may type a recovery code."""
    return [code.lower(), code.replace("-", ""), f" {code.replace('-', ' ')} "]


class TestEnrolment(SecondFactorTestCase):
    """POST /auth/totp and /auth/totp/confirm."""

    def test_walk(self) -> None:
        """A user sets an authenticator up, and the service says that they have it."""
        self.assertEqual((False, 0), self.state())
        self.begin()
        self.assertEqual((False, 0), self.state())

        answer = self.ok(self.confirm(self.code()))

        self.assertEqual("Authenticator turned on.", answer["message"])
        self.assertEqual((True, 10), self.state())
        self.assertEqual((False, 0), self.state("bob"))

    def test_wrong_password(self) -> None:
        """With a wrong password there is no secret, and the refusal is recorded."""
        before = stored("events")
        for wrong in ("wrong", "x" * 2_000):
            body = {"current_password": wrong}
            answer = self.send("POST", "/auth/totp", self.tokens["ada"], **body)
            self.assert_error(answer, errors.WrongPassword)
        for body in ({}, {"current_password": ""}):
            answer = self.send("POST", "/auth/totp", self.tokens["ada"], **body)
            self.assert_error(answer, errors.InvalidPayload)

        self.assertEqual(before, stored("events"))
        refused = ("totp_refused", {"why": "wrong_password", "pause": 0})
        self.assertEqual([refused] * 2, self.events()[1:])

    def test_off_until_confirmed(self) -> None:
        """Before the authenticator is confirmed no login needs a code, and none is used."""
        self.begin()

        for body in ({}, {"code": self.code()}, {"code": self.wrong_code()}):
            pair = self.ok(self.log_in(**body))
            self.assertEqual(["pwd"], claims_of(pair["auth_token"])["amr"])
        self.ok(self.confirm(self.code()))

    def test_begin_again(self) -> None:
        """A second secret replaces the first one, whose codes are wrong then."""
        first = self.begin()
        code_of_first = self.code()

        self.assertNotEqual(first, self.begin())

        self.assert_wrong(self.confirm(code_of_first))
        self.assertEqual((False, 0), self.state())
        self.ok(self.confirm(self.code()))

    def test_wrong_code(self) -> None:
        """A wrong code, or one in the form of a recovery code, turns nothing on."""
        self.begin()
        before = stored("events")
        for code in (self.wrong_code(), NO_RECOVERY_CODE, self.code(steps=-2), self.code(steps=1)):
            self.assert_wrong(self.confirm(code))

        self.assertEqual(before, stored("events"))
        refused = ("totp_refused", {"why": "wrong_code", "pause": 0})
        self.assertEqual([refused] * 4, self.events()[-4:])
        self.ok(self.log_in())
        self.ok(self.confirm(self.code()))

    def test_ill_formed(self) -> None:
        """What has not the form of a code is an invalid payload."""
        self.begin()
        before = stored()
        for code in ILL_FORMED:
            with self.subTest(code):
                answer = self.send("POST", "/auth/totp/confirm", self.tokens["ada"], code=code)
                self.assert_ill_formed(answer)
        answer = self.send("POST", "/auth/totp/confirm", self.tokens["ada"])
        self.assert_error(answer, errors.InvalidPayload)
        self.assertEqual(before, stored())

    def test_not_begun(self) -> None:
        """Without a secret there is nothing to confirm; that of another user does not count."""
        self.begin("bob")

        answer = self.confirm(self.code("bob"), "ada")

        self.assert_error(answer, errors.TotpNotFound)

    def test_exists(self) -> None:
        """A user with an authenticator can neither begin nor confirm, and keeps the one."""
        self.enrol()
        before = stored()

        for password in ("test", "wrong"):
            answer = self.send("POST", "/auth/totp", self.tokens["ada"], current_password=password)
            self.assert_error(answer, errors.TotpExists)
        for code in (self.code(), self.wrong_code()):
            self.assert_error(self.confirm(code), errors.TotpExists)

        self.assertEqual(before, stored())
        self.ok(self.log_in(code=self.code()))

    def test_code_of_the_step_before(self) -> None:
        """The first code may be that of the step before; then the present one works too."""
        self.begin()

        self.ok(self.confirm(self.code(steps=-1)))

        self.assert_wrong(self.log_in(code=self.code(steps=-1)))
        self.ok(self.log_in(code=self.code()))

    def test_first_code_is_used_up(self) -> None:
        """The code that confirms the authenticator logs in no more."""
        self.begin()
        code = self.code()
        self.ok(self.confirm(code))

        self.assert_wrong(self.log_in(code=code))
        self.assert_wrong(self.second_step(self.mfa_token(), code))

    def test_recovery_codes(self) -> None:
        """There are ten different recovery codes, of which only the hashes are stored."""
        self.enrol()

        shown = self.recovery_codes["ada"]
        self.assertEqual((10, 10), (len(shown), len(set(shown))))
        for code in shown:
            self.assertRegex(code, RECOVERY_CODE)
        hashes = [hashlib.sha256(code.replace("-", "").encode()).hexdigest() for code in shown]
        rows = stored()["recovery_codes"]
        self.assertEqual(set(hashes), {row["code_hash"] for row in rows})
        self.assertEqual({self.ids["ada"]}, {row["user_id"] for row in rows})
        self.assertEqual({"user_id", "code_hash"}, set(rows[0]))

    def test_sessions(self) -> None:
        """The other sessions of the user end; the one that confirms stays, and no other user's."""
        other = self.ok(self.log_in())["auth_token"]
        self.enrol()

        self.assert_error(self.get("/auth/status", other), errors.SessionEnded)
        for name in ("ada", "bob"):
            self.ok(self.get("/auth/status", self.tokens[name]))

    def test_session_says_so(self) -> None:
        """The session that confirms has given a code; its tokens say so from a refresh on."""
        pair = self.ok(self.log_in())
        self.tokens["ada"] = pair["auth_token"]

        self.enrol()

        self.assertEqual(["pwd", "otp"], self.amr_of(self.tokens["ada"]))
        self.assertEqual(["pwd"], claims_of(pair["auth_token"])["amr"])
        self.assertEqual(["pwd", "otp"], claims_of(self.refresh(pair)["auth_token"])["amr"])

    def test_events(self) -> None:
        """Each step is recorded."""
        self.ok(self.log_in())
        self.enrol()

        expected = [
            ("totp_started", {}),
            ("code_given", {"method": "otp"}),
            ("totp_enabled", {"sessions": 1}),
        ]
        self.assertEqual(expected, self.events()[-3:])
        session_id = session_of(self.tokens["ada"])
        self.assertEqual({session_id}, {event["session_id"] for event in stored_events()[-3:]})

    def test_uri(self) -> None:
        """The URI names the email and the service, and has the secret."""
        for sender, service in (
            (None, "users-service"),
            ("Example & Söhne <users@app.example>", "Example & Söhne"),
            ("users@app.example", "app.example"),
        ):
            with self.subTest(sender):
                self.app.config["MAIL_FROM"] = sender
                answer = self.send(
                    "POST", "/auth/totp", self.tokens["ada"], current_password="test"
                )

                data = self.ok(answer)["data"]
                self.assertEqual({"secret", "uri"}, set(data))
                totp = pyotp.parse_uri(data["uri"])
                self.assertEqual(
                    (data["secret"], "ada@test.com", service),
                    (totp.secret, totp.name, totp.issuer),
                )
                assert isinstance(totp, pyotp.TOTP)  # noqa: S101  # for mypy
                self.secrets["ada"] = data["secret"]
                self.assertEqual(self.code(), totp.at(clock.utcnow()))

    def test_email_verified(self) -> None:
        """It is stored whether the email was verified when the authenticator was confirmed."""
        for name, verified in (("ada", False), ("bob", True)):
            self.store(name, email_verified=verified)
            self.enrol(name)

        rows = {row["user_id"]: row["email_verified"] for row in stored()["totp_factors"]}
        self.assertEqual({self.ids["ada"]: False, self.ids["bob"]: True}, rows)

    def test_password_changed_meanwhile(self) -> None:
        """A change of the password ends an enrolment that was begun with the one before."""
        self.begin()
        body = {"current_password": "test", "new_password": "another"}
        self.ok(self.send("POST", "/auth/password", self.tokens["ada"], **body))

        self.assert_error(self.confirm(self.code()), errors.TotpNotFound)


class TestLogin(SecondFactorTestCase):
    """POST /auth/login and /auth/login/mfa of a user with an authenticator."""

    def setUp(self) -> None:
        """Set the authenticator of `ada` up."""
        super().setUp()
        self.enrol()

    def both_ways(self, code: str) -> list[TestResponse]:
        """Return the responses to a code in one request, and in the second step."""
        return [self.log_in(code=code), self.second_step(self.mfa_token(), code)]

    def test_one_request(self) -> None:
        """Password and code together log in."""
        answer = self.ok(self.log_in(code=self.code()))

        self.assertEqual("Successfully logged in.", answer["message"])
        self.assertEqual(["pwd", "otp"], claims_of(answer["auth_token"])["amr"])
        self.ok(self.get("/auth/status", answer["auth_token"]))
        self.assertEqual(("logged_in", {"amr": "pwd otp"}), self.events()[-1])

    def test_two_steps(self) -> None:
        """The password alone gets a token, with which the code logs in."""
        refused = self.log_in()
        data = self.assert_error(refused, errors.MfaRequired)
        self.assertEqual('Bearer realm="users"', refused.headers["WWW-Authenticate"])
        self.assertEqual({"status", "message", "code", "mfa_token"}, set(data) - {"request_id"})

        answer = self.ok(self.second_step(data["mfa_token"], self.code()))

        self.assertEqual("Successfully logged in.", answer["message"])
        self.assertEqual(["pwd", "otp"], claims_of(answer["auth_token"])["amr"])
        self.ok(self.get("/auth/status", answer["auth_token"]))
        expected = [
            ("login_refused", {"why": "mfa_required", "pause": 0}),
            ("logged_in", {"amr": "pwd otp"}),
        ]
        self.assertEqual(expected, self.events()[-2:])

    def test_mfa_token(self) -> None:
        """The token is of a kind of its own, for five minutes, and names only the user."""
        token = self.mfa_token()

        header, claims = decode(token.split(".")[0]), claims_of(token)
        self.assertEqual({"alg": "HS256", "typ": "mfa+jwt"}, header)
        self.assertEqual({"sub", "state", "aud", "iat", "exp"}, set(claims))
        self.assertEqual((str(self.ids["ada"]), "mfa"), (claims["sub"], claims["aud"]))
        self.assertEqual(300, claims["exp"] - claims["iat"])

    def test_password_comes_first(self) -> None:
        """A wrong password is answered as ever, whatever the code, and uses no code up."""
        before = stored("events")
        for code in (self.code(), self.wrong_code(), self.recovery_codes["ada"][0]):
            self.assert_error(self.log_in("ada", "wrong", code=code), errors.InvalidCredentials)
        answer = self.send(
            "POST", "/auth/login", email="x@test.com", password="test", code=self.code()
        )
        self.assert_error(answer, errors.InvalidCredentials)

        self.assertEqual(before, stored("events"))
        self.ok(self.log_in(code=self.code()))

    def test_recovery_code(self) -> None:
        """A recovery code logs in instead, however it is typed, and one less is left."""
        expected = [("recovery_code_used", {}), ("logged_in", {"amr": "pwd rc"})]
        for number in range(4):
            shown = self.recovery_codes["ada"][number]
            code = [shown, *same_code(shown)][number]
            with self.subTest(code):
                in_two = self.second_step(self.mfa_token(), code) if number % 2 else None
                answer = self.ok(in_two or self.log_in(code=code))

                self.assertEqual(["pwd", "rc"], claims_of(answer["auth_token"])["amr"])
                self.assertEqual((True, 9 - number), self.state())
                self.assertEqual(expected, self.events()[-2:])

    def test_recovery_code_once(self) -> None:
        """A recovery code works once, in whatever form and way."""
        code = self.recovery_codes["ada"][0]
        self.ok(self.log_in(code=code))

        for again in [code, *same_code(code)]:
            for answer in self.both_ways(again):
                self.assert_wrong(answer)
        self.assertEqual((True, 9), self.state())

    def test_recovery_code_of_another_user(self) -> None:
        """A recovery code of one user is none of another, and is not used up."""
        self.enrol("bob")
        for answer in self.both_ways(self.recovery_codes["bob"][0]):
            self.assert_wrong(answer)

        self.ok(self.log_in("bob", code=self.recovery_codes["bob"][0]))

    def test_code_of_another_user(self) -> None:
        """A code of one user's authenticator is wrong for another user."""
        self.enrol("bob")
        for answer in self.both_ways(self.code("bob")):
            self.assert_wrong(answer)

        self.ok(self.log_in("bob", code=self.code("bob")))

    def test_once(self) -> None:
        """A code works once, whichever way."""
        self.ok(self.log_in(code=self.code()))
        for answer in self.both_ways(self.code()):
            self.assert_wrong(answer)

        self.ok(self.second_step(self.mfa_token(), self.next_code()))
        for answer in self.both_ways(self.code()):
            self.assert_wrong(answer)

    def test_step_before(self) -> None:
        """The code of the step before works, once."""
        self.move_clock(STEP)

        self.ok(self.log_in(code=self.code(steps=-1)))

        for answer in self.both_ways(self.code(steps=-1)):
            self.assert_wrong(answer)

    def test_other_steps(self) -> None:
        """The code of the next step, or of two steps before, is wrong."""
        self.move_clock(5 * STEP)
        for steps in (-3, -2, 1, 2):
            for answer in self.both_ways(self.code(steps=steps)):
                self.assert_wrong(answer)

    def test_order(self) -> None:
        """After a code, only a later one works."""
        self.move_clock(STEP)
        earlier, later = self.code(steps=-1), self.code()
        self.ok(self.log_in(code=earlier))
        self.ok(self.log_in(code=later))

        self.move_clock(2 * STEP)
        earlier, later = self.code(steps=-1), self.code()
        self.ok(self.log_in(code=later))
        for answer in self.both_ways(earlier):
            self.assert_wrong(answer)

    def test_ill_formed(self) -> None:
        """What has not the form of a code is an invalid payload, and is not looked at."""
        token = self.mfa_token()
        before = stored()
        for code in ILL_FORMED:
            with self.subTest(code):
                self.assert_ill_formed(self.log_in(code=code))
                answer = self.send("POST", "/auth/login/mfa", mfa_token=token, code=code)
                self.assert_ill_formed(answer)
        for body in (
            {"mfa_token": token},
            {"code": self.code()},
            {"mfa_token": 1, "code": "1" * 6},
        ):
            answer = self.send("POST", "/auth/login/mfa", **body)
            self.assert_error(answer, errors.InvalidPayload)
        self.assertEqual(before, stored())

    def test_blanks_in_a_code(self) -> None:
        """Blanks and hyphens in the code of an authenticator are ignored."""
        code = self.code()

        self.ok(self.log_in(code=f" {code[:3]} {code[3:]} "))

        code = self.next_code()
        self.ok(self.second_step(self.mfa_token(), f"{code[:2]}-{code[2:4]}-{code[4:]}"))

    def test_user_without_a_factor(self) -> None:
        """The code of a user without an authenticator is ignored."""
        for code in (self.code(), NO_RECOVERY_CODE):
            pair = self.ok(self.log_in("bob", code=code))
            self.assertEqual(["pwd"], claims_of(pair["auth_token"])["amr"])
        self.assertEqual([("logged_in", {})] * 3, self.events("bob"))

    def test_wrong_codes_leave_no_session(self) -> None:
        """A wrong code changes nothing, and the refusal is recorded."""
        token = self.mfa_token()
        before = stored("events")
        for code in (self.wrong_code(), NO_RECOVERY_CODE):
            self.assert_wrong(self.log_in(code=code))
            self.assert_wrong(self.second_step(token, code))

        self.assertEqual(before, stored("events"))
        refused = ("login_refused", {"why": "wrong_code", "pause": 0})
        self.assertEqual([refused] * 4, self.events()[-4:])

    def test_deactivated(self) -> None:
        """A deactivated user learns that with the password, and uses no code up."""
        self.store(active=False)
        for body in ({}, {"code": self.code()}):
            self.assert_error(self.log_in(**body), errors.AccountInactive)

        self.store(active=True)
        self.ok(self.log_in(code=self.code()))

    def test_unverified_email(self) -> None:
        """Where the email has to be verified, that comes before the code and uses none up."""
        self.app.config["EMAIL_VERIFICATION"] = "required"
        for body in ({}, {"code": self.code()}, {"code": self.wrong_code()}):
            data = self.assert_error(self.log_in(**body), errors.EmailUnverified)
            self.assertNotIn("mfa_token", data)

        self.store(email_verified=True)
        self.ok(self.log_in(code=self.code()))

    def test_lower_cost(self) -> None:
        """A hash of a lower cost is replaced at the first step, whose token works."""
        self.app.config["BCRYPT_LOG_ROUNDS"] = 5
        before = stored_users()[0]["password"]

        token = self.mfa_token()

        after = stored_users()[0]["password"]
        self.assertNotEqual(before, after)
        self.assertIn("$05$", after)
        self.ok(self.second_step(token, self.code()))
        self.assertEqual(after, stored_users()[0]["password"])
        self.assert_error(self.log_in(), errors.MfaRequired)

    def test_lower_cost_in_one_request(self) -> None:
        """A hash of a lower cost is also replaced by a login with a code."""
        self.app.config["BCRYPT_LOG_ROUNDS"] = 5

        self.ok(self.log_in(code=self.code()))

        self.assertIn("$05$", stored_users()[0]["password"])
        self.ok(self.log_in(code=self.next_code()))

    def test_expired_sessions(self) -> None:
        """A login deletes the expired sessions of the user, in one step and in two."""
        for in_two in (False, True):
            with self.subTest(in_two_steps=in_two):
                self.move_clock(91 * 86_400)
                expired = {row["id"] for row in stored_sessions()}
                of_bob = session_of(self.tokens["bob"])
                self.assertLess({of_bob}, expired)

                if in_two:
                    self.ok(self.second_step(self.mfa_token(), self.code()))
                else:
                    self.ok(self.log_in(code=self.code()))

                left = {row["id"] for row in stored_sessions()}
                self.assertEqual({of_bob}, left & expired)

    def test_first_step_keeps_expired_sessions(self) -> None:
        """The first step starts no session and deletes none."""
        self.move_clock(91 * 86_400)
        before = stored("events")

        self.mfa_token()

        self.assertEqual(before, stored("events"))

    def test_lower_cost_at_once(self) -> None:
        """Each of two first steps that replace a hash of a lower cost gives a token that works."""
        self.app.config["BCRYPT_LOG_ROUNDS"] += 1
        original = hashing.hash
        inner: list[str] = []

        def hash_while_another_does(password: str) -> str:
            if not inner:
                inner.append("")
                inner[0] = self.mfa_token()
            return original(password)

        with mock.patch.object(hashing, "hash", hash_while_another_does):
            outer = self.mfa_token()

        self.ok(self.second_step(inner[0], self.code()))
        self.ok(self.second_step(outer, self.next_code()))


class TestMfaToken(SecondFactorTestCase):
    """How long the token of the first step is valid."""

    def setUp(self) -> None:
        """Set the authenticator of `ada` up, and take the first step."""
        super().setUp()
        self.app.config["SECRET_KEY_FALLBACKS"] = ()
        self.enrol()
        self.move_clock(STEP)
        self.token = self.mfa_token()

    def assert_dead(self) -> None:
        """Check that the token is invalid whatever the code, and that no code is used up."""
        before = stored()
        for code in (self.code(), self.recovery_codes["ada"][0], self.wrong_code()):
            answer = self.second_step(self.token, code)
            self.assert_error(answer, errors.TokenInvalid)
            challenge = 'Bearer realm="users", error="invalid_token"'
            self.assertEqual(challenge, answer.headers["WWW-Authenticate"])
        self.assertEqual(before, stored())

    def test_five_minutes(self) -> None:
        """It is valid for 300 seconds."""
        self.move_clock(299)
        self.ok(self.second_step(self.token, self.code()))

        self.move_clock(1)
        answer = self.second_step(self.token, self.recovery_codes["ada"][0])

        self.assert_error(answer, errors.TokenExpired)
        self.assertEqual((True, 10), self.state())

    def test_wrong_code(self) -> None:
        """A wrong code does not end it."""
        self.assert_wrong(self.second_step(self.token, self.wrong_code()))

        self.ok(self.second_step(self.token, self.code()))

    def test_password(self) -> None:
        """A change of the password ends it, also one to the same password."""
        for new in ("test", "another"):
            body = {"current_password": "test", "new_password": new, "code": self.next_code()}
            self.ok(self.send("POST", "/auth/password", self.tokens["ada"], **body))
            self.move_clock(STEP)
            self.assert_dead()
            self.token = self.mfa_token(password=new)

    def test_email(self) -> None:
        """A change of the email ends it, also if the user changes it back."""
        for email in ("new@test.com", "ada@test.com"):
            body = {"current_password": "test", "email": email, "code": self.next_code()}
            path = f"/users/{self.ids['ada']}"
            self.ok(self.send("PATCH", path, self.tokens["ada"], **body))
            self.move_clock(STEP)
            if email == "new@test.com":
                self.assert_dead()
        self.store(email_verified=True)
        self.assert_dead()

    def test_deactivation(self) -> None:
        """A deactivation ends it."""
        administration.set_active("ada@test.com", False, ORIGIN)
        db.session.commit()

        self.assert_dead()

    def test_deletion(self) -> None:
        """A deletion of the account ends it, for a later account with the same email too."""
        body = {"current_password": "test", "code": self.code()}
        self.ok(self.send("DELETE", "/auth/account", self.tokens["ada"], **body))
        self.assert_dead()

        self.add("ada")
        self.enrol()
        self.assert_dead()

    def test_forged(self) -> None:
        """A token for another user, or with another end, is invalid."""
        self.enrol("bob")
        head, payload, signature = self.token.split(".")
        of_bob = self.mfa_token("bob").split(".")
        good = self.token
        for name, forged in {
            "signature of another": f"{head}.{payload}.{of_bob[2]}",
            "payload of another": f"{head}.{of_bob[1]}.{signature}",
            "no signature": f"{head}.{payload}.",
            "no token": "x",
            "blanks": f" {good}",
            "empty": "",
            "long": "a" * 5_000,
        }.items():
            with self.subTest(name):
                self.token = forged
                self.assert_dead()

    def test_fallback_keys(self) -> None:
        """It is accepted under the keys that verify, and under no key that was removed."""
        config = self.app.config
        old, config["SECRET_KEY"] = config["SECRET_KEY"], "b" * 32
        self.assert_dead()
        config["SECRET_KEY_FALLBACKS"] = ("c" * 32, old)

        self.ok(self.second_step(self.token, self.code()))

    def test_turned_off(self) -> None:
        """After the authenticator was turned off, it starts no session."""
        self.ok(self.turn_off(code=self.code()))
        sessions = stored_sessions()

        for code in (self.code(), self.recovery_codes["ada"][0]):
            self.assert_wrong(self.second_step(self.token, code))

        self.assertEqual(sessions, stored_sessions())

    def test_while_another_is_set_up(self) -> None:
        """The code of an authenticator that is not confirmed yet logs in nowhere."""
        self.ok(self.turn_off(code=self.code()))
        self.begin()

        self.assert_wrong(self.second_step(self.token, self.code()))

        self.ok(self.confirm(self.code()))
