"""The command line, run as an operator runs it."""

import json
import secrets
import subprocess
import sys
import unittest
from datetime import timedelta
from typing import Any

from sqlalchemy import create_engine, text

from project import clock
from project.config import VERSION, database_url
from project.tests import scratch

DEVELOPMENT = {"APP_SETTINGS": "project.config.DevelopmentConfig", "SECRET_KEY": "any"}
PRODUCTION = {
    "APP_SETTINGS": "project.config.ProductionConfig",
    "SECRET_KEY": "0123456789abcdef" * 2,
}
EARLIER, LATER = "2001-01-01 00:00:00+00:00", "2999-01-01 00:00:00+00:00"


class TestPython(unittest.TestCase):
    """The version of Python."""

    def test_too_old(self) -> None:
        """An older Python ends with one line that names both versions."""
        code = (
            "import runpy, sys; sys.version_info, sys.version = (3, 10, 13), '3.10.13 (main)';"
            " runpy.run_path('manage.py', run_name='__main__')"
        )
        result = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            cwd=scratch.ROOT,
            capture_output=True,
            text=True,
        )

        self.assertEqual(1, result.returncode)
        said = "Python 3.11 or newer is needed; this is Python 3.10.13.\n"
        self.assertEqual(said, result.stderr)


class TestVersion(unittest.TestCase):
    """The version of the service."""

    def test_version(self) -> None:
        """The command prints the version, and needs no settings."""
        result = scratch.manage("version", APP_SETTINGS="project.config.ProductionConfig")

        self.assertEqual((0, f"{VERSION}\n", ""), (result.returncode, result.stdout, result.stderr))


class TestManage(unittest.TestCase):
    """Commands and their exit codes, on a database of their own."""

    def setUp(self) -> None:
        """Create the database."""
        scratched = scratch.database()
        self.url = scratched.__enter__()
        self.addCleanup(scratched.__exit__, None, None, None)

    def manage(self, *arguments: str, stdin: str = "", production: bool = False) -> str:
        """Run a command, check that it succeeds, and return what it printed."""
        settings = PRODUCTION if production else DEVELOPMENT
        result = scratch.manage(*arguments, stdin=stdin, DATABASE_URL=self.url, **settings)
        self.assertEqual(0, result.returncode, result.stderr)
        return result.stdout + result.stderr

    def assert_refused(
        self, code: int, reason: str, *arguments: str, stdin: str = "", production: bool = False
    ) -> None:
        """Check that a command exits with this code and gives the reason on stderr."""
        settings = PRODUCTION if production else DEVELOPMENT
        result = scratch.manage(*arguments, stdin=stdin, DATABASE_URL=self.url, **settings)
        self.assertEqual(code, result.returncode, arguments)
        self.assertIn(reason, result.stderr)
        self.assertNotIn("Traceback", result.stderr)

    def execute(self, statement: str, *rows: dict[str, Any]) -> list[Any]:
        """Execute a statement on the database, and return its rows if it has any."""
        engine = create_engine(database_url(self.url))
        try:
            with engine.begin() as connection:
                result = connection.execute(text(statement), rows or None)
                return list(result) if result.returns_rows else []
        finally:
            engine.dispose()

    def users(self) -> list[tuple[str, bool]]:
        """Return the email of each user and whether they are an admin."""
        rows = self.execute("SELECT email, admin FROM users ORDER BY email")
        return [(row.email, bool(row.admin)) for row in rows]

    def add_sessions(self, email: str, number: int, expires_at: str) -> None:
        """Add this many sessions to a user."""
        sessions = [
            {"id": secrets.token_urlsafe(16), "email": email, "expires_at": expires_at}
            for _ in range(number)
        ]
        self.execute(
            "INSERT INTO sessions (id, user_id, generation, created_at, last_used_at, user_agent,"
            " expires_at) SELECT :id, id, 0, created_at, created_at, '', :expires_at FROM users"
            " WHERE email = :email",
            *sessions,
        )

    def sessions(self) -> dict[str, int]:
        """Return the number of sessions of each user with sessions."""
        rows = self.execute(
            "SELECT email, count(*) AS number FROM users JOIN sessions ON user_id = users.id"
            " GROUP BY email"
        )
        return {row.email: row.number for row in rows}

    def test_database_commands(self) -> None:
        """The schema is created, seeded twice with the same result, recreated and downgraded."""
        self.assertIn("Running upgrade  -> 0001", self.manage("db", "upgrade"))

        self.manage("seed_db")
        self.manage("seed_db")
        seeded = [("michael@mherman.org", False), ("michael@realpython.com", False)]
        self.assertEqual(seeded, self.users())

        self.manage("recreate_db")
        self.assertEqual([], self.users())

        self.assertIn("Running downgrade 0010", self.manage("db", "downgrade"))

    def test_production_is_not_touched(self) -> None:
        """recreate_db and seed_db exit with 1 under production's settings."""
        self.manage("db", "upgrade", production=True)
        arguments = ("create_admin", "root", "Root@test.com")
        self.manage(*arguments, stdin="correct-horse-battery\n", production=True)

        for command in ("recreate_db", "seed_db"):
            with self.subTest(command):
                self.assert_refused(1, command, command, production=True)
        self.assertEqual([("root@test.com", True)], self.users())

    def test_create_admin_refuses(self) -> None:
        """A taken or invalid name or email is refused in one line."""
        self.manage("db", "upgrade")
        self.manage("seed_db")

        for username, email, password, reason in (
            ("other", "michael@mherman.org", "secret", "email is taken"),
            ("MICHAEL", "other@test.com", "secret", "username is taken"),
            ("", "no email", "", "Invalid payload. username must have 1 to 128 characters; email"),
        ):
            with self.subTest(reason):
                arguments = ("create_admin", username, email)
                self.assert_refused(1, reason, *arguments, stdin=f"{password}\n")

    def test_roles(self) -> None:
        """create_admin --roles adds an admin with further roles; invalid ones are refused."""
        self.manage("db", "upgrade")
        words = "Invalid payload. roles must be different words of at most 31 characters"
        for roles, reason in (
            ("orders.read,admin", "Invalid payload. roles must not have admin"),
            ("orders.read, orders.write", words),
            ("orders.read,orders.read", words),
            ("orders.read,", words),
            ("Orders", words),
            (",".join("abcdefghijklmnopq"), "Invalid payload. roles must have at most 16 words"),
        ):
            with self.subTest(roles):
                arguments = ("create_admin", "root", "root@test.com", "--roles", roles)
                self.assert_refused(1, reason, *arguments, stdin="secret\n")
        self.assertEqual([], self.users())

        added = {"with": ["--roles", "orders.write,x"], "none": ["--roles", ""], "without": []}
        for name, options in added.items():
            self.manage("create_admin", name, f"{name}@test.com", *options, stdin="secret\n")

        stored = self.execute("SELECT username, roles, admin FROM users ORDER BY id")
        self.assertEqual(
            [("with", "orders.write x", True), ("none", "", True), ("without", "", True)],
            [(row.username, row.roles, bool(row.admin)) for row in stored],
        )
        kinds = [row.kind for row in self.execute("SELECT kind FROM events ORDER BY id")]
        self.assertEqual(["user_added", "roles_changed", "user_added", "user_added"], kinds)

    def test_create_admin_wants_a_good_password(self) -> None:
        """In production the password policy applies to admins too."""
        self.manage("db", "upgrade")

        for password, reason in (
            ("secret", "Invalid payload. password must have at least 12 characters"),
            ("Password1234", "Invalid payload. password must not be one of the most common"),
            ("Root@Test.com", "Invalid payload. password must not be the username, the email"),
        ):
            with self.subTest(password):
                arguments = ("create_admin", "root", "root@test.com")
                self.assert_refused(1, reason, *arguments, stdin=f"{password}\n", production=True)
        self.assertEqual([], self.users())

    def test_ending_sessions(self) -> None:
        """end_sessions and deactivate end the sessions of one user at a time."""
        michael, herman = "michael@realpython.com", "michael@mherman.org"
        self.manage("db", "upgrade", production=True)
        self.manage("seed_db")
        for email in (michael, herman):
            self.add_sessions(email, 3, LATER)

        printed = self.manage("end_sessions", "Michael@RealPython.com", production=True)
        self.assertIn("ended: 3.", printed)
        self.assertEqual({herman: 3}, self.sessions())

        self.manage("deactivate", herman, production=True)
        self.assertEqual({}, self.sessions())
        active = "SELECT email FROM users WHERE active ORDER BY email"
        self.assertEqual([michael], [row.email for row in self.execute(active)])

        # As if a session had been inserted by hand or restored from a backup.
        self.add_sessions(herman, 1, LATER)
        self.manage("activate", herman, production=True)
        self.assertEqual({}, self.sessions())
        self.assertEqual([herman, michael], [row.email for row in self.execute(active)])

        for command in ("deactivate", "end_sessions"):
            with self.subTest(command):
                self.assert_refused(1, "no user with the email a@b.c", command, "a@b.c")

    def test_reset_totp(self) -> None:
        """reset_totp removes the authenticator of one user and ends their sessions, without keys.

        It refuses an unknown email, and that of a user without an authenticator.
        """
        michael, herman = "michael@realpython.com", "michael@mherman.org"
        self.manage("db", "upgrade", production=True)
        self.manage("seed_db")
        self.execute("UPDATE users SET mfa_enabled = (1 = 1)")
        self.execute("INSERT INTO totp_factors (user_id, secret) SELECT id, 'x' FROM users")
        self.execute("INSERT INTO recovery_codes (user_id, code_hash) SELECT id, 'x' FROM users")
        for email in (michael, herman):
            self.add_sessions(email, 2, LATER)

        printed = self.manage("reset_totp", "Michael@RealPython.com", production=True)

        turned_off = "The authenticator of Michael@RealPython.com is turned off. Sessions ended: 2."
        self.assertIn(turned_off, printed)
        self.assertEqual({herman: 2}, self.sessions())
        for table in ("totp_factors", "recovery_codes"):
            join = f"SELECT email FROM users JOIN {table} ON user_id = id"  # noqa: S608
            self.assertEqual([herman], [row.email for row in self.execute(join)])
        enabled = "SELECT email FROM users WHERE mfa_enabled"
        self.assertEqual([herman], [row.email for row in self.execute(enabled)])
        columns = "kind, user_agent, CAST(details AS TEXT) AS details"
        *_, event = self.execute(f"SELECT {columns} FROM events ORDER BY id")  # noqa: S608
        self.assertEqual(("totp_reset", "manage.py"), (event.kind, event.user_agent))
        self.assertEqual({"why": "operator", "sessions": 2}, json.loads(event.details))

        reason = f"{michael} has no authenticator."
        self.assert_refused(1, reason, "reset_totp", michael, production=True)
        self.assert_refused(1, "no user with the email a@b.c", "reset_totp", "a@b.c")
        self.assertEqual({herman: 2}, self.sessions())

    def test_purge(self) -> None:
        """Expired sessions are deleted in batches, and no others."""
        email = "michael@mherman.org"
        self.manage("db", "upgrade")
        self.manage("seed_db")
        self.add_sessions(email, 2_345, EARLIER)
        self.add_sessions(email, 3, LATER)

        self.assertIn("sessions deleted: 2345;", self.manage("purge", production=True))
        self.assertEqual({email: 3}, self.sessions())
        self.assertIn("sessions deleted: 0;", self.manage("purge"))
        self.assertEqual({email: 3}, self.sessions())
        event = "SELECT CAST(details AS TEXT) AS details FROM events WHERE kind = 'purged'"
        self.assertEqual([{"rows": 2345}], [json.loads(row[0]) for row in self.execute(event)])

    def test_purge_of_mail(self) -> None:
        """Expired invitations and emails given up EVENTS_DAYS ago are deleted, and no others."""
        self.manage("db", "upgrade")
        now = clock.utcnow()
        old, young = (now - timedelta(days=90, minutes=minutes) for minutes in (1, -1))
        emails = {"old": old, "young": young, "waiting": None}
        self.execute(
            "INSERT INTO mails (kind, address, parameters, language, created_at, next_try_at,"
            " tries, error, failed_at) VALUES ('reset', :name, '{}', 'en', :old, :old, 1, '', :at)",
            *({"name": name, "at": at, "old": old} for name, at in emails.items()),
        )
        expiries = {"expired": now, "valid": now + timedelta(minutes=1)}
        self.execute(
            "INSERT INTO invitations (email, created_at, expires_at) VALUES (:name, :old, :at)",
            *({"name": name, "old": old, "at": at} for name, at in expiries.items()),
        )

        printed = self.manage("purge", production=True)

        self.assertIn("invitations: 1; emails that were given up: 1;", printed)
        left = self.execute("SELECT address FROM mails ORDER BY id")
        self.assertEqual(["young", "waiting"], [row.address for row in left])
        left = self.execute("SELECT email FROM invitations")
        self.assertEqual(["valid"], [row.email for row in left])

    def test_shell(self) -> None:
        """The shell has the application, the database and the User model."""
        printed = self.manage("shell", stdin="print(app.name, db.engine.name, User.__tablename__)")

        self.assertIn("users", printed)

    def test_mistakes_have_exit_codes(self) -> None:
        """An unknown command exits with 2 and a failing one with 1, Flask-Migrate's too."""
        self.assert_refused(2, "frobnicate", "frobnicate")
        self.assert_refused(2, "frobnicate", "db", "frobnicate")
        self.assert_refused(1, "nowhere", "db", "upgrade", "nowhere")
        away = scratch.manage("serve", **DEVELOPMENT, DATABASE_URL="sqlite:////nowhere/users.db")
        self.assertEqual(1, away.returncode)
        self.assertEqual(1, len(away.stderr.splitlines()), away.stderr)

    def test_database_away(self) -> None:
        """A command without its database says which host refused, in one line without secrets."""
        url = "postgresql://user:sesame@127.0.0.1:1/users"
        for command in ("serve", "purge", "db upgrade", "create_admin ada ada@test.com"):
            with self.subTest(command):
                away = scratch.manage(
                    *command.split(), **DEVELOPMENT, DATABASE_URL=url, stdin="p\n"
                )

                self.assertEqual(1, away.returncode)
                self.assertEqual(
                    'The database cannot be used: connection to server at "127.0.0.1", port 1'
                    " failed: Connection refused\n",
                    away.stderr,
                )
