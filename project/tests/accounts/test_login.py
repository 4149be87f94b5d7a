"""Login: its responses, and that their cost does not reveal whether a user exists."""

import contextlib
import itertools
import unicodedata
from collections.abc import Iterator
from typing import Any
from unittest import mock

import bcrypt as raw_bcrypt
from sqlalchemy import select

from project import bcrypt, errors
from project.lib import database, hashing
from project.models import User
from project.tests.base import BaseTestCase
from project.tests.rows import add_user


class TestLogin(BaseTestCase):
    """Email and password."""

    def test_after_registration(self) -> None:
        """A registered user can log in with their email and password."""
        self.register(password="123456")

        response = self.login(password="123456")

        self.assertEqual(200, response.status_code)

    def test_wrong_password_is_answered_like_unknown_email(self) -> None:
        """A wrong password is answered like an unknown email, byte for byte."""
        unknown = self.login()
        add_user("test", "test@test.com", "test")

        wrong = self.login(password="Test")

        self.assert_error(wrong, errors.InvalidCredentials)
        self.assertEqual(unknown.get_data(), wrong.get_data())
        for answer in (unknown, wrong):
            self.assertTrue(answer.headers.pop("X-Request-ID"))
        self.assertEqual(sorted(unknown.headers), sorted(wrong.headers))

    def test_unknown_email_takes_as_long_as_wrong_password(self) -> None:
        """An unknown email costs one hash, like a wrong password."""
        self.app.config["BCRYPT_LOG_ROUNDS"] = 5
        add_user("test", "test@test.com", "test")
        check = mock.patch.object(
            bcrypt, "check_password_hash", side_effect=bcrypt.check_password_hash
        )
        for name, email in {"wrong": "test@test.com", "unknown": "nobody@test.com"}.items():
            with self.subTest(name), check as checked:
                self.login(email, "not the password")

                self.assertEqual(1, checked.call_count)
                self.assertEqual("$2b$05$", str(checked.call_args.args[0])[:7])
                self.assertEqual(60, len(checked.call_args.args[0]))

    def test_missing_fields_are_named(self) -> None:
        """A login requires an email and a password."""
        for body in ({}, {"email": "test@test.com"}, {"password": "test"}):
            with self.subTest(body=body):
                data = self.assert_error(
                    self.client.post("/auth/login", json=body), errors.InvalidPayload
                )

                self.assertEqual({"email", "password"} - set(body), set(data["errors"]))


class TestHashes(BaseTestCase):
    """What a login costs, and when it renews the stored hash."""

    def stored(self) -> str:
        """Return the stored hash of the only user."""
        user = database.fetch_one(select(User.password))
        hashed: str = user.password if user else ""
        return hashed

    def test_hash_is_renewed_when_the_cost_rises(self) -> None:
        """A login renews the hash at the configured cost, and the password stays valid."""
        self.register()
        before = self.stored()
        self.app.config["BCRYPT_LOG_ROUNDS"] = 5

        self.assertEqual(404, self.login(password="wrong").status_code)
        self.assertEqual(before, self.stored())

        self.assertEqual(200, self.login().status_code)
        self.assertEqual(["$2b$04$", "$2b$05$"], [before[:7], self.stored()[:7]])
        self.assertEqual(200, self.login().status_code)

    def test_hash_is_kept_when_the_cost_falls(self) -> None:
        """A hash of a higher cost than the configured one is kept."""
        self.app.config["BCRYPT_LOG_ROUNDS"] = 5
        self.register()
        before = self.stored()
        self.app.config["BCRYPT_LOG_ROUNDS"] = 4

        self.assertEqual(200, self.login().status_code)
        self.assertEqual(before, self.stored())

    @contextlib.contextmanager
    def work(self) -> Iterator[list[int]]:
        """Yield a list to which each call of a hashing thread adds its rounds of bcrypt."""
        pool: hashing.HashingPool = self.app.extensions["hashing_pool"]
        run = pool.run
        turns: list[int] = []

        def turn(*args: Any) -> Any:
            turns.append(0)
            return run(*args)

        def hashpw(password: bytes, salt: bytes) -> bytes:
            turns[-1] += 2 ** int(salt.split(b"$")[2])
            return original(password, salt)

        original = raw_bcrypt.hashpw
        with mock.patch.object(pool, "run", turn), mock.patch("bcrypt.hashpw", hashpw):
            yield turns

    def test_every_refusal_costs_the_same(self) -> None:
        """Every refused login does the work of one hash at the configured cost."""
        inactive = {"username": "inactive", "email": "inactive@test.com", "password": "test"}
        for cost in (4, 5, 7):
            self.app.config["BCRYPT_LOG_ROUNDS"] = cost
            add_user(f"cost-{cost}", f"{cost}@test.com", "test")
        add_user(**inactive, active=False)
        long = "x" * 2_000
        refusals = {}
        with self.work() as turns:
            for email, password in (
                ("nobody@test.com", "wrong"),
                ("nobody@test.com", long),
                *itertools.product(["7@test.com", "5@test.com", "4@test.com"], ["wrong", long]),
                ("inactive@test.com", "wrong"),
                ("inactive@test.com", long),
            ):
                refusals[email, password[:5]] = self.login(email, password).get_json()
            genuine = self.login("inactive@test.com", "test")

        self.assertEqual([2**7] * 11, turns)
        for case, refusal in refusals.items():
            with self.subTest(case):
                self.assertEqual(refusals["nobody@test.com", "wrong"], refusal)
        self.assertEqual("account_inactive", genuine.get_json()["code"])

    def test_old_hash_takes_as_long_when_it_is_right(self) -> None:
        """A right password is checked with the same work when its hash is a cheaper, old one."""
        self.register()
        self.app.config["BCRYPT_LOG_ROUNDS"] = 6
        with self.work() as turns:
            self.assertEqual(200, self.login().status_code)
            self.assertEqual(200, self.login().status_code)

        self.assertEqual([2**6] * 3, turns)  # checked, renewed; checked again

    def test_hash_of_a_higher_cost(self) -> None:
        """A hash of a higher cost is checked at that cost, and no further work is added."""
        self.app.config["BCRYPT_LOG_ROUNDS"] = 6
        self.register()
        self.app.config["BCRYPT_LOG_ROUNDS"] = 4
        with self.work() as turns:
            self.assertEqual(404, self.login(password="wrong").status_code)

        self.assertEqual([2**6], turns)

    def test_dummy_hash_logs_nobody_in(self) -> None:
        """A password that matches the dummy hash is refused."""
        with mock.patch.object(bcrypt, "check_password_hash", return_value=True):
            self.assertEqual(404, self.login().status_code)

    def test_endless_passwords_are_not_normalized(self) -> None:
        """Far too long text is refused before normalization, whose cost is quadratic."""
        endless = "a" + "\u0301" * 15_000 + "\u0327" * 15_000
        new = {"username": "new", "email": "new@test.com", "password": "test"}
        with mock.patch("unicodedata.normalize", wraps=unicodedata.normalize) as normalize:
            self.assertEqual(404, self.login(password=endless).status_code)
            for field in ("username", "password"):
                response = self.client.post("/auth/register", json=new | {field: endless})
                self.assertEqual([field], list(response.get_json()["errors"]))

        longest = max((len(call.args[1]) for call in normalize.call_args_list), default=0)
        self.assertLessEqual(longest, hashing.MAX_NFC_RATIO * hashing.MAX_BYTES)
