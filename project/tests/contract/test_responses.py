"""The format of every response: JSON, codes, headers, times, and what is never disclosed."""

import json
import re
from typing import Any
from unittest import mock

from sqlalchemy import text

from project import clock, db, errors
from project.lib import database
from project.tests.base import bearer
from project.tests.contract.cases import SECRET, USER, ResponsesTestCase
from project.tests.lib.log_capture import captured_output
from project.tests.rows import add_user, start_session, stored_users

CATALOGUE = [kind for kind in vars(errors).values() if isinstance(kind, type)]
CODES = {kind.code for kind in CATALOGUE if issubclass(kind, errors.ServiceError)}


class TestResponses(ResponsesTestCase):
    """What all responses have in common."""

    def test_kinds(self) -> None:
        """These tests look at responses of every status that the service uses."""
        seen = {response.status_code for _, response in self.every_response()}

        self.assertEqual({200, 201, 400, 401, 403, 404, 405, 413, 500, 503}, seen)

    def test_json(self) -> None:
        """Every response with a body is a JSON object in UTF-8 with a status member."""
        for name, response in self.every_response():
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
        """Every failure has a message and a code, and each code is in the catalogue."""
        for name, response in self.every_response():
            if response.status_code >= 400 and response.request.method != "HEAD":
                with self.subTest(name):
                    data = response.get_json()
                    self.assertLessEqual({"status", "message", "code"}, set(data))
                    more = {"errors"} if response.status_code < 500 else {"request_id"}
                    if (response.status_code, data["code"]) == (401, "mfa_required"):
                        more = {"mfa_token"}
                        self.assertLessEqual(more, set(data))
                    self.assertLessEqual(set(data), {"status", "message", "code", *more})
                    self.assertRegex(data["code"], r"\A[a-z]+(_[a-z]+)*\Z")
                    self.assertIn(data["code"], CODES)
                    self.assertRegex(data["message"], r"\A[A-Z].*\S\Z")

    def test_codes_are_stable(self) -> None:
        """Clients rely on these codes."""
        tokens = {"token_missing", "token_invalid", "token_expired", "permission_denied"}
        accounts = {"user_exists", "email_exists", "user_not_found", "invalid_credentials"}
        requests = {"invalid_payload", "not_found", "method_not_allowed", "payload_too_large"}
        service = {"internal_error", "database_unavailable", "busy", "account_inactive"}
        sessions = {"session_ended", "refresh_reused", "session_not_found", "wrong_password"}
        service |= {"too_many_attempts", "https_required", "last_admin"}
        factors = {"mfa_required", "mfa_enrolment_required", "mfa_not_configured", "wrong_code"}
        factors |= {"totp_exists", "totp_not_found"}
        self.assertLessEqual(tokens | accounts | requests | service | sessions | factors, CODES)

    def test_errors_member(self) -> None:
        """An invalid payload says in words what is wrong with each field."""
        for name, response in self.every_response():
            if (response.get_json(silent=True) or {}).get("code") == "invalid_payload":
                with self.subTest(name):
                    reasons = response.get_json()["errors"]
                    self.assertTrue(reasons)
                    self.assertTrue(all(isinstance(reason, str) for reason in reasons.values()))

    def test_headers(self) -> None:
        """No response may be stored or sniffed, including those to HEAD and OPTIONS."""
        for name, response in self.every_response():
            with self.subTest(name):
                self.assertEqual(["nosniff"], response.headers.getlist("X-Content-Type-Options"))
                if response.request.path.startswith(("/auth", "/users")):
                    self.assertEqual(["no-store"], response.headers.getlist("Cache-Control"))

    def test_challenge(self) -> None:
        """Every 401 has one Bearer challenge, and no other response has any."""
        for name, response in self.every_response():
            with self.subTest(name):
                challenges = response.headers.getlist("WWW-Authenticate")
                if response.status_code == 401:
                    self.assertEqual(1, len(challenges))
                    self.assertRegex(challenges[0], r"\ABearer( |\Z)")
                else:
                    self.assertEqual([], challenges)

    def test_allow(self) -> None:
        """Every 405 lists the allowed methods, and each of them is allowed."""
        for name, response in self.every_response():
            if response.status_code == 405:
                with self.subTest(name):
                    allowed = set(response.headers["Allow"].split(", "))
                    self.assertTrue(allowed & {"GET", "POST", "DELETE"})
                    self.assertNotIn(response.request.method, allowed)
                    for method in allowed:
                        again = self.client.open(response.request.path, method=method)
                        self.assertNotEqual(405, again.status_code)

    def test_retry_after(self) -> None:
        """Every 503 has Retry-After in whole seconds."""
        busy = [response for _, response in self.every_response() if response.status_code == 503]
        self.assertEqual(4, len(busy))
        for response in busy:
            self.assertRegex(response.headers["Retry-After"], r"\A[1-9][0-9]*\Z")

    def test_unicode(self) -> None:
        """Text is returned as it was sent."""
        token = self.register("Zoë 🦀", "zoe@test.com")

        response = self.get("/auth/status", token)

        self.assertEqual("Zoë 🦀", json.loads(response.data.decode("utf-8"))["data"]["username"])

    def test_fail_and_error(self) -> None:
        """A refusal by a view of /users itself is a "fail"; every other refusal is an "error"."""
        post = self.client.post
        self.register(**USER)

        for word, response, error in (
            ("error", post("/auth/register", json={}), errors.InvalidPayload),
            ("error", post("/auth/login", json={}), errors.InvalidPayload),
            ("fail", post("/users", json={}), errors.InvalidPayload),
            ("fail", self.get("/users?limit=0"), errors.InvalidPayload),
            ("fail", self.get("/users/blah"), errors.UserNotFound),
            ("error", post("/auth/register", json=USER), errors.UserExists),
            ("fail", post("/users", json=USER | {"username": "a"}), errors.EmailExists),
            ("error", self.get("/nothing"), errors.NotFound),
            ("error", self.get("/users/1/2"), errors.NotFound),
            ("error", self.get("/auth/nothing"), errors.NotFound),
            ("error", self.client.delete("/users"), errors.MethodNotAllowed),
            ("error", self.get("/auth/login"), errors.MethodNotAllowed),
        ):
            with self.subTest(response.request.path, method=response.request.method):
                self.assertEqual(word, self.assert_error(response, error)["status"])

    def test_two_messages_of_unknown_users(self) -> None:
        """An unknown id is answered without a full stop, an unknown email with one."""
        self.assertEqual("User does not exist", self.get("/users/1").get_json()["message"])
        self.assertEqual("User does not exist.", self.login().get_json()["message"])

    def test_challenges(self) -> None:
        """Only a refused token adds error="invalid_token" to the challenge."""
        user = add_user("test", "test@test.com", SECRET)
        deactivated = add_user("deactivated", "deactivated@test.com", SECRET)
        add_user("with a factor", "factor@test.com", SECRET, mfa_enabled=True)
        expired = start_session(user).auth_token
        self.move_clock(4)
        ended, inactive = start_session(user).auth_token, start_session(deactivated).auth_token
        self.get("/auth/logout", ended)
        deactivated.active = False
        db.session.commit()
        self.app.config["USERS_API_OPEN"] = False
        for path in ("/auth/status", "/auth/sessions", "/users", f"/users/{user.id}"):
            with self.subTest(path):
                self.assertEqual('Bearer realm="users"', self.get(path).headers["WWW-Authenticate"])
                for token in ("invalid", expired, ended, inactive):
                    self.assertEqual(
                        'Bearer realm="users", error="invalid_token"',
                        self.get(path, token).headers["WWW-Authenticate"],
                    )
        for email in ("deactivated@test.com", "factor@test.com"):
            response = self.login(email, SECRET)
            self.assertEqual(401, response.status_code)
            self.assertEqual('Bearer realm="users"', response.headers["WWW-Authenticate"])

    def test_times(self) -> None:
        """A time is in UTC, in the format of RFC 3339, and is when the row was added."""
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


class TestInactiveUsers(ResponsesTestCase):
    """Users who are deactivated or deleted."""

    def test_login(self) -> None:
        """A deactivated user is told so only when the password is right."""
        add_user("test", "test@test.com", SECRET, active=False)

        self.assert_error(self.login(password=SECRET), errors.AccountInactive)
        self.assert_error(self.login(), errors.InvalidCredentials)

    def test_tokens(self) -> None:
        """A token of a deactivated user is answered like their login."""
        token = self.register(**USER)
        for statement in ("UPDATE users SET active = (1 = 0)", "DELETE FROM users"):
            db.session.execute(text(statement))
            db.session.commit()
            for path in ("/auth/status", "/auth/logout", "/auth/sessions"):
                with self.subTest(statement, path=path):
                    self.assert_error(self.get(path, token), errors.AccountInactive)
        gone = self.login(password=SECRET)
        self.assert_error(gone, errors.InvalidCredentials)


class TestDisclosure(ResponsesTestCase):
    """What no response and no log line contains."""

    def assert_discloses_nothing(self, shown: str) -> None:
        """Check that a text has no internals of the service."""
        self.assertNotRegex(shown, r"secret-text|Traceback|\bFile\b|\.py\b|project|sqlalchemy")
        statement = r"(?i)select |insert |psycopg|sqlite|valueerror|\bline \d|\$2b\$"
        self.assertNotRegex(shown, statement)

    def test_unexpected_errors(self) -> None:
        """An unexpected exception is not visible in the response."""
        for kind in (ValueError, KeyError, RecursionError):
            with (
                self.subTest(kind.__name__),
                captured_output() as written,
                mock.patch("project.accounts.directory.find", side_effect=kind("secret-text")),
            ):
                response = self.get("/users/1")

                self.assert_error(response, errors.InternalError)
                self.assert_discloses_nothing(
                    response.get_data(as_text=True) + str(response.headers)
                )
                self.assertIn("unhandled_exception", written.getvalue())
                self.assertNotIn("secret-text", written.getvalue())

    def test_errors_of_statements(self) -> None:
        """A statement that fails shows neither itself nor its values."""

        def fail(*values: object) -> None:
            database.fetch_one(text("SELECT id FROM nowhere WHERE x = :x"), x=SECRET)

        with (
            captured_output() as written,
            mock.patch("project.accounts.directory.find", fail),
        ):
            response = self.get("/users/1")

        self.assertIn(response.status_code, (500, 503))
        self.assert_discloses_nothing(response.get_data(as_text=True))
        self.assertNotIn(SECRET, written.getvalue())
        for engine in db.engines.values():
            self.assertTrue(engine.hide_parameters)

    def test_no_hash(self) -> None:
        """No response has a password or a hash."""
        for name, response in self.every_response():
            with self.subTest(name):
                shown = response.get_data(as_text=True) + str(response.headers)
                self.assertNotIn(SECRET, shown)
                self.assert_discloses_nothing(shown)
                for user in stored_users():
                    self.assertNotIn(user["password"], shown)

    def test_logs(self) -> None:
        """No log line has a password, a hash, a token, a recovery code or an authenticator."""
        with captured_output() as written:
            answers = self.every_response()
            token = self.login(password=SECRET).get_json()["auth_token"]
            self.move_clock(4)
            self.assert_error(self.get("/auth/status", token), errors.TokenExpired)
            self.assert_error(self.get("/auth/status", token[:-1]), errors.TokenInvalid)
            with mock.patch(
                "project.accounts.authentication.log_in", side_effect=ValueError(SECRET, token)
            ):
                self.assert_error(self.login(password=SECRET), errors.InternalError)

        lines = written.getvalue()
        self.assertIn("unhandled_exception", lines)
        self.assertIn("database_unavailable", lines)
        bodies: list[dict[str, Any]] = [answer.get_json(silent=True) or {} for _, answer in answers]
        names = ("auth_token", "refresh_token", "mfa_token")
        tokens = [token, *(body[name] for body in bodies for name in names if name in body)]
        hashes = [user["password"] for user in stored_users()]
        factors = [body["data"] for body in bodies if isinstance(body.get("data"), dict)]
        codes = [code for data in factors for code in data.get("recovery_codes", ())]
        authenticators = [data["secret"] for data in factors if "secret" in data]
        self.assertEqual((12, 3, 20, 1), tuple(map(len, (tokens, hashes, codes, authenticators))))
        keys = [self.app.config["SECRET_KEY"], *self.app.config["ENCRYPTION_KEYS"]]
        without_hyphens = [code.replace("-", "") for code in codes]
        secrets = [*keys, *hashes, *codes, *without_hyphens, *authenticators]
        for secret in [SECRET, "secret-text", *secrets]:
            self.assertNotIn(secret, lines)
        for issued in tokens:
            for part in issued.split("."):
                self.assertNotIn(part, lines)
        self.assertIsNone(re.search(r"\$2[aby]\$|[Bb]earer ey", lines))

    def test_bearer_is_not_echoed(self) -> None:
        """A refused token is not in the response."""
        response = self.client.get("/auth/status", headers=bearer("not-a-token-of-ours"))

        self.assert_error(response, errors.TokenInvalid)
        self.assertNotIn("not-a-token", response.get_data(as_text=True) + str(response.headers))
