"""Sessions: what starts one, what is kept of it, who sees it, and every way in which it ends."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import jwt
from sqlalchemy import delete, insert
from werkzeug.test import TestResponse

from project import accounts, clock, db
from project.api.models import Session, User
from project.tests.base import BaseTestCase, bearer
from project.tests.test_tokens import decode
from project.tests.utils import ORIGIN, add_user, stored_sessions

INVALID = (401, "Invalid token. Please log in again.", "token_invalid")
ENDED = (401, "Invalid token. Please log in again.", "session_ended")
CONTACT_US = (401, "Something went wrong. Please contact us.", "account_inactive")
NOT_FOUND = (404, "Session does not exist.", "session_not_found")
INVALID_PAYLOAD = (400, "Invalid payload.", "invalid_payload")
CREDENTIALS = {"email": "test@test.com", "password": "test"}
DAY = 86_400  # seconds


def claims_of(token: str) -> dict[str, Any]:
    """Return the claims of a token."""
    claims: dict[str, Any] = decode(token.split(".")[1])
    return claims


def session_of(token: str) -> str:
    """Return the id of the session that a token belongs to."""
    return str(claims_of(token)["sid"])


class SessionsTestCase(BaseTestCase):
    """A test of two users who log in, while the clock stands still."""

    settings = {"TOKEN_EXPIRATION_SECONDS": 3_600}  # noqa: RUF012  # never changed

    def setUp(self) -> None:
        """Add the users, and stop the clock."""
        super().setUp()
        self.user = add_user("test", "test@test.com", "test")
        self.other = add_user("other", "other@test.com", "test")
        self.move_clock(0)

    def start(self, email: str = "test@test.com") -> str:
        """Return the auth token of a new session."""
        return str(self.login(email).get_json()["auth_token"])

    def start_from(self, **environ: object) -> dict[str, Any]:
        """Return the row of a new session that begins in this WSGI environment."""
        response = self.client.post("/auth/login", json=CREDENTIALS, environ_overrides=environ)
        self.assertEqual(200, response.status_code)
        return self.row(response.get_json()["auth_token"])

    def row(self, token: str) -> dict[str, Any]:
        """Return the stored session of a token."""
        return next(row for row in stored_sessions() if row["id"] == session_of(token))

    def forge(self, claims: Mapping[str, object], type_: str = "JWT") -> str:
        """Return a token with these claims, signed with the service's own key."""
        key = self.app.config["SECRET_KEY"]
        return jwt.encode(dict(claims), key, algorithm="HS256", headers={"typ": type_})

    def end(self, session_id: str, token: str) -> TestResponse:
        """Return the answer to a caller who ends one session."""
        return self.client.delete(f"/auth/sessions/{session_id}", headers=bearer(token))

    def set_active(self, active: bool) -> None:
        """Deactivate the user, or activate them again."""
        accounts.set_active("test@test.com", active, ORIGIN)
        db.session.commit()

    def listed(self, token: str) -> list[dict[str, Any]]:
        """Return the sessions that a caller is shown."""
        response = self.get("/auth/sessions", token)
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        shown: list[dict[str, Any]] = response.get_json()["data"]["sessions"]
        return shown

    def ids(self, token: str) -> set[str]:
        """Return the ids of the sessions that a caller is shown."""
        return {session["id"] for session in self.listed(token)}

    def assert_live(self, *tokens: str) -> None:
        """Check that each token tells who is calling."""
        for token in tokens:
            self.assertEqual(200, self.get("/auth/status", token).status_code)

    def assert_refused(self, token: str, refusal: tuple[int, str, str]) -> None:
        """Check that a token is refused wherever one is asked for, and does nothing."""
        before = stored_sessions()
        for method, path in (
            ("GET", "/auth/status"),
            ("GET", "/auth/logout"),
            ("POST", "/auth/logout?scope=all"),
            ("GET", "/auth/sessions"),
            ("DELETE", f"/auth/sessions/{'x' * 22}"),
            ("POST", "/auth/password"),
        ):
            with self.subTest(path, method=method):
                response = self.client.open(path, method=method, headers=bearer(token))
                self.assert_error(response, *refusal)
        self.assertEqual(before, stored_sessions())


class TestStart(SessionsTestCase):
    """What starts a session, and what is kept of it."""

    def test_login(self) -> None:
        """Each login starts a session of its own, and the token carries its id."""
        tokens = [self.start() for _ in range(3)]

        ids = {session_of(token) for token in tokens}
        self.assertEqual(3, len(ids))
        self.assertEqual(ids, {row["id"] for row in stored_sessions()})
        for session_id in ids:
            self.assertRegex(session_id, r"\A[A-Za-z0-9_-]{22}\Z")

    def test_registration(self) -> None:
        """A registration starts a session."""
        token = self.register("new", "new@test.com")

        user_id = self.get("/auth/status", token).get_json()["data"]["id"]
        stored = [(row["id"], row["user_id"]) for row in stored_sessions()]
        self.assertEqual([(session_of(token), user_id)], stored)

    def test_refusals(self) -> None:
        """Who doesn't log in or register, or is added by somebody else, gets no session."""
        new = {"username": "new", "email": "new@test.com", "password": "test"}
        self.login(password="wrong")
        self.client.post("/auth/register", json=CREDENTIALS | {"username": "x"})
        self.client.post("/users", json=new)
        self.set_active(False)
        self.login()

        self.assertEqual([], stored_sessions())

    def test_row(self) -> None:
        """A session's row says whose it is, since when, until when, and from where."""
        row = self.start_from(REMOTE_ADDR="2001:db8::7", HTTP_USER_AGENT="tests/1.0")

        now = clock.utcnow()
        self.assertEqual(
            {
                "user_id": self.user.id,
                "generation": 0,
                "created_at": now,
                "last_used_at": now,
                "expires_at": now + timedelta(days=30),
                "ip": "2001:db8::7",
                "user_agent": "tests/1.0",
            },
            {name: value for name, value in row.items() if name != "id"},
        )

    def test_no_token_is_stored(self) -> None:
        """Nothing that is stored is a token or a part of one, also after a refresh."""
        first = self.login().get_json()
        body = {"refresh_token": first["refresh_token"]}
        second = self.client.post("/auth/refresh", json=body).get_json()
        parts = [
            part
            for pair in (first, second)
            for name in ("auth_token", "refresh_token")
            for part in pair[name].split(".")
        ]

        self.assertEqual(12, len(parts))
        for name, value in stored_sessions()[0].items():
            for part in parts:
                self.assertNotIn(part, str(value), name)


class TestLogout(SessionsTestCase):
    """Logged out is logged out, at the next request."""

    def setUp(self) -> None:
        """Start three sessions of the user, and one of another."""
        super().setUp()
        self.one, self.two, self.three = (self.start() for _ in range(3))
        self.others = self.start("other@test.com")

    def log_out(self, token: str, query: str = "", method: str = "POST") -> TestResponse:
        """Return the answer to logging out."""
        return self.client.open(f"/auth/logout{query}", method=method, headers=bearer(token))

    def assert_left(self, *tokens: str) -> None:
        """Check that these tokens live, and that there are no other sessions."""
        self.assert_live(*tokens)
        self.assertEqual(
            {session_of(token) for token in tokens}, {row["id"] for row in stored_sessions()}
        )

    def test_this_session(self) -> None:
        """Logging out ends this session, by GET and by POST, and no other."""
        for method, token in {"GET": self.one, "POST": self.two}.items():
            with self.subTest(method):
                response = self.log_out(token, method=method)

                data = {"status": "success", "message": "Successfully logged out."}
                self.assertEqual((200, data), (response.status_code, response.get_json()))
                self.assert_refused(token, ENDED)
        self.assert_left(self.three, self.others)

    def test_refresh_token(self) -> None:
        """The refresh token goes with the session."""
        pair = self.login().get_json()
        self.log_out(pair["auth_token"])

        body = {"refresh_token": pair["refresh_token"]}
        self.assert_error(self.client.post("/auth/refresh", json=body), *ENDED)

    def test_others(self) -> None:
        """?scope=others ends the user's other sessions, and keeps this one."""
        self.assertEqual(200, self.log_out(self.two, "?scope=others").status_code)

        self.assert_refused(self.one, ENDED)
        self.assert_refused(self.three, ENDED)
        self.assert_left(self.two, self.others)

    def test_all(self) -> None:
        """?scope=all ends every session of the user, and nobody else's."""
        self.assertEqual(200, self.log_out(self.two, "?scope=all", "GET").status_code)

        for token in (self.one, self.two, self.three):
            self.assert_refused(token, ENDED)
        self.assert_left(self.others)

    def test_other_scopes(self) -> None:
        """Any other scope is refused and named, and ends nothing."""
        for scope in ("", "this", "OTHERS", "All", "all%20", "others,all", "%00", "null", "1"):
            for method in ("GET", "POST"):
                with self.subTest(scope, method=method):
                    response = self.log_out(self.one, f"?scope={scope}", method)

                    data = self.assert_error(response, *INVALID_PAYLOAD)
                    self.assertEqual(["scope"], list(data["errors"]))
        self.assert_left(self.one, self.two, self.three, self.others)


class TestList(SessionsTestCase):
    """A user sees their live sessions."""

    def test_shape(self) -> None:
        """A session is shown with its times and its device, and no more of it."""
        row = self.start_from(REMOTE_ADDR="192.0.2.7", HTTP_USER_AGENT="tests/1.0")
        self.move_clock(60)

        response = self.get("/auth/sessions", self.start())

        del row["user_id"], row["generation"]
        for name in ("created_at", "last_used_at", "expires_at"):
            row[name] = row[name].strftime("%Y-%m-%dT%H:%M:%SZ")
        data = response.get_json()
        self.assertEqual(200, response.status_code)
        self.assertEqual(row | {"current": False}, data["data"]["sessions"].pop())
        data["data"]["sessions"].clear()
        self.assertEqual({"status": "success", "data": {"sessions": []}}, data)

    def test_order(self) -> None:
        """The last to log in comes first, and the calling one is marked, wherever it stands."""
        oldest = self.login().get_json()
        tokens: list[str] = [oldest["auth_token"]]
        for _ in range(3):
            self.move_clock(1)
            tokens.insert(0, self.start())
        self.client.post("/auth/refresh", json={"refresh_token": oldest["refresh_token"]})
        for current in tokens:
            expected = [(session_of(token), token == current) for token in tokens]

            actual = [(session["id"], session["current"]) for session in self.listed(current)]

            self.assertEqual(expected, actual)

    def test_only_own_and_live(self) -> None:
        """Sessions of others, ended and expired ones are not in the list."""
        self.start("other@test.com")
        old, ended = self.start(), self.start()
        self.get("/auth/logout", ended)
        self.app.config["REFRESH_EXPIRATION_SECONDS"] = 40 * DAY
        token = self.start()
        self.assertEqual({session_of(old), session_of(token)}, self.ids(token))

        self.move_clock(30 * DAY)

        longer = self.forge(claims_of(token) | {"exp": claims_of(token)["exp"] + 30 * DAY})
        self.assertEqual(3, len(stored_sessions()))
        self.assertEqual({session_of(token)}, self.ids(longer))

    def test_at_most_a_thousand(self) -> None:
        """A list has an end: the newest thousand."""
        row = self.row(self.start())
        rows = [row | {"id": f"{number:022}"} for number in range(1_000)]
        db.session.execute(insert(Session), rows)
        db.session.commit()
        self.move_clock(1)

        listed = self.listed(self.start())

        self.assertEqual((1_000, True), (len(listed), listed[0]["current"]))
        known = [session["id"] for session in listed if session["id"].isdigit()]
        self.assertEqual(sorted(known, reverse=True), known)


class TestEnd(SessionsTestCase):
    """A user ends one of their sessions."""

    def test_own(self) -> None:
        """An own session is ended at once, only that one, and only once."""
        token, lost, third = self.start(), self.start(), self.start()

        response = self.end(session_of(lost), token)

        data = {"status": "success", "message": "Session ended."}
        self.assertEqual((200, data), (response.status_code, response.get_json()))
        self.assert_refused(lost, ENDED)
        self.assertEqual({session_of(token), session_of(third)}, self.ids(token))
        self.assert_error(self.end(session_of(lost), token), *NOT_FOUND)

    def test_current(self) -> None:
        """The calling session can be ended too."""
        token = self.start()

        self.assertEqual(200, self.end(session_of(token), token).status_code)
        self.assert_refused(token, ENDED)

    def test_others(self) -> None:
        """Somebody else's session doesn't exist for the caller, and lives on."""
        token, others = self.start(), self.start("other@test.com")

        self.assert_error(self.end(session_of(others), token), *NOT_FOUND)
        self.assert_live(others)

    def test_expired(self) -> None:
        """A session whose time is over doesn't exist any more, though its row may."""
        old = session_of(self.start())
        self.move_clock(30 * DAY - 1)
        token = self.start()
        self.move_clock(1)

        self.assert_error(self.end(old, token), *NOT_FOUND)
        self.assertEqual(2, len(stored_sessions()))


class TestUsers(SessionsTestCase):
    """What happens to a user happens to their sessions."""

    def test_deactivated(self) -> None:
        """Whoever is deactivated is told so with each of their tokens, and has no session left."""
        tokens, others = [self.start(), self.start()], self.start("other@test.com")

        self.set_active(False)

        for token in tokens:
            self.assert_refused(token, CONTACT_US)
        self.assert_live(others)
        self.assertEqual([session_of(others)], [row["id"] for row in stored_sessions()])

    def test_reactivated(self) -> None:
        """What was ended stays ended when its user is activated again."""
        token = self.start()

        self.set_active(False)
        self.set_active(True)

        self.assert_refused(token, ENDED)
        self.assert_live(self.start())

    def test_deleted(self) -> None:
        """The sessions of a user who is deleted go with them, and nobody inherits their tokens."""
        token = self.register("gone", "gone@test.com")

        db.session.execute(delete(User).where(User.email == "gone@test.com"))
        db.session.commit()

        self.assertEqual([], stored_sessions())
        self.assert_refused(token, CONTACT_US)
        self.register("gone", "gone@test.com")
        self.assertEqual(401, self.get("/auth/status", token).status_code)

    def test_expired_at_login(self) -> None:
        """At a login the user's sessions whose time is over go, and nobody else's."""
        old, _, others = self.start(), self.start(), self.start("other@test.com")
        self.move_clock(30 * DAY - 1)
        living = self.start()
        self.move_clock(1)
        self.login(password="wrong")
        self.assertEqual(4, len(stored_sessions()))

        left = {session_of(token) for token in (others, living, self.start())}

        self.assertEqual(left, {row["id"] for row in stored_sessions()})
        self.assertNotIn(session_of(old), left)
