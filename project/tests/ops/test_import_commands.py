"""The commands import_users and export_users."""

import contextlib
import csv
import json
import os
import pty
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
import termios
import time
import unittest
from pathlib import Path
from typing import Any, ClassVar

import pyotp
from sqlalchemy import create_engine, delete, text, update

from project import clock, db
from project.config import database_url
from project.models import TotpFactor, User
from project.ops import import_export
from project.tests import scratch
from project.tests.base import bearer
from project.tests.lib.cases import ScratchTestCase
from project.tests.rows import stored_events

HASHED = "$2y$07$usesomesillystringfore2uDLvp1Ii2e./U9C8sBjqp8I90dH6hi"
PRODUCTION = {
    "APP_SETTINGS": "project.config.ProductionConfig",
    "SECRET_KEY": "0123456789abcdef" * 2,
}
KEY, ANOTHER_KEY = secrets.token_hex(32), secrets.token_hex(32)


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

    def test_one_event(self) -> None:
        """An import of more than one batch is one event, with the number of all users."""
        users = "".join(user(f"user{number}") for number in range(import_export.BATCH + 1))
        self.manage("import_users", self.write("many.jsonl", users))

        (event,) = map(json.loads, self.manage("events", "--json").stdout.splitlines())
        self.assertEqual("users_imported", event["kind"])
        self.assertEqual(import_export.BATCH + 1, event["details"]["users"])

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


class TestSecondFactors(ScratchTestCase):
    """Second factors in the files of these commands."""

    environment: ClassVar = {"ENCRYPTION_KEYS": KEY, "TOKEN_EXPIRATION_SECONDS": "3600"}

    def setUp(self) -> None:
        """Add two users of whom the second has an authenticator, and a folder."""
        super().setUp()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.add("ada")
        headers = bearer(self.add("eve").get_json()["auth_token"])
        body = {"current_password": "test"}
        answer = self.client.post("/auth/totp", json=body, headers=headers)
        self.secret: str = answer.get_json()["data"]["secret"]
        body = {"code": pyotp.TOTP(self.secret).at(clock.utcnow())}
        answer = self.client.post("/auth/totp/confirm", json=body, headers=headers)
        self.assertEqual(200, answer.status_code, answer.get_data(as_text=True))

    def manage(
        self, *arguments: str, url: str | None = None, keys: str = KEY, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, on this database or on another one."""
        settings = PRODUCTION | {"DATABASE_URL": url or self.url, "ENCRYPTION_KEYS": keys}
        result = scratch.manage(*arguments, stdin=stdin, **settings)
        self.assertNotIn("Traceback", result.stderr)
        return result

    def damage(self) -> None:
        """Make the stored secret unreadable."""
        with db.engine.begin() as connection:
            connection.execute(update(TotpFactor).values(secret=b"x"))

    def details(self) -> list[dict[str, Any]]:
        """Return the details of the events about exports."""
        return [row["details"] for row in stored_events() if row["kind"] == "users_exported"]

    def test_without_the_option(self) -> None:
        """The command says how many users have to set theirs up again, and writes none."""
        path = self.folder / "users.csv"

        result = self.manage("export_users", str(path))

        self.assertEqual((0, ""), (result.returncode, result.stdout))
        self.assertEqual(
            "Users written: 2.\n"
            "Second factors are not in the file: 1 users will have to set theirs up again."
            " --with-factors writes them too.\n",
            result.stderr,
        )
        self.assertNotIn("second_factor", path.read_text(encoding="utf-8"))
        self.assertEqual([{}], self.details())
        with db.engine.begin() as connection:
            connection.execute(update(User).values(mfa_enabled=False))
        result = self.manage("export_users", "-")
        self.assertEqual("Users written: 2.\n", result.stderr)
        self.assertNotIn("second_factor", result.stdout)

    def test_with_the_option(self) -> None:
        """Both formats have the factor, only in the line of its user; the event says so."""
        for name in ("users.jsonl", "users.csv"):
            with self.subTest(name), scratch.database() as other:
                path = self.folder / name
                result = self.manage("export_users", str(path), "--with-factors")

                self.assertEqual((0, ""), (result.returncode, result.stdout))
                self.assertEqual("Users written: 2.\n", result.stderr)
                self.assertEqual({"second_factors": True}, self.details()[-1])
                self.assertEqual(0o600, stat.S_IMODE(path.stat().st_mode))
                written = path.read_text(encoding="utf-8")
                self.assertNotIn(self.secret, written)
                with path.open(encoding="utf-8", newline="") as file:
                    rows = list(csv.DictReader(file)) if name.endswith("csv") else []
                rows = rows or [json.loads(line) for line in written.splitlines()]
                factors = [row.get("second_factor") or "" for row in rows]
                self.assertEqual([False, True], [len(factor) > 100 for factor in factors])

                self.assertEqual(0, self.manage("db", "upgrade", url=other).returncode)
                for total in ("added: 2; there already: 0", "added: 0; there already: 2"):
                    result = self.manage("import_users", str(path), url=other)
                    self.assertEqual((0, ""), (result.returncode, result.stderr))
                    self.assertEqual(f"Users {total}; lines refused: 0.\n", result.stdout)
                result = self.manage("export_users", "-", url=other)
                self.assertIn("1 users will have to set theirs up again.", result.stderr)

    def test_wrong_keys(self) -> None:
        """A line whose factor cannot be decrypted is refused; nothing of it is printed."""
        written = self.manage("export_users", "-", "--with-factors").stdout
        factor = json.loads(written.splitlines()[1])["second_factor"]
        for keys in ("", ANOTHER_KEY):
            with self.subTest(keys), scratch.database() as other:
                self.manage("db", "upgrade", url=other)
                result = self.manage("import_users", "-", url=other, keys=keys, stdin=written)

                self.assertEqual(1, result.returncode)
                self.assertEqual(
                    "Users added: 1; there already: 0; lines refused: 1.\n", result.stdout
                )
                self.assertEqual(
                    "line 2: second_factor cannot be decrypted with ENCRYPTION_KEYS for this"
                    " email\n",
                    result.stderr,
                )
                self.assertNotIn(factor[:20], result.stdout + result.stderr)
                imported = self.manage("export_users", "-", url=other).stdout
                self.assertEqual(written.splitlines()[:1], imported.splitlines())

    def test_another_factor(self) -> None:
        """A line with another factor than that of the existing user is refused, and named."""
        written = self.manage("export_users", "-", "--with-factors").stdout
        with db.engine.begin() as connection:
            connection.execute(delete(TotpFactor))

        result = self.manage("import_users", "-", stdin=written)

        self.assertEqual(1, result.returncode)
        refused = "line 2: it is there already, with another second_factor\n"
        self.assertEqual(refused, result.stderr)

    def test_unreadable(self) -> None:
        """If a secret cannot be decrypted, the command says so, and leaves no file behind."""
        written = self.manage("export_users", "-", "--with-factors").stdout
        path = self.folder / "users.jsonl"
        reason = "ENCRYPTION_KEYS does not decrypt every second factor; nothing was written."
        for keys in ("", ANOTHER_KEY):
            result = self.manage("export_users", str(path), "--with-factors", keys=keys)

            self.assertEqual((1, ""), (result.returncode, result.stdout))
            self.assertEqual(reason, result.stderr.splitlines()[-1])
            self.assertFalse(path.exists())
        result = self.manage("export_users", str(path), keys="")
        self.assertEqual((0, ""), (result.returncode, result.stdout))
        self.damage()
        result = self.manage("import_users", "-", stdin=written)
        self.assertEqual(1, result.returncode)
        self.assertEqual(
            "ENCRYPTION_KEYS does not decrypt every second factor of existing users.",
            result.stderr.splitlines()[-1],
        )
        nothing = "Users added: 0; there already: 0; lines refused: 0.\n"
        self.assertEqual(nothing, result.stdout)

    def test_unreadable_to_standard_output(self) -> None:
        """Where a part was written, the command does not say that nothing was."""
        self.damage()

        result = self.manage("export_users", "-", "--with-factors")

        self.assertEqual(1, result.returncode)
        self.assertFalse(result.stdout and "nothing was written" in result.stderr, result.stdout)

    def test_help(self) -> None:
        """The option is described, and an import does not have it."""
        self.assertIn("--with-factors", self.manage("export_users", "--help").stdout)
        self.assertEqual(2, self.manage("import_users", "-", "--with-factors").returncode)
