"""What the tests have in common: an application on a real database, and a client."""

import contextvars
import unittest
from datetime import timedelta
from typing import Any, ClassVar
from unittest import mock

import flask_migrate
from flask.testing import FlaskClient
from sqlalchemy import delete, text
from werkzeug.test import TestResponse

from project import UsersService, clock, create_app, db
from project.api.models import Erasure, Event, KnownAddress, Throttle, User
from project.tests.conformance import TESTING, conformance


class Client(FlaskClient):
    """A client each of whose requests has a context, and so a database session, of its own.

    That is how a server runs them; Flask's own client shares the context that a test has pushed.
    Every answer has to be one that the document of the API has.
    """

    def open(self, *args: Any, **kwargs: Any) -> TestResponse:
        """Return the answer to a request; raises AssertionError when it is not documented."""
        if self.preserve_context:
            return super().open(*args, **kwargs)
        response = contextvars.Context().run(super().open, *args, **kwargs)
        request = response.request
        complaint = conformance().complaint(request.method, request.path, response)
        if complaint:
            raise AssertionError(complaint)
        return response


class BaseTestCase(unittest.TestCase):
    """A test that speaks HTTP to an application whose database is migrated and empty."""

    settings: ClassVar[dict[str, Any]] = {}  # configuration that differs from TestingConfig
    app: UsersService
    client: FlaskClient
    _migrated: ClassVar[set[str]] = set()

    def setUp(self) -> None:
        """Empty the database, push a context for direct use of the models, make a client."""
        self.app = create_app(TESTING)
        self.app.config.update(self.settings)
        context = self.app.app_context()
        context.push()
        self.addCleanup(context.pop)
        self.addCleanup(self._close_database)
        self._migrate_once()
        for table in (User, Throttle, KnownAddress, Event, Erasure):
            db.session.execute(delete(table))
        if not self.on_postgresql:
            # Here a test that takes the highest id would leave none to the next.
            db.session.execute(text("DELETE FROM sqlite_sequence"))
        db.session.commit()
        self.app.test_client_class = Client
        self.client = self.app.test_client()

    def _migrate_once(self) -> None:
        """Make the schema through the migrations, once a run and database."""
        url = self.app.config["SQLALCHEMY_DATABASE_URI"]
        if url not in self._migrated:
            flask_migrate.downgrade(revision="base")
            flask_migrate.upgrade()
            self._migrated.add(url)

    def _close_database(self) -> None:
        db.session.remove()
        for engine in db.engines.values():
            engine.dispose()

    @property
    def on_postgresql(self) -> bool:
        """Whether the tests run on PostgreSQL."""
        return db.engine.dialect.name == "postgresql"

    def move_clock(self, seconds: float) -> None:
        """Let it be `seconds` later than it is, for the rest of the test."""
        moment = clock.utcnow() + timedelta(seconds=seconds)
        patcher = mock.patch("project.clock.utcnow", return_value=moment)
        patcher.start()
        self.addCleanup(patcher.stop)

    def register(
        self, username: str = "test", email: str = "test@test.com", password: str = "test"
    ) -> str:
        """Register a user over HTTP and return their token."""
        response = self.client.post(
            "/auth/register", json={"username": username, "email": email, "password": password}
        )
        self.assertEqual(201, response.status_code, response.get_data(as_text=True))
        token: str = response.get_json()["auth_token"]
        return token

    def login(self, email: str = "test@test.com", password: str = "test") -> TestResponse:
        """Return the answer to a login."""
        return self.client.post("/auth/login", json={"email": email, "password": password})

    def get(self, path: str, token: str | None = None) -> TestResponse:
        """Return the answer to a GET, with a token or without."""
        return self.client.get(path, headers=bearer(token) if token else {})

    def assert_error(
        self,
        response: TestResponse,
        status: int,
        message: str,
        code: str,
        word: str = "error",
    ) -> dict[str, Any]:
        """Check the envelope of a refusal to the letter, and return it."""
        data: dict[str, Any] = response.get_json()
        self.assertEqual(status, response.status_code, data)
        self.assertEqual("application/json", response.content_type)
        self.assertEqual(
            {"status": word, "message": message, "code": code},
            {key: data.get(key) for key in ("status", "message", "code")},
        )
        return data


def bearer(token: str) -> dict[str, str]:
    """Return the header that carries a token."""
    return {"Authorization": f"Bearer {token}"}
