"""examples/resource_server.py: what it accepts and refuses, beside a users service on loopback."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import unittest
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock
from urllib.request import Request

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flask import Flask
from sqlalchemy import delete
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.test import TestResponse

from bench import lines
from examples import resource_server
from project import db
from project.accounts import clients
from project.models import EndedSession
from project.tests import scratch
from project.tests.base import bearer
from project.tests.rows import ORIGIN
from project.tests.tokens.at_jwt_case import (
    MISSING,
    AtJwtTestCase,
    from_base64,
    respelled,
    to_base64,
)
from project.tests.tokens.cases import SECRETS, stored_keys
from project.tests.tokens.claims import claims_of, encode
from project.tokens import signing_keys

JWKS, FEED, TOKEN = "/.well-known/jwks.json", "/oauth/revocations", "/oauth/token"
PLAIN = 'Bearer realm="example"'
INVALID = f'{PLAIN}, error="invalid_token"'
DOCUMENT = (scratch.ROOT / "docs" / "services.md").read_text()
SETTINGS = "ISSUER", "AUDIENCE", "CLIENT_ID", "CLIENT_SECRET"


class _Quiet(WSGIRequestHandler):
    def log(self, *args: object) -> None:
        """Print nothing."""


class Loopback:
    """The users service on a port of 127.0.0.1, which a test can stall, stop, or replace."""

    def __init__(self, app: Flask, port: int) -> None:
        self._app = app
        self.requests: Counter[str] = Counter()  # by path
        self.answer: bytes | None = None  # in place of every other one
        self.goes_on = threading.Event()  # requests wait for it
        self.goes_on.set()
        self._server = make_server(
            "127.0.0.1", port, self._respond, threaded=True, request_handler=_Quiet
        )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def _respond(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.requests[environ["PATH_INFO"]] += 1
        self.goes_on.wait()
        if self.answer is None:
            return self._app(environ, start_response)
        start_response("200 OK", [("Content-Type", "application/json")])
        return [self.answer]

    def stop(self) -> None:
        """Refuse connections from now on."""
        self.goes_on.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


class ExampleTestCase(AtJwtTestCase):
    """A test of the example, with the token of a user who has roles.

    Its time passes by `wait` only. It has no thread: `poll` does what the thread does.
    """

    port: ClassVar[int]
    issuer: ClassVar[str]

    @classmethod
    def setUpClass(cls) -> None:
        """Choose the URL of the users service."""
        super().setUpClass()
        cls.port = scratch.free_port()
        cls.issuer = f"http://127.0.0.1:{cls.port}"
        cls.environment = SECRETS | {"ISSUER": cls.issuer}

    def setUp(self) -> None:
        """Log in, and start the users service and the example."""
        super().setUp()
        self._passed = 0.0
        began = time.monotonic()
        moved = SimpleNamespace(monotonic=lambda: began + self._passed)
        for name in ("jwt.jwk_set_cache.time", "jwt.api_jwk.time"):
            self.enterContext(mock.patch(name, moved))
        self.enterContext(mock.patch.object(resource_server, "monotonic", moved.monotonic))
        self.enterContext(mock.patch.object(resource_server, "Thread"))
        self.secret = clients.create("reports", self.issuer, ["reports"], ORIGIN)
        self.user.roles = ["audits", "reports"]
        db.session.commit()
        self.token = self.log_in()["auth_token"]
        self.serve()
        self.example = self.start_example()

    def serve(self) -> None:
        """Start the users service."""
        self.users = Loopback(self.app, self.port)
        self.addCleanup(self.users.stop)

    def start_example(self, **environment: str) -> Flask:
        """Return the example with these settings."""
        others = {name: text for name, text in os.environ.items() if name not in SETTINGS}
        variables = others | {"ISSUER": self.issuer} | environment
        with mock.patch.dict(os.environ, variables, clear=True):
            return resource_server.create_app()

    def wait(self, seconds: float) -> None:
        """Let this time pass for the example."""
        self._passed += seconds

    def ask(self, token: str, path: str = "/whoami") -> TestResponse:
        """Return the example's response to a token."""
        return self.example.test_client().get(path, headers=bearer(token))

    def assert_accepted(self, *tokens: str) -> None:
        """Check that the example accepts each of these tokens."""
        for token in tokens:
            self.assertEqual(200, self.ask(token).status_code)

    def assert_refused(self, token: str) -> None:  # type: ignore[override]  # of another service
        """Check that the example refuses a token as RFC 6750 says."""
        response = self.ask(token)
        found = response.status_code, response.headers.get("WWW-Authenticate")
        self.assertEqual((401, INVALID), found)

    def assert_unavailable(self, token: str) -> None:
        """Check that the example asks to be asked again later."""
        response = self.ask(token)
        found = response.status_code, response.headers.get("Retry-After")
        self.assertEqual((503, "5"), found)


class TestAnswers(ExampleTestCase):
    """Who may do what, and how that is said."""

    def test_user(self) -> None:
        """The token of a user is accepted, where a scope is required and where none is."""
        expected = {"sub": str(self.user.id), "client_id": "first-party", "scope": "audits reports"}
        self.assertEqual(expected, self.ask(self.token).get_json())
        self.assertEqual({"reports": []}, self.ask(self.token, "/reports").get_json())

    def test_service(self) -> None:
        """A service is a caller like any other, with the scopes that it asked for."""
        for scope, status in (("reports", 200), ("", 403)):
            secret = clients.create(f"s{status}", self.issuer, scope.split(), ORIGIN)
            db.session.commit()
            answer = self.client.post(
                TOKEN, data={"grant_type": "client_credentials"}, auth=(f"s{status}", secret)
            )
            token = self.accepted(answer)["access_token"]
            self.assertEqual(f"s{status}", self.ask(token).get_json()["sub"])
            self.assertEqual(status, self.ask(token, "/reports").status_code)

    def test_no_token(self) -> None:
        """Without a Bearer token there is a challenge without an error."""
        for headers in ({}, {"Authorization": ""}, {"Authorization": "Basic dXNlcjpwYXNz"}):
            with self.subTest(headers=headers):
                response = self.example.test_client().get("/whoami", headers=headers)
                self.assertEqual(401, response.status_code)
                self.assertEqual(PLAIN, response.headers["WWW-Authenticate"])
        self.assertEqual(0, self.users.requests.total())

    def test_scope(self) -> None:
        """A token without the scope is refused with 403, which names the scope."""
        others = ["", "report", "reports2", "REPORTS", "audits reports:read", MISSING]
        for scope in others:
            with self.subTest(scope=scope):
                response = self.ask(self.with_claims(scope=scope), "/reports")
                self.assertEqual(403, response.status_code)
                self.assertEqual(
                    f'{PLAIN}, error="insufficient_scope", scope="reports"',
                    response.headers["WWW-Authenticate"],
                )

    def test_every_scope(self) -> None:
        """A view that names several scopes requires all of them."""

        @self.example.get("/both")
        @resource_server.require("reports", "audits")
        def both() -> str:
            return ""

        self.assertEqual(200, self.ask(self.token, "/both").status_code)
        response = self.ask(self.with_claims(scope="reports"), "/both")
        self.assertEqual(403, response.status_code)
        self.assertIn('scope="reports audits"', response.headers["WWW-Authenticate"])

    def test_spellings(self) -> None:
        """Both spellings of typ are accepted, in any case, and several audiences."""
        for typ in ("AT+JWT", "application/at+jwt", "Application/AT+jwt"):
            self.assert_accepted(self.signed(typ=typ))
        self.assert_accepted(self.with_claims(aud=["https://other.example", self.issuer]))

    def test_audience(self) -> None:
        """AUDIENCE is the audience in place of the issuer."""
        self.example = self.start_example(AUDIENCE="https://api.example")

        self.assert_refused(self.token)
        self.assert_accepted(self.with_claims(aud="https://api.example"))

    def test_length(self) -> None:
        """The service has fewer than 70 lines of code, and 40 more follow the feed."""
        source = Path(resource_server.__file__).read_text()
        self.assertLess(lines.count(source), 110)


class TestForgeries(ExampleTestCase):
    """Forgeries, one by one."""

    def setUp(self) -> None:
        """Make the key of an attacker, and let the example fetch the keys."""
        super().setUp()
        self.others = ec.generate_private_key(ec.SECP256R1())
        self.assert_accepted(self.signed())

    def test_malformed(self) -> None:
        """What is no token is refused, also as a part of the header that is no text."""
        header, payload, signature = self.token.split(".")
        nested = "[" * 50_000 + "]" * 50_000
        for token in (
            *(
                "x",
                "..",
                "a.b",
                "a.b.c",
                "a=b",
                'token="x"',
                f"{header}.{payload}",
                self.token[:-2],
            ),
            *(f"{payload}.{header}.{signature}", f"{header}..{signature}", f"{self.token}.e30"),
            *(f"{encode(part)}.{payload}.{signature}" for part in ("[]", "1", "{", nested)),
            *(self.signed(payload) for payload in ("[]", "null", "{", nested)),
        ):
            with self.subTest(token[:40]):
                self.assert_refused(token)

    def test_none(self) -> None:
        """No spelling of "none" makes a signature unnecessary."""
        for alg in ("none", "None", "NONE", "nOnE", "", None, MISSING, [], 0):
            bare = self.signed(alg=alg).rpartition(".")[0]
            for end in (".", f".{self.token.rpartition('.')[2]}"):
                with self.subTest(alg=alg, end=end[:3]):
                    self.assert_refused(bare + end)

    def test_algorithms(self) -> None:
        """The header says ES256, even if the signature is that of ES256."""
        for alg in ("es256", "ES256K", "ES384", "HS256", "RS256", "PS256", "EdDSA"):
            with self.subTest(alg):
                self.assert_refused(self.signed(alg=alg))

    def test_public_key_as_secret(self) -> None:
        """HS256 with the public key as the secret is refused."""
        public = self.key.public_key()
        stored = stored_keys()[0]["public"]
        secrets = {
            "PEM": public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            "DER": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            "JWK": json.dumps(stored).encode(),
            "short JWK": json.dumps(stored, separators=(",", ":")).encode(),
            "JWKS": self.client.get(JWKS).get_data(),
            "x": from_base64(stored["x"]),
        }
        for name, secret in secrets.items():
            for typ in ("at+jwt", "JWT"):
                header = encode({"alg": "HS256", "typ": typ, "kid": self.kid})
                signed = f"{header}.{encode(claims_of(self.token))}"
                hmac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
                with self.subTest(name, typ=typ):
                    self.assert_refused(f"{signed}.{to_base64(hmac.sign(signed.encode(), secret))}")

    def test_kid(self) -> None:
        """The kid names a published key."""
        kids: list[Any] = ["", "unknown", self.kid[:-1], f"{self.kid} ", MISSING, None, 0, [], {}]
        for kid in [*kids, [self.kid], "../../dev/null", "\ud800", "x" * 10_000]:
            with self.subTest(kid=str(kid)[:50].encode("unicode_escape")):
                self.assert_refused(self.signed(kid=kid))
                self.assert_refused(self.signed(None, self.others, kid=kid))

    def test_headers(self) -> None:
        """Headers that bring a key, or change the rules, are refused, also if we signed them."""
        own = jwt.algorithms.ECAlgorithm.to_jwk(self.others.public_key(), as_dict=True)
        url = f"{self.issuer}{JWKS}"
        others: list[dict[str, Any]] = [{"jku": url}, {"jwk": own}, {"x5c": ["MIIB"]}, {"x5u": url}]
        others += [{"crit": ["exp"], "exp": 0}, {"crit": []}, {"crit": ["b64"], "b64": True}]
        for headers in others:
            with self.subTest(headers=headers):
                self.assert_refused(self.signed(**headers))
                self.assert_refused(self.signed(None, self.others, **headers))

    def test_other_key(self) -> None:
        """The signature of another key is refused, and a changed payload or signature."""
        header, _, signature = self.token.split(".")
        changed = encode(claims_of(self.token) | {"scope": "admin"})
        self.assert_refused(self.signed(None, self.others))
        self.assert_refused(f"{header}.{changed}.{signature}")
        for zeros in (64, 63, 65, 0):
            self.assert_refused(f"{self.token.rpartition('.')[0]}.{to_base64(bytes(zeros))}")

    def test_refresh_token(self) -> None:
        """A refresh token is refused, and an auth token from before the service had an issuer."""
        before = self.log_in(self.server(ISSUER=""))["auth_token"]
        self.assertEqual("HS256", jwt.get_unverified_header(before)["alg"])
        self.assert_refused(before)
        self.assert_refused(self.log_in()["refresh_token"])

    def test_typ(self) -> None:
        """Another typ is refused, even if the service signed it."""
        for typ in (
            "JWT",
            "refresh+jwt",
            "jwt",
            "",
            "at",
            "at+jwt+x",
            "text/at+jwt",
            None,
            MISSING,
        ):
            with self.subTest(typ=typ):
                self.assert_refused(self.signed(typ=typ))

    def test_claims(self) -> None:
        """Another issuer or audience is refused, and a token that lacks a claim."""
        required = resource_server.OPTIONS["require"]
        changes: list[dict[str, Any]] = [{name: MISSING} for name in required]
        changes += [{name: None} for name in required]
        changes += [{"iss": "https://attacker.example"}, {"iss": f"{self.issuer}/"}]
        changes += [{"aud": "https://other.example"}, {"aud": []}, {"aud": f"{self.issuer}/"}]
        for change in changes:
            with self.subTest(change=change):
                self.assert_refused(self.with_claims(**change))

    def test_times(self) -> None:
        """The clocks may differ by 5 seconds; not more."""
        now = int(time.time())
        self.assert_accepted(self.with_claims(exp=now - 2), self.with_claims(iat=now + 3))
        for name, value in (("exp", now - 6), ("exp", 0), ("exp", "x"), ("iat", now + 60)):
            with self.subTest(name, value=value):
                self.assert_refused(self.with_claims(**{name: value}))


class TestKeys(ExampleTestCase):
    """When the example asks for the public keys, and who waits for them."""

    def fetches(self) -> int:
        """Return how often the keys were requested."""
        return self.users.requests[JWKS]

    def unknown(self) -> str:
        """Return a token that names a key which does not exist."""
        return self.signed(kid="unknown")

    def test_seldom(self) -> None:
        """Known keys are fetched every minute, and nothing else is asked for."""
        for seconds, fetches in ((0, 1), (59, 1), (1, 2), (59, 2), (3_600, 3)):
            self.wait(seconds)
            self.assert_accepted(self.token, self.token)
            self.assertEqual(fetches, self.fetches())
        self.assertEqual({JWKS: 3}, self.users.requests)

    def test_unknown_kids(self) -> None:
        """10,000 tokens with unknown keys cause one fetch in 5 seconds."""
        self.assert_accepted(self.token)
        self.wait(5)
        _, payload, signature = self.token.split(".")
        header = {"alg": "ES256", "typ": "at+jwt"}
        with self.example.app_context():
            for number in range(10_000):
                unknown = encode(header | {"kid": f"unknown {number}"})
                with self.assertRaises(jwt.InvalidKeyError):
                    resource_server.verify(f"{unknown}.{payload}.{signature}")
        self.assertEqual(2, self.fetches())

    def test_new_key(self) -> None:
        """A new key is found by its first token, 5 seconds after the last fetch."""
        self.assert_accepted(self.token)
        signing_keys.rotate(at_once=True)
        db.session.commit()
        self.move_clock(signing_keys.MAX_AGE)
        token = self.new_token()
        self.assertNotEqual(self.kid, jwt.get_unverified_header(token)["kid"])

        self.assert_refused(token)
        self.wait(5)
        self.assert_accepted(token)
        self.assert_refused(self.token)

    def test_rotation(self) -> None:
        """A planned rotation is noticed by nobody."""
        for _ in range(3):
            signing_keys.rotate()
            db.session.commit()
            for _ in range(20):
                self.move_clock(60)
                self.wait(60)
                self.assert_accepted(self.new_token())

    def new_token(self) -> str:
        """Return the token of a new session, as if it had been issued now."""
        claims = claims_of(self.log_in()["auth_token"])
        now = int(time.time())
        kid, key = signing_keys.signing_key()
        return self.signed(claims | {"iat": now, "exp": now + 60}, key, kid=kid)

    def test_stalled(self) -> None:
        """While a fetch stalls, known keys are used, and further unknown ones are refused."""
        self.assert_accepted(self.token)
        self.wait(5)
        self.users.goes_on.clear()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(self.ask, self.unknown())
            while self.fetches() < 2:
                time.sleep(0.001)
            self.assert_accepted(self.token)
            self.assert_refused(self.unknown())
            self.assertFalse(first.done())
            self.users.goes_on.set()
        self.assertEqual(401, first.result().status_code)
        self.assertEqual(2, self.fetches())

    def test_down_at_start(self) -> None:
        """Without any key the answer is 503, and the users service is asked every 5 seconds."""
        self.users.stop()
        self.assert_unavailable(self.token)
        self.serve()
        self.assert_unavailable(self.token)
        self.assertEqual(0, self.fetches())
        self.wait(5)
        self.assert_accepted(self.token)

    def test_down_later(self) -> None:
        """If the users service cannot be asked, the known keys are used for 5 minutes."""
        self.assert_accepted(self.token)
        self.users.stop()
        for _ in range(4):
            self.wait(70)
            self.assert_accepted(self.token)
            self.assert_refused(self.unknown())
        self.wait(30)
        self.assert_unavailable(self.token)
        self.assert_unavailable(self.unknown())
        self.assert_refused("malformed")
        self.serve()
        self.wait(5)
        self.assert_accepted(self.token)

    def test_other_answers(self) -> None:
        """What is no set of keys does not replace the known ones."""
        self.assert_accepted(self.token)
        for answer in (b"", b"<html>", b"[]", b"{}", b'{"keys": []}', b'{"keys": [{}]}', b"\xff"):
            with self.subTest(answer):
                self.users.answer = answer
                self.wait(60)
                self.assert_accepted(self.token)
                self.users.answer = None
                self.wait(60)
                self.assert_accepted(self.token)

    def test_expiry(self) -> None:
        """Keys that the users service no longer publishes are used for a minute at most."""
        self.assert_accepted(self.token)
        signing_keys.rotate(at_once=True)
        db.session.commit()
        self.move_clock(signing_keys.MAX_AGE)
        self.wait(60)
        self.assert_refused(self.token)


class Stopped(BaseException):
    """Ends the loop of the feed in place of its next wait."""


class TestFeed(ExampleTestCase):
    """The example, which follows the feed of ended sessions."""

    def setUp(self) -> None:
        """Read the feed for the first time."""
        super().setUp()
        self.enterContext(mock.patch.object(resource_server, "sleep", side_effect=Stopped))
        self.example = self.start_example(CLIENT_ID="reports", CLIENT_SECRET=self.secret)
        self.poll()

    def poll(self) -> None:
        """Do what the thread does every 5 seconds."""
        with self.assertRaises(Stopped):
            self.example.config["FEED"].follow()

    def failing_poll(self) -> None:
        """Poll, and check that the log says that it failed."""
        with self.assertLogs(resource_server.__name__, "WARNING") as logs:
            self.poll()
        self.assertNotIn(self.secret, str(logs.output))

    def log_out(self, token: str) -> None:
        """End the session of a token."""
        self.accepted(self.client.get("/auth/logout", headers=bearer(token)))

    def test_ended(self) -> None:
        """A session that has ended is refused after the next poll, and no other one."""
        other = self.log_in()["auth_token"]
        self.assert_accepted(self.token, other)
        self.log_out(self.token)
        self.assert_accepted(self.token)
        self.poll()
        self.assert_refused(self.token)
        self.assert_accepted(other)
        self.log_out(other)
        self.poll()
        for token in (self.token, other):
            self.assert_refused(token)

    def test_ended_before(self) -> None:
        """A service that starts later learns of it at its first poll."""
        self.log_out(self.token)
        self.example = self.start_example(CLIENT_ID="reports", CLIENT_SECRET=self.secret)
        self.poll()
        self.assert_refused(self.token)

    def test_both_spellings(self) -> None:
        """Both spellings of a signature are accepted, and belong to one session."""
        other = respelled(self.token)
        self.assertNotEqual(self.token, other)
        self.assert_accepted(self.token, other)

        self.log_out(other)
        self.poll()

        self.assert_refused(self.token)
        self.assert_refused(other)

    def test_pages(self) -> None:
        """All pages are read in one poll, and none twice."""
        tokens = [self.log_in()["auth_token"] for _ in range(5)]
        for token in tokens:
            self.log_out(token)
        with mock.patch("examples.resource_server.Request", two_a_page):
            self.poll()
            before = self.users.requests[FEED]
            self.poll()
        for token in tokens:
            self.assert_refused(token)
        self.assertEqual((1 + 4, 1), (before, self.users.requests[FEED] - before))

    def test_forgotten(self) -> None:
        """A session is forgotten once its last token has expired, by any clock."""
        self.log_out(self.token)
        self.poll()
        feed = self.example.config["FEED"]
        [(sid, expires_at)] = feed.ended.items()
        self.assertEqual(claims_of(self.token)["exp"], int(expires_at.timestamp()))
        for seconds, known in ((9, True), (11, False)):
            moved = mock.Mock(wraps=datetime)
            moved.now.return_value = expires_at + timedelta(seconds=seconds)
            with mock.patch("examples.resource_server.datetime", moved):
                self.poll()
            self.assertEqual(known, feed.has_ended(sid))

    def test_cursor_of_another_database(self) -> None:
        """After 400 for the cursor, the example starts again and forgets nothing."""
        for token in (self.token, self.log_in()["auth_token"]):
            self.log_out(token)
        self.poll()
        db.session.execute(delete(EndedSession))  # a backup was restored
        db.session.commit()
        other = self.log_in()["auth_token"]
        self.failing_poll()
        self.log_out(other)
        self.poll()
        self.assert_refused(other)
        self.assert_refused(self.token)

    def test_unreadable(self) -> None:
        """If the feed could not be read for a minute, the answer is 503 until it can be."""
        self.assert_accepted(self.token)
        self.users.stop()
        self.failing_poll()
        self.wait(59)
        self.assert_accepted(self.token)
        self.wait(2)
        self.assert_unavailable(self.token)
        self.failing_poll()
        self.assert_unavailable(self.token)
        self.serve()
        self.poll()
        self.assert_accepted(self.token)

    def test_not_yet_read(self) -> None:
        """Before the feed was read, the answer is 503, except to what is no valid token."""
        self.example = self.start_example(CLIENT_ID="reports", CLIENT_SECRET=self.secret)

        self.assert_unavailable(self.token)
        self.assert_refused("malformed")

    def test_wrong_secret(self) -> None:
        """With a wrong secret the answer is 503."""
        self.example = self.start_example(CLIENT_ID="reports", CLIENT_SECRET="wrong")
        self.failing_poll()
        self.assert_unavailable(self.token)

    def test_other_answers(self) -> None:
        """The thread outlives every answer."""
        others = b"", b"<html>", b"[]", b"{}", b'{"data": {"revocations": [{}]}}', b'{"data": 1}'
        for self.users.answer in others:
            with self.subTest(self.users.answer):
                self.failing_poll()
        self.users.answer = None
        self.log_out(self.token)
        self.poll()
        self.assert_refused(self.token)


def two_a_page(url: str, headers: dict[str, str]) -> Request:
    """Return the request for a page of two sessions in place of a whole page."""
    return Request(f"{url}{'&' if '?' in url else '?'}limit=2", headers=headers)  # noqa: S310  # http


class TestDocument(ExampleTestCase):
    """docs/services.md says what is."""

    def test_claims(self) -> None:
        """The table of claims has all claims of a token."""
        table = DOCUMENT.split("\n## What a token says\n")[1].split("\n## ")[0]
        rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        told = [name for row in rows for name in re.findall(r"`(\w+)`", row)]

        self.assertEqual(sorted(claims_of(self.token)), sorted(told))
        self.assertEqual({"alg", "typ", "kid"}, jwt.get_unverified_header(self.token).keys())


@unittest.skipUnless(shutil.which("curl"), "needs curl")
class TestServiceCalls(unittest.TestCase):
    """The commands of docs/services.md, run as written, but for the ports."""

    def setUp(self) -> None:
        """Migrate a database; nothing runs yet."""
        url = self.enterContext(scratch.database())
        variables = {"DATABASE_URL": url, "SECRET_KEY": "any", "ENCRYPTION_KEYS": "any other"}
        self.assertEqual(0, scratch.manage("db", "upgrade", **variables).returncode)
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.variables = scratch.settings(**variables) | {"PATH": binaries}
        self.ports = {str(port): str(scratch.free_port()) for port in (5000, 5001, 5002)}

    def run_block(self, block: str) -> str:
        """Run the commands of a block, and return what they print; servers go on."""
        printed = ""
        for line in block.replace("\\\n", "").splitlines():
            command = re.sub(r"\b500[012]\b", lambda found: self.ports[found[0]], line)
            if command.startswith("export "):
                self.variables |= dict(word.split("=") for word in command.split()[1:])
            elif "runserver" in command:
                self.start(f"{command} --port {self.ports['5000']}")
            elif "flask " in command:
                self.start(command)
            elif "=..." not in command:
                printed += self.output(command)
        for name, pattern in (("SECRET", r"Secret: +(\S+)"), ("TOKEN", r'"auth_token":"(.+?)"')):
            if found := re.findall(pattern, printed):
                self.variables[name] = found[-1]
        return printed

    def output(self, command: str) -> str:
        """Return what a command prints."""
        return subprocess.run(
            ["bash", "-c", command],  # noqa: S607  # bash from PATH
            cwd=scratch.ROOT,
            env=self.variables,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def start(self, command: str) -> None:
        """Start a server, and wait until it accepts connections on its port."""
        server = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"],  # noqa: S607  # bash from PATH
            cwd=scratch.ROOT,
            env=self.variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(server.wait, 10)
        self.addCleanup(server.terminate)
        port = int(command.split()[-1])
        self.assertTrue(until(lambda: accepts(port), scratch.START_TIMEOUT))

    def prints(self, block: str, lines: str) -> bool:
        """Run a block, and tell whether it prints these lines."""
        return set(lines.splitlines()) <= set(self.run_block(block).splitlines())

    def test_calls(self) -> None:
        """Each command prints what is shown below it, and a logout is noticed in time."""
        walk, routes = (
            DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]
            for title in ("Start two services beside this one", "Routes")
        )
        blocks = re.findall(r"```sh\n(.*?)```(?:\n\n```text\n(.*?)```)?", walk, re.DOTALL)
        for block, shown in blocks:
            with self.subTest(block):
                limit = 5 + 2 if "invalid_token" in shown else 0  # 2 for the requests
                self.assertTrue(until(partial(self.prints, block, shown), limit))

        self.run_block(next(block for block, _ in blocks if "/auth/login" in block))
        calls = re.findall(r"```sh\n(.*?)```\n\n```json\n(.*?)```", routes, re.DOTALL)
        for block, shown in calls:
            with self.subTest(block):
                expected, found = json.loads(shown), json.loads(self.run_block(block))
                self.assertEqual(set(expected), set(found))
                self.assertEqual(expected.get("message"), found.get("message"))
        self.assertEqual((13, 5), (len(blocks), len(calls)))


def accepts(port: int) -> bool:
    """Tell whether a server accepts connections on a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Tell whether a condition is met within this time; it is checked once at least."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
