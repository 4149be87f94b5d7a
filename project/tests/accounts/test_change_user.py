"""Users are changed: by an admin, or by themselves, who then give their password."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

from sqlalchemy import delete, update
from werkzeug.test import TestResponse

from project import bcrypt, db, passwords, ratelimit
from project.api.models import User
from project.tests.base import BaseTestCase, bearer
from project.tests.utils import (
    add_user,
    start_session,
    stored_events,
    stored_sessions,
    stored_users,
)

INVALID_PAYLOAD = (400, "Invalid payload.", "invalid_payload", "fail")
EMAIL_TAKEN = (400, "Sorry. That email already exists.", "email_exists", "fail")
WRONG_PASSWORD = (400, "Current password is wrong.", "wrong_password", "fail")
FORBIDDEN = (403, "You do not have permission to do that.", "permission_denied")
MISSING = (401, "Provide a valid auth token.", "token_missing")
INACTIVE = (401, "Something went wrong. Please contact us.", "account_inactive")
ENDED = (401, "Invalid token. Please log in again.", "session_ended")
UNKNOWN = (404, "User does not exist", "user_not_found", "fail")
NO_LOGIN = (404, "User does not exist.", "invalid_credentials")
TOO_MANY = (429, "Too many attempts. Please try again later.", "too_many_attempts")
BUSY = (503, "The service is busy. Please try again.", "busy")


class CareTestCase(BaseTestCase):
    """A test with two users and an admin, each of whom is logged in."""

    settings: ClassVar[dict[str, Any]] = {"TOKEN_EXPIRATION_SECONDS": 3_600}

    def setUp(self) -> None:
        """Add them, and log them in."""
        super().setUp()
        self.ids: dict[str, int] = {}
        self.tokens: dict[str, str] = {}
        for name in ("ada", "bob", "admin"):
            self.add(name, admin=name == "admin")

    def add(self, name: str, **columns: Any) -> None:
        """Add somebody, and log them in."""
        user = add_user(name, f"{name}@test.com", "test", **columns)
        self.ids[name], self.tokens[name] = user.id, start_session(user).auth_token

    def patch(self, name: str, caller: str = "admin", /, **body: Any) -> TestResponse:
        """Return the answer to a caller who changes somebody."""
        path, headers = f"/users/{self.ids[name]}", bearer(self.tokens[caller])
        return self.app.test_client().patch(path, json=body, headers=headers)

    def change_self(self, name: str = "ada", /, **body: Any) -> TestResponse:
        """Return the answer to somebody who changes themselves and knows their password."""
        return self.patch(name, name, **{"current_password": "test"} | body)

    def changed(self, response: TestResponse, **expected: object) -> None:
        """Check that a change was made, and that the answer says what is so now."""
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        answer = response.get_json()
        self.assertEqual("User changed.", answer["message"])
        shown = {"id", "username", "email", "active", "admin", "created_at"}
        self.assertEqual(shown, set(answer["data"]))
        self.assertEqual(expected, {name: answer["data"][name] for name in expected})
        stored = self.stored(answer["data"]["id"])
        self.assertEqual(expected, {name: stored[name] for name in expected})

    def stored(self, user_id: int) -> dict[str, Any]:
        """Return a user's row."""
        return next(user for user in stored_users() if user["id"] == user_id)

    def events(self, number: int = 1) -> list[tuple[str, dict[str, Any]]]:
        """Return kind and details of the newest events."""
        return [(event["kind"], event["details"]) for event in stored_events()[-number:]]

    @contextlib.contextmanager
    def nothing_changes(self) -> Iterator[None]:
        """Check that what is done in the block changes neither a user nor a session."""
        before = stored_users(), stored_sessions()
        yield
        self.assertEqual(before, (stored_users(), stored_sessions()))


class TestAdmin(CareTestCase):
    """What an admin changes about others, without a password."""

    def test_names(self) -> None:
        """A username and an email are changed, and nothing that was not sent."""
        before = self.stored(self.ids["ada"])

        response = self.patch("ada", username="Ada L.", email="Countess@Test.com")

        expected = {"username": "Ada L.", "email": "countess@test.com"}
        self.changed(response, **expected, active=True, admin=False)
        now = before | expected | {"username_key": "ada l."}
        self.assertEqual(now, self.stored(self.ids["ada"]))
        self.assertEqual(200, self.login("countess@test.com").status_code)
        self.assert_error(self.login("ada@test.com"), *NO_LOGIN)

    def test_sessions_live_on(self) -> None:
        """Another name or email, or to become an admin, ends no session."""
        for body in ({"username": "a"}, {"email": "a@b.c"}, {"admin": True}, {"admin": False}):
            self.changed(self.patch("ada", **body), **body)

        self.assertEqual(200, self.get("/auth/status", self.tokens["ada"]).status_code)

    def test_deactivated(self) -> None:
        """Who is deactivated is out at once; activated again, they have to log in."""
        self.changed(self.patch("ada", active=False), active=False)
        self.assertEqual(("user_deactivated", {"sessions": 1}), *self.events())
        self.assert_error(self.get("/auth/status", self.tokens["ada"]), *INACTIVE)
        self.assert_error(self.login("ada@test.com"), *INACTIVE)

        self.changed(self.patch("ada", active=True), active=True)
        self.assertEqual(("user_activated", {"sessions": 0}), *self.events())
        self.assert_error(self.get("/auth/status", self.tokens["ada"]), *ENDED)
        self.assertEqual(200, self.login("ada@test.com").status_code)

    def test_admin(self) -> None:
        """Who is made an admin is one at their next request, and no more when it is taken back."""
        self.changed(self.patch("ada", admin=True), admin=True)
        self.assertEqual(("admin_granted", {}), *self.events())
        self.changed(self.patch("bob", "ada", username="bobby"), username="bobby")

        self.changed(self.patch("ada", admin=False), admin=False)
        self.assertEqual(("admin_revoked", {}), *self.events())
        self.assert_error(self.patch("bob", "ada", username="bob"), *FORBIDDEN)

    def test_everything_at_once(self) -> None:
        """One request may change all four; each privilege is an event of its own."""
        body: dict[str, Any] = {"username": "x", "email": "x@y.z", "active": False, "admin": True}
        self.changed(self.patch("ada", **body), **body)

        kinds: list[Any] = ["user_changed", "user_deactivated", "admin_granted"]
        details: list[Any] = [{"fields": "email,username"}, {"sessions": 1}, {}]
        self.assertEqual(list(zip(kinds, details, strict=True)), self.events(3))
        for event in stored_events()[-3:]:
            self.assertEqual(self.ids["ada"], event["user_id"])
            self.assertEqual(self.ids["admin"], event["actor_id"])

    def test_as_it_is(self) -> None:
        """What is so already is no change: no session ends, and no event tells of it."""
        before = stored_events()
        with self.nothing_changes():
            same = {"username": "ada", "email": "ADA@test.com", "active": True, "admin": False}
            self.assertEqual(200, self.patch("ada", **same).status_code)
        self.assertEqual(before, stored_events())

    def test_case(self) -> None:
        """A name of one's own is not taken: its case can be changed."""
        self.changed(self.patch("ada", username="ADA"), username="ADA")
        self.assertEqual("ada", self.stored(self.ids["ada"])["username_key"])

    def test_taken(self) -> None:
        """What somebody else has is refused, in whatever case, and the field is named."""
        for body, refusal, field in (
            ({"username": "BOB"}, INVALID_PAYLOAD, "username"),
            ({"email": "Bob@test.com"}, EMAIL_TAKEN, "email"),
            ({"username": "new", "email": "bob@test.com", "active": False}, EMAIL_TAKEN, "email"),
        ):
            with self.subTest(body), self.nothing_changes():
                data = self.assert_error(self.patch("ada", **body), *refusal)

                self.assertEqual({field: "is taken"}, data["errors"])
                details = {"why": f"{field}_taken"}
                self.assertEqual(("user_change_refused", details), *self.events())

    def test_nobody(self) -> None:
        """An id that nobody has is a 404."""
        for nobody in (self.ids["admin"] + 1_000, 0):
            self.ids["nobody"] = nobody
            self.assert_error(self.patch("nobody", username="x"), *UNKNOWN)
        word = self.client.patch("/users/x", json={}, headers=bearer(self.tokens["admin"]))
        self.assert_error(word, *UNKNOWN)

    def test_password_is_not_asked_for(self) -> None:
        """An admin changes others without a hash being made, whatever password is in the body."""
        with mock.patch.object(bcrypt, "check_password_hash") as check:
            response = self.patch("ada", username="x", current_password="whatever")

        self.changed(response, username="x")
        check.assert_not_called()

    def test_own_account(self) -> None:
        """An admin gives their password for their own account, as everybody does."""
        with self.nothing_changes():
            data = self.assert_error(self.patch("admin", username="x"), *INVALID_PAYLOAD)
            self.assertEqual({"current_password": "is required"}, data["errors"])
            wrong = self.patch("admin", username="x", current_password="wrong")
            self.assert_error(wrong, *WRONG_PASSWORD)
        self.changed(self.change_self("admin", username="x"), username="x")

    def test_resigning(self) -> None:
        """An admin with another one beside them may demote themselves, or deactivate."""
        for body in ({"admin": False}, {"active": False}):
            name = f"resigning {next(iter(body))}"
            self.add(name.replace(" ", "."), admin=True)
            self.changed(self.change_self(name.replace(" ", "."), **body), **body)


class TestSelf(CareTestCase):
    """What users change about themselves, with their password."""

    def test_names(self) -> None:
        """A user may have another username and email; their sessions live on."""
        response = self.change_self(username="Ada L.", email="countess@test.com")

        self.changed(response, username="Ada L.", email="countess@test.com")
        details = {"fields": "email,username"}
        self.assertEqual(("user_changed", details), *self.events())
        self.assertIsNone(stored_events()[-1]["actor_id"])
        self.assertEqual(stored_sessions()[0]["id"], stored_events()[-1]["session_id"])
        status = self.get("/auth/status", self.tokens["ada"])
        self.assertEqual("countess@test.com", status.get_json()["data"]["email"])

    def test_privileges(self) -> None:
        """Nobody makes themselves an admin, nor (de)activates themselves, password or not."""
        for body in ({"admin": True}, {"admin": False}, {"active": True}, {"active": False}):
            with self.subTest(body), self.nothing_changes():
                self.assert_error(self.change_self(**body, username="x"), *FORBIDDEN)
                self.assert_error(self.patch("ada", "ada", **body), *FORBIDDEN)

    def test_password_is_missing(self) -> None:
        """Without the password nothing changes, and the field is named."""
        with self.nothing_changes():
            data = self.assert_error(self.patch("ada", "ada", username="x"), *INVALID_PAYLOAD)
        self.assertEqual({"current_password": "is required"}, data["errors"])

    def test_password_is_wrong(self) -> None:
        """With a wrong one, however long, nothing changes."""
        for wrong in ("Test", "test ", "x" * 1_025):
            with self.subTest(wrong[:5]), self.nothing_changes():
                response = self.patch("ada", "ada", username="x", current_password=wrong)
                self.assert_error(response, *WRONG_PASSWORD)
                details = {"why": "wrong_password", "pause": 0}
                self.assertEqual(("user_change_refused", details), *self.events())

    def test_somebody_else(self) -> None:
        """Nobody but an admin changes anybody else, whatever they know."""
        with self.nothing_changes():
            response = self.patch("bob", "ada", username="x", current_password="test")
            self.assert_error(response, *FORBIDDEN)

    def test_password_changes_meanwhile(self) -> None:
        """A password that was replaced while it was checked is no more the current one."""
        newer = update(User).values(password=passwords.hash("newer"))
        original = passwords.verify

        def verify(hashed: str | None, password: str) -> bool:
            genuine = original(hashed, password)
            with db.engine.begin() as connection:
                connection.execute(newer)
            return genuine

        with mock.patch.object(passwords, "verify", verify):
            self.assert_error(self.change_self(username="x"), *WRONG_PASSWORD)
        self.assertEqual("ada", self.stored(self.ids["ada"])["username"])

    def test_session_ends_meanwhile(self) -> None:
        """Whose session is ended while the password is checked changes nothing."""
        original = passwords.verify

        def verify(hashed: str | None, password: str) -> bool:
            with mock.patch.object(passwords, "verify", original):
                self.get("/auth/logout", self.tokens["ada"])
            return original(hashed, password)

        with mock.patch.object(passwords, "verify", verify):
            self.assert_error(self.change_self(username="x"), *ENDED)
        self.assertEqual("ada", self.stored(self.ids["ada"])["username"])


class TestBody(CareTestCase):
    """What a change may look like, and who is asked before it is read."""

    def test_invalid(self) -> None:
        """Types are strict, null is nothing, and each wrong field is named."""
        wrong: dict[str, tuple[Any, ...]] = {
            "username": ("", " ", "x" * 129, "a\0b", None, 1, ["x"]),
            "email": ("", "ada", " a@b.c", f"{'x' * 125}@b.c", None, 1),
            "active": ("true", 1, 0, None, []),
            "admin": ("false", 1, 0, None, {}),
            "current_password": ("", None, 1, ["test"]),
        }
        for field, values in wrong.items():
            for value in values:
                body = {"username": "x", field: value}
                with self.subTest(body), self.nothing_changes():
                    data = self.assert_error(self.patch("ada", **body), *INVALID_PAYLOAD)
                    self.assertEqual([field], list(data["errors"]))

    def test_nothing_to_change(self) -> None:
        """One known field at least; others are ignored and set no column."""
        others: dict[str, object] = {"id": 7, "password": "x", "created_at": "2026-11-22T09:00:00Z"}
        for body in ({}, others, {"current_password": "test"}):
            with self.subTest(body), self.nothing_changes():
                data = self.assert_error(self.patch("ada", **body), *INVALID_PAYLOAD)
                self.assertEqual(["body"], list(data["errors"]))
        before = self.stored(self.ids["ada"])
        self.changed(self.patch("ada", **others, username_key="y", admin=True), admin=True)
        self.assertEqual(before | {"admin": True}, self.stored(self.ids["ada"]))

    def test_never_open(self) -> None:
        """Who is calling is asked first, however open the users API is."""
        path = f"/users/{self.ids['ada']}"
        for is_open, body in itertools.product((True, False), (b"{}", b"{", b"x" * 70_000)):
            self.app.config["USERS_API_OPEN"] = is_open
            with self.subTest(body[:5], open=is_open):
                for method in ("PATCH", "DELETE"):
                    response = self.client.open(path, method=method, data=body)
                    self.assert_error(response, *MISSING)
                refused = self.client.patch(path, data=body, headers=bearer(self.tokens["bob"]))
                self.assert_error(refused, *FORBIDDEN)

    def test_gate(self) -> None:
        """As it may hash, a change waits its turn before the body is read."""
        with self.app.app_context():
            gate: passwords.Gate = self.app.extensions["password_gate"]
            for _ in range(self.app.config["GRANIAN_BLOCKING_THREADS"] // 2):
                gate.enter()
            self.assert_error(self.patch("ada", username="x"), *BUSY)
        self.changed(self.patch("ada", username="x"), username="x")


class TestLimits(CareTestCase):
    """How often one may try."""

    settings: ClassVar[dict[str, Any]] = CareTestCase.settings | {"RATE_LIMITS": True}

    def setUp(self) -> None:
        """Count, while the clock stands still."""
        super().setUp()
        ratelimit.init_app(self.app)
        self.move_clock(0)

    def test_guesses(self) -> None:
        """A wrong password is a failed login, and a right one is none."""
        for _ in range(10):
            self.changed(self.change_self("admin", username="boss"), username="boss")
        for _ in range(10):
            wrong = self.patch("admin", "admin", username="x", current_password="wrong")
            self.assert_error(wrong, *WRONG_PASSWORD)

        self.assert_error(self.change_self("admin", username="x"), *TOO_MANY)
        self.assert_error(self.login("admin@test.com"), *TOO_MANY)

    def test_taken_is_no_guess(self) -> None:
        """Who is refused for another reason than the password has guessed nothing."""
        for _ in range(12):
            self.assert_error(self.change_self("ada", username="bob"), *INVALID_PAYLOAD)
        self.assertEqual(200, self.login("ada@test.com").status_code)

    def test_what_is_taken(self) -> None:
        """To find out what is taken one may try as often as to register; an admin may search."""
        for _ in range(20):
            self.assert_error(self.change_self("ada", email="bob@test.com"), *EMAIL_TAKEN)
        self.assert_error(self.change_self("ada", email="bob@test.com"), *TOO_MANY)
        self.changed(self.patch("ada", username="x"), username="x")

    def test_known_addresses_move(self) -> None:
        """With another email an account stays at home where it was, and starts without failures."""
        self.add("new")
        for name in ("ada", "new"):
            self.assertEqual(200, self.login(f"{name}@test.com").status_code)
        db.session.execute(delete(User).where(User.id == self.ids["new"]))
        db.session.commit()
        self.changed(self.change_self("ada", email="new@test.com"), email="new@test.com")
        elsewhere = self.app.test_client()
        guess = {"email": "new@test.com", "password": "wrong"}
        environ = {"REMOTE_ADDR": "203.0.113.3"}
        for _ in range(10):
            elsewhere.post("/auth/login", json=guess, environ_overrides=environ)

        paused = elsewhere.post("/auth/login", json=guess, environ_overrides=environ)
        self.assert_error(paused, *TOO_MANY)
        self.assertEqual(200, self.login("new@test.com").status_code)
