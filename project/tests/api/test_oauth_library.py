"""The routes for other services, used by an OAuth library that knows nothing of this service."""

import secrets
import unittest
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

from project.tests import scratch
from project.tests.api.oauth_case import (
    AUDIENCE,
    INTROSPECT,
    ISSUER,
    KEYS,
    METADATA,
    REVOKE,
    TOKEN,
    create_client,
)
from project.tests.tokens.claims import claims_of

TIMEOUT = 20  # seconds


@unittest.skipUnless(find_spec("authlib"), "needs Authlib, a development dependency")
class TestAuthlib(unittest.TestCase):
    """Authlib as the client, without any adaptation."""

    service: ClassVar[scratch.Service]
    secret: ClassVar[str]

    @classmethod
    def setUpClass(cls) -> None:
        """Start the service, with a user and a client."""
        environment = {
            "ISSUER": ISSUER,
            "TOKEN_AUDIENCE": AUDIENCE,
            "ENCRYPTION_KEYS": secrets.token_hex(32),
            "SECRET_KEY": secrets.token_hex(32),
        }
        url = cls.enterClassContext(scratch.database())
        cls.service = cls.enterClassContext(scratch.Service(url, **environment))
        environment |= {"APP_SETTINGS": "project.config.ProductionConfig", "DATABASE_URL": url}
        cls.secret = create_client("orders", AUDIENCE, "stock.read stock.write", **environment)
        cls.service.register("ada")

    def setUp(self) -> None:
        """Make a client of the library, and log the user in."""
        requests_client: Any = import_module("authlib.integrations.requests_client")
        self.session = requests_client.OAuth2Session("orders", self.secret, default_timeout=TIMEOUT)
        self.addCleanup(self.session.close)
        self.oauth_error = requests_client.OAuthError
        _, self.pair, _ = self.service.login("ada")

    def url(self, path: str) -> str:
        """Return the URL of a path."""
        return f"http://127.0.0.1:{self.service.port}{path}"

    def fetch(self, path: str) -> dict[str, Any]:
        """Return the answer to a GET without authentication."""
        response = self.session.get(self.url(path), withhold_token=True)
        self.assertEqual(200, response.status_code)
        answer: dict[str, Any] = response.json()
        return answer

    def validator(self, audience: str = AUDIENCE) -> Any:
        """Return the library's validator of access tokens (RFC 9068), with the published keys."""
        module: Any = import_module("authlib.oauth2.rfc9068")
        keys = self.fetch(KEYS)

        class Validator(module.JWTBearerTokenValidator):  # type: ignore[misc]  # the base is Any
            """A validator with these keys."""

            def get_jwks(self) -> dict[str, Any]:
                """Return the published keys."""
                return keys

        return Validator(issuer=ISSUER, resource_server=audience)

    def test_own_token(self) -> None:
        """The library gets a token of the client's own, and sends it."""
        token = self.session.fetch_token(
            self.url(TOKEN), grant_type="client_credentials", scope="stock.read"
        )

        self.assertEqual(("Bearer", "stock.read"), (token["token_type"], token["scope"]))
        self.assertFalse(token.is_expired())
        claims = self.validator().authenticate_token(token["access_token"])
        self.assertEqual(("orders", "orders"), (claims["sub"], claims["client_id"]))
        self.validator().validate_token(claims, ["stock.read"], None)
        refused = self.session.get(self.url("/auth/status"))
        self.assertEqual((401, "token_invalid"), (refused.status_code, refused.json()["code"]))

    def test_refusals(self) -> None:
        """The library raises the errors of RFC 6749."""
        for error, arguments in (
            ("invalid_scope", {"grant_type": "client_credentials", "scope": "admin"}),
            ("unsupported_grant_type", {"grant_type": "password", "username": "a"}),
            ("invalid_client", {"grant_type": "client_credentials", "auth": ("orders", "wrong")}),
        ):
            with self.subTest(error), self.assertRaises(self.oauth_error) as raised:
                self.session.fetch_token(self.url(TOKEN), **arguments)
            self.assertEqual(error, raised.exception.error)

    def test_introspection_and_revocation(self) -> None:
        """The library asks about each token of a user, and ends their session."""
        tokens = {
            "access_token": self.pair["auth_token"],
            "refresh_token": self.pair["refresh_token"],
        }
        for hint, token in tokens.items():
            answer = self.session.introspect_token(self.url(INTROSPECT), token, hint)
            self.assertEqual((200, True), (answer.status_code, answer.json()["active"]))
            self.assertEqual("ada", answer.json()["username"])
        revoked = self.session.revoke_token(self.url(REVOKE), tokens["refresh_token"])
        self.assertEqual(200, revoked.status_code)
        for token in tokens.values():
            answer = self.session.introspect_token(self.url(INTROSPECT), token)
            self.assertEqual({"active": False}, answer.json())
        status, body, _ = self.service.request("GET", "/auth/status", token=tokens["access_token"])
        self.assertEqual((401, "session_ended"), (status, body["code"]))

    def test_verification(self) -> None:
        """The library verifies an auth token with the published keys, and its claims (RFC 9068)."""
        token = self.pair["auth_token"]
        claims = self.validator().authenticate_token(token)

        self.validator().validate_token(claims, None, None)
        self.assertEqual(claims_of(token), dict(claims))
        errors: Any = import_module("authlib.oauth2.rfc6750.errors")
        other = self.validator("https://other.example")
        with self.assertRaises(errors.InvalidTokenError):
            other.validate_token(other.authenticate_token(token), None, None)
        with self.assertRaises(errors.InsufficientScopeError):
            self.validator().validate_token(claims, ["admin"], None)
        # A refresh token is signed with a secret, which no published key is.
        with self.assertRaises(errors.InvalidTokenError):
            self.validator().authenticate_token(self.pair["refresh_token"])

    def test_joserfc(self) -> None:
        """A library for tokens finds the key by its `kid`."""
        jwk: Any = import_module("joserfc.jwk")
        jwt: Any = import_module("joserfc.jwt")
        keys = jwk.KeySet.import_key_set(self.fetch(KEYS))
        token = jwt.decode(self.pair["auth_token"], keys, algorithms=["ES256"])

        self.assertEqual("at+jwt", token.header["typ"])
        registry = jwt.JWTClaimsRegistry(
            iss={"essential": True, "value": ISSUER}, aud={"essential": True, "value": AUDIENCE}
        )
        registry.validate(token.claims)
        key = keys.get_by_kid(token.header["kid"])
        self.assertEqual(key.thumbprint(), token.header["kid"])

    def test_metadata(self) -> None:
        """The library accepts the metadata, except that it requires an authorization endpoint's.

        RFC 8414 requires `response_types_supported` (2), and forbids an empty list (3.2). There
        is no response type, because there is no authorization endpoint.
        """
        module: Any = import_module("authlib.oauth2.rfc8414")
        metadata = module.AuthorizationServerMetadata(self.fetch(METADATA))

        self.assertEqual(f"{ISSUER}{TOKEN}", metadata.token_endpoint)
        self.assertEqual(["client_secret_basic"], metadata.token_endpoint_auth_methods_supported)
        self.assertLessEqual(set(metadata), set(metadata.REGISTRY_KEYS))
        for name in set(metadata.REGISTRY_KEYS) - {"response_types_supported"}:
            with self.subTest(name):
                getattr(metadata, f"validate_{name}")()
        with self.assertRaisesRegex(ValueError, "response_types_supported"):
            metadata.validate()
