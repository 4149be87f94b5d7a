"""Concurrent requests: whatever the order of the responses, an ended session stays ended."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any, ClassVar
from unittest import mock

import pyotp
from sqlalchemy import delete, text, update
from werkzeug.test import TestResponse

from project import clock, db, errors
from project.accounts import administration, links, rate_limits
from project.accounts.sessions import end_all
from project.lib import database
from project.models import KnownAddress, User
from project.tests.accounts.cases import at_once
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import (
    ORIGIN,
    add_user,
    start_session,
    stored_events,
    stored_sessions,
    stored_users,
)
from project.tokens.links import Purpose

ROUNDS = 8  # of each race, each with a new user
AT_ONCE = 20
MAX_REQUESTS = 100  # of one thread that is never refused

Refusal = type[errors.ServiceError]
Pair = dict[str, Any]  # the answer to a login, registration or refresh


class RacesTestCase(BaseTestCase):
    """A test of requests that many clients send at once."""

    settings: ClassVar[dict[str, Any]] = {"TOKEN_EXPIRATION_SECONDS": 900}

    def setUp(self) -> None:
        """Start without a user."""
        super().setUp()
        self.email = ""  # of this round's user

    def rounds(self) -> Iterator[Pair]:
        """Register a new user ROUNDS times, and yield the tokens of each."""
        for number in range(ROUNDS):
            self.email = f"user{number}@test.com"
            user = {"username": f"user{number}", "email": self.email, "password": "test"}
            with self.subTest(round=number):
                yield self.accepted(self.send("/auth/register", user), 201)

    def send(
        self, path: str, body: object = None, token: str | None = None, method: str = "POST"
    ) -> TestResponse:
        """Return the response to a client of its own; it is never a 5xx."""
        headers = bearer(token) if token else {}
        client = self.app.test_client()
        response = client.open(path, method=method, json=body, headers=headers)
        self.assertLess(response.status_code, 500, response.get_data(as_text=True))
        return response

    def refresh(self, pair: Pair) -> TestResponse:
        """Return the response to the refresh token of `pair`."""
        return self.send("/auth/refresh", {"refresh_token": pair["refresh_token"]})

    def refresh_until(self, refusal: Refusal, pair: Pair) -> list[Pair]:
        """Refresh again and again, starting with `pair`, until this refusal; return all pairs."""
        pairs = [pair]
        for _ in range(MAX_REQUESTS):
            response = self.refresh(pairs[-1])
            if response.status_code != 200:
                self.assert_error(response, refusal)
                break
            pairs.append(response.get_json())
        return pairs

    def log_in(self, password: str = "test") -> TestResponse:
        """Return the response to a login of this round's user."""
        return self.send("/auth/login", {"email": self.email, "password": password})

    def log_in_until(self, refusal: Refusal) -> list[Pair]:
        """Log in again and again until this refusal; return all pairs."""
        pairs: list[Pair] = []
        for _ in range(MAX_REQUESTS):
            response = self.log_in()
            if response.status_code != 200:
                self.assert_error(response, refusal)
                break
            pairs.append(response.get_json())
        return pairs

    def log_out(self, pair: Pair, query: str = "") -> TestResponse:
        """Return the response to a logout."""
        return self.send(f"/auth/logout{query}", token=pair["auth_token"])

    def change_password(self, pair: Pair, new: str) -> TestResponse:
        """Return the response to a change from the password that every user here has."""
        body = {"current_password": "test", "new_password": new}
        return self.send("/auth/password", body, pair["auth_token"])

    def deactivate(self) -> None:
        """Deactivate this round's user as the command line does, in a context of its own."""
        with self.app.app_context():
            administration.set_active(self.email, False, ORIGIN)
            db.session.commit()

    def accepted(self, response: TestResponse, status: int = 200) -> Pair:
        """Check that a response is a success, and return its body."""
        self.assertEqual(status, response.status_code, response.get_data(as_text=True))
        pair: Pair = response.get_json()
        return pair

    def assert_refused(self, refusal: Refusal, *pairs: Pair) -> None:
        """Check that both tokens of each pair are refused."""
        for pair in pairs:
            self.assert_error(self.get("/auth/status", pair["auth_token"]), refusal)
            self.assert_error(self.refresh(pair), refusal)

    def assert_live(self, *pairs: Pair) -> None:
        """Check that both tokens of each pair are accepted, and those that a refresh returns."""
        for pair in pairs:
            self.accepted(self.get("/auth/status", pair["auth_token"]))
            successor = self.accepted(self.refresh(pair))
            self.accepted(self.get("/auth/status", successor["auth_token"]))


class TestSessionRaces(RacesTestCase):
    """Requests that end a session, against those that prolong or start one."""

    def test_refreshes(self) -> None:
        """Twenty simultaneous refreshes with one token all return the same pair."""
        for pair in self.rounds():
            answers = at_once(*[partial(self.refresh, pair)] * AT_ONCE)

            pairs = [self.accepted(answer) for answer in answers]
            tokens = {(each["auth_token"], each["refresh_token"]) for each in pairs}
            self.assertEqual(1, len(tokens))
            self.assertEqual(1, stored_sessions()[-1]["generation"])
            self.assert_live(pairs[0])
            self.assertEqual(2, stored_sessions()[-1]["generation"])

    def test_logout_against_refresh(self) -> None:
        """A logout also ends the tokens that a simultaneous refresh returns."""
        for pair in self.rounds():
            logout, pairs = at_once(
                partial(self.log_out, pair), partial(self.refresh_until, errors.SessionEnded, pair)
            )

            self.accepted(logout)
            self.assert_refused(errors.SessionEnded, *pairs)

    def test_logout_everywhere_against_login(self) -> None:
        """A login comes before a logout of all sessions and is ended, or after it and lives."""
        for pair in self.rounds():
            logout, *logins = at_once(partial(self.log_out, pair, "?scope=all"), *[self.log_in] * 4)

            self.accepted(logout)
            self.assert_refused(errors.SessionEnded, pair)
            for login in map(self.accepted, logins):
                if self.get("/auth/status", login["auth_token"]).status_code == 200:
                    self.assert_live(login)
                else:
                    self.assert_refused(errors.SessionEnded, login)

    def test_password_change_against_refresh(self) -> None:
        """A password change ends other sessions during a refresh, and keeps its own."""
        for pair in self.rounds():
            other = self.accepted(self.log_in())

            change, own, others = at_once(
                partial(self.change_password, pair, "another"),
                partial(self.refresh, pair),
                partial(self.refresh_until, errors.SessionEnded, other),
            )

            self.accepted(change)
            self.assert_refused(errors.SessionEnded, *others)
            self.assert_live(self.accepted(own))

    def test_password_change_against_login(self) -> None:
        """A login with the old password during the change leaves no session."""
        for pair in self.rounds():
            change, *logins = at_once(
                partial(self.change_password, pair, "another"),
                *[partial(self.log_in_until, errors.InvalidCredentials)] * 3,
            )

            self.accepted(change)
            self.assert_refused(errors.SessionEnded, *chain(*logins))
            self.assert_live(pair, self.accepted(self.log_in("another")))

    def test_password_changes(self) -> None:
        """Of two simultaneous password changes, one succeeds and the other is refused."""
        for pair in self.rounds():
            pairs = [pair, self.accepted(self.log_in())]

            answers = at_once(
                partial(self.change_password, pairs[0], "new-0"),
                partial(self.change_password, pairs[1], "new-1"),
            )

            statuses = [answer.status_code for answer in answers]
            self.assertEqual(1, statuses.count(200), statuses)
            winner = statuses.index(200)
            loser = 1 - winner
            refusal = errors.WrongPassword if statuses[loser] == 400 else errors.SessionEnded
            self.assert_error(answers[loser], refusal)
            self.assert_refused(errors.SessionEnded, pairs[loser])
            self.assert_error(self.log_in(f"new-{loser}"), errors.InvalidCredentials)
            self.assert_live(pairs[winner], self.accepted(self.log_in(f"new-{winner}")))

    def test_deactivation_against_refresh_and_login(self) -> None:
        """A deactivated user has no session left; activation restores none."""
        for pair in self.rounds():
            _, *given = at_once(
                self.deactivate,
                partial(self.refresh_until, errors.AccountInactive, pair),
                *[partial(self.log_in_until, errors.AccountInactive)] * 2,
            )

            pairs = list(chain(*given))
            self.assert_refused(errors.AccountInactive, *pairs)
            administration.set_active(self.email, True, ORIGIN)
            db.session.commit()
            self.assert_refused(errors.SessionEnded, *pairs)
            self.assert_live(self.accepted(self.log_in()))

    def test_logins(self) -> None:
        """Two simultaneous logins are two sessions, and both live."""
        for pair in self.rounds():
            pairs = [self.accepted(login) for login in at_once(self.log_in, self.log_in)]

            listed = self.get("/auth/sessions", pair["auth_token"]).get_json()["data"]["sessions"]
            self.assertEqual(3, len({session["id"] for session in listed}))
            self.assert_live(pair, *pairs)

    def test_logins_that_renew_the_hash(self) -> None:
        """Two simultaneous logins that both renew the hash both succeed."""
        rounds = self.app.config["BCRYPT_LOG_ROUNDS"]
        for pair in self.rounds():
            with mock.patch.dict(self.app.config, BCRYPT_LOG_ROUNDS=rounds + 1):
                logins = at_once(self.log_in, self.log_in)

            self.assert_live(pair, *[self.accepted(login) for login in logins])

    def test_theft_against_refresh(self) -> None:
        """A reused refresh token ends the session even while its successor is being refreshed."""
        self.move_clock(0)
        for pair in self.rounds():
            successor = self.accepted(self.refresh(pair))
            self.move_clock(31)

            with mock.patch("project.accounts.audit.log") as log:
                theft, pairs = at_once(
                    partial(self.refresh, pair),
                    partial(self.refresh_until, errors.SessionEnded, successor),
                )

            self.assert_error(theft, errors.RefreshReused)
            self.assertEqual(["refresh_reused"], [call.args[0] for call in log.warning.mock_calls])
            self.assert_refused(errors.SessionEnded, pair, *pairs)


class AdministrationRacesTestCase(RacesTestCase):
    """A test with a user and an admin, who change or delete the same user at once."""

    def rounds(self) -> Iterator[Pair]:
        """Register a new user ROUNDS times, beside one admin, and yield the tokens of each."""
        admin = add_user("admin", "admin@test.com", "test", admin=True)
        self.admin = start_session(admin).auth_token
        for pair in super().rounds():
            self.path = f"/users/{stored_users()[-1]['id']}"
            yield pair

    def change(self, pair: Pair, **body: object) -> TestResponse:
        """Return the response to the user who changes their own account."""
        body |= {"current_password": "test"}
        return self.send(self.path, body, pair["auth_token"], "PATCH")

    def change_as_admin(self, **body: object) -> TestResponse:
        """Return the response to the admin who changes the user."""
        return self.send(self.path, body, self.admin, "PATCH")

    def delete(self) -> TestResponse:
        """Return the response to the admin who deletes the user."""
        return self.send(self.path, token=self.admin, method="DELETE")

    def delete_self(self, pair: Pair) -> TestResponse:
        """Return the response to the user who deletes their own account."""
        body = {"current_password": "test"}
        return self.send("/auth/account", body, pair["auth_token"], "DELETE")

    def codes(self, *answers: TestResponse) -> list[str]:
        """Return the code of each response; an empty string stands for a success."""
        return [answer.get_json().get("code", "") for answer in answers]


class TestAdministrationRaces(AdministrationRacesTestCase):
    """A user and an admin change or delete the same user at once."""

    def test_changes(self) -> None:
        """Simultaneous changes of two fields never mix, and each is an event."""
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
        """Of many requests for one username, one succeeds and the others are refused as taken."""
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
        """Return the response to a registration."""
        user = {"username": name, "email": f"{name}@test.com", "password": "test"}
        return self.send("/auth/register", user)

    def test_change_against_login(self) -> None:
        """A login with the old email is accepted before the change and refused after it."""
        for pair in self.rounds():
            email = f"new.{self.email}"
            change, logins = at_once(
                partial(self.change, pair, email=email),
                partial(self.log_in_until, errors.InvalidCredentials),
            )

            self.accepted(change)
            self.email = email
            self.assert_live(*logins, pair, self.accepted(self.log_in()))

    def test_deactivation_against_refresh_and_login(self) -> None:
        """A user whom an admin deactivates has no session left, as on the command line."""
        for pair in self.rounds():
            change, *given = at_once(
                partial(self.change_as_admin, active=False),
                partial(self.refresh_until, errors.AccountInactive, pair),
                *[partial(self.log_in_until, errors.AccountInactive)] * 2,
            )

            self.accepted(change)
            self.assert_refused(errors.AccountInactive, *chain(*given))

    def test_deactivation_with_a_new_name_against_refresh(self) -> None:
        """A user who is refreshing can be renamed and deactivated in one change."""
        for pair in self.rounds():
            names = {"username": f"x.{self.email}", "email": f"x.{self.email}"}
            pairs = pair, self.accepted(self.log_in()), self.accepted(self.log_in())
            refreshes = [
                partial(self.refresh_until, errors.AccountInactive, each) for each in pairs
            ]
            change, *given = at_once(
                partial(self.change_as_admin, active=False, **names), *refreshes
            )

            self.accepted(change)
            self.assert_refused(errors.AccountInactive, *chain(*given))

    def test_deletion_against_refresh_and_login(self) -> None:
        """A deleted user has no session left, and no event names them."""
        for pair in self.rounds():
            user_id = stored_users()[-1]["id"]
            deletion, refreshes, *logins = at_once(
                self.delete,
                partial(self.refresh_until, errors.AccountInactive, pair),
                *[partial(self.log_in_until, errors.InvalidCredentials)] * 2,
            )

            self.accepted(deletion)
            self.assert_refused(errors.AccountInactive, *refreshes, *chain(*logins))
            for row in stored_events():
                self.assertNotIn(user_id, (row["user_id"], row["actor_id"]), row)

    def test_deletions(self) -> None:
        """Of many deletions of one account, one succeeds, and it is recorded once."""
        for pair in self.rounds():
            known = len(stored_events())
            answers = at_once(*[self.delete] * 3, *[partial(self.delete_self, pair)] * 3)

            codes = self.codes(*answers)
            self.assertEqual(1, codes.count(""), codes)
            self.assertLessEqual(set(codes), {"", "user_not_found", "account_inactive"})
            (told,) = stored_events()[known:]
            self.assertIn(told["kind"], {"user_deleted", "account_deleted"})

    def test_deletion_against_changes(self) -> None:
        """A change is committed before the deletion, or finds no user."""
        for pair in self.rounds():
            deletion, *changes = at_once(
                partial(self.delete_self, pair),
                partial(self.change, pair, username="x"),
                partial(self.change_as_admin, email="x@test.com"),
            )

            self.accepted(deletion)
            self.assertLessEqual(
                set(self.codes(*changes)), {"", "user_not_found", "account_inactive"}
            )
            self.assertEqual(1, len(stored_users()))

    def test_deletion_against_registration(self) -> None:
        """A username that becomes free goes to at most one of the waiting registrations."""
        for number, pair in enumerate(self.rounds()):
            deletion, *answers = at_once(
                partial(self.delete_self, pair),
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


class TestLimitedRaces(AdministrationRacesTestCase):
    """Races with rate limits, which lock rows of their own, from unknown addresses."""

    settings: ClassVar[dict[str, Any]] = RacesTestCase.settings | {
        "RATE_LIMITS": True,
        "LOGIN_FAILURES_PER_ADDRESS": 1_000_000,
        "LOGIN_FAILURES_PER_ACCOUNT": 10_000,
        "REGISTRATIONS_PER_ADDRESS": 1_000_000,
    }

    def setUp(self) -> None:
        """Turn the limits on."""
        super().setUp()
        rate_limits.init_app(self.app)

    def forget_addresses(self) -> None:
        """Delete the known addresses, so that the counts of an address are used."""
        db.session.execute(delete(KnownAddress))
        db.session.commit()

    def test_rename_against_refreshes(self) -> None:
        """A user who is refreshing on several devices can change their own name."""
        for pair in self.rounds():
            pairs = [pair, *(self.accepted(self.log_in()) for _ in range(5))]
            self.forget_addresses()
            changed, *refreshed = at_once(
                partial(self.change, pair, username=f"x.{self.email}"),
                *[partial(self.refresh, each) for each in pairs],
            )

            for answer in (changed, *refreshed):
                self.accepted(answer)

    def test_deletion_against_refreshes(self) -> None:
        """A user who is refreshing on several devices can delete their account."""
        for pair in self.rounds():
            pairs = [pair, *(self.accepted(self.log_in()) for _ in range(5))]
            self.forget_addresses()
            deleted, *refreshed = at_once(
                partial(self.delete_self, pair), *[partial(self.refresh, each) for each in pairs]
            )

            self.accepted(deleted)
            self.assertLessEqual(set(self.codes(*refreshed)), {"", "account_inactive"})


def end_all_slowly(user_id: int, *, but: str | None = None) -> int:
    """End sessions after a while, so that a concurrent act gets as far as it can before."""
    time.sleep(0.1)
    return end_all(user_id, but=but)


class TestOrderOfLocks(RacesTestCase):
    """Acts that wait for a change of a name, of which one waits for the other afterwards."""

    def test_after_a_rename(self) -> None:
        """A refresh and an act that ends the session wait for a rename; neither fails."""
        if not self.on_postgresql:
            self.skipTest("SQLite has one lock")
        acts: dict[str, Callable[[Pair], object]] = {
            "password change": lambda pair: self.accepted(self.change_password(pair, "another")),
            "reset": self.reset,
            "deactivation": lambda _: self.deactivate(),
            "enrolment": self.confirm_totp,
            "reset of the second factor": self.reset_totp,
        }
        for number, (name, act) in enumerate(acts.items()):
            slowly = mock.patch("project.accounts.sessions.end_all", end_all_slowly)
            with self.subTest(name), ThreadPoolExecutor() as threads, slowly:
                self.email = f"user{number}@test.com"
                user = {"username": name, "email": self.email, "password": "test"}
                own = self.accepted(self.send("/auth/register", user), 201)
                self.begin_totp(own)
                other = self.accepted(self.log_in())
                if act == self.reset_totp:
                    self.confirm_totp(own)
                    other = own
                with db.engine.begin() as connection:
                    this_user = User.email == self.email
                    connection.execute(update(User).where(this_user).values(username_key="new"))
                    acting = threads.submit(act, own)
                    self.wait_for_waiting(1)
                    refreshing = threads.submit(self.refresh, other)
                    self.wait_for_waiting(2)
                    connection.execute(update(User).where(this_user).values(username_key=name))
                acting.result()
                self.assertIn(refreshing.result().status_code, {200, 401})

    def reset(self, _pair: Pair) -> None:
        """Reset the password of this round's user with a link."""
        with self.app.app_context():
            user: Any = links.user_by_email(self.email)
            url = links.for_user(Purpose.RESET, user, 60).url
        body = {"token": url.partition("token=")[2], "new_password": "another"}
        self.accepted(self.send("/auth/password/reset", body))

    def begin_totp(self, pair: Pair) -> None:
        """Begin to set an authenticator up."""
        begun = self.send("/auth/totp", {"current_password": "test"}, pair["auth_token"])
        self.secret = self.accepted(begun)["data"]["secret"]

    def confirm_totp(self, pair: Pair) -> None:
        """Turn the authenticator on."""
        body = {"code": pyotp.TOTP(self.secret).at(clock.utcnow())}
        self.accepted(self.send("/auth/totp/confirm", body, pair["auth_token"]))

    def reset_totp(self, _pair: Pair) -> None:
        """Turn the authenticator off, as the command line does."""
        with self.app.app_context():
            administration.reset_totp_of(self.email, ORIGIN)
            db.session.commit()

    def wait_for_waiting(self, number: int) -> None:
        """Wait until this many connections to the database wait for a lock."""
        query = text(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        deadline = time.monotonic() + 2
        while database.fetch_all(query)[0][0] < number:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)
