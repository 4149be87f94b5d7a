"""Health: what balancers and orchestrators are told, in time, whatever the database does."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from unittest import mock

from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError
from werkzeug.test import TestResponse

from project import create_app, database, db, readiness
from project.tests import scratch
from project.tests.test_contract_answers import everything_written
from project.tests.test_database import FarAwayTestCase, ScratchTestCase
from project.tests.utils import logged

NOT_MIGRATED = (503, "The database has not been migrated yet.", "database_not_migrated")


class HealthTestCase(ScratchTestCase):
    """A test in which every probe examines the database anew, unless told."""

    fresh = -1.0

    def setUp(self) -> None:
        """Let nothing be fresh."""
        super().setUp()
        for name in ("FRESH", "LATE"):
            self.enterContext(mock.patch.object(readiness, name, self.fresh))

    def ready(self) -> TestResponse:
        """Return the answer to whether requests may be sent here."""
        return self.get("/health/ready")

    def assert_ready(self) -> None:
        """Check that requests may be sent here."""
        response = self.ready()
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))

    def execute(self, statement: str, **parameters: str) -> None:
        """Change the database behind the service's back."""
        with db.engine.begin() as connection:
            connection.execute(text(statement), parameters)

    def set_revision(self, revision: str) -> None:
        """Say that the database is at this revision."""
        self.execute("UPDATE alembic_version SET version_num = :revision", revision=revision)


class TestAnswers(HealthTestCase):
    """What is said."""

    def test_alive(self) -> None:
        """A process that answers is alive."""
        response = self.get("/health/live")

        self.assertEqual(200, response.status_code)
        self.assertEqual({"status": "success", "message": "alive"}, response.get_json())
        self.assertEqual("no-store", response.headers["Cache-Control"])

    def test_ready(self) -> None:
        """With its database migrated, a process is ready."""
        response = self.ready()

        self.assertEqual(200, response.status_code)
        self.assertEqual({"status": "success", "message": "ready"}, response.get_json())
        self.assertEqual("no-store", response.headers["Cache-Control"])

    def test_methods(self) -> None:
        """Health is asked after with GET and HEAD, by anybody, and with nothing else."""
        for path in ("/health/live", "/health/ready"):
            with self.subTest(path):
                self.assertEqual(200, self.client.head(path).status_code)
                self.assertEqual(200, self.get(path, "no token").status_code)
                self.assertEqual(405, self.client.post(path).status_code)

    def test_alive_without_a_database(self) -> None:
        """A process whose database is nowhere is alive and not ready: a new one is no better."""
        environment = scratch.settings(
            SECRET_KEY="0123456789abcdef" * 2, DATABASE_URL="sqlite:////nowhere/users.db"
        )
        with mock.patch.dict(os.environ, environment, clear=True):
            client = create_app("project.config.ProductionConfig").test_client()

        self.assertEqual(200, client.get("/health/live").status_code)
        self.assert_unavailable(client.get("/health/ready"))

    def test_fault(self) -> None:
        """What nobody foresaw is a 500, and the next probe is examined anew."""
        with mock.patch("project.database.schema", side_effect=ValueError("secret-text")):
            response = self.ready()

        self.assertEqual(500, response.status_code)
        self.assertNotIn("secret-text", response.get_data(as_text=True))
        self.assert_ready()

    def test_many_at_the_start(self) -> None:
        """While nothing is known yet, all wait for one examination, and none for longer."""
        begun = []

        def schema(_engine: Engine) -> database.Schema:
            begun.append(time.monotonic())
            time.sleep(0.4)
            return database.Schema.CURRENT

        with mock.patch("project.database.schema", schema), ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(lambda _: self.ready().status_code, range(12)))

        self.assertEqual([200] * 12, answers)
        self.assertEqual(1, len(begun))


class TestSchema(HealthTestCase):
    """Migrated is: at least at the newest revision that this code knows."""

    @property
    def newest(self) -> str:
        """That revision."""
        (head,), _ = database.revisions()
        return head

    def assert_not_migrated(self) -> None:
        """Check that the schema is said not to do, and nothing about it."""
        response = self.ready()
        data = self.assert_error(response, *NOT_MIGRATED)
        self.assertEqual({"status", "message", "code", "request_id"}, set(data))
        self.assertGreater(int(response.headers["Retry-After"]), 0)

    def test_empty(self) -> None:
        """A database in which nobody has migrated anything is not ready, and then it is."""
        for statement in ("DELETE FROM alembic_version", "DROP TABLE alembic_version"):
            with self.subTest(statement):
                self.execute(statement)
                self.assert_not_migrated()

    def test_older(self) -> None:
        """A schema that a later migration of ours is missing from is not ready until it has run."""
        self.assert_ready()
        for revision in ("0001", "0002"):
            self.set_revision(revision)
            with self.subTest(revision):
                self.assert_not_migrated()

        self.set_revision(self.newest)
        self.assert_ready()

    def test_newer(self) -> None:
        """A schema that newer code has migrated, tables and all, goes on serving this code."""
        self.set_revision("9999")
        self.execute("CREATE TABLE things (id integer)")

        self.assert_ready()

    def test_newer_in_part(self) -> None:
        """An unknown revision beside one of ours that is not the newest makes nothing ready."""
        self.set_revision("0002")
        self.execute("INSERT INTO alembic_version VALUES ('9999')")
        self.assert_not_migrated()

        update = "UPDATE alembic_version SET version_num = :newest WHERE version_num = '0002'"
        self.execute(update, newest=self.newest)
        self.assert_ready()

    def test_foreign(self) -> None:
        """The database of another program that has migrations is not ours."""
        self.set_revision("9999")
        self.execute("ALTER TABLE throttles RENAME TO somebody_elses")

        self.assert_not_migrated()

    def test_migrations_are_read_once(self) -> None:
        """Which revisions there are is not looked up at a probe."""
        with mock.patch("project.database.ScriptDirectory", side_effect=AssertionError):
            self.assert_ready()

    def test_log(self) -> None:
        """What is in the way is logged when it comes and when it goes, not at every probe."""
        self.set_revision("0001")
        away = OperationalError("SELECT secret", {}, OSError())
        with everything_written() as written:
            for _ in range(2):
                self.assert_not_migrated()
            with mock.patch("project.database.schema", side_effect=away):
                for _ in range(2):
                    self.assert_unavailable(self.ready())
            self.set_revision(self.newest)
            for _ in range(2):
                self.assert_ready()

        lines = logged(written.getvalue())
        unavailable = {"error": "OperationalError", "sqlstate": None}
        self.assertEqual(
            [
                {"event": "not_ready", "code": "database_not_migrated", "schema": "behind"},
                {"event": "not_ready", "code": "database_unavailable"} | unavailable,
                {"event": "ready_again"},
            ],
            lines,
        )


class TestFarAwayDatabase(FarAwayTestCase, HealthTestCase):
    """PostgreSQL behind a proxy: away, hanging, busy."""

    def seconds(self, call: Callable[[], object]) -> float:
        """Return how long a call takes."""
        started = time.monotonic()
        call()
        return time.monotonic() - started

    def assert_not_ready_in_time(self) -> None:
        """Check that a probe is told that the database is unavailable, as soon as promised."""
        seconds = self.seconds(lambda: self.assert_unavailable(self.ready()))
        self.assertLess(seconds, readiness.TIMEOUT + 0.3)

    def test_away_and_back(self) -> None:
        """Away is a 503, back is a 200 at the first probe, and alive is alive."""
        self.assert_ready()
        self.proxy.cut()
        self.assert_not_ready_in_time()
        self.assert_not_ready_in_time()
        self.assertEqual(200, self.get("/health/live").status_code)

        self.proxy.restore()
        self.assert_ready()

    def test_restart_between_two_probes(self) -> None:
        """A connection that died meanwhile is no sign of a database that is away."""
        self.assert_ready()
        self.proxy.cut()
        self.proxy.restore()

        self.assert_ready()

    def test_hanging(self) -> None:
        """A server that accepts and says nothing is a 503 in time, known before or not."""
        with mock.patch.object(readiness, "TIMEOUT", 0.3):
            for name in ("new", "old"):
                with self.subTest(name):
                    self.proxy.freeze()
                    self.assert_not_ready_in_time()
                    self.assert_not_ready_in_time()
                    self.assertEqual(200, self.get("/health/live").status_code)
                    self.proxy.thaw()
                    self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Check that what hung no longer does: at the latest, that the examination ends."""
        deadline = time.monotonic() + 5
        while self.ready().status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assert_ready()

    def test_hanging_holds_one_thread(self) -> None:
        """Of many probes at once, one waits; the others are told what is known."""
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
        """Who asks with a timeout of one second, as Kubernetes does, hears the reason."""
        self.assertLess(readiness.TIMEOUT, 0.9)

    def test_locked(self) -> None:
        """A database that answers others but not this question is not ready."""
        with db.engine.begin() as connection:
            connection.execute(text("LOCK TABLE alembic_version"))
            with mock.patch.object(readiness, "TIMEOUT", 0.3):
                self.assert_not_ready_in_time()
        self.wait_until_ready()

    def test_exhausted_pools(self) -> None:
        """While requests hold every connection there is, the process is ready all the same."""
        with ExitStack() as held:
            for name in (None, database.READ):
                engine = db.engines[name]
                for _ in range(engine.pool.size()):  # type: ignore[attr-defined]  # a QueuePool
                    held.enter_context(engine.connect())

            self.assertLess(self.seconds(self.assert_ready), 1)

    def test_slow_statements(self) -> None:
        """While requests wait for statements that take their time, the process is ready."""
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

    def test_requests_lose_nothing(self) -> None:
        """A probe that hangs holds no connection that a request could use."""
        self.assert_ready()
        self.proxy.freeze()
        with mock.patch.object(readiness, "TIMEOUT", 0.2):
            self.assert_unavailable(self.ready())
        pools: list[Any] = [db.engines[name].pool for name in (None, database.READ)]

        self.assertEqual([0, 0], [pool.checkedout() for pool in pools])
        self.proxy.thaw()

    def test_cost(self) -> None:
        """However many ask, the database is asked by one connection, and so often at most."""
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
