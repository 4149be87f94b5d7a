"""Going back to an older version: it serves on the schema of a newer one."""

import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path

from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

from project.config import database_url
from project.extensions import MIGRATIONS
from project.tests import scratch
from project.tests.scratch import Service

PRODUCTION = "project.config.ProductionConfig"
KEY = "an old and a new server have the same key"
# What a user does, in the application of the older version.
VISIT = """
import json
from project import create_app
client = create_app().test_client()
user = {"username": "old", "email": "old@test.com", "password": "correct horse battery"}
answers = [client.get("/health/ready"), client.post("/auth/register", json=user)]
del user["username"]
answers.append(client.post("/auth/login", json=user))
pair = answers[-1].get_json()
bearer = {"Authorization": "Bearer " + pair["auth_token"]}
answers.append(client.get("/auth/status", headers=bearer))
answers.append(client.post("/auth/refresh", json={"refresh_token": pair["refresh_token"]}))
answers.append(client.get("/auth/logout", headers=bearer))
print(json.dumps([answer.status_code for answer in answers]))
"""


class TestGoingBack(unittest.TestCase):
    """A database that newer code has migrated."""

    def setUp(self) -> None:
        """Create a database with the present schema."""
        self.url = self.enterContext(scratch.database())
        self.environment = {
            "APP_SETTINGS": PRODUCTION,
            "DATABASE_URL": self.url,
            "SECRET_KEY": KEY,
            "BCRYPT_LOG_ROUNDS": "4",
        }
        self.manage("db", "upgrade")

    def manage(self, *arguments: str, code: int = 0) -> str:
        """Run a command, check its exit code, and return what it prints."""
        result = scratch.manage(*arguments, **self.environment)
        printed = result.stdout + result.stderr
        self.assertEqual(code, result.returncode, printed)
        return printed

    def execute(self, *statements: str) -> None:
        """Execute statements in one transaction."""
        engine = create_engine(database_url(self.url))
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))
        engine.dispose()

    def migrate_further(self) -> None:
        """Do what a later migration may do: it adds what this code does not know."""
        self.execute(
            "UPDATE alembic_version SET version_num = '9999'",
            "CREATE TABLE later (id integer PRIMARY KEY)",
            "ALTER TABLE users ADD COLUMN later integer",
            "ALTER TABLE sessions ADD COLUMN later varchar(9) NOT NULL DEFAULT ''",
            "CREATE INDEX users_later_idx ON users (later)",
        )

    def test_serve(self) -> None:
        """`serve` starts on a newer schema, says so, and leaves the schema as it is."""
        self.migrate_further()

        with Service(self.url) as service:
            self.assertEqual(201, service.register("user")[0])
            self.assertEqual(200, service.login("user")[0])
            self.assertEqual(200, service.request("GET", "/health/ready")[0])

        self.assertIn('"event":"schema_is_newer"', service.log)
        self.assertIn("schema_is_newer", self.manage("db", "upgrade"))

    def test_unusable(self) -> None:
        """`serve` and `db upgrade` end with a sentence if a column that they need is gone."""
        self.migrate_further()
        self.execute("ALTER TABLE users RENAME COLUMN roles TO scopes")

        for command in ("serve", "db upgrade"):
            with self.subTest(command):
                printed = self.manage(*command.split(), code=1)
                self.assertIn("The database is at a migration that", printed.splitlines()[-1])
                self.assertNotIn("Traceback", printed)

    def test_version_before(self) -> None:
        """The last code that did not know the newest migration serves on the present schema."""
        script = ScriptDirectory(str(MIGRATIONS)).get_revision("head")
        added = git("log", "--diff-filter=A", "--max-count=1", "--format=%H", "--", script.path)
        before = f"{added.decode().strip()}^"
        if not added or not git("rev-parse", "--verify", "--quiet", before):
            self.skipTest("the git history does not have the version before the newest migration")
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(fileobj=io.BytesIO(git("archive", before))) as archive:
                archive.extractall(folder, filter="data")
            self.assertFalse(Path(folder, "migrations/versions", Path(script.path).name).exists())

            result = subprocess.run(
                [sys.executable, "-c", VISIT],
                cwd=folder,
                env=scratch.settings(**self.environment),
                capture_output=True,
                text=True,
                check=False,
            )

        self.assertEqual(0, result.returncode, result.stderr)
        statuses = re.findall(r"^\[.*\]$", result.stdout, re.MULTILINE)[-1]
        self.assertEqual([200, 201, 200, 200, 200, 200], json.loads(statuses))


def git(*arguments: str) -> bytes:
    """Return the output of git in this repository; nothing if it fails or is not there."""
    try:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=scratch.ROOT, capture_output=True, check=False).stdout
    except FileNotFoundError:
        return b""
