"""Shared by the tests of tokens for other services: an issuer with a user and clients."""

import os
from typing import Any, ClassVar
from unittest import mock

from flask.testing import FlaskClient
from sqlalchemy import select
from werkzeug.test import TestResponse

from project import create_app, db, errors
from project.accounts import clients
from project.lib import database
from project.models import EndedSession, SigningKey
from project.tests.accounts.cases import CREDENTIALS, SessionsTestCase
from project.tests.api.oauth_case import ISSUER, basic
from project.tests.base import Client, bearer
from project.tests.conformance import TESTING
from project.tests.rows import ORIGIN

LIFETIME = 1_200  # seconds, of auth tokens
# The same for all servers of a test; without ISSUER they are those of any service.
SECRETS = {"SECRET_KEY": "signs links and refresh tokens 0", "ENCRYPTION_KEYS": "encrypts." * 5}
Pair = dict[str, Any]  # the answer to a login or a refresh


class IssuerTestCase(SessionsTestCase):
    """A test of a service with an issuer, two users and a stopped clock."""

    environment: ClassVar[dict[str, str]] = SECRETS | {"ISSUER": ISSUER}
    settings: ClassVar[dict[str, Any]] = {"TOKEN_EXPIRATION_SECONDS": LIFETIME}

    def server(self, **environment: str) -> FlaskClient:
        """Return a client of another server on the same database."""
        variables = self.environment | environment
        with mock.patch.dict(os.environ, variables):
            app = create_app(TESTING)
        app.config.update(self.settings)
        app.test_client_class = Client
        with app.app_context():
            for engine in db.engines.values():
                self.addCleanup(engine.dispose)
        return app.test_client()

    def add_client(self, name: str = "orders", audience: str = ISSUER) -> dict[str, str]:
        """Add a client, and return the header with which it authenticates."""
        secret = clients.create(name, audience, ["read", "write"], ORIGIN)
        db.session.commit()
        return basic(name, secret)

    def log_in(self, server: FlaskClient | None = None) -> Pair:
        """Return the tokens of a new session."""
        return self.accepted((server or self.client).post("/auth/login", json=CREDENTIALS))

    def refresh(self, pair: Pair, server: FlaskClient | None = None) -> TestResponse:
        """Return the response to a refresh token."""
        body = {"refresh_token": pair["refresh_token"]}
        return (server or self.client).post("/auth/refresh", json=body)

    def status(self, token: str, server: FlaskClient | None = None) -> TestResponse:
        """Return the response to an auth token."""
        return (server or self.client).get("/auth/status", headers=bearer(token))

    def accepted(self, response: TestResponse) -> Pair:
        """Check that a response is a success, and return its body."""
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        answer: Pair = response.get_json()
        return answer

    def assert_invalid(self, token: str, server: FlaskClient | None = None) -> None:
        """Check that a token is refused as invalid."""
        self.assert_error(self.status(token, server), errors.TokenInvalid)

    def kids(self, server: FlaskClient | None = None) -> list[str]:
        """Return the `kid` of each published key."""
        keys = self.accepted((server or self.client).get("/.well-known/jwks.json"))["keys"]
        return [key["kid"] for key in keys]


def stored_keys() -> list[dict[str, Any]]:
    """Return every column of every committed signing key, the oldest first."""
    table = SigningKey.__table__
    order = table.c.signs_from, table.c.kid
    return [row._asdict() for row in database.fetch_all(select(table).order_by(*order))]


def stored_ended() -> list[dict[str, Any]]:
    """Return every column of every committed row of the feed of ended sessions."""
    table = EndedSession.__table__
    order = table.c.ended_at, table.c.session_id
    return [row._asdict() for row in database.fetch_all(select(table).order_by(*order))]
