"""The migrations: they create the schema of the models, and keep the rows."""

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

# Tables that only servers of the version before use; a later migration drops them.
UNUSED = {"erasures"}


class TestMigrations(unittest.TestCase):
    """Upgrades and downgrades of an empty database."""

    def setUp(self) -> None:
        """Create the database and an application on it."""
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
        """After all migrations the database does not differ from the models."""
        flask_migrate.upgrade()

        with db.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            differences = compare_metadata(context, db.metadata)
        ours = [one for one in differences if one[0] != "remove_table" or one[1].name not in UNUSED]
        self.assertEqual([], ours)

    def test_down_and_up_again(self) -> None:
        """A downgrade to base leaves no table, and an upgrade restores the schema."""
        flask_migrate.upgrade()
        tables = set(inspect(db.engine).get_table_names())

        flask_migrate.downgrade(revision="base")
        self.assertEqual({"alembic_version"}, set(inspect(db.engine).get_table_names()))

        flask_migrate.upgrade()
        self.assertEqual(tables, set(inspect(db.engine).get_table_names()))
        self.assertEqual({"alembic_version", *db.metadata.tables, *UNUSED}, tables)

    def test_locks_are_not_awaited_for_long(self) -> None:
        """A migration that can't lock a table is undone and tried again, and fails at last."""
        if db.engine.dialect.name != "postgresql":
            self.skipTest("SQLite has one lock, which is awaited as ever")
        flask_migrate.upgrade(revision="0001")

        with db.engine.begin() as busy:
            busy.execute(text("LOCK TABLE users IN ROW EXCLUSIVE MODE"))
            with (
                mock.patch("time.sleep") as sleep,
                self.assertRaisesRegex(OperationalError, "lock timeout"),
            ):
                flask_migrate.upgrade()

        self.assertLess(1, sleep.call_count)
        self.assertEqual({"alembic_version", "users"}, set(inspect(db.engine).get_table_names()))
        flask_migrate.upgrade()
        self.assertIn("sessions", inspect(db.engine).get_table_names())

    def test_tables_are_locked_for_a_moment(self) -> None:
        """A migration goes on when the table that it waits for is free."""
        if db.engine.dialect.name != "postgresql":
            self.skipTest("SQLite has one lock, which is awaited as ever")
        flask_migrate.upgrade(revision="0001")
        busy = db.engine.connect()
        self.addCleanup(busy.close)
        busy.execute(text("LOCK TABLE users IN ROW EXCLUSIVE MODE"))

        with mock.patch("time.sleep", side_effect=lambda _: busy.rollback()):
            flask_migrate.upgrade()

        self.assertIn("totp_factors", inspect(db.engine).get_table_names())

    def test_invalid_index(self) -> None:
        """An index that an interrupted migration left invalid is built again."""
        if db.engine.dialect.name != "postgresql":
            self.skipTest("SQLite builds indexes in the transaction of the migration")
        flask_migrate.upgrade(revision="0004")
        self.execute("CREATE INDEX users_admins_idx ON users (id) WHERE active AND admin")
        self.execute('CREATE UNIQUE INDEX users_email_new ON users (email COLLATE "C")')
        self.execute(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid IN"
            " ('users_admins_idx'::regclass, 'users_email_new'::regclass)"
        )

        flask_migrate.upgrade()

        invalid = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"
        self.assertEqual([], self.execute(invalid))

    def test_rows_survive(self) -> None:
        """Every upgrade and downgrade keeps users, whose email is verified; sessions end."""
        user = (
            "INSERT INTO users (username, username_key, email, password, active, admin, created_at)"
            " VALUES ('Ada', 'ada', 'ada@test.com', 'x', (1 = 1), (1 = 0), '2026-11-22 09:00:00')"
        )
        session = (
            "INSERT INTO sessions"
            " (id, user_id, generation, created_at, last_used_at, ip, user_agent, expires_at)"
            " SELECT '0123456789abcdefABCDEF', id, 3, created_at, created_at, '192.0.2.1', 'curl',"
            " created_at FROM users"
        )
        flask_migrate.upgrade(revision="0001")
        self.execute(user)
        before = self.execute("SELECT * FROM users")
        # Without roles, and without a second factor.
        after = [(*user, True, "", False) for user in before]

        flask_migrate.upgrade()
        self.assertEqual(after, self.execute("SELECT * FROM users"))
        self.execute(session)
        flask_migrate.downgrade(revision="0001")
        self.assertEqual(before, self.execute("SELECT * FROM users"))
        flask_migrate.upgrade()
        self.assertEqual(after, self.execute("SELECT * FROM users"))
        self.assertEqual([], self.execute("SELECT * FROM sessions"))

        self.execute(session)
        self.execute("DELETE FROM users")
        self.assertEqual([], self.execute("SELECT * FROM sessions"))

        self.execute(user)
        self.assertNotEqual(before[0][0], self.execute("SELECT id FROM users")[0][0])

    def test_second_factor(self) -> None:
        """Sessions from before were started with a password; a factor goes with its user.

        The version before, which still runs during an upgrade, adds users and sessions as before.
        """
        user = (
            "INSERT INTO users (username, username_key, email, password, active, admin, created_at,"
            " email_verified, roles) VALUES ('{0}', '{0}', '{0}@test.com', 'x', (1 = 1), (1 = 0),"
            " '2026-11-22 09:00:00', (1 = 1), '')"
        )
        session = (
            "INSERT INTO sessions SELECT '{0}bcdefghijklmnopqrstuv', id, 3, created_at, created_at,"
            " '192.0.2.1', 'curl', created_at, NULL FROM users WHERE username = '{0}'"
        )
        flask_migrate.upgrade(revision="0008")
        columns = ", ".join(column["name"] for column in inspect(db.engine).get_columns("sessions"))
        explicit = session.replace("INTO sessions", f"INTO sessions ({columns})")
        self.execute(user.format("a"))
        self.execute(session.format("a"))
        before = self.execute("SELECT * FROM sessions")

        flask_migrate.upgrade()
        self.execute(user.format("b"))
        self.execute(explicit.format("b"))

        self.assertEqual([(False,)] * 2, self.execute("SELECT mfa_enabled FROM users"))
        methods = self.execute("SELECT amr, code_given_at FROM sessions")
        self.assertEqual([("pwd", None)] * 2, methods)
        self.execute("INSERT INTO totp_factors (user_id, secret) SELECT id, 'x' FROM users")
        self.execute("INSERT INTO recovery_codes SELECT id, 'x' FROM users")
        factors = self.execute("SELECT last_step, email_verified FROM totp_factors")
        self.assertEqual([(None, False)] * 2, factors)
        self.execute("DELETE FROM users WHERE username = 'b'")
        for table in ("totp_factors", "recovery_codes", "sessions"):
            self.assertEqual([(1,)], self.execute(f"SELECT count(*) FROM {table}"))  # noqa: S608

        flask_migrate.downgrade(revision="0008")
        self.assertEqual(before, self.execute("SELECT * FROM sessions"))

    def test_events_of_deleted_users(self) -> None:
        """Events that still named a deleted user are anonymous, up and down again; others stay."""
        columns = "kind, user_id, actor_id, session_id, ip, user_agent, request_id"
        flask_migrate.upgrade(revision="0005")
        self.execute(
            "INSERT INTO users (username, username_key, email, password, active, admin, created_at)"
            " VALUES ('Ada', 'ada', 'ada@test.com', 'x', (1 = 1), (1 = 0), '2026-11-22 09:00:00')"
        )
        for user, actor in (("1", "NULL"), ("9", "NULL"), ("9", "1"), ("1", "9"), ("9", "8")):
            self.execute(
                f"INSERT INTO events (created_at, {columns}, details) VALUES"  # noqa: S608
                f" ('2026-11-22 09:00:00', 'x', {user}, {actor}, 's', 'ip', 'curl', 'r', '{{}}')"
            )
        expected = [
            ("x", 1, None, "s", "ip", "curl", "r"),
            ("x", None, None, None, None, "", None),
            ("x", None, 1, None, "ip", "curl", "r"),
            ("x", 1, None, "s", None, "", None),
            ("x", None, None, None, None, "", None),
        ]

        for move in (flask_migrate.upgrade, flask_migrate.downgrade, flask_migrate.upgrade):
            move()
            with self.subTest(move.__name__):
                stored = self.execute(f"SELECT {columns} FROM events ORDER BY id")  # noqa: S608
                self.assertEqual(expected, stored)

        self.execute("DELETE FROM users")
        self.assertEqual([(None, None)] * 5, self.execute("SELECT user_id, actor_id FROM events"))

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Execute a statement in its own transaction, and return its rows if it has any."""
        with db.engine.begin() as connection:
            result = connection.exec_driver_sql(statement)
            return [tuple(row) for row in result] if result.returns_rows else []

    def test_offline(self) -> None:
        """The statements can be printed without executing them."""
        result = scratch.manage(
            "db", "upgrade", "--sql", APP_SETTINGS=TESTING, DATABASE_TEST_URL=self.url
        )

        self.assertEqual(0, result.returncode, result.stderr)
        self.assertIn("CREATE TABLE users", result.stdout)
        self.assertEqual([], inspect(db.engine).get_table_names())

    def test_processes_that_migrate_together_take_turns(self) -> None:
        """Of several simultaneous upgrades one migrates, and none fails."""
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
