"""Requests that meet: whatever the order of the answers, an ended session stays ended."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any, ClassVar
from unittest import mock

from werkzeug.test import TestResponse

from project import accounts, db
from project.tests.base import BaseTestCase, bearer
from project.tests.utils import ORIGIN, stored_sessions

ROUNDS = 8  # of each race, each with a user of its own
AT_ONCE = 20
MEETING = 10  # seconds for all to be at the barrier
MOST = 100  # requests of one thread, should nothing stop it

Refusal = tuple[int, str, str]
Pair = dict[str, Any]  # the answer to a login, registration or refresh

ENDED = (401, "Invalid token. Please log in again.", "session_ended")
REUSED = (401, "Invalid token. Please log in again.", "refresh_reused")
INACTIVE = (401, "Something went wrong. Please contact us.", "account_inactive")
UNKNOWN = (404, "User does not exist.", "invalid_credentials")
WRONG_PASSWORD = (400, "Current password is wrong.", "wrong_password")


def at_once(*actions: Callable[[], Any]) -> list[Any]:
    """Return what the actions return, in their order, when threads begin all in one moment."""
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], Any]) -> Any:
        barrier.wait(MEETING)
        return action()

    with ThreadPoolExecutor(len(actions)) as threads:
        return list(threads.map(run, actions))


class RacesTestCase(BaseTestCase):
    """A test of what many clients send at once."""

    settings: ClassVar[dict[str, Any]] = {"TOKEN_EXPIRATION_SECONDS": 900}

    def setUp(self) -> None:
        """Begin with nobody."""
        super().setUp()
        self.email = ""  # of the user of this round

    def rounds(self) -> Iterator[Pair]:
        """Register a new user ROUNDS times, and give the tokens of each."""
        for number in range(ROUNDS):
            self.email = f"user{number}@test.com"
            user = {"username": f"user{number}", "email": self.email, "password": "test"}
            with self.subTest(round=number):
                yield self.accepted(self.send("/auth/register", user), 201)

    def send(
        self, path: str, body: object = None, token: str | None = None, method: str = "POST"
    ) -> TestResponse:
        """Return the answer to a client of its own; it is never a 5xx."""
        headers = bearer(token) if token else {}
        client = self.app.test_client()
        response = client.open(path, method=method, json=body, headers=headers)
        self.assertLess(response.status_code, 500, response.get_data(as_text=True))
        return response

    def refresh(self, pair: Pair) -> TestResponse:
        """Return the answer to the refresh token of `pair`."""
        return self.send("/auth/refresh", {"refresh_token": pair["refresh_token"]})

    def refresh_until(self, refusal: Refusal, pair: Pair) -> list[Pair]:
        """Return the pairs that follow each other from `pair` on, until this refusal."""
        pairs = [pair]
        for _ in range(MOST):
            response = self.refresh(pairs[-1])
            if response.status_code != 200:
                self.assert_error(response, *refusal)
                break
            pairs.append(response.get_json())
        return pairs

    def log_in(self, password: str = "test") -> TestResponse:
        """Return the answer to a login of this round's user."""
        return self.send("/auth/login", {"email": self.email, "password": password})

    def log_in_until(self, refusal: Refusal) -> list[Pair]:
        """Return the pairs of logins that come one after the other, until this refusal."""
        pairs: list[Pair] = []
        for _ in range(MOST):
            response = self.log_in()
            if response.status_code != 200:
                self.assert_error(response, *refusal)
                break
            pairs.append(response.get_json())
        return pairs

    def log_out(self, pair: Pair, query: str = "") -> TestResponse:
        """Return the answer to a logout."""
        return self.send(f"/auth/logout{query}", token=pair["auth_token"])

    def change_password(self, pair: Pair, new: str) -> TestResponse:
        """Return the answer to a change of the password that everybody has here."""
        body = {"current_password": "test", "new_password": new}
        return self.send("/auth/password", body, pair["auth_token"])

    def deactivate(self) -> None:
        """Deactivate this round's user as the command line does, in a context of its own."""
        with self.app.app_context():
            accounts.set_active(self.email, False, ORIGIN)
            db.session.commit()

    def accepted(self, response: TestResponse, status: int = 200) -> Pair:
        """Return what an answer holds that has to be a success."""
        self.assertEqual(status, response.status_code, response.get_data(as_text=True))
        pair: Pair = response.get_json()
        return pair

    def assert_refused(self, refusal: Refusal, *pairs: Pair) -> None:
        """Check that neither token of any pair is good for anything."""
        for pair in pairs:
            self.assert_error(self.get("/auth/status", pair["auth_token"]), *refusal)
            self.assert_error(self.refresh(pair), *refusal)

    def assert_live(self, *pairs: Pair) -> None:
        """Check that both tokens of each pair are good, and what the refresh token gives is."""
        for pair in pairs:
            self.accepted(self.get("/auth/status", pair["auth_token"]))
            successor = self.accepted(self.refresh(pair))
            self.accepted(self.get("/auth/status", successor["auth_token"]))


class TestSessionRaces(RacesTestCase):
    """What ends a session, against what prolongs it or starts one."""

    def test_refreshes(self) -> None:
        """Of twenty refreshes with one token none is lost and none doubled: all get one pair."""
        for pair in self.rounds():
            answers = at_once(*[partial(self.refresh, pair)] * AT_ONCE)

            pairs = [self.accepted(answer) for answer in answers]
            tokens = {(each["auth_token"], each["refresh_token"]) for each in pairs}
            self.assertEqual(1, len(tokens))
            self.assertEqual(1, stored_sessions()[-1]["generation"])
            self.assert_live(pairs[0])
            self.assertEqual(2, stored_sessions()[-1]["generation"])

    def test_logout_against_refresh(self) -> None:
        """A logout ends the session, tokens that a refresh gives out meanwhile included."""
        for pair in self.rounds():
            logout, pairs = at_once(
                partial(self.log_out, pair), partial(self.refresh_until, ENDED, pair)
            )

            self.accepted(logout)
            self.assert_refused(ENDED, *pairs)

    def test_logout_everywhere_against_login(self) -> None:
        """A login is before a logout of all sessions, and ended, or after it, and live."""
        for pair in self.rounds():
            logout, *logins = at_once(partial(self.log_out, pair, "?scope=all"), *[self.log_in] * 4)

            self.accepted(logout)
            self.assert_refused(ENDED, pair)
            for login in map(self.accepted, logins):
                if self.get("/auth/status", login["auth_token"]).status_code == 200:
                    self.assert_live(login)
                else:
                    self.assert_refused(ENDED, login)

    def test_password_change_against_refresh(self) -> None:
        """Another password ends other sessions in the middle of a refresh, and not its own."""
        for pair in self.rounds():
            other = self.accepted(self.log_in())

            change, own, others = at_once(
                partial(self.change_password, pair, "another"),
                partial(self.refresh, pair),
                partial(self.refresh_until, ENDED, other),
            )

            self.accepted(change)
            self.assert_refused(ENDED, *others)
            self.assert_live(self.accepted(own))

    def test_password_change_against_login(self) -> None:
        """Who logs in with the old password while it changes has no session afterwards."""
        for pair in self.rounds():
            change, *logins = at_once(
                partial(self.change_password, pair, "another"),
                *[partial(self.log_in_until, UNKNOWN)] * 3,
            )

            self.accepted(change)
            self.assert_refused(ENDED, *chain(*logins))
            self.assert_live(pair, self.accepted(self.log_in("another")))

    def test_password_changes(self) -> None:
        """Of two who change one password at once, one does; the other is told it was wrong."""
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
            refusal = WRONG_PASSWORD if statuses[loser] == 400 else ENDED
            self.assert_error(answers[loser], *refusal)
            self.assert_refused(ENDED, pairs[loser])
            self.assert_error(self.log_in(f"new-{loser}"), *UNKNOWN)
            self.assert_live(pairs[winner], self.accepted(self.log_in(f"new-{winner}")))

    def test_deactivation_against_refresh_and_login(self) -> None:
        """Who is deactivated has nothing left, and gets nothing back with their access."""
        for pair in self.rounds():
            _, *given = at_once(
                self.deactivate,
                partial(self.refresh_until, INACTIVE, pair),
                *[partial(self.log_in_until, INACTIVE)] * 2,
            )

            pairs = list(chain(*given))
            self.assert_refused(INACTIVE, *pairs)
            accounts.set_active(self.email, True, ORIGIN)
            db.session.commit()
            self.assert_refused(ENDED, *pairs)
            self.assert_live(self.accepted(self.log_in()))

    def test_logins(self) -> None:
        """Two logins at once are two sessions, and both live."""
        for pair in self.rounds():
            pairs = [self.accepted(login) for login in at_once(self.log_in, self.log_in)]

            listed = self.get("/auth/sessions", pair["auth_token"]).get_json()["data"]["sessions"]
            self.assertEqual(3, len({session["id"] for session in listed}))
            self.assert_live(pair, *pairs)

    def test_logins_that_renew_the_hash(self) -> None:
        """Two logins at once, each of which finds the hash too cheap, both succeed."""
        rounds = self.app.config["BCRYPT_LOG_ROUNDS"]
        for pair in self.rounds():
            with mock.patch.dict(self.app.config, BCRYPT_LOG_ROUNDS=rounds + 1):
                logins = at_once(self.log_in, self.log_in)

            self.assert_live(pair, *[self.accepted(login) for login in logins])

    def test_theft_against_refresh(self) -> None:
        """A token that comes back late ends the session under whoever has its successor."""
        self.move_clock(0)
        for pair in self.rounds():
            successor = self.accepted(self.refresh(pair))
            self.move_clock(11)

            with mock.patch("project.audit.log") as log:
                theft, pairs = at_once(
                    partial(self.refresh, pair), partial(self.refresh_until, ENDED, successor)
                )

            self.assert_error(theft, *REUSED)
            self.assertEqual(["refresh_reused"], [call.args[0] for call in log.warning.mock_calls])
            self.assert_refused(ENDED, pair, *pairs)
