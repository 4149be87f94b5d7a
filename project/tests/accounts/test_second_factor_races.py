"""Concurrent requests of users with a second factor: a code works once, and nothing is lost."""

import random
import re
import secrets
import time
import unittest
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, ClassVar
from unittest import mock

import pyotp
from sqlalchemy import delete, event
from werkzeug.test import TestResponse

from project import clock, db, errors
from project.accounts import administration, links, rate_limits, second_factor
from project.lib import hashing
from project.lib.bulkhead import Bulkhead
from project.models import KnownAddress
from project.tests import scratch
from project.tests.accounts.cases import at_once
from project.tests.accounts.mail_case import MAIL_SETTINGS
from project.tests.accounts.second_factor_case import STEP, SecondFactorTestCase, Tokens, stored
from project.tests.rows import ORIGIN, stored_sessions
from project.tests.scratch import Service
from project.tests.tokens.claims import claims_of, session_of
from project.tokens.links import Purpose

AT_ONCE = 50
ROUNDS = 6  # of each race
GUESSES = 1_000
LIMIT = 5  # wrong codes before a pause
MAX_REQUESTS = 100  # of one thread that is never refused

CHANGE = re.compile(r"(UPDATE|DELETE FROM) sessions ")  # what waits for the lock of a session

Act = Callable[[], TestResponse]


class RacesTestCase(SecondFactorTestCase):
    """A test of requests that many clients send at once, none of which is refused as busy."""

    def setUp(self) -> None:
        """Give every request a slot."""
        super().setUp()
        self.app.extensions["hashing_pool"] = hashing.HashingPool(threads=2, slots=200)
        self.app.extensions["body_bulkhead"] = Bulkhead(200)

    def rounds(self) -> Iterator[int]:
        """Set the authenticator of `ada` up ROUNDS times, each time with a new session."""
        for number in range(ROUNDS):
            self.remove_factor()
            self.tokens["ada"] = self.ok(self.log_in())["auth_token"]
            self.enrol()
            with self.subTest(round=number):
                yield number

    def remove_factor(self) -> None:
        """Remove the factor of `ada`, also one that is being set up, and end the sessions."""
        administration.end_sessions("ada@test.com", ORIGIN)
        second_factor.remove(self.ids["ada"])
        db.session.commit()

    def codes(self, answers: list[TestResponse]) -> Counter[str]:
        """Return how many responses have each code; "" is that of a success."""
        return Counter(answer.get_json().get("code", "") for answer in answers)

    def log_in_until(self, refusal: type[errors.ServiceError], name: str) -> list[Tokens]:
        """Log in again and again without a code until this refusal; return all tokens."""
        pairs: list[Tokens] = []
        for _ in range(MAX_REQUESTS):
            answer = self.log_in(name)
            if answer.status_code != 200:
                self.assert_error(answer, refusal)
                break
            pairs.append(answer.get_json())
        return pairs

    def is_live(self, pair: Tokens) -> bool:
        """Return whether the session of these tokens lives, in which case both tokens work."""
        answer = self.send("GET", "/auth/status", pair["auth_token"])
        refreshed = self.send("POST", "/auth/refresh", refresh_token=pair["refresh_token"])
        self.assertEqual(answer.status_code, refreshed.status_code)
        if answer.status_code != 200:
            self.assert_error(answer, errors.SessionEnded)
        return answer.status_code == 200

    def act_of_ada(self, method: str, path: str, code: str, **body: object) -> TestResponse:
        """Return the response to an act of `ada` that takes the password and a code."""
        body = {"current_password": "test", "code": code} | body
        return self.send(method, path, self.tokens["ada"], **body)


class TestOneCode(RacesTestCase):
    """Many requests with the same code."""

    def assert_one(self, acts: Sequence[Act]) -> Tokens:
        """Log in in all these ways at once, check that one succeeds, and return its tokens."""
        answers = at_once(*acts)

        self.assertEqual({"": 1, "wrong_code": len(acts) - 1}, self.codes(answers))
        (tokens,) = [answer.get_json() for answer in answers if answer.status_code == 200]
        winner: Tokens = tokens
        return winner

    def test_logins(self) -> None:
        """Of fifty logins with one code, one gets a session, in one step and in two."""
        self.enrol()
        mfa_token = self.mfa_token()
        for name, log_in in (
            ("one step", lambda code: self.log_in(code=code)),
            ("two steps", lambda code: self.second_step(mfa_token, code)),
        ):
            with self.subTest(name):
                before, code = len(stored_sessions()), self.next_code()

                winner = self.assert_one([partial(log_in, code)] * AT_ONCE)

                self.assertEqual(before + 1, len(stored_sessions()))
                self.assertTrue(self.is_live(winner))

    def test_logins_in_both_ways(self) -> None:
        """Of logins with one code in one step and in two, one gets a session."""
        self.enrol()
        mfa_token = self.mfa_token()
        for _ in range(ROUNDS):
            before, code = len(stored_sessions()), self.next_code()

            acts = [partial(self.log_in, code=code), partial(self.second_step, mfa_token, code)]
            self.assert_one(acts * 5)

            self.assertEqual(before + 1, len(stored_sessions()))

    def test_recovery_codes(self) -> None:
        """Of twenty logins with one recovery code, one gets a session, and one code is used."""
        self.enrol()
        mfa_token = self.mfa_token()
        for number, code in enumerate(self.recovery_codes["ada"][:2]):
            before = len(stored_sessions())

            acts = [partial(self.log_in, code=code), partial(self.second_step, mfa_token, code)]
            self.assert_one(acts * 10)

            self.assertEqual(before + 1, len(stored_sessions()))
            self.assertEqual((True, 9 - number), self.state())

    def test_confirmations(self) -> None:
        """Of fifty codes that confirm an authenticator, one does, and its recovery codes count."""
        self.begin()
        code = self.code()

        answers = at_once(*[partial(self.confirm, code)] * AT_ONCE)

        codes = self.codes(answers)
        self.assertEqual(1, codes[""], codes)
        self.assertLessEqual(set(codes), {"", "wrong_code", "totp_exists", "totp_not_found"})
        (winner,) = [answer for answer in answers if answer.status_code == 200]
        self.assertEqual((True, 10), self.state())
        kinds = [kind for kind, _ in self.events()]
        self.assertEqual(1, kinds.count("totp_enabled"))
        for recovery_code in winner.get_json()["data"]["recovery_codes"]:
            self.ok(self.log_in(code=recovery_code))

    def test_login_and_step_up(self) -> None:
        """Of logins and acts with one code, one succeeds."""
        self.enrol()
        path = f"/users/{self.ids['ada']}"
        for number in range(ROUNDS):
            code = self.next_code()
            acts = (
                partial(self.log_in, code=code),
                partial(self.act_of_ada, "POST", "/auth/recovery_codes", code),
                partial(self.act_of_ada, "PATCH", path, code, username=f"ada {number}"),
                partial(self.act_of_ada, "POST", "/auth/password", code, new_password="test"),
            )
            with self.subTest(number):
                answers = at_once(*acts)

                # The second step of a race can also be refused because the password has changed.
                codes = self.codes(answers)
                self.assertEqual(1, codes[""], codes)
                self.assertLessEqual(set(codes), {"", "wrong_code", "wrong_password"}, codes)
        self.assertEqual(1 + ROUNDS, len(self.uses()))

    def uses(self) -> list[str]:
        """Return the events of codes that were right."""
        return [
            kind
            for kind, details in self.events()
            if kind == "code_given" or (kind == "logged_in" and "amr" in details)
        ]

    def test_sessions_of_one_user(self) -> None:
        """Of two sessions that begin and confirm at once, one confirms, and the other ends."""
        for number in range(ROUNDS):
            name = f"user{number}"
            self.add(name)
            pairs = [self.ok(self.log_in(name)) for _ in range(2)]

            def begin_and_confirm(pair: Tokens) -> tuple[str, TestResponse]:
                token = pair["auth_token"]
                begun = self.send("POST", "/auth/totp", token, current_password="test")
                if begun.status_code != 200:
                    return "", begun
                secret = begun.get_json()["data"]["secret"]
                code = pyotp.TOTP(secret).at(clock.utcnow())
                return secret, self.send("POST", "/auth/totp/confirm", token, code=code)

            with self.subTest(number):
                results = at_once(*[partial(begin_and_confirm, pair) for pair in pairs])

                codes = self.codes([answer for _, answer in results])
                self.assertLessEqual(codes[""], 1)
                refused = {"wrong_code", "session_ended", "totp_exists", "totp_not_found"}
                self.assertLessEqual(set(codes), {"", *refused})
                for pair, (secret, answer) in zip(pairs, results, strict=True):
                    if answer.status_code == 200:
                        self.tokens[name], self.secrets[name] = pair["auth_token"], secret
                        self.move_clock(STEP)
                        self.ok(self.log_in(name, code=self.code(name)))
                        self.assertEqual((True, 10), self.state(name))
                        self.assertEqual(2, len(self.sessions_of(name)))

    def sessions_of(self, name: str) -> list[dict[str, Any]]:
        """Return the sessions of a user."""
        return [row for row in stored_sessions() if row["user_id"] == self.ids[name]]


class TestMeanwhile(RacesTestCase):
    """What happens between the check of a password and the session that it starts."""

    @contextmanager
    def after_the_password(self, act: Callable[[], object]) -> Iterator[None]:
        """Do something once, right after a password of a request has been verified."""
        original, acts = hashing.verify, [act]

        def verify(hashed: str | None, password: str) -> bool:
            result = original(hashed, password)
            if acts:
                acts.pop()()
            return result

        with mock.patch.object(hashing, "verify", verify):
            yield
        self.assertEqual([], acts)

    def turn_on(self) -> None:
        """Turn the authenticator of `ada` on."""
        self.ok(self.confirm(self.code()))

    def test_enrolment(self) -> None:
        """A login whose password was verified before the factor was on gets no session."""
        self.begin()
        before = {session_of(self.tokens["ada"]), session_of(self.tokens["bob"])}

        with self.after_the_password(self.turn_on):
            refused = self.log_in()

        mfa_token = self.assert_error(refused, errors.MfaRequired)["mfa_token"]
        self.assertEqual(before, {row["id"] for row in stored_sessions()})
        self.move_clock(STEP)
        self.ok(self.second_step(mfa_token, self.code()))

    def test_enrolment_during_a_login_with_a_code(self) -> None:
        """The code of such a login is looked at: not the one that was just used."""
        self.begin()
        with self.after_the_password(self.turn_on):
            self.assert_wrong(self.log_in(code=self.code()))

    def test_enrolment_during_a_login_with_the_next_code(self) -> None:
        """A later code of the new authenticator logs in, and the session says so."""
        self.begin()

        def turn_on_and_wait() -> None:
            self.turn_on()
            self.move_clock(STEP)

        with self.after_the_password(turn_on_and_wait):
            pair = self.ok(self.log_in(code=self.code(steps=1)))

        self.assertEqual(["pwd", "otp"], claims_of(pair["auth_token"])["amr"])

    def test_turned_off(self) -> None:
        """A login with a code during which the factor is turned off starts no session with it."""
        for act in (lambda: self.ok(self.turn_off()), self.reset_as_operator):
            self.begin()
            self.turn_on()
            self.move_clock(STEP)

            with self.after_the_password(act):
                answer = self.log_in(code=self.code())

            self.assertIn(answer.status_code, {200, 400})
            sessions = {row["id"]: row["amr"] for row in stored_sessions()}
            if answer.status_code == 200:
                self.assertEqual(["pwd"], sessions[session_of(answer.get_json()["auth_token"])])
            pair = self.ok(self.log_in())
            self.assertEqual(["pwd"], claims_of(pair["auth_token"])["amr"])
            self.tokens["ada"] = pair["auth_token"]

    def reset_as_operator(self) -> None:
        """Turn the authenticator of `ada` off, in a context of its own."""
        with self.app.app_context():
            administration.reset_totp_of("ada@test.com", ORIGIN)
            db.session.commit()

    def test_step_up(self) -> None:
        """An act that was begun without a factor is refused if another session has set one up."""
        user = f"/users/{self.ids['ada']}"
        for method, path, body in (
            ("POST", "/auth/password", {"new_password": "another"}),
            ("PATCH", user, {"username": "eve"}),
            ("DELETE", "/auth/account", {}),
            ("POST", "/auth/totp", {}),
        ):
            with self.subTest(path, method=method):
                self.remove_factor()
                mine = self.ok(self.log_in())["auth_token"]
                self.tokens["ada"] = self.ok(self.log_in())["auth_token"]
                self.begin()
                with self.after_the_password(self.turn_on):
                    answer = self.send(method, path, mine, current_password="test", **body)

                self.assert_error(answer, errors.SessionEnded)
        self.assertEqual((True, 10), self.state())

    def test_begin_again_during_a_confirmation(self) -> None:
        """A secret that replaces the one that is being confirmed is not turned on."""
        self.begin()
        code, original = self.code(), second_factor.pending

        def pending(user_id: int) -> Any:
            found = original(user_id)
            with mock.patch.object(second_factor, "pending", original):
                self.begin()
            return found

        with mock.patch.object(second_factor, "pending", pending):
            self.assert_wrong(self.confirm(code))

        self.assertEqual((False, 0), self.state())
        self.ok(self.confirm(self.code()))


class TestAgainstLogins(RacesTestCase):
    """Acts that turn the factor on or off, against logins."""

    def test_enrolment(self) -> None:
        """No session of a login without a code is left when the factor is on."""
        for number in range(ROUNDS):
            name = f"user{number}"
            self.add(name)
            self.begin(name)
            code = self.code(name)
            until_refused = partial(self.log_in_until, errors.MfaRequired, name)
            with self.subTest(number):
                confirmed, *given = at_once(partial(self.confirm, code, name), *[until_refused] * 3)

                self.ok(confirmed)
                for pair in chain(*given):
                    self.assertFalse(self.is_live(pair))
                self.assertEqual((True, 10), self.state(name))

    def test_turning_off(self) -> None:
        """Logins with codes and the act that turns the factor off do not disturb each other."""
        for _ in self.rounds():
            codes = self.recovery_codes["ada"][:3]

            off, *logins = at_once(
                self.turn_off, *[partial(self.log_in, code=code) for code in codes]
            )

            self.ok(off)
            for login in logins:
                if login.status_code == 200:
                    self.assertTrue(self.is_live(login.get_json()))
                else:
                    self.assert_wrong(login)
            self.assertEqual((False, 0), self.state())
            self.assertEqual([], stored()["recovery_codes"])

    def test_reset_by_an_admin(self) -> None:
        """After a reset no session lives that a code has started."""
        self.add("root", admin=True)
        path = f"/users/{self.ids['ada']}/totp"
        for _ in self.rounds():
            mfa_token = self.mfa_token()
            codes = self.recovery_codes["ada"][:4]

            reset, *logins = at_once(
                partial(self.send, "DELETE", path, self.tokens["root"]),
                *[partial(self.log_in, code=code) for code in codes[:2]],
                *[partial(self.second_step, mfa_token, code) for code in codes[2:]],
            )

            self.ok(reset)
            for login in logins:
                if login.status_code != 200:
                    self.assert_wrong(login)
                elif self.is_live(login.get_json()):
                    # It has begun after the reset, when the code was not needed.
                    amr = claims_of(login.get_json()["auth_token"])["amr"]
                    self.assertEqual(["pwd"], amr)
            tables = stored()
            self.assertEqual(([], []), (tables["totp_factors"], tables["recovery_codes"]))

    def test_password_change(self) -> None:
        """A second step after the old password leaves no session when the password has changed."""
        for number in self.rounds():
            mfa_token, codes = self.mfa_token(), self.recovery_codes["ada"][:3]
            body = {"current_password": "test", "new_password": f"new {number}"}

            change, *logins = at_once(
                partial(self.send, "POST", "/auth/password", self.tokens["ada"], **body),
                *[partial(self.second_step, mfa_token, code) for code in codes],
            )

            self.ok(change)
            for login in logins:
                if login.status_code == 200:
                    self.assertFalse(self.is_live(login.get_json()))
                else:
                    self.assert_error(login, errors.TokenInvalid)
            self.store(password=hashing.hash("test"))

    def test_reset_by_mail(self) -> None:
        """An attacker who sets a factor up during the reset of its owner does not keep it."""
        for number in range(ROUNDS):
            name = f"user{number}"
            self.add(name)
            self.begin(name)
            user: Any = links.user_by_email(f"{name}@test.com")
            with mock.patch.dict(self.app.config, MAIL_SETTINGS):
                token = links.for_user(Purpose.RESET, user, 600).url.partition("token=")[2]
            body = {"token": token, "new_password": "another"}
            with self.subTest(number):
                reset, confirmed = at_once(
                    partial(self.send, "POST", "/auth/password/reset", **body),
                    partial(self.confirm, self.code(name), name),
                )

                self.ok(reset)
                if confirmed.status_code != 200:
                    self.assert_error(confirmed, errors.SessionEnded)
                self.tokens[name] = self.ok(self.log_in(name, "another"))["auth_token"]
                self.assertEqual((False, 0), self.state(name))

    def test_refreshes(self) -> None:
        """The session that turns the factor on goes on; the others end while they refresh."""
        for number in range(ROUNDS):
            name = f"user{number}"
            self.add(name)
            own, *others = [self.ok(self.log_in(name)) for _ in range(4)]
            self.tokens[name] = own["auth_token"]
            self.begin(name)
            code = self.code(name)
            with self.subTest(number):
                confirmed, kept, *refreshed = at_once(
                    partial(self.confirm, code, name),
                    partial(self.send, "POST", "/auth/refresh", refresh_token=own["refresh_token"]),
                    *[partial(self.refresh_until_ended, pair) for pair in others],
                )

                self.ok(confirmed)
                self.assertTrue(self.is_live(self.ok(kept)))
                for pair in chain(*refreshed):
                    self.assertFalse(self.is_live(pair))

    def refresh_until_ended(self, pair: Tokens) -> list[Tokens]:
        """Refresh again and again until the session has ended; return all tokens."""
        pairs = [pair]
        for _ in range(MAX_REQUESTS):
            token = pairs[-1]["refresh_token"]
            answer = self.send("POST", "/auth/refresh", refresh_token=token)
            if answer.status_code != 200:
                self.assert_error(answer, errors.SessionEnded)
                break
            pairs.append(answer.get_json())
        return pairs


class TestMixture(RacesTestCase):
    """All kinds of requests at once, with all that they lock."""

    settings: ClassVar[dict[str, Any]] = (
        RacesTestCase.settings
        | MAIL_SETTINGS
        | {
            "RATE_LIMITS": True,
            "LOGIN_FAILURES_PER_ADDRESS": 1_000_000,
            "LOGIN_FAILURES_PER_ACCOUNT": 10_000,
            "REGISTRATIONS_PER_ADDRESS": 1_000_000,
        }
    )
    addresses = ("192.0.2.7", "192.0.2.8", "2001:db8::1")
    names = ("ada", "bob", "root", "rita")
    threads = 8
    requests = 50  # of a thread

    def setUp(self) -> None:
        """Add two admins; everyone has an authenticator and many recovery codes."""
        if not scratch.ON_POSTGRESQL:
            self.skipTest("SQLite has one lock")
        self.enterContext(mock.patch.object(rate_limits, "CODES_PER_ACCOUNT", 10_000))
        self.enterContext(mock.patch.object(rate_limits, "NOTICES_PER_EMAIL", 10_000))
        self.enterContext(mock.patch.object(second_factor, "RECOVERY_CODES", 200))
        super().setUp()
        for name in ("root", "rita"):
            self.add(name, admin=True)
        for name in self.names:
            self.store(name, email_verified=name != "bob")  # whether a reset keeps the factor
            self.enrol(name)
        self.unused = {name: list(codes) for name, codes in self.recovery_codes.items()}
        self.pairs: dict[str, Tokens] = {
            name: self.ok(self.log_in(name, code=self.unused[name].pop())) for name in self.names
        }

    def test_no_deadlock(self) -> None:
        """Every response is one of the documented ones, and none says that a lock was lost."""
        results = at_once(*[partial(self.work, seed) for seed in range(self.threads)])

        codes = Counter(chain(*results))
        self.assertEqual(self.threads * self.requests, codes.total())
        expected = {
            "",
            "wrong_code",
            "wrong_password",
            "mfa_required",
            "totp_exists",
            "totp_not_found",
            "token_invalid",
            "session_ended",
            "refresh_reused",
            "link_invalid",
            "busy",  # the account changed three times while the password was verified
        }
        self.assertLessEqual(set(codes), expected, codes)
        self.assertGreater(codes[""], codes.total() // 4, codes)

    def work(self, seed: int) -> list[str]:
        """Send requests, and return the code of each response."""
        choose = random.Random(seed)  # noqa: S311  # no secret
        codes = []
        for number in range(self.requests):
            if number % 10 == 0:
                self.forget_addresses()
            name = choose.choice(self.names)
            act = choose.choice(self.acts())
            answer = act(name, choose)
            codes.append(answer.get_json().get("code", ""))
        return codes

    def forget_addresses(self) -> None:
        """Delete the known addresses, so that the counts of addresses are used."""
        with self.app.app_context():
            db.session.execute(delete(KnownAddress))
            db.session.commit()

    def acts(self) -> list[Callable[[str, random.Random], TestResponse]]:
        """Return the acts of a user; one that is listed more often is chosen more often."""
        return [
            *[self.one_step] * 3,
            *[self.two_steps] * 3,
            self.wrong,
            self.refresh_one,
            self.change_name,
            self.change_password,
            self.change_as_admin,
            self.reset_as_admin,
            self.enrol_again,
            self.replace,
            self.reset_by_mail,
        ]

    def request(
        self,
        choose: random.Random,
        method: str,
        path: str,
        token: str | None = None,
        /,
        **body: object,
    ) -> TestResponse:
        """Return the response to a request from one of the addresses."""
        return self.app.test_client().open(
            path,
            method=method,
            json=body or None,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            environ_overrides={"REMOTE_ADDR": choose.choice(self.addresses)},
        )

    def a_code(self, name: str) -> str:
        """Return a recovery code that was probably not used yet."""
        try:
            return self.unused[name].pop()
        except IndexError:
            return self.recovery_codes[name][0]

    def kept(self, name: str, answer: TestResponse) -> TestResponse:
        """Keep the tokens of a response, if it has some."""
        if answer.status_code == 200:
            self.pairs[name] = answer.get_json()
        return answer

    def one_step(self, name: str, choose: random.Random) -> TestResponse:
        """Log in with a code."""
        body = {"email": f"{name}@test.com", "password": "test", "code": self.a_code(name)}
        return self.kept(name, self.request(choose, "POST", "/auth/login", **body))

    def two_steps(self, name: str, choose: random.Random) -> TestResponse:
        """Log in, and send a code if one is needed."""
        body = {"email": f"{name}@test.com", "password": "test"}
        answer = self.request(choose, "POST", "/auth/login", **body)
        if answer.status_code == 401:
            body = {"mfa_token": answer.get_json().get("mfa_token", ""), "code": self.a_code(name)}
            answer = self.request(choose, "POST", "/auth/login/mfa", **body)
        return self.kept(name, answer)

    def wrong(self, name: str, choose: random.Random) -> TestResponse:
        """Log in with a wrong code."""
        code = self.wrong_code(name)
        body = {"email": f"{name}@test.com", "password": "test", "code": code}
        return self.request(choose, "POST", "/auth/login", **body)

    def refresh_one(self, name: str, choose: random.Random) -> TestResponse:
        """Refresh the newest session."""
        token = self.pairs[name]["refresh_token"]
        answer = self.request(choose, "POST", "/auth/refresh", refresh_token=token)
        return self.kept(name, answer)

    def own(
        self, name: str, choose: random.Random, method: str, path: str, **body: object
    ) -> TestResponse:
        """Send a request of a user about the own account."""
        body = {"current_password": "test", "code": self.a_code(name)} | body
        return self.request(choose, method, path, self.pairs[name]["auth_token"], **body)

    def change_name(self, name: str, choose: random.Random) -> TestResponse:
        """Change the own username, which is a key of the table."""
        path, new = f"/users/{self.ids[name]}", f"{name} {choose.random()}"
        return self.own(name, choose, "PATCH", path, username=new)

    def change_password(self, name: str, choose: random.Random) -> TestResponse:
        """Change the password to the same one, and end the other sessions or not."""
        keep = choose.random() < 0.5
        body = {"new_password": "test", "keep_sessions": keep}
        return self.own(name, choose, "POST", "/auth/password", **body)

    def replace(self, name: str, choose: random.Random) -> TestResponse:
        """Replace the recovery codes."""
        answer = self.own(name, choose, "POST", "/auth/recovery_codes")
        if answer.status_code == 200:
            self.unused[name] = answer.get_json()["data"]["recovery_codes"]
        return answer

    def as_admin(
        self, name: str, choose: random.Random, method: str, path: str, **body: object
    ) -> TestResponse:
        """Send a request of an admin about another user."""
        admin = "rita" if name == "root" else "root"
        token = self.pairs[admin]["auth_token"]
        if choose.random() < 0.5:
            body |= {"code": self.a_code(admin)}
        return self.request(choose, method, f"/users/{self.ids[name]}{path}", token, **body)

    def change_as_admin(self, name: str, choose: random.Random) -> TestResponse:
        """Change the name or the roles of a user as an admin."""
        change: dict[str, object] = {"username": f"{name} {choose.random()}"}
        if choose.random() < 0.5:
            change = {"roles": [choose.choice("abc")]}
        return self.as_admin(name, choose, "PATCH", "", **change)

    def reset_as_admin(self, name: str, choose: random.Random) -> TestResponse:
        """Turn the authenticator of a user off as an admin."""
        return self.as_admin(name, choose, "DELETE", "/totp")

    def enrol_again(self, name: str, choose: random.Random) -> TestResponse:
        """Set an authenticator up, if there is none."""
        token = self.pairs[name]["auth_token"]
        answer = self.request(choose, "POST", "/auth/totp", token, current_password="test")
        if answer.status_code == 200:
            secret = answer.get_json()["data"]["secret"]
            code = pyotp.TOTP(secret).at(clock.utcnow())
            answer = self.request(choose, "POST", "/auth/totp/confirm", token, code=code)
            if answer.status_code == 200:
                self.unused[name] = answer.get_json()["data"]["recovery_codes"]
        return answer

    def reset_by_mail(self, name: str, choose: random.Random) -> TestResponse:
        """Reset the password to the same one with a link; start without one if it changed."""
        with self.app.app_context():
            user: Any = links.user_by_email(f"{name}@test.com")
            url = links.for_user(Purpose.RESET, user, 600).url
        body = {"token": url.partition("token=")[2], "new_password": "test"}
        return self.request(choose, "POST", "/auth/password/reset", **body)


class TestOrderOfLocks(RacesTestCase):
    """A transaction changes or ends sessions, and only then updates the user.

    A refresh has locked its session when it records an event for the user, and may wait for the
    transaction that has updated the user, which must not wait for the session then.
    """

    def statements(self, act: Callable[[], object]) -> list[str]:
        """Return the beginnings of the statements that an act writes with."""
        sent: list[str] = []

        def keep(*arguments: Any) -> None:
            sent.append(str(arguments[2]))

        event.listen(db.engine, "before_cursor_execute", keep)
        try:
            act()
        finally:
            event.remove(db.engine, "before_cursor_execute", keep)
        return sent

    def assert_order(self, sent: list[str]) -> None:
        """Check that all statements about sessions come before the first update of the user."""
        joined = "\n".join(sent)
        about_sessions = [number for number, each in enumerate(sent) if CHANGE.match(each)]
        updates = [number for number, each in enumerate(sent) if each.startswith("UPDATE users ")]
        self.assertTrue(about_sessions, joined)
        self.assertTrue(updates, joined)
        self.assertLess(max(about_sessions), min(updates), joined)

    def test_order(self) -> None:
        """Every act that turns a factor on or off does so."""
        self.store(email_verified=False)
        self.add("root", admin=True)
        path = f"/users/{self.ids['ada']}/totp"

        def reset_by_mail() -> object:
            with mock.patch.dict(self.app.config, MAIL_SETTINGS):
                user: Any = links.user_by_email("ada@test.com")
                token = links.for_user(Purpose.RESET, user, 600).url.partition("token=")[2]
            body = {"token": token, "new_password": "test"}
            return self.ok(self.send("POST", "/auth/password/reset", **body))

        acts: dict[str, Callable[[], object]] = {
            "turned off": lambda: self.ok(self.turn_off(code=self.code())),
            "by an admin": lambda: self.ok(self.send("DELETE", path, self.tokens["root"])),
            "by the operator": lambda: administration.reset_totp_of("ada@test.com", ORIGIN),
            "by mail": reset_by_mail,
        }
        for name, act in acts.items():
            self.tokens["ada"] = self.ok(self.log_in())["auth_token"]
            self.begin()
            with self.subTest("enrolment"):
                self.assert_order(self.statements(lambda: self.ok(self.confirm(self.code()))))
            self.move_clock(STEP)
            with self.subTest(name):
                self.assert_order(self.statements(act))
            db.session.commit()


@unittest.skipUnless(scratch.ON_POSTGRESQL, "SQLite is for one server")
class TestTwoServers(unittest.TestCase):
    """Two servers on one database, as on two machines."""

    servers: tuple[Service, Service]

    @classmethod
    def setUpClass(cls) -> None:
        """Start both with the same keys, and without a low limit of logins."""
        url = cls.enterClassContext(scratch.database())
        settings = {
            "SECRET_KEY": secrets.token_hex(32),
            "ENCRYPTION_KEYS": secrets.token_hex(32),
            "LOGIN_FAILURES_PER_ADDRESS": "1000000",
            "LOGIN_FAILURES_PER_ACCOUNT": "10000",
            "LOGIN_PAUSE_SECONDS": "3600",  # longer than the test
        }
        one = cls.enterClassContext(Service(url, **settings))
        cls.servers = one, cls.enterClassContext(Service(url, **settings))

    def setUp(self) -> None:
        """Register a user, and set an authenticator up."""
        self.name = f"user{secrets.token_hex(4)}"
        self.token = self.servers[0].register(self.name)[1]["auth_token"]
        body = {"current_password": "test"}
        secret = self.post(0, "/auth/totp", body, self.token)[1]["data"]["secret"]
        self.totp = pyotp.TOTP(secret)
        body = {"code": self.totp.now()}
        answer = self.post(1, "/auth/totp/confirm", body, self.token)[1]
        self.recovery_codes: list[str] = answer["data"]["recovery_codes"]

    def post(
        self, number: int, path: str, body: object, token: str | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Return status and body of the response of a server to a POST."""
        while True:
            status, answer, _ = self.servers[number % 2].request("POST", path, body, token)
            if status != 503:
                return status, answer
            time.sleep(0.05)  # no slot or no connection was free: the code was not looked at

    def log_in(self, number: int, **body: str) -> tuple[int, dict[str, Any]]:
        """Return status and body of the response of a server to a login."""
        credentials = {"email": f"{self.name}@test.com", "password": "test"}
        return self.post(number, "/auth/login", credentials | body)

    def test_guesses(self) -> None:
        """Of 1,000 guesses at both servers by a client with the password, five are looked at."""
        status, answer = self.log_in(0)
        self.assertEqual(401, status)
        mfa_token = answer["mfa_token"]
        now = clock.utcnow()
        near = {self.totp.at(now, counter_offset=steps) for steps in range(-3, 6)}
        guesses = [f"{number:06}" for number in range(GUESSES + len(near))]
        guesses = [guess for guess in guesses if guess not in near][:GUESSES]

        def guess(number: int) -> int:
            code = guesses[number]
            match number // 2 % 5:
                case 0:
                    return self.log_in(number, code=code)[0]
                case 1:
                    body = {"current_password": "test", "code": code}
                    return self.post(number, "/auth/recovery_codes", body, self.token)[0]
                case _:
                    body = {"mfa_token": mfa_token, "code": code}
                    return self.post(number, "/auth/login/mfa", body)[0]

        with ThreadPoolExecutor(12) as threads:
            statuses = Counter(threads.map(guess, range(GUESSES)))

        self.assertEqual({400, 429}, set(statuses))
        self.assertLessEqual(statuses[400], LIMIT)
        for number in range(2):
            for code in (self.totp.now(), self.recovery_codes[number]):
                self.assertEqual(429, self.log_in(number, code=code)[0])

    def test_used_on_one_is_used_on_the_other(self) -> None:
        """A code that was used on one server is wrong on the other."""
        mfa_token = self.log_in(1)[1]["mfa_token"]
        for number, code in enumerate(self.recovery_codes[:2]):
            self.assertEqual(200, self.log_in(number, code=code)[0])
            body = {"mfa_token": mfa_token, "code": code}
            status, answer = self.post(number + 1, "/auth/login/mfa", body)
            self.assertEqual((400, "wrong_code"), (status, answer["code"]))
