"""Sessions: how they start, what is stored, how they are listed, and how they end."""

from datetime import timedelta
from urllib.parse import quote

from sqlalchemy import delete, insert
from werkzeug.test import TestResponse

from project import clock, db, errors
from project.models import Session, User
from project.tests.accounts.cases import CREDENTIALS, DAY, SessionsTestCase
from project.tests.base import bearer
from project.tests.rows import stored_sessions
from project.tests.tokens.claims import claims_of, session_of


class TestStart(SessionsTestCase):
    """What starts a session, and what is stored of it."""

    def test_login(self) -> None:
        """Each login starts a session, and the token carries its ID."""
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
        """A refused login or registration, and adding a user, start no session."""
        new = {"username": "new", "email": "new@test.com", "password": "test"}
        self.login(password="wrong")
        self.client.post("/auth/register", json=CREDENTIALS | {"username": "x"})
        self.client.post("/users", json=new)
        self.set_active(False)
        self.login()

        self.assertEqual([], stored_sessions())

    def test_row(self) -> None:
        """A session's row has its user, its times, and where and how it was started."""
        row = self.start_from(REMOTE_ADDR="2001:db8::7", HTTP_USER_AGENT="tests/1.0")

        now = clock.utcnow()
        self.assertEqual(
            {
                "user_id": self.user.id,
                "generation": 0,
                "created_at": now,
                "last_used_at": now,
                "expires_at": now + timedelta(days=30),
                "token_expires_at": now + timedelta(seconds=3_600),
                "ip": "2001:db8::7",
                "user_agent": "tests/1.0",
                "amr": ["pwd"],
                "code_given_at": None,
            },
            {name: value for name, value in row.items() if name != "id"},
        )

    def test_no_token_is_stored(self) -> None:
        """No column has a token or a part of one, after a login or a refresh."""
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
    """A logout takes effect at the next request."""

    def setUp(self) -> None:
        """Start three sessions of the user, and one of another user."""
        super().setUp()
        self.one, self.two, self.three = (self.start() for _ in range(3))
        self.others = self.start("other@test.com")

    def log_out(self, token: str, query: str = "", method: str = "POST") -> TestResponse:
        """Return the response to a logout."""
        return self.client.open(f"/auth/logout{query}", method=method, headers=bearer(token))

    def assert_left(self, *tokens: str) -> None:
        """Check that these tokens live, and that there are no other sessions."""
        self.assert_live(*tokens)
        self.assertEqual(
            {session_of(token) for token in tokens}, {row["id"] for row in stored_sessions()}
        )

    def test_this_session(self) -> None:
        """A logout by GET or POST ends this session and no other."""
        for method, token in {"GET": self.one, "POST": self.two}.items():
            with self.subTest(method):
                response = self.log_out(token, method=method)

                data = {"status": "success", "message": "Successfully logged out."}
                self.assertEqual((200, data), (response.status_code, response.get_json()))
                self.assert_refused(token, errors.SessionEnded)
        self.assert_left(self.three, self.others)

    def test_refresh_token(self) -> None:
        """The refresh token ends with the session."""
        pair = self.login().get_json()
        self.log_out(pair["auth_token"])

        body = {"refresh_token": pair["refresh_token"]}
        self.assert_error(self.client.post("/auth/refresh", json=body), errors.SessionEnded)

    def test_others(self) -> None:
        """?scope=others ends the user's other sessions and keeps this one."""
        self.assertEqual(200, self.log_out(self.two, "?scope=others").status_code)

        self.assert_refused(self.one, errors.SessionEnded)
        self.assert_refused(self.three, errors.SessionEnded)
        self.assert_left(self.two, self.others)

    def test_all(self) -> None:
        """?scope=all ends every session of the user, and none of other users."""
        self.assertEqual(200, self.log_out(self.two, "?scope=all", "GET").status_code)

        for token in (self.one, self.two, self.three):
            self.assert_refused(token, errors.SessionEnded)
        self.assert_left(self.others)

    def test_other_scopes(self) -> None:
        """Any other scope is refused by name and ends nothing."""
        for scope in ("", "this", "OTHERS", "All", "all%20", "others,all", "%00", "null", "1"):
            for method in ("GET", "POST"):
                with self.subTest(scope, method=method):
                    response = self.log_out(self.one, f"?scope={scope}", method)

                    data = self.assert_error(response, errors.InvalidPayload)
                    self.assertEqual(["scope"], list(data["errors"]))
        self.assert_left(self.one, self.two, self.three, self.others)


class TestList(SessionsTestCase):
    """A user lists their live sessions."""

    def test_shape(self) -> None:
        """A session is shown with its times, its device and how the user logged in only."""
        row = self.start_from(REMOTE_ADDR="192.0.2.7", HTTP_USER_AGENT="tests/1.0")
        self.move_clock(60)

        response = self.get("/auth/sessions", self.start())

        del row["user_id"], row["generation"], row["token_expires_at"], row["code_given_at"]
        for name in ("created_at", "last_used_at", "expires_at"):
            row[name] = row[name].strftime("%Y-%m-%dT%H:%M:%SZ")
        data = response.get_json()
        self.assertEqual(200, response.status_code)
        self.assertEqual(row | {"current": False}, data["data"]["sessions"].pop())
        data["data"]["sessions"].clear()
        self.assertEqual({"status": "success", "data": {"sessions": []}}, data)

    def test_order(self) -> None:
        """The newest login comes first, and the caller's session is marked."""
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
        """Sessions of others and sessions that ended or expired are not listed."""
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
        """At most the newest thousand sessions are listed."""
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
        """A session ends at once; no other does, and it can't be ended twice."""
        token, lost, third = self.start(), self.start(), self.start()

        response = self.end(session_of(lost), token)

        data = {"status": "success", "message": "Session ended."}
        self.assertEqual((200, data), (response.status_code, response.get_json()))
        self.assert_refused(lost, errors.SessionEnded)
        self.assertEqual({session_of(token), session_of(third)}, self.ids(token))
        self.assert_error(self.end(session_of(lost), token), errors.SessionNotFound)

    def test_current(self) -> None:
        """The caller may end their current session."""
        token = self.start()

        self.assertEqual(200, self.end(session_of(token), token).status_code)
        self.assert_refused(token, errors.SessionEnded)

    def test_others(self) -> None:
        """Another user's session is a 404 and lives on."""
        token, others = self.start(), self.start("other@test.com")

        self.assert_error(self.end(session_of(others), token), errors.SessionNotFound)
        self.assert_live(others)

    def test_expired(self) -> None:
        """An expired session is a 404, even while its row is still there."""
        old = session_of(self.start())
        self.move_clock(30 * DAY - 1)
        token = self.start()
        self.move_clock(1)

        self.assert_error(self.end(old, token), errors.SessionNotFound)
        self.assertEqual(2, len(stored_sessions()))


class TestUsers(SessionsTestCase):
    """How changes of a user affect their sessions."""

    def test_deactivated(self) -> None:
        """A deactivated user has no session left, and each token is refused as inactive."""
        tokens, others = [self.start(), self.start()], self.start("other@test.com")

        self.set_active(False)

        for token in tokens:
            self.assert_refused(token, errors.AccountInactive)
        self.assert_live(others)
        self.assertEqual([session_of(others)], [row["id"] for row in stored_sessions()])

    def test_reactivated(self) -> None:
        """Sessions that ended stay ended when their user is activated again."""
        token = self.start()

        self.set_active(False)
        self.set_active(True)

        self.assert_refused(token, errors.SessionEnded)
        self.assert_live(self.start())

    def test_deleted(self) -> None:
        """A deleted user's sessions are deleted, and a new user does not inherit the tokens."""
        token = self.register("gone", "gone@test.com")

        db.session.execute(delete(User).where(User.email == "gone@test.com"))
        db.session.commit()

        self.assertEqual([], stored_sessions())
        self.assert_refused(token, errors.AccountInactive)
        self.register("gone", "gone@test.com")
        self.assertEqual(401, self.get("/auth/status", token).status_code)

    def test_expired_at_login(self) -> None:
        """A login deletes the user's expired sessions, and none of other users."""
        old, _, others = self.start(), self.start(), self.start("other@test.com")
        self.move_clock(30 * DAY - 1)
        living = self.start()
        self.move_clock(1)
        self.login(password="wrong")
        self.assertEqual(4, len(stored_sessions()))

        left = {session_of(token) for token in (others, living, self.start())}

        self.assertEqual(left, {row["id"] for row in stored_sessions()})
        self.assertNotIn(session_of(old), left)


class TestSessionsOfTokens(SessionsTestCase):
    """A token is valid while its session lives, and only for that session's user."""

    def test_genuine(self) -> None:
        """A token made by hand like a genuine one is accepted: forgeries differ in one thing."""
        self.assert_live(self.forge(claims_of(self.start())))

    def test_no_session(self) -> None:
        """A signed token without a session is refused."""
        claims = claims_of(self.start())
        del claims["sid"]

        self.assert_refused(self.forge(claims), errors.TokenInvalid)
        self.assert_refused(self.user.encode_auth_token(self.user.id), errors.TokenInvalid)

    def test_malformed_session(self) -> None:
        """A signed token whose sid can't be a session's ID is refused as invalid."""
        claims = claims_of(self.start())
        good = claims["sid"]
        texts = ["", good[:-1], f"{good}A", f"{good}\n", f" {good}", f"{good[:-1]}\0", "é" * 22]
        texts += [f"{good[:-1]}{end}" for end in "+/=. %'"]
        for sid in [*texts, None, True, 1, 10**21, [good], {"id": good}, "x" * 2_000]:
            with self.subTest(sid=sid):
                self.assert_refused(self.forge(claims | {"sid": sid}), errors.TokenInvalid)

    def test_ended_session(self) -> None:
        """A signed token of a session that does not exist is refused as ended."""
        claims = claims_of(self.start())

        self.assert_refused(self.forge(claims | {"sid": "x" * 22}), errors.SessionEnded)
        self.assert_refused(
            self.forge(claims | {"sid": claims["sid"].swapcase()}), errors.SessionEnded
        )

    def test_session_of_another(self) -> None:
        """A session is valid for its own user only."""
        claims, others = claims_of(self.start()), claims_of(self.start("other@test.com"))

        self.assert_refused(self.forge(claims | {"sid": others["sid"]}), errors.SessionEnded)
        self.assert_refused(self.forge(others | {"sid": claims["sid"]}), errors.SessionEnded)

    def test_expired_session(self) -> None:
        """A session expires exactly when its row says, even when the token's exp is later."""
        claims = claims_of(self.start())
        token = self.forge(claims | {"exp": claims["exp"] + 99 * DAY})

        self.move_clock(30 * DAY - 0.000001)
        self.assert_live(token)

        self.move_clock(0.000001)
        self.assert_refused(token, errors.SessionEnded)

    def test_appended_characters(self) -> None:
        """Characters appended to a token make it invalid, before and after the session ends."""
        token = self.start()
        for session in ("live", "ended"):
            for appended in ("A", "AA", "=", "==", ".", ".e30", "~"):
                with self.subTest(appended, session=session):
                    self.assert_refused(token + appended, errors.TokenInvalid)
            self.get("/auth/logout", token)
        self.assert_refused(token, errors.SessionEnded)


class TestDevices(SessionsTestCase):
    """How much is stored of what a client says about its device."""

    def test_user_agent(self) -> None:
        """A user agent is stored with at most 512 characters and no control character."""
        for sent, kept in {
            "x" * 512: "x" * 512,
            "x" * 513: "x" * 512,
            "é" * 30_000: "é" * 512,
            "a\0b\x1b[31m\r\nc\t\x7f\x85": "a?b?[31m??c???",
            "": "",
        }.items():
            with self.subTest(sent[:20], length=len(sent)):
                self.assertEqual(kept, self.start_from(HTTP_USER_AGENT=sent)["user_agent"])

    def test_ip(self) -> None:
        """An address is stored in one spelling; text that is no address is not stored."""
        self.assertEqual("2001:db8::7", self.start_from(REMOTE_ADDR="2001:DB8:0::07")["ip"])
        for none in ("", "f" * 65, "unix:", "fe80::1%zone"):
            with self.subTest(none):
                self.assertIsNone(self.start_from(REMOTE_ADDR=none)["ip"])


class TestSessionIds(SessionsTestCase):
    """A session's ID in a path has exactly one spelling."""

    def test_invalid(self) -> None:
        """Any other text is a session that does not exist."""
        token = self.start()
        own = session_of(token)
        around = [f" {own}", f"{own} ", f"{own}\n", f"{own}\0", f"{own}A", own[:-1], own[1:]]
        words = ["blah", "null", "current", "all", "*", "%", "1", "é" * 22, "x" * 5_000]
        quoted = map(quote, [*around, *words, own.swapcase(), "x" * 22, "+" * 22])
        for path in [*quoted, "%00", "%00" * 22, f"{own[:-1]}%00", "%ff" * 22]:
            with self.subTest(path[:50]):
                self.assert_error(self.end(path, token), errors.SessionNotFound)
        self.assert_live(token)
