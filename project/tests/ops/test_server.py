"""The service as it runs in production: processes, sockets and signals."""

import http.client
import os
import secrets
import signal
import socket
import threading
import time
import unittest
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson

from project.tests import scratch
from project.tests.scratch import Service

LOGIN_HEAD = (
    b"POST /auth/login HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100\r\n\r\n"
)
USER = {"email": "user@test.com", "password": "test"}
INCOMPLETE_REQUESTS = (
    LOGIN_HEAD[:60],
    LOGIN_HEAD + b'{"email": "test@',
    LOGIN_HEAD.replace(b"login", b"refresh") + b'{"refresh_to',
)


class ServerTestCase(unittest.TestCase):
    """A test with a server of its own."""

    def start(self, **environment: str) -> Service:
        """Start the service on an empty database; both end with the test."""
        scratched = scratch.database()
        url = scratched.__enter__()
        self.addCleanup(scratched.__exit__, None, None, None)
        service = Service(url, **environment)
        service.__enter__()
        self.addCleanup(service.stop)
        return service


class TestBehindAProxy(ServerTestCase):
    """Headers of a proxy and a browser, as the server passes them on."""

    def request(
        self, method: str, path: str, body: object, *headers: tuple[str, str]
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        """Return status, body and headers of a response; a header may be sent more than once."""
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=20)
        self.addCleanup(connection.close)
        data = orjson.dumps(body)
        connection.putrequest(method, path)
        for name, value in (("Content-Length", str(len(data))), *headers):
            connection.putheader(name, value)
        connection.endheaders(data)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers

    def test_address_scheme_and_origin(self) -> None:
        """Several lines of one header are one list, in their order."""
        app = "https://app.example"
        self.service = self.start(TRUSTED_PROXIES="1", FORCE_HTTPS="1", CORS_ORIGINS=app)
        user = {"username": "user", "email": "user@test.com", "password": "test"}
        forwarded = (
            ("Content-Type", "application/json"),
            ("X-Forwarded-For", '203.0.113.9, "'),
            ("Accept", "*/*"),
            ("X-Forwarded-For", "[2001:DB8::1]:5000"),
            ("Origin", app),
        )
        https = ("X-Forwarded-Proto", "https")
        asked = ("Access-Control-Request-Method", "POST")

        refused, _, _ = self.request("POST", "/auth/register", user, *forwarded)
        preflight, empty, _ = self.request(
            "OPTIONS", "/auth/register", {}, *forwarded, asked, https
        )
        registered, body, headers = self.request("POST", "/auth/register", user, *forwarded, https)
        token = ("Authorization", f"Bearer {orjson.loads(body)['auth_token']}")
        _, body, _ = self.request("GET", "/auth/sessions", {}, *forwarded, https, token)

        self.assertEqual([403, 204, 201], [refused, preflight, registered])
        self.assertEqual(b"", empty)
        self.assertEqual(app, headers["Access-Control-Allow-Origin"])
        self.assertIn("max-age", headers["Strict-Transport-Security"])
        ips = [session["ip"] for session in orjson.loads(body)["data"]["sessions"]]
        self.assertEqual(["2001:db8::1"], ips)


class TestTwoServers(unittest.TestCase):
    """Two servers on one database, as on two machines."""

    key: str
    url: str
    one: Service
    other: Service

    @classmethod
    def setUpClass(cls) -> None:
        """Start both with the same key, and register a user."""
        cls.key = secrets.token_hex(32)
        cls.url = cls.enterClassContext(scratch.database())
        settings = {"SECRET_KEY": cls.key, "LOGIN_FAILURES_PER_ADDRESS": "1000"}
        cls.one = cls.enterClassContext(Service(cls.url, **settings))
        cls.other = cls.enterClassContext(Service(cls.url, **settings))
        cls.one.register("user")

    def log_in(self) -> dict[str, Any]:
        """Start a session, and check that both servers accept it; return its tokens."""
        status, tokens, _ = self.one.login("user")
        self.assertEqual(200, status, tokens)
        for server in (self.one, self.other):
            self.assertEqual(200, self.status(server, tokens)[0])
        return tokens

    def status(self, server: Service, tokens: dict[str, Any]) -> tuple[int, str | None]:
        """Return the status and the code of the response to an auth token."""
        status, answer, _ = server.request("GET", "/auth/status", token=tokens["auth_token"])
        return status, answer.get("code")

    def assert_ended(self, tokens: dict[str, Any], code: str = "session_ended") -> None:
        """Check that both servers refuse both tokens."""
        for server in (self.other, self.one):
            self.assertEqual((401, code), self.status(server, tokens))
            body = {"refresh_token": tokens["refresh_token"]}
            status, answer, _ = server.request("POST", "/auth/refresh", body)
            self.assertEqual((401, code), (status, answer["code"]))

    def manage(self, *arguments: str) -> None:
        """Run a command with the settings of the servers."""
        result = scratch.manage(
            *arguments,
            APP_SETTINGS="project.config.ProductionConfig",
            SECRET_KEY=self.key,
            DATABASE_URL=self.url,
        )
        self.assertEqual(0, result.returncode, result.stderr)

    def test_ended_on_one_is_ended_on_the_other(self) -> None:
        """A session that ends on one server is refused by the other at the next request."""
        for name, method, path, body in (
            ("logout", "POST", "/auth/logout", None),
            ("logout everywhere", "GET", "/auth/logout?scope=all", None),
        ):
            with self.subTest(name):
                tokens = self.log_in()
                answer = self.one.request(method, path, body, token=tokens["auth_token"])
                self.assertEqual(200, answer[0], answer)
                self.assert_ended(tokens)

        tokens, second = self.log_in(), self.log_in()
        mine = self.one.request("GET", "/auth/sessions", token=second["auth_token"])[1]["data"]
        ids = {session["current"]: session["id"] for session in mine["sessions"]}
        for name, method, path, body in (
            ("one session", "DELETE", f"/auth/sessions/{ids[False]}", None),
            ("the others", "GET", "/auth/logout?scope=others", None),
            (
                "password",
                "POST",
                "/auth/password",
                {"current_password": "test", "new_password": "test"},
            ),
        ):
            with self.subTest(name):
                answer = self.one.request(method, path, body, token=second["auth_token"])
                self.assertEqual(200, answer[0], answer)
                self.assert_ended(tokens)
                self.assertEqual((200, None), self.status(self.other, second))
                tokens = self.log_in()

        with self.subTest("command"):
            self.manage("end_sessions", "user@test.com")
            self.assert_ended(tokens)
            self.assert_ended(second)
        with self.subTest("deactivated"):
            tokens = self.log_in()
            self.manage("deactivate", "user@test.com")
            self.assert_ended(tokens, "account_inactive")
            self.manage("activate", "user@test.com")
            self.assert_ended(tokens)

    def test_guesses_at_once(self) -> None:
        """Of 200 simultaneous guesses at both servers, the limit of ten is checked."""
        self.one.register("guessed")

        def guess(number: int) -> int:
            server = (self.one, self.other)[number % 2]
            credentials = {"email": "guessed@test.com", "password": f"guess {number}"}
            while (status := server.request("POST", "/auth/login", credentials)[0]) == 503:
                time.sleep(0.1)  # refused by the pool: neither checked nor counted
            return status

        with ThreadPoolExecutor(50) as threads:
            statuses = Counter(threads.map(guess, range(200)))

        self.assertEqual({404: 10, 429: 190}, statuses)
        for server in (self.one, self.other):
            self.assertEqual(429, server.login("guessed")[0])

    def test_refreshed_on_one_is_refreshed_on_the_other(self) -> None:
        """A refresh token gets the same successor from both servers."""
        body = {"refresh_token": self.log_in()["refresh_token"]}
        answers = [
            server.request("POST", "/auth/refresh", body)
            for server in (self.one, self.other, self.one)
        ]

        self.assertEqual([200, 200, 200], [status for status, _, _ in answers])
        self.assertEqual(1, len({answer["refresh_token"] for _, answer, _ in answers}))
        self.assertEqual(1, len({answer["auth_token"] for _, answer, _ in answers}))


class TestServer(ServerTestCase):
    """A running server, as clients and operators see it."""

    def test_the_lesson_over_the_wire(self) -> None:
        """A user registers, logs in, gets their status and logs out; no secret is printed."""
        service = self.start()

        status, registered, _ = service.register("wire")
        self.assertEqual((201, "Successfully registered."), (status, registered["message"]))
        status, logged_in, _ = service.login("wire")
        self.assertEqual((200, "Successfully logged in."), (status, logged_in["message"]))
        token = logged_in["auth_token"]
        status, answer, headers = service.request("GET", "/auth/status", token=token)
        self.assertEqual((200, "wire@test.com"), (status, answer["data"]["email"]))
        self.assertEqual("no-store", headers["Cache-Control"])
        status, _, _ = service.request("GET", "/auth/logout", token=token)
        self.assertEqual(200, status)
        status, _, headers = service.request("GET", "/users")
        self.assertEqual((401, 'Bearer realm="users"'), (status, headers["WWW-Authenticate"]))

        service.stop()
        self.assertEqual(0, service.process.returncode)
        for secret in (token, registered["auth_token"], "$2b$"):
            self.assertNotIn(secret, service.log)

    def test_clients_that_never_finish(self) -> None:
        """Sixty incomplete requests block no other; those with half a body are disconnected."""
        service = self.start(BODY_TIMEOUT="1")
        service.register("user")
        silent = []
        for incomplete in INCOMPLETE_REQUESTS * 20:
            connection = service.connect()
            self.addCleanup(connection.close)
            connection.sendall(incomplete)
            if b"\r\n\r\n" in incomplete:
                silent.append(connection)

        for _ in range(5):
            started = time.monotonic()
            status, _, _ = service.request("GET", "/ping")
            self.assertEqual(200, status)
            self.assertLess(time.monotonic() - started, 1)
            self.assertEqual(200, service.login("user")[0])

        for connection in silent:
            self.assertEqual(b"", connection.recv(1))

    def test_late_bodies(self) -> None:
        """Twenty bodies that come 0.2 seconds after their headers are all read, on each route."""
        service = self.start(LOGIN_FAILURES_PER_ACCOUNT="1000")
        service.register("user")
        bodies = {"login": USER, "refresh": {"refresh_token": "x"}}

        def send_late(route: str) -> bytes:
            body = orjson.dumps(bodies[route])
            head = LOGIN_HEAD.replace(b"login", route.encode()).replace(b"100", b"%d" % len(body))
            with service.connect() as connection:
                connection.sendall(head)
                time.sleep(0.2)
                connection.sendall(body)
                return connection.recv(4_096)[9:12]

        with ThreadPoolExecutor(20) as threads:
            for route, status in (("login", b"200"), ("refresh", b"401")):
                self.assertEqual({status: 20}, Counter(threads.map(send_late, [route] * 20)))

    def test_bodies_without_end(self) -> None:
        """A body over the limit is a 413, with or without a declared length."""
        service = self.start()
        declared = b"POST /auth/login HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        for name, request in (
            ("declared", declared + b"Content-Length: 65537\r\n\r\n" + b" " * 65537),
            (
                "chunked",
                declared
                + b"Transfer-Encoding: chunked\r\n\r\n"
                + b"8000\r\n"
                + b" " * 0x8000
                + b"\r\n8001\r\n"
                + b" " * 0x8001
                + b"\r\n0\r\n\r\n",
            ),
        ):
            with self.subTest(name), service.connect() as connection:
                connection.sendall(request)

                self.assertTrue(connection.recv(4096).startswith(b"HTTP/1.1 413 "))

    def test_requests_in_flight_are_finished(self) -> None:
        """After SIGTERM the server answers every login in flight and exits with 0."""
        service = self.start(BCRYPT_LOG_ROUNDS="11")
        service.register("late")
        with ThreadPoolExecutor() as executor:
            logins = [executor.submit(service.login, "late") for _ in range(4)]
            time.sleep(0.1)  # long enough to be in flight, too short to be finished
            service.process.send_signal(signal.SIGTERM)
            statuses = [login.result()[0] for login in logins]

        self.assertEqual([200] * 4, statuses)
        self.assertEqual(0, service.process.wait(20))

    def test_replacement_that_dies(self) -> None:
        """A process that dies is replaced; if the replacement dies too, the server exits with 1.

        A supervisor then starts it again, and finds the port free.
        """
        service = self.start()
        before = set(service.workers())
        service.kill_a_worker()
        self.assertEqual(200, service.request("GET", "/ping")[0])
        for replacement in set(service.workers()) - before:
            os.kill(replacement, signal.SIGKILL)

        self.assertEqual(1, service.process.wait(30))
        with socket.create_server(("127.0.0.1", service.port)):
            pass

    def test_no_registration_is_lost(self) -> None:
        """Every registration answered with 201 is stored, even while workers are killed."""
        service = self.start(USERS_API_OPEN="true")
        registered: list[str] = []
        ended = threading.Event()

        def keep_registering(prefix: str) -> None:
            number = 0
            while not ended.is_set():
                name = f"{prefix}{number}"
                number += 1
                try:
                    if service.register(name)[0] == 201:
                        registered.append(name)
                except (OSError, ValueError):
                    time.sleep(0.01)  # the server that had it was killed

        clients = [threading.Thread(target=keep_registering, args=(name,)) for name in "abcd"]
        for client in clients:
            client.start()
        for _ in range(2):
            target = len(registered) + 20
            deadline = time.monotonic() + 20
            while len(registered) < target and time.monotonic() < deadline:
                time.sleep(0.01)
            service.kill_a_worker()
        target = len(registered) + 5
        while len(registered) < target and time.monotonic() < deadline + 20:
            time.sleep(0.01)
        ended.set()
        for client in clients:
            client.join()

        self.assertGreaterEqual(len(registered), 45)
        stored = set()
        path = "/users?limit=500"
        while path:
            _, page, _ = service.request("GET", path)
            stored |= {user["username"] for user in page["data"]["users"]}
            following = page["data"]["next"]
            path = f"/users?limit=500&after={following}" if following else ""
        self.assertEqual(set(), set(registered) - stored)
