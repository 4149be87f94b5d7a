"""The API document and its page."""

import itertools
import json
import os
import re
import tempfile
import unittest
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import orjson
import pyotp
from flask import Flask
from jsonschema_rs import Draft202012Validator
from werkzeug.test import TestResponse

from project import clock, create_app, db, errors
from project.accounts import clients
from project.accounts.audit import Kind
from project.api import openapi
from project.api.responses import failure
from project.config import ProductionConfig
from project.tests import scratch
from project.tests.accounts.mail_case import MAIL_SETTINGS, body_of, send_mail
from project.tests.api.oauth_case import FORM, ISSUER, basic
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import ORIGIN, add_user, stored_users

EXAMPLES = Path(openapi.__file__).with_name("examples.json")
# RECORD_EXAMPLES=1 rewrites the examples before they are compared.
RECORD = os.environ.get("RECORD_EXAMPLES") == "1"
ADA = {"username": "ada", "email": "ada@example.com", "password": "correct horse"}
GRACE = {"username": "grace", "email": "grace@example.com", "password": "battery staple"}


class TestDocument(BaseTestCase):
    """Tests of the API document, with an issuer, so that it has every route."""

    environment: ClassVar[dict[str, str]] = {"ISSUER": ISSUER}

    def described(self) -> dict[str, Any]:
        """Return the document, requested over HTTP."""
        response = self.get("/docs/openapi.json")
        self.assertEqual((200, "application/json"), (response.status_code, response.content_type))
        return dict(response.get_json())

    def operations(self) -> dict[str, dict[str, Any]]:
        """Return the operations of the document by method and path."""
        return {
            f"{method.upper()} {path}": operation
            for path, operations in self.described()["paths"].items()
            for method, operation in operations.items()
        }

    def test_valid(self) -> None:
        """The document is valid OpenAPI 3.1."""
        described = self.described()

        if find_spec("openapi_spec_validator"):  # a development dependency
            import_module("openapi_spec_validator").validate(described)
        self.assertEqual("3.1.0", described["openapi"])
        identities = [one["operationId"] for one in self.operations().values()]
        self.assertEqual(len(identities), len(set(identities)))

    def test_every_route(self) -> None:
        """Every method of every route is documented, with a summary and a description.

        Spectral warns of an operation without a description.
        """
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
                self.assertNotIn("<br/>", operation.get("description", ""))
                self.assertTrue(operation.get("description"))
                self.assertIn("500", operation["responses"])
                self.assertNotIn("422", operation["responses"])

    def test_undeclared_responses(self) -> None:
        """A view that does not declare its responses cannot be added to a blueprint."""
        blueprint = openapi.Blueprint("new", "New.")

        with self.assertRaisesRegex(LookupError, "/new: .* declares no responses"):
            blueprint.get("/new")(lambda: "")

    def test_security(self) -> None:
        """Every operation declares whether a token is required, optional or not used.

        Those for other services require a client.
        """
        operations = self.operations()

        token: dict[str, list[str]] = {"bearer": []}
        required, either, none = [token], [token, {}], list[dict[str, list[str]]]()
        for name, security in {
            "GET /auth/status": required,
            "POST /auth/logout": required,
            "GET /users/{user_id}/events": required,
            "GET /auth/totp": required,
            "POST /auth/totp": required,
            "POST /auth/totp/confirm": required,
            "DELETE /auth/totp": required,
            "POST /auth/recovery_codes": required,
            "DELETE /users/{user_id}/totp": required,
            "GET /users": either,
            "GET /users/{user_id}": either,
            "POST /auth/login": none,
            "POST /auth/login/mfa": none,
            "POST /auth/refresh": none,
            "GET /ping": none,
            "GET /.well-known/jwks.json": none,
            "POST /oauth/introspect": [{"client": []}],
            "GET /oauth/revocations": [{"client": []}],
        }.items():
            with self.subTest(name):
                self.assertEqual(security, operations[name]["security"])
        self.assertEqual([], [name for name, one in operations.items() if "security" not in one])

    def test_refusals(self) -> None:
        """The response of a status has an example of each error code."""
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
            "400": {"invalid_payload", "wrong_code"},
            "401": {"account_inactive", "mfa_required"},
            "403": {"email_unverified", "https_required"},
            "404": {"invalid_credentials"},
            "413": {"payload_too_large"},
            "429": {"too_many_attempts"},
            "500": {"internal_error"},
            "503": {"busy", "database_unavailable", "mfa_not_configured"},
        }
        self.assertEqual(expected, codes)
        self.assertEqual({"Retry-After", "X-Request-ID"}, set(login["429"]["headers"]))

    def schemas(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield every schema of the document, wherever in it, with its path."""
        described = self.described()
        yield from self.parts("", described["components"]["schemas"])
        yield from self.parts("", described["paths"])

    def parts(self, path: str, part: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the schemas in a part of the document, except those in examples."""
        if isinstance(part, dict):
            if {"type", "$ref", "anyOf", "enum"} & set(part):
                yield path, part
            for key, value in part.items():
                if key not in {"example", "examples"}:
                    yield from self.parts(f"{path}/{key}", value)
        elif isinstance(part, list):
            for value in part:
                yield from self.parts(path, value)

    def test_names(self) -> None:
        """The names of schemas differ in more than case and underscores, and have none of these."""
        names = list(self.described()["components"]["schemas"])

        self.assertEqual(len(names), len({name.lower() for name in names}))
        for name in names:
            with self.subTest(name):
                self.assertRegex(name, r"\A([A-Z][a-z]+)+\Z")

    def test_bounds(self) -> None:
        """Bounds are integers under their names in JSON Schema, on parameters and on fields."""
        operations = self.operations()
        bounds = {
            (name, parameter["name"]): (
                parameter["schema"]["minimum"],
                parameter["schema"]["maximum"],
            )
            for name, operation in operations.items()
            for parameter in operation.get("parameters", ())
            if parameter["schema"]["type"] == "integer"
        }

        self.assertEqual((1, 500), bounds["GET /users", "limit"])
        self.assertEqual((1, 500), bounds["GET /users/{user_id}/events", "limit"])
        self.assertEqual((1, 1_000), bounds["GET /oauth/revocations", "limit"])
        self.assertEqual((1, 2**31 - 1), bounds["DELETE /users/{user_id}", "user_id"])
        for values in bounds.values():
            self.assertEqual({int}, set(map(type, values)))
        for path, schema in self.schemas():
            with self.subTest(path):
                self.assertTrue({"ge", "le", "title"}.isdisjoint(schema))

    def test_parameters_say_what_is_refused(self) -> None:
        """An empty cursor and an empty search are refused, and their schemas say so."""
        for name, operation in self.operations().items():
            for parameter in operation.get("parameters", ()):
                with self.subTest(name, parameter=parameter["name"]):
                    self.assertNotIn("anyOf", parameter["schema"])
                    if parameter["name"] in {"after", "query"}:
                        self.assertEqual(1, parameter["schema"]["minLength"])
                        self.assertNotIn("default", parameter["schema"])
                        response = self.get(f"/users?{parameter['name']}=")
                        self.assert_error(response, errors.InvalidPayload)

    def test_members(self) -> None:
        """Members that may be absent are optional, without a default.

        openapi-typescript makes a member with a default required.
        """
        schemas = self.described()["components"]["schemas"]

        defaults = {
            f"{name}.{member}": value["default"]
            for name, schema in schemas.items()
            for member, value in schema.get("properties", {}).items()
            if "default" in value
        }
        optional = {
            f"{name}.{member}"
            for name, schema in schemas.items()
            for member in set(schema.get("properties", ())) - set(schema.get("required", ()))
        }
        self.assertEqual({}, defaults)
        change = {"username", "email", "active", "admin", "roles", "current_password", "code"}
        claims = {
            *("iss", "aud", "sub", "client_id", "username", "scope", "token_type"),
            *("iat", "exp", "jti", "sid", "auth_time", "amr"),
        }
        with_code = {
            *("Credentials", "OptionalCode", "Confirmation"),
            *("AccountDeletion", "EmailChange", "PasswordChange"),
        }
        self.assertEqual(
            {
                *("ListedUser.active", "ListedUser.admin", "ListedUser.roles"),
                *("FullUser.email_verified", "FullUser.roles"),
                *("Invitation.username", "AcceptedInvitation.username"),
                *("PasswordChange.keep_sessions", "Liveness.version"),
                *("TokenRequest.scope", "ClientToken.scope", "PresentedToken.token_type_hint"),
                *("Error.error", "FieldError.error", "ServerError.error"),
                "Error.mfa_token",
            }
            | {f"{name}.code" for name in with_code}
            | {f"Introspection.{member}" for member in claims}
            | {f"UserChange.{member}" for member in change},
            optional,
        )

    def test_typed_bodies(self) -> None:
        """Every request body is a named object with typed members, and has an example."""
        described = self.described()
        bodies = {
            name: content
            for name, operation in self.operations().items()
            for content in operation.get("requestBody", {"content": {}})["content"].items()
        }

        self.assertEqual(25, len(bodies))
        for name, (kind, body) in bodies.items():
            with self.subTest(name):
                form = name.startswith("POST /oauth")
                self.assertEqual(FORM if form else "application/json", kind)
                schema = described["components"]["schemas"][body["schema"]["$ref"].split("/")[-1]]
                self.assertEqual("object", schema["type"])
                self.assertTrue({"anyOf", "oneOf", "allOf"}.isdisjoint(schema))
                self.assertEqual(
                    [], list(Draft202012Validator(schema).iter_errors(body["example"]))
                )

    def test_optional_bodies(self) -> None:
        """Every body is required, except those of requests that needed none before codes."""
        optional = {
            name
            for name, operation in self.operations().items()
            if not operation.get("requestBody", {"required": True})["required"]
        }

        self.assertEqual({"DELETE /users/{user_id}", "DELETE /users/{user_id}/totp"}, optional)

    def test_words_may_change(self) -> None:
        """Responses may gain members, and messages are texts; codes and kinds are enums."""
        schemas = self.described()["components"]["schemas"]
        for name, schema in schemas.items():
            with self.subTest(name):
                self.assertNotIn("additionalProperties", schema)
                message = schema.get("properties", {}).get("message", {"type": "string"})
                self.assertEqual("string", message["type"])
                self.assertNotIn("const", message)
        self.assertEqual(list(map(str, Kind)), schemas["EventKind"]["enum"])
        documented = [
            code
            for name in ("Error", "FieldError", "ServerError")
            for code in schemas[f"{name}Code"]["enum"]
        ]
        codes = {
            error.code
            for error in vars(errors).values()
            if isinstance(error, type) and issubclass(error, errors.ServiceError)
        }
        self.assertEqual(sorted(codes), sorted(documented))

    def test_accepted(self) -> None:
        """A registration and a change answer 202 only with settings that cause it."""
        answers = [("POST /auth/register", "201"), ("PATCH /users/{user_id}", "200")]
        for settings, expected in (
            ({}, (False, False)),
            ({"SMTP_URL": "smtp://127.0.0.1"}, (False, True)),
            ({"EMAIL_VERIFICATION": "optional"}, (False, True)),
            ({"EMAIL_VERIFICATION": "required"}, (True, True)),
        ):
            with self.subTest(settings):
                self.app.config.update({"SMTP_URL": None, "EMAIL_VERIFICATION": "off"} | settings)
                paths = openapi.describe(self.app)["paths"]
                for (name, usual), can in zip(answers, expected, strict=True):
                    method, path = name.split()
                    responses = paths[path][method.lower()]["responses"]
                    self.assertIn(usual, responses)
                    self.assertEqual(can, "202" in responses)

    def test_tags(self) -> None:
        """Every operation has one tag, which has a description."""
        described = {tag["name"] for tag in self.described()["tags"] if tag["description"]}

        for name, operation in self.operations().items():
            with self.subTest(name):
                self.assertEqual(1, len(operation["tags"]))
                self.assertLessEqual(set(operation["tags"]), described)

    def test_undocumented_answers_are_noticed(self) -> None:
        """A test fails if a response has an undocumented status or member."""
        pong = {"status": "success", "message": "pong!"}
        for answer, complaint in (
            (({}, 200), "required"),
            ((pong | {"more": 1}, 200), "more"),
            ((pong, 202), "no 202"),
            (failure(errors.LastAdmin(), "fail", ""), "no 400"),
            (failure(errors.InternalError(), "fail", "x"), "is none of"),
            (({"message": "!", "code": "internal_error"}, 500), "is none of"),
        ):
            with (
                self.subTest(complaint),
                mock.patch("project.api.users.success", return_value=answer),
                self.assertRaisesRegex(AssertionError, complaint),
            ):
                self.get("/ping")


class TestCommand(unittest.TestCase):
    """manage.py openapi."""

    KEY = "0123456789abcdefghijklmnopqrstuvwxyz"

    def write(self, *arguments: str, **environment: str) -> dict[str, Any]:
        """Return the document that the command prints."""
        url = "sqlite:////nonexistent/users.db"  # no database is used
        result = scratch.manage("openapi", "-", *arguments, DATABASE_URL=url, **environment)
        self.assertEqual((0, ""), (result.returncode, result.stderr))
        return dict(json.loads(result.stdout))

    def test_production(self) -> None:
        """In production new passwords have 12 characters, and /users requires a token."""
        settings = {"APP_SETTINGS": "project.config.ProductionConfig", "SECRET_KEY": self.KEY}
        described = self.write(**settings)

        schemas = described["components"]["schemas"]
        self.assertEqual(12, schemas["NewUser"]["properties"]["password"]["minLength"])
        self.assertEqual(12, schemas["PasswordChange"]["properties"]["new_password"]["minLength"])
        operations = [one for path in described["paths"].values() for one in path.values()]
        self.assertFalse(any({} in operation["security"] for operation in operations))
        changed = self.write(PASSWORD_MIN_LENGTH="15", USERS_API_OPEN="1", **settings)
        password = changed["components"]["schemas"]["NewUser"]["properties"]["password"]
        self.assertEqual(15, password["minLength"])
        self.assertIn({}, changed["paths"]["/users"]["get"]["security"])

    def test_origin(self) -> None:
        """The URL of the service is relative, unless an origin is given."""
        for arguments, origin in ((), ""), (("--origin", "https://a.example"), "https://a.example"):
            with self.subTest(origin):
                (server,) = self.write(*arguments, SECRET_KEY="any")["servers"]
                self.assertEqual("{origin}", server["url"])
                self.assertEqual(origin, server["variables"]["origin"]["default"])

    def test_file(self) -> None:
        """The command writes a file, and reports in one line if it cannot."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "openapi.json")
            written = scratch.manage("openapi", str(path), SECRET_KEY="any")
            self.assertEqual((0, ""), (written.returncode, written.stdout + written.stderr))
            self.assertEqual("3.1.0", json.loads(path.read_text())["openapi"])
            refused = scratch.manage("openapi", folder, SECRET_KEY="any")
        self.assertEqual(1, refused.returncode)
        self.assertEqual(f"{folder} cannot be written: Is a directory\n", refused.stderr)


class TestExamples(BaseTestCase):
    """The examples are recorded requests and responses."""

    environment: ClassVar[dict[str, str]] = {"ISSUER": ISSUER}
    settings: ClassVar[dict[str, Any]] = MAIL_SETTINGS | {
        "TOKEN_EXPIRATION_DAYS": 30,
        "TOKEN_EXPIRATION_SECONDS": 0,
    }
    maxDiff = None

    def walk(self) -> dict[str, dict[str, Any]]:
        """Call every operation once, and return the requests and responses by operation ID."""
        self.examples: dict[str, dict[str, Any]] = {}
        self.app.config["ISSUER"] = None  # the tokens of most installations
        pair = self.call("register_user", 201, "/auth/register", ADA)
        (ada,) = stored_users()
        credentials = {"email": ADA["email"], "password": ADA["password"]}
        pair = self.call("login_user", 200, "/auth/login", credentials)
        refresh = {"refresh_token": pair["refresh_token"]}
        token = self.call("refresh_tokens", 200, "/auth/refresh", refresh)["auth_token"]
        self.call("ping_pong", 200, "/ping")
        self.call("get_service", 200, "/")
        self.app.config["SHOW_VERSION"] = False  # as in production
        self.call("get_liveness", 200, "/health/live")
        self.app.config["SHOW_VERSION"] = True
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
        self.follow_links(ada["id"])
        self.use_authenticator()
        add_user("root", "root@example.com", "root", admin=True)
        credentials = {"email": "root@example.com", "password": "root"}
        token = self.client.post("/auth/login", json=credentials).get_json()["auth_token"]
        authenticator = self.set_authenticator_up("root", token)
        self.call("invite_user", 202, "/users/invitations", {"email": "hedy@example.com"}, token)
        body = {"token": self.link(), "username": "hedy", "password": "correct horse"}
        self.call("accept_invitation", 201, "/auth/invitation", body)
        body = {"code": self.next_code(authenticator)}
        self.call("reset_totp", 200, f"/users/{ada['id']}/totp", body, token, "DELETE")
        body = {"code": self.next_code(authenticator)}
        self.call("delete_user", 200, f"/users/{ada['id']}", body, token, "DELETE")
        add_user("other", "other@example.com", "other", admin=True)
        body = {"current_password": "root"}
        self.call("delete_account", 200, "/auth/account", body, token, "DELETE")
        self.act_as_service()
        return self.examples

    def act_as_service(self) -> None:
        """Use the routes for other services."""
        self.app.config["ISSUER"] = ISSUER
        credentials = {"email": "other@example.com", "password": "other"}
        token = self.client.post("/auth/login", json=credentials).get_json()["auth_token"]
        headers = basic("orders", clients.create("orders", ISSUER, ["stock.read"], ORIGIN))
        db.session.commit()
        for operation, path, form in (
            ("list_keys", "/.well-known/jwks.json", None),
            ("get_metadata", "/.well-known/oauth-authorization-server", None),
            ("issue_token", "/oauth/token", {"grant_type": "client_credentials"}),
            ("introspect_token", "/oauth/introspect", {"token": token}),
            ("revoke_token", "/oauth/revoke", {"token": token}),
            ("list_revocations", "/oauth/revocations", None),
        ):
            method = "POST" if form else "GET"
            response = self.client.open(path, method=method, data=form, headers=headers)
            self.record(operation, 200, response, form)

    def follow_links(self, user_id: int) -> None:
        """Confirm the email of a user, reset their password, and change the email."""
        email = {"email": ADA["email"]}
        self.call("request_verification", 202, "/auth/verification", email)
        self.call("verify_email", 200, "/auth/verify", {"token": self.link()})
        self.call("forgot_password", 202, "/auth/password/forgot", email)
        body = {"token": self.link(), "new_password": ADA["password"]}
        self.call("reset_password", 200, "/auth/password/reset", body)
        credentials = {**email, "password": ADA["password"]}
        token = self.client.post("/auth/login", json=credentials).get_json()["auth_token"]
        body = {"email": "lovelace@example.com", "current_password": ADA["password"]}
        self.call("change_email", 202, "/auth/email", body, token)
        self.call("confirm_email", 200, "/auth/email/confirm", {"token": self.link()})

    def use_authenticator(self) -> None:
        """Set an authenticator up, log in with its codes, turn it off, and set up another one."""
        credentials = {"email": "lovelace@example.com", "password": ADA["password"]}
        token = self.client.post("/auth/login", json=credentials).get_json()["auth_token"]
        password = {"current_password": ADA["password"]}
        data = self.call("begin_totp", 200, "/auth/totp", password, token)["data"]
        authenticator = pyotp.TOTP(data["secret"])
        body = {"code": self.next_code(authenticator)}
        self.call("confirm_totp", 200, "/auth/totp/confirm", body, token)
        refused = self.client.post("/auth/login", json=credentials).get_json()
        body = {"mfa_token": refused["mfa_token"], "code": self.next_code(authenticator)}
        token = self.call("login_with_code", 200, "/auth/login/mfa", body)["auth_token"]
        self.call("get_totp", 200, "/auth/totp", token=token)
        body = password | {"code": self.next_code(authenticator)}
        self.call("replace_recovery_codes", 200, "/auth/recovery_codes", body, token)
        body = password | {"code": self.next_code(authenticator)}
        self.call("turn_off_totp", 200, "/auth/totp", body, token, "DELETE")
        self.set_authenticator_up(ADA["password"], token)
        send_mail(self.app)  # what tells the user of it

    def set_authenticator_up(self, password: str, token: str) -> pyotp.TOTP:
        """Set an authenticator up that is not recorded, and return it."""
        body = {"current_password": password}
        answer = self.client.post("/auth/totp", json=body, headers=bearer(token)).get_json()
        authenticator = pyotp.TOTP(answer["data"]["secret"])
        body = {"code": self.next_code(authenticator)}
        answer = self.client.post("/auth/totp/confirm", json=body, headers=bearer(token))
        self.assertEqual(200, answer.status_code)
        return authenticator

    def next_code(self, authenticator: pyotp.TOTP) -> str:
        """Move the clock to the next code of an authenticator, and return it."""
        self.move_clock(authenticator.interval)
        return authenticator.at(clock.utcnow())

    def link(self) -> str:
        """Send the emails that are due, and return the token of the link in one of them."""
        texts = [body_of(message, "plain") for message in send_mail(self.app)]
        (found,) = re.findall(r"token=(\S+)", "".join(texts))
        return str(found)

    def call(
        self,
        operation: str,
        status: int,
        path: str,
        body: Any = None,
        token: str | None = None,
        method: str | None = None,
    ) -> dict[str, Any]:
        """Call an operation, record the example, and return the response body."""
        method = method or ("POST" if body else "GET")
        headers = {"User-Agent": "curl/8.14.1"} | (bearer(token) if token else {})
        response = self.client.open(path, method=method, json=body, headers=headers)
        return self.record(operation, status, response, body)

    def record(
        self, operation: str, status: int, response: TestResponse, body: Any
    ) -> dict[str, Any]:
        """Record an example, and return the response body."""
        self.assertEqual(status, response.status_code, response.get_data(as_text=True))
        answer: dict[str, Any] = response.get_json()
        self.examples[operation] = {"answer": answer} | ({"request": body} if body else {})
        return answer

    def test_examples(self) -> None:
        """The examples match current responses, except secrets, IDs and times; none is missing."""
        examples = self.walk()
        if RECORD:
            text = orjson.dumps(examples, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
            EXAMPLES.write_bytes(text + b"\n")

        kept = json.loads(EXAMPLES.read_text())
        self.assertEqual(shape(examples), shape(kept))
        described = openapi.describe(self.app)
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                with self.subTest(f"{method} {path}"):
                    self.assertIn(operation["operationId"], kept)


def shape(example: Any) -> Any:
    """Return an example with tokens, keys, codes, secrets, IDs and times masked."""
    if isinstance(example, dict):
        return {key: shape(value) for key, value in example.items()}
    if isinstance(example, list):
        return [shape(value) for value in example]
    if isinstance(example, bool) or not isinstance(example, int | str):
        return example
    volatile = (
        r"\d+|\d+-\d+|\d{4}-.*Z|[\w-]{22}(\.\d+)?|[\w-]{43}|[\da-f]{32}|eyJ.*"
        r"|([A-Z2-7]{4}-){5}[A-Z2-7]{4}"  # a recovery code
    )
    if re.fullmatch(volatile, str(example)):
        return "..."
    return re.sub(r"\b[A-Z2-7]{32}\b", "...", str(example))  # a secret, also in a URI


class TestPage(BaseTestCase):
    """Swagger UI, served by the service itself."""

    def test_page(self) -> None:
        """The service serves the page and all its files, with their content types."""
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
        """The page may load its own files; other responses may load nothing."""
        policy = self.get("/docs").headers["Content-Security-Policy"]
        self.assertIn("script-src 'self';", policy)
        self.assertIn("default-src 'none'", policy)
        self.assertNotIn("unsafe-eval", policy)
        for path in ("/ping", "/docs/openapi.json", "/docs/nothing"):
            with self.subTest(path):
                strict = "default-src 'none'; frame-ancestors 'none'"
                self.assertEqual(strict, self.get(path).headers["Content-Security-Policy"])

    def test_slash(self) -> None:
        """With a slash, the page redirects to its path without, relative to that of a proxy."""
        response = self.get("/docs/")

        self.assertEqual((308, "../docs"), (response.status_code, response.headers["Location"]))

    def test_service(self) -> None:
        """The service says where its page is, and sends browsers there."""
        told: dict[str, Any] = {
            "status": "success",
            "name": "Users service",
            "documentation": "/docs",
        }
        for accept in ("*/*", "application/json", "application/json, text/html", ""):
            with self.subTest(accept):
                response = self.client.get("/", headers={"Accept": accept})
                self.assertEqual((200, told), (response.status_code, response.get_json()))
        browser = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
        response = self.client.get("/", headers=browser)
        self.assertEqual((303, "docs"), (response.status_code, response.headers["Location"]))

        self.app.config["API_DOCS"] = False
        response = self.client.get("/", headers=browser)
        told["documentation"] = None
        self.assertEqual((200, told), (response.status_code, response.get_json()))

    def test_no_other_files(self) -> None:
        """Only the files of Swagger UI are served."""
        for name in ("../__init__.py", "..%2f__init__.py", "/etc/passwd", "nothing", "", "css"):
            with self.subTest(name):
                response = self.get(f"/docs/swagger/{name}")

                self.assert_error(response, errors.NotFound)

    def test_off(self) -> None:
        """In production, document and page exist only if API_DOCS is set."""
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
