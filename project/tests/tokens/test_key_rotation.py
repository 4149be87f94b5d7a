"""Rotating SECRET_KEY step by step: no session ends, and a removed key is refused."""

import http.client
import os
import secrets
import threading
import time
import unittest
from typing import Any
from unittest import mock

import jwt
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from project import create_app, db, errors
from project.models import User
from project.tests import scratch
from project.tests.accounts.cases import CREDENTIALS, SessionsTestCase
from project.tests.base import Client, bearer
from project.tests.conformance import TESTING
from project.tests.rows import stored_sessions
from project.tests.tokens.claims import claims_of

OLDER, OLD, NEW = (f"{name}. " * 8 + "key" for name in ("older", "old", "new"))
LIFETIME = 3_600  # seconds
Pair = dict[str, Any]  # the answer to a login or a refresh


class RotationTestCase(SessionsTestCase):
    """A test of servers with different keys on one database."""

    def server(self, key: str, *fallbacks: str) -> FlaskClient:
        """Return a client of a server with these keys."""
        keys = {"SECRET_KEY": key, "SECRET_KEY_FALLBACKS": ",".join(fallbacks)}
        with mock.patch.dict(os.environ, keys):
            app = create_app(TESTING)
        app.config["TOKEN_EXPIRATION_SECONDS"] = app.config["REFRESH_EXPIRATION_SECONDS"] = LIFETIME
        app.test_client_class = Client
        with app.app_context():
            for engine in db.engines.values():
                self.addCleanup(engine.dispose)
        return app.test_client()

    def accepted(self, response: TestResponse) -> Pair:
        """Check that a response is a success, and return its body."""
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        answer: Pair = response.get_json()
        return answer

    def log_in(self, server: FlaskClient) -> Pair:
        """Return the tokens of a new session."""
        return self.accepted(server.post("/auth/login", json=CREDENTIALS))

    def status(self, server: FlaskClient, pair: Pair) -> TestResponse:
        """Return the response to an auth token."""
        return server.get("/auth/status", headers=bearer(pair["auth_token"]))

    def refresh(self, server: FlaskClient, pair: Pair) -> TestResponse:
        """Return the response to a refresh token."""
        return server.post("/auth/refresh", json={"refresh_token": pair["refresh_token"]})

    def assert_signed(self, pair: Pair, key: str) -> None:
        """Check that this key signed both tokens of a pair."""
        for name in ("auth_token", "refresh_token"):
            jwt.decode(
                pair[name],
                key,
                algorithms=["HS256"],
                options={"verify_aud": False, "verify_exp": False, "verify_iat": False},
            )

    def assert_accepted(self, server: FlaskClient, pair: Pair) -> None:
        """Check that a server accepts both tokens."""
        self.accepted(self.status(server, pair))
        self.accepted(self.refresh(server, pair))

    def assert_not_accepted(
        self,
        server: FlaskClient,
        pair: Pair,
        refusal: type[errors.ServiceError] = errors.TokenInvalid,
    ) -> None:
        """Check that a server refuses both tokens, and that no session changes."""
        before = stored_sessions()
        self.assert_error(self.status(server, pair), refusal)
        self.assert_error(self.refresh(server, pair), refusal)
        self.assertEqual(before, stored_sessions())


class TestSteps(RotationTestCase):
    """The three steps, each while some servers have taken it and others have not."""

    def test_every_server_accepts_every_token(self) -> None:
        """At each step every server accepts the tokens of all servers."""
        for number, servers in enumerate(
            (
                (self.server(OLD), self.server(OLD, NEW)),
                (self.server(OLD, NEW), self.server(NEW, OLD)),
                (self.server(NEW, OLD), self.server(NEW)),
            ),
            1,
        ):
            for signer in servers:
                for server in servers:
                    with self.subTest(step=number):
                        self.assert_accepted(server, self.log_in(signer))

    def test_tokens_from_before_the_second_step(self) -> None:
        """Old tokens stay valid, and a refresh returns tokens signed with the new key."""
        pair = self.log_in(self.server(OLD))
        server = self.server(NEW, OLD)

        self.accepted(self.status(server, pair))
        following = self.accepted(self.refresh(server, pair))

        self.assert_signed(pair, OLD)
        self.assert_signed(following, NEW)
        self.assert_accepted(self.server(OLD, NEW), following)

    def test_without_the_first_step(self) -> None:
        """A server without the new key refuses tokens signed with it."""
        self.assert_not_accepted(self.server(OLD), self.log_in(self.server(NEW, OLD)))

    def test_last_step(self) -> None:
        """A removed key is refused, even by a server that has just accepted a token of it."""
        pair = self.log_in(self.server(OLD))
        server = self.server(NEW, OLD)
        self.accepted(self.status(server, pair))

        server.application.config["SECRET_KEY_FALLBACKS"] = ()

        self.assert_not_accepted(server, pair)
        self.assert_not_accepted(self.server(NEW), pair)

    def test_several_old_keys(self) -> None:
        """Keys can be rotated again while tokens of earlier keys are valid."""
        oldest = self.log_in(self.server(OLDER))
        old = self.log_in(self.server(OLD, OLDER))
        for fallbacks in ((OLD, OLDER), (OLDER, OLD), (NEW[::-1], OLDER, OLD[::-1], OLD)):
            server = self.server(NEW, *fallbacks)
            with self.subTest(fallbacks=fallbacks):
                self.accepted(self.status(server, oldest))
                self.accepted(self.status(server, old))
        self.assert_not_accepted(self.server(NEW, OLD), oldest)

    def test_end_of_a_session(self) -> None:
        """A session that ends on one server has ended on the other, whichever key signed it."""
        one, other = self.server(OLD, NEW), self.server(NEW, OLD)
        for signer, server in ((one, other), (other, one)):
            pair = self.log_in(signer)
            self.accepted(server.post("/auth/logout", headers=bearer(pair["auth_token"])))
            for refusing in (one, other):
                self.assert_not_accepted(refusing, pair, errors.SessionEnded)

    def test_model(self) -> None:
        """User.encode_auth_token signs with the new key; decode_auth_token accepts the old one."""
        tokens = {}
        for name, client in {"old": self.server(OLD), "new": self.server(NEW, OLD)}.items():
            with client.application.app_context():
                tokens[name] = self.user.encode_auth_token(self.user.id)
                decoded = {key: User.decode_auth_token(token) for key, token in tokens.items()}

        self.assertEqual({"old": self.user.id, "new": self.user.id}, decoded)
        with self.server(NEW).application.app_context():
            self.assertEqual(errors.TokenInvalid.message, User.decode_auth_token(tokens["old"]))
            self.assertEqual(self.user.id, User.decode_auth_token(tokens["new"]))


class TestRepeatedRefresh(RotationTestCase):
    """A refresh repeated at a server with another key."""

    def test_within_thirty_seconds(self) -> None:
        """The repeated pair has the same claims, and both pairs are valid."""
        one, other = self.server(OLD, NEW), self.server(NEW, OLD)
        for first, second in ((one, other), (other, one)):
            for kept in (0, 1):
                pair = self.log_in(self.server(OLD))
                lost = self.accepted(self.refresh(first, pair))
                before = stored_sessions()
                again = self.accepted(self.refresh(second, pair))

                with self.subTest(kept=kept):
                    self.assertEqual(before, stored_sessions())
                    for name in ("auth_token", "refresh_token"):
                        self.assertNotEqual(lost[name], again[name])
                        self.assertEqual(claims_of(lost[name]), claims_of(again[name]))
                    for server in (one, other):
                        self.accepted(self.status(server, (lost, again)[kept]))
                    self.assert_accepted(
                        other, self.accepted(self.refresh(one, (lost, again)[kept]))
                    )

    def test_later(self) -> None:
        """After ten seconds the repeat counts as reuse and ends the session."""
        one, other = self.server(OLD, NEW), self.server(NEW, OLD)
        pair = self.log_in(one)
        stolen = self.accepted(self.refresh(one, pair))
        self.move_clock(30.000001)

        self.assert_error(self.refresh(other, pair), errors.RefreshReused)
        self.assert_not_accepted(one, stolen, errors.SessionEnded)


class TestFallback(RotationTestCase):
    """A fallback key is as strict as the key that signs."""

    def setUp(self) -> None:
        """Log in before the rotation."""
        super().setUp()
        self.pair = self.log_in(self.server(OLD))
        self.new = self.server(NEW, OLD)

    def sign(self, name: str, key: str, **header: object) -> str:
        """Return a token of the pair, signed again with this key and header."""
        type_ = jwt.get_unverified_header(self.pair[name])["typ"]
        headers = {"typ": type_} | header
        return jwt.encode(claims_of(self.pair[name]), key, algorithm="HS256", headers=headers)

    def test_expired(self) -> None:
        """A genuine token of an old key is refused as expired, a forged one as invalid."""
        forged = {name: self.sign(name, "0" * 32) for name in ("auth_token", "refresh_token")}
        self.move_clock(LIFETIME)

        self.assert_not_accepted(self.new, self.pair, errors.TokenExpired)
        self.assert_not_accepted(self.new, forged)
        self.assert_not_accepted(self.server(NEW), self.pair)

    def test_kid(self) -> None:
        """A kid header never selects a key; a token with one is refused."""
        for key in (OLD, NEW):
            for kid in (OLD, NEW, "0", "1", "/dev/null"):
                pair = {
                    name: self.sign(name, key, kid=kid) for name in ("auth_token", "refresh_token")
                }
                with self.subTest(kid=kid):
                    self.assert_not_accepted(self.new, pair)
        again = {name: self.sign(name, OLD) for name in ("auth_token", "refresh_token")}
        self.assert_accepted(self.new, again)

    def test_kinds(self) -> None:
        """Under an old key the two kinds of token are not confused either."""
        auth_token, refresh_token = self.pair["auth_token"], self.pair["refresh_token"]

        self.assert_not_accepted(
            self.new, {"auth_token": refresh_token, "refresh_token": auth_token}
        )

    def test_other_keys(self) -> None:
        """Keys that resemble a known key are refused."""
        for key in (OLDER, OLD[:-1], OLD.upper(), f"{NEW},{OLD}", f" {OLD}", f"{OLD}\n"):
            pair = {name: self.sign(name, key) for name in ("auth_token", "refresh_token")}
            with self.subTest(key):
                self.assert_not_accepted(self.new, pair)


class TestUnderLoad(unittest.TestCase):
    """Two server processes are restarted one after the other under load."""

    def setUp(self) -> None:
        """Start both servers with the old key and the new one as a fallback."""
        self.url = self.enterContext(scratch.database())
        self.old, self.new = secrets.token_hex(32), secrets.token_hex(32)
        self.servers = [self.start(self.old, self.new) for _ in range(2)]
        self.ended = threading.Event()
        self.answers: list[tuple[str, int, str | None]] = []
        self.last: list[Pair] = []

    def start(self, key: str, fallback: str) -> scratch.Service:
        """Start a server that ends with the test at the latest."""
        keys = {"SECRET_KEY": key, "SECRET_KEY_FALLBACKS": fallback}
        return self.enterContext(scratch.Service(self.url, **keys))

    def ask(self, method: str, path: str, *arguments: Any) -> Pair:
        """Send a request to either server until one responds."""
        while True:
            server = secrets.choice(self.servers)
            try:
                status, answer, _ = server.request(method, path, *arguments)
            except (OSError, http.client.HTTPException, ValueError):
                time.sleep(0.01)
            else:
                self.answers.append((path, status, answer.get("code")))
                return answer

    def keep_requesting(self, name: str) -> None:
        """Log in, then request status and refresh repeatedly until the test ends, and once more."""
        credentials = {"email": f"{name}@test.com", "password": "test"}
        pair = self.ask("POST", "/auth/login", credentials)
        over = False
        while not over and "auth_token" in pair:
            over = self.ended.is_set()
            for _ in range(5):
                self.ask("GET", "/auth/status", None, pair["auth_token"])
                time.sleep(0.05)  # leave the processors to the starting servers
            pair = self.ask("POST", "/auth/refresh", {"refresh_token": pair["refresh_token"]})
        self.last.append(pair)

    def test_no_client_is_refused(self) -> None:
        """Every response is a 200 until all clients have tokens of the new key."""
        names = ["ada", "grace", "hedy"]
        for name in names:
            self.assertEqual(201, self.servers[0].register(name)[0])
        threads = [threading.Thread(target=self.keep_requesting, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        try:
            for number, server in enumerate(self.servers.copy()):
                server.stop()
                self.servers[number] = self.start(self.new, self.old)
        finally:
            self.ended.set()
            for thread in threads:
                thread.join()

        self.assertEqual([], [answer for answer in self.answers if answer[1] != 200])
        self.assertGreater(len(self.answers), 50)
        self.assertEqual(len(names), len(self.last))
        for pair in self.last:
            jwt.decode(pair["auth_token"], self.new, ["HS256"])
