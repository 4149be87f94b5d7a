"""The audit log: which events it has, what they contain, and that they are recorded atomically."""

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pyotp
from sqlalchemy import event, select, update
from werkzeug.test import TestResponse

from project import clock, db
from project.accounts import administration, audit, links, rate_limits
from project.lib import database
from project.models import User, recovery_codes_table, totp_factors_table
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import (
    ORIGIN,
    add_user,
    start_session,
    stored_events,
    stored_sessions,
    stored_users,
)
from project.tests.tokens.claims import session_of
from project.tokens.links import Purpose

AGENT = "Mozilla/5.0 (X11; Linux x86_64)"
WRONG = "a wrong one"
NEW = "another one"


class AuditTestCase(BaseTestCase):
    """A test of a client with a known address, user agent and request ID."""

    settings = {"TOKEN_EXPIRATION_SECONDS": 3_600}  # noqa: RUF012  # never changed
    user: User

    def setUp(self) -> None:
        """Add a user."""
        super().setUp()
        self.user = add_user("test", "test@test.com", "test")

    def ask(
        self,
        method: str,
        path: str,
        token: str | None = None,
        /,
        request_id: str = "req-1",
        **body: Any,
    ) -> TestResponse:
        """Return the response to a request."""
        headers = {"User-Agent": AGENT, "X-Request-ID": request_id}
        headers |= bearer(token) if token else {}
        origin = {"REMOTE_ADDR": "203.0.113.7"}
        return self.client.open(
            path, method=method, json=body, headers=headers, environ_base=origin
        )

    def post(
        self, path: str, token: str | None = None, /, request_id: str = "req-1", **body: Any
    ) -> TestResponse:
        """Return the response to a POST."""
        return self.ask("POST", path, token, request_id, **body)

    def log_in(
        self, password: str = "test", email: str = "test@test.com", **body: str
    ) -> TestResponse:
        """Return the response to a login, with more members in its body."""
        return self.post("/auth/login", email=email, password=password, **body)

    def assert_recorded(self, kind: audit.Kind, details: dict[str, Any], **columns: Any) -> None:
        """Check the kind, the details, the users and the origin of the newest event."""
        newest = stored_events()[-1]
        expected = {
            "kind": kind.value,
            "details": details,
            "ip": "203.0.113.7",
            "user_agent": AGENT,
            "request_id": "req-1",
            "user_id": self.user.id,
            "actor_id": None,
            "session_id": None,
        } | columns
        self.assertEqual(expected, {name: newest[name] for name in expected})
        self.assertLess(abs(clock.utcnow() - newest["created_at"]), timedelta(minutes=1))


class TestRecordedEvents(AuditTestCase):
    """Every change to an account, and every refused attempt, is an event."""

    def setUp(self) -> None:
        """Log the user in."""
        super().setUp()
        self.pair = self.log_in().get_json()
        self.session_id = stored_sessions()[0]["id"]

    def test_registered(self) -> None:
        """A registration is one event, which names the new session."""
        answer = self.post("/auth/register", username="new", email="new@test.com", password="new")

        self.assertEqual(201, answer.status_code)
        new, session = stored_users()[-1], stored_sessions()[-1]
        own = {"user_id": new["id"], "session_id": session["id"]}
        self.assert_recorded(audit.Kind.REGISTERED, {}, **own)

    def test_registration_refused(self) -> None:
        """A refused registration records which field was taken, but not by which user."""
        for taken, user in {
            "username": {"username": "TEST", "email": "new@test.com"},
            "email": {"username": "new", "email": "test@test.com"},
        }.items():
            with self.subTest(taken):
                answer = self.post("/auth/register", **user, password="new")

                self.assertEqual(400, answer.status_code)
                kind = audit.Kind.REGISTRATION_REFUSED
                self.assert_recorded(kind, {"why": f"{taken}_taken"}, user_id=None)

    def test_user_added(self) -> None:
        """Adding a user records the new user, and the admin when a token was sent."""
        answer = self.post("/users", username="new", email="new@test.com", password="new")

        self.assertEqual(201, answer.status_code)
        new = stored_users()[-1]["id"]
        self.assert_recorded(audit.Kind.USER_ADDED, {"admin": False}, user_id=new)

        self.app.config["USERS_API_OPEN"] = False
        db.session.execute(update(User).where(User.id == self.user.id).values(admin=True))
        db.session.commit()
        user = {"username": "more", "email": "more@test.com", "password": "more"}
        answer = self.post("/users", self.pair["auth_token"], **user)

        self.assertEqual(201, answer.status_code)
        own = {"user_id": stored_users()[-1]["id"], "actor_id": self.user.id}
        self.assert_recorded(audit.Kind.USER_ADDED, {"admin": False}, **own)

    def test_roles_changed(self) -> None:
        """A change of roles records those that the user has now, and the admin."""
        db.session.execute(update(User).where(User.id == self.user.id).values(admin=True))
        new = add_user("new", "new@test.com", "new")
        headers = bearer(self.pair["auth_token"]) | {"User-Agent": AGENT, "X-Request-ID": "req-1"}
        where = {"headers": headers, "environ_base": {"REMOTE_ADDR": "203.0.113.7"}}
        own = {"user_id": new.id, "actor_id": self.user.id}
        for roles in (["orders.read", "orders.write"], []):
            answer = self.client.patch(f"/users/{new.id}", json={"roles": roles}, **where)

            self.assertEqual(200, answer.status_code)
            self.assert_recorded(audit.Kind.ROLES_CHANGED, {"roles": " ".join(roles)}, **own)

    def test_login(self) -> None:
        """A login is recorded, and a refused login with its reason."""
        self.assert_recorded(audit.Kind.LOGGED_IN, {}, session_id=self.session_id)
        refused = audit.Kind.LOGIN_REFUSED

        self.assertEqual(404, self.log_in(WRONG).status_code)
        self.assert_recorded(refused, {"why": "wrong_password", "pause": 0})

        self.assertEqual(404, self.log_in("x" * 2_000).status_code)
        self.assert_recorded(refused, {"why": "wrong_password", "pause": 0})

        self.assertEqual(404, self.log_in(email="nobody@test.com").status_code)
        self.assert_recorded(refused, {"why": "unknown_email", "pause": 0}, user_id=None)

        administration.set_active("test@test.com", False, ORIGIN)
        db.session.commit()
        self.assertEqual(401, self.log_in().status_code)
        self.assert_recorded(refused, {"why": "account_inactive", "pause": 0})

    def test_pause(self) -> None:
        """The failure that starts a pause records its length; attempts during it are no events."""
        self.app.config.update(RATE_LIMITS=True, LOGIN_FAILURES_PER_ACCOUNT=2)
        rate_limits.init_app(self.app)
        for pause in (0, 60):
            self.assertEqual(404, self.log_in(WRONG).status_code)
            details = {"why": "wrong_password", "pause": pause}
            self.assert_recorded(audit.Kind.LOGIN_REFUSED, details)
        before = stored_events()

        self.assertEqual(429, self.log_in(WRONG).status_code)

        self.assertEqual(before, stored_events())

    def test_refresh(self) -> None:
        """A refresh, a repeat from another address and each refusal with a reason are recorded."""
        token, about = self.pair["refresh_token"], {"session_id": self.session_id}
        self.assertEqual(200, self.post("/auth/refresh", refresh_token=token).status_code)
        self.assert_recorded(audit.Kind.REFRESHED, {"repeated": False}, **about)
        before = stored_events()
        self.assertEqual(200, self.post("/auth/refresh", refresh_token=token).status_code)
        self.assertEqual(before, stored_events())
        elsewhere = self.client.post("/auth/refresh", json={"refresh_token": token})
        self.assertEqual(200, elsewhere.status_code)
        newest = stored_events()[-1]
        self.assertEqual(("127.0.0.1", {"repeated": True}), (newest["ip"], newest["details"]))

        self.move_clock(31)
        self.assertEqual(401, self.post("/auth/refresh", refresh_token=token).status_code)
        self.assert_recorded(audit.Kind.REFRESH_REUSED, {}, **about)

        self.assertEqual(401, self.post("/auth/refresh", refresh_token=token).status_code)
        self.assert_recorded(audit.Kind.REFRESH_REFUSED, {"why": "session_ended"}, **about)

        administration.set_active("test@test.com", False, ORIGIN)
        db.session.commit()
        self.assertEqual(401, self.post("/auth/refresh", refresh_token=token).status_code)
        self.assert_recorded(audit.Kind.REFRESH_REFUSED, {"why": "account_inactive"}, **about)

        db.session.execute(db.delete(User))
        db.session.commit()
        self.assertEqual(401, self.post("/auth/refresh", refresh_token=token).status_code)
        details = {"why": "account_inactive"}
        self.assert_recorded(audit.Kind.REFRESH_REFUSED, details, user_id=None)

    def test_log_out(self) -> None:
        """A logout records its scope and the number of sessions that it ended."""
        for scope, ended in (("others", 2), ("all", 1)):
            with self.subTest(scope):
                others = [self.log_in() for _ in range(ended)]
                token = others[-1].get_json()["auth_token"] if scope == "all" else None
                token = token or self.pair["auth_token"]
                answer = self.post(f"/auth/logout?scope={scope}", token)

                self.assertEqual(200, answer.status_code)
                newest = stored_events()[-1]
                details = {"scope": scope, "sessions": 2}
                self.assertEqual(("logged_out", details), (newest["kind"], newest["details"]))

        token = self.log_in().get_json()["auth_token"]
        session_id = stored_sessions()[-1]["id"]
        self.assertEqual(200, self.post("/auth/logout", token).status_code)
        details = {"scope": "this", "sessions": 1}
        self.assert_recorded(audit.Kind.LOGGED_OUT, details, session_id=session_id)

    def test_session_ended(self) -> None:
        """Ending a session records its ID; an unknown session is no event."""
        headers = bearer(self.pair["auth_token"]) | {"User-Agent": AGENT, "X-Request-ID": "req-1"}
        where = {"headers": headers, "environ_base": {"REMOTE_ADDR": "203.0.113.7"}}
        before = stored_events()
        self.assertEqual(404, self.client.delete("/auth/sessions/no", **where).status_code)
        self.assertEqual(before, stored_events())

        path = f"/auth/sessions/{self.session_id}"
        self.assertEqual(200, self.client.delete(path, **where).status_code)
        self.assert_recorded(audit.Kind.SESSION_ENDED, {}, session_id=self.session_id)

    def test_password(self) -> None:
        """A password change records how many sessions it ended; a refusal is recorded too."""
        self.log_in()
        token, own = self.pair["auth_token"], {"session_id": self.session_id}
        body = {"current_password": WRONG, "new_password": NEW}
        self.assertEqual(400, self.post("/auth/password", token, **body).status_code)
        details = {"why": "wrong_password", "pause": 0}
        self.assert_recorded(audit.Kind.PASSWORD_CHANGE_REFUSED, details, **own)

        body["current_password"] = "test"
        self.assertEqual(200, self.post("/auth/password", token, **body).status_code)
        self.assert_recorded(audit.Kind.PASSWORD_CHANGED, {"sessions": 1}, **own)

    def test_links(self) -> None:
        """Each use of a link is recorded, and so is a request for another email; no address is."""
        self.app.config.update(SMTP_URL="smtp://127.0.0.1:1", LINK_BASE_URL="https://app.example")
        body = {"email": "new@test.com", "current_password": "test"}
        token = self.pair["auth_token"]
        self.assertEqual(202, self.post("/auth/email", token, **body).status_code)
        self.assert_recorded(audit.Kind.EMAIL_CHANGE_REQUESTED, {})

        link = self.link(Purpose.VERIFY)
        self.assertEqual(200, self.post("/auth/verify", token=link).status_code)
        self.assert_recorded(audit.Kind.EMAIL_VERIFIED, {})

        link = self.link(Purpose.EMAIL, "new@test.com")
        self.assertEqual(200, self.post("/auth/email/confirm", token=link).status_code)
        self.assert_recorded(audit.Kind.USER_CHANGED, {"fields": "email"})

        link = self.link(Purpose.RESET)
        answer = self.post("/auth/password/reset", token=link, new_password=NEW)
        self.assertEqual(200, answer.status_code)
        self.assert_recorded(audit.Kind.PASSWORD_RESET, {"sessions": 1})
        self.assertNotIn("new@test.com", json.dumps(stored_events(), default=str))

    def link(self, purpose: Purpose, new_email: str | None = None) -> str:
        """Return the token of a link for the user, as an email has it."""
        user = links.user_by_id(self.user.id)
        assert user is not None  # noqa: S101  # for mypy
        return links.for_user(purpose, user, 60, new_email).url.partition("?token=")[2]

    def test_refused_links(self) -> None:
        """A link that is refused is no event: any client could fill the table."""
        before = stored_events()
        for path in ("/auth/verify", "/auth/email/confirm", "/auth/password/reset"):
            answer = self.post(path, token="forged", new_password=NEW)
            self.assertEqual(400, answer.status_code)

        self.assertEqual(before, stored_events())

    def test_invitation(self) -> None:
        """An invitation records the admin, and not whom they invited."""
        self.app.config.update(SMTP_URL="smtp://127.0.0.1:1", LINK_BASE_URL="https://app.example")
        db.session.execute(update(User).values(admin=True))
        db.session.commit()
        answer = self.post("/users/invitations", self.pair["auth_token"], email="new@test.com")

        self.assertEqual(202, answer.status_code)
        self.assert_recorded(audit.Kind.USER_INVITED, {}, user_id=None, actor_id=self.user.id)

    def test_unverified(self) -> None:
        """The login of a user who has not confirmed their email is recorded as refused."""
        self.app.config["EMAIL_VERIFICATION"] = "required"

        self.assertEqual(403, self.log_in().status_code)

        self.assert_recorded(audit.Kind.LOGIN_REFUSED, {"why": "email_unverified", "pause": 0})

    def test_every_kind_has_a_test(self) -> None:
        """Every kind of event is named in a test."""
        source = "".join(path.read_text() for path in Path(__file__).parent.parent.rglob("*.py"))
        for kind in audit.Kind:
            with self.subTest(kind):
                self.assertTrue(re.search(rf"Kind\.{kind.name}\b|\"{kind.value}\"", source))

    def test_secrets(self) -> None:
        """No event has a password, a hash, a token or the text typed as the email."""
        typed = "pass@word"
        self.log_in(WRONG)
        self.log_in(email=typed, password="whatever")
        self.post("/auth/register", username="new", email="new@test.com", password="third one")
        body = {"current_password": "test", "new_password": NEW}
        self.post("/auth/password", self.pair["auth_token"], **body)
        self.post("/auth/refresh", refresh_token=self.pair["refresh_token"])

        text = json.dumps(stored_events(), default=str)
        hashes = [user["password"] for user in stored_users()]
        tokens = [self.pair[name] for name in ("auth_token", "refresh_token")]
        for secret in (WRONG, NEW, typed, "whatever", "third one", *hashes, *tokens):
            self.assertNotIn(secret, text)


class TestSecondFactor(AuditTestCase):
    """Every step with an authenticator and with recovery codes is an event."""

    def setUp(self) -> None:
        """Log the user in, and begin to set an authenticator up."""
        super().setUp()
        self.move_clock(0)
        self.token = self.log_in().get_json()["auth_token"]
        self.own = {"session_id": stored_sessions()[0]["id"]}
        begun = self.post("/auth/totp", self.token, current_password="test").get_json()
        self.authenticator = pyotp.TOTP(begun["data"]["secret"])

    def next_code(self) -> str:
        """Move the clock to the next code of the authenticator, and return it."""
        self.move_clock(30)
        return self.authenticator.at(clock.utcnow())

    def enrol(self) -> list[str]:
        """Turn the authenticator on, and return the recovery codes."""
        answer = self.post("/auth/totp/confirm", self.token, code=self.next_code())
        self.assertEqual(200, answer.status_code)
        codes: list[str] = answer.get_json()["data"]["recovery_codes"]
        return codes

    def kinds(self, number: int) -> list[str]:
        """Return the kinds of the newest events."""
        return [event["kind"] for event in stored_events()[-number:]]

    def add_admin(self) -> tuple[int, str]:
        """Add an admin without an authenticator, and return their ID and their token."""
        admin = add_user("admin", "admin@test.com", "test", admin=True)
        return admin.id, start_session(admin).auth_token

    def test_started(self) -> None:
        """A user gets a secret, and another one."""
        self.assert_recorded(audit.Kind.TOTP_STARTED, {}, **self.own)
        self.post("/auth/totp", self.token, current_password="test")
        self.assertEqual(["totp_started", "totp_started"], self.kinds(2))

    def test_enabled(self) -> None:
        """The code that turns the authenticator on is recorded, and how many sessions that ended.

        They are not recorded one by one.
        """
        self.log_in()
        self.log_in()
        self.enrol()

        self.assert_recorded(audit.Kind.TOTP_ENABLED, {"sessions": 2}, **self.own)
        expected = ["logged_in", "logged_in", "code_given", "totp_enabled"]
        self.assertEqual(expected, self.kinds(4))

    def test_login(self) -> None:
        """A login with a code records how; one without a code, or with a wrong one, is refused."""
        recovery_code, *_ = self.enrol()
        refused = audit.Kind.LOGIN_REFUSED
        answer = self.log_in()
        self.assertEqual(401, answer.status_code)
        self.assert_recorded(refused, {"why": "mfa_required", "pause": 0})
        mfa_token = answer.get_json()["mfa_token"]

        wrong = {"why": "wrong_code", "pause": 0}
        self.assertEqual(400, self.log_in(code="A" * 24).status_code)
        self.assert_recorded(refused, wrong)
        answer = self.post("/auth/login/mfa", mfa_token=mfa_token, code="A" * 24)
        self.assertEqual(400, answer.status_code)
        self.assert_recorded(refused, wrong)

        answer = self.post("/auth/login/mfa", mfa_token=mfa_token, code=self.next_code())
        self.assertEqual(200, answer.status_code)
        about = {"session_id": session_of(answer.get_json()["auth_token"])}
        self.assert_recorded(audit.Kind.LOGGED_IN, {"amr": "pwd otp"}, **about)

        answer = self.log_in(code=recovery_code)
        about = {"session_id": session_of(answer.get_json()["auth_token"])}
        self.assert_recorded(audit.Kind.LOGGED_IN, {"amr": "pwd rc"}, **about)
        self.assertEqual(["recovery_code_used", "logged_in"], self.kinds(2))

    def test_forged_second_step(self) -> None:
        """A second step without a genuine token is no event: any client could fill the table."""
        self.enrol()
        before = stored_events()
        answer = self.post("/auth/login/mfa", mfa_token="forged", code=self.next_code())

        self.assertEqual(401, answer.status_code)
        self.assertEqual(before, stored_events())

    def test_pause(self) -> None:
        """The wrong code that begins a pause records its length; a code during it is no event."""
        self.enrol()
        self.app.config["RATE_LIMITS"] = True
        rate_limits.init_app(self.app)
        for pause in (0, 0, 0, 0, 60):
            self.assertEqual(400, self.log_in(code="A" * 24).status_code)
            details = {"why": "wrong_code", "pause": pause}
            self.assert_recorded(audit.Kind.LOGIN_REFUSED, details)
        before = stored_events()

        self.assertEqual(429, self.log_in(code=self.next_code()).status_code)

        self.assertEqual(before, stored_events())

    def test_code_given(self) -> None:
        """A code that a session gives for a change is recorded with its kind, before the change."""
        recovery_code, *_ = self.enrol()
        path = f"/users/{self.user.id}"
        for name, method, code in (("a", "otp", self.next_code()), ("b", "rc", recovery_code)):
            body = {"username": name, "current_password": "test", "code": code}
            answer = self.ask("PATCH", path, self.token, **body)
            self.assertEqual(200, answer.status_code)
            given, changed = stored_events()[-2:]
            expected = ("code_given", {"method": method}, self.own["session_id"])
            self.assertEqual(expected, (given["kind"], given["details"], given["session_id"]))
            self.assertEqual("user_changed", changed["kind"])
        expected_kinds = ["recovery_code_used", "code_given", "user_changed"]
        self.assertEqual(expected_kinds, self.kinds(3))

        self.ask("PATCH", path, self.token, username="c", current_password="test")
        self.assertEqual(["user_changed", "user_changed"], self.kinds(2))

    def test_recovery_code_used(self) -> None:
        """A recovery code that is used is recorded, and not which one."""
        code, *_ = self.enrol()
        self.log_in(code=code)

        used = stored_events()[-2]
        self.assertEqual(("recovery_code_used", {}), (used["kind"], used["details"]))
        self.assertEqual((self.user.id, "203.0.113.7"), (used["user_id"], used["ip"]))

    def test_recovery_codes_replaced(self) -> None:
        """New recovery codes are recorded."""
        self.enrol()
        answer = self.post("/auth/recovery_codes", self.token, current_password="test")

        self.assertEqual(200, answer.status_code)
        self.assert_recorded(audit.Kind.RECOVERY_CODES_REPLACED, {}, **self.own)

    def test_disabled(self) -> None:
        """An authenticator that the user turns off is recorded."""
        self.enrol()
        answer = self.ask("DELETE", "/auth/totp", self.token, current_password="test")

        self.assertEqual(200, answer.status_code)
        self.assert_recorded(audit.Kind.TOTP_DISABLED, {}, **self.own)

    def test_reset(self) -> None:
        """A reset says who did it: an admin, the operator, or the user who forgot the password."""
        self.enrol()
        admin_id, admin = self.add_admin()
        answer = self.ask("DELETE", f"/users/{self.user.id}/totp", admin)
        self.assertEqual(200, answer.status_code)
        details = {"why": "admin", "sessions": 1}
        self.assert_recorded(audit.Kind.TOTP_RESET, details, actor_id=admin_id)

        db.session.execute(update(User).values(mfa_enabled=True))
        db.session.commit()
        administration.reset_totp_of("test@test.com", audit.Origin(None, "manage.py"))
        db.session.commit()
        details = {"why": "operator", "sessions": 0}
        origin = {"ip": None, "user_agent": "manage.py", "request_id": None}
        self.assert_recorded(audit.Kind.TOTP_RESET, details, **origin)

    def test_reset_of_password(self) -> None:
        """A reset of the password records an authenticator that it has removed, and no other."""
        self.app.config.update(SMTP_URL="smtp://127.0.0.1:1", LINK_BASE_URL="https://app.example")
        self.enrol()
        self.reset_password()
        details = {"why": "password_reset", "sessions": 0}
        self.assert_recorded(audit.Kind.TOTP_RESET, details)

        self.reset_password()
        self.assertEqual(["password_reset", "totp_reset", "password_reset"], self.kinds(3))

    def reset_password(self) -> None:
        """Reset the password of the user with a link."""
        user: Any = links.user_by_id(self.user.id)
        link = links.for_user(Purpose.RESET, user, 60).url.partition("?token=")[2]
        answer = self.post("/auth/password/reset", token=link, new_password="test")
        self.assertEqual(200, answer.status_code)

    def test_refused(self) -> None:
        """A refused change of the second factor is recorded with its reason."""
        refused = audit.Kind.TOTP_REFUSED
        wrong_password = {"why": "wrong_password", "pause": 0}
        wrong_code = {"why": "wrong_code", "pause": 0}
        body = {"current_password": WRONG, "code": "A" * 24}
        self.post("/auth/totp", self.token, current_password=WRONG)
        self.assert_recorded(refused, wrong_password, **self.own)
        self.post("/auth/totp/confirm", self.token, code="A" * 24)
        self.assert_recorded(refused, wrong_code, **self.own)
        self.enrol()
        for method, path in (("POST", "/auth/recovery_codes"), ("DELETE", "/auth/totp")):
            with self.subTest(path):
                self.ask(method, path, self.token, **body)
                self.assert_recorded(refused, wrong_password, **self.own)
                self.ask(method, path, self.token, **body | {"current_password": "test"})
                self.assert_recorded(refused, wrong_code, **self.own)

        admin_id, admin = self.add_admin()
        answer = self.ask("DELETE", f"/users/{admin_id}/totp", self.token)
        self.assertEqual(403, answer.status_code)
        other = add_user("other", "other@test.com", "test")
        answer = self.ask("DELETE", f"/users/{other.id}/totp", admin)
        self.assertEqual(404, answer.status_code)
        about = {"user_id": other.id, "actor_id": admin_id}
        self.assert_recorded(refused, {"why": "totp_not_found"}, **about)

    def test_refused_changes(self) -> None:
        """A change of the account with a wrong code is recorded as refused."""
        self.enrol()
        body, code = {"current_password": "test"}, {"code": "A" * 24}
        path = f"/users/{self.user.id}"
        details = {"why": "wrong_code", "pause": 0}
        for method, route, kind, more in (
            ("POST", "/auth/password", audit.Kind.PASSWORD_CHANGE_REFUSED, {"new_password": NEW}),
            ("PATCH", path, audit.Kind.USER_CHANGE_REFUSED, {"username": "new"}),
            ("DELETE", "/auth/account", audit.Kind.DELETION_REFUSED, {}),
        ):
            with self.subTest(route):
                answer = self.ask(method, route, self.token, **body | code | more)
                self.assertEqual(400, answer.status_code)
                self.assert_recorded(kind, details, **self.own)

    def test_no_code_sent(self) -> None:
        """A change that is refused because there is no code is no event."""
        self.enrol()
        self.move_clock(300)
        before = stored_events()
        answer = self.ask("DELETE", "/auth/totp", self.token, current_password="test")

        self.assertEqual(403, answer.status_code)
        self.assertEqual(before, stored_events())

    def test_no_change_without_an_event(self) -> None:
        """Without its event no step changes anything, and no code is used up."""
        code = self.next_code()
        self.app.config["PROPAGATE_EXCEPTIONS"] = False
        before = self.everything()
        with mock.patch("project.accounts.audit.record", side_effect=RuntimeError):
            for answer in (
                self.post("/auth/totp", self.token, current_password="test"),
                self.post("/auth/totp/confirm", self.token, code=code),
                self.post("/auth/totp/confirm", self.token, code="A" * 24),
            ):
                self.assertEqual(500, answer.status_code)
        self.assertEqual(before, self.everything())

        recovery_code, *_ = self.enrol()
        body = {"current_password": "test", "code": self.next_code()}
        _, admin = self.add_admin()
        before = self.everything()
        with mock.patch("project.accounts.audit.record", side_effect=RuntimeError):
            for answer in (
                self.log_in(code=body["code"]),
                self.log_in(code=recovery_code),
                self.log_in(),
                self.post("/auth/recovery_codes", self.token, **body),
                self.ask("DELETE", "/auth/totp", self.token, **body),
                self.ask("DELETE", f"/users/{self.user.id}/totp", admin),
            ):
                self.assertEqual(500, answer.status_code)
        self.assertEqual(before, self.everything())

    def everything(self) -> list[list[dict[str, Any]]]:
        """Return the rows of all tables that a step changes."""
        tables = (totp_factors_table, recovery_codes_table)
        factors = [
            [row._asdict() for row in database.fetch_all(select(table).order_by(*table.c))]
            for table in tables
        ]
        return [stored_users(), stored_sessions(), stored_events(), *factors]


class TestAtomicity(AuditTestCase):
    """An event exists exactly when the change that it records was committed."""

    def test_no_change_without_an_event(self) -> None:
        """Without its event nothing changes, and no response tells if a password was right."""
        pair = self.log_in().get_json()
        before = stored_users(), stored_sessions(), stored_events()
        body = {"current_password": "test", "new_password": NEW}
        user = {"username": "new", "email": "new@test.com", "password": "new"}
        with mock.patch("project.accounts.audit.record", side_effect=RuntimeError):
            self.app.config["PROPAGATE_EXCEPTIONS"] = False
            for answer in (
                self.log_in(),
                self.log_in(WRONG),
                self.post("/auth/register", **user),
                self.post("/users", **user),
                self.post("/auth/logout", pair["auth_token"]),
                self.post("/auth/refresh", refresh_token=pair["refresh_token"]),
                self.post("/auth/password", pair["auth_token"], **body),
            ):
                self.assertEqual(500, answer.status_code)

        self.assertEqual(before, (stored_users(), stored_sessions(), stored_events()))

    def test_no_event_without_a_change(self) -> None:
        """A change that fails at its commit leaves no event and no log line."""

        def fail(_connection: object) -> None:
            raise RuntimeError

        event.listen(db.engine, "commit", fail)
        self.addCleanup(event.remove, db.engine, "commit", fail)
        self.app.config["PROPAGATE_EXCEPTIONS"] = False
        with mock.patch("project.accounts.audit.log") as log:
            self.assertEqual(500, self.log_in().status_code)

        self.assertEqual([], stored_events())
        self.assertEqual([], log.mock_calls)

    def test_log(self) -> None:
        """The log has a line for each event, with the same fields."""
        with mock.patch("project.accounts.audit.log") as log:
            self.log_in()
            self.log_in(WRONG)

        common = {
            "ip": "203.0.113.7",
            "user_agent": AGENT,
            "request_id": "req-1",
            "user_id": self.user.id,
        }
        session_id = stored_sessions()[0]["id"]
        self.assertEqual(
            [
                mock.call("logged_in", session_id=session_id, **common),
                mock.call("login_refused", why="wrong_password", pause=0, **common),
            ],
            log.info.mock_calls,
        )


class TestOrigin(AuditTestCase):
    """How far the address, user agent and request ID that a client sends are trusted and kept."""

    def test_request_id(self) -> None:
        """A valid request ID from a proxy is kept; otherwise the service makes a random one."""
        for sane in ("a", "6a7b-8c", "Root=1-67891233-abcdef012345678912345678", "x" * 64):
            with self.subTest(sane):
                self.post("/auth/login", request_id=sane, email="a@b", password="x")

                self.assertEqual(sane, stored_events()[-1]["request_id"])
        for odd in ("", " ", "x" * 65, "a b", "a\tb", '"', "\u00e9", "{}", "a;b", "\x1b[2J"):
            with self.subTest(odd):
                self.post("/auth/login", request_id=odd, email="a@b", password="x")

                self.assertRegex(stored_events()[-1]["request_id"], r"\A[0-9a-f]{32}\Z")
        made = [row["request_id"] for row in stored_events() if len(row["request_id"]) == 32]
        self.assertEqual(len(made), len(set(made)))

    def test_trace(self) -> None:
        """The trace of a request is stored with its event; the deletion of the user removes it."""
        trace = "0af7651916cd43dd8448eb211c80319c"
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        credentials = {"email": "test@test.com", "password": "test"}
        response = self.client.post("/auth/login", json=credentials, headers=headers)
        self.assertEqual(trace, stored_events()[-1]["trace_id"])
        token = response.get_json()["auth_token"]
        self.ask("DELETE", "/auth/account", token, current_password="test")

        self.assertEqual({None}, {event["trace_id"] for event in stored_events()})

    def test_tokens_in_the_wrong_place(self) -> None:
        """A token in a User-Agent header is not stored."""
        pair = self.log_in().get_json()
        for name in ("auth_token", "refresh_token"):
            headers = {"User-Agent": f"curl {pair[name]} x"}
            credentials = {"email": "test@test.com", "password": "test"}
            self.client.post("/auth/login", json=credentials, headers=headers)

            self.assertEqual("curl [secret] x", stored_events()[-1]["user_agent"])
            self.assertEqual("curl [secret] x", stored_sessions()[-1]["user_agent"])

    def test_user_agent(self) -> None:
        """A user agent is truncated, and its unprintable characters are replaced."""
        headers = {"User-Agent": "\u00e9\x1b[2J\x85\u00ad" + "x" * 1_000}
        credentials = {"email": "test@test.com", "password": "test"}
        self.client.post("/auth/login", json=credentials, headers=headers)

        kept = stored_events()[-1]["user_agent"]
        self.assertEqual(512, len(kept))
        self.assertTrue(kept.isprintable())
        self.assertRegex(kept, re.escape("[2J"))
