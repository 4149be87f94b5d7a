"""A user is deleted, by themselves or an admin: nothing names them any more, and events stay."""

import itertools
import json
from datetime import timedelta
from typing import Any, ClassVar
from unittest import mock

from sqlalchemy import event, select
from werkzeug.test import TestResponse

from project import audit, clock, database, db, ratelimit
from project.api.models import Erasure, KnownAddress, Throttle
from project.tests import scratch
from project.tests.base import BaseTestCase, bearer
from project.tests.test_care import (
    ENDED,
    FORBIDDEN,
    INACTIVE,
    MISSING,
    NO_LOGIN,
    TOO_MANY,
    UNKNOWN,
    CareTestCase,
)
from project.tests.test_events import add_events
from project.tests.utils import stored_events, stored_sessions, stored_users

WRONG = (400, "Current password is wrong.", "wrong_password")
INVALID = (400, "Invalid payload.", "invalid_payload")
BLANK = dict.fromkeys(("user_id", "actor_id", "session_id", "ip", "request_id")) | {
    "user_agent": ""
}
HOME = {"REMOTE_ADDR": "203.0.113.7"}


class DeletionTestCase(CareTestCase):
    """A test that deletes somebody."""

    def delete(self, name: str, caller: str = "admin") -> TestResponse:
        """Return the answer to an admin who deletes somebody."""
        path, headers = f"/users/{self.ids[name]}", bearer(self.tokens[caller])
        return self.app.test_client().delete(path, headers=headers)

    def leave(self, name: str = "ada", **body: object) -> TestResponse:
        """Return the answer to somebody who deletes their own account."""
        body = {"current_password": "test"} | body
        headers = bearer(self.tokens[name])
        return self.app.test_client().delete("/auth/account", json=body, headers=headers)

    def deleted(self, response: TestResponse, message: str) -> None:
        """Check the answer to a deletion."""
        data = {"status": "success", "message": message}
        self.assertEqual((200, data), (response.status_code, response.get_json()))

    def assert_gone(self, name: str) -> None:
        """Check that nothing is left of somebody in the tables, and their token tells so."""
        user_id = self.ids[name]
        self.assertNotIn(user_id, [user["id"] for user in stored_users()])
        self.assertNotIn(user_id, [session["user_id"] for session in stored_sessions()])
        self.assert_not_named(name)
        self.assert_error(self.get("/auth/status", self.tokens[name]), *INACTIVE)
        self.assert_error(self.login(f"{name}@test.com"), *NO_LOGIN)

    def assert_not_named(self, name: str) -> None:
        """Check that no event has the id of somebody, nor what came with their requests."""
        for row in stored_events():
            self.assertNotIn(self.ids[name], (row["user_id"], row["actor_id"]), row)


class TestDeletion(DeletionTestCase):
    """Who is deleted, by whom."""

    def test_own_account(self) -> None:
        """Who gives their password deletes their account, with all sessions and both names."""
        second = self.login("ada@test.com").get_json()
        known = len(stored_users())

        self.deleted(self.leave(), "Account deleted.")

        self.assertEqual(known - 1, len(stored_users()))
        self.assert_gone("ada")
        refresh = self.client.post("/auth/refresh", json={"refresh_token": second["refresh_token"]})
        self.assert_error(refresh, *INACTIVE)

    def test_event(self) -> None:
        """That an account was deleted is told, and nothing that says whose it was."""
        self.leave()

        newest = stored_events()[-1]
        self.assertLess(abs(clock.utcnow() - newest["created_at"]), timedelta(minutes=1))
        expected = BLANK | {"kind": "account_deleted", "details": {}}
        self.assertEqual(expected, {name: newest[name] for name in expected})

    def test_by_an_admin(self) -> None:
        """An admin deletes others without a password; who did it is told, and to whom is not."""
        self.deleted(self.delete("ada"), "User deleted.")

        newest = stored_events()[-1]
        self.assertEqual(("user_deleted", None), (newest["kind"], newest["user_id"]))
        self.assertEqual((self.ids["admin"], "127.0.0.1"), (newest["actor_id"], newest["ip"]))
        self.assert_gone("ada")
        self.assert_error(self.delete("ada"), *UNKNOWN)
        self.assert_error(self.get(f"/users/{self.ids['ada']}", self.tokens["admin"]), *UNKNOWN)
        events = self.get(f"/users/{self.ids['ada']}/events", self.tokens["admin"])
        self.assert_error(events, *UNKNOWN)

    def test_again(self) -> None:
        """Both names are free at once; who takes them is somebody else, with another id."""
        self.leave()

        token = self.register("ada", "ada@test.com")

        data = self.get("/auth/status", token).get_json()["data"]
        self.assertGreater(data["id"], max(self.ids.values()))
        self.assert_error(self.get("/auth/status", self.tokens["ada"]), *INACTIVE)

    def test_others(self) -> None:
        """Nobody else is touched."""
        before = [user for user in stored_users() if user["id"] != self.ids["ada"]]

        self.delete("ada")

        self.assertEqual(before, stored_users())
        self.assertEqual(200, self.get("/auth/status", self.tokens["bob"]).status_code)

    def test_passwords(self) -> None:
        """A wrong password deletes nothing, and neither does none."""
        wrong = {"why": "wrong_password", "pause": 0}
        with self.nothing_changes():
            for password in ("wrong", "x" * 2_000):
                self.assert_error(self.leave(current_password=password), *WRONG)
                self.assertEqual(("deletion_refused", wrong), *self.events())
            for odd in ("", None, 1):
                data = self.assert_error(self.leave(current_password=odd), *INVALID)
                self.assertEqual(["current_password"], list(data["errors"]))
            headers = bearer(self.tokens["ada"])
            for body in ({}, {"password": "test"}):
                none = self.client.delete("/auth/account", json=body, headers=headers)
                self.assertEqual("is required", none.get_json()["errors"]["current_password"])
            self.assert_error(self.client.delete("/auth/account", headers=headers), *INVALID)

    def test_who_may(self) -> None:
        """Nobody but an admin deletes by id, not even themselves; who is calling comes first."""
        with self.nothing_changes():
            for name, is_open in itertools.product(("bob", "ada", "admin"), (True, False)):
                self.app.config["USERS_API_OPEN"] = is_open
                self.assert_error(self.delete(name, "ada"), *FORBIDDEN)
            for body in (b"", b"{", b"x" * 70_000):
                self.assert_error(self.client.delete("/auth/account", data=body), *MISSING)
        self.get("/auth/logout", self.tokens["bob"])
        self.assert_error(self.leave("bob"), *ENDED)


class TestErasure(DeletionTestCase):
    """What becomes of the events of somebody who is deleted."""

    def act(self, caller: str, method: str, path: str, **body: object) -> None:
        """Have somebody send something, from a place of their own."""
        headers = bearer(self.tokens[caller]) | {"User-Agent": caller, "X-Request-ID": caller}
        client = self.app.test_client()
        answer = client.open(path, method=method, json=body, headers=headers, environ_base=HOME)
        self.assertLess(answer.status_code, 500)

    def test_own_events(self) -> None:
        """What happened stays, and when; whose it was and where they were is gone."""
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

        self.leave()

        self.assertEqual(expected, stored_events()[:-1])

    def test_done_by_an_admin(self) -> None:
        """Of what an admin did to them it stays that the admin did it, and from where."""
        self.act("admin", "PATCH", f"/users/{self.ids['ada']}", username="Ada L.")
        before = stored_events()[-1]

        self.delete("ada")

        (now,) = [row for row in stored_events() if row["id"] == before["id"]]
        self.assertEqual(before | {"user_id": None}, now)
        self.assertEqual((self.ids["admin"], "admin", HOME["REMOTE_ADDR"]), self.origin(now))

    def test_done_by_them(self) -> None:
        """Of what a deleted admin did to others it stays that it happened to these."""
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
        """Return who did it, with what, from where."""
        return row["actor_id"], row["user_agent"], row["ip"]

    def test_values_are_not_told(self) -> None:
        """No event ever has a name or password that somebody changed or gave."""
        self.act("ada", "PATCH", f"/users/{self.ids['ada']}", current_password="mistyped")
        names = {"username": "Lovelace", "email": "countess@test.com"}
        self.changed(self.change_self(**names), **names)
        wrong = self.change_self(username="bob", current_password="mistyped")
        self.assert_error(wrong, *WRONG, "fail")
        self.delete("ada")

        told = json.dumps(stored_events(), default=str)
        for secret in ("Lovelace", "lovelace", "countess", "test.com", "mistyped"):
            self.assertNotIn(secret, told)

    def test_many(self) -> None:
        """Of very many events the newest are done at once, and the others by the next purge."""
        add_events(self.ids["ada"], [clock.utcnow()] * 7)
        add_events(self.ids["bob"], [clock.utcnow()] * 4, actor_id=self.ids["ada"])
        with mock.patch.multiple(audit, ERASED_AT_ONCE=3, ERASURES_AT_ONCE=1):
            self.deleted(self.leave(), "Account deleted.")
            named = [row["id"] for row in stored_events() if row["user_id"] == self.ids["ada"]]
            self.assertEqual(5, len(named))
            self.assertLess(max(named), max(row["id"] for row in stored_events()) - 4)

            self.assertEqual([4, 2, 0], [self.erase_rest() for _ in range(3)])
        self.assert_not_named("ada")

    def test_all_at_once(self) -> None:
        """Of so many as people have, all are done with the deletion."""
        add_events(self.ids["ada"], [clock.utcnow()] * 7)
        with mock.patch.object(audit, "ERASED_AT_ONCE", 3):
            self.leave()
        self.assert_not_named("ada")

    def erase_rest(self) -> int:
        """Do what purge does, once, and return how many events that was."""
        erased = audit.erase_rest()
        db.session.commit()
        return erased

    def test_late_events(self) -> None:
        """What a request recorded that was under way is found by a purge within the hour."""
        self.leave()
        self.assertEqual(1, self.erasures())
        add_events(self.ids["ada"], [clock.utcnow()], ip="203.0.113.7")
        self.assertEqual([1, 0], [self.erase_rest() for _ in range(2)])
        self.assert_not_named("ada")
        self.assertEqual(1, self.erasures())

        self.move_clock(3_600)
        add_events(None, [clock.utcnow()], actor_id=self.ids["ada"])
        with mock.patch.object(audit, "_erase_some", return_value=0):  # somebody else is at it
            self.erase_rest()
        self.assertEqual([1, 0], [self.erase_rest() for _ in range(2)])
        self.assert_not_named("ada")
        self.assertEqual(0, self.erasures())

    def erasures(self) -> int:
        """Return of how many it is remembered that they were deleted."""
        return len(database.fetch_all(select(Erasure.__table__)))

    def test_purge(self) -> None:
        """The command does it."""
        with mock.patch.multiple(audit, ERASED_AT_ONCE=1, ERASURES_AT_ONCE=1):
            add_events(self.ids["ada"], [clock.utcnow()] * 3)
            self.leave()
        url = self.app.config["SQLALCHEMY_DATABASE_URI"]
        settings = {"APP_SETTINGS": "project.config.DevelopmentConfig", "SECRET_KEY": "any"}
        result = scratch.manage("purge", DATABASE_URL=url, **settings)

        self.assertIn("whoever was deleted: 3.", result.stdout, result.stderr)
        self.assert_not_named("ada")

    def test_index(self) -> None:
        """Neither events nor admins are looked for in whole tables."""
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
                self.assertNotRegex(plans[-1], r"Seq Scan|SCAN \w+'")
        for index in ("users_admins_idx", "events_actor_id_created_at_id_idx"):
            self.assertTrue(any(index in plan for plan in plans), plans)


class TestLimits(DeletionTestCase):
    """What was counted of an account goes with it."""

    settings: ClassVar[dict[str, Any]] = BaseTestCase.settings | {"RATE_LIMITS": True}

    def setUp(self) -> None:
        """Count."""
        super().setUp()
        ratelimit.init_app(self.app)
        self.move_clock(0)
        self.tokens = {
            name: self.login(f"{name}@test.com").get_json()["auth_token"] for name in self.ids
        }

    def guess(self, email: str, **origin: Any) -> None:
        """Fail to log in, from a known address and another."""
        for environ in ({}, HOME):
            credentials = {"email": email, "password": "wrong"}
            self.client.post("/auth/login", json=credentials, environ_overrides=environ)

    def counts(self) -> set[str]:
        """Return what is counted, and where accounts are known."""
        counted = database.fetch_all(select(Throttle.__table__))
        known = database.fetch_all(select(KnownAddress.__table__))
        return {row.key for row in counted} | {row.account for row in known}

    def test_counts(self) -> None:
        """Failures and known addresses are forgotten, those of an earlier email too."""
        before = self.counts()
        self.deleted(self.delete("bob"), "User deleted.")
        left = self.counts()
        self.assertEqual(1, len(before - left))
        self.guess("ada@test.com")
        self.assertLess(left, self.counts())
        self.patch("ada", email="new@test.com")
        self.guess("new@test.com")

        self.deleted(self.leave(), "Account deleted.")

        self.assertEqual(1, len(left - self.counts()))
        self.assertEqual({"login:203.0.113.7"}, self.counts() - left)

    def test_guesses(self) -> None:
        """A wrong password here is a failed login."""
        for _ in range(10):
            self.assert_error(self.leave(current_password="wrong"), *WRONG)

        self.assert_error(self.leave(), *TOO_MANY)
        self.assert_error(self.login("ada@test.com"), *TOO_MANY)
        self.deleted(self.delete("ada"), "User deleted.")
