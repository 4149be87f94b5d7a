"""Shared by the tests of the commands about tokens for other services."""

import secrets
import subprocess
from typing import ClassVar

from project.tests import scratch
from project.tests.api.oauth_case import ISSUER
from project.tests.base import BaseTestCase

ENCRYPTION_KEY = secrets.token_hex(32)
LIFETIME = 3_600  # seconds, of auth tokens


class IssuerTestCase(BaseTestCase):
    """A test of commands that have an issuer, and keys and database of the application."""

    environment: ClassVar[dict[str, str]] = {
        "ISSUER": ISSUER,
        "ENCRYPTION_KEYS": ENCRYPTION_KEY,
        "SECRET_KEY": secrets.token_hex(32),
        "TOKEN_EXPIRATION_DAYS": "0",
        "TOKEN_EXPIRATION_SECONDS": str(LIFETIME),
    }

    def manage(self, *arguments: str, **environment: str) -> list[str]:
        """Run a command, check that it succeeds, and return the lines that it prints."""
        result = self._run(arguments, environment)
        self.assertEqual((0, ""), (result.returncode, result.stderr))
        self.assertNotIn(ENCRYPTION_KEY, result.stdout)
        return result.stdout.splitlines()

    def assert_refused(self, words: str, *arguments: str, **environment: str) -> None:
        """Check that a command exits with 1 and one line with these words."""
        result = self._run(arguments, environment)
        self.assertEqual((1, ""), (result.returncode, result.stdout))
        (line,) = result.stderr.splitlines()
        self.assertIn(words, line)
        self.assertNotIn(ENCRYPTION_KEY, line)

    def _run(
        self, arguments: tuple[str, ...], environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        url = self.app.config["SQLALCHEMY_DATABASE_URI"]
        settings = {"APP_SETTINGS": "project.config.ProductionConfig", "DATABASE_URL": url}
        return scratch.manage(*arguments, **settings | self.environment | environment)
