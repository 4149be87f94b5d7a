"""The command line: help, complaints, .env files, Flask's own commands, and runserver."""

import contextlib
import importlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request
from pathlib import Path

from project.config import VERSION
from project.tests import scratch

FLASK = str(Path(sys.executable).with_name("flask"))
MANAGER = importlib.import_module("manage").manager  # mypy does not check manage.py
NO_SERVER = "postgresql://user:sesame@127.0.0.1:1/users"


def run(
    *command: str, cwd: Path = scratch.ROOT, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command as a shell does, with these settings and no others."""
    return subprocess.run(
        command,
        cwd=cwd,
        env=scratch.settings(PYTHONPATH=str(scratch.ROOT), **environment),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


class TestHelp(unittest.TestCase):
    """What the command line says of itself; none of it needs a setting or a database."""

    def call(self, *arguments: str) -> tuple[int, str]:
        """Return the exit code of a command and what it prints."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                code = MANAGER.handle("/srv/users/manage.py", arguments)
            except SystemExit as error:
                code = error.code
        return code, output.getvalue()

    def test_overview(self) -> None:
        """Without a command, and with -h or --help, every command is listed with one line."""
        for arguments, code in ((), 2), (("-h",), 0), (("--help",), 0):
            with self.subTest(arguments):
                exit_code, printed = self.call(*arguments)

                self.assertEqual(code, exit_code)
                self.assertIn("\nUsers:\n  create_admin          Add an admin.", printed)
                for name in MANAGER._commands:
                    self.assertRegex(printed, rf"(?m)^  {name} +[A-Z].{{10,}}")

    def test_every_command(self) -> None:
        """-h and --help describe each command."""
        for name in set(MANAGER._commands) - {"db"}:  # its help is click's
            for option in ("-h", "--help"):
                with self.subTest(name, option=option):
                    code, printed = self.call(name, option)

                    self.assertEqual(0, code)
                    self.assertTrue(printed.startswith(f"usage: manage.py {name} [-h]"), printed)

    def test_db(self) -> None:
        """-h and --help describe Flask-Migrate's commands; those of `db` itself need no setting."""
        production = {"APP_SETTINGS": "project.config.ProductionConfig"}
        development = {"SECRET_KEY": "any", "DATABASE_URL": NO_SERVER}
        for arguments, settings in (
            (("-h",), production),
            (("--help",), production),
            (("upgrade", "-h"), development),
        ):
            result = scratch.manage("db", *arguments, **settings)

            self.assertEqual(0, result.returncode, result.stderr)
            self.assertTrue(result.stdout.startswith("Usage: manage.py db "), result.stdout)

    def test_wrong_option(self) -> None:
        """An option or argument that a command does not take is named."""
        for wrong in ("--bogus", "superfluous"):
            with self.subTest(wrong):
                code, printed = self.call("purge", wrong)

                self.assertEqual(2, code)
                self.assertIn(f"unrecognized arguments: {wrong}", printed)

    def test_wrong_command(self) -> None:
        """The nearest command is suggested, if there is a near one."""
        code, printed = self.call("import_user")

        self.assertEqual(2, code)
        self.assertIn("'import_user'. Did you mean import_users?", printed)
        self.assertNotIn("Did you mean", self.call("frobnicate")[1])


class TestEnvironmentFiles(unittest.TestCase):
    """`manage.py` and `flask` read .env by the same rule."""

    def setUp(self) -> None:
        """Write a .env that sets one setting, to an invalid value."""
        folder = self.enterContext(tempfile.TemporaryDirectory())
        Path(folder, ".env").write_text("BCRYPT_LOG_ROUNDS=99\n")
        self.inside = Path(folder, "inside")
        self.inside.mkdir()

    def shell(self, *command: str, **environment: str) -> str:
        """Start a Python shell inside the folder; return what it prints of the setting."""
        settings = {"SECRET_KEY": "any", "DATABASE_URL": NO_SERVER, "FLASK_SKIP_DOTENV": ""}
        lines = "from flask import current_app\nprint(current_app.config['BCRYPT_LOG_ROUNDS'])"
        result = run(*command, cwd=self.inside, stdin=lines, **settings | environment)
        return result.stdout if result.returncode == 0 else result.stderr

    def test_both(self) -> None:
        """The file of the nearest folder counts, unless a variable is set or .env is turned off."""
        for command in (
            (FLASK, "--app", "project", "shell"),
            (sys.executable, str(scratch.ROOT / "manage.py"), "shell"),
        ):
            with self.subTest(command):
                self.assertIn("BCRYPT_LOG_ROUNDS='99'", self.shell(*command))
                self.assertIn("5", self.shell(*command, BCRYPT_LOG_ROUNDS="5").split())
        self.assertIn("4", self.shell(*command, FLASK_SKIP_DOTENV="1").split())

    def test_tests(self) -> None:
        """Tests do not depend on such a file."""
        command = (sys.executable, str(scratch.ROOT / "manage.py"), "test", "nothing")

        self.assertIn("There is no test named nothing.", self.shell(*command))


class TestFlask(unittest.TestCase):
    """Flask's own commands."""

    def test_routes(self) -> None:
        """`flask --app project routes` lists the routes."""
        result = run(FLASK, "--app", "project", "routes", SECRET_KEY="any", DATABASE_URL=NO_SERVER)

        self.assertRegex(result.stdout, r"auth\.login_user +POST +/auth/login +\n")

    def test_run(self) -> None:
        """`flask --app project:create_server run` serves."""
        arguments = ("--app", "project:create_server", "run")
        with Running(FLASK, *arguments) as server:
            server.wait_for(b"pong!")


class Running:
    """A development server without a database, on a free port."""

    def __init__(self, *command: str, cwd: Path = scratch.ROOT) -> None:
        self.port = scratch.free_port()
        self.log = Path(tempfile.mkstemp()[1])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                cwd=cwd,
                env=scratch.settings(SECRET_KEY="any", DATABASE_URL=NO_SERVER, MAIL_SENDER="false"),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.log.unlink()

    def wait_for(self, body: bytes, path: str = "/ping") -> None:
        """Wait until the response at `path` contains this."""
        deadline = time.monotonic() + scratch.START_TIMEOUT
        while time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                answer = urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}").read()
                if body in answer:
                    return
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())


class TestRunserver(unittest.TestCase):
    """The development server."""

    def test_what_it_prints(self) -> None:
        """The address of the API document, and that the database is away, without its password."""
        with Running(sys.executable, "manage.py", "runserver") as server:
            server.wait_for(VERSION.encode(), "/health/live")
            printed = server.log.read_text()

        self.assertIn(f" * The API document: http://127.0.0.1:{server.port}/docs\n", printed)
        self.assertRegex(printed, r" \* The database cannot be used: .*127\.0\.0\.1.* 1\b")
        self.assertNotIn("sesame", printed)

    def test_reload(self) -> None:
        """With --reload, a change of a file is served, and what is printed is printed once."""
        with tempfile.TemporaryDirectory() as folder:
            for name in ("project", "migrations"):
                shutil.copytree(
                    scratch.ROOT / name,
                    Path(folder, name),
                    ignore=shutil.ignore_patterns("tests", "__pycache__"),
                )
            shutil.copy(scratch.ROOT / "manage.py", folder)
            view = Path(folder, "project", "api", "users.py")
            with Running(
                sys.executable, "manage.py", "runserver", "--reload", cwd=Path(folder)
            ) as server:
                server.wait_for(b"pong!")
                view.write_text(view.read_text().replace("pong!", "changed!"))
                server.wait_for(b"changed!")
                printed = server.log.read_text()

        self.assertEqual(1, printed.count("The API document"))
