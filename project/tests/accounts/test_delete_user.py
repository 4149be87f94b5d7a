"""A user is deleted by themselves or by an admin: events stay, but none identifies the user."""

import itertools
import json
from datetime import timedelta
from typing import Any, ClassVar
from unittest import mock

from sqlalchemy import delete, event, select
from werkzeug.test import TestResponse

from project import clock, db, errors
from project.accounts import audit, rate_limits
from project.lib import database, hashing
from project.models import KnownAddress, Throttle, User
from project.tests.accounts.cases import AdministrationTestCase
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import add_events, stored_events, stored_sessions, stored_users

IDENTIFYING = "user_id", "actor_id", "session_id", "ip", "request_id", "trace_id"
BLANK = dict.fromkeys(IDENTIFYING) | {"user_agent": ""}
HOME = {"REMOTE_ADDR": "203.0.113.7"}


class DeletionTestCase(AdministrationTestCase):
    """A test that deletes users."""

    def assert_deleted(self, response: TestResponse, message: str) -> None:
        """Check the response to a deletion."""
        data = {"status": "success", "message": message}
        self.assertEqual((200, data), (response.status_code, response.get_json()))

    def assert_gone(self, name: str) -> None:
        """Check that no table has the user any more, and their token and login are refused."""
        user_id = self.ids[name]
        self.assertNotIn(user_id, [user["id"] for user in stored_users()])
        self.assertNotIn(user_id, [session["user_id"] for session in stored_sessions()])
        self.assert_not_named(name)
        self.assert_error(self.get("/auth/status", self.tokens[name]), errors.AccountInactive)
        self.assert_error(self.login(f"{name}@test.com"), errors.InvalidCredentials)

    def assert_not_named(self, name: str) -> None:
        """Check that no event has the user's id."""
        for row in stored_events():
            self.assertNotIn(self.ids[name], (row["user_id"], row["actor_id"]), row)


class TestDeletion(DeletionTestCase):
    """Who may delete a user, and what is deleted."""

    def test_own_account(self) -> None:
        """A user who gives their password deletes their account and all its sessions."""
        second = self.login("ada@test.com").get_json()
        known = len(stored_users())

        self.assert_deleted(self.delete_self(), "Account deleted.")

        self.assertEqual(known - 1, len(stored_users()))
        self.assert_gone("ada")
        refresh = self.client.post("/auth/refresh", json={"refresh_token": second["refresh_token"]})
        self.assert_error(refresh, errors.AccountInactive)

    def test_event(self) -> None:
        """The event of a deleted account says nothing about the user."""
        self.delete_self()

        newest = stored_events()[-1]
        self.assertLess(abs(clock.utcnow() - newest["created_at"]), timedelta(minutes=1))
        expected = BLANK | {"kind": "account_deleted", "details": {}}
        self.assertEqual(expected, {name: newest[name] for name in expected})

    def test_by_an_admin(self) -> None:
        """An admin deletes others without a password; the event names only the admin."""
        self.assert_deleted(self.delete("ada"), "User deleted.")

        newest = stored_events()[-1]
        self.assertEqual(("user_deleted", None), (newest["kind"], newest["user_id"]))
        self.assertEqual((self.ids["admin"], "127.0.0.1"), (newest["actor_id"], newest["ip"]))
        self.assert_gone("ada")
        self.assert_error(self.delete("ada"), errors.UserNotFound)
        self.assert_error(
            self.get(f"/users/{self.ids['ada']}", self.tokens["admin"]), errors.UserNotFound
        )
        events = self.get(f"/users/{self.ids['ada']}/events", self.tokens["admin"])
        self.assert_error(events, errors.UserNotFound)

    def test_registering_again(self) -> None:
        """Username and email are free at once; a new user with them has another id."""
        self.delete_self()

        token = self.register("ada", "ada@test.com")

        data = self.get("/auth/status", token).get_json()["data"]
        self.assertGreater(data["id"], max(self.ids.values()))
        self.assert_error(self.get("/auth/status", self.tokens["ada"]), errors.AccountInactive)

    def test_others(self) -> None:
        """No other user changes."""
        before = [user for user in stored_users() if user["id"] != self.ids["ada"]]

        self.delete("ada")

        self.assertEqual(before, stored_users())
        self.assertEqual(200, self.get("/auth/status", self.tokens["bob"]).status_code)

    def test_passwords(self) -> None:
        """A wrong or missing password deletes nothing."""
        wrong = {"why": "wrong_password", "pause": 0}
        with self.assert_nothing_changes():
            for password in ("wrong", "x" * 2_000):
                self.assert_error(self.delete_self(current_password=password), errors.WrongPassword)
                self.assertEqual(("deletion_refused", wrong), *self.events())
            for odd in ("", None, 1):
                data = self.assert_error(
                    self.delete_self(current_password=odd), errors.InvalidPayload
                )
                self.assertEqual(["current_password"], list(data["errors"]))
            headers = bearer(self.tokens["ada"])
            for body in ({}, {"password": "test"}):
                none = self.client.delete("/auth/account", json=body, headers=headers)
                self.assertEqual("is required", none.get_json()["errors"]["current_password"])
            self.assert_error(
                self.client.delete("/auth/account", headers=headers), errors.InvalidPayload
            )

    def test_who_may(self) -> None:
        """Only an admin deletes by id, and authorization comes before the body."""
        with self.assert_nothing_changes():
            for name, is_open in itertools.product(("bob", "ada", "admin"), (True, False)):
                self.app.config["USERS_API_OPEN"] = is_open
                self.assert_error(self.delete(name, "ada"), errors.PermissionDenied)
            for body in (b"", b"{", b"x" * 70_000):
                self.assert_error(
                    self.client.delete("/auth/account", data=body), errors.TokenMissing
                )
        self.get("/auth/logout", self.tokens["bob"])
        self.assert_error(self.delete_self("bob"), errors.SessionEnded)


class TestAnonymization(DeletionTestCase):
    """What deletion erases from the events of a user."""

    def act(self, caller: str, method: str, path: str, **body: object) -> None:
        """Send a request as this user, from a known address with a known user agent."""
        headers = bearer(self.tokens[caller]) | {"User-Agent": caller, "X-Request-ID": caller}
        client = self.app.test_client()
        answer = client.open(path, method=method, json=body, headers=headers, environ_base=HOME)
        self.assertLess(answer.status_code, 500)

    def test_own_events(self) -> None:
        """Kind, time and details of an event stay; the user and the origin are erased."""
        password = {"current_password": "test", "new_password": "test"}
        self.act("ada", "POST", "/auth/password", **password)
        self.act("ada", "PATCH", f"/users/{self.ids['ada']}", current_password="x", username="x")
        self.login("ada@test.com", "wrong")
        expected = stored_events()
        own = [row for row in expected if row["user_id"] == self.ids["ada"]]
        kinds = ["logged_in", "password_changed", "user_change_refused", "login_refused"]
        self.assertEqual(kinds, [row["kind"] for row in own])
        for row in own:
            row |= BLANK

        self.delete_self()

        self.assertEqual(expected, stored_events()[:-1])

    def test_done_by_an_admin(self) -> None:
        """An event that an admin caused keeps the admin and the admin's origin."""
        self.act("admin", "PATCH", f"/users/{self.ids['ada']}", username="Ada L.")
        before = stored_events()[-1]

        self.delete("ada")

        (now,) = [row for row in stored_events() if row["id"] == before["id"]]
        self.assertEqual(before | {"user_id": None}, now)
        self.assertEqual((self.ids["admin"], "admin", HOME["REMOTE_ADDR"]), self.origin(now))

    def test_done_by_a_deleted_admin(self) -> None:
        """An event that a deleted admin caused keeps the user whom it is about."""
        self.add("second", admin=True)
        self.act("second", "PATCH", f"/users/{self.ids['ada']}", username="Ada L.")
        before = stored_events()[-1]

        self.delete("second")

        (now,) = [row for row in stored_events() if row["id"] == before["id"]]
        self.assertEqual((None, "", None), self.origin(now))
        self.assertEqual(self.ids["ada"], now["user_id"])
        self.assertEqual((before["details"], None), (now["details"], now["request_id"]))
        self.assert_not_named("second")

    def origin(self, row: dict[str, Any]) -> tuple[Any, ...]:
        """Return the actor, the user agent and the address of an event."""
        return row["actor_id"], row["user_agent"], row["ip"]

    def test_values_are_not_recorded(self) -> None:
        """No event has a username, email or password that a user gave."""
        self.act("ada", "PATCH", f"/users/{self.ids['ada']}", current_password="mistyped")
        names = {"username": "Lovelace", "email": "countess@test.com"}
        self.assert_changed(self.change_self(**names), **names)
        wrong = self.change_self(username="bob", current_password="mistyped")
        self.assert_error(wrong, errors.WrongPassword)
        self.delete("ada")

        told = json.dumps(stored_events(), default=str)
        for secret in ("Lovelace", "lovelace", "countess", "test.com", "mistyped"):
            self.assertNotIn(secret, told)

    def test_many_events(self) -> None:
        """All events of the user are anonymized with the deletion, however many there are."""
        add_events(self.ids["ada"], [clock.utcnow()] * 7)
        add_events(self.ids["bob"], [clock.utcnow()] * 4, actor_id=self.ids["ada"])
        with mock.patch.object(audit, "ANONYMIZED_AT_ONCE", 3):
            self.assert_deleted(self.delete_self(), "Account deleted.")

        self.assert_not_named("ada")

    def test_event_of_a_user_deleted_meanwhile(self) -> None:
        """A request that was in flight while the user was deleted leaves an anonymous event."""

        def delete_meanwhile(*_: object) -> bool:
            self.assert_deleted(self.delete("ada"), "User deleted.")
            return False

        with mock.patch.object(hashing, "verify", delete_meanwhile):
            self.assert_error(self.login("ada@test.com", "wrong"), errors.InvalidCredentials)

        newest = stored_events()[-1]
        self.assertEqual("login_refused", newest["kind"])
        self.assertEqual(BLANK, {name: newest[name] for name in BLANK})

    def test_act_of_an_admin_deleted_meanwhile(self) -> None:
        """An event of an admin who was deleted meanwhile has no actor and no origin."""
        self.add("second", admin=True)
        db.session.execute(delete(User).where(User.id == self.ids["second"]))
        db.session.commit()
        origin = audit.Origin("203.0.113.7", "curl", "a", self.ids["second"])

        audit.record(audit.Kind.USER_CHANGED, origin, user_id=self.ids["ada"], fields="email")
        db.session.commit()

        newest = stored_events()[-1]
        expected = BLANK | {"user_id": self.ids["ada"]}
        self.assertEqual(expected, {name: newest[name] for name in expected})

    def test_index(self) -> None:
        """Neither events nor admins are found by scanning whole tables."""
        statements: list[tuple[str, Any]] = []

        def listen(_c: object, _k: object, sql: str, parameters: Any, *_: object) -> None:
            statements.append((sql, parameters))

        event.listen(db.engine, "before_cursor_execute", listen)
        self.delete("ada")
        event.remove(db.engine, "before_cursor_execute", listen)
        plans = []
        for sql, parameters in statements:
            if sql.startswith(("SELECT", "UPDATE", "DELETE")):
                with db.engine.connect() as connection:
                    if self.on_postgresql:
                        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
                    explain = "EXPLAIN " if self.on_postgresql else "EXPLAIN QUERY PLAN "
                    plans.append(str(connection.exec_driver_sql(explain + sql, parameters).all()))
                self.assertNotRegex(plans[-1], r"Seq Scan|SCAN (?!anon_)\w+'")
        for index in ("users_admins_idx", "events_actor_id_created_at_id_idx"):
            self.assertTrue(any(index in plan for plan in plans), plans)


class TestLimits(DeletionTestCase):
    """Rate-limit counts and known addresses are deleted with the account."""

    settings: ClassVar[dict[str, Any]] = BaseTestCase.settings | {"RATE_LIMITS": True}

    def setUp(self) -> None:
        """Turn rate limits on, and log every user in."""
        super().setUp()
        rate_limits.init_app(self.app)
        self.move_clock(0)
        self.tokens = {
            name: self.login(f"{name}@test.com").get_json()["auth_token"] for name in self.ids
        }

    def guess(self, email: str, **origin: Any) -> None:
        """Fail to log in, from a known address and from another."""
        for environ in ({}, HOME):
            credentials = {"email": email, "password": "wrong"}
            self.client.post("/auth/login", json=credentials, environ_overrides=environ)

    def counts(self) -> set[str]:
        """Return the keys of all counts and known addresses."""
        counted = database.fetch_all(select(Throttle.__table__))
        known = database.fetch_all(select(KnownAddress.__table__))
        return {row.key for row in counted} | {row.account for row in known}

    def test_counts(self) -> None:
        """Failures and known addresses are deleted, including those of an earlier email."""
        before = self.counts()
        self.assert_deleted(self.delete("bob"), "User deleted.")
        left = self.counts()
        self.assertEqual(1, len(before - left))
        self.guess("ada@test.com")
        self.assertLess(left, self.counts())
        self.patch("ada", email="new@test.com")
        self.guess("new@test.com")

        self.assert_deleted(self.delete_self(), "Account deleted.")

        self.assertEqual(1, len(left - self.counts()))
        self.assertEqual({"login:203.0.113.7"}, self.counts() - left)

    def test_guesses(self) -> None:
        """A wrong password counts as a failed login."""
        for _ in range(10):
            self.assert_error(self.delete_self(current_password="wrong"), errors.WrongPassword)

        self.assert_error(self.delete_self(), errors.TooManyAttempts)
        self.assert_error(self.login("ada@test.com"), errors.TooManyAttempts)
        self.assert_deleted(self.delete("ada"), "User deleted.")
