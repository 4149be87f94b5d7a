"""The feed of ended sessions: whatever ends one, it appears there once, and no reader misses it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from unittest import mock

from sqlalchemy import delete, insert, text, update
from werkzeug.test import TestResponse

from project import clock, db, errors, ids
from project.accounts import administration, ended_sessions, links, sessions
from project.lib import database
from project.models import EndedSession, Session
from project.ops import users as commands
from project.tests.accounts.cases import at_once
from project.tests.base import bearer
from project.tests.rows import ORIGIN, add_user, start_session, stored_sessions
from project.tests.tokens.cases import (
    LIFETIME,
    IssuerTestCase,
    Pair,
    stored_ended,
    stored_keys,
)
from project.tests.tokens.claims import claims_of, session_of
from project.tokens.links import Purpose

EMAIL = "test@test.com"
PATH = "/oauth/revocations"
Way = Callable[[Pair, Pair], object]  # with two sessions of the user


class FeedTestCase(IssuerTestCase):
    """A test with a client that reads the feed."""

    def setUp(self) -> None:
        """Add the client, and an admin who is logged in."""
        super().setUp()
        self.reader = self.add_client()
        self.admin = start_session(add_user("admin", "admin@test.com", "test", admin=True))

    def send(self, method: str, path: str, token: str, **body: object) -> TestResponse:
        """Return the response to a user."""
        return self.client.open(path, method=method, json=body, headers=bearer(token))

    def ask(self, **query: object) -> TestResponse:
        """Return the response to a client that reads a page."""
        return self.app.test_client().get(PATH, query_string=query, headers=self.reader)

    def page(self, **query: object) -> tuple[list[str], str]:
        """Return the session IDs of a page, and its cursor."""
        data = self.accepted(self.ask(**query))["data"]
        return [each["sid"] for each in data["revocations"]], data["next"]

    def follow(self, after: str = "0", limit: int = 2) -> tuple[list[str], str]:
        """Read pages until one is empty; return the session IDs, and the cursor."""
        found: list[str] = []
        while True:
            more, following = self.page(after=after, limit=limit)
            if not more:
                return found, following
            self.assertNotEqual(after, following)
            found, after = found + more, following

    def add_sessions(self, number: int) -> list[str]:
        """Add sessions of the user, and return their IDs."""
        now = clock.utcnow()
        columns: dict[str, Any] = {
            "user_id": self.user.id,
            "generation": 0,
            "created_at": now,
            "last_used_at": now,
            "user_agent": "",
            "expires_at": now + timedelta(days=1),
            "token_expires_at": now + timedelta(seconds=LIFETIME),
        }
        added = [ids.new_session() for _ in range(number)]
        db.session.execute(insert(Session), [columns | {"id": each} for each in added])
        db.session.commit()
        return added

    def end_uncommitted(self, session_id: str) -> None:
        """End a session of the user, in a transaction that is not committed."""
        sessions.end(self.user.id, session_id, ORIGIN)

    def end_some(self, number: int) -> list[str]:
        """Add sessions, end them one by one, and return their IDs in the order of their end."""
        added = self.add_sessions(number)
        for session_id in added:
            self.move_clock(0.001)
            self.end_uncommitted(session_id)
            db.session.commit()
        return added

    def delete_expired(self) -> int:
        """Delete expired rows as `purge` does, and return how many."""
        total = 0
        while deleted := ended_sessions.delete_expired():
            db.session.commit()
            total += deleted
        db.session.rollback()
        return total


class TestWays(FeedTestCase):
    """Every way to end a session."""

    def assert_fed(self, way: Way, *ended: str) -> None:
        """Check that a way, with the sessions "own" and "other", ends some, and feeds these."""
        pairs = {"own": self.log_in(), "other": self.log_in()}
        named = {name: session_of(pair["auth_token"]) for name, pair in pairs.items()}
        before = {row["id"] for row in stored_sessions()}

        way(pairs["own"], pairs["other"])

        gone = before - {row["id"] for row in stored_sessions()}
        self.assertEqual({named[name] for name in ended}, gone)
        for limit in (1, 1_000):
            found, after = self.follow(limit=limit)
            self.assertEqual(sorted(gone), sorted(found))
        self.assertEqual(([], after), self.page(after=after))
        for row in stored_ended():
            self.assertEqual(clock.utcnow(), row["ended_at"])
            self.assertEqual(clock.utcnow() + timedelta(seconds=LIFETIME), row["expires_at"])

    def test_logout(self) -> None:
        """A logout ends the session."""
        self.assert_fed(
            lambda own, _: self.accepted(self.send("POST", "/auth/logout", own["auth_token"])),
            "own",
        )

    def test_logout_of_others(self) -> None:
        """A logout of all other sessions ends these."""
        path = "/auth/logout?scope=others"
        self.assert_fed(
            lambda own, _: self.accepted(self.send("POST", path, own["auth_token"])), "other"
        )

    def test_logout_of_all(self) -> None:
        """A logout of all sessions ends all."""
        path = "/auth/logout?scope=all"
        self.assert_fed(
            lambda own, _: self.accepted(self.send("POST", path, own["auth_token"])),
            "own",
            "other",
        )

    def test_one_session(self) -> None:
        """A user ends one session from another one; a second time is no other row."""

        def way(own: Pair, other: Pair) -> None:
            path = f"/auth/sessions/{session_of(other['auth_token'])}"
            self.accepted(self.send("DELETE", path, own["auth_token"]))
            refused = self.send("DELETE", path, own["auth_token"])
            self.assert_error(refused, errors.SessionNotFound)

        self.assert_fed(way, "other")

    def test_password_change(self) -> None:
        """A change of the password ends the other sessions."""
        body = {"current_password": "test", "new_password": "another"}
        self.assert_fed(
            lambda own, _: self.accepted(
                self.send("POST", "/auth/password", own["auth_token"], **body)
            ),
            "other",
        )

    def test_password_reset(self) -> None:
        """A new password by a link ends all sessions."""

        def way(_own: Pair, _other: Pair) -> None:
            user: Any = links.user_by_email(EMAIL)
            token = links.for_user(Purpose.RESET, user, 60).url.partition("token=")[2]
            body = {"token": token, "new_password": "another"}
            self.accepted(self.client.post("/auth/password/reset", json=body))

        self.assert_fed(way, "own", "other")

    def test_reuse(self) -> None:
        """A refresh token that is used again later ends its session, once."""

        def way(own: Pair, _other: Pair) -> None:
            self.accepted(self.refresh(own))
            db.session.execute(update(Session).values(generation=2))
            db.session.commit()
            self.assert_error(self.refresh(own), errors.RefreshReused)
            self.assert_error(self.refresh(own), errors.SessionEnded)

        self.assert_fed(way, "own")

    def test_admin(self) -> None:
        """An admin who deactivates a user ends all their sessions."""
        path = f"/users/{self.user.id}"
        self.assert_fed(
            lambda _own, _other: self.accepted(
                self.send("PATCH", path, self.admin.auth_token, active=False)
            ),
            "own",
            "other",
        )

    def test_commands(self) -> None:
        """The commands that deactivate and activate a user or end sessions end all."""
        for command in (commands.end_sessions, commands.activate, commands.deactivate):

            def way(_own: Pair, _other: Pair, do: Callable[[str], None] = command) -> None:
                do(EMAIL)

            with self.subTest(command.__name__):
                db.session.execute(delete(EndedSession))
                db.session.commit()
                self.assert_fed(way, "own", "other")

    def test_deletion_by_admin(self) -> None:
        """An admin who deletes a user ends all their sessions."""
        path = f"/users/{self.user.id}"
        self.assert_fed(
            lambda _own, _other: self.accepted(self.send("DELETE", path, self.admin.auth_token)),
            "own",
            "other",
        )

    def test_deletion_by_user(self) -> None:
        """A user who deletes their account ends all their sessions."""
        body = {"current_password": "test"}
        self.assert_fed(
            lambda own, _: self.accepted(
                self.send("DELETE", "/auth/account", own["auth_token"], **body)
            ),
            "own",
            "other",
        )

    def test_revocation(self) -> None:
        """A client that revokes either token of a session ends it, once."""
        for name in ("auth_token", "refresh_token"):

            def way(own: Pair, _other: Pair, name: str = name) -> None:
                for _ in range(2):
                    form = {"token": own[name]}
                    self.accepted(self.client.post("/oauth/revoke", data=form, headers=self.reader))

            with self.subTest(name):
                db.session.execute(delete(EndedSession))
                db.session.commit()
                self.assert_fed(way, "own")

    def test_at_once(self) -> None:
        """Of many requests that end one session at once, each is answered, and it is fed once."""
        for _ in range(4):
            own, other = self.log_in(), self.log_in()
            path = f"/auth/sessions/{session_of(own['auth_token'])}"
            form = {"token": own["refresh_token"]}
            answers = at_once(
                *[partial(self.send, "DELETE", path, other["auth_token"])] * 2,
                *[partial(self.send, "POST", "/auth/logout", own["auth_token"])] * 2,
                *[partial(self.client.post, "/oauth/revoke", data=form, headers=self.reader)] * 2,
                partial(self.send, "POST", "/auth/logout?scope=others", other["auth_token"]),
            )

            self.assertLessEqual({answer.status_code for answer in answers}, {200, 401, 404})
            found, _ = self.follow()
            self.assertEqual(1, found.count(session_of(own["auth_token"])))
            self.assertNotIn(session_of(other["auth_token"]), found)


class TestRows(FeedTestCase):
    """Which sessions are fed, and until when."""

    def end_all(self) -> list[dict[str, Any]]:
        """End all sessions of the user, and return the rows of the feed."""
        administration.end_sessions(EMAIL, ORIGIN)
        db.session.commit()
        return stored_ended()

    def expires_at(self) -> datetime:
        """End the session of the user; return until when its row says that it is needed."""
        (ended,) = self.end_all()
        moment: datetime = ended["expires_at"]
        return moment

    def test_without_issuer(self) -> None:
        """Without ISSUER nothing is written to the tables for other services."""
        keys = stored_keys()
        server = self.server(ISSUER="")
        for path in ("/auth/logout", "/auth/logout?scope=all"):
            pair = self.log_in(server)
            self.accepted(server.post(path, headers=bearer(pair["auth_token"])))
        self.log_in(server)
        with server.application.app_context():
            administration.set_active(EMAIL, False, ORIGIN)
            db.session.commit()

        self.assertEqual(([], keys), (stored_ended(), stored_keys()))
        self.assertEqual(1, len(stored_sessions()), "that of the admin")

    def test_last_moment(self) -> None:
        """A session is fed as long as its auth token has not expired."""
        self.log_in()
        self.move_clock(LIFETIME - 0.000001)

        self.assertEqual(1, len(self.end_all()))

    def test_expired_token(self) -> None:
        """A session whose auth token has expired is not fed, even if it could be refreshed."""
        self.log_in()
        self.move_clock(LIFETIME)

        self.assertEqual([], self.end_all())
        self.assertEqual(([], "0"), self.page())

    def test_refreshed(self) -> None:
        """The last auth token of the session decides."""
        pair = self.log_in()
        self.move_clock(LIFETIME - 1)
        last = self.accepted(self.refresh(pair))
        self.move_clock(2)

        exp = claims_of(last["auth_token"])["exp"]
        self.assertEqual(exp, int(self.expires_at().timestamp()))

    def test_end_of_the_session(self) -> None:
        """A token that ends with its session is not remembered for longer."""
        self.app.config["SESSION_EXPIRATION_SECONDS"] = LIFETIME // 2
        exp = claims_of(self.log_in()["auth_token"])["exp"]

        self.assertEqual(exp, int(self.expires_at().timestamp()))

    def test_shorter_lifetime(self) -> None:
        """An earlier token counts if it is valid for longer, after the setting was lowered."""
        pair = self.log_in()
        self.app.config["TOKEN_EXPIRATION_SECONDS"] = 60
        self.accepted(self.refresh(pair))

        exp = claims_of(pair["auth_token"])["exp"]
        self.assertEqual(exp, int(self.expires_at().timestamp()))

    def test_session_from_before(self) -> None:
        """A session from before the column is fed as long as it would have lived."""
        self.log_in()
        db.session.execute(update(Session).values(token_expires_at=None))
        db.session.commit()
        ends = [row["expires_at"] for row in stored_sessions() if row["user_id"] == self.user.id]

        self.assertEqual(ends, [self.expires_at()])

    def test_refresh_of_a_session_from_before(self) -> None:
        """A session from before the column gets the end of its next token."""
        pair = self.log_in()
        db.session.execute(update(Session).values(token_expires_at=None))
        db.session.commit()
        self.accepted(self.refresh(pair))

        self.assertEqual(clock.utcnow() + timedelta(seconds=LIFETIME), self.expires_at())

    def test_refused_change(self) -> None:
        """A change that is refused after it has ended sessions leaves no row."""
        self.log_in()
        body = {"active": False, "username": "other"}
        response = self.send("PATCH", f"/users/{self.user.id}", self.admin.auth_token, **body)

        self.assert_error(response, errors.InvalidPayload)
        self.assertEqual([], stored_ended())
        self.assertEqual([], self.follow()[0])

    def test_rolled_back(self) -> None:
        """A request that fails after it has ended sessions leaves no row."""
        own = self.log_in()["auth_token"]
        failing = mock.patch("project.accounts.audit.anonymize", side_effect=KeyError)
        with failing, self.assert_nothing_changes():
            response = self.send("DELETE", f"/users/{self.user.id}", self.admin.auth_token)

        self.assert_error(response, errors.InternalError)
        self.assertEqual([], stored_ended())
        self.accepted(self.status(own))

    def test_no_session(self) -> None:
        """Ending nothing feeds nothing."""
        self.assertEqual([], self.end_all())


class TestCursor(FeedTestCase):
    """Cursors: what follows one is new, also after a purge or a restore."""

    def test_order(self) -> None:
        """Sessions are in the order in which they ended."""
        ended = self.end_some(7)

        for limit in (1, 3, 7, 1_000):
            self.assertEqual(ended, self.follow(limit=limit)[0])

    def test_repeated(self) -> None:
        """The same cursor gives the same page, which later sessions continue."""
        first = self.end_some(3)
        page = self.page(limit=2)
        self.assertEqual(first[:2], page[0])
        second = self.end_some(2)

        self.assertEqual(page, self.page(limit=2))
        self.assertEqual(first[2:] + second, self.follow(page[1])[0])

    def test_many(self) -> None:
        """A feed that nobody has read for long is read from its beginning, in many pages."""
        now = clock.utcnow()
        columns = {"ended_at": now, "expires_at": now + timedelta(seconds=60)}
        added = [ids.new_session() for _ in range(ended_sessions.NUMBERED_AT_ONCE + 1_500)]
        db.session.execute(insert(EndedSession), [columns | {"session_id": each} for each in added])
        db.session.commit()

        found, _ = self.follow(limit=1_000)

        self.assertEqual(sorted(added), sorted(found))

    def test_purge(self) -> None:
        """A purge deletes expired rows except for the last one; cursors go on working."""
        self.end_some(3)
        _, after = self.follow()
        _, early = self.page(limit=1)
        self.move_clock(LIFETIME - 1)
        later = self.end_some(2)
        self.follow()
        self.move_clock(1)
        self.assertEqual(3, self.delete_expired())
        for cursor in ("0", early, after):
            self.assertEqual(later, self.follow(cursor)[0])
        _, last = self.follow()

        self.move_clock(LIFETIME)
        self.assertEqual(1, self.delete_expired())
        (kept,) = stored_ended()
        self.assertEqual(later[-1], kept["session_id"])
        for cursor in ("0", early, after, last):
            self.assertEqual(([], cursor), self.page(after=cursor))
        newest = self.end_some(2)
        for cursor in ("0", early, after, last):
            self.assertEqual(newest, self.follow(cursor)[0])

    def test_purge_of_unread_rows(self) -> None:
        """Rows that nobody has read are deleted when they expire, and not before."""
        self.end_some(2)
        self.move_clock(1)
        (last,) = self.end_some(1)
        self.move_clock(LIFETIME - 2)
        self.assertEqual(0, self.delete_expired())
        self.move_clock(1)
        self.assertEqual(2, self.delete_expired())
        self.assertEqual([last], [row["session_id"] for row in stored_ended()])
        self.move_clock(1.1)
        self.assertEqual(1, self.delete_expired())
        self.assertEqual([], stored_ended())

    def test_restore(self) -> None:
        """After a restore a cursor of lost rows is refused; none hides what happens later."""
        self.end_some(2)
        _, kept = self.follow()
        lost = self.end_some(3)
        _, after = self.follow()
        db.session.execute(delete(EndedSession).where(EndedSession.session_id.in_(lost)))
        db.session.commit()

        data = self.assert_error(self.ask(after=after), errors.InvalidPayload)
        self.assertEqual(["after"], list(data["errors"]))
        self.assertEqual([], self.page(after=kept)[0])
        later = self.end_some(2)
        self.assertEqual(later, self.follow(after)[0])
        self.assertEqual(later, self.follow(kept)[0])

    def test_empty_restore(self) -> None:
        """A cursor is refused by a feed that is empty, which begins at 0."""
        self.end_some(1)
        _, after = self.follow()
        db.session.execute(delete(EndedSession))
        db.session.commit()

        self.assert_error(self.ask(after=after), errors.InvalidPayload)
        self.assertEqual(([], "0"), self.page())
        self.assertEqual(([], "0"), self.page(after="0"))

    def test_clock_set_back(self) -> None:
        """When the clock is set back, later sessions still come after every cursor."""
        self.end_some(2)
        _, after = self.follow()
        self.move_clock(-3_600)
        later = self.end_some(2)

        self.assertEqual(later, self.follow(after)[0])


class TestConcurrency(FeedTestCase):
    """Readers and transactions that overlap."""

    @contextmanager
    def open_transaction(self) -> Iterator[None]:
        """Run a block with a database session of its own, which it commits itself."""
        with self.app.app_context():
            yield
            db.session.rollback()

    def test_late_commit(self) -> None:
        """A row of a transaction that is committed late comes after the cursors until then."""
        if not self.on_postgresql:
            self.skipTest("SQLite has one writer")
        early, late, later = self.add_sessions(3)
        with self.open_transaction():
            self.end_uncommitted(late)
            self.move_clock(1)
            with self.open_transaction():
                self.end_uncommitted(early)
                db.session.commit()
            found, after = self.follow()
            self.assertEqual([early], found)
            db.session.commit()
        self.end_uncommitted(later)
        db.session.commit()

        self.assertEqual([late, later], self.follow(after)[0])
        self.assertEqual([early, late, later], self.follow()[0])

    def test_many_late_commits(self) -> None:
        """Transactions that are committed in another order than they began in are all read."""
        if not self.on_postgresql:
            self.skipTest("SQLite has one writer")
        added = self.add_sessions(8)
        committed = [threading.Event() for _ in added]

        def end(number: int, barrier: threading.Barrier) -> None:
            with self.app.app_context():
                self.end_uncommitted(added[number])
                barrier.wait(10)
                committed[number].wait(10)
                db.session.commit()

        order = [5, 2, 7, 0, 1, 6, 3, 4]
        barrier = threading.Barrier(9)
        with ThreadPoolExecutor(8) as threads:
            ends = [threads.submit(end, number, barrier) for number in range(8)]
            barrier.wait(10)
            after = "0"
            for number in order:
                committed[number].set()
                ends[number].result()
                found, after = self.follow(after, limit=1)
                self.assertEqual([added[number]], found)
        self.assertEqual([added[number] for number in order], self.follow()[0])

    def test_reader_that_waits(self) -> None:
        """A reader waits while another one numbers rows, and then numbers the rest."""
        if not self.on_postgresql:
            self.skipTest("SQLite has one writer")
        for commits in (True, False):
            with self.subTest(commits=commits), ThreadPoolExecutor(1) as threads:
                _, after = self.follow()
                first = self.end_some(3)
                with self.open_transaction():
                    ended_sessions.number()
                    self.assertEqual([], ended_sessions.page(int(after), 2))
                    with self.open_transaction():
                        (last,) = self.end_some(1)
                    waiting = threads.submit(self.page, after=after)
                    self.wait_for_waiting()
                    (db.session.commit if commits else db.session.rollback)()
                self.assertEqual([*first, last], waiting.result()[0])
                self.assertEqual([*first, last], self.follow(after)[0])

    def test_refresh_before_the_end(self) -> None:
        """A session that is ended while it is being refreshed is fed until its new token ends."""
        if not self.on_postgresql:
            self.skipTest("SQLite has one writer")
        pair = self.log_in()
        self.move_clock(100)
        path = "/auth/logout?scope=all"
        with ThreadPoolExecutor(1) as threads:
            with self.open_transaction():
                following = sessions.refresh(pair["refresh_token"], ORIGIN)
                waiting = threads.submit(self.send, "POST", path, pair["auth_token"])
                self.wait_for_waiting()
                db.session.commit()
            self.accepted(waiting.result())

        (row,) = stored_ended()
        self.assertEqual(claims_of(following.auth_token)["exp"], int(row["expires_at"].timestamp()))

    def wait_for_waiting(self) -> None:
        """Wait until a connection to the database waits for a lock."""
        query = text(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        deadline = time.monotonic() + 2
        while not database.fetch_all(query)[0][0]:
            self.assertLess(time.monotonic(), deadline)

    def test_readers_and_ends(self) -> None:
        """Of 200 sessions that end while readers page, each reader gets each one exactly once."""
        added = self.add_sessions(200)
        parts = [added[number::4] for number in range(4)]

        def end(part: list[str]) -> None:
            for begin in range(0, len(part), 5):
                with self.open_transaction():
                    for session_id in part[begin : begin + 5]:
                        self.end_uncommitted(session_id)
                    db.session.commit()

        def read() -> list[str]:
            found: list[str] = []
            after, deadline = "0", time.monotonic() + 60
            while len(found) < len(added) and time.monotonic() < deadline:
                more, after = self.page(after=after, limit=7)
                found += more
            return found

        *_, first, second, third = at_once(*[partial(end, part) for part in parts], *[read] * 3)

        self.assertEqual(sorted(added), sorted(first))
        self.assertEqual(first, second)
        self.assertEqual(first, third)
        self.assertEqual(first, self.follow(limit=7)[0])
