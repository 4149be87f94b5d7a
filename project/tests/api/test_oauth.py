"""Tokens for other services, and what they need to verify those of users."""

import base64
from datetime import timedelta
from typing import Any, ClassVar
from unittest import mock

import jwt
from flask.testing import FlaskClient
from sqlalchemy.exc import OperationalError
from werkzeug.test import TestResponse

from project import db, errors
from project.accounts import clients, rate_limits
from project.api import openapi
from project.tests.api.oauth_case import (
    AUDIENCE,
    FORM,
    FORM_ROUTES,
    INTROSPECT,
    ISSUER,
    KEYS,
    METADATA,
    REVOCATIONS,
    REVOKE,
    TOKEN,
    OAuthTestCase,
    basic,
)
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import ORIGIN, stored_events
from project.tests.tokens.claims import claims_of
from project.tokens import signing_keys

INACTIVE = {"active": False}


def encoded(text: bytes) -> dict[str, str]:
    """Return an Authorization header with these bytes, in base64."""
    return {"Authorization": f"Basic {base64.b64encode(text).decode()}"}


class TestClientAuthentication(OAuthTestCase):
    """A client authenticates with its name and secret."""

    def ask(self, credentials: dict[str, str]) -> list[TestResponse]:
        """Return the responses of every route to these credentials."""
        posted = [self.post(path, credentials, token="x") for path in FORM_ROUTES]
        return [*posted, self.client.get(REVOCATIONS, headers=credentials)]

    def assert_refused(self, credentials: dict[str, str]) -> None:
        """Check that every route refuses these credentials."""
        for response in self.ask(credentials):
            self.assert_oauth_error(response, errors.InvalidClient, "invalid_client")

    def assert_accepted(self, credentials: dict[str, str]) -> None:
        """Check that a client is known by these credentials."""
        self.assertEqual(INACTIVE, self.introspect("x", credentials))

    def test_header(self) -> None:
        """Only a Basic header with the right secret is accepted; the scheme has any case."""
        secret = base64.b64decode(self.orders["Authorization"].split()[1]).decode().split(":")[1]
        scheme = {"Authorization": self.orders["Authorization"].replace("Basic", "bAsIc")}
        self.assert_accepted(scheme)
        token = self.start()["auth_token"]
        for name, credentials in {
            "none": {},
            "Bearer": bearer(token),
            "no base64": {"Authorization": "Basic :::"},
            "no padding": {"Authorization": "Basic a"},
            "no parameters": {"Authorization": "Basic"},
            "not UTF-8": encoded(b"orders:\xff"),
            "no colon": encoded(b"orders"),
            "no secret": basic("orders", ""),
            "wrong secret": basic("orders", secret[:-1]),
            "secret of another": basic("invoices", secret),
            "unknown client": basic("nobody", secret),
            "not a name": basic("orders\0", secret),
            "another case": basic("Orders", secret),
            "first-party": basic("first-party", ""),
            "another scheme": {"Authorization": f"Digest username=orders,secret={secret}"},
        }.items():
            with self.subTest(name):
                if name == "secret of another":
                    self.add_client("invoices")
                self.assert_refused(credentials)

    def test_secret_in_the_body(self) -> None:
        """A secret in the body is ignored: it would be in logs of bodies."""
        secret = self.add_client("invoices")["Authorization"]
        response = self.post(INTROSPECT, {}, token="x", client_id="invoices", client_secret=secret)

        self.assert_oauth_error(response, errors.InvalidClient, "invalid_client")

    def test_disabled(self) -> None:
        """A disabled client is refused at once, and so are its tokens."""
        invoices = self.add_client("invoices")
        token = self.own_token(invoices)
        clients.disable("invoices", ORIGIN)
        db.session.commit()

        self.assert_refused(invoices)
        self.assertEqual(INACTIVE, self.introspect(token))

    def test_rotated_secret(self) -> None:
        """After a rotation both secrets are accepted for a while, and then the new one."""
        secret = clients.rotate_secret("orders", ORIGIN, keep=timedelta(hours=1))
        db.session.commit()
        new = basic("orders", secret)
        for credentials in (self.orders, new):
            self.assert_accepted(credentials)
        self.move_clock(3_599)
        self.assert_accepted(self.orders)
        self.move_clock(1)
        self.assert_refused(self.orders)
        self.assert_accepted(new)

    def test_events(self) -> None:
        """What happens to a client is recorded, and so is each refusal with its reason."""
        clients.rotate_secret("orders", ORIGIN, keep=timedelta())
        clients.disable("orders", ORIGIN)
        db.session.commit()
        self.post(INTROSPECT, basic("orders", "wrong"), token="x")
        self.post(INTROSPECT, basic("nobody", "wrong"), token="x")
        disabled = clients.create("invoices", AUDIENCE, [], ORIGIN)
        clients.disable("invoices", ORIGIN)
        db.session.commit()
        self.post(INTROSPECT, basic("invoices", disabled), token="x")

        orders, invoices = {"client": "orders"}, {"client": "invoices"}
        recorded = [(event["kind"], event["details"]) for event in stored_events()]
        self.assertEqual(
            [
                ("client_added", orders),
                ("client_secret_rotated", orders),
                ("client_disabled", orders),
                ("client_refused", {"why": "wrong_secret", "pause": 0, **orders}),
                ("client_refused", {"why": "unknown_client", "pause": 0}),
                ("client_added", invoices),
                ("client_disabled", invoices),
                ("client_refused", {"why": "client_disabled", "pause": 0, **invoices}),
            ],
            recorded,
        )


class TestGuesses(OAuthTestCase):
    """Wrong secrets are limited."""

    settings: ClassVar[dict[str, Any]] = OAuthTestCase.settings | {
        "RATE_LIMITS": True,
        "LOGIN_FAILURES_PER_ACCOUNT": 3,
        "LOGIN_FAILURES_PER_ADDRESS": 5,
    }

    def setUp(self) -> None:
        """Limit requests."""
        super().setUp()
        rate_limits.init_app(self.app)

    def guess(self, name: str = "orders", ip: str = "192.0.2.7") -> TestResponse:
        """Return the response to a wrong secret."""
        return self.post_raw(INTROSPECT, "token=x", credentials=basic(name, "wrong"), ip=ip)

    def assert_limited(self, response: TestResponse, seconds: int) -> None:
        """Check that a response is a 429 with this Retry-After."""
        self.assert_oauth_error(response, errors.TooManyAttempts, "temporarily_unavailable")
        self.assertEqual(str(seconds), response.headers["Retry-After"])

    def test_client(self) -> None:
        """Wrong secrets for one client are limited at all addresses; the right one is not."""
        for number in range(3):
            refused = self.guess(ip=f"192.0.2.{number}")
            self.assert_oauth_error(refused, errors.InvalidClient, "invalid_client")
        self.assert_limited(self.guess(ip="198.51.100.1"), 60)

        self.assertEqual(INACTIVE, self.introspect("x"))
        other = self.guess("invoices", ip="198.51.100.2")
        self.assert_oauth_error(other, errors.InvalidClient, "invalid_client")
        self.move_clock(60)
        again = self.guess(ip="198.51.100.1")
        self.assert_oauth_error(again, errors.InvalidClient, "invalid_client")
        self.assert_limited(self.guess(ip="198.51.100.1"), 120)

    def test_address(self) -> None:
        """Wrong secrets from one address are limited for all clients; the right one is not."""
        for number in range(5):
            refused = self.guess(f"client-{number}")
            self.assert_oauth_error(refused, errors.InvalidClient, "invalid_client")
        self.assert_limited(self.guess("another"), 900)

        self.assertEqual(INACTIVE, self.introspect("x"))
        self.assertEqual(200, self.login("ada@test.com").status_code)
        elsewhere = self.guess("another", ip="198.51.100.1")
        self.assert_oauth_error(elsewhere, errors.InvalidClient, "invalid_client")

    def test_pause_is_recorded(self) -> None:
        """The refusal that starts a pause records its length; refusals during it are no events."""
        for _ in range(4):
            self.guess()

        refused = [each["details"] for each in stored_events() if each["kind"] == "client_refused"]
        self.assertEqual([0, 0, 60], [details["pause"] for details in refused])


class TestForms(OAuthTestCase):
    """A body is a form."""

    def assert_invalid(self, response: TestResponse, *fields: str) -> None:
        """Check that a response names these fields as invalid."""
        data = self.assert_oauth_error(response, errors.InvalidPayload, "invalid_request")
        self.assertEqual(list(fields), list(data["errors"]))

    def test_refused(self) -> None:
        """A body that is no form, or repeats a parameter, is refused."""
        valid = "token=x&grant_type=client_credentials"
        bodies: dict[str, tuple[str | bytes, str | None]] = {
            "JSON": ('{"token":"x","grant_type":"client_credentials"}', "application/json"),
            "a form called JSON": (valid, "application/json"),
            "text": (valid, "text/plain"),
            "multipart": (valid, "multipart/form-data; boundary=x"),
            "no type": (valid, None),
            "not ASCII": (valid.encode() + b"&a=\xff", FORM),
            "not UTF-8": (f"{valid}&a=%ff", FORM),
            "repeated": (f"{valid}&{valid}", FORM),
            "repeated unknown": (f"{valid}&a=1&a=2", FORM),
        }
        for path in FORM_ROUTES:
            for name, (body, kind) in bodies.items():
                with self.subTest(name, path=path):
                    self.assert_invalid(self.post_raw(path, body, kind), "body")

    def test_missing(self) -> None:
        """A missing parameter is named; an empty one counts as missing."""
        for path, name in ((TOKEN, "grant_type"), (INTROSPECT, "token"), (REVOKE, "token")):
            for body in ("", f"{name}=", f"{name}", "a=1"):
                with self.subTest(path, body=body):
                    self.assert_invalid(self.post_raw(path, body), name)

    def test_large(self) -> None:
        """A body of more than 64 KiB is refused."""
        for path in FORM_ROUTES:
            response = self.post_raw(path, "token=" + "x" * 70_000)

            self.assert_oauth_error(response, errors.PayloadTooLarge, "invalid_request")

    def test_accepted(self) -> None:
        """Charset, percent-encoding, unknown and empty parameters do no harm."""
        token = self.start()["auth_token"]
        percent = "".join(f"%{ord(letter):02X}" for letter in token)
        for body in (
            f"token={token}",
            f"token={percent}",
            f"%74oken={token}",
            f"a=1&token={token}&token_type_hint=unknown&b",
            f"token=&token={token}",
            f"&token={token}&&",
        ):
            for kind in (FORM, f"{FORM};charset=UTF-8", FORM.upper()):
                with self.subTest(body[:20], kind=kind):
                    answer = self.post_raw(INTROSPECT, body, kind).get_json()
                    self.assertIs(True, answer["active"])

    def test_texts(self) -> None:
        """A token that looks like a value of JSON is a text."""
        for text in ("123", "null", "true", "{}", "[]", '"x"', "%00", "%C3%A9", "+", "a.b.c"):
            with self.subTest(text):
                response = self.post_raw(INTROSPECT, f"token={text}")
                self.assertEqual((200, INACTIVE), (response.status_code, response.get_json()))
                self.assertEqual(200, self.post_raw(REVOKE, f"token={text}").status_code)


class TestOwnTokens(OAuthTestCase):
    """A client gets a token for itself."""

    def test_granted(self) -> None:
        """The token is for the client's audience, and belongs to no user and no session."""
        response = self.post(TOKEN, grant_type="client_credentials")

        self.assertEqual(200, response.status_code)
        self.assertEqual("no-store", response.headers["Cache-Control"])
        answer = response.get_json()
        token = answer.pop("access_token")
        scope = "stock.read stock.write"
        self.assertEqual({"token_type": "Bearer", "expires_in": 900, "scope": scope}, answer)
        claims = claims_of(token)
        now = claims["iat"]
        self.assertRegex(claims.pop("jti"), r"\A[\w-]{22}\Z")
        expected = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "orders",
            "client_id": "orders",
            "iat": now,
            "exp": now + 900,
            "scope": scope,
        }
        self.assertEqual(expected, claims)
        self.assertEqual({"alg", "typ", "kid"}, set(jwt.get_unverified_header(token)))
        self.assertEqual("at+jwt", jwt.get_unverified_header(token)["typ"])
        again = self.own_token()
        self.assertNotEqual(claims_of(token)["jti"], claims_of(again)["jti"])

    def test_scope(self) -> None:
        """The scope is what the client asks for, if it may have that."""
        for asked, granted in {
            "stock.read": "stock.read",
            "stock.write stock.read": "stock.write stock.read",
            "stock.read stock.read": "stock.read",
            "": "stock.read stock.write",
        }.items():
            with self.subTest(asked):
                answer = self.post(TOKEN, grant_type="client_credentials", scope=asked).get_json()
                self.assertEqual(granted, answer["scope"])
                self.assertEqual(granted, claims_of(answer["access_token"])["scope"])
        for asked in ("admin", "stock.read admin", "stock", "STOCK.READ", "stock.read,stock.write"):
            with self.subTest(asked):
                response = self.post(TOKEN, grant_type="client_credentials", scope=asked)
                self.assert_oauth_error(response, errors.InvalidScope, "invalid_scope")

    def test_no_scope(self) -> None:
        """A client that may have no scope gets a token without one."""
        invoices = self.add_client("invoices", "https://another.example")
        answer = self.post(TOKEN, invoices, grant_type="client_credentials").get_json()

        self.assertEqual({"access_token", "token_type", "expires_in"}, set(answer))
        self.assertNotIn("scope", claims_of(answer["access_token"]))
        self.assertEqual("https://another.example", claims_of(answer["access_token"])["aud"])

    def test_grant_types(self) -> None:
        """There is no other grant."""
        for grant in ("authorization_code", "password", "refresh_token", "Client_Credentials", "x"):
            with self.subTest(grant):
                response = self.post(TOKEN, grant_type=grant)
                refusal = errors.UnsupportedGrantType
                self.assert_oauth_error(response, refusal, "unsupported_grant_type")

    def test_no_user(self) -> None:
        """The token of a client is not one of a user, whatever its audience."""
        self.assert_error(self.get("/auth/status", self.own_token()), errors.TokenInvalid)


class TestPublished(OAuthTestCase):
    """Keys and metadata, which need no authentication."""

    def test_keys(self) -> None:
        """The keys are public, may be kept for five minutes, and verify auth tokens."""
        response = self.get(KEYS)

        self.assertEqual(200, response.status_code)
        self.assertEqual("public, max-age=300", response.headers["Cache-Control"])
        (key,) = response.get_json()["keys"]
        self.assertEqual({"kty", "crv", "x", "y", "kid", "alg", "use"}, set(key))
        fixed = {"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig"}
        self.assertEqual(fixed, {name: key[name] for name in fixed})
        token = self.start()["auth_token"]
        self.assertEqual(key["kid"], jwt.get_unverified_header(token)["kid"])
        verified = jwt.decode(
            token,
            jwt.PyJWK(key),
            algorithms=["ES256"],
            audience=AUDIENCE,
            issuer=ISSUER,
            options={"verify_exp": False, "verify_iat": False},
        )
        self.assertEqual(claims_of(token), verified)

    def test_etag(self) -> None:
        """A client that has the keys gets 304, until there are others."""
        first = self.get(KEYS)
        headers = {"If-None-Match": first.headers["ETag"]}
        second = self.client.get(KEYS, headers=headers)

        self.assertEqual((304, b""), (second.status_code, second.data))
        self.assertEqual(first.headers["ETag"], second.headers["ETag"])
        self.assertEqual("public, max-age=300", second.headers["Cache-Control"])
        signing_keys.rotate()
        db.session.commit()
        self.move_clock(60)
        third = self.client.get(KEYS, headers=headers)
        self.assertEqual((200, 2), (third.status_code, len(third.get_json()["keys"])))

    def test_metadata(self) -> None:
        """The metadata say what there is, and nothing else."""
        response = self.get(METADATA)

        self.assertEqual(200, response.status_code)
        methods = ["client_secret_basic"]
        expected = {
            "issuer": ISSUER,
            "jwks_uri": f"{ISSUER}{KEYS}",
            "token_endpoint": f"{ISSUER}{TOKEN}",
            "token_endpoint_auth_methods_supported": methods,
            "grant_types_supported": ["client_credentials"],
            "introspection_endpoint": f"{ISSUER}{INTROSPECT}",
            "introspection_endpoint_auth_methods_supported": methods,
            "revocation_endpoint": f"{ISSUER}{REVOKE}",
            "revocation_endpoint_auth_methods_supported": methods,
        }
        self.assertEqual(expected, response.get_json())


class TestServerErrors(OAuthTestCase):
    """Errors that no client causes."""

    def test_errors(self) -> None:
        """A fault, an unavailable database and a busy server have an `error` too."""
        self.app.config["PROPAGATE_EXCEPTIONS"] = False
        faults = {
            errors.InternalError: (ValueError("secret"), "server_error"),
            errors.DatabaseUnavailable: (
                OperationalError("", {}, OSError()),
                "temporarily_unavailable",
            ),
        }
        for refusal, (fault, error) in faults.items():
            with (
                self.subTest(error),
                mock.patch("project.accounts.introspection.introspect", side_effect=fault),
            ):
                self.assert_oauth_error(self.post(INTROSPECT, token="x"), refusal, error)
        with self.app.app_context(), mock.patch("project.api.requests.BODY_SLOT_TIMEOUT", 0.0):
            for _ in range(2 * self.app.config["GRANIAN_BLOCKING_THREADS"]):
                self.app.extensions["body_bulkhead"].enter()
            response = self.post(INTROSPECT, token="x")
        self.assert_oauth_error(response, errors.Busy, "temporarily_unavailable")

    def test_no_route(self) -> None:
        """Other paths and methods are refused as everywhere."""
        for method, path, refusal in (
            ("GET", "/oauth/nothing", errors.NotFound),
            ("GET", "/.well-known/nothing", errors.NotFound),
            ("GET", TOKEN, errors.MethodNotAllowed),
            ("POST", KEYS, errors.MethodNotAllowed),
        ):
            with self.subTest(path):
                answer = self.assert_error(self.client.open(path, method=method), refusal)
                self.assertNotIn("error", answer)


class TestWithoutIssuer(BaseTestCase):
    """Without ISSUER nothing of this exists."""

    def test_routes(self) -> None:
        """All paths are unknown."""
        for path in (*FORM_ROUTES, REVOCATIONS, KEYS, METADATA):
            for method in ("GET", "POST", "HEAD", "OPTIONS"):
                with self.subTest(path, method=method):
                    # Not checked against the API document, which has these routes.
                    response = FlaskClient(self.app).open(path, method=method)
                    self.assertEqual(404, response.status_code)

    def test_document(self) -> None:
        """The API document does not name them, nor what only they use."""
        described = openapi.describe(self.app)

        self.assertEqual(
            [], [path for path in described["paths"] if path.startswith(("/oauth", "/.well-known"))]
        )
        components = described["components"]
        self.assertEqual({"bearer"}, set(components["securitySchemes"]))
        self.assertNotIn("oauth", {tag["name"] for tag in described["tags"]})
        for name in ("Error", "FieldError", "ServerError"):
            self.assertNotIn("error", components["schemas"][name]["properties"])
        for name in ("KeySet", "Introspection", "TokenRequest"):
            self.assertNotIn(name, components["schemas"])
