"""Passwords: their hashes, and the gate in front of bcrypt."""

import contextlib
import itertools
import os
import threading
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import bcrypt as raw_bcrypt
from sqlalchemy import event, select

from project import bcrypt, database, db, passwords
from project.api.models import User
from project.database import READ
from project.tests.base import BaseTestCase, bearer
from project.tests.utils import add_user

THREADS = 6  # of the server, so that three places are at the gate


class TestHashes(BaseTestCase):
    """What is stored, and what it takes to make it."""

    def stored(self) -> str:
        """Return the hash of the one user."""
        user = database.fetch_one(select(User.password))
        hashed: str = user.password if user else ""
        return hashed

    def test_hash_is_renewed_when_the_cost_rises(self) -> None:
        """At the next login the hash gets the configured cost, and the password stays good."""
        self.register()
        before = self.stored()
        self.app.config["BCRYPT_LOG_ROUNDS"] = 5

        self.assertEqual(404, self.login(password="wrong").status_code)
        self.assertEqual(before, self.stored())

        self.assertEqual(200, self.login().status_code)
        self.assertEqual(["$2b$04$", "$2b$05$"], [before[:7], self.stored()[:7]])
        self.assertEqual(200, self.login().status_code)

    def test_hash_is_kept_when_the_cost_falls(self) -> None:
        """A dearer hash than the setting asks for is left alone."""
        self.app.config["BCRYPT_LOG_ROUNDS"] = 5
        self.register()
        before = self.stored()
        self.app.config["BCRYPT_LOG_ROUNDS"] = 4

        self.assertEqual(200, self.login().status_code)
        self.assertEqual(before, self.stored())

    @contextlib.contextmanager
    def work(self) -> Iterator[list[int]]:
        """Give a list to which each turn on a hashing thread adds its rounds of bcrypt."""
        gate: passwords.Gate = self.app.extensions["password_gate"]
        run = gate.run
        turns: list[int] = []

        def turn(*args: Any) -> Any:
            turns.append(0)
            return run(*args)

        def hashpw(password: bytes, salt: bytes) -> bytes:
            turns[-1] += 2 ** int(salt.split(b"$")[2])
            return original(password, salt)

        original = raw_bcrypt.hashpw
        with mock.patch.object(gate, "run", turn), mock.patch("bcrypt.hashpw", hashpw):
            yield turns

    def test_who_exists_is_not_told_by_work(self) -> None:
        """Whatever a login is refused for, one turn did the work of one hash of the set cost."""
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
        """A right password is found so after the same work, be its hash an old one."""
        self.register()
        self.app.config["BCRYPT_LOG_ROUNDS"] = 6
        with self.work() as turns:
            self.assertEqual(200, self.login().status_code)
            self.assertEqual(200, self.login().status_code)

        self.assertEqual([2**6] * 3, turns)  # checked, renewed; checked again

    def test_dearer_hash_takes_its_time(self) -> None:
        """A hash of a higher cost than the configured one is checked as it is, and no more."""
        self.app.config["BCRYPT_LOG_ROUNDS"] = 6
        self.register()
        self.app.config["BCRYPT_LOG_ROUNDS"] = 4
        with self.work() as turns:
            self.assertEqual(404, self.login(password="wrong").status_code)

        self.assertEqual([2**6], turns)

    def test_dummy_hash_lets_nobody_in(self) -> None:
        """Even a password that the dummy hash would match is refused."""
        with mock.patch.object(bcrypt, "check_password_hash", return_value=True):
            self.assertEqual(404, self.login().status_code)

    def test_endless_passwords_are_not_normalized(self) -> None:
        """What is far too long is refused without the work that takes the square of its length."""
        endless = "a" + "\u0301" * 15_000 + "\u0327" * 15_000
        new = {"username": "new", "email": "new@test.com", "password": "test"}
        with mock.patch("unicodedata.normalize", wraps=unicodedata.normalize) as normalize:
            self.assertEqual(404, self.login(password=endless).status_code)
            for field in ("username", "password"):
                response = self.client.post("/auth/register", json=new | {field: endless})
                self.assertEqual([field], list(response.get_json()["errors"]))

        longest = max((len(call.args[1]) for call in normalize.call_args_list), default=0)
        self.assertLessEqual(longest, passwords.LONGEST_DECOMPOSED * passwords.MAX_BYTES)


class TestGate(BaseTestCase):
    """Few at once, and everybody else is told so at once."""

    def setUp(self) -> None:
        """Make an application whose server has few threads."""
        with mock.patch.dict(os.environ, {"GRANIAN_BLOCKING_THREADS": str(THREADS)}):
            super().setUp()
        self.register()
        self.statements: list[str] = []
        for engine in db.engines.values():
            event.listen(engine, "before_cursor_execute", self._note)

    def _note(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        self.statements.append(statement)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Fill the gate with logins whose hashing lasts as long as the block."""
        release = threading.Event()
        self.hashing = threading.Event()
        self.at_once = 0
        original = bcrypt.check_password_hash

        def check(hashed: str, candidate: str) -> bool:
            self.at_once += 1
            self.hashing.set()
            release.wait(10)
            self.at_once -= 1
            return bool(original(hashed, candidate))

        with (
            mock.patch.object(bcrypt, "check_password_hash", check),
            ThreadPoolExecutor() as executor,
        ):
            places = THREADS // 2
            reads = threading.Semaphore(0)
            event.listen(db.engines[READ], "checkin", lambda *_: reads.release())
            self.logins = [
                executor.submit(self.app.test_client().post, "/auth/login", json=self.credentials)
                for _ in range(places)
            ]
            try:
                for _ in range(places):
                    self.assertTrue(reads.acquire(timeout=10))
                self.assertTrue(self.hashing.wait(10))
                yield
            finally:
                release.set()

    credentials = {"email": "test@test.com", "password": "test"}  # noqa: RUF012  # never changed

    def test_whoever_finds_the_line_full_is_told_at_once(self) -> None:
        """Login, registration and adding a user answer 503 with Retry-After, before any SQL."""
        new = {"username": "new", "email": "new@test.com", "password": "test"}
        with self.full():
            self.statements.clear()
            refused = [
                self.client.post("/auth/login", json=self.credentials),
                self.client.post("/auth/register", json=new),
                self.client.post("/users", json=new),
            ]
            statements = self.statements.copy()

        for response in refused:
            self.assert_error(
                response, 503, "The service is busy. Please try again.", "busy", "error"
            )
            self.assertEqual("1", response.headers["Retry-After"])
        self.assertEqual([], statements)
        for login in self.logins:
            self.assertEqual(200, login.result().status_code)
        self.assertEqual(200, self.login().status_code)

    def test_line_comes_before_the_guard(self) -> None:
        """Where /users is not open, a full line is told before it is asked who is calling."""
        self.app.config["USERS_API_OPEN"] = False
        with self.full():
            self.statements.clear()
            response = self.client.post("/users", headers=bearer("any"))
            statements = self.statements.copy()

        self.assertEqual(503, response.status_code)
        self.assertEqual([], statements)

    def test_everything_else_is_answered_meanwhile(self) -> None:
        """A full line keeps nobody from /ping and /auth/status."""
        token = self.login().get_json()["auth_token"]
        with self.full():
            self.assertEqual(200, self.get("/ping").status_code)
            self.assertEqual(200, self.get("/auth/status", token).status_code)

    def test_no_connection_is_held_while_hashing(self) -> None:
        """Whoever hashes or waits for it has given the database back its connection."""
        with self.full():
            held = [engine.pool.checkedout() for engine in db.engines.values()]  # type: ignore[attr-defined]  # a QueuePool

        self.assertEqual({0}, set(held))

    def test_places_are_given_back_after_refusals(self) -> None:
        """Wrong passwords and taken names leave the line as empty as they found it."""
        for _ in range(THREADS):
            self.assertEqual(404, self.login(password="wrong").status_code)
            self.assertEqual(404, self.login(email="nobody@test.com").status_code)
            taken = {"username": "test", "email": "test@test.com", "password": "test"}
            self.assertEqual(400, self.client.post("/auth/register", json=taken).status_code)

        self.assertEqual(200, self.login().status_code)

    def test_only_so_many_hash_at_once(self) -> None:
        """No more hashes run at a time than the process has cores to itself."""
        with self.full():
            at_once = self.at_once

        cores = len(os.sched_getaffinity(0)) // self.app.config["GRANIAN_WORKERS"]
        self.assertEqual(min(max(1, cores), THREADS // 2), at_once)

    def test_hashing_threads_stand_back(self) -> None:
        """A hashing thread has a lower priority than the rest of the process."""

        def niceness() -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        gate: passwords.Gate = self.app.extensions["password_gate"]

        self.assertEqual(min(19, niceness() + passwords.NICENESS), gate.run(niceness))
