"""The migrations: the schema they make is the one the models mean."""

import concurrent.futures
import os
import unittest
from typing import Any
from unittest import mock

import flask_migrate
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import OperationalError

from project import create_app, db
from project.tests import scratch
from project.tests.conformance import TESTING


class TestMigrations(unittest.TestCase):
    """Up and down on an empty database."""

    def setUp(self) -> None:
        """Make the database and an application on it."""
        scratched = scratch.database()
        self.url = scratched.__enter__()
        self.addCleanup(scratched.__exit__, None, None, None)
        with mock.patch.dict(os.environ, scratch.settings(DATABASE_TEST_URL=self.url), clear=True):
            app = create_app(TESTING)
        context = app.app_context()
        context.push()
        self.addCleanup(context.pop)
        for engine in db.engines.values():
            self.addCleanup(engine.dispose)

    def test_schema_is_that_of_the_models(self) -> None:
        """After every migration the database and the models do not differ."""
        flask_migrate.upgrade()

        with db.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            self.assertEqual([], compare_metadata(context, db.metadata))

    def test_down_and_up_again(self) -> None:
        """All the way down leaves no table, and up again leaves the same schema."""
        flask_migrate.upgrade()
        tables = set(inspect(db.engine).get_table_names())

        flask_migrate.downgrade(revision="base")
        self.assertEqual({"alembic_version"}, set(inspect(db.engine).get_table_names()))

        flask_migrate.upgrade()
        self.assertEqual(tables, set(inspect(db.engine).get_table_names()))
        self.assertEqual({"alembic_version", *db.metadata.tables}, tables)

    def test_locks_are_not_awaited_for_long(self) -> None:
        """A migration that does not get a table gives up, and leaves everything as it was."""
        if db.engine.dialect.name != "postgresql":
            self.skipTest("SQLite has one lock, which is awaited as ever")
        flask_migrate.upgrade(revision="0001")

        with db.engine.begin() as busy:
            busy.execute(text("LOCK TABLE users IN ROW EXCLUSIVE MODE"))
            with self.assertRaisesRegex(OperationalError, "lock timeout"):
                flask_migrate.upgrade()

        self.assertEqual({"alembic_version", "users"}, set(inspect(db.engine).get_table_names()))
        flask_migrate.upgrade()
        self.assertIn("sessions", inspect(db.engine).get_table_names())

    def test_rows_survive(self) -> None:
        """Users are what they were after every step up and down; sessions go with their table."""
        user = (
            "INSERT INTO users (username, username_key, email, password, active, admin, created_at)"
            " VALUES ('Ada', 'ada', 'ada@test.com', 'x', (1 = 1), (1 = 0), '2026-11-22 09:00:00')"
        )
        session = (
            "INSERT INTO sessions SELECT '0123456789abcdefABCDEF', id, 3, created_at, created_at,"
            " '192.0.2.1', 'curl', created_at FROM users"
        )
        flask_migrate.upgrade(revision="0001")
        self.execute(user)
        before = self.execute("SELECT * FROM users")

        flask_migrate.upgrade()
        self.assertEqual(before, self.execute("SELECT * FROM users"))
        self.execute(session)
        flask_migrate.downgrade(revision="0001")
        self.assertEqual(before, self.execute("SELECT * FROM users"))
        flask_migrate.upgrade()
        self.assertEqual(before, self.execute("SELECT * FROM users"))
        self.assertEqual([], self.execute("SELECT * FROM sessions"))

        self.execute(session)
        self.execute("DELETE FROM users")
        self.assertEqual([], self.execute("SELECT * FROM sessions"))

        self.execute(user)
        self.assertNotEqual(before[0][0], self.execute("SELECT id FROM users")[0][0])

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Execute a statement in a transaction of its own; return its rows, if it has any."""
        with db.engine.begin() as connection:
            result = connection.exec_driver_sql(statement)
            return [tuple(row) for row in result] if result.returns_rows else []

    def test_offline(self) -> None:
        """The statements can be printed for somebody else to run."""
        result = scratch.manage(
            "db", "upgrade", "--sql", APP_SETTINGS=TESTING, DATABASE_TEST_URL=self.url
        )

        self.assertEqual(0, result.returncode, result.stderr)
        self.assertIn("CREATE TABLE users", result.stdout)
        self.assertEqual([], inspect(db.engine).get_table_names())

    def test_processes_that_migrate_together_take_turns(self) -> None:
        """Of several that start at once one does the work, and none fails."""
        with concurrent.futures.ThreadPoolExecutor() as executor:
            runs = [
                executor.submit(
                    scratch.manage,
                    "db",
                    "upgrade",
                    APP_SETTINGS=TESTING,
                    DATABASE_TEST_URL=self.url,
                )
                for _ in range(3)
            ]
        results = [run.result() for run in runs]

        self.assertEqual([0, 0, 0], [result.returncode for result in results], results)
        self.assertEqual(1, sum("Running upgrade" in result.stderr for result in results))
