"""The shape of every answer: JSON, codes, headers, times, and what is never shown."""

import contextlib
import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import structlog
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from werkzeug.test import TestResponse

from project import clock, database, db, errors, passwords
from project.bulkhead import Bulkhead
from project.tests.base import BaseTestCase, bearer
from project.tests.utils import add_user, start_session, stored_users

SECRET = "correct-horse-battery"
USER = {"username": "test", "email": "test@test.com", "password": SECRET}
CONTACT_US = (401, "Something went wrong. Please contact us.", "account_inactive")
INTERNAL = (500, "Something went wrong. Please try again.", "internal_error")
INVALID_TOKEN = (401, "Invalid token. Please log in again.", "token_invalid")
EXPIRED_TOKEN = (401, "Signature expired. Please log in again.", "token_expired")
SESSION = f"/auth/sessions/{'x' * 22}"
AUTH = ["register", "login", "refresh", "logout", "status", "password", "account", "sessions", "no"]
HEALTH = ["/health/live", "/health/ready"]
PATHS = ["/ping", *HEALTH, "/users", "/users/1", *(f"/auth/{word}" for word in AUTH), SESSION]
ELSEWHERE = ["/", "/auth", "/nothing", "/users/", "/auth/sessions/"]
CATALOGUE = [kind for kind in vars(errors).values() if isinstance(kind, type)]
CODES = {kind.code for kind in CATALOGUE if issubclass(kind, errors.ServiceError)}
METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"]


@contextlib.contextmanager
def everything_written() -> Iterator[io.StringIO]:
    """Collect all that structlog, logging, stdout and stderr are given."""
    written = io.StringIO()
    logger = structlog.wrap_logger(
        structlog.PrintLogger(written), processors=[structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(written)
    with contextlib.ExitStack() as stack:
        # A logger that was used once keeps its output: each module's own is replaced.
        for name, module in list(sys.modules.items()):
            if name.startswith("project."):
                for attribute, value in list(vars(module).items()):
                    if isinstance(value, type(structlog.get_logger())):
                        stack.enter_context(mock.patch.object(module, attribute, logger))
        stack.enter_context(contextlib.redirect_stdout(written))
        stack.enter_context(contextlib.redirect_stderr(written))
        logging.getLogger().addHandler(handler)
        stack.callback(logging.getLogger().removeHandler, handler)
        yield written


class AnswersTestCase(BaseTestCase):
    """A test that looks at answers more than at what they are about."""

    def setUp(self) -> None:
        """Stop the clock: no token expires by itself."""
        super().setUp()
        self.move_clock(0)

    def every_answer(self) -> list[tuple[str, TestResponse]]:
        """Return an answer of every kind there is: each route, method, refusal and fault."""
        return list(self._every_answer())

    def _every_answer(self) -> Iterator[tuple[str, TestResponse]]:
        user = add_user("other", "other@test.com", SECRET)
        for path in [*PATHS, *ELSEWHERE, f"/users/{user.id}"]:
            for method in METHODS:
                yield f"{method} {path}", self.client.open(path, method=method)
        registered = self.client.post("/auth/register", json=USER)
        yield "registered", registered
        token = registered.get_json()["auth_token"]
        users = ["/users?limit=1", "/users?limit=0", "/users/blah", "/users/%ff", "/users/1/2"]
        own = ["//status", "/status", "/sessions", "/logout?scope=x", "/logout"]
        for path in [*users, *(f"/auth{path}" for path in own)]:
            yield f"as a user: {path}", self.get(path, token)
        yield "bad token", self.get("/auth/status", "invalid")
        login = self.login(password=SECRET)
        yield "login", login
        yield "wrong login", self.login()
        yield from self._session_answers(login.get_json())
        yield "taken", self.client.post("/auth/register", json=USER)
        yield "email taken", self.client.post("/users", json=USER | {"username": "another"})
        yield "added", self.client.post("/users", json=USER | {"username": "a", "email": "a@b.c"})
        yield "broken", self.client.post("/auth/login", data=b"{", content_type="application/json")
        yield "large", self.client.post("/auth/login", data=b"x" * 70_000)
        with mock.patch("project.accounts.find", side_effect=ValueError("secret-text")):
            yield "fault", self.get("/users/1")
        with mock.patch("project.accounts.find", side_effect=RecursionError):
            yield "fault of another kind", self.get("/users/1")
        with mock.patch(
            "project.database.fetch_all", side_effect=OperationalError("", {}, OSError())
        ):
            yield "no database", self.get("/users")
        with self.app.app_context():
            gate: passwords.Gate = self.app.extensions["password_gate"]
            for _ in range(self.app.config["GRANIAN_BLOCKING_THREADS"] // 2):
                gate.enter()
            yield "busy", self.login()
        with self.app.app_context(), mock.patch("project.api.requests.BODY_PATIENCE", 0.0):
            places: Bulkhead = self.app.extensions["body_bulkhead"]
            for _ in range(self.app.config["GRANIAN_BLOCKING_THREADS"] // 4):
                places.enter()
            yield "no place", self.client.post("/auth/refresh", json={})

    def _session_answers(self, pair: dict[str, Any]) -> Iterator[tuple[str, TestResponse]]:
        post = partial(self.client.post, headers=bearer(pair["auth_token"]))
        change = {"current_password": SECRET, "new_password": SECRET}
        yield "changed", post("/auth/password", json=change)
        yield "no change", post("/auth/password", json=change | {"current_password": "wrong"})
        first = {"refresh_token": pair["refresh_token"]}
        refreshed = post("/auth/refresh", json=first)
        second = {"refresh_token": refreshed.get_json()["refresh_token"]}
        yield "refreshed", refreshed
        for name, body in {"again": second, "reused": first, "over": second}.items():
            yield name, post("/auth/refresh", json=body)
        headers = bearer(self.login(password=SECRET).get_json()["auth_token"])
        own = self.client.get("/auth/sessions", headers=headers).get_json()["data"]["sessions"][0]
        for path in (SESSION, f"/auth/sessions/{own['id']}"):
            yield path, self.client.delete(path, headers=headers)


class TestAnswers(AnswersTestCase):
    """What every answer has in common."""

    def test_kinds(self) -> None:
        """The answers looked at here are of every status the service knows."""
        seen = {response.status_code for _, response in self.every_answer()}

        self.assertEqual({200, 201, 400, 401, 403, 404, 405, 413, 500, 503}, seen)

    def test_json(self) -> None:
        """Every answer with a body is a JSON object in UTF-8 that says how it went."""
        for name, response in self.every_answer():
            with self.subTest(name):
                method = response.request.method
                if method == "HEAD" or (method == "OPTIONS" and response.status_code == 200):
                    self.assertEqual(b"", response.data)
                else:
                    data = json.loads(response.data.decode("utf-8"))
                    self.assertEqual("application/json", response.headers["Content-Type"])
                    good = response.status_code < 400
                    self.assertIn(data["status"], ["success"] if good else ["error", "fail"])

    def test_codes(self) -> None:
        """Each failure has a message and a code, and each code is in the one catalogue."""
        for name, response in self.every_answer():
            if response.status_code >= 400 and response.request.method != "HEAD":
                with self.subTest(name):
                    data = response.get_json()
                    self.assertLessEqual({"status", "message", "code"}, set(data))
                    more = {"errors"} if response.status_code < 500 else {"request_id"}
                    self.assertLessEqual(set(data), {"status", "message", "code", *more})
                    self.assertRegex(data["code"], r"\A[a-z]+(_[a-z]+)*\Z")
                    self.assertIn(data["code"], CODES)
                    self.assertRegex(data["message"], r"\A[A-Z].*\S\Z")

    def test_codes_are_stable(self) -> None:
        """Programs rely on these words."""
        tokens = {"token_missing", "token_invalid", "token_expired", "permission_denied"}
        accounts = {"user_exists", "email_exists", "user_not_found", "invalid_credentials"}
        requests = {"invalid_payload", "not_found", "method_not_allowed", "payload_too_large"}
        service = {"internal_error", "database_unavailable", "busy", "account_inactive"}
        sessions = {"session_ended", "refresh_reused", "session_not_found", "wrong_password"}
        service |= {"too_many_attempts", "https_required", "last_admin"}
        self.assertLessEqual(tokens | accounts | requests | service | sessions, CODES)

    def test_errors_member(self) -> None:
        """An invalid payload says what is wrong with each field, in words."""
        for name, response in self.every_answer():
            if (response.get_json(silent=True) or {}).get("code") == "invalid_payload":
                with self.subTest(name):
                    reasons = response.get_json()["errors"]
                    self.assertTrue(reasons)
                    self.assertTrue(all(isinstance(reason, str) for reason in reasons.values()))

    def test_headers(self) -> None:
        """No answer is stored, none is taken for another type, HEAD and OPTIONS included."""
        for name, response in self.every_answer():
            with self.subTest(name):
                self.assertEqual(["nosniff"], response.headers.getlist("X-Content-Type-Options"))
                if response.request.path.startswith(("/auth", "/users")):
                    self.assertEqual(["no-store"], response.headers.getlist("Cache-Control"))

    def test_challenge(self) -> None:
        """Every 401 names the scheme, and nothing else does."""
        for name, response in self.every_answer():
            with self.subTest(name):
                challenges = response.headers.getlist("WWW-Authenticate")
                if response.status_code == 401:
                    self.assertEqual(1, len(challenges))
                    self.assertRegex(challenges[0], r"\ABearer( |\Z)")
                else:
                    self.assertEqual([], challenges)

    def test_allow(self) -> None:
        """Every 405 says which methods there are, and each of them is one."""
        for name, response in self.every_answer():
            if response.status_code == 405:
                with self.subTest(name):
                    allowed = set(response.headers["Allow"].split(", "))
                    self.assertTrue(allowed & {"GET", "POST", "DELETE"})
                    self.assertNotIn(response.request.method, allowed)
                    for method in allowed:
                        again = self.client.open(response.request.path, method=method)
                        self.assertNotEqual(405, again.status_code)

    def test_retry_after(self) -> None:
        """Every 503 says in whole seconds when to come again."""
        busy = [response for _, response in self.every_answer() if response.status_code == 503]
        self.assertEqual(3, len(busy))
        for response in busy:
            self.assertRegex(response.headers["Retry-After"], r"\A[1-9][0-9]*\Z")

    def test_unicode(self) -> None:
        """Text goes out as it came in."""
        token = self.register("Zoë 🦀", "zoe@test.com")

        response = self.get("/auth/status", token)

        self.assertEqual("Zoë 🦀", json.loads(response.data.decode("utf-8"))["data"]["username"])

    def test_fail_and_error(self) -> None:
        """What a view of /users itself refuses is a "fail"; everything else is an "error"."""
        taken = (400, "Sorry. That user already exists.", "user_exists")
        email_taken = (400, "Sorry. That email already exists.", "email_exists", "fail")
        unknown = (404, "User does not exist", "user_not_found", "fail")
        payload = (400, "Invalid payload.", "invalid_payload")
        nowhere = (404, "There is nothing at this address.", "not_found")
        method = (405, "This address does not take that method.", "method_not_allowed")
        post = self.client.post
        self.register(**USER)

        self.assert_error(post("/auth/register", json={}), *payload)
        self.assert_error(post("/auth/login", json={}), *payload)
        self.assert_error(post("/users", json={}), *payload, "fail")
        self.assert_error(self.get("/users?limit=0"), *payload, "fail")
        self.assert_error(self.get("/users/blah"), *unknown)
        self.assert_error(post("/auth/register", json=USER), *taken)
        self.assert_error(post("/users", json=USER | {"username": "a"}), *email_taken)
        for path in ("/nothing", "/users/1/2", "/auth/nothing"):
            self.assert_error(self.get(path), *nowhere)
        self.assert_error(self.client.delete("/users"), *method)
        self.assert_error(self.get("/auth/login"), *method)

    def test_two_kinds_of_unknown(self) -> None:
        """Nobody at an id is told without a full stop, nobody at a login with one."""
        self.assertEqual("User does not exist", self.get("/users/1").get_json()["message"])
        self.assertEqual("User does not exist.", self.login().get_json()["message"])

    def test_challenges(self) -> None:
        """A token that was given and refused is said to be; who gave none is told no more."""
        user = add_user("test", "test@test.com", SECRET)
        resting = add_user("resting", "resting@test.com", SECRET)
        expired = start_session(user).auth_token
        self.move_clock(4)
        ended, inactive = start_session(user).auth_token, start_session(resting).auth_token
        self.get("/auth/logout", ended)
        resting.active = False
        db.session.commit()
        self.app.config["USERS_API_OPEN"] = False
        for path in ("/auth/status", "/auth/sessions", "/users", f"/users/{user.id}"):
            with self.subTest(path):
                self.assertEqual("Bearer", self.get(path).headers["WWW-Authenticate"])
                for token in ("invalid", expired, ended, inactive):
                    self.assertEqual(
                        'Bearer error="invalid_token"',
                        self.get(path, token).headers["WWW-Authenticate"],
                    )
        self.assertEqual(
            "Bearer", self.login("resting@test.com", SECRET).headers["WWW-Authenticate"]
        )

    def test_times(self) -> None:
        """A moment is RFC 3339 in UTC, and is when the row was made."""
        self.move_clock(86_400)
        moment = clock.utcnow()
        token = self.register(**USER)
        self.move_clock(2)
        later = clock.utcnow()
        self.client.post("/users", json=USER | {"username": "later", "email": "later@test.com"})

        first, second = (at.strftime("%Y-%m-%dT%H:%M:%SZ") for at in (moment, later))
        user_id = stored_users()[0]["id"]
        for path in ("/auth/status", f"/users/{user_id}"):
            self.assertEqual(first, self.get(path, token).get_json()["data"]["created_at"])
        users = self.get("/users").get_json()["data"]["users"]
        self.assertEqual([second, first], [user["created_at"] for user in users])


class TestInactiveUsers(AnswersTestCase):
    """Users who are deactivated, or gone."""

    def test_login(self) -> None:
        """A deactivated user is told so once the password is right, and not before."""
        add_user("test", "test@test.com", SECRET, active=False)

        self.assert_error(self.login(password=SECRET), *CONTACT_US)
        self.assert_error(self.login(), 404, "User does not exist.", "invalid_credentials")

    def test_tokens(self) -> None:
        """A token that a deactivated user still holds answers as their login does."""
        token = self.register(**USER)
        for statement in ("UPDATE users SET active = (1 = 0)", "DELETE FROM users"):
            db.session.execute(text(statement))
            db.session.commit()
            for path in ("/auth/status", "/auth/logout", "/auth/sessions"):
                with self.subTest(statement, path=path):
                    self.assert_error(self.get(path, token), *CONTACT_US)
        gone = self.login(password=SECRET)
        self.assert_error(gone, 404, "User does not exist.", "invalid_credentials")


class TestNothingIsShown(AnswersTestCase):
    """What neither an answer nor a log line holds."""

    def assert_silent(self, shown: str) -> None:
        """Check that an answer tells nothing about the inside."""
        self.assertNotRegex(shown, r"secret-text|Traceback|\bFile\b|\.py\b|project|sqlalchemy")
        statement = r"(?i)select |insert |psycopg|sqlite|valueerror|\bline \d|\$2b\$"
        self.assertNotRegex(shown, statement)

    def test_faults(self) -> None:
        """A fault that nobody foresaw shows no trace of itself."""
        for kind in (ValueError, KeyError, RecursionError):
            with (
                self.subTest(kind.__name__),
                everything_written() as written,
                mock.patch("project.accounts.find", side_effect=kind("secret-text")),
            ):
                response = self.get("/users/1")

                self.assert_error(response, *INTERNAL)
                self.assert_silent(response.get_data(as_text=True) + str(response.headers))
                self.assertIn("unhandled_exception", written.getvalue())
                self.assertNotIn("secret-text", written.getvalue())

    def test_faults_of_statements(self) -> None:
        """A statement that fails shows neither itself nor its values."""

        def fail(*values: object) -> None:
            database.fetch_one(text("SELECT id FROM nowhere WHERE x = :x"), x=SECRET)

        with everything_written() as written, mock.patch("project.accounts.find", fail):
            response = self.get("/users/1")

        self.assertIn(response.status_code, (500, 503))
        self.assert_silent(response.get_data(as_text=True))
        self.assertNotIn(SECRET, written.getvalue())
        for engine in db.engines.values():
            self.assertTrue(engine.hide_parameters)

    def test_no_hash(self) -> None:
        """No answer holds a password or a hash."""
        for name, response in self.every_answer():
            with self.subTest(name):
                shown = response.get_data(as_text=True) + str(response.headers)
                self.assertNotIn(SECRET, shown)
                self.assert_silent(shown)
                for user in stored_users():
                    self.assertNotIn(user["password"], shown)

    def test_logs(self) -> None:
        """No line that is written holds a password, a hash or a token."""
        with everything_written() as written:
            answers = self.every_answer()
            token = self.login(password=SECRET).get_json()["auth_token"]
            self.move_clock(4)
            self.assert_error(self.get("/auth/status", token), *EXPIRED_TOKEN)
            self.assert_error(self.get("/auth/status", token[:-1]), *INVALID_TOKEN)
            with mock.patch("project.accounts.log_in", side_effect=ValueError(SECRET, token)):
                self.assert_error(self.login(password=SECRET), *INTERNAL)

        lines = written.getvalue()
        self.assertIn("unhandled_exception", lines)
        self.assertIn("database_unavailable", lines)
        bodies: list[dict[str, Any]] = [answer.get_json(silent=True) or {} for _, answer in answers]
        names = ("auth_token", "refresh_token")
        tokens = [token, *(body[name] for body in bodies for name in names if name in body)]
        hashes = [user["password"] for user in stored_users()]
        self.assertEqual((9, 3), (len(tokens), len(hashes)))
        for secret in [SECRET, "secret-text", self.app.config["SECRET_KEY"], *hashes]:
            self.assertNotIn(secret, lines)
        for issued in tokens:
            for part in issued.split("."):
                self.assertNotIn(part, lines)
        self.assertIsNone(re.search(r"\$2[aby]\$|[Bb]earer ey", lines))

    def test_bearer_is_not_echoed(self) -> None:
        """A refused token is not in the answer."""
        response = self.client.get("/auth/status", headers=bearer("not-a-token-of-ours"))

        self.assert_error(response, *INVALID_TOKEN)
        self.assertNotIn("not-a-token", response.get_data(as_text=True) + str(response.headers))
