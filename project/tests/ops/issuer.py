"""The base of tests of the commands about keys and clients."""

import secrets
from typing import Any, ClassVar

from sqlalchemy import text

from project import db
from project.tests import scratch
from project.tests.lib.cases import ScratchTestCase

ISSUER = "https://users.example"
SECRET_KEY, ENCRYPTION_KEY = secrets.token_hex(32), secrets.token_hex(32)
SETTINGS = {
    "ISSUER": ISSUER,
    "ENCRYPTION_KEYS": ENCRYPTION_KEY,
    "SECRET_KEY": SECRET_KEY,
    "TOKEN_EXPIRATION_DAYS": "0",
    "TOKEN_EXPIRATION_SECONDS": "3600",
}
PRODUCTION = {"APP_SETTINGS": "project.config.ProductionConfig"}


class IssuerTestCase(ScratchTestCase):
    """A test with an application with ISSUER, and commands on the database of it."""

    environment: ClassVar = SETTINGS

    def manage(self, *arguments: str, **environment: str) -> str:
        """Run a command in production, check that it succeeds, and return what it printed."""
        settings = PRODUCTION | SETTINGS | {"DATABASE_URL": self.url} | environment
        result = scratch.manage(*arguments, **settings)
        self.assertEqual((0, ""), (result.returncode, result.stderr))
        return result.stdout

    def assert_refused(self, reason: str, *arguments: str, **environment: str) -> None:
        """Check that a command exits with 1 and gives the reason in one line on stderr."""
        settings = PRODUCTION | SETTINGS | {"DATABASE_URL": self.url} | environment
        result = scratch.manage(*arguments, **settings)
        self.assertEqual((1, ""), (result.returncode, result.stdout), arguments)
        self.assertRegex(result.stderr, rf"\A[^\n]*{reason}[^\n]*\n\Z")

    def execute(self, statement: str, **parameters: Any) -> list[Any]:
        """Execute a statement on the database, and return its rows if it has any."""
        with db.engine.begin() as connection:
            result = connection.execute(text(statement), parameters)
            return list(result) if result.returns_rows else []
