"""Browsers: the headers of every answer, CORS, and https alone."""

import os
import secrets
import unittest
from typing import ClassVar
from unittest import mock

from werkzeug.test import TestResponse

from project import create_app
from project.tests import scratch
from project.tests.base import BaseTestCase
from project.tests.test_contract_answers import AnswersTestCase
from project.tests.utils import stored_sessions, stored_users

APP = "https://app.example"
LOCAL = "http://localhost:3000"
HSTS = "max-age=63072000; includeSubDomains"
USER = {"username": "test", "email": "test@test.com", "password": "test"}
ALLOW_ORIGIN = "Access-Control-Allow-Origin"

EXPOSED = "WWW-Authenticate, Retry-After, Link, X-Request-ID"


class BrowserTestCase(BaseTestCase):
    """A test of a service that was started in an environment of its own."""

    environment: ClassVar[dict[str, str]] = {}

    def setUp(self) -> None:
        """Make the application in that environment."""
        with mock.patch.dict(os.environ, self.environment):
            super().setUp()

    def preflight(self, path: str, origin: str = APP, method: str = "POST") -> TestResponse:
        """Return the answer to what a browser asks before a page's request."""
        headers = {"Origin": origin, "Access-Control-Request-Method": method}
        headers["Access-Control-Request-Headers"] = "authorization,content-type"
        return self.client.options(path, headers=headers)

    def cors(self, response: TestResponse) -> dict[str, str]:
        """Return what an answer says of CORS."""
        return {
            name: value
            for name, value in response.headers.items()
            if name.startswith("Access-Control-")
        }


class TestEveryAnswer(AnswersTestCase):
    """As it is when nothing is set."""

    def test_safe_headers(self) -> None:
        """No answer is stored, sniffed, framed, embedded or run, or gives away where one was."""
        for name, response in self.every_answer():
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
        """No page of another origin may read, nothing demands https, no cookie is set."""
        self.client.environ_base["HTTP_ORIGIN"] = APP
        for name, response in self.every_answer():
            with self.subTest(name):
                headers = str(response.headers)
                for absent in ("Access-Control-", "Vary", "Strict-Transport", "Set-Cookie"):
                    self.assertNotIn(absent, headers)

    def test_costs_nothing(self) -> None:
        """What is not asked for is not hooked in."""
        self.assertEqual({}, self.app.after_request_funcs)
        self.assertEqual(["speak_first"], [f.__name__ for f in self.app.before_request_funcs[None]])


class TestEveryAnswerToAPage(BrowserTestCase, AnswersTestCase):
    """Pages of one origin, over https, behind a proxy."""

    environment: ClassVar[dict[str, str]] = {
        "CORS_ORIGINS": APP,
        "FORCE_HTTPS": "1",
        "TRUSTED_PROXIES": "1",
    }

    def setUp(self) -> None:
        """Let every request be a page's."""
        super().setUp()
        self.client.environ_base |= {"HTTP_ORIGIN": APP, "HTTP_X_FORWARDED_PROTO": "https"}

    def test_headers(self) -> None:
        """Refusals and faults of every status can be read as success can."""
        answers = self.every_answer()

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
    """CORS for the pages of two origins."""

    environment: ClassVar[dict[str, str]] = {"CORS_ORIGINS": f"{APP}, {LOCAL}"}

    def test_each_origin(self) -> None:
        """An origin that is named is told its own name, and no other."""
        for origin in (APP, LOCAL):
            with self.subTest(origin):
                response = self.client.get("/ping", headers={"Origin": origin})

                self.assertEqual([origin], response.headers.getlist(ALLOW_ORIGIN))

    def test_others(self) -> None:
        """An origin that only looks like one of them gets an answer that its page cannot read."""
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
        """Programs are answered as ever; a cache is told that pages are answered otherwise."""
        response = self.client.get("/ping")

        self.assertEqual({}, self.cors(response))
        self.assertEqual("Origin", response.headers["Vary"])

    def test_preflight(self) -> None:
        """Any path may be asked about, without a token: also one whose 404 a page is to read."""
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
                        "Authorization, Content-Type", cors["Access-Control-Allow-Headers"]
                    )
                    self.assertEqual("600", cors["Access-Control-Max-Age"])
                    self.assertEqual("Origin", response.headers["Vary"])

    def test_no_credentials(self) -> None:
        """No cookie goes with a page's request: only what the page itself sends."""
        for response in (
            self.preflight("/auth/login"),
            self.client.post("/auth/register", json=USER, headers={"Origin": APP}),
        ):
            self.assertNotIn("Access-Control-Allow-Credentials", response.headers)
            self.assertNotIn("Set-Cookie", response.headers)

    def test_options_without_preflight(self) -> None:
        """OPTIONS that is no page's question says as ever which methods there are."""
        response = self.client.options("/auth/login")

        self.assertEqual(200, response.status_code)
        self.assertEqual({"POST", "OPTIONS"}, set(response.headers["Allow"].split(", ")))

    def test_a_page_logs_in(self) -> None:
        """From a page: asking, registering, and being told who one is."""
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
    """CORS for all, outside production."""

    environment: ClassVar[dict[str, str]] = {"CORS_ORIGINS": "*"}

    def test_any(self) -> None:
        """Every page may read, and the answer is the same for all."""
        for origin in (APP, "null"):
            for response in (
                self.client.get("/nothing", headers={"Origin": origin}),
                self.preflight("/auth/login", origin),
            ):
                self.assertEqual("*", response.headers[ALLOW_ORIGIN])
                self.assertNotIn("Vary", response.headers)
                self.assertNotIn("Access-Control-Allow-Credentials", response.headers)


class TestNoDatabase(unittest.TestCase):
    """Production, with a database that is away."""

    def test_preflight(self) -> None:
        """A preflight asks the database nothing, and a page can read that it is away."""
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


class TestHttpsAlone(BrowserTestCase):
    """FORCE_HTTPS, with nobody in front."""

    environment: ClassVar[dict[str, str]] = {"FORCE_HTTPS": "1", "CORS_ORIGINS": APP}

    def assert_refused(self, response: TestResponse) -> None:
        """Check that a request was refused for coming in the clear."""
        self.assert_error(response, 403, "Please use https.", "https_required")
        self.assertEqual(HSTS, response.headers["Strict-Transport-Security"])
        self.assertNotIn("Location", response.headers)

    def test_plain_http(self) -> None:
        """What comes in the clear is refused before a body or a token is looked at."""
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

    def test_headers_are_not_believed(self) -> None:
        """Without a trusted proxy no header makes a request one that came by https."""
        for header, value in {
            "X-Forwarded-Proto": "https",
            "X-Forwarded-Ssl": "on",
            "Forwarded": "proto=https",
            "Front-End-Https": "on",
        }.items():
            with self.subTest(header):
                self.assert_refused(self.client.get("/users", headers={header: value}))

    def test_health(self) -> None:
        """Who only asks how the service is may ask in the clear, and nothing beside that."""
        for path in ("/ping", "/health/live", "/health/ready"):
            with self.subTest(path):
                response = self.get(path)

                self.assertEqual(200, response.status_code)
                self.assertEqual(HSTS, response.headers["Strict-Transport-Security"])
                self.assert_refused(self.get(f"{path}/"))
        self.assert_refused(self.get("/health"))

    def test_https(self) -> None:
        """What comes by https is answered as ever."""
        response = self.client.post("/auth/register", json=USER, base_url="https://localhost")

        self.assertEqual(201, response.status_code)
        self.assertEqual(HSTS, response.headers["Strict-Transport-Security"])
        self.assertEqual(1, len(stored_sessions()))


class TestHttpsBehindProxies(BrowserTestCase):
    """FORCE_HTTPS, behind two proxies."""

    environment: ClassVar[dict[str, str]] = {"FORCE_HTTPS": "1", "TRUSTED_PROXIES": "2"}

    def status(self, proto: str | None, base_url: str = "http://localhost") -> int:
        """Return the status of the answer to a request with this X-Forwarded-Proto."""
        headers = {} if proto is None else {"X-Forwarded-Proto": proto}
        return self.client.get("/users", headers=headers, base_url=base_url).status_code

    def test_scheme(self) -> None:
        """The outermost of the proxies that speak says how the client came."""
        for proto in ("https", "HTTPS", " https ", "https, http", "http, https, http"):
            with self.subTest(proto):
                self.assertEqual(200, self.status(proto))
        self.assertEqual(403, self.status(None))
        for proto in ("", "http", "https, http, http", "on", "httpsx", "wss", "https;x", ","):
            with self.subTest(proto):
                self.assertEqual(403, self.status(proto))

    def test_the_proxies_own_scheme(self) -> None:
        """TLS between the proxies is none between the client and them."""
        self.assertEqual(403, self.status("http", "https://localhost"))
        self.assertEqual(200, self.status(None, "https://localhost"))
