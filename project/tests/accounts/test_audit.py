"""The audit trail: what is in it, who may read it, and that it is as true as what it tells of."""

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from sqlalchemy import event, update
from werkzeug.test import TestResponse

from project import accounts, audit, clock, db, ratelimit
from project.api.models import User
from project.tests.base import BaseTestCase, bearer
from project.tests.utils import ORIGIN, add_user, stored_events, stored_sessions, stored_users

AGENT = "Mozilla/5.0 (X11; Linux x86_64)"
WRONG = "a wrong one"
NEW = "another one"


class AuditTestCase(BaseTestCase):
    """A test of what a client did, from an address and with a name and an id of its own."""

    settings = {"TOKEN_EXPIRATION_SECONDS": 3_600}  # noqa: RUF012  # never changed
    user: User

    def setUp(self) -> None:
        """Add a user."""
        super().setUp()
        self.user = add_user("test", "test@test.com", "test")

    def post(
        self, path: str, token: str | None = None, request_id: str = "req-1", **body: Any
    ) -> TestResponse:
        """Return the answer to a POST."""
        headers = {"User-Agent": AGENT, "X-Request-ID": request_id}
        headers |= bearer(token) if token else {}
        origin = {"REMOTE_ADDR": "203.0.113.7"}
        return self.client.post(path, json=body, headers=headers, environ_base=origin)

    def log_in(self, password: str = "test", email: str = "test@test.com") -> TestResponse:
        """Return the answer to a login."""
        return self.post("/auth/login", email=email, password=password)

    def assert_recorded(self, kind: audit.Kind, details: dict[str, Any], **columns: Any) -> None:
        """Check the newest event: who it is about, what it says, and where it came from."""
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


class TestWhatIsRecorded(AuditTestCase):
    """Every act, and every refusal that has to do with somebody's account."""

    def setUp(self) -> None:
        """Log the user in."""
        super().setUp()
        self.pair = self.log_in().get_json()
        self.session_id = stored_sessions()[0]["id"]

    def test_registered(self) -> None:
        """A registration is one event, with the session that it began."""
        answer = self.post("/auth/register", username="new", email="new@test.com", password="new")

        self.assertEqual(201, answer.status_code)
        new, session = stored_users()[-1], stored_sessions()[-1]
        own = {"user_id": new["id"], "session_id": session["id"]}
        self.assert_recorded(audit.Kind.REGISTERED, {}, **own)

    def test_registration_refused(self) -> None:
        """What was taken is told, and not by whom."""
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
        """Who was added is told, and by whom when they said who they are."""
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

    def test_login(self) -> None:
        """A login is told, and why one was refused."""
        self.assert_recorded(audit.Kind.LOGGED_IN, {}, session_id=self.session_id)
        refused = audit.Kind.LOGIN_REFUSED

        self.assertEqual(404, self.log_in(WRONG).status_code)
        self.assert_recorded(refused, {"why": "wrong_password", "pause": 0})

        self.assertEqual(404, self.log_in("x" * 2_000).status_code)
        self.assert_recorded(refused, {"why": "wrong_password", "pause": 0})

        self.assertEqual(404, self.log_in(email="nobody@test.com").status_code)
        self.assert_recorded(refused, {"why": "unknown_email", "pause": 0}, user_id=None)

        accounts.set_active("test@test.com", False, ORIGIN)
        db.session.commit()
        self.assertEqual(401, self.log_in().status_code)
        self.assert_recorded(refused, {"why": "account_inactive", "pause": 0})

    def test_pause(self) -> None:
        """The failure that begins a pause says so; who comes during it writes no more events."""
        self.app.config.update(RATE_LIMITS=True, LOGIN_FAILURES_PER_ACCOUNT=2)
        ratelimit.init_app(self.app)
        for pause in (0, 60):
            self.assertEqual(404, self.log_in(WRONG).status_code)
            details = {"why": "wrong_password", "pause": pause}
            self.assert_recorded(audit.Kind.LOGIN_REFUSED, details)
        before = stored_events()

        self.assertEqual(429, self.log_in(WRONG).status_code)

        self.assertEqual(before, stored_events())

    def test_refresh(self) -> None:
        """A refresh is told, one more from elsewhere too, and a refusal with its reason."""
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

        self.move_clock(11)
        self.assertEqual(401, self.post("/auth/refresh", refresh_token=token).status_code)
        self.assert_recorded(audit.Kind.REFRESH_REUSED, {}, **about)

        self.assertEqual(401, self.post("/auth/refresh", refresh_token=token).status_code)
        self.assert_recorded(audit.Kind.REFRESH_REFUSED, {"why": "session_ended"}, **about)

        accounts.set_active("test@test.com", False, ORIGIN)
        db.session.commit()
        self.assertEqual(401, self.post("/auth/refresh", refresh_token=token).status_code)
        self.assert_recorded(audit.Kind.REFRESH_REFUSED, {"why": "account_inactive"}, **about)

        db.session.execute(db.delete(User))
        db.session.commit()
        self.assertEqual(401, self.post("/auth/refresh", refresh_token=token).status_code)
        details = {"why": "account_inactive"}
        self.assert_recorded(audit.Kind.REFRESH_REFUSED, details, user_id=None)

    def test_log_out(self) -> None:
        """A logout says how far it went."""
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
        """The session that was ended is named; what was no session is no event."""
        headers = bearer(self.pair["auth_token"]) | {"User-Agent": AGENT, "X-Request-ID": "req-1"}
        where = {"headers": headers, "environ_base": {"REMOTE_ADDR": "203.0.113.7"}}
        before = stored_events()
        self.assertEqual(404, self.client.delete("/auth/sessions/no", **where).status_code)
        self.assertEqual(before, stored_events())

        path = f"/auth/sessions/{self.session_id}"
        self.assertEqual(200, self.client.delete(path, **where).status_code)
        self.assert_recorded(audit.Kind.SESSION_ENDED, {}, session_id=self.session_id)

    def test_password(self) -> None:
        """A change is told with the sessions that it ended, and so is a wrong current password."""
        self.log_in()
        token, own = self.pair["auth_token"], {"session_id": self.session_id}
        body = {"current_password": WRONG, "new_password": NEW}
        self.assertEqual(400, self.post("/auth/password", token, **body).status_code)
        details = {"why": "wrong_password", "pause": 0}
        self.assert_recorded(audit.Kind.PASSWORD_CHANGE_REFUSED, details, **own)

        body["current_password"] = "test"
        self.assertEqual(200, self.post("/auth/password", token, **body).status_code)
        self.assert_recorded(audit.Kind.PASSWORD_CHANGED, {"sessions": 1}, **own)

    def test_every_kind_has_a_test(self) -> None:
        """A kind that is added is named in a test."""
        source = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
        for kind in audit.Kind:
            with self.subTest(kind):
                self.assertTrue(re.search(rf"Kind\.{kind.name}\b|\"{kind.value}\"", source))

    def test_secrets(self) -> None:
        """No password, hash or token, nor what was typed into the field for the email, is there."""
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


class TestTruth(AuditTestCase):
    """An event is there exactly when what it tells of has happened."""

    def test_no_act_without_an_event(self) -> None:
        """What cannot be recorded does not happen, nor is anybody told whether they were right."""
        pair = self.log_in().get_json()
        before = stored_users(), stored_sessions(), stored_events()
        body = {"current_password": "test", "new_password": NEW}
        user = {"username": "new", "email": "new@test.com", "password": "new"}
        with mock.patch("project.audit.insert", side_effect=RuntimeError):
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

    def test_no_event_without_an_act(self) -> None:
        """What fails at its commit has left no event, and no line in the log."""

        def fail(_connection: object) -> None:
            raise RuntimeError

        event.listen(db.engine, "commit", fail)
        self.addCleanup(event.remove, db.engine, "commit", fail)
        self.app.config["PROPAGATE_EXCEPTIONS"] = False
        with mock.patch("project.audit.log") as log:
            self.assertEqual(500, self.log_in().status_code)

        self.assertEqual([], stored_events())
        self.assertEqual([], log.mock_calls)

    def test_log(self) -> None:
        """The log has a line for each event, with what the event has."""
        with mock.patch("project.audit.log") as log:
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
    """Of what a client says of itself only so much is believed and kept."""

    def test_request_id(self) -> None:
        """An id that a proxy gave is kept when it is sane; otherwise there is a random one."""
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
        """A token that a client calls itself by is not kept."""
        pair = self.log_in().get_json()
        for name in ("auth_token", "refresh_token"):
            headers = {"User-Agent": f"curl {pair[name]} x"}
            credentials = {"email": "test@test.com", "password": "test"}
            self.client.post("/auth/login", json=credentials, headers=headers)

            self.assertEqual("curl [secret] x", stored_events()[-1]["user_agent"])
            self.assertEqual("curl [secret] x", stored_sessions()[-1]["user_agent"])

    def test_user_agent(self) -> None:
        """A user agent is cut, and what cannot be printed in it is replaced."""
        headers = {"User-Agent": "\u00e9\x1b[2J\x85\u00ad" + "x" * 1_000}
        credentials = {"email": "test@test.com", "password": "test"}
        self.client.post("/auth/login", json=credentials, headers=headers)

        kept = stored_events()[-1]["user_agent"]
        self.assertEqual(512, len(kept))
        self.assertTrue(kept.isprintable())
        self.assertRegex(kept, re.escape("[2J"))
