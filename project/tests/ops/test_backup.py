"""Backup and restore with the commands in docs/operations.md."""

import os
import re
import shutil
import subprocess
import tempfile
import unittest

from sqlalchemy import make_url

from project.tests import scratch
from project.tests.scratch import ON_POSTGRESQL

OPERATIONS = (scratch.ROOT / "docs" / "operations.md").read_text()
KEY = "0123456789abcdefghijklmnopqrstuvwxyz"


@unittest.skipUnless(ON_POSTGRESQL and shutil.which("pg_dump"), "needs PostgreSQL and pg_dump")
class TestBackup(unittest.TestCase):
    """The document's own lines, executed."""

    def test_backup(self) -> None:
        """After a restore users log in again, and another SECRET_KEY ends every session."""
        url = self.enterContext(scratch.database())
        with scratch.Service(url, SECRET_KEY=KEY) as service:
            status, pair, _ = service.register("ada")
            self.assertEqual(201, status)
            folder = self.enterContext(tempfile.TemporaryDirectory())
            dump, restore = re.findall(r"^pg_(?:dump|restore) .*$", OPERATIONS, re.MULTILINE)
            self.run_line(dump, url, folder)
            for _ in range(2):  # into the unchanged database, and after a loss
                self.run_line(restore, url, folder)
                scratch.execute(url, "DELETE FROM users")
            self.run_line(restore, url, folder)
            self.assertEqual(200, service.login("ada")[0])
        with scratch.Service(url, SECRET_KEY=KEY[::-1]) as service:
            token = pair["auth_token"]
            status, answer, _ = service.request("GET", "/auth/status", token=token)
            self.assertEqual((401, "token_invalid"), (status, answer["code"]))

    def run_line(self, line: str, url: str, folder: str) -> None:
        """Run a line of the document in a folder, and check that it succeeds."""
        plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        result = subprocess.run(
            ["bash", "-c", line],  # noqa: S607  # whichever bash there is
            cwd=folder,
            env=os.environ | {"DATABASE_URL": plain},
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(0, result.returncode, result.stderr)
