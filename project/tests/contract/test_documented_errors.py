"""Errors that the document declares on many routes occur on each of them."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

from sqlalchemy import update
from sqlalchemy.exc import OperationalError
from werkzeug.test import TestResponse

from project import UsersService, db, errors
from project.accounts import clients, rate_limits
from project.api import openapi
from project.models import User
from project.tests.accounts.mail_case import MAIL_SETTINGS
from project.tests.accounts.second_factor_case import SecondFactorTestCase
from project.tests.api.oauth_case import ISSUER, basic
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import ORIGIN, add_user, start_session, stored_users

TOKENS = ("token_", "session_ended", "account_inactive")
PASSWORD = {"current_password": "test"}
# The routes that take a code, or set an authenticator up, and a body without a code for each.
BODIES: dict[str, dict[str, str]] = {
    "POST /auth/login": {"email": "ada@test.com", "password": "test"},
    "POST /auth/login/mfa": {},  # and the `mfa_token`
    "POST /auth/password": PASSWORD | {"new_password": "another"},
    "POST /auth/email": PASSWORD | {"email": "new@test.com"},
    "DELETE /auth/account": PASSWORD,
    "POST /auth/totp": PASSWORD,
    "POST /auth/totp/confirm": {},
    "DELETE /auth/totp": PASSWORD,
    "POST /auth/recovery_codes": PASSWORD,
    "PATCH /users/{user_id}": {"username": "robert"},
    "DELETE /users/{user_id}": {},
    "DELETE /users/{user_id}/totp": {},
}


def routes_with(app: UsersService, code: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield method, path and operation of every route whose document has this error code."""
    for path, operations in openapi.describe(app)["paths"].items():
        for method, operation in operations.items():
            codes = {
                example["value"]["code"]
                for answer in operation["responses"].values()
                for content in answer.get("content", {}).values()
                for example in content.get("examples", {}).values()
            }
            if code in codes:
                yield method.upper(), path, operation


class TestEveryRoute(BaseTestCase):
    """An admin, or another service, requests every route and receives every documented error."""

    environment: ClassVar[dict[str, str]] = {"ISSUER": ISSUER}
    settings: ClassVar[dict[str, Any]] = {"USERS_API_OPEN": False}

    def setUp(self) -> None:
        """Log in an admin, and add a client; stop the clock, so that no token expires."""
        super().setUp()
        self.move_clock(0)
        self.admin = add_user("root", "root@test.com", "test", admin=True)
        self.token = start_session(self.admin).auth_token
        self.service = basic("orders", clients.create("orders", ISSUER, [], ORIGIN))
        db.session.commit()
        self.provoked = 0

    def routes(self, code: str) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
        """Yield method, path, endpoint and operation of every route that declares this code."""
        endpoints = {
            (method, rule.rule.replace("<", "{").replace(">", "}")): rule.endpoint
            for rule in self.app.url_map.iter_rules()
            for method in rule.methods or ()
        }
        for method, path, operation in routes_with(self.app, code):
            real = path.format(user_id=self.admin.id, session_id="x" * 22)
            yield method, real, endpoints[method, path], operation

    def provoke(self, code: str, token: str | None = None, **request: Any) -> None:
        """Request every route that declares this code, and check that it is the answer."""
        for method, path, _, operation in self.routes(code):
            # Without security, the token is in the body: see test_refresh and TestCodes.
            if operation["security"] or not code.startswith(TOKENS):
                with self.subTest(code, method=method, path=path):
                    self.check(code, self.ask(method, path, operation, token, **request))

    def ask(
        self, method: str, path: str, operation: dict[str, Any], token: str | None, **request: Any
    ) -> TestResponse:
        """Return the response to a request, with an empty object or form if it has a body.

        With a token it is authenticated: on a route for other services, by the client.
        """
        if "requestBody" in operation:
            (kind,) = operation["requestBody"]["content"]
            request = {"data": b"{}" if "json" in kind else b"", "content_type": kind} | request
        headers = bearer(token) if token else {}
        if token and {"client": []} in operation["security"]:
            headers = self.service
        return self.client.open(path, method=method, headers=headers, **request)

    def check(self, code: str, response: TestResponse) -> None:
        """Check that a response has this code, and count it."""
        self.assertEqual(code, response.get_json()["code"])
        self.provoked += 1

    def test_tokens(self) -> None:
        """Every token error occurs on every route that declares it."""
        self.provoke("token_missing")
        self.provoke("token_invalid", "x")
        ended = start_session(self.admin).auth_token
        self.client.post("/auth/logout", headers=bearer(ended))
        self.provoke("session_ended", ended)
        db.session.execute(update(User).values(active=False))
        db.session.commit()
        self.provoke("account_inactive", self.token)
        self.move_clock(4)
        self.provoke("token_expired", self.token)

        self.assertGreater(self.provoked, 50)

    def test_enrolment(self) -> None:
        """Where a second factor is required, every route that declares it refuses a user without.

        Only the routes to set one up, and the logout, need a token and do not declare it.
        """
        self.app.config["REQUIRE_MFA"] = "all"
        self.provoke("mfa_enrolment_required", self.token)

        required, exempt = (
            {f"{method} {path}" for method, path, _ in routes_with(self.app, code)}
            for code in ("mfa_enrolment_required", "session_ended")
        )
        setting_up = {"GET /auth/totp", "POST /auth/totp", "POST /auth/totp/confirm"}
        in_body = {"POST /auth/refresh"}
        logout = {"GET /auth/logout", "POST /auth/logout"}
        self.assertEqual(setting_up | logout | in_body, exempt - required)
        self.assertEqual(set(), required - exempt)

    def test_clients(self) -> None:
        """Every route that requires a client refuses a request without its secret."""
        self.provoke("invalid_client")

        self.assertEqual(4, self.provoked)

    def test_https(self) -> None:
        """Plain HTTP is refused on every route that declares it."""
        with mock.patch.dict(os.environ, {"FORCE_HTTPS": "1"}):
            super().setUp()
        self.provoke("https_required", self.token)

        self.assertGreater(self.provoked, 10)

    def test_size(self) -> None:
        """A body over the limit is refused on every route that declares it."""
        self.provoke("payload_too_large", self.token, data=b" " * 70_000)

        self.assertGreater(self.provoked, 5)

    def test_places(self) -> None:
        """Routes that reserve a slot answer 503 when all slots are taken."""
        places = self.app.config["GRANIAN_BLOCKING_THREADS"]
        with self.app.app_context():
            for _ in range(places):
                self.app.extensions["hashing_pool"].enter()
            for _ in range(2 * places):
                self.app.extensions["body_bulkhead"].enter()
            self.provoke("busy", self.token)

        self.assertGreater(self.provoked, 5)

    def test_faults(self) -> None:
        """An exception in a view is a 500, and an unavailable database a 503."""
        self.app.config["PROPAGATE_EXCEPTIONS"] = False
        away = OperationalError("SELECT secret", {}, OSError())
        for code, fault in (("internal_error", RuntimeError()), ("database_unavailable", away)):
            for method, path, endpoint, operation in self.routes(code):
                fail = failing(self.app.view_functions[endpoint], fault)
                with (
                    self.subTest(code, method=method, path=path),
                    mock.patch.dict(self.app.view_functions, {endpoint: fail}),
                ):
                    self.check(code, self.ask(method, path, operation, self.token))

        self.assertGreater(self.provoked, 30)


class TestCodes(SecondFactorTestCase):
    """Users with an authenticator and without receive every documented error of their codes.

    `ada` is an admin with an authenticator, who gave a code long ago; `bob` has none.
    """

    settings: ClassVar[dict[str, Any]] = SecondFactorTestCase.settings | MAIL_SETTINGS

    def setUp(self) -> None:
        """Set the authenticator up."""
        super().setUp()
        db.session.execute(update(User).where(User.username == "ada").values(admin=True))
        db.session.commit()
        self.enrol("ada")
        self.move_clock(self.app.config["STEP_UP_SECONDS"])

    def ask(self, route: str, name: str = "ada", target: str = "bob", **body: str) -> TestResponse:
        """Return the response to a user, with the body of a route and these members."""
        method, path = route.split()
        if route == "POST /auth/login/mfa" and "mfa_token" not in body:
            body["mfa_token"] = self.mfa_token()
        path = path.format(user_id=self.ids[target])
        return self.send(method, path, self.tokens[name], **BODIES[route] | body)

    def names(self, code: str) -> list[str]:
        """Return the routes of BODIES that declare this code."""
        declared = [f"{method} {path}" for method, path, _ in routes_with(self.app, code)]
        return [route for route in declared if route in BODIES]

    def assert_all(
        self, error: type[errors.ServiceError], ask: Callable[[str], TestResponse]
    ) -> None:
        """Check that `ask` gets this error from every route that declares its code.

        No other route than those of BODIES declares it.
        """
        declared = [f"{method} {path}" for method, path, _ in routes_with(self.app, error.code)]
        self.assertLessEqual(set(declared), BODIES.keys())
        self.assertTrue(declared)
        for route in declared:
            with self.subTest(route):
                before = stored_users()
                self.assert_error(ask(route), error)
                self.assertEqual(before, stored_users())

    def test_mfa_required(self) -> None:
        """Without a code: a login is refused with another status than an act of a caller."""
        routes = [f"{method} {path}" for method, path, _ in routes_with(self.app, "mfa_required")]
        self.assertLessEqual(set(routes), BODIES.keys())
        self.assertEqual(9, len(routes))
        for route in routes:
            error = errors.MfaRequired if route == "POST /auth/login" else errors.StepUpRequired
            with self.subTest(route), self.assert_nothing_changes():
                answer = self.assert_error(self.ask(route), error)
                self.assertEqual(error is errors.MfaRequired, "mfa_token" in answer)

    def test_wrong_code(self) -> None:
        """With a wrong code, and with a recovery code that is none."""
        self.begin("bob")

        def ask(route: str, code: str | None = None) -> TestResponse:
            name = "bob" if route == "POST /auth/totp/confirm" else "ada"
            return self.ask(route, name, code=code or self.wrong_code(name))

        self.assert_all(errors.WrongCode, ask)
        self.assert_all(errors.WrongCode, functools.partial(ask, code="A" * 24))

    def test_too_many_attempts(self) -> None:
        """With many wrong codes, or passwords where there is no code yet."""
        self.begin("bob")
        mfa_token = self.mfa_token()
        self.app.config.update(RATE_LIMITS=True, LOGIN_FAILURES_PER_ACCOUNT=5)
        rate_limits.init_app(self.app)
        special = {
            "POST /auth/totp": {"current_password": "wrong"},
            "POST /auth/login/mfa": {"code": self.wrong_code(), "mfa_token": mfa_token},
        }
        declared = self.names("too_many_attempts")
        self.assertEqual(set(BODIES), set(declared))
        for route in declared:
            name = "bob" if route.startswith("POST /auth/totp") else "ada"
            body = special.get(route, {"code": self.wrong_code(name)})
            with self.subTest(route):
                answers = [self.ask(route, name, **body) for _ in range(6)]
                self.assert_error(answers[-1], errors.TooManyAttempts)

    def test_mfa_not_configured(self) -> None:
        """With a code of the authenticator, or to set one up, while there are no keys."""
        self.begin("bob")
        code = self.next_code()
        self.app.config["ENCRYPTION_KEYS"] = ()

        def ask(route: str) -> TestResponse:
            name = "bob" if route.startswith("POST /auth/totp") else "ada"
            return self.ask(route, name, code=code)

        self.assert_all(errors.MfaNotConfigured, ask)

    def test_state(self) -> None:
        """With an authenticator where there must be none, and without one where one is needed."""
        self.assert_all(errors.TotpExists, lambda route: self.ask(route, code=self.code()))

        def ask(route: str) -> TestResponse:
            name = "ada" if "users" in route else "bob"
            return self.ask(route, name, code=self.next_code())

        self.assert_all(errors.TotpNotFound, ask)

    def test_own_account(self) -> None:
        """To an admin who uses the routes for other users with their own ID."""
        for route, error in (
            ("DELETE /users/{user_id}", errors.OwnAccount),
            ("DELETE /users/{user_id}/totp", errors.OwnTotp),
        ):
            with self.subTest(route), self.assert_nothing_changes():
                self.assert_error(self.ask(route, target="ada", code=self.code()), error)
        self.assertEqual(2, len(list(routes_with(self.app, "own_account"))))

    def test_wrong_password(self) -> None:
        """With a right code and a wrong password."""
        for route in self.names("wrong_password"):
            name = "bob" if route == "POST /auth/totp" else "ada"
            with self.subTest(route), self.assert_nothing_changes():
                body = {"code": self.code(), "current_password": "wrong"}
                self.assert_error(self.ask(route, name, "ada", **body), errors.WrongPassword)
        self.assertEqual(7, len(self.names("wrong_password")))

    def test_mfa_token(self) -> None:
        """With an `mfa_token` that is none, and one that has expired."""
        route = "POST /auth/login/mfa"
        self.assertIn(route, self.names("token_invalid"))
        self.assertIn(route, self.names("token_expired"))
        mfa_token = self.mfa_token()
        with self.assert_nothing_changes():
            response = self.ask(route, mfa_token="x", code=self.code())
            self.assert_error(response, errors.TokenInvalid)
            self.move_clock(300)
            response = self.ask(route, mfa_token=mfa_token, code=self.code())
            self.assert_error(response, errors.TokenExpired)


def failing(view: Callable[..., Any], fault: Exception) -> Callable[..., Any]:
    """Return a view that raises `fault`, with the same guards and responses."""

    @functools.wraps(view)
    def fail(**_: object) -> None:
        raise fault

    return fail
