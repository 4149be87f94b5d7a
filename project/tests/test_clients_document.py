"""docs/clients.md agrees with the service: error codes, fields, kinds of events, numbers."""

import argparse
import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pyotp
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from project import clock, db, errors, ids
from project.accounts import administration, clients, fields, links, rate_limits
from project.api import paging
from project.config import DAY, DevelopmentConfig, ProductionConfig
from project.lib import hashing
from project.models import MAX_REQUEST_ID
from project.ops import import_export_commands, keys, purge
from project.tests import scratch
from project.tests.accounts.mail_case import MailTestCase, body_of
from project.tests.accounts.second_factor_case import NO_RECOVERY_CODE, STEP
from project.tests.api.oauth_case import ISSUER, basic
from project.tests.base import BaseTestCase, bearer
from project.tests.contract import client_tables
from project.tests.rows import ORIGIN, add_events, add_user, stored_events, stored_users
from project.tokens.links import Purpose

TEXT = client_tables.DOCUMENT.read_text()
COMMAND = "python -m project.tests.contract.client_tables"
PASSWORD = "test"
STATUSES = {row[0].strip("`"): row[1] for row in client_tables.written("Code")}
NAMES = {"client", "key", "roles"}  # details whose values are names that somebody gave


class TestTables(BaseTestCase):
    """The tables have what the code has, and advice for each row."""

    def test_tables(self) -> None:
        """A table has a row for each code, field and kind of event, and no other row."""
        for titles in client_tables.TABLES:
            with self.subTest(titles[0]):
                expected = client_tables.table(titles)
                message = f"`{COMMAND}` prints the table as it should be"

                self.assertEqual(expected, client_tables.written(titles[0]), message)
                for row in expected:
                    self.assertNotIn("", row, f"{row[0]} has an empty cell")

    def test_command(self) -> None:
        """The command prints every table of the document."""
        command = [sys.executable, *COMMAND.split()[1:]]
        printed = subprocess.run(
            command, cwd=scratch.ROOT, capture_output=True, text=True, check=True
        ).stdout
        for table in printed.strip().split("\n\n"):
            self.assertIn(f"\n\n{table}\n", TEXT)

    def test_numbers(self) -> None:
        """The numbers in the rules are those of the code."""
        production = {name: field.default for name, field in ProductionConfig.model_fields.items()}
        least, most = production["PASSWORD_MIN_LENGTH"], hashing.MAX_BYTES
        page = paging.UsersPage.model_fields["limit"].default
        rules = {
            "username": f"1 to {fields.MAX_NAME_LENGTH} characters",
            "email": f"At most {fields.MAX_NAME_LENGTH} characters",
            "password": f"{least} (`PASSWORD_MIN_LENGTH`) characters to {most:,} bytes",
            "session_id": f"{ids.SESSION_LENGTH} letters",
            "ids": f"1 to {paging.MAX_IDS} user IDs",
            "limit": f"1 to 500, by default {page}:",
            "user_id": f"1 to {ids.MAX_ID},",
        }
        rows = {row[0]: row[-1] for row in client_tables.written("Field")}
        for field, rule in rules.items():
            with self.subTest(field):
                self.assertIn(rule, rows[f"`{field}`"])
        for limit, status in (("1", 200), ("500", 200), ("0", 400), ("501", 400)):
            self.assertEqual(status, self.client.get(f"/users?limit={limit}").status_code)
        for sentence in (
            f"1 to {MAX_REQUEST_ID} letters",
            f"at most {ProductionConfig.MAX_CONTENT_LENGTH // 1024} KiB",
            f"within {production['REFRESH_REUSE_SECONDS']} seconds (`REFRESH_REUSE_SECONDS`)",
            f'"registrations";q={production["REGISTRATIONS_PER_ADDRESS"]};w=3600',
            f"For {production['STEP_UP_SECONDS'] // 60} minutes (`STEP_UP_SECONDS`)",
            f"valid for {links.MFA_SECONDS // 60} minutes",
        ):
            self.assertIn(sentence, TEXT)


class TestEvents(BaseTestCase):
    """The details of events are those that the document lists."""

    environment: ClassVar[dict[str, str]] = {"ISSUER": ISSUER}
    settings: ClassVar[dict[str, Any]] = {
        "TOKEN_EXPIRATION_SECONDS": 3_600,
        "SMTP_URL": "smtp://127.0.0.1:1",
        "MAIL_FROM": "users@app.example",
        "LINK_BASE_URL": "https://app.example",
    }

    def send(
        self, method: str, path: str, caller: str | None = None, /, **body: Any
    ) -> dict[str, Any]:
        """Return the response to a request."""
        headers = bearer(caller) if caller else {}
        response = self.client.open(path, method=method, json=body, headers=headers)
        answer: dict[str, Any] = response.get_json()
        return answer

    def start(self, name: str) -> dict[str, Any]:
        """Log in, and return the token pair."""
        return self.send("POST", "/auth/login", email=f"{name}@test.com", password=PASSWORD)

    def test_details(self) -> None:
        """Every kind occurs with exactly the details of its row, and with each of their values."""
        self.act_on_sessions()
        self.act_on_users()
        self.act_with_links()
        self.act_with_codes()
        self.act_as_operator()
        self.act_as_service()
        occurred: dict[str, set[str]] = defaultdict(set)
        for event in stored_events():
            details = event["details"]
            values = (details[name] for name in set(details) - NAMES)
            occurred[event["kind"]] |= {*details, *(one for one in values if isinstance(one, str))}

        listed = {
            kind.strip("`"): set(re.findall("`([^`]+)`", details))
            for kind, _, details in client_tables.written("Kind")
        }

        self.assertEqual(listed, dict(occurred))

    def act_on_sessions(self) -> None:
        """Register, log in, refresh, change the password, log out, and be refused each."""
        user = {"username": "ada", "email": "ada@test.com", "password": PASSWORD}
        self.send("POST", "/auth/register", **user)
        self.send("POST", "/auth/register", **user)
        self.send("POST", "/auth/register", **user | {"username": "new"})
        self.send("POST", "/auth/register", **user | {"email": "new@test.com"})
        self.send("POST", "/auth/login", email="ada@test.com", password="wrong")
        self.send("POST", "/auth/login", email="unknown@test.com", password="wrong")

        pair = self.start("ada")
        old = {"refresh_token": pair["refresh_token"]}
        token = self.send("POST", "/auth/refresh", **old)["auth_token"]
        passwords = {"new_password": PASSWORD, "current_password": "wrong"}
        self.send("POST", "/auth/password", token, **passwords)
        self.send("POST", "/auth/password", token, **passwords | {"current_password": PASSWORD})
        with mock.patch("project.clock.utcnow", return_value=clock.utcnow() + timedelta(hours=1)):
            self.send("POST", "/auth/refresh", **old)
        self.send("POST", "/auth/refresh", **old)
        token = self.start("ada")["auth_token"]
        session = self.client.get("/auth/sessions", headers=bearer(token)).get_json()
        session_id = session["data"]["sessions"][0]["id"]
        self.send("DELETE", f"/auth/sessions/{session_id}", token)
        for scope in ("", "?scope=others", "?scope=all"):
            self.send("POST", f"/auth/logout{scope}", self.start("ada")["auth_token"])
        pair = self.start("ada")
        administration.set_active("ada@test.com", False, ORIGIN)
        db.session.commit()
        self.start("ada")
        self.send("POST", "/auth/refresh", refresh_token=pair["refresh_token"])

    def act_on_users(self) -> None:
        """Change, search and delete users as an admin, and be refused."""
        root = add_user("root", "root@test.com", PASSWORD, admin=True).id
        token = self.start("root")["auth_token"]
        self.app.config["USERS_API_OPEN"] = False
        user = {"username": "bob", "email": "bob@test.com", "password": PASSWORD}
        bob = self.send("POST", "/users", token, **user)["data"]["id"]
        self.send("GET", "/users?query=b", token)
        for change in (
            {"username": "bobby"},
            {"email": "bobby@test.com"},
            {"username": "bo", "email": "bob@test.com"},
            {"username": "root"},
            {"email": "root@test.com"},
            {"active": False},
            {"active": True},
            {"admin": True},
            {"admin": False},
            {"roles": ["orders"]},
        ):
            self.send("PATCH", f"/users/{bob}", token, **change)
        headers = bearer(token) | {"If-Match": '"another"'}
        self.client.patch(f"/users/{bob}", json={"username": "b"}, headers=headers)
        for password in ("wrong", PASSWORD):
            own = {"current_password": password}
            self.send("PATCH", f"/users/{root}", token, admin=False, **own)
            self.send("DELETE", "/auth/account", token, **own)
        bob_token = self.start("bob")["auth_token"]
        refusal = errors.TooManyAttempts(retry_after=1)
        with mock.patch.object(rate_limits.NoLimits, "mail_within", side_effect=refusal):
            self.send("PATCH", f"/users/{bob}", bob_token, email="b@test.com", **own)
        self.send("DELETE", "/auth/account", bob_token, **own)
        self.send("DELETE", f"/users/{add_user('eve', 'eve@test.com', PASSWORD).id}", token)

    def act_with_links(self) -> None:
        """Confirm an email, ask for another, reset the password, and invite."""
        root = self.start("root")["auth_token"]
        self.send("POST", "/users/invitations", root, email="new@test.com")
        self.app.config["EMAIL_VERIFICATION"] = "required"
        email = "kim@test.com"
        self.send("POST", "/auth/register", username="kim", email=email, password=PASSWORD)
        self.start("kim")
        self.send("POST", "/auth/verify", token=self.link(Purpose.VERIFY, email))
        other = {"email": "other@test.com", "current_password": PASSWORD}
        self.send("POST", "/auth/email", self.start("kim")["auth_token"], **other)
        reset = {"token": self.link(Purpose.RESET, email), "new_password": PASSWORD}
        self.send("POST", "/auth/password/reset", **reset)

    def link(self, purpose: Purpose, email: str) -> str:
        """Return the token of a link, as an email to the user has it."""
        user = links.user_by_email(email)
        assert user is not None  # noqa: S101  # for mypy
        return links.for_user(purpose, user, 60).url.partition("?token=")[2]

    def act_with_codes(self) -> None:
        """Set authenticators up, log in with codes, give them for acts, and be refused each."""
        self.app.config["EMAIL_VERIFICATION"] = "off"
        self.move_clock(0)
        kim, lee = "kim@test.com", add_user("lee", "lee@test.com", PASSWORD)
        own, no_code = {"current_password": PASSWORD}, {"code": NO_RECOVERY_CODE}
        token = self.start("kim")["auth_token"]
        self.send("POST", "/auth/totp", token, current_password="wrong")
        self.send("POST", "/auth/totp", token, **own)
        self.send("POST", "/auth/totp/confirm", token, **no_code)
        totp, recovery_codes = self.enrol(token)
        self.start("kim")
        for code in (NO_RECOVERY_CODE, totp.at(clock.utcnow()), recovery_codes.pop()):
            self.send("POST", "/auth/login", email=kim, password=PASSWORD, code=code)
        user = self.send("GET", "/auth/status", token)["data"]["id"]
        self.send("POST", "/auth/password", token, new_password=PASSWORD, **own, **no_code)
        self.send("PATCH", f"/users/{user}", token, username="kimmy", **own, **no_code)
        self.send("DELETE", "/auth/account", token, **own, **no_code)
        self.send("POST", "/auth/recovery_codes", token, **own, code=recovery_codes.pop())
        self.send("DELETE", "/auth/totp", token, **own)

        self.enrol(token)
        for _ in range(2):
            self.send("DELETE", f"/users/{user}/totp", self.start("root")["auth_token"])
        self.enrol(self.start("kim")["auth_token"])
        administration.reset_totp_of(kim, ORIGIN)
        db.session.commit()
        self.enrol(self.start("lee")["auth_token"])
        reset = {"token": self.link(Purpose.RESET, lee.email), "new_password": PASSWORD}
        self.send("POST", "/auth/password/reset", **reset)

    def enrol(self, token: str) -> tuple[pyotp.TOTP, list[str]]:
        """Turn an authenticator on with the code before the present one."""
        answer = self.send("POST", "/auth/totp", token, current_password=PASSWORD)
        totp = pyotp.TOTP(answer["data"]["secret"])
        code = totp.at(clock.utcnow(), counter_offset=-1)
        answer = self.send("POST", "/auth/totp/confirm", token, code=code)
        return totp, answer["data"]["recovery_codes"]

    def act_as_service(self) -> None:
        """Revoke a token as another service, and be refused."""
        secret = clients.create("orders", ISSUER, [], ORIGIN)
        db.session.commit()
        form = {"token": self.start("kim")["auth_token"]}
        for name, password in (("orders", secret), ("orders", "wrong"), ("nobody", secret)):
            self.client.post("/oauth/revoke", data=form, headers=basic(name, password))
        secret = clients.rotate_secret("orders", ORIGIN, keep=timedelta())
        clients.disable("orders", ORIGIN)
        db.session.commit()
        self.client.post("/oauth/revoke", data=form, headers=basic("orders", secret))

    def act_as_operator(self) -> None:
        """End sessions, import users, export them, rotate the keys, and delete expired rows."""
        add_events(None, [clock.utcnow() - timedelta(days=91)])
        administration.end_sessions("root@test.com", ORIGIN)
        db.session.commit()
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            mock.patch("project.lib.database.set_answer_timeout"),
        ):
            import_export_commands.export_users(str(folder / "users.jsonl"), with_factors=True)
            text = (folder / "users.jsonl").read_text().replace("root", "toor")
            (folder / "more.jsonl").write_text(text)
            import_export_commands.import_users(str(folder / "more.jsonl"))
            keys.rotate_keys()
            purge.purge()


class TestLinkCalls(MailTestCase):
    """The calls of the section on links, sent as written."""

    settings: ClassVar[dict[str, Any]] = MailTestCase.settings | {"EMAIL_VERIFICATION": "required"}

    def test_calls(self) -> None:
        """In the order of the document, each call has the response shown below it."""
        add_user("admin", "admin@test.com", PASSWORD, admin=True, email_verified=True)
        admin = self.login("admin@test.com", PASSWORD).get_json()["auth_token"]
        section = TEXT.split("\n## Links in emails\n")[1].split("\n## ")[0]
        link = ""
        calls = re.findall(r"```sh\n(.*?)```(?:\n\n```json\n(.*?)```)?", section, re.DOTALL)
        for command, shown in calls:
            with self.subTest(command):
                token = admin
                if "auth_token of a login" in command:
                    pair = self.login("grace@example.com", "another correct horse").get_json()
                    token = pair["auth_token"]
                response = curl(self.client, command, {"LINK": link, "TOKEN": token})
                self.assertLess(response.status_code, 300, response.get_json())
                if shown:
                    self.assertEqual(json.loads(shown), response.get_json())
                for message in self.send_mail():
                    if found := re.search(r"\?token=(\S+)", body_of(message, "plain")):
                        link = found[1]
        users = {user["username"]: user["email"] for user in stored_users()}
        expected = {"grace": "hopper@example.com", "linus": "linus@example.com"}
        self.assertEqual(users, users | expected)


class TestMfaCalls(BaseTestCase):
    """The calls of the section on the second factor, sent as written."""

    settings: ClassVar[dict[str, Any]] = {
        "TOKEN_EXPIRATION_SECONDS": 30 * DAY,
        "MAIL_FROM": DevelopmentConfig.model_fields["MAIL_FROM"].default,
    }

    def test_calls(self) -> None:
        """In the order of the document, each call has the response shown below it."""
        add_user("hedy", "hedy@example.com", "correct horse")
        token = self.login("hedy@example.com", "correct horse").get_json()["auth_token"]
        values, totp = {"TOKEN": token}, None
        section = TEXT.split("\n## Second factor\n")[1].split("\n## ")[0]
        calls = re.findall(r"```sh\n(.*?)```\n\n```json\n(.*?)```", section, re.DOTALL)
        for command, shown in calls:
            with self.subTest(command):
                code = json.loads(shown).get("code")
                self.prepare(code)
                if totp:
                    values["CODE"] = totp.at(clock.utcnow())
                response = curl(self.client, command, values)
                self.assertEqual(masked(shown), masked(response.get_data(as_text=True)))
                self.assertIn(str(response.status_code), STATUSES.get(code, "200"))
                answer = response.get_json()
                data = answer.get("data", {})
                if "secret" in data:
                    totp = pyotp.TOTP(data["secret"])
                if "recovery_codes" in data:
                    values["RECOVERY_CODE"] = data["recovery_codes"][0]
                for name in {"auth_token", "mfa_token"} & answer.keys():
                    values[name.removeprefix("auth_").upper()] = answer[name]

        self.assertEqual(section.count("```sh\n"), len(calls))

    def prepare(self, code: str | None) -> None:
        """Let the authenticator show another code, and cause the refusal that a call is to get."""
        needs_code = code == errors.StepUpRequired.code
        self.move_clock(self.app.config["STEP_UP_SECONDS"] if needs_code else STEP)
        if code == errors.MfaEnrolmentRequired.code:
            self.app.config["REQUIRE_MFA"] = "all"


def masked(shown: str) -> Any:
    """Return the JSON of a response without what is different each time."""
    for pattern, mask in (
        (r"eyJ[\w.-]+", "TOKEN"),
        (r"\b[A-Z2-7]{32}\b", "SECRET"),
        (r'\["([A-Z2-7]{4}-){5}[A-Z2-7]{4}",.*?\]', '"RECOVERY CODES"'),
    ):
        shown = re.sub(pattern, mask, shown)
    return json.loads(shown)


def curl(client: FlaskClient, text: str, values: dict[str, str]) -> TestResponse:
    """Return the response to the call that a curl command makes, with these shell variables."""
    command = text[text.index("curl ") :].replace("\\\n", "")
    for name, value in values.items():
        command = command.replace(f"${name}", value)
    parser = argparse.ArgumentParser()
    parser.add_argument("curl")
    parser.add_argument("-X", dest="method", default="GET")
    parser.add_argument("-H", dest="headers", action="append")
    parser.add_argument("-d", dest="data")
    parser.add_argument("url")
    call = parser.parse_args(shlex.split(command))
    headers = [tuple(header.split(": ", 1)) for header in call.headers]
    path = call.url.removeprefix("http://127.0.0.1:5000")
    return client.open(path, method=call.method, data=call.data, headers=headers)
