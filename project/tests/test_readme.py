"""The README: its calls are sent, and its settings and commands are compared with the code."""

import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

from project.config import BaseConfig, DevelopmentConfig, ProductionConfig, TestingConfig
from project.tests import scratch

README = (scratch.ROOT / "README.md").read_text()
TESTS = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
BLOCK = re.compile(r"```(sh|json)\n(.*?)```", re.DOTALL)
# Settings whose defaults the table describes in words.
IN_WORDS = {
    *("SECRET_KEY", "SECRET_KEY_FALLBACKS", "DATABASE_URL", "DATABASE_TEST_URL"),
    *("BCRYPT_THREADS", "CORS_ORIGINS", "ENCRYPTION_KEYS"),
}
NOT_USED = "\N{EN DASH}"


def section(title: str) -> str:
    """Return the text under a heading of the second level."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Return the cells of the table under a heading."""
    lines = [line for line in section(title).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


class TestSettings(unittest.TestCase):
    """The table of settings agrees with project/config.py."""

    def test_names(self) -> None:
        """The table has exactly the settings."""
        fields = BaseConfig.model_fields
        expected = {str(field.validation_alias or name) for name, field in fields.items()}
        named = [name for row in rows("Settings") for name in re.findall("`([A-Z_]+)`", row[0])]

        self.assertEqual(sorted(expected | {"DATABASE_TEST_URL"}), sorted(named))

    def test_compose(self) -> None:
        """docker-compose.yml hands on every setting of the table."""
        named = {name for row in rows("Settings") for name in re.findall("`([A-Z_]+)`", row[0])}
        compose = (scratch.ROOT / "docker-compose.yml").read_text()
        service = compose.split("\n  users-service:\n")[1].split("\n    ports:\n")[0]
        handed_on = set(re.findall(r"^      ([A-Z_]+):", service, re.MULTILINE))

        self.assertEqual(named - {"DATABASE_TEST_URL"}, handed_on - {"APP_SETTINGS"})

    def test_defaults(self) -> None:
        """The table has the default of each setting in each class of settings."""
        classes = DevelopmentConfig, TestingConfig, ProductionConfig
        for names, cell, *_ in rows("Settings"):
            for place, name in enumerate(re.findall("`([A-Z_]+)`", names)):
                if name in IN_WORDS:
                    continue
                values = [str(each.model_fields[name].default).lower() for each in classes]
                told = cell.split(" / ") if " / " in cell else 3 * [cell.split(", ")[place]]
                for value, words in zip(values, told, strict=True):
                    with self.subTest(name):
                        self.assertIn(words, {value, NOT_USED})


class TestCommands(unittest.TestCase):
    """The table of commands."""

    def test_every_command_has_a_test(self) -> None:
        """The table has exactly the commands, and a test runs each of them."""
        listed = re.findall(r"(?m)^  (\w+)", scratch.manage("--help").stdout)
        named = {
            word.split()[0] for row in rows("Commands") for word in re.findall("`([^`-]+)`", row[0])
        }

        self.assertEqual(set(listed), named)
        for command in named - {"test", "cov"}:  # they run the tests
            with self.subTest(command):
                self.assertTrue(re.search(rf'"{command}"', TESTS))


@unittest.skipUnless(shutil.which("curl"), "needs curl")
class TestFourCalls(unittest.TestCase):
    """The calls of the README, sent exactly as written."""

    def setUp(self) -> None:
        """Start the development server."""
        url = self.enterContext(scratch.database())
        self.port = scratch.free_port()
        self.log = self.enterContext(tempfile.NamedTemporaryFile("r"))
        server = subprocess.Popen(
            [sys.executable, "manage.py", "runserver", "--port", str(self.port)],
            cwd=scratch.ROOT,
            env=scratch.settings(DATABASE_URL=url, SECRET_KEY="any"),
            stdout=self.log.fileno(),
            stderr=subprocess.STDOUT,
        )
        self.addCleanup(server.wait, 10)
        self.addCleanup(server.terminate)
        self.assertEqual(0, scratch.manage("db", "upgrade", DATABASE_URL=url).returncode)
        deadline = time.monotonic() + scratch.START_TIMEOUT
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                time.sleep(0.05)

    def call(self, command: str, token: str) -> dict[str, Any]:
        """Return the response to a command of the README."""
        command = command.replace("127.0.0.1:5000", f"127.0.0.1:{self.port}")
        lines = [line for line in command.splitlines() if not line.startswith("TOKEN=")]
        script = f"TOKEN={token}\n" + "\n".join(lines)
        result = subprocess.run(
            ["bash", "-c", script],  # noqa: S607  # bash from PATH
            capture_output=True,
            text=True,
            check=True,
        )
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    def test_calls(self) -> None:
        """Each response is the one shown below the call, except for tokens and times."""
        blocks = BLOCK.findall(section("Four calls"))
        token, command = "", ""
        for kind, text in blocks:
            if kind == "sh":
                command = text
                status = command if "/auth/status" in command else ""
                continue
            if "session_ended" in text:
                status = next(one for _, one in blocks if "/auth/status" in one)
            answer = self.call(status or command, token)
            token = answer.get("auth_token", token)
            shown = json.loads(text)
            with self.subTest(command):
                self.assertEqual(set(shown), set(answer))
                for name in ("status", "message", "code"):
                    self.assertEqual(shown.get(name), answer.get(name))
                self.assertEqual(set(shown.get("data", ())), set(answer.get("data", ())))
        lines = Path(self.log.name).read_text().splitlines()
        logged = [line for line in lines if "HTTP" in line or "/auth" in line]
        self.assertEqual(5, len(logged), logged)  # one line for each call, none of Werkzeug
        self.assertEqual(4, sum(kind == "sh" for kind, _ in blocks))
        self.assertEqual(5, len(list(itertools.filterfalse(lambda one: one[0] == "sh", blocks))))
