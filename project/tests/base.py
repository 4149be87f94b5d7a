"""The base of the tests: an application on a migrated database, and a client."""

import contextlib
import contextvars
import os
import unittest
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, ClassVar
from unittest import mock

import flask_migrate
from flask.testing import FlaskClient
from sqlalchemy import delete, text
from werkzeug.test import TestResponse

from project import UsersService, clock, create_app, db, errors
from project.tests.conformance import TESTING, conformance
from project.tests.rows import stored_sessions, stored_users

# What a view under /users itself refuses is a "fail" in the envelope; all other refusals, those of
# tokens and permissions under /users among them, are an "error".
FAILURES_OF_USERS = {
    errors.InvalidPayload,
    errors.EmailExists,
    errors.UserNotFound,
    errors.WrongPassword,
    errors.WrongCode,
    errors.TotpNotFound,
    errors.LastAdmin,
    errors.OwnAccount,
    errors.OwnTotp,
    errors.PreconditionFailed,
    errors.UsernameExists,
}


class Client(FlaskClient):
    """A test client that gives every request a context, and so a database session, of its own.

    A server does the same; Flask's own client shares the context that a test has pushed.
    Every response is checked against the API document.
    """

    def open(self, *args: Any, **kwargs: Any) -> TestResponse:
        """Return the response to a request; raise AssertionError when it is not documented."""
        if self.preserve_context:
            return super().open(*args, **kwargs)
        response = contextvars.Context().run(super().open, *args, **kwargs)
        request = response.request
        complaint = conformance().complaint(request.method, request.path, response)
        if complaint:
            raise AssertionError(complaint)
        return response


class BaseTestCase(unittest.TestCase):
    """A test that speaks HTTP to an application with a migrated and empty database."""

    settings: ClassVar[dict[str, Any]] = {}  # configuration that differs from TestingConfig
    environment: ClassVar[dict[str, str]] = {}  # variables that the application is created with
    app: UsersService
    client: FlaskClient
    _migrated: ClassVar[set[str]] = set()

    def setUp(self) -> None:
        """Empty the database, push a context for direct use of the models, make a client."""
        conformance()  # made here, as it changes the environment, and requests may run in threads
        with mock.patch.dict(os.environ, self.environment):
            self.app = create_app(TESTING)
        self.app.config.update(self.settings)
        context = self.app.app_context()
        context.push()
        self.addCleanup(context.pop)
        self.addCleanup(self._close_database)
        self._migrate_once()
        for table in reversed(db.metadata.sorted_tables):
            db.session.execute(delete(table))
        if not self.on_postgresql:
            # After a test that uses the highest id, SQLite would have no id for the next one.
            db.session.execute(text("DELETE FROM sqlite_sequence"))
        db.session.commit()
        self.app.test_client_class = Client
        self.client = self.app.test_client()

    def _migrate_once(self) -> None:
        """Create the schema through the migrations, once per run and database."""
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
        """True when the tests run on PostgreSQL."""
        return db.engine.dialect.name == "postgresql"

    def move_clock(self, seconds: float) -> None:
        """Set the clock `seconds` ahead and stop it there for the rest of the test."""
        moment = clock.utcnow() + timedelta(seconds=seconds)
        patcher = mock.patch("project.clock.utcnow", return_value=moment)
        patcher.start()
        self.addCleanup(patcher.stop)

    def register(
        self, username: str = "test", email: str = "test@test.com", password: str = "test"
    ) -> str:
        """Register a user over HTTP and return the auth token."""
        response = self.client.post(
            "/auth/register", json={"username": username, "email": email, "password": password}
        )
        self.assertEqual(201, response.status_code, response.get_data(as_text=True))
        token: str = response.get_json()["auth_token"]
        return token

    def login(self, email: str = "test@test.com", password: str = "test") -> TestResponse:
        """Return the response to a login."""
        return self.client.post("/auth/login", json={"email": email, "password": password})

    def get(self, path: str, token: str | None = None) -> TestResponse:
        """Return the response to a GET, with or without a token."""
        return self.client.get(path, headers=bearer(token) if token else {})

    @contextlib.contextmanager
    def assert_nothing_changes(self) -> Iterator[None]:
        """Check that the block changes no user and no session."""
        before = stored_users(), stored_sessions()
        yield
        self.assertEqual(before, (stored_users(), stored_sessions()))

    def assert_error(
        self, response: TestResponse, error: type[errors.ServiceError]
    ) -> dict[str, Any]:
        """Check that the response is this error, and return its parsed body.

        Status, message and code come from the class; contract/test_error_catalogue.py lists them
        all. "status" in the body is "fail" or "error", by the rule of FAILURES_OF_USERS.
        """
        data: dict[str, Any] = response.get_json()
        under_users = response.request.path.startswith("/users")
        word = "fail" if under_users and error in FAILURES_OF_USERS else "error"

        self.assertEqual(error.status, response.status_code, data)
        self.assertEqual("application/json", response.content_type)
        self.assertEqual(
            {"status": word, "message": error.message, "code": error.code},
            {key: data.get(key) for key in ("status", "message", "code")},
        )
        return data


def bearer(token: str) -> dict[str, str]:
    """Return the Authorization header for a token."""
    return {"Authorization": f"Bearer {token}"}
