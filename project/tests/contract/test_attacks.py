"""Random attacks: no request gets a server error or a response that is not documented.

Each route gets a hundred requests, the same in every run. ATTACKS=10000 sends that many, and
different ones in every run. Hypothesis shrinks and prints a request that fails.
"""

import contextlib
import contextvars
import http.client
import io
import json
import os
import re
import socket
import tempfile
import unittest
from typing import Any, NamedTuple
from unittest import mock

import jwt
import pyotp
from hypothesis import HealthCheck, Phase, configuration, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, insert, select, update
from werkzeug.test import create_environ, run_wsgi_app

from project import clock, db, errors
from project.accounts import links, second_factor
from project.accounts.second_factor import Method
from project.lib import database
from project.models import User, totp_factors_table
from project.tests import scratch
from project.tests.base import BaseTestCase
from project.tests.lib.log_capture import INJECTIONS
from project.tests.rows import add_user, start_session
from project.tests.scratch import Service

ATTACKS = int(os.environ.get("ATTACKS") or 0)
# Every feature is on, and no limit is ever reached.
SETTINGS = {
    "RATE_LIMITS": "true",
    "LOGIN_FAILURES_PER_ACCOUNT": "10000",
    "LOGIN_FAILURES_PER_ADDRESS": "1000000",
    "REGISTRATIONS_PER_ADDRESS": "1000000",
    "TRUSTED_PROXIES": "1",
    "CORS_ORIGINS": "https://app.example",
    "USERS_API_OPEN": "false",
    "API_DOCS": "false",  # its page is no JSON
    "SMTP_URL": "smtp://127.0.0.1:1",  # nothing sends the emails
    "MAIL_FROM": "users@app.example",
    "LINK_BASE_URL": "https://app.example",
}
PASSWORD = "correct horse"
# These are always refused here, as the caller is the only admin, and has no link from an email.
ONLY_REFUSED = {
    ("DELETE", "/users/<user_id>"),
    ("DELETE", "/users/<user_id>/totp"),
    ("DELETE", "/auth/account"),
    *(
        ("POST", f"/auth/{path}")
        for path in ("password/reset", "verify", "email/confirm", "invitation")
    ),
}
# These are for a user without an authenticator.
ENROLMENT = {("POST", "/auth/totp"), ("POST", "/auth/totp/confirm")}
# Placeholders for the tokens of a live session, its ID and its user, and for what a login with a
# code needs.
AUTH, REFRESH, SESSION, USER = "<auth token>", "<refresh token>", "<session id>", "<user id>"
MFA, CODE = "<mfa token>", "<code>"


def attacks(examples: int) -> settings:
    """Return Hypothesis settings for this many attacks, or as many as ATTACKS says."""
    return settings(
        deadline=None,
        database=None,
        derandomize=not ATTACKS,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        max_examples=ATTACKS or examples,
        suppress_health_check=[HealthCheck.too_slow],
    )


def catalogue(kind: type[errors.ServiceError] = errors.ServiceError) -> set[tuple[int, str, str]]:
    """Return status, code and message of every error below 500."""
    entries = {(kind.status, kind.code, kind.message)} if kind.status < 500 else set()
    return entries.union(*(catalogue(each) for each in kind.__subclasses__()))


CATALOGUE = catalogue()


class Attack(NamedTuple):
    """A request without its path, as a WSGI server passes it on.

    Each character of a text stands for one byte, as in PEP 3333.
    """

    method: str | None  # None: the route's own method
    query: str
    headers: dict[str, str]
    body: bytes
    length: str | None  # the declared length; None: the real one
    terminated: bool  # whether the server marks the end of the body


def as_bytes(text: str) -> str:
    """Return the text whose characters stand for the bytes of `text` in UTF-8."""
    return text.encode("utf-8", "surrogatepass").decode("latin-1")


def mostly(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw from `usual` seven times out of eight, so that oddities also come one at a time."""
    return st.sampled_from([usual] * 7 + [odd]).flatmap(lambda strategy: strategy)


# Every byte, surrogates, and characters that resemble others or change the direction of text.
ALPHABET = (
    "".join(map(chr, range(256))) + "\u0301\u0665\u2028\u202e\u3000\ud800\udfff\ufeff\U0001f600"
)
TEXTS = st.text(ALPHABET, max_size=20) | st.sampled_from(
    [*INJECTIONS, "", "0", "1", "-1", "1e400", "9" * 5_000, "a\u0301" * 3_000, "../.."]
)
RAW = TEXTS.map(as_bytes) | st.text(ALPHABET[:256], max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
NAMES = st.integers(0, 10**9).map("user{}".format)
PASSWORDS = mostly(st.just(PASSWORD), st.just("wrong"))
# The fields of all routes; each route ignores those of the others.
FIELDS = {
    "username": NAMES,
    "email": st.just("admin@test.com") | NAMES.map("{}@test.com".format),
    "password": PASSWORDS,
    "refresh_token": mostly(st.just(REFRESH), st.just(AUTH)),
    "current_password": PASSWORDS,
    "new_password": PASSWORDS,
    "keep_sessions": st.booleans(),
    "token": mostly(st.just(AUTH), TEXTS),
    "mfa_token": mostly(st.just(MFA), st.just(AUTH)),
    "code": mostly(st.just(CODE), st.just("000000")),
}
CHANGES = st.dictionaries(st.sampled_from(sorted(FIELDS)), VALUES, max_size=1)
OBJECTS = st.builds(
    lambda fields, changes: fields | changes, st.fixed_dictionaries(FIELDS), CHANGES
)
TEXT_BODIES = st.builds(
    lambda value, ascii_only, encoding, end: json.dumps(value, ensure_ascii=ascii_only).encode(
        encoding, "surrogatepass"
    )[:end],
    mostly(OBJECTS, VALUES),
    st.booleans(),
    mostly(st.just("utf-8"), st.just("utf-16")),
    mostly(st.none(), st.integers(0, 100)),
)
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            *("Accept", "Access-Control-Request-Method", "Content-Encoding", "Cookie", "Host"),
            *("If-None-Match", "Origin", "Range", "Transfer-Encoding", "User-Agent"),
            *("X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Request-ID"),
            "X-HTTP-Method-Override",
        ]
    ),
    st.sampled_from(["*", "https://app.example", "https", "192.0.2.1", "chunked", "DELETE"]) | RAW,
    max_size=4,
)
AUTHORIZATIONS = st.sampled_from(
    [f"bearer {AUTH}", f"Bearer {REFRESH}", f"Basic {AUTH}"]
) | RAW.map(f"Bearer {AUTH}{{}}".format)
QUERIES = st.lists(
    st.sampled_from(["limit=5", "scope=all", "scope=others", "after=0-1"])
    | st.sampled_from(["limit={}", "after={}", "scope={}", "{}", "{}=1"]).flatmap(
        lambda form: RAW.map(form.format)
    ),
    max_size=2,
).map("&".join)
ATTACKS_ANYWHERE = st.builds(
    lambda method, query, headers, mime, authorization, *rest: Attack(
        method, query, headers | {"Content-Type": mime, "Authorization": authorization}, *rest
    ),
    mostly(
        st.none(),
        st.sampled_from(["HEAD", "OPTIONS", "PUT", "TRACE", "CONNECT", "PROPFIND", "get"]) | RAW,
    ),
    QUERIES,
    HEADERS,
    mostly(
        st.just("application/json"), st.sampled_from(["multipart/form-data; boundary=x", ""]) | RAW
    ),
    mostly(st.just(f"Bearer {AUTH}"), AUTHORIZATIONS),
    mostly(TEXT_BODIES, st.binary(max_size=50)),
    mostly(
        st.none(),
        st.sampled_from(["", "-1", "0", "5", "0x5", "65536", "65537", "9" * 30]) | RAW,
    ),
    st.booleans(),
)


def plain(email: str) -> Attack:
    """Return an ordinary request."""
    body = dict.fromkeys(FIELDS, PASSWORD) | {
        "username": "new",
        "email": email,
        "refresh_token": REFRESH,
        "keep_sessions": True,
        "mfa_token": MFA,
        "code": CODE,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {AUTH}"}
    return Attack(None, "", headers, json.dumps(body).encode(), None, False)


ARGUMENTS = mostly(st.sampled_from([SESSION, SESSION, USER, USER, "a" * 22]), RAW)
PATHS = st.lists(
    st.sampled_from(["auth", "users", "login", "sessions", "static", "openapi", "..", "."]) | RAW,
    max_size=4,
).map("/".join)


class TestAttacks(BaseTestCase):
    """Random requests to every route and to paths that are no route."""

    def setUp(self) -> None:
        """Turn every feature on, add an admin, and keep Hypothesis' files out of the repository."""
        with (
            mock.patch.dict(os.environ, SETTINGS),
            mock.patch("project.accounts.rate_limits.CODES_PER_ACCOUNT", 1_000_000),
        ):
            super().setUp()
        self.admin = add_user("admin", "admin@test.com", PASSWORD, admin=True)
        self.hashed = self.admin.password
        self.authenticator = pyotp.TOTP(pyotp.random_base32())
        self.undo()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        configuration.set_hypothesis_home_dir(folder.name)
        self.addCleanup(configuration.set_hypothesis_home_dir, None)

    def ask(self, method: str, path: str, attack: Attack) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the response, as the server receives them."""
        auth, refresh = self.pair.auth_token, self.pair.refresh_token
        claims = jwt.decode(auth, options={"verify_signature": False})
        code = self.authenticator.at(clock.utcnow())
        live = {AUTH: auth, REFRESH: refresh, SESSION: claims["sid"], USER: claims["sub"]}
        live |= {MFA: self.mfa_token, CODE: code}

        def fill(text: str) -> str:
            return re.sub("|".join(live), lambda found: live[found[0]], text)

        environ = create_environ()
        for name, value in attack.headers.items():
            prefix = "" if name == "Content-Type" else "HTTP_"
            environ[prefix + name.upper().replace("-", "_")] = fill(value)
        body = fill(attack.body.decode("latin-1")).encode("latin-1")
        environ |= {
            "REQUEST_METHOD": method,
            "PATH_INFO": fill(path),
            "QUERY_STRING": attack.query,
            "CONTENT_LENGTH": str(len(body)) if attack.length is None else attack.length,
            "wsgi.input": io.BytesIO(body),
        }
        if attack.terminated:
            environ["wsgi.input_terminated"] = True
        # As on a server: in a context, and so with a database session, of its own.
        answer = contextvars.Context().run(run_wsgi_app, self.app, environ, buffered=True)
        parts, status, headers = answer
        reads = method in {"GET", "HEAD", "OPTIONS"} and path != "/auth/logout"
        # A refusal for another reason than the code has used the code up.
        if not reads and (status[0] == "2" or (status[:3] == "400" and self.is_code_used())):
            self.undo()
        return int(status.split()[0]), dict(headers), b"".join(parts)

    def undo(self) -> None:
        """Restore the admin as the only user, with their password, an authenticator, a session."""
        db.session.execute(delete(User).where(User.id != self.admin.id))
        db.session.refresh(self.admin)
        self.admin.password = self.hashed
        self.admin.mfa_enabled = True
        secret = second_factor.encrypt(self.authenticator.secret, self.admin.id)
        row = {"user_id": self.admin.id, "secret": secret, "last_step": 0}
        db.session.execute(delete(totp_factors_table))
        db.session.execute(insert(totp_factors_table).values(row))
        self.pair = start_session(self.admin, Method.TOTP)
        account = self.admin.id, self.admin.email, self.hashed, self.admin.email_verified
        self.mfa_token = links.mfa_token(*account)

    def is_code_used(self) -> bool:
        """Return whether the code of the admin's authenticator is used up."""
        used = select(totp_factors_table.c.user_id).where(totp_factors_table.c.last_step > 0)
        return database.fetch_one(used) is not None

    def forget_confirmation(self) -> None:
        """Leave the authenticator of the admin as it is before they confirm it."""
        db.session.execute(update(totp_factors_table).values(last_step=None))
        db.session.execute(update(User).values(mfa_enabled=False))
        db.session.commit()

    def check(self, method: str, path: str, attack: Attack) -> int:
        """Check that the contract has the response, and return its status."""
        status, headers, body = self.ask(method, path, attack)

        self.assertLess(status, 500, body)
        self.assertEqual("application/json", headers["Content-Type"])
        self.assertEqual("no-store", headers["Cache-Control"])
        self.assertEqual("nosniff", headers["X-Content-Type-Options"])
        required = {401: "WWW-Authenticate", 405: "Allow", 429: "Retry-After"}
        self.assertIn(required.get(status, "Content-Type"), headers)
        if method == "HEAD" or (method == "OPTIONS" and status in (200, 204)):
            self.assertEqual(b"", body)
            return status
        answer = json.loads(body)
        if status < 300:
            self.assertIn(status, (200, 201, 202))
            self.assertEqual("success", answer["status"])
        else:
            self.assertIn((status, answer["code"], answer["message"]), CATALOGUE)
            self.assertIn(answer["status"], ("error", "fail"))
            members = {"status", "message", "code", "errors", "mfa_token"}
            self.assertLessEqual(set(answer), members)
        return status

    def test_every_route(self) -> None:
        """Each attack is sent to each route; an ordinary request is accepted."""
        routes = [
            (method, rule.rule)
            for rule in self.app.url_map.iter_rules()
            for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
        ]
        unreached = set(routes)

        @attacks(100)
        @given(ATTACKS_ANYWHERE, ARGUMENTS)
        @example(plain("admin@test.com"), USER)
        @example(plain("new@test.com"), SESSION)
        def check(attack: Attack, argument: str) -> None:
            for method, rule in routes:
                path = re.sub("<.*?>", lambda _: argument, rule)
                if (method, rule) in ENROLMENT:
                    self.forget_confirmation()
                status = self.check(attack.method or method, path, attack)
                if attack.method is None and status < 300:
                    unreached.discard((method, rule))
                if (method, rule) in ENROLMENT:
                    self.undo()

        check()
        self.assertEqual(ONLY_REFUSED, unreached, "`plain` lacks a field of these")

    def test_unknown_paths(self) -> None:
        """Each attack is sent to a path that is no route."""

        @attacks(100)
        @given(ATTACKS_ANYWHERE, PATHS)
        def check(attack: Attack, path: str) -> None:
            self.check(attack.method or "GET", path, attack)

        check()


LOGIN = b"POST /auth/login HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
PING = b"GET /ping HTTP/1.1\r\nHost: a\r\n"
# Malformed HTTP, and HTTP that servers often misread.
RAW_REQUESTS = [
    b"\x00\x01\x02\xff\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the start of TLS
    b"GET\r\n\r\n",
    b"GET /ping\r\n\r\n",
    b"GET /ping HTTP/9.9\r\n\r\n",
    b"GET  /ping HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /pi\0ng HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /%00%ff%0d%0a%c0%af%ed%a0%80 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /users/%00?limit=%00&after=%ff HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://another/users HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET ../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"A" * 50_000 + b" /ping HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    PING + b"".join(b"X-%d: y\r\n" % number for number in range(1_000)) + b"\r\n",
    PING + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n",
    PING + b"X: a\0b\r\n\r\n",
    PING + b"X: a\x1bb\r\n\r\n",
    PING + b"X: a\rY: b\r\n\r\n",
    PING + b" folded: x\r\n\r\n",
    PING + b"X : y\r\n\r\n",
    PING + b"Authorization: \xff\xfe\r\nX-Forwarded-For: \xff\r\n\r\n",
    LOGIN + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
    LOGIN + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    LOGIN + b"Content-Length: 2, 2\r\n\r\n{}",
    LOGIN + b"Content-Length: -1\r\n\r\n{}",
    LOGIN + b"Content-Length: +2\r\n\r\n{}",
    LOGIN + b"Content-Length: 9223372036854775807\r\n\r\n{}",
    LOGIN + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
    LOGIN + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    LOGIN + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    LOGIN + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}",
    LOGIN + b"Transfer-Encoding: xchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    LOGIN + b"Expect: 200-ok\r\nContent-Length: 2\r\n\r\n{}",
    LOGIN + b"Upgrade: h2c, websocket\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\n{}",
]


class TestBytes(unittest.TestCase):
    """A production server that receives malformed HTTP."""

    service: Service

    @classmethod
    def setUpClass(cls) -> None:
        """Start one server for all tests."""
        cls.service = cls.enterClassContext(Service(cls.enterClassContext(scratch.database())))

    def assert_still_serving(self) -> None:
        """Check that the next request is answered."""
        self.assertEqual(200, self.service.request("GET", "/ping")[0])

    def test_malformed_requests(self) -> None:
        """The server refuses each without a body, or the service answers as documented."""
        for request in RAW_REQUESTS:
            with self.subTest(request[:80]), self.service.connect() as connection:
                with contextlib.suppress(ConnectionError):  # the server may disconnect early
                    connection.sendall(request)
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                body = answer.read()

                if answer.headers["Content-Type"] != "application/json":
                    self.assertIn(answer.status, (400, 414, 431))
                    self.assertEqual(b"", body)
                elif answer.status != 200:
                    refusal = json.loads(body)
                    entry = answer.status, refusal["code"], refusal["message"]
                    self.assertIn(entry, CATALOGUE)
            self.assert_still_serving()

    @attacks(50)
    @given(
        st.sampled_from([PING + b"\r\n", LOGIN + b"Content-Length: 2\r\n\r\n{}"]),
        st.integers(0, 120),
        st.integers(0, 20),
        st.binary(max_size=20) | st.sampled_from([b"\r\n", b"\r\n\r\n", b": ", b"\0", b" "]),
    )
    def test_garbled(self, request: bytes, start: int, length: int, junk: bytes) -> None:
        """A request with bytes removed or inserted is answered or disconnected, and never hangs."""
        garbled = request[:start] + junk + request[start + length :]
        received = b""
        with self.service.connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(garbled)
            connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(65_536):
                received += data

        self.assertRegex(received, rb"\A(HTTP/1\.[01] [124][0-9][0-9] |\Z)")
        self.assert_still_serving()
