"""Tests with a database of their own, reached directly or through a proxy that can fail."""

import os
import unittest
from collections.abc import Callable
from unittest import mock

from sqlalchemy import make_url
from werkzeug.test import TestResponse

from bench.pgproxy import PostgresProxy
from project import errors
from project.tests import scratch
from project.tests.base import BaseTestCase
from project.tests.scratch import ON_POSTGRESQL


class ScratchTestCase(BaseTestCase):
    """A test with a database of its own."""

    def setUp(self) -> None:
        """Create the database, and the application on it."""
        scratched = scratch.database()
        self.url = scratched.__enter__()
        self.addCleanup(scratched.__exit__, None, None, None)
        with mock.patch.dict(os.environ, {"DATABASE_TEST_URL": self.reach(self.url)}):
            super().setUp()

    def reach(self, url: str) -> str:
        """Return the URL by which the application reaches the database."""
        return url

    def assert_unavailable(self, response: TestResponse) -> None:
        """Check that a response is DatabaseUnavailable and has Retry-After."""
        self.assert_error(response, errors.DatabaseUnavailable)
        self.assertGreater(int(response.headers["Retry-After"]), 0)

    def add(self, name: str) -> TestResponse:
        """Return the response to a registration."""
        user = {"username": name, "email": f"{name}@test.com", "password": "test"}
        return self.client.post("/auth/register", json=user)


@unittest.skipUnless(ON_POSTGRESQL, "needs a PostgreSQL server")
class ProxiedDatabaseTestCase(ScratchTestCase):
    """A test with PostgreSQL behind a proxy that records statements, hangs and disconnects."""

    def reach(self, url: str) -> str:
        """Start the proxy, and return the URL that goes through it."""
        address = make_url(url)
        self.proxy = PostgresProxy(address.host or "127.0.0.1", address.port or 5432)
        self.proxy.__enter__()
        self.addCleanup(self.proxy.__exit__, None, None, None)
        proxied = address.set(host="127.0.0.1", port=self.proxy.port)
        return proxied.render_as_string(hide_password=False)

    def statements(self, call: Callable[[], object]) -> list[str]:
        """Return the statements that a call sends, once connections and caches are warm."""
        call()
        self.proxy.clear()
        call()
        return self.proxy.statements
