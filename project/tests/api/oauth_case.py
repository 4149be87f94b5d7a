"""Shared by the tests of the routes for other services."""

import base64
import re
from typing import Any, ClassVar
from urllib.parse import urlencode

from werkzeug.test import TestResponse

from project import db, errors
from project.accounts import clients
from project.tests import scratch
from project.tests.base import BaseTestCase
from project.tests.rows import ORIGIN, add_user

ISSUER = "https://users.example"
AUDIENCE = "https://api.example"
FORM = "application/x-www-form-urlencoded"
INTROSPECT, REVOKE, TOKEN = "/oauth/introspect", "/oauth/revoke", "/oauth/token"
REVOCATIONS = "/oauth/revocations"
FORM_ROUTES = (INTROSPECT, REVOKE, TOKEN)
KEYS, METADATA = "/.well-known/jwks.json", "/.well-known/oauth-authorization-server"
LIFETIME = 3_600  # seconds, of auth tokens


def basic(name: str, secret: str) -> dict[str, str]:
    """Return the Authorization header of a client."""
    return {"Authorization": f"Basic {base64.b64encode(f'{name}:{secret}'.encode()).decode()}"}


def create_client(name: str, audience: str, scope: str = "", **environment: str) -> str:
    """Add a client with the command, under these settings, and return its secret."""
    arguments = name, "--audience", audience, "--scope", scope
    made = scratch.manage("create_client", *arguments, **environment)
    found = re.search(r"^Secret: +(\S+)$", made.stdout, re.MULTILINE)
    if not found:
        raise RuntimeError(made.stdout + made.stderr)
    return found[1]


class OAuthTestCase(BaseTestCase):
    """A test with an issuer, the client `orders` of its audience, and a user; the clock stops."""

    environment: ClassVar[dict[str, str]] = {"ISSUER": ISSUER, "TOKEN_AUDIENCE": AUDIENCE}
    settings: ClassVar[dict[str, Any]] = {"TOKEN_EXPIRATION_SECONDS": LIFETIME}

    def setUp(self) -> None:
        """Add the client and the user."""
        super().setUp()
        self.move_clock(0)
        self.user = add_user("ada", "ada@test.com", "test")
        self.orders = self.add_client("orders", scope=["stock.read", "stock.write"])

    def add_client(
        self, name: str, audience: str = AUDIENCE, scope: list[str] | None = None
    ) -> dict[str, str]:
        """Add a client, and return its Authorization header."""
        secret = clients.create(name, audience, scope or [], ORIGIN)
        db.session.commit()
        return basic(name, secret)

    def post(
        self, path: str, credentials: dict[str, str] | None = None, /, **form: str
    ) -> TestResponse:
        """Return the response to a form, by default from `orders`."""
        return self.post_raw(path, urlencode(form), credentials=credentials)

    def post_raw(
        self,
        path: str,
        body: str | bytes,
        content_type: str | None = FORM,
        credentials: dict[str, str] | None = None,
        ip: str = "192.0.2.7",
    ) -> TestResponse:
        """Return the response to a body as it is, by default from `orders`."""
        return self.client.post(
            path,
            data=body,
            content_type=content_type,
            headers=self.orders if credentials is None else credentials,
            environ_overrides={"REMOTE_ADDR": ip},
        )

    def start(self) -> dict[str, Any]:
        """Log in, and return the token pair."""
        pair: dict[str, Any] = self.login("ada@test.com").get_json()
        return pair

    def own_token(self, credentials: dict[str, str] | None = None) -> str:
        """Return a client's own token."""
        response = self.post(TOKEN, credentials, grant_type="client_credentials")
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        token: str = response.get_json()["access_token"]
        return token

    def introspect(self, token: str, credentials: dict[str, str] | None = None) -> dict[str, Any]:
        """Return what the service tells a client of a token."""
        response = self.post(INTROSPECT, credentials, token=token)
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        self.assertEqual("no-store", response.headers["Cache-Control"])
        answer: dict[str, Any] = response.get_json()
        return answer

    def assert_oauth_error(
        self, response: TestResponse, refusal: type[errors.ServiceError], error: str
    ) -> dict[str, Any]:
        """Check that a response is this error, with the `error` of RFC 6749; return its body."""
        data = self.assert_error(response, refusal)
        self.assertEqual(error, data["error"])
        self.assertEqual("no-store", response.headers["Cache-Control"])
        challenge = 'Basic realm="users"' if refusal is errors.InvalidClient else None
        self.assertEqual(challenge, response.headers.get("WWW-Authenticate"))
        return data
