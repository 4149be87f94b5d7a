"""PATCH /users/<id>: admins change others; users change themselves with their password."""

import itertools
from typing import Any, ClassVar
from unittest import mock

from sqlalchemy import delete, update

from project import bcrypt, db, errors
from project.accounts import rate_limits
from project.lib import hashing
from project.models import User
from project.tests.accounts.cases import AdministrationTestCase
from project.tests.base import bearer
from project.tests.rows import (
    stored_events,
    stored_sessions,
)


class TestAdmin(AdministrationTestCase):
    """An admin changes other users without a password."""

    def test_names(self) -> None:
        """A username and an email are changed, and no field that was not sent."""
        before = self.stored(self.ids["ada"])

        response = self.patch("ada", username="Ada L.", email="Countess@Test.com")

        expected = {"username": "Ada L.", "email": "countess@test.com"}
        self.assert_changed(response, **expected, active=True, admin=False)
        now = before | expected | {"username_key": "ada l.", "email_verified": True}
        self.assertEqual(now, self.stored(self.ids["ada"]))
        self.assertEqual(200, self.login("countess@test.com").status_code)
        self.assert_error(self.login("ada@test.com"), errors.InvalidCredentials)

    def test_sessions_live_on(self) -> None:
        """A change of username, email or admin ends no session."""
        for body in ({"username": "a"}, {"email": "a@b.c"}, {"admin": True}, {"admin": False}):
            self.assert_changed(self.patch("ada", **body), **body)

        self.assertEqual(200, self.get("/auth/status", self.tokens["ada"]).status_code)

    def test_deactivated(self) -> None:
        """Deactivation ends all sessions at once; after activation the user has to log in again."""
        self.assert_changed(self.patch("ada", active=False), active=False)
        self.assertEqual(("user_deactivated", {"sessions": 1}), *self.events())
        self.assert_error(self.get("/auth/status", self.tokens["ada"]), errors.AccountInactive)
        self.assert_error(self.login("ada@test.com"), errors.AccountInactive)

        self.assert_changed(self.patch("ada", active=True), active=True)
        self.assertEqual(("user_activated", {"sessions": 0}), *self.events())
        self.assert_error(self.get("/auth/status", self.tokens["ada"]), errors.SessionEnded)
        self.assertEqual(200, self.login("ada@test.com").status_code)

    def test_admin(self) -> None:
        """Admin rights apply from the next request on, and end with the next one when revoked."""
        self.assert_changed(self.patch("ada", admin=True), admin=True)
        self.assertEqual(("admin_granted", {}), *self.events())
        self.assert_changed(self.patch("bob", "ada", username="bobby"), username="bobby")

        self.assert_changed(self.patch("ada", admin=False), admin=False)
        self.assertEqual(("admin_revoked", {}), *self.events())
        self.assert_error(self.patch("bob", "ada", username="bob"), errors.PermissionDenied)

    def test_everything_at_once(self) -> None:
        """One request may change all four fields; each privilege is an event of its own."""
        body: dict[str, Any] = {"username": "x", "email": "x@y.z", "active": False, "admin": True}
        self.assert_changed(self.patch("ada", **body), **body)

        kinds: list[Any] = ["user_changed", "user_deactivated", "admin_granted"]
        details: list[Any] = [{"fields": "email,username"}, {"sessions": 1}, {}]
        self.assertEqual(list(zip(kinds, details, strict=True)), self.events(3))
        for event in stored_events()[-3:]:
            self.assertEqual(self.ids["ada"], event["user_id"])
            self.assertEqual(self.ids["admin"], event["actor_id"])

    def test_no_change(self) -> None:
        """A value that is already set ends no session and is no event."""
        before = stored_events()
        with self.assert_nothing_changes():
            same = {"username": "ada", "email": "ADA@test.com", "active": True, "admin": False}
            self.assertEqual(200, self.patch("ada", **same).status_code)
        self.assertEqual(before, stored_events())

    def test_case(self) -> None:
        """A user's own name is not taken: its case can be changed."""
        self.assert_changed(self.patch("ada", username="ADA"), username="ADA")
        self.assertEqual("ada", self.stored(self.ids["ada"])["username_key"])

    def test_taken(self) -> None:
        """A name that another user has is refused in any case, and the field is named."""
        for body, refusal, field in (
            ({"username": "BOB"}, errors.InvalidPayload, "username"),
            ({"email": "Bob@test.com"}, errors.EmailExists, "email"),
            (
                {"username": "new", "email": "bob@test.com", "active": False},
                errors.EmailExists,
                "email",
            ),
        ):
            with self.subTest(body), self.assert_nothing_changes():
                data = self.assert_error(self.patch("ada", **body), refusal)

                self.assertEqual({field: "is taken"}, data["errors"])
                details = {"why": f"{field}_taken"}
                self.assertEqual(("user_change_refused", details), *self.events())

    def test_unknown_id(self) -> None:
        """An unknown id is a 404."""
        for unknown in (self.ids["admin"] + 1_000, 0):
            self.ids["unknown"] = unknown
            self.assert_error(self.patch("unknown", username="x"), errors.UserNotFound)
        word = self.client.patch("/users/x", json={}, headers=bearer(self.tokens["admin"]))
        self.assert_error(word, errors.UserNotFound)

    def test_password_is_not_asked_for(self) -> None:
        """An admin changes others without hashing, whatever password the body has."""
        with mock.patch.object(bcrypt, "check_password_hash") as check:
            response = self.patch("ada", username="x", current_password="whatever")

        self.assert_changed(response, username="x")
        check.assert_not_called()

    def test_own_account(self) -> None:
        """An admin needs the password to change their own account, as every user does."""
        with self.assert_nothing_changes():
            data = self.assert_error(self.patch("admin", username="x"), errors.InvalidPayload)
            self.assertEqual({"current_password": "is required"}, data["errors"])
            wrong = self.patch("admin", username="x", current_password="wrong")
            self.assert_error(wrong, errors.WrongPassword)
        self.assert_changed(self.change_self("admin", username="x"), username="x")

    def test_resigning(self) -> None:
        """While there is another admin, an admin may demote or deactivate themselves."""
        for body in ({"admin": False}, {"active": False}):
            name = f"resigning {next(iter(body))}"
            self.add(name.replace(" ", "."), admin=True)
            self.assert_changed(self.change_self(name.replace(" ", "."), **body), **body)


class TestSelf(AdministrationTestCase):
    """A user changes their own account with their password."""

    def test_names(self) -> None:
        """A user may change their username and email; their sessions live on."""
        response = self.change_self(username="Ada L.", email="countess@test.com")

        self.assert_changed(response, username="Ada L.", email="countess@test.com")
        details = {"fields": "email,username"}
        self.assertEqual(("user_changed", details), *self.events())
        self.assertIsNone(stored_events()[-1]["actor_id"])
        self.assertEqual(stored_sessions()[0]["id"], stored_events()[-1]["session_id"])
        status = self.get("/auth/status", self.tokens["ada"])
        self.assertEqual("countess@test.com", status.get_json()["data"]["email"])

    def test_privileges(self) -> None:
        """A user can neither make themselves an admin nor activate or deactivate themselves."""
        for body in ({"admin": True}, {"admin": False}, {"active": True}, {"active": False}):
            with self.subTest(body), self.assert_nothing_changes():
                self.assert_error(self.change_self(**body, username="x"), errors.PermissionDenied)
                self.assert_error(self.patch("ada", "ada", **body), errors.PermissionDenied)

    def test_password_is_missing(self) -> None:
        """Without the password nothing changes, and the field is named."""
        with self.assert_nothing_changes():
            data = self.assert_error(self.patch("ada", "ada", username="x"), errors.InvalidPayload)
        self.assertEqual({"current_password": "is required"}, data["errors"])

    def test_password_is_wrong(self) -> None:
        """With a wrong password of any length nothing changes."""
        for wrong in ("Test", "test ", "x" * 1_025):
            with self.subTest(wrong[:5]), self.assert_nothing_changes():
                response = self.patch("ada", "ada", username="x", current_password=wrong)
                self.assert_error(response, errors.WrongPassword)
                details = {"why": "wrong_password", "pause": 0}
                self.assertEqual(("user_change_refused", details), *self.events())

    def test_another_user(self) -> None:
        """Only an admin changes another user, even when the password is right."""
        with self.assert_nothing_changes():
            response = self.patch("bob", "ada", username="x", current_password="test")
            self.assert_error(response, errors.PermissionDenied)

    def test_password_changes_meanwhile(self) -> None:
        """A password that was replaced during its check is refused as wrong."""
        newer = update(User).values(password=hashing.hash("newer"))
        original = hashing.verify

        def verify(hashed: str | None, password: str) -> bool:
            genuine = original(hashed, password)
            with db.engine.begin() as connection:
                connection.execute(newer)
            return genuine

        with mock.patch.object(hashing, "verify", verify):
            self.assert_error(self.change_self(username="x"), errors.WrongPassword)
        self.assertEqual("ada", self.stored(self.ids["ada"])["username"])

    def test_session_ends_meanwhile(self) -> None:
        """A caller whose session ends during the password check changes nothing."""
        original = hashing.verify

        def verify(hashed: str | None, password: str) -> bool:
            with mock.patch.object(hashing, "verify", original):
                self.get("/auth/logout", self.tokens["ada"])
            return original(hashed, password)

        with mock.patch.object(hashing, "verify", verify):
            self.assert_error(self.change_self(username="x"), errors.SessionEnded)
        self.assertEqual("ada", self.stored(self.ids["ada"])["username"])


class TestBody(AdministrationTestCase):
    """The body of a change, and that the caller is authorized before it is read."""

    def test_invalid(self) -> None:
        """Types are strict, null is no value, and each wrong field is named."""
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
                with self.subTest(body), self.assert_nothing_changes():
                    data = self.assert_error(self.patch("ada", **body), errors.InvalidPayload)
                    self.assertEqual([field], list(data["errors"]))

    def test_nothing_to_change(self) -> None:
        """At least one known field is required; other keys are ignored and set no column."""
        others: dict[str, object] = {"id": 7, "password": "x", "created_at": "2026-11-22T09:00:00Z"}
        for body in ({}, others, {"current_password": "test"}):
            with self.subTest(body), self.assert_nothing_changes():
                data = self.assert_error(self.patch("ada", **body), errors.InvalidPayload)
                self.assertEqual(["body"], list(data["errors"]))
        before = self.stored(self.ids["ada"])
        self.assert_changed(self.patch("ada", **others, username_key="y", admin=True), admin=True)
        self.assertEqual(before | {"admin": True}, self.stored(self.ids["ada"]))

    def test_never_open(self) -> None:
        """The caller is authorized first, also while the users API is open."""
        path = f"/users/{self.ids['ada']}"
        for is_open, body in itertools.product((True, False), (b"{}", b"{", b"x" * 70_000)):
            self.app.config["USERS_API_OPEN"] = is_open
            with self.subTest(body[:5], open=is_open):
                for method in ("PATCH", "DELETE"):
                    response = self.client.open(path, method=method, data=body)
                    self.assert_error(response, errors.TokenMissing)
                refused = self.client.patch(path, data=body, headers=bearer(self.tokens["bob"]))
                self.assert_error(refused, errors.PermissionDenied)

    def test_gate(self) -> None:
        """A change may hash, so it is refused without a hash slot, before its body is read."""
        with self.app.app_context():
            pool: hashing.HashingPool = self.app.extensions["hashing_pool"]
            for _ in range(self.app.config["GRANIAN_BLOCKING_THREADS"]):
                pool.enter()
            self.assert_error(self.patch("ada", username="x"), errors.Busy)
        self.assert_changed(self.patch("ada", username="x"), username="x")


class TestLimits(AdministrationTestCase):
    """Rate limits of changes."""

    settings: ClassVar[dict[str, Any]] = AdministrationTestCase.settings | {"RATE_LIMITS": True}

    def setUp(self) -> None:
        """Turn rate limits on, and stop the clock."""
        super().setUp()
        rate_limits.init_app(self.app)
        self.move_clock(0)

    def test_guesses(self) -> None:
        """A wrong password counts as a failed login; a right one does not."""
        for _ in range(10):
            self.assert_changed(self.change_self("admin", username="boss"), username="boss")
        for _ in range(10):
            wrong = self.patch("admin", "admin", username="x", current_password="wrong")
            self.assert_error(wrong, errors.WrongPassword)

        self.assert_error(self.change_self("admin", username="x"), errors.TooManyAttempts)
        self.assert_error(self.login("admin@test.com"), errors.TooManyAttempts)

    def test_other_refusals_do_not_count(self) -> None:
        """A refusal for another reason than the password is no failed login."""
        for _ in range(12):
            self.assert_error(self.change_self("ada", username="bob"), errors.InvalidPayload)
        self.assertEqual(200, self.login("ada@test.com").status_code)

    def test_taken_emails(self) -> None:
        """A user may try as many taken emails as registrations; admins have no such limit."""
        for _ in range(20):
            self.assert_error(self.change_self("ada", email="bob@test.com"), errors.EmailExists)
        self.assert_error(self.change_self("ada", email="bob@test.com"), errors.TooManyAttempts)
        self.assert_changed(self.patch("ada", username="x"), username="x")

    def test_known_addresses_move(self) -> None:
        """An account keeps its known addresses under a new email, and starts without failures."""
        self.add("new")
        for name in ("ada", "new"):
            self.assertEqual(200, self.login(f"{name}@test.com").status_code)
        db.session.execute(delete(User).where(User.id == self.ids["new"]))
        db.session.commit()
        self.assert_changed(self.change_self("ada", email="new@test.com"), email="new@test.com")
        elsewhere = self.app.test_client()
        guess = {"email": "new@test.com", "password": "wrong"}
        environ = {"REMOTE_ADDR": "203.0.113.3"}
        for _ in range(10):
            elsewhere.post("/auth/login", json=guess, environ_overrides=environ)

        paused = elsewhere.post("/auth/login", json=guess, environ_overrides=environ)
        self.assert_error(paused, errors.TooManyAttempts)
        self.assertEqual(200, self.login("new@test.com").status_code)
