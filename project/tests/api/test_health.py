"""Health: load balancers and orchestrators get a response in time, whatever the database does."""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError
from werkzeug.test import TestResponse

from project import create_app, db, errors
from project.config import VERSION
from project.lib import database, readiness
from project.tests import scratch
from project.tests.lib.cases import ProxiedDatabaseTestCase, ScratchTestCase
from project.tests.lib.log_capture import captured_output, entries


class HealthTestCase(ScratchTestCase):
    """A test in which every probe checks the database anew, unless told otherwise."""

    fresh = -1.0

    def setUp(self) -> None:
        """Let no result of a check be reused."""
        super().setUp()
        for name in ("FRESH", "LATE"):
            self.enterContext(mock.patch.object(readiness, name, self.fresh))

    def ready(self) -> TestResponse:
        """Return the response to a readiness probe."""
        return self.get("/health/ready")

    def assert_ready(self) -> None:
        """Check that the process is ready."""
        response = self.ready()
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))

    def drain(self) -> Path:
        """Announce a stop, and return the file that does."""
        file = Path(self.enterContext(tempfile.TemporaryDirectory()), "drain")
        self.app.config["DRAIN_FILE"] = file
        file.touch()
        return file

    def execute(self, statement: str, **parameters: str) -> None:
        """Execute a statement on the database, unknown to the service."""
        with db.engine.begin() as connection:
            connection.execute(text(statement), parameters)

    def set_revision(self, revision: str) -> None:
        """Set the revision that the database says it has."""
        self.execute("UPDATE alembic_version SET version_num = :revision", revision=revision)


class TestResponses(HealthTestCase):
    """The responses to probes."""

    def test_alive(self) -> None:
        """A process that responds is alive; only in development it says its version."""
        response = self.get("/health/live")

        self.assertEqual(200, response.status_code)
        alive = {"status": "success", "message": "alive"}
        self.assertEqual(alive | {"version": VERSION}, response.get_json())
        self.app.config["SHOW_VERSION"] = False
        self.assertEqual(alive, self.get("/health/live").get_json())
        self.assertEqual("no-store", response.headers["Cache-Control"])

    def test_ready(self) -> None:
        """A process with a migrated database is ready."""
        response = self.ready()

        self.assertEqual(200, response.status_code)
        self.assertEqual({"status": "success", "message": "ready"}, response.get_json())
        self.assertEqual("no-store", response.headers["Cache-Control"])

    def test_methods(self) -> None:
        """Probes are GET or HEAD, need no token, and ignore one."""
        for path in ("/health/live", "/health/ready"):
            with self.subTest(path):
                self.assertEqual(200, self.client.head(path).status_code)
                self.assertEqual(200, self.get(path, "no token").status_code)
                self.assertEqual(405, self.client.post(path).status_code)

    def test_alive_without_a_database(self) -> None:
        """A process without a database is alive but not ready: a restart would not help."""
        environment = scratch.settings(
            SECRET_KEY="0123456789abcdef" * 2, DATABASE_URL="sqlite:////nowhere/users.db"
        )
        with mock.patch.dict(os.environ, environment, clear=True):
            client = create_app("project.config.ProductionConfig").test_client()

        self.assertEqual(200, client.get("/health/live").status_code)
        self.assert_unavailable(client.get("/health/ready"))

    def test_draining(self) -> None:
        """While DRAIN_FILE exists a process is not ready, but alive, and it serves as before."""
        self.assert_ready()
        file = self.drain()
        data = self.assert_error(self.ready(), errors.Draining)
        self.assertEqual({"status", "message", "code", "request_id"}, set(data))
        self.assertGreater(int(self.ready().headers["Retry-After"]), 0)
        for path in ("/", "/ping", "/health/live", "/users"):
            with self.subTest(path):
                self.assertEqual(200, self.get(path).status_code)
        self.assertEqual(201, self.add("ada").status_code)

        file.unlink()
        self.assert_ready()

    def test_draining_before_the_database(self) -> None:
        """A process that drains does not examine its database."""
        self.drain()
        with mock.patch("project.lib.database.schema") as examined:
            self.assert_error(self.ready(), errors.Draining)

        examined.assert_not_called()

    def test_unexpected_error(self) -> None:
        """An unexpected error is a 500, and the next probe checks anew."""
        with mock.patch("project.lib.database.schema", side_effect=ValueError("secret-text")):
            response = self.ready()

        self.assertEqual(500, response.status_code)
        self.assertNotIn("secret-text", response.get_data(as_text=True))
        self.assert_ready()

    def test_many_at_the_start(self) -> None:
        """The first probes of a process all wait for the same check."""
        begun = []

        def schema(_engine: Engine) -> database.Schema:
            begun.append(time.monotonic())
            time.sleep(0.4)
            return database.Schema.CURRENT

        with mock.patch("project.lib.database.schema", schema), ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(lambda _: self.ready().status_code, range(12)))

        self.assertEqual([200] * 12, answers)
        self.assertEqual(1, len(begun))


class TestSchema(HealthTestCase):
    """A database is migrated when it has at least the newest revision that the code knows."""

    @property
    def newest(self) -> str:
        """The newest revision that the code knows."""
        (head,), _ = database.revisions()
        return head

    def assert_not_migrated(self) -> None:
        """Check that the response is DatabaseNotMigrated, with no details."""
        response = self.ready()
        data = self.assert_error(response, errors.DatabaseNotMigrated)
        self.assertEqual({"status", "message", "code", "request_id"}, set(data))
        self.assertGreater(int(response.headers["Retry-After"]), 0)

    def test_empty(self) -> None:
        """A database without migrations is not ready."""
        for statement in ("DELETE FROM alembic_version", "DROP TABLE alembic_version"):
            with self.subTest(statement):
                self.execute(statement)
                self.assert_not_migrated()

    def test_older(self) -> None:
        """A database that lacks a migration is not ready until it has run."""
        self.assert_ready()
        for revision in ("0001", "0002"):
            self.set_revision(revision)
            with self.subTest(revision):
                self.assert_not_migrated()

        self.set_revision(self.newest)
        self.assert_ready()

    def test_newer(self) -> None:
        """A database that newer code has migrated is ready for this code."""
        self.set_revision("9999")
        self.execute("CREATE TABLE things (id integer)")

        self.assert_ready()

    def test_newer_in_part(self) -> None:
        """An unknown revision beside an old one is not ready."""
        self.set_revision("0002")
        self.execute("INSERT INTO alembic_version VALUES ('9999')")
        self.assert_not_migrated()

        update = "UPDATE alembic_version SET version_num = :newest WHERE version_num = '0002'"
        self.execute(update, newest=self.newest)
        self.assert_ready()

    def test_foreign(self) -> None:
        """The migrated database of another program is not ready."""
        self.set_revision("9999")
        self.execute("ALTER TABLE throttles RENAME TO other_table")

        self.assert_not_migrated()

    def test_migrations_are_read_once(self) -> None:
        """A probe does not read the migration scripts."""
        with mock.patch("project.lib.database.ScriptDirectory", side_effect=AssertionError):
            self.assert_ready()

    def test_log(self) -> None:
        """A reason is logged when it begins and when it ends, not at every probe."""
        self.set_revision("0001")
        away = OperationalError("SELECT secret", {}, OSError())
        with captured_output() as written:
            for _ in range(2):
                self.assert_not_migrated()
            with mock.patch("project.lib.database.schema", side_effect=away):
                for _ in range(2):
                    self.assert_unavailable(self.ready())
            self.set_revision(self.newest)
            for _ in range(2):
                self.assert_ready()

        lines = entries(written.getvalue())
        unavailable = {"error": "OperationalError", "sqlstate": None}
        self.assertEqual(
            [
                {"event": "not_ready", "code": "database_not_migrated", "schema": "behind"},
                {"event": "not_ready", "code": "database_unavailable"} | unavailable,
                {"event": "ready_again"},
            ],
            lines,
        )


class TestProxiedDatabase(ProxiedDatabaseTestCase, HealthTestCase):
    """PostgreSQL behind a proxy that disconnects or hangs."""

    def seconds(self, call: Callable[[], object]) -> float:
        """Return how many seconds a call takes."""
        started = time.monotonic()
        call()
        return time.monotonic() - started

    def assert_not_ready_in_time(self) -> None:
        """Check that a probe gets DatabaseUnavailable within the timeout."""
        seconds = self.seconds(lambda: self.assert_unavailable(self.ready()))
        self.assertLess(seconds, readiness.TIMEOUT + 0.3)

    def test_away_and_back(self) -> None:
        """Without its database a process is alive and not ready; then it is ready at once."""
        self.assert_ready()
        self.proxy.cut()
        self.assert_not_ready_in_time()
        self.assert_not_ready_in_time()
        self.assertEqual(200, self.get("/health/live").status_code)

        self.proxy.restore()
        self.assert_ready()

    def test_standby(self) -> None:
        """A process whose database is a standby is not ready until that is promoted."""
        self.assert_ready()
        self.proxy.is_standby = True
        db.engines[database.PROBE].dispose()
        self.assert_unavailable(self.ready())
        self.assert_unavailable(self.ready())

        self.proxy.is_standby = False
        self.assert_ready()

    def test_restart_between_two_probes(self) -> None:
        """A connection that was closed between two probes does not count as unavailable."""
        self.assert_ready()
        self.proxy.cut()
        self.proxy.restore()

        self.assert_ready()

    def test_hanging(self) -> None:
        """A database that does not respond is a 503 in time, on new and old connections."""
        with mock.patch.object(readiness, "TIMEOUT", 0.3):
            for name in ("new", "old"):
                with self.subTest(name):
                    self.proxy.freeze()
                    self.assert_not_ready_in_time()
                    self.assert_not_ready_in_time()
                    self.assertEqual(200, self.get("/health/live").status_code)
                    self.proxy.thaw()
                    self.wait_until_ready()

    def test_draining(self) -> None:
        """A process that drains says so at once, also while its database hangs or is away."""
        self.assert_ready()
        self.drain()
        for fault in (self.proxy.freeze, self.proxy.cut):
            fault()
            with self.subTest(fault.__name__):
                seconds = self.seconds(lambda: self.assert_error(self.ready(), errors.Draining))
                self.assertLess(seconds, 0.3)
        self.proxy.thaw()

    def wait_until_ready(self) -> None:
        """Wait until the check that hung has ended, and check that the process is ready."""
        deadline = time.monotonic() + 5
        while self.ready().status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assert_ready()

    def test_hanging_holds_one_thread(self) -> None:
        """Of many simultaneous probes one waits; the others get the last result."""
        self.assert_ready()
        self.proxy.freeze()
        with (
            mock.patch.multiple(readiness, TIMEOUT=0.5, LATE=60),
            ThreadPoolExecutor(12) as threads,
        ):
            durations = list(threads.map(lambda _: self.seconds(self.ready), range(12)))
            self.assert_unavailable(self.ready())
        self.proxy.thaw()

        self.assertEqual(1, sum(duration >= 0.5 for duration in durations), durations)

    def test_in_time(self) -> None:
        """A probe with a timeout of one second, Kubernetes' default, still gets the response."""
        self.assertLess(readiness.TIMEOUT, 0.9)

    def test_locked(self) -> None:
        """A database that does not answer the probe's query is not ready."""
        with db.engine.begin() as connection:
            connection.execute(text("LOCK TABLE alembic_version"))
            with mock.patch.object(readiness, "TIMEOUT", 0.3):
                self.assert_not_ready_in_time()
        self.wait_until_ready()

    def test_exhausted_pools(self) -> None:
        """The process is ready while requests hold every pooled connection."""
        with ExitStack() as held:
            for name in (None, database.READ):
                engine = db.engines[name]
                for _ in range(engine.pool.size()):  # type: ignore[attr-defined]  # a QueuePool
                    held.enter_context(engine.connect())

            self.assertLess(self.seconds(self.assert_ready), 1)

    def test_slow_statements(self) -> None:
        """The process is ready while requests run slow statements."""
        begun = threading.Barrier(self.app.config["GRANIAN_BLOCKING_THREADS"] // 2 + 1)

        def be_slow(engine: Engine) -> None:
            with engine.connect() as connection:
                begun.wait(10)
                connection.execute(text("SELECT pg_sleep(1)"))

        with ThreadPoolExecutor(begun.parties) as threads:
            engine = db.engines[database.READ]
            slow = [threads.submit(be_slow, engine) for _ in range(begun.parties - 1)]
            begun.wait(10)
            while not all(statement.done() for statement in slow):
                self.assert_ready()
        for statement in slow:
            statement.result()

    def test_probes_use_no_pooled_connection(self) -> None:
        """A probe that hangs holds no connection of the requests."""
        self.assert_ready()
        self.proxy.freeze()
        with mock.patch.object(readiness, "TIMEOUT", 0.2):
            self.assert_unavailable(self.ready())
        pools: list[Any] = [db.engines[name].pool for name in (None, database.READ)]

        self.assertEqual([0, 0], [pool.checkedout() for pool in pools])
        self.proxy.thaw()

    def test_cost(self) -> None:
        """Many probes share one connection and one check."""
        self.assert_ready()
        self.proxy.clear()
        with mock.patch.object(readiness, "FRESH", 60):
            for _ in range(20):
                self.assert_ready()
        self.assertEqual([], self.proxy.statements)

        self.assert_ready()
        self.assertLessEqual(len(self.proxy.statements), 2)
        pool: Any = db.engines[database.PROBE].pool
        self.assertEqual((1, 0), (pool.size(), pool._max_overflow))
