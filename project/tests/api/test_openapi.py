"""The document of the API, and its page."""

import itertools
import json
import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import orjson
from flask import Flask

from project import create_app
from project.api import document
from project.config import ProductionConfig
from project.tests import scratch
from project.tests.base import BaseTestCase, bearer
from project.tests.utils import add_user, stored_users

EXAMPLES = Path(document.__file__).with_name("examples.json")
# With RECORD_EXAMPLES=1 the examples are written instead of compared.
RECORD = os.environ.get("RECORD_EXAMPLES") == "1"
ADA = {"username": "ada", "email": "ada@example.com", "password": "correct horse"}
GRACE = {"username": "grace", "email": "grace@example.com", "password": "battery staple"}


class TestDocument(BaseTestCase):
    """What the document says."""

    def described(self) -> dict[str, Any]:
        """Return the document, as it comes over HTTP."""
        response = self.get("/docs/openapi.json")
        self.assertEqual((200, "application/json"), (response.status_code, response.content_type))
        return dict(response.get_json())

    def operations(self) -> dict[str, dict[str, Any]]:
        """Return what the document says of each method and path."""
        return {
            f"{method.upper()} {path}": operation
            for path, operations in self.described()["paths"].items()
            for method, operation in operations.items()
        }

    def test_valid(self) -> None:
        """It is what OpenAPI 3.1 calls a document."""
        described = self.described()

        if find_spec("openapi_spec_validator"):  # a tool for developers
            import_module("openapi_spec_validator").validate(described)
        self.assertEqual("3.1.0", described["openapi"])
        identities = [one["operationId"] for one in self.operations().values()]
        self.assertEqual(len(identities), len(set(identities)))

    def test_every_route(self) -> None:
        """Every route is in it, with every method, and says what it is for."""
        routes = {
            f"{method} {rule.rule.replace('<', '{').replace('>', '}')}"
            for rule in self.app.url_map.iter_rules()
            for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
            if not rule.rule.startswith("/docs")
        }
        operations = self.operations()

        self.assertEqual(routes, set(operations))
        for name, operation in operations.items():
            with self.subTest(name):
                self.assertRegex(operation["summary"], r"\A[A-Z].*\.\Z")
                self.assertIn("500", operation["responses"])

    def test_route_without_answers(self) -> None:
        """A route that does not say what it answers has no place in the service."""
        self.app.add_url_rule("/new", view_func=lambda: "", endpoint="users.new")

        with self.assertRaisesRegex(LookupError, "/new: .* names no answers"):
            document.describe(self.app)

    def test_security(self) -> None:
        """What wants a token says so, and what may do without one too."""
        operations = self.operations()

        token: dict[str, list[str]] = {"bearer": []}
        required, either = [token], [token, {}]
        for name, security in {
            "GET /auth/status": required,
            "POST /auth/logout": required,
            "GET /users/{user_id}/events": required,
            "GET /users": either,
            "GET /users/{user_id}": either,
            "POST /auth/login": None,
            "POST /auth/refresh": None,
            "GET /ping": None,
        }.items():
            with self.subTest(name):
                self.assertEqual(security, operations[name].get("security"))

    def test_refusals(self) -> None:
        """A status has the code and the message of each refusal that it stands for."""
        login = self.operations()["POST /auth/login"]["responses"]

        codes = {
            status: {
                example["value"]["code"]
                for example in response["content"]["application/json"]["examples"].values()
            }
            for status, response in login.items()
            if status != "200"
        }
        expected = {
            "400": {"invalid_payload"},
            "401": {"account_inactive"},
            "403": {"https_required"},
            "404": {"invalid_credentials"},
            "413": {"payload_too_large"},
            "429": {"too_many_attempts"},
            "500": {"internal_error"},
            "503": {"busy", "database_unavailable"},
        }
        self.assertEqual(expected, codes)
        self.assertEqual({"Retry-After", "X-Request-ID"}, set(login["429"]["headers"]))

    def test_undocumented_answers_are_noticed(self) -> None:
        """A test that gets a status, or a member, that the document lacks fails."""
        pong = {"status": "success", "message": "pong!"}
        for answer, complaint in (
            (({}, 200), "required"),
            ((pong | {"more": 1}, 200), "more"),
            ((pong, 202), "no 202"),
        ):
            with (
                self.subTest(complaint),
                mock.patch("project.api.users.success", return_value=answer),
                self.assertRaisesRegex(AssertionError, complaint),
            ):
                self.get("/ping")


class TestExamples(BaseTestCase):
    """The examples are requests and answers that once went over the wire."""

    settings: ClassVar[dict[str, Any]] = {
        "TOKEN_EXPIRATION_DAYS": 30,
        "TOKEN_EXPIRATION_SECONDS": 0,
    }
    maxDiff = None

    def walk(self) -> dict[str, dict[str, Any]]:
        """Make every call there is once, and return requests and answers by operation."""
        self.examples: dict[str, dict[str, Any]] = {}
        pair = self.call("register_user", 201, "/auth/register", ADA)
        (ada,) = stored_users()
        credentials = {"email": ADA["email"], "password": ADA["password"]}
        pair = self.call("login_user", 200, "/auth/login", credentials)
        refresh = {"refresh_token": pair["refresh_token"]}
        token = self.call("refresh_tokens", 200, "/auth/refresh", refresh)["auth_token"]
        self.call("ping_pong", 200, "/ping")
        self.call("get_liveness", 200, "/health/live")
        self.call("get_readiness", 200, "/health/ready")
        self.call("get_user_status", 200, "/auth/status", token=token)
        sessions = self.call("list_sessions", 200, "/auth/sessions", token=token)
        other = next(one for one in sessions["data"]["sessions"] if not one["current"])
        self.call("end_session", 200, f"/auth/sessions/{other['id']}", None, token, "DELETE")
        body = {"current_password": ADA["password"], "new_password": "another horse"}
        self.call("change_password", 200, "/auth/password", body, token)
        self.call("add_user", 201, "/users", GRACE)
        self.call("list_users", 200, "/users?limit=1")
        self.call("get_single_user", 200, f"/users/{ada['id']}")
        body = {"username": "lovelace", "current_password": "another horse"}
        self.call("change_user", 200, f"/users/{ada['id']}", body, token, "PATCH")
        self.call("list_events", 200, f"/users/{ada['id']}/events?limit=2", token=token)
        self.call("logout_user_get", 200, "/auth/logout?scope=others", token=token)
        self.call("logout_user_post", 200, "/auth/logout", method="POST", token=token)
        add_user("root", "root@example.com", "root", admin=True)
        credentials = {"email": "root@example.com", "password": "root"}
        token = self.client.post("/auth/login", json=credentials).get_json()["auth_token"]
        self.call("delete_user", 200, f"/users/{ada['id']}", None, token, "DELETE")
        add_user("other", "other@example.com", "other", admin=True)
        body = {"current_password": "root"}
        self.call("delete_account", 200, "/auth/account", body, token, "DELETE")
        return self.examples

    def call(
        self,
        operation: str,
        status: int,
        path: str,
        body: Any = None,
        token: str | None = None,
        method: str | None = None,
    ) -> dict[str, Any]:
        """Make a call, keep it as the example of its operation, and return the answer."""
        method = method or ("POST" if body else "GET")
        headers = {"User-Agent": "curl/8.14.1"} | (bearer(token) if token else {})
        response = self.client.open(path, method=method, json=body, headers=headers)
        self.assertEqual(status, response.status_code, response.get_data(as_text=True))
        answer: dict[str, Any] = response.get_json()
        self.examples[operation] = {"answer": answer} | ({"request": body} if body else {})
        return answer

    def test_examples(self) -> None:
        """They are still what comes, but for tokens, ids and times; and no operation lacks one."""
        examples = self.walk()
        if RECORD:
            text = orjson.dumps(examples, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
            EXAMPLES.write_bytes(text + b"\n")

        kept = json.loads(EXAMPLES.read_text())
        self.assertEqual(shape(examples), shape(kept))
        described = document.describe(self.app)
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                with self.subTest(f"{method} {path}"):
                    self.assertIn(operation["operationId"], kept)


def shape(example: Any) -> Any:
    """Return an example with everything replaced that is another one each time."""
    if isinstance(example, dict):
        return {key: shape(value) for key, value in example.items()}
    if isinstance(example, list):
        return [shape(value) for value in example]
    if isinstance(example, bool) or not isinstance(example, int | str):
        return example
    volatile = r"\d+|\d+-\d+|\d{4}-.*Z|[\w-]{22}|[\da-f]{32}|eyJ.*"
    return "..." if re.fullmatch(volatile, str(example)) else example


class TestPage(BaseTestCase):
    """Swagger UI, from the service itself."""

    def test_page(self) -> None:
        """The page and all that it is made of come from here, each as what it is."""
        page = self.get("/docs")
        html = page.get_data(as_text=True)

        self.assertEqual((200, "text/html; charset=utf-8"), (page.status_code, page.content_type))
        needed = re.findall(r'(?:src|href)="([^"]+)"', html)
        self.assertEqual(4, len(needed))
        self.assertNotRegex(html, r"//|<script>|onload|style=")
        for path, kind in zip(needed, ("css", "svg", "javascript", "javascript"), strict=True):
            with self.subTest(path):
                response = self.get(f"/{path}")

                self.assertEqual(200, response.status_code)
                self.assertIn(kind, response.content_type)
                self.assertLess(100, len(response.get_data()))
                response.close()

    def test_headers(self) -> None:
        """The page may use its own files, and everything else still nothing."""
        policy = self.get("/docs").headers["Content-Security-Policy"]
        self.assertIn("script-src 'self';", policy)
        self.assertIn("default-src 'none'", policy)
        self.assertNotIn("unsafe-eval", policy)
        for path in ("/ping", "/docs/openapi.json", "/docs/nothing"):
            with self.subTest(path):
                strict = "default-src 'none'; frame-ancestors 'none'"
                self.assertEqual(strict, self.get(path).headers["Content-Security-Policy"])

    def test_no_other_files(self) -> None:
        """Nothing but Swagger UI's files comes out."""
        for name in ("../__init__.py", "..%2f__init__.py", "/etc/passwd", "nothing", "", "css"):
            with self.subTest(name):
                response = self.get(f"/docs/swagger/{name}")

                self.assert_error(response, 404, "There is nothing at this address.", "not_found")

    def test_off(self) -> None:
        """In production there is neither, unless API_DOCS says so."""
        key = "0123456789abcdefghijklmnopqrstuvwxyz"
        for setting, status in (("", 404), ("1", 200)):
            environment = scratch.settings(
                SECRET_KEY=key, DATABASE_URL="sqlite:////tmp/nothing.db", API_DOCS=setting
            )
            with mock.patch.dict(os.environ, environment, clear=True):
                app: Flask = create_app(f"{ProductionConfig.__module__}.ProductionConfig")
            for path, method in itertools.product(("/docs", "/docs/openapi.json"), ("GET", "HEAD")):
                with self.subTest(path, setting=setting, method=method):
                    response = app.test_client().open(path, method=method)
                    self.assertEqual(status, response.status_code)
