"""The database: what a request costs it, and what its faults look like from outside."""

import os
import threading
import time
import unittest
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

from sqlalchemy import event, func, make_url, select, text
from werkzeug.test import TestResponse

from project import database, db, postgresql
from project.api.models import User
from project.tests import scratch
from project.tests.base import BaseTestCase
from project.tests.pgproxy import PostgresProxy

UNAVAILABLE = "The service is not available right now. Please try again."
ON_POSTGRESQL = os.environ.get("DATABASE_TEST_URL", "").startswith("postgres")


class ScratchTestCase(BaseTestCase):
    """A test whose database nobody else uses."""

    def setUp(self) -> None:
        """Make the database, and the application on it."""
        scratched = scratch.database()
        self.url = scratched.__enter__()
        self.addCleanup(scratched.__exit__, None, None, None)
        with mock.patch.dict(os.environ, {"DATABASE_TEST_URL": self.reach(self.url)}):
            super().setUp()

    def reach(self, url: str) -> str:
        """Return the URL under which the application reaches the database."""
        return url

    def assert_unavailable(self, response: TestResponse) -> None:
        """Check that an answer says so, and when to come back."""
        self.assert_error(response, 503, UNAVAILABLE, "database_unavailable")
        self.assertGreater(int(response.headers["Retry-After"]), 0)

    def add(self, name: str) -> TestResponse:
        """Return the answer to a registration."""
        user = {"username": name, "email": f"{name}@test.com", "password": "test"}
        return self.client.post("/auth/register", json=user)


@unittest.skipUnless(ON_POSTGRESQL, "needs a PostgreSQL server")
class FarAwayTestCase(ScratchTestCase):
    """A test of PostgreSQL behind a proxy that counts, hangs and breaks."""

    def reach(self, url: str) -> str:
        """Go through the proxy."""
        address = make_url(url)
        self.proxy = PostgresProxy(address.host or "127.0.0.1", address.port or 5432)
        self.proxy.__enter__()
        self.addCleanup(self.proxy.__exit__, None, None, None)
        proxied = address.set(host="127.0.0.1", port=self.proxy.port)
        return proxied.render_as_string(hide_password=False)

    def statements(self, call: Callable[[], object]) -> list[str]:
        """Return the statements that a call sends, once everything is warm."""
        call()
        self.proxy.clear()
        call()
        return self.proxy.statements


class TestFarAway(FarAwayTestCase):
    """What requests cost, and what becomes of them while the database is not itself."""

    def test_reading_requests_cost_one_statement(self) -> None:
        """Status, a user and a page of users are one prepared SELECT, in no transaction."""
        token = self.register()
        for path in ("/auth/status", "/users", "/users/1"):
            with self.subTest(path):
                statements = self.statements(partial(self.get, path, token))

                self.assertEqual(["EXECUTE"], [statement.split()[0] for statement in statements])

    def test_what_a_login_costs(self) -> None:
        """A login reads once and writes twice, in a transaction of a connection that was tried."""
        self.register()

        words = [statement.split()[0] for statement in self.statements(self.login)]

        self.assertEqual(["EXECUTE", "SELECT", "BEGIN", "INSERT", "INSERT", "COMMIT"], words)

    def test_prepared_statements_that_are_gone(self) -> None:
        """Other connections of a pooler, or an altered table, cost nobody an answer."""
        token = self.register()
        for name, statement in {
            "gone": "DEALLOCATE ALL",
            "altered": "ALTER TABLE users ALTER COLUMN username TYPE varchar(600)",
            "altered back": "ALTER TABLE users ALTER COLUMN username TYPE varchar(512)",
        }.items():
            with self.subTest(name):
                for engine in db.engines.values():
                    engine.dispose()
                expected = self.get("/auth/status", token).get_json()
                with db.engines[database.READ].connect() as connection:
                    connection.exec_driver_sql(statement)

                response = self.get("/auth/status", token)

                self.assertEqual(200, response.status_code)
                self.assertEqual(expected, response.get_json())
                plain = self.statements(partial(self.get, "/auth/status", token))
                self.assertEqual(["SELECT"], [statement.split()[0] for statement in plain])

    def test_statement_that_is_prepared_already(self) -> None:
        """A connection on which somebody else has prepared the same statement serves too."""
        token = self.register()
        self.get("/auth/status", token)
        with db.engines[database.READ].connect() as connection:
            prepared: Any = connection.connection.dbapi_connection
            prepared.prepared.clear()

        self.assertEqual(200, self.get("/auth/status", token).status_code)

    def test_ping_costs_none(self) -> None:
        """Whether the process answers is not the database's business."""
        self.assertEqual([], self.statements(lambda: self.get("/ping")))

    def test_database_away_and_back(self) -> None:
        """Away is a 503 at once; back is a 200 at the first try, with no restart."""
        token = self.register()
        self.assertEqual(200, self.get("/auth/status", token).status_code)

        self.proxy.cut()
        self.assert_unavailable(self.get("/auth/status", token))
        self.assert_unavailable(self.login())
        self.assert_unavailable(self.add("meanwhile"))
        self.assert_unavailable(self.get("/users"))
        self.assertEqual(200, self.get("/ping").status_code)

        self.proxy.restore()
        self.assertEqual(200, self.get("/auth/status", token).status_code)
        self.assertEqual(201, self.add("meanwhile").status_code)

    def test_restart_between_two_requests_goes_unnoticed(self) -> None:
        """Connections that died in the pool cost nobody an answer."""
        token = self.register()
        self.proxy.cut()
        self.proxy.restore()

        self.assertEqual(200, self.get("/auth/status", token).status_code)
        self.proxy.cut()
        self.proxy.restore()
        self.assertEqual(201, self.add("after").status_code)

    def test_database_that_hangs(self) -> None:
        """A server that accepts and says nothing is a 503 in time, for old and new connections."""
        token = self.register()
        self.get("/auth/status", token)
        self.proxy.freeze()
        with (
            mock.patch.object(postgresql.PatientConnection, "answer_timeout", 0.1),
            mock.patch.object(postgresql, "SUSPICION", 0.05),
        ):
            for name in ("old", "new"):
                with self.subTest(name):
                    started = time.monotonic()
                    self.assert_unavailable(self.get("/auth/status", token))
                    self.assert_unavailable(self.add(name))
                    self.assertLess(time.monotonic() - started, 2)
            self.assertEqual(200, self.get("/ping").status_code)

        self.proxy.thaw()
        self.assertEqual(200, self.get("/auth/status", token).status_code)
        self.assertEqual(201, self.add("later").status_code)

    def test_hanging_database_holds_half_of_the_threads(self) -> None:
        """While some wait for a database that hangs, the others are told early."""
        token = self.register()
        places = self.app.config["GRANIAN_BLOCKING_THREADS"] // 2
        durations = []

        def ask() -> None:
            started = time.monotonic()
            self.assert_unavailable(self.get("/auth/status", token))
            durations.append(time.monotonic() - started)

        threads = [threading.Thread(target=ask) for _ in range(2 * places)]
        with (
            mock.patch.object(postgresql.PatientConnection, "answer_timeout", 1.5),
            mock.patch.object(postgresql, "SUSPICION", 0.1),
        ):
            self.proxy.freeze()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.proxy.thaw()

        self.assertEqual(places, sum(duration < 1 for duration in durations), durations)
        self.assertEqual(places, sum(1.4 < duration < 3 for duration in durations), durations)

    def test_waits_add_up_to_less_than_five_seconds(self) -> None:
        """The longest way to a 503 is an old connection that hangs, then a new one that does."""
        self.assertLess(2 * postgresql.ANSWER_TIMEOUT, 5)
        self.assertLessEqual(database.POOL_TIMEOUT, 5)
        self.assertEqual(postgresql.ANSWER_TIMEOUT, postgresql.PatientConnection.answer_timeout)
        for name in (None, database.READ):
            pool: Any = db.engines[name].pool
            self.assertEqual(self.app.config["GRANIAN_BLOCKING_THREADS"], pool.size())
            self.assertEqual(database.POOL_TIMEOUT, pool.timeout())
            self.assertEqual(0, pool._max_overflow)


class TestFaults(ScratchTestCase):
    """Databases that take no writes."""

    def test_full_database(self) -> None:
        """No room left is a 503 for whoever writes, reading goes on, and room ends it."""
        token = self.register()
        late = self.fill()

        self.assert_unavailable(self.add(late))
        self.assertEqual(200, self.get("/auth/status", token).status_code)

        self.make_room()
        self.assertEqual(201, self.add(late).status_code)

    def fill(self) -> str:
        """Leave no room: PostgreSQL's own error, SQLite's own limit; return who comes too late."""
        if ON_POSTGRESQL:
            scratch.execute(
                self.url,
                """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = '53100'; END $$;
                CREATE TRIGGER full_disk BEFORE INSERT ON users
                FOR EACH ROW EXECUTE FUNCTION refuse()""",
            )
            return "late"
        self.pragma("max_page_count = 1")
        number = 0
        while self.add(f"{number:0100}").status_code == 201:
            number += 1
        return f"{number:0100}"

    def make_room(self) -> None:
        """End what `fill` did."""
        if ON_POSTGRESQL:
            scratch.execute(self.url, "DROP TRIGGER full_disk ON users")
        else:
            self.pragma("max_page_count = 100000")

    def test_read_only_database(self) -> None:
        """A database that takes no writes is a 503 for whoever writes, until it does again."""
        token = self.register()
        self.make_read_only(True)

        self.assert_unavailable(self.add("late"))
        self.assertEqual(200, self.get("/auth/status", token).status_code)

        self.make_read_only(False)
        self.assertEqual(201, self.add("late").status_code)

    def make_read_only(self, read_only: bool) -> None:
        """Let new sessions be read-only, or no longer; existing ones stay what they are."""
        if ON_POSTGRESQL:
            name = make_url(self.url).database
            setting = "on" if read_only else "off"
            scratch.execute(
                os.environ["DATABASE_TEST_URL"],
                f"ALTER DATABASE {name} SET default_transaction_read_only = {setting}",
            )
            if read_only:
                db.engine.dispose()
            return
        self.pragma(f"query_only = {int(read_only)}")

    def pragma(self, setting: str) -> None:
        """Change a setting of the connection that SQLite is written through."""
        connection = db.engine.raw_connection()
        connection.cursor().execute(f"PRAGMA {setting}")
        connection.close()

    def test_mistake_of_ours_is_no_fault_of_the_database(self) -> None:
        """A statement that is wrong is a 500: coming back later would not help."""
        with mock.patch("project.accounts._BY_ID", {False: text("SELECT nothing FROM users")}):
            response = self.get("/users/1")

        expected = 500 if ON_POSTGRESQL else 503  # SQLite does not tell the two apart
        self.assertEqual(expected, response.status_code)
        self.assertNotIn("SELECT", response.get_data(as_text=True))


class TestConcurrency(ScratchTestCase):
    """Many at once."""

    def setUp(self) -> None:
        """Let the server have room for all of them at the gate."""
        with mock.patch.dict(os.environ, {"GRANIAN_BLOCKING_THREADS": "20"}):
            super().setUp()

    def test_equal_registrations_at_once_make_one_user(self) -> None:
        """Of ten equal registrations one is answered 201 and nine are told."""
        barrier = threading.Barrier(10)
        statuses = []

        def register() -> None:
            client = self.app.test_client()
            user = {"username": "same", "email": "same@test.com", "password": "test"}
            barrier.wait(10)
            response = client.post("/auth/register", json=user)
            statuses.append((response.status_code, response.get_json()["message"]))

        threads = [threading.Thread(target=register) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        taken = (400, "Sorry. That user already exists.")
        self.assertEqual([(201, "Successfully registered."), *[taken] * 9], sorted(statuses))
        self.assertEqual(1, db.session.scalar(select(func.count()).select_from(User)))

    def test_every_write_is_in_a_transaction(self) -> None:
        """A registration begins a transaction and commits it, and so does one that is refused."""
        seen: list[str] = []
        event.listen(db.engine, "begin", lambda _connection: seen.append("begin"))
        event.listen(db.engine, "commit", lambda _connection: seen.append("commit"))

        self.assertEqual(201, self.add("one").status_code)
        self.assertEqual(400, self.add("one").status_code)

        refused = ["begin", "begin", "commit"]
        self.assertEqual(["begin", "commit", *refused], seen)
