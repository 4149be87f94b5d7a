"""Headers for browsers: security headers, CORS, and HTTPS only."""

import os
import secrets
import unittest
from typing import ClassVar
from unittest import mock

from werkzeug.test import TestResponse

from project import create_app, errors
from project.tests import scratch
from project.tests.base import BaseTestCase
from project.tests.contract.cases import ResponsesTestCase
from project.tests.rows import stored_sessions, stored_users

APP = "https://app.example"
LOCAL = "http://localhost:3000"
HSTS = "max-age=63072000; includeSubDomains"
USER = {"username": "test", "email": "test@test.com", "password": "test"}
ALLOW_ORIGIN = "Access-Control-Allow-Origin"

EXPOSED = (
    "WWW-Authenticate, Retry-After, Link, X-Request-ID, Location, ETag, RateLimit, RateLimit-Policy"
)


class BrowserTestCase(BaseTestCase):
    """A test of an application that was created with these environment variables."""

    environment: ClassVar[dict[str, str]] = {}

    def setUp(self) -> None:
        """Create the application with them."""
        with mock.patch.dict(os.environ, self.environment):
            super().setUp()

    def preflight(self, path: str, origin: str = APP, method: str = "POST") -> TestResponse:
        """Return the response to a preflight request."""
        headers = {"Origin": origin, "Access-Control-Request-Method": method}
        headers["Access-Control-Request-Headers"] = "authorization,content-type"
        return self.client.options(path, headers=headers)

    def cors(self, response: TestResponse) -> dict[str, str]:
        """Return the CORS headers of a response."""
        return {
            name: value
            for name, value in response.headers.items()
            if name.startswith("Access-Control-")
        }


class TestDefaultHeaders(ResponsesTestCase):
    """The default settings."""

    def test_safe_headers(self) -> None:
        """Every response forbids storing, sniffing, framing, embedding, scripts and referrers."""
        for name, response in self.every_response():
            with self.subTest(name):
                for header, value in {
                    "Cache-Control": "no-store",
                    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
                    "Cross-Origin-Resource-Policy": "same-origin",
                    "Referrer-Policy": "no-referrer",
                    "X-Content-Type-Options": "nosniff",
                }.items():
                    self.assertEqual([value], response.headers.getlist(header))

    def test_nothing_else(self) -> None:
        """No response allows CORS, demands HTTPS or sets a cookie."""
        self.client.environ_base["HTTP_ORIGIN"] = APP
        for name, response in self.every_response():
            with self.subTest(name):
                headers = str(response.headers)
                for absent in ("Access-Control-", "Vary", "Strict-Transport", "Set-Cookie"):
                    self.assertNotIn(absent, headers)

    def test_no_unused_hooks(self) -> None:
        """Features that are off add no hooks to a request."""
        self.assertEqual({}, self.app.after_request_funcs)
        self.assertEqual(["run_guards"], [f.__name__ for f in self.app.before_request_funcs[None]])


class TestHeadersForAllowedOrigin(BrowserTestCase, ResponsesTestCase):
    """Requests of a page with an allowed origin, over HTTPS, behind a proxy."""

    environment: ClassVar[dict[str, str]] = {
        "CORS_ORIGINS": APP,
        "FORCE_HTTPS": "1",
        "TRUSTED_PROXIES": "1",
    }

    def setUp(self) -> None:
        """Send every request as a page would."""
        super().setUp()
        self.client.environ_base |= {"HTTP_ORIGIN": APP, "HTTP_X_FORWARDED_PROTO": "https"}

    def test_headers(self) -> None:
        """Errors of every status can be read by the page, as successes can."""
        answers = self.every_response()

        seen = {response.status_code for _, response in answers}
        self.assertLessEqual({200, 201, 400, 401, 403, 404, 405, 413, 500, 503}, seen)
        for name, response in answers:
            with self.subTest(name):
                self.assertEqual(
                    {
                        ALLOW_ORIGIN: APP,
                        "Access-Control-Expose-Headers": EXPOSED,
                    },
                    self.cors(response),
                )
                self.assertEqual(["Origin"], response.headers.getlist("Vary"))
                self.assertEqual([HSTS], response.headers.getlist("Strict-Transport-Security"))


class TestOrigins(BrowserTestCase):
    """CORS with two allowed origins."""

    environment: ClassVar[dict[str, str]] = {"CORS_ORIGINS": f"{APP}, {LOCAL}"}

    def test_each_origin(self) -> None:
        """An allowed origin is returned as the only allowed one."""
        for origin in (APP, LOCAL):
            with self.subTest(origin):
                response = self.client.get("/ping", headers={"Origin": origin})

                self.assertEqual([origin], response.headers.getlist(ALLOW_ORIGIN))

    def test_other_origins(self) -> None:
        """A page whose origin only resembles an allowed one can't read the response."""
        for origin in (
            "http://app.example",
            "https://app.example:8443",
            "https://app.example.evil.example",
            "https://evil-app.example",
            "https://sub.app.example",
            "https://APP.example",
            "https://app.example/",
            "http://localhost",
            f"{APP}, {LOCAL}",
            f"{APP} {LOCAL}",
            "null",
            "*",
            "",
        ):
            with self.subTest(origin):
                answer = self.client.get("/ping", headers={"Origin": origin})
                preflight = self.preflight("/ping", origin)

                self.assertEqual(200, answer.status_code)
                self.assertEqual({}, self.cors(answer))
                self.assertNotIn(ALLOW_ORIGIN, preflight.headers)
                for response in (answer, preflight):
                    self.assertEqual("Origin", response.headers["Vary"])

    def test_no_origin(self) -> None:
        """A request without an Origin has no CORS headers, but Vary: Origin."""
        response = self.client.get("/ping")

        self.assertEqual({}, self.cors(response))
        self.assertEqual("Origin", response.headers["Vary"])

    def test_preflight(self) -> None:
        """A preflight needs no token, and is allowed for any path, also an unknown one."""
        for path in ("/ping", "/auth/login", "/auth/status", "/users/1", "/nothing", "/users/1/2"):
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
                with self.subTest(path, method=method):
                    response = self.preflight(path, method=method)

                    self.assertEqual((204, b""), (response.status_code, response.data))
                    cors = self.cors(response)
                    self.assertEqual(APP, cors[ALLOW_ORIGIN])
                    self.assertEqual(
                        "GET, POST, PUT, PATCH, DELETE", cors["Access-Control-Allow-Methods"]
                    )
                    self.assertEqual(
                        "Authorization, Content-Type, If-Match, traceparent, X-Request-ID,"
                        " X-Requested-With",
                        cors["Access-Control-Allow-Headers"],
                    )
                    self.assertEqual("600", cors["Access-Control-Max-Age"])
                    self.assertEqual("Origin", response.headers["Vary"])

    def test_no_credentials(self) -> None:
        """Credentials are not allowed, and no cookie is set."""
        for response in (
            self.preflight("/auth/login"),
            self.client.post("/auth/register", json=USER, headers={"Origin": APP}),
        ):
            self.assertNotIn("Access-Control-Allow-Credentials", response.headers)
            self.assertNotIn("Set-Cookie", response.headers)

    def test_options_without_preflight(self) -> None:
        """OPTIONS without an Origin lists the allowed methods."""
        response = self.client.options("/auth/login")

        self.assertEqual(200, response.status_code)
        self.assertEqual({"POST", "OPTIONS"}, set(response.headers["Allow"].split(", ")))

    def test_registration_from_a_page(self) -> None:
        """A page can send preflights, register, and ask for its status."""
        self.assertEqual(204, self.preflight("/auth/register").status_code)
        page = {"Origin": APP}
        registered = self.client.post("/auth/register", json=USER, headers=page)
        self.assertEqual(204, self.preflight("/auth/status", method="GET").status_code)
        token = {"Authorization": f"Bearer {registered.get_json()['auth_token']}"}
        status = self.client.get("/auth/status", headers=page | token)

        self.assertEqual(200, status.status_code)
        for response in (registered, status):
            self.assertEqual(APP, response.headers[ALLOW_ORIGIN])


class TestAnyOrigin(BrowserTestCase):
    """CORS for any origin, outside of production."""

    environment: ClassVar[dict[str, str]] = {"CORS_ORIGINS": "*"}

    def test_any(self) -> None:
        """Every page may read the response, which is the same for all."""
        for origin in (APP, "null"):
            for response in (
                self.client.get("/nothing", headers={"Origin": origin}),
                self.preflight("/auth/login", origin),
            ):
                self.assertEqual("*", response.headers[ALLOW_ORIGIN])
                self.assertNotIn("Vary", response.headers)
                self.assertNotIn("Access-Control-Allow-Credentials", response.headers)


class TestNoDatabase(unittest.TestCase):
    """Production, with an unavailable database."""

    def test_preflight(self) -> None:
        """A preflight needs no database, and a page can read the 503."""
        environment = scratch.settings(
            SECRET_KEY=secrets.token_hex(32),
            DATABASE_URL="postgresql://nobody@127.0.0.1:1/nothing",
            CORS_ORIGINS=APP,
        )
        with mock.patch.dict(os.environ, environment, clear=True):
            client = create_app("project.config.ProductionConfig").test_client()
        asked = {"Origin": APP, "Access-Control-Request-Method": "POST"}
        credentials = {"email": USER["email"], "password": USER["password"]}

        preflight = client.options("/auth/login", headers=asked)
        login = client.post("/auth/login", json=credentials, headers={"Origin": APP})

        self.assertEqual([204, 503], [preflight.status_code, login.status_code])
        for response in (preflight, login):
            self.assertEqual(APP, response.headers[ALLOW_ORIGIN])


class TestHttpsOnly(BrowserTestCase):
    """FORCE_HTTPS without a proxy."""

    environment: ClassVar[dict[str, str]] = {"FORCE_HTTPS": "1", "CORS_ORIGINS": APP}

    def assert_refused(self, response: TestResponse) -> None:
        """Check that a request was refused because it came over plain HTTP."""
        self.assert_error(response, errors.HttpsRequired)
        self.assertEqual(HSTS, response.headers["Strict-Transport-Security"])
        self.assertNotIn("Location", response.headers)

    def test_plain_http(self) -> None:
        """Plain HTTP is refused before a body or a token is read."""
        self.assert_refused(self.client.post("/auth/register", json=USER))
        self.assert_refused(self.client.post("/auth/register", data=b"{"))
        self.assert_refused(self.client.post("/ping/"))
        self.assert_refused(self.client.options("/users"))
        self.assert_refused(self.preflight("/users"))
        for path in ("/", "/auth/status", "/users", "/users/1", "/nothing", "//ping", "/ping/x"):
            with self.subTest(path):
                self.assert_refused(self.get(path))
                self.assert_refused(self.get(path, "token"))
        self.assertEqual([], stored_users())

    def test_headers_are_not_trusted(self) -> None:
        """Without a trusted proxy no header turns a request into HTTPS."""
        for header, value in {
            "X-Forwarded-Proto": "https",
            "X-Forwarded-Ssl": "on",
            "Forwarded": "proto=https",
            "Front-End-Https": "on",
        }.items():
            with self.subTest(header):
                self.assert_refused(self.client.get("/users", headers={header: value}))

    def test_health(self) -> None:
        """Ping and health accept plain HTTP, and no other path does."""
        for path in ("/ping", "/health/live", "/health/ready"):
            with self.subTest(path):
                response = self.get(path)

                self.assertEqual(200, response.status_code)
                self.assertEqual(HSTS, response.headers["Strict-Transport-Security"])
                self.assert_refused(self.get(f"{path}/"))
        self.assert_refused(self.get("/health"))

    def test_https(self) -> None:
        """A request over HTTPS is accepted."""
        response = self.client.post("/auth/register", json=USER, base_url="https://localhost")

        self.assertEqual(201, response.status_code)
        self.assertEqual(HSTS, response.headers["Strict-Transport-Security"])
        self.assertEqual(1, len(stored_sessions()))


class TestHttpsBehindProxies(BrowserTestCase):
    """FORCE_HTTPS behind two proxies."""

    environment: ClassVar[dict[str, str]] = {"FORCE_HTTPS": "1", "TRUSTED_PROXIES": "2"}

    def status(self, proto: str | None, base_url: str = "http://localhost") -> int:
        """Return the status of a response to this X-Forwarded-Proto."""
        headers = {} if proto is None else {"X-Forwarded-Proto": proto}
        return self.client.get("/users", headers=headers, base_url=base_url).status_code

    def test_scheme(self) -> None:
        """The entry of the outermost trusted proxy is the client's scheme."""
        for proto in ("https", "HTTPS", " https ", "https, http", "http, https, http"):
            with self.subTest(proto):
                self.assertEqual(200, self.status(proto))
        self.assertEqual(403, self.status(None))
        for proto in ("", "http", "https, http, http", "on", "httpsx", "wss", "https;x", ","):
            with self.subTest(proto):
                self.assertEqual(403, self.status(proto))

    def test_the_proxies_own_scheme(self) -> None:
        """TLS between the proxies does not count as the client's."""
        self.assertEqual(403, self.status("http", "https://localhost"))
        self.assertEqual(200, self.status(None, "https://localhost"))
