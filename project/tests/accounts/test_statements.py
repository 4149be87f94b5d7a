"""The statements that a login and a registration send to PostgreSQL, in order."""

import os
import re
from collections.abc import Callable
from itertools import count
from typing import Any, ClassVar

from sqlalchemy import make_url
from werkzeug.test import TestResponse

from project import db
from project.accounts import rate_limits
from project.tests import scratch
from project.tests.accounts.second_factor_case import stored
from project.tests.lib.cases import ProxiedDatabaseTestCase

COUNT = "INSERT INTO throttles"
CREDENTIALS = "SELECT users"
PING = "SELECT 1"  # of a connection that the pool hands out
TRANSACTION = [PING, "BEGIN"]
_BEGINNING = re.compile(r"SELECT 1|(INSERT INTO |DELETE FROM |UPDATE |SELECT )?\w+")
_PREPARE = re.compile(r"PREPARE (\w+) AS ([^\0]+)")
_EXECUTE = re.compile(r"^EXECUTE (\w+)")


class TestStatements(ProxiedDatabaseTestCase):
    """Each statement is a round trip, which costs processor time on both sides."""

    settings: ClassVar[dict[str, Any]] = {"RATE_LIMITS": True}

    def setUp(self) -> None:
        """Count attempts."""
        super().setUp()
        rate_limits.init_app(self.app)

    def assert_sent(self, expected: list[str], request: Callable[[], TestResponse]) -> None:
        """Check how the statements of a successful request begin."""
        request()
        sent = "\0".join(self.proxy.statements)
        prepared = dict(_PREPARE.findall(sent))
        statements = self.statements(lambda: self.assertLess(request().status_code, 300))

        texts = [_EXECUTE.sub(lambda name: prepared[name[1]], each) for each in statements]
        found = [_BEGINNING.match(text) for text in texts]
        self.assertEqual(expected, [match[0] for match in found if match], statements)

    def test_login(self) -> None:
        """A login at an address where the user is known is one statement, one query, one commit."""
        self.register()

        self.assert_sent(
            [
                COUNT,
                CREDENTIALS,
                *TRANSACTION,
                "INSERT INTO sessions",
                "INSERT INTO events",
                "DELETE FROM throttles",
                "INSERT INTO known_addresses",
                "COMMIT",
            ],
            self.login,
        )

    def test_login_elsewhere(self) -> None:
        """A login at another address is counted for the address and for the account."""
        self.register()
        addresses = count(1)

        def log_in() -> TestResponse:
            return self.client.post(
                "/auth/login",
                json={"email": "test@test.com", "password": "test"},
                environ_overrides={"REMOTE_ADDR": f"192.0.2.{next(addresses)}"},
            )

        self.assert_sent(
            [
                # At this address the user is not known, and not paused either.
                *[COUNT, "SELECT throttles", COUNT, COUNT],
                CREDENTIALS,
                *TRANSACTION,
                "INSERT INTO sessions",
                "INSERT INTO events",
                "UPDATE throttles",
                "DELETE FROM throttles",
                "INSERT INTO known_addresses",
                "COMMIT",
            ],
            log_in,
        )

    def test_register(self) -> None:
        """A registration is one statement and one transaction."""
        names = map("user{}".format, count())

        self.assert_sent(
            [
                COUNT,
                *TRANSACTION,
                "INSERT INTO users",
                "INSERT INTO sessions",
                "INSERT INTO events",
                "INSERT INTO known_addresses",
                "COMMIT",
            ],
            lambda: self.add(next(names)),
        )

    def test_cancelled(self) -> None:
        """A login that PostgreSQL cancels is repeated, and what was counted twice is given back."""
        self.register()
        scratch.execute(
            self.url,
            """CREATE SEQUENCE logins;
            CREATE FUNCTION cancel() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN IF nextval('logins') = 1 THEN RAISE 'no' USING ERRCODE = '40P01'; END IF;
            RETURN NEW; END $$;
            CREATE TRIGGER cancel BEFORE INSERT ON sessions
            FOR EACH ROW EXECUTE FUNCTION cancel()""",
        )

        self.assertEqual(200, self.login().status_code)
        self.assertEqual({"register:127.0.0.1"}, {row["key"] for row in stored()["throttles"]})

    def test_read_only(self) -> None:
        """A count that cannot be stored is a 503, and the connection is not used again."""
        self.register()
        setting = f"ALTER DATABASE {make_url(self.url).database} SET default_transaction_read_only"
        scratch.execute(os.environ["DATABASE_TEST_URL"], f"{setting} = on")
        for engine in db.engines.values():
            engine.dispose()
        self.assert_unavailable(self.login())

        scratch.execute(os.environ["DATABASE_TEST_URL"], f"{setting} = off")
        self.assertEqual(200, self.login().status_code)
