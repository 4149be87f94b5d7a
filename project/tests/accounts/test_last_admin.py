"""There is always an active admin, whatever they do to each other, one by one or at once."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from werkzeug.test import TestResponse

from project import accounts, db
from project.tests.base import bearer
from project.tests.test_care import FORBIDDEN, INACTIVE, INVALID_PAYLOAD, CareTestCase
from project.tests.test_session_races import at_once
from project.tests.utils import ORIGIN, stored_events, stored_users

LAST_ADMIN = (400, "There has to be another active admin first.", "last_admin")
ROUNDS = 6
LOSSES: list[dict[str, Any]] = [{"admin": False}, {"active": False}]


class LastAdminTestCase(CareTestCase):
    """A test of admins who leave, or have each other leave."""

    def delete(self, name: str, caller: str) -> TestResponse:
        """Return the answer to an admin who deletes somebody."""
        path, headers = f"/users/{self.ids[name]}", bearer(self.tokens[caller])
        return self.app.test_client().delete(path, headers=headers)

    def leave(self, name: str) -> TestResponse:
        """Return the answer to somebody who deletes their own account."""
        body, headers = {"current_password": "test"}, bearer(self.tokens[name])
        return self.app.test_client().delete("/auth/account", json=body, headers=headers)

    def admins(self) -> list[str]:
        """Return the emails of the active admins."""
        return [user["email"] for user in stored_users() if user["active"] and user["admin"]]


class TestLastAdmin(LastAdminTestCase):
    """One after the other."""

    def test_changes(self) -> None:
        """The last admin can be neither demoted nor deactivated, whatever else is changed."""
        for body in [*LOSSES, {"active": False, "email": "new@test.com"}]:
            with self.subTest(body), self.nothing_changes():
                self.assert_error(self.change_self("admin", **body), *LAST_ADMIN, "fail")
                details = {"why": "last_admin"}
                self.assertEqual(("user_change_refused", details), *self.events())

    def test_deletion(self) -> None:
        """The last admin can't be deleted: not with the password, and not without it."""
        with self.nothing_changes():
            self.assert_error(self.leave("admin"), *LAST_ADMIN)
            details = {"why": "last_admin"}
            self.assertEqual(("deletion_refused", details), *self.events())
            data = self.assert_error(self.delete("admin", "admin"), *INVALID_PAYLOAD)
            self.assertEqual({"current_password": "is required"}, data["errors"])

    def test_resting_admins(self) -> None:
        """A deactivated admin is none that would do, and can themselves be demoted or deleted."""
        for name in ("resting", "gone"):
            self.add(name, admin=True)
            self.changed(self.patch(name, active=False), admin=True)

        self.assert_error(self.change_self("admin", admin=False), *LAST_ADMIN, "fail")
        self.assert_error(self.leave("admin"), *LAST_ADMIN)
        self.changed(self.patch("resting", admin=False), admin=False)
        self.assertEqual(200, self.delete("gone", "admin").status_code)

    def test_names(self) -> None:
        """All else about the last admin can be changed."""
        body: dict[str, Any] = {"username": "b", "email": "b@test.com", "admin": True}
        self.changed(self.change_self("admin", **body), **body)

    def test_another(self) -> None:
        """With two, either may demote the other, and not then leave."""
        self.add("second", admin=True)
        self.changed(self.patch("admin", "second", admin=False), admin=False)

        self.assert_error(self.change_self("second", admin=False), *LAST_ADMIN, "fail")
        self.assert_error(self.leave("second"), *LAST_ADMIN)
        self.assertEqual(200, self.leave("admin").status_code)

    def test_operator(self) -> None:
        """The command line is not bound by this: there another admin is made in a moment."""
        accounts.set_active("admin@test.com", False, ORIGIN)
        db.session.commit()

        self.assertEqual([], self.admins())


class TestLastAdminRaces(LastAdminTestCase):
    """At once."""

    def rounds(self) -> Iterator[list[str]]:
        """Give three new admins ROUNDS times, who are then all there are."""
        names = ["admin"]
        for number in range(ROUNDS):
            new = [f"admin{number}.{letter}" for letter in "abc"]
            for name in new:
                self.add(name, admin=True)
            for name in names:
                if f"{name}@test.com" in self.admins():
                    self.assertEqual(200, self.delete(name, new[0]).status_code)
            names = new
            with self.subTest(round=number):
                yield new

    def race(self, *acts: Callable[[], TestResponse]) -> None:
        """Let them act at once, and check that one admin is left, and each answer says why."""
        known = len(stored_events())
        for answer in at_once(*acts):
            if answer.status_code != 200:
                refusal = {400: LAST_ADMIN, 401: INACTIVE, 403: FORBIDDEN}[answer.status_code]
                self.assertEqual(refusal[2], answer.get_json()["code"])
        self.assertLessEqual(1, len(self.admins()))
        told = [event["kind"] for event in stored_events()[known:]]
        done = sum(not kind.endswith("refused") for kind in told)
        self.assertEqual(3 - len(self.admins()), done, told)

    def test_everybody_resigns(self) -> None:
        """Of three who resign at once, each in a way of their own, one has to stay."""
        for a, b, c in self.rounds():
            self.race(
                partial(self.change_self, a, admin=False),
                partial(self.change_self, b, active=False),
                partial(self.leave, c),
            )
            self.assertEqual(1, len(self.admins()))

    def test_each_other(self) -> None:
        """Of three who would be rid of each other, somebody is left."""
        for a, b, c in self.rounds():
            self.race(
                partial(self.patch, b, a, admin=False),
                partial(self.patch, c, b, active=False),
                partial(self.delete, a, c),
            )

    def test_both_of_two(self) -> None:
        """Of two who demote each other at once, the second to come is no admin any more."""
        for a, b, c in self.rounds():
            self.assertEqual(200, self.delete(c, a).status_code)
            answers = at_once(
                partial(self.patch, b, a, admin=False), partial(self.patch, a, b, admin=False)
            )

            self.assertEqual({200, 403}, {answer.status_code for answer in answers})
            self.assertEqual(1, len(self.admins()))
