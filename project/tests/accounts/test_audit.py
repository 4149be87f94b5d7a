"""The audit log: which events it has, what they contain, and that they are recorded atomically."""

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from sqlalchemy import event, update
from werkzeug.test import TestResponse

from project import clock, db
from project.accounts import administration, audit, links, rate_limits
from project.models import User
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import ORIGIN, add_user, stored_events, stored_sessions, stored_users
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

    def post(
        self, path: str, token: str | None = None, /, request_id: str = "req-1", **body: Any
    ) -> TestResponse:
        """Return the response to a POST."""
        headers = {"User-Agent": AGENT, "X-Request-ID": request_id}
        headers |= bearer(token) if token else {}
        origin = {"REMOTE_ADDR": "203.0.113.7"}
        return self.client.post(path, json=body, headers=headers, environ_base=origin)

    def log_in(self, password: str = "test", email: str = "test@test.com") -> TestResponse:
        """Return the response to a login."""
        return self.post("/auth/login", email=email, password=password)

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
