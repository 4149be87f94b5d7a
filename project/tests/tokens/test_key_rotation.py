"""Another SECRET_KEY, step by step: nobody is logged out, and a key that is dropped is dropped."""

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

from project import create_app, db
from project.api.models import User
from project.config import BaseConfig, DevelopmentConfig, ProductionConfig, TestingConfig
from project.tests import scratch
from project.tests.base import Client, bearer
from project.tests.conformance import TESTING
from project.tests.test_config import PRODUCTION, ConfigTestCase
from project.tests.test_refresh import EXPIRED, REUSED
from project.tests.test_sessions import CREDENTIALS, ENDED, INVALID, SessionsTestCase, claims_of
from project.tests.utils import stored_sessions

OLDER, OLD, NEW = (f"{name}. " * 8 + "key" for name in ("older", "old", "new"))
LIFE = 3_600  # seconds
Pair = dict[str, Any]  # the answer to a login or a refresh


class RotationTestCase(SessionsTestCase):
    """A test of servers with keys of their own, on one database."""

    def server(self, key: str, *fallbacks: str) -> FlaskClient:
        """Return a client of a server that was started with these keys."""
        keys = {"SECRET_KEY": key, "SECRET_KEY_FALLBACKS": ",".join(fallbacks)}
        with mock.patch.dict(os.environ, keys):
            app = create_app(TESTING)
        app.config["TOKEN_EXPIRATION_SECONDS"] = app.config["REFRESH_EXPIRATION_SECONDS"] = LIFE
        app.test_client_class = Client
        with app.app_context():
            for engine in db.engines.values():
                self.addCleanup(engine.dispose)
        return app.test_client()

    def accepted(self, response: TestResponse) -> Pair:
        """Return the answer to a request that has to be granted."""
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        answer: Pair = response.get_json()
        return answer

    def log_in(self, server: FlaskClient) -> Pair:
        """Return the tokens of a new session."""
        return self.accepted(server.post("/auth/login", json=CREDENTIALS))

    def status(self, server: FlaskClient, pair: Pair) -> TestResponse:
        """Return the answer to who is calling."""
        return server.get("/auth/status", headers=bearer(pair["auth_token"]))

    def refresh(self, server: FlaskClient, pair: Pair) -> TestResponse:
        """Return the answer to a refresh token."""
        return server.post("/auth/refresh", json={"refresh_token": pair["refresh_token"]})

    def assert_signed(self, pair: Pair, key: str) -> None:
        """Check with which key both tokens of a pair were signed."""
        for name in ("auth_token", "refresh_token"):
            jwt.decode(
                pair[name],
                key,
                algorithms=["HS256"],
                options={"verify_aud": False, "verify_exp": False, "verify_iat": False},
            )

    def assert_taken(self, server: FlaskClient, pair: Pair) -> None:
        """Check that a server takes both tokens."""
        self.accepted(self.status(server, pair))
        self.accepted(self.refresh(server, pair))

    def assert_not_taken(
        self, server: FlaskClient, pair: Pair, refusal: tuple[int, str, str] = INVALID
    ) -> None:
        """Check that a server refuses both tokens, and that this ends nothing."""
        before = stored_sessions()
        self.assert_error(self.status(server, pair), *refusal)
        self.assert_error(self.refresh(server, pair), *refusal)
        self.assertEqual(before, stored_sessions())


class TestSteps(RotationTestCase):
    """The three steps, each while some servers have taken it and others have not."""

    def test_every_server_takes_what_any_of_them_signs(self) -> None:
        """At no moment does a server meet a token that it does not know."""
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
                        self.assert_taken(server, self.log_in(signer))

    def test_tokens_from_before_the_second_step(self) -> None:
        """They stay good to their end; a refresh brings the new key."""
        pair = self.log_in(self.server(OLD))
        server = self.server(NEW, OLD)

        self.accepted(self.status(server, pair))
        following = self.accepted(self.refresh(server, pair))

        self.assert_signed(pair, OLD)
        self.assert_signed(following, NEW)
        self.assert_taken(self.server(OLD, NEW), following)

    def test_without_the_first_step(self) -> None:
        """A server that was not told of the new key refuses what is signed with it."""
        self.assert_not_taken(self.server(OLD), self.log_in(self.server(NEW, OLD)))

    def test_last_step(self) -> None:
        """A key that was dropped is any other key, also to who has just seen a token of it."""
        pair = self.log_in(self.server(OLD))
        server = self.server(NEW, OLD)
        self.accepted(self.status(server, pair))

        server.application.config["SECRET_KEY_FALLBACKS"] = ()

        self.assert_not_taken(server, pair)
        self.assert_not_taken(self.server(NEW), pair)

    def test_several_old_keys(self) -> None:
        """Keys may be rotated again before the tokens of the last rotation have ended."""
        oldest = self.log_in(self.server(OLDER))
        old = self.log_in(self.server(OLD, OLDER))
        for fallbacks in ((OLD, OLDER), (OLDER, OLD), (NEW[::-1], OLDER, OLD[::-1], OLD)):
            server = self.server(NEW, *fallbacks)
            with self.subTest(fallbacks=fallbacks):
                self.accepted(self.status(server, oldest))
                self.accepted(self.status(server, old))
        self.assert_not_taken(self.server(NEW, OLD), oldest)

    def test_end_of_a_session(self) -> None:
        """What is ended on one server is ended on the other, whichever key is which."""
        one, other = self.server(OLD, NEW), self.server(NEW, OLD)
        for signer, server in ((one, other), (other, one)):
            pair = self.log_in(signer)
            self.accepted(server.post("/auth/logout", headers=bearer(pair["auth_token"])))
            for refusing in (one, other):
                self.assert_not_taken(refusing, pair, ENDED)

    def test_model(self) -> None:
        """The model's own tokens are signed with the new key, and taken from the old one."""
        tokens = {}
        for name, client in {"old": self.server(OLD), "new": self.server(NEW, OLD)}.items():
            with client.application.app_context():
                tokens[name] = self.user.encode_auth_token(self.user.id)
                decoded = {key: User.decode_auth_token(token) for key, token in tokens.items()}

        self.assertEqual({"old": self.user.id, "new": self.user.id}, decoded)
        with self.server(NEW).application.app_context():
            self.assertEqual(INVALID[1], User.decode_auth_token(tokens["old"]))
            self.assertEqual(self.user.id, User.decode_auth_token(tokens["new"]))


class TestLostAnswer(RotationTestCase):
    """A refresh whose answer got lost, repeated at a server with another key."""

    def test_within_ten_seconds(self) -> None:
        """The pair is the same but for its signature, and whichever arrived is good."""
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
                    self.assert_taken(other, self.accepted(self.refresh(one, (lost, again)[kept])))

    def test_later(self) -> None:
        """After that it is a theft, and the session ends for all."""
        one, other = self.server(OLD, NEW), self.server(NEW, OLD)
        pair = self.log_in(one)
        stolen = self.accepted(self.refresh(one, pair))
        self.move_clock(10.000001)

        self.assert_error(self.refresh(other, pair), *REUSED)
        self.assert_not_taken(one, stolen, ENDED)


class TestFallback(RotationTestCase):
    """A key that verifies too is asked as strictly as the one that signs."""

    def setUp(self) -> None:
        """Log in before the key was changed."""
        super().setUp()
        self.pair = self.log_in(self.server(OLD))
        self.new = self.server(NEW, OLD)

    def sign(self, name: str, key: str, **header: object) -> str:
        """Return a token of the pair, signed anew with a key and a header of our own."""
        type_ = jwt.get_unverified_header(self.pair[name])["typ"]
        headers = {"typ": type_} | header
        return jwt.encode(claims_of(self.pair[name]), key, algorithm="HS256", headers=headers)

    def test_expired(self) -> None:
        """A genuine token of an old key says when it is over, and a forged one never does."""
        forged = {name: self.sign(name, "0" * 32) for name in ("auth_token", "refresh_token")}
        self.move_clock(LIFE)

        self.assert_not_taken(self.new, self.pair, EXPIRED)
        self.assert_not_taken(self.new, forged)
        self.assert_not_taken(self.server(NEW), self.pair)

    def test_kid(self) -> None:
        """No token chooses its key."""
        for key in (OLD, NEW):
            for kid in (OLD, NEW, "0", "1", "/dev/null"):
                pair = {
                    name: self.sign(name, key, kid=kid) for name in ("auth_token", "refresh_token")
                }
                with self.subTest(kid=kid):
                    self.assert_not_taken(self.new, pair)
        again = {name: self.sign(name, OLD) for name in ("auth_token", "refresh_token")}
        self.assert_taken(self.new, again)

    def test_kinds(self) -> None:
        """Under an old key too, neither kind of token is taken for the other."""
        auth_token, refresh_token = self.pair["auth_token"], self.pair["refresh_token"]

        self.assert_not_taken(self.new, {"auth_token": refresh_token, "refresh_token": auth_token})

    def test_other_keys(self) -> None:
        """Keys that only look like those that are known sign nothing."""
        for key in (OLDER, OLD[:-1], OLD.upper(), f"{NEW},{OLD}", f" {OLD}", f"{OLD}\n"):
            pair = {name: self.sign(name, key) for name in ("auth_token", "refresh_token")}
            with self.subTest(key):
                self.assert_not_taken(self.new, pair)


class TestUnderLoad(unittest.TestCase):
    """Two server processes, restarted one after the other while clients go on."""

    def setUp(self) -> None:
        """Start both with the old key, and with the new one as a fallback."""
        self.url = self.enterContext(scratch.database())
        self.old, self.new = secrets.token_hex(32), secrets.token_hex(32)
        self.servers = [self.start(self.old, self.new) for _ in range(2)]
        self.ended = threading.Event()
        self.answers: list[tuple[str, int, str | None]] = []
        self.last: list[Pair] = []

    def start(self, key: str, fallback: str) -> scratch.Service:
        """Start a server, which ends with the test at the latest."""
        keys = {"SECRET_KEY": key, "SECRET_KEY_FALLBACKS": fallback}
        return self.enterContext(scratch.Service(self.url, **keys))

    def ask(self, method: str, path: str, *arguments: Any) -> Pair:
        """Return the answer of either server; where one does not answer, ask again."""
        while True:
            server = secrets.choice(self.servers)
            try:
                status, answer, _ = server.request(method, path, *arguments)
            except (OSError, http.client.HTTPException, ValueError):
                time.sleep(0.01)
            else:
                self.answers.append((path, status, answer.get("code")))
                return answer

    def go_on(self, name: str) -> None:
        """Log in, then ask who one is and refresh, over and over, and once more at the end."""
        credentials = {"email": f"{name}@test.com", "password": "test"}
        pair = self.ask("POST", "/auth/login", credentials)
        over = False
        while not over and "auth_token" in pair:
            over = self.ended.is_set()
            for _ in range(5):
                self.ask("GET", "/auth/status", None, pair["auth_token"])
                time.sleep(0.05)  # servers that start need the processors too
            pair = self.ask("POST", "/auth/refresh", {"refresh_token": pair["refresh_token"]})
        self.last.append(pair)

    def test_no_client_is_refused(self) -> None:
        """Every request that is answered is answered with a 200, until all have the new key."""
        names = ["ada", "grace", "hedy"]
        for name in names:
            self.assertEqual(201, self.servers[0].register(name)[0])
        threads = [threading.Thread(target=self.go_on, args=(name,)) for name in names]
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


class TestSettings(ConfigTestCase):
    """SECRET_KEY_FALLBACKS."""

    def fallbacks(self, config: type[BaseConfig], text: str) -> tuple[str, ...]:
        """Return the keys that a setting stands for."""
        return config.from_environment(
            PRODUCTION | {"SECRET_KEY_FALLBACKS": text}
        ).SECRET_KEY_FALLBACKS

    def test_keys(self) -> None:
        """Keys stand between commas, to the letter; there are none unless told."""
        one, two = secrets.token_hex(32), secrets.token_urlsafe(32)
        for config in (ProductionConfig, BaseConfig, DevelopmentConfig, TestingConfig):
            with self.subTest(config=config.__name__):
                self.assertEqual((), self.fallbacks(config, ""))
                self.assertEqual((), self.fallbacks(config, "  "))
                self.assertEqual((one,), self.fallbacks(config, one))
                self.assertEqual((one, two), self.fallbacks(config, f"{one},{two}"))
                self.assertEqual((f"{one}\n",), self.fallbacks(config, f"{one}\n"))

    def test_refused(self) -> None:
        """What cannot be meant is refused, and no key is shown."""
        keys = [secrets.token_hex(32) for _ in range(6)]
        present = PRODUCTION["SECRET_KEY"]
        for text, reason in {
            f"{keys[0]},": "an empty key",
            f",{keys[0]}": "an empty key",
            f"{keys[0]},,{keys[1]}": "an empty key",
            ",": "an empty key",
            f"{keys[0]}, {keys[1]}": "a blank beside a comma",
            f"{keys[0]}\t,{keys[1]}": "a blank beside a comma",
            f"{keys[0]}, ": "a blank beside a comma",
            f"{keys[0]},{keys[1]},{keys[0]}": "a key in it twice",
            f"{keys[0]},{present}": "the SECRET_KEY itself",
            present: "the SECRET_KEY itself",
            ",".join(keys): "more than 5 keys",
        }.items():
            for config in (ProductionConfig, DevelopmentConfig, TestingConfig):
                with self.subTest(reason, config=config.__name__):
                    environment = PRODUCTION | {"SECRET_KEY_FALLBACKS": text}
                    line = self.assert_refused(config, environment, "SECRET_KEY_FALLBACKS", reason)
                    for key in (*keys, present):
                        self.assertNotIn(key, line)

    def test_weak_keys_are_refused(self) -> None:
        """An old key was once good enough to sign, or it is none; the complaint says which."""
        strong = secrets.token_hex(32)
        for weak, reason in {
            "changeme": "shorter than 32 bytes",
            secrets.token_hex(16)[:31]: "shorter than 32 bytes",
            "my_precious_my_precious_my_precious": "well-known or trivial",
            "x" * 64: "well-known or trivial",
        }.items():
            for config in (ProductionConfig, BaseConfig):
                environment = PRODUCTION | {"SECRET_KEY_FALLBACKS": f"{strong},{weak}"}
                with self.subTest(reason, config=config.__name__):
                    line = self.assert_refused(
                        config, environment, "SECRET_KEY_FALLBACKS", "number 2", reason
                    )
                    self.assertNotIn(weak, line)
            self.assertEqual((weak,), self.fallbacks(DevelopmentConfig, weak))

    def test_all_at_once(self) -> None:
        """A complaint about these keys hides none about other settings."""
        wrong = {"SECRET_KEY": "short", "SECRET_KEY_FALLBACKS": "short", "BODY_TIMEOUT": "0"}

        self.assert_refused(
            ProductionConfig, wrong, "SECRET_KEY is", "SECRET_KEY_FALLBACKS has", "BODY_TIMEOUT"
        )
