"""The commands import_users and export_users."""

import contextlib
import json
import os
import pty
import signal
import stat
import subprocess
import sys
import tempfile
import termios
import time
import unittest
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from project.config import database_url
from project.ops import import_export
from project.tests import scratch

HASHED = "$2y$07$usesomesillystringfore2uDLvp1Ii2e./U9C8sBjqp8I90dH6hi"
PRODUCTION = {
    "APP_SETTINGS": "project.config.ProductionConfig",
    "SECRET_KEY": "0123456789abcdef" * 2,
}


def user(name: str, **fields: Any) -> str:
    """Return a user as a line of JSON Lines."""
    user = {"username": name, "email": f"{name}@test.com", "password_hash": HASHED}
    return json.dumps(user | fields) + "\n"


class TestImportExportCommands(unittest.TestCase):
    """Files, exit codes and printed lines."""

    def setUp(self) -> None:
        """Create a database with its tables, and a folder."""
        self.url = self.enterContext(scratch.database())
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.assertEqual(0, self.manage("db", "upgrade").returncode)

    @property
    def environment(self) -> dict[str, str]:
        """The settings of the commands."""
        return PRODUCTION | {"DATABASE_URL": self.url}

    def manage(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in production settings."""
        result = scratch.manage(*arguments, stdin=stdin, **self.environment)
        self.assertNotIn("Traceback", result.stderr)
        return result

    def write(self, name: str, content: str) -> str:
        """Write a file and return its path."""
        path = self.folder / name
        path.write_text(content, encoding="utf-8", newline="")
        return str(path)

    def count(self) -> int:
        """Return the number of users."""
        engine = create_engine(database_url(self.url))
        try:
            with engine.connect() as connection:
                return int(connection.execute(text("SELECT count(*) FROM users")).scalar_one())
        finally:
            engine.dispose()

    def events(self) -> list[str]:
        """Return the kinds of events in the audit log."""
        printed = self.manage("events", "--json").stdout.splitlines()
        return [json.loads(line)["kind"] for line in printed]

    def test_import(self) -> None:
        """Refused lines are listed on stderr, totals on stdout; the exit code is 1 if any is."""
        good = self.write("good.jsonl", user("ada") + user("eve"))
        lines = user("ada"), user("kim", active=None), "\n", user("ADA"), user("kim", roles="x")
        bad = self.write("bad.jsonl", "".join(lines))

        result = self.manage("import_users", good)
        self.assertEqual((0, ""), (result.returncode, result.stderr))
        self.assertEqual("Users added: 2; there already: 0; lines refused: 0.\n", result.stdout)
        self.assertEqual(["users_imported"], self.events())

        result = self.manage("import_users", good)
        self.assertEqual((0, ""), (result.returncode, result.stderr))
        self.assertEqual("Users added: 0; there already: 2; lines refused: 0.\n", result.stdout)

        result = self.manage("import_users", bad)
        self.assertEqual(1, result.returncode)
        self.assertEqual("Users added: 0; there already: 1; lines refused: 3.\n", result.stdout)
        self.assertEqual(
            "line 2: active should be a valid boolean\n"
            "line 4: it is there already, with another username\n"
            "line 5: roles should be a valid list\n",
            result.stderr,
        )
        self.assertNotIn(HASHED[7:], result.stderr + result.stdout)

    def test_formats(self) -> None:
        """CSV is recognized by the name of the file or by --csv; - is standard input."""
        rows = f"username,email,password_hash\r\nada,ada@test.com,{HASHED}\r\n"
        for number, (arguments, stdin) in enumerate(
            (
                ([self.write("users.CSV", rows)], ""),
                (["--csv", self.write("users.txt", rows)], ""),
                (["-", "--csv"], rows),
                (["-"], user("ada")),
            )
        ):
            with self.subTest(arguments):
                result = self.manage("import_users", *arguments, stdin=stdin)

                self.assertEqual((0, ""), (result.returncode, result.stderr))
                self.assertIn(f"Users added: {int(not number)}; ", result.stdout)

    def test_unreadable_and_empty_files(self) -> None:
        """An unreadable file ends the command with one line and 1; an empty one has no users."""
        for arguments, reason in (
            (["/nowhere.jsonl"], "/nowhere.jsonl cannot be read: No such file or directory"),
            ([str(self.folder)], f"{self.folder} cannot be read: Is a directory"),
            ([self.write("a.csv", "")], "line 1: it must be the header"),
        ):
            with self.subTest(reason):
                result = self.manage("import_users", *arguments)

                self.assertEqual(1, result.returncode)
                self.assertEqual(1, len(result.stderr.splitlines()), result.stderr)
                self.assertIn(reason, result.stderr)
        self.assertEqual(0, self.manage("import_users", self.write("a", "")).returncode)
        self.assertEqual(2, self.manage("import_users").returncode)

    def test_export(self) -> None:
        """Exports go to a new file that only its owner can read; no file is overwritten."""
        eve = user("eve", active=False, roles=["orders.read", "orders.write"])
        self.manage("import_users", "-", stdin=user("ada") + eve)
        path = self.folder / "users.jsonl"

        result = self.manage("export_users", str(path))

        self.assertEqual(
            (0, "", "Users written: 2.\n"), (result.returncode, result.stdout, result.stderr)
        )
        self.assertEqual(["users_imported", "users_exported"], self.events())
        self.assertEqual(0o600, stat.S_IMODE(path.stat().st_mode))
        written = path.read_text(encoding="utf-8")
        users = [json.loads(row) for row in written.splitlines()]
        self.assertEqual(
            [("ada", []), ("eve", ["orders.read", "orders.write"])],
            [(each["username"], each["roles"]) for each in users],
        )
        self.assertEqual(written, self.manage("export_users", "-").stdout)
        in_csv = self.manage("export_users", "-", "--csv").stdout
        self.assertEqual(
            "username,email,password_hash,active,admin,email_verified,roles,created_at",
            in_csv.splitlines()[0],
        )
        self.assertIn(",false,orders.read orders.write,", in_csv.splitlines()[2])

        result = self.manage("export_users", str(path))
        self.assertEqual(1, result.returncode)
        self.assertEqual(f"{path} already exists; nothing was written.\n", result.stderr)
        self.assertEqual(written, path.read_text(encoding="utf-8"))
        result = self.manage("export_users", "/nowhere/users")
        self.assertEqual(1, result.returncode)
        self.assertEqual(
            "/nowhere/users cannot be written: No such file or directory\n", result.stderr
        )

    def test_without_tables(self) -> None:
        """If the database cannot be used, one line says so, and no file is left behind."""
        with scratch.database() as url:
            for command in ("import_users", "export_users"):
                with self.subTest(command):
                    path = self.folder / command
                    arguments = [command, "-" if command == "import_users" else str(path)]
                    settings = PRODUCTION | {"DATABASE_URL": url}
                    result = scratch.manage(*arguments, stdin=user("ada"), **settings)

                    self.assertEqual(1, result.returncode)
                    self.assertEqual(1, len(result.stderr.splitlines()), result.stderr)
                    self.assertIn("The database cannot be used: ", result.stderr)
                    self.assertFalse(path.exists())

    def test_progress(self) -> None:
        """A terminal shows a progress bar, and each refusal on its own line."""
        path = self.write("users.jsonl", user("ada") + "broken\n")
        terminal, end = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 80))
        with contextlib.closing(os.fdopen(terminal, "rb", buffering=0)) as screen:
            try:
                result = subprocess.run(
                    [sys.executable, "manage.py", "import_users", path],
                    cwd=scratch.ROOT,
                    env=scratch.settings(**self.environment),
                    stdout=subprocess.PIPE,
                    stderr=end,
                    timeout=60,
                    check=False,
                )
            finally:
                os.close(end)
            shown = b""
            with contextlib.suppress(OSError):  # raised when the other end is closed
                while piece := screen.read(4_096):
                    shown += piece

        self.assertEqual(1, result.returncode)
        self.assertIn(b"100%", shown)
        self.assertIn(b"\rline 2: it is not a JSON object\r\n", shown)
        self.assertEqual(b"Users added: 1; there already: 0; lines refused: 1.\n", result.stdout)

    def test_interrupt(self) -> None:
        """After Ctrl-C complete batches stay, the totals are printed, and the exit code is 130."""
        lines = [user(f"user-{number}") for number in range(import_export.BATCH + 10)]
        with scratch.default_sigint():
            process = subprocess.Popen(
                [sys.executable, "manage.py", "import_users", "-"],
                cwd=scratch.ROOT,
                env=scratch.settings(**self.environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        with process:
            assert process.stdin  # noqa: S101  # it is a pipe
            process.stdin.write("".join(lines))
            process.stdin.flush()
            deadline = time.monotonic() + 60
            while not self.count() and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            printed, complaints = process.communicate(timeout=60)

        self.assertEqual((130, ""), (process.returncode, complaints))
        self.assertEqual(
            f"Users added: {import_export.BATCH}; there already: 0; lines refused: 0.\n", printed
        )
        self.assertEqual(import_export.BATCH, self.count())
        again = self.manage("import_users", "-", stdin="".join(lines))
        self.assertIn(f"Users added: 10; there already: {import_export.BATCH};", again.stdout)
