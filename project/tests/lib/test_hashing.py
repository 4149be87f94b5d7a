"""The hashing pool: how many requests hash at once, and the response when no slot is free."""

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

from sqlalchemy import event

from project import bcrypt, db, errors
from project.lib import hashing
from project.lib.database import READ
from project.tests.base import BaseTestCase, bearer

THREADS = 3  # requests in work, which makes three hash slots


class TestGate(BaseTestCase):
    """A limited number of requests hashes or waits; every other one is refused at once."""

    def setUp(self) -> None:
        """Create an application whose server has few threads."""
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
        """Fill the pool with logins that hash until the block ends."""
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
            slots = THREADS
            reads = threading.Semaphore(0)
            event.listen(db.engines[READ], "checkin", lambda *_: reads.release())
            self.logins = [
                executor.submit(self.app.test_client().post, "/auth/login", json=self.credentials)
                for _ in range(slots)
            ]
            try:
                for _ in range(slots):
                    self.assertTrue(reads.acquire(timeout=10))
                self.assertTrue(self.hashing.wait(10))
                yield
            finally:
                release.set()

    credentials = {"email": "test@test.com", "password": "test"}  # noqa: RUF012  # never changed

    def test_full_gate_refuses_at_once(self) -> None:
        """A login, a registration and adding a user are a 503 with Retry-After, before any SQL."""
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
            self.assert_error(response, errors.Busy)
            self.assertEqual("1", response.headers["Retry-After"])
        self.assertEqual([], statements)
        for login in self.logins:
            self.assertEqual(200, login.result().status_code)
        self.assertEqual(200, self.login().status_code)

    def test_gate_comes_before_authorization(self) -> None:
        """Adding a user to a closed API is refused by a full pool before the token is checked."""
        self.app.config["USERS_API_OPEN"] = False
        with self.full():
            self.statements.clear()
            response = self.client.post("/users", headers=bearer("any"))
            statements = self.statements.copy()

        self.assertEqual(503, response.status_code)
        self.assertEqual([], statements)

    def test_other_routes_are_answered(self) -> None:
        """A full pool does not block /ping and /auth/status."""
        token = self.login().get_json()["auth_token"]
        with self.full():
            self.assertEqual(200, self.get("/ping").status_code)
            self.assertEqual(200, self.get("/auth/status", token).status_code)

    def test_no_connection_is_held_while_hashing(self) -> None:
        """Requests that hash or wait for it hold no database connection."""
        with self.full():
            held = [engine.pool.checkedout() for engine in db.engines.values()]  # type: ignore[attr-defined]  # a QueuePool

        self.assertEqual({0}, set(held))

    def test_refusals_release_their_slot(self) -> None:
        """Wrong passwords and taken names release their hash slot."""
        for _ in range(THREADS):
            self.assertEqual(404, self.login(password="wrong").status_code)
            self.assertEqual(404, self.login(email="nobody@test.com").status_code)
            taken = {"username": "test", "email": "test@test.com", "password": "test"}
            self.assertEqual(400, self.client.post("/auth/register", json=taken).status_code)

        self.assertEqual(200, self.login().status_code)

    def test_hashes_at_once(self) -> None:
        """No more hashes run at once than the process has cores."""
        with self.full():
            at_once = self.at_once

        cores = len(os.sched_getaffinity(0)) // self.app.config["GRANIAN_WORKERS"]
        self.assertEqual(min(max(1, cores), THREADS), at_once)

    def test_hashing_threads_have_low_priority(self) -> None:
        """A hashing thread has a lower priority than the rest of the process."""

        def niceness() -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        pool: hashing.HashingPool = self.app.extensions["hashing_pool"]

        self.assertEqual(min(19, niceness() + hashing.NICENESS), pool.run(niceness))
