"""There is always an active admin, whether admins act one after the other or at once."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from werkzeug.test import TestResponse

from project import db, errors
from project.accounts import administration
from project.tests.accounts.cases import AdministrationTestCase, at_once
from project.tests.rows import ORIGIN, stored_events, stored_users

ROUNDS = 6
REMOVALS: list[dict[str, Any]] = [{"admin": False}, {"active": False}]


class LastAdminTestCase(AdministrationTestCase):
    """A test of admins who demote, deactivate or delete themselves or each other."""

    def admins(self) -> list[str]:
        """Return the emails of the active admins."""
        return [user["email"] for user in stored_users() if user["active"] and user["admin"]]


class TestLastAdmin(LastAdminTestCase):
    """Requests one after the other."""

    def test_changes(self) -> None:
        """The last admin can be neither demoted nor deactivated, whatever else the body changes."""
        for body in [*REMOVALS, {"active": False, "email": "new@test.com"}]:
            with self.subTest(body), self.assert_nothing_changes():
                self.assert_error(self.change_self("admin", **body), errors.LastAdmin)
                details = {"why": "last_admin"}
                self.assertEqual(("user_change_refused", details), *self.events())

    def test_deletion(self) -> None:
        """The last admin can't be deleted, by themselves or by id."""
        with self.assert_nothing_changes():
            self.assert_error(self.delete_self("admin"), errors.LastAdmin)
            details = {"why": "last_admin"}
            self.assertEqual(("deletion_refused", details), *self.events())
            self.assert_error(self.delete("admin", "admin"), errors.OwnAccount)

    def test_deactivated_admins(self) -> None:
        """A deactivated admin does not count, and can be demoted or deleted."""
        for name in ("deactivated", "gone"):
            self.add(name, admin=True)
            self.assert_changed(self.patch(name, active=False), admin=True)

        self.assert_error(self.change_self("admin", admin=False), errors.LastAdmin)
        self.assert_error(self.delete_self("admin"), errors.LastAdmin)
        self.assert_changed(self.patch("deactivated", admin=False), admin=False)
        self.assertEqual(200, self.delete("gone", "admin").status_code)

    def test_names(self) -> None:
        """Every other field of the last admin can be changed."""
        body: dict[str, Any] = {"username": "b", "email": "b@test.com", "admin": True}
        self.assert_changed(self.change_self("admin", **body), **body)

    def test_another(self) -> None:
        """Of two admins, either may demote the other, but the remaining one has to stay."""
        self.add("second", admin=True)
        self.assert_changed(self.patch("admin", "second", admin=False), admin=False)

        self.assert_error(self.change_self("second", admin=False), errors.LastAdmin)
        self.assert_error(self.delete_self("second"), errors.LastAdmin)
        self.assertEqual(200, self.delete_self("admin").status_code)

    def test_operator(self) -> None:
        """The command line may deactivate the last admin: an operator can create another."""
        administration.set_active("admin@test.com", False, ORIGIN)
        db.session.commit()

        self.assertEqual([], self.admins())


class TestLastAdminRaces(LastAdminTestCase):
    """Requests at once."""

    def rounds(self) -> Iterator[list[str]]:
        """Yield three new admins ROUNDS times; they are then the only admins."""
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
        """Run the actions at once; check that an admin is left, and each refusal's code."""
        known = len(stored_events())
        for answer in at_once(*acts):
            if answer.status_code != 200:
                refusal = {
                    400: errors.LastAdmin,
                    401: errors.AccountInactive,
                    403: errors.PermissionDenied,
                }[answer.status_code]
                self.assertEqual(refusal.code, answer.get_json()["code"])
        self.assertLessEqual(1, len(self.admins()))
        told = [event["kind"] for event in stored_events()[known:]]
        done = sum(not kind.endswith("refused") for kind in told)
        self.assertEqual(3 - len(self.admins()), done, told)

    def test_all_resign(self) -> None:
        """Of three admins who resign at once, each in a different way, one has to stay."""
        for a, b, c in self.rounds():
            self.race(
                partial(self.change_self, a, admin=False),
                partial(self.change_self, b, active=False),
                partial(self.delete_self, c),
            )
            self.assertEqual(1, len(self.admins()))

    def test_each_other(self) -> None:
        """Of three admins who remove each other at once, at least one is left."""
        for a, b, c in self.rounds():
            self.race(
                partial(self.patch, b, a, admin=False),
                partial(self.patch, c, b, active=False),
                partial(self.delete, a, c),
            )

    def test_both_of_two(self) -> None:
        """Of two admins who demote each other at once, the second is an admin no longer."""
        for a, b, c in self.rounds():
            self.assertEqual(200, self.delete(c, a).status_code)
            answers = at_once(
                partial(self.patch, b, a, admin=False), partial(self.patch, a, b, admin=False)
            )

            self.assertEqual({200, 403}, {answer.status_code for answer in answers})
            self.assertEqual(1, len(self.admins()))
