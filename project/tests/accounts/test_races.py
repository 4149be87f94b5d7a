"""Changes and deletions that meet each other, logins, refreshes and registrations."""

from collections.abc import Iterator
from functools import partial
from itertools import chain

from werkzeug.test import TestResponse

from project import audit, db
from project.tests.test_session_races import (
    AT_ONCE,
    INACTIVE,
    UNKNOWN,
    Pair,
    RacesTestCase,
    at_once,
)
from project.tests.utils import add_user, start_session, stored_events, stored_users


class TestCareRaces(RacesTestCase):
    """A user and an admin, who both change the user; the user may also go, and be about to."""

    def rounds(self) -> Iterator[Pair]:
        """Register a new user ROUNDS times, beside one admin, and give the tokens of each."""
        admin = add_user("admin", "admin@test.com", "test", admin=True)
        self.admin = start_session(admin).auth_token
        for pair in super().rounds():
            self.path = f"/users/{stored_users()[-1]['id']}"
            yield pair

    def change(self, pair: Pair, **body: object) -> TestResponse:
        """Return the answer to the user who changes themselves."""
        body |= {"current_password": "test"}
        return self.send(self.path, body, pair["auth_token"], "PATCH")

    def change_as_admin(self, **body: object) -> TestResponse:
        """Return the answer to the admin who changes the user."""
        return self.send(self.path, body, self.admin, "PATCH")

    def delete(self) -> TestResponse:
        """Return the answer to the admin who deletes the user."""
        return self.send(self.path, token=self.admin, method="DELETE")

    def leave(self, pair: Pair) -> TestResponse:
        """Return the answer to the user who deletes their account."""
        body = {"current_password": "test"}
        return self.send("/auth/account", body, pair["auth_token"], "DELETE")

    def codes(self, *answers: TestResponse) -> list[str]:
        """Return what the answers are: a code, or nothing for a success."""
        return [answer.get_json().get("code", "") for answer in answers]

    def test_changes(self) -> None:
        """Of changes of one field at once each is made whole; all are told."""
        for pair in self.rounds():
            known = len(stored_events())
            names = [f"{self.email}.{number}" for number in range(6)]
            answers = at_once(
                *[partial(self.change, pair, username=name, email=name) for name in names[:3]],
                *[partial(self.change_as_admin, username=name, email=name) for name in names[3:]],
            )

            self.assertEqual(6 * [""], self.codes(*answers))
            user = stored_users()[-1]
            self.assertEqual(user["username"], user["email"])
            self.assertIn(user["email"], names)
            told = [row["kind"] for row in stored_events()[known:]]
            self.assertEqual(6 * ["user_changed"], told)

    def test_one_name(self) -> None:
        """Of many who want one name at once, one gets it, and the others are told it is taken."""
        for number, pair in enumerate(self.rounds()):
            pairs = [pair] + [
                self.accepted(self.register(f"rival{number}-{rival}"), 201) for rival in range(4)
            ]
            paths = [f"/users/{user['id']}" for user in stored_users()[-5:]]
            wanted = {"username": f"wanted{number}", "current_password": "test"}
            answers = at_once(
                *[
                    partial(self.send, path, wanted, each["auth_token"], "PATCH")
                    for path, each in zip(paths, pairs, strict=True)
                ],
                partial(self.register, f"wanted{number}"),
            )

            statuses = [answer.status_code for answer in answers]
            self.assertEqual(1, statuses.count(200) + statuses.count(201), statuses)
            self.assertEqual(5, statuses.count(400), statuses)

    def register(self, name: str) -> TestResponse:  # type: ignore[override]  # the answer itself
        """Return the answer to a registration."""
        user = {"username": name, "email": f"{name}@test.com", "password": "test"}
        return self.send("/auth/register", user)

    def test_change_against_login(self) -> None:
        """A login with the email of before is good, or comes too late."""
        for pair in self.rounds():
            email = f"new.{self.email}"
            change, logins = at_once(
                partial(self.change, pair, email=email), partial(self.log_in_until, UNKNOWN)
            )

            self.accepted(change)
            self.email = email
            self.assert_live(*logins, pair, self.accepted(self.log_in()))

    def test_deactivation_against_refresh_and_login(self) -> None:
        """Who is deactivated by an admin has nothing left, as when an operator does it."""
        for pair in self.rounds():
            change, *given = at_once(
                partial(self.change_as_admin, active=False),
                partial(self.refresh_until, INACTIVE, pair),
                *[partial(self.log_in_until, INACTIVE)] * 2,
            )

            self.accepted(change)
            self.assert_refused(INACTIVE, *chain(*given))

    def test_deletion_against_refresh_and_login(self) -> None:
        """Who is deleted has nothing left, and no event has them once the late ones are seen to."""
        for pair in self.rounds():
            user_id = stored_users()[-1]["id"]
            deletion, refreshes, *logins = at_once(
                self.delete,
                partial(self.refresh_until, INACTIVE, pair),
                *[partial(self.log_in_until, UNKNOWN)] * 2,
            )

            self.accepted(deletion)
            self.assert_refused(INACTIVE, *refreshes, *chain(*logins))
            while audit.erase_rest():
                pass
            db.session.commit()
            for row in stored_events():
                self.assertNotIn(user_id, (row["user_id"], row["actor_id"]), row)

    def test_deletions(self) -> None:
        """Of many who delete one account at once one does, and that is told once."""
        for pair in self.rounds():
            known = len(stored_events())
            answers = at_once(*[self.delete] * 3, *[partial(self.leave, pair)] * 3)

            codes = self.codes(*answers)
            self.assertEqual(1, codes.count(""), codes)
            self.assertLessEqual(set(codes), {"", "user_not_found", "account_inactive"})
            (told,) = stored_events()[known:]
            self.assertIn(told["kind"], {"user_deleted", "account_deleted"})

    def test_deletion_against_changes(self) -> None:
        """A change is made before the deletion, or finds nobody."""
        for pair in self.rounds():
            deletion, *changes = at_once(
                partial(self.leave, pair),
                partial(self.change, pair, username="x"),
                partial(self.change_as_admin, email="x@test.com"),
            )

            self.accepted(deletion)
            self.assertLessEqual(
                set(self.codes(*changes)), {"", "user_not_found", "account_inactive"}
            )
            self.assertEqual(1, len(stored_users()))

    def test_deletion_against_registration(self) -> None:
        """A name that becomes free goes to one of those who wait for it."""
        for number, pair in enumerate(self.rounds()):
            deletion, *answers = at_once(
                partial(self.leave, pair),
                *[partial(self.register, f"user{number}")] * (AT_ONCE // 4),
            )

            self.accepted(deletion)
            statuses = [answer.status_code for answer in answers]
            self.assertLessEqual(statuses.count(201), 1)
            self.assertEqual(len(answers), statuses.count(201) + statuses.count(400))
            self.assertEqual(1 + statuses.count(201), len(stored_users()))
            for user in stored_users()[1:]:
                self.path = f"/users/{user['id']}"
                self.accepted(self.delete())
