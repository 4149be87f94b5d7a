"""Reading the audit log over HTTP and on the command line, and how long it is kept."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from project import clock, errors
from project.ops import audit_log
from project.tests import scratch
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import add_events, add_user, start_session, stored_events

MORNING = datetime(2026, 11, 22, 9, tzinfo=UTC)
HUGE = 2**62  # valid as an event's id, too large for a user's
COLUMNS = {"id", "created_at", "kind", "session_id", "ip", "user_agent", "request_id", "details"}


class TestReading(BaseTestCase):
    """GET /users/<id>/events."""

    settings: ClassVar[dict[str, Any]] = {"TOKEN_EXPIRATION_SECONDS": 3_600}

    def setUp(self) -> None:
        """Add two users and an admin, each with a login."""
        super().setUp()
        self.users = {
            name: add_user(name, f"{name}@test.com", "test", admin=name == "admin")
            for name in ("ada", "bob", "admin")
        }
        self.tokens = {name: start_session(user).auth_token for name, user in self.users.items()}
        self.path = f"/users/{self.users['ada'].id}/events"

    def walk(self, path: str, token: str) -> Iterator[list[int]]:
        """Yield the ids on each page, following data.next to the end."""
        after: str | None = ""
        while after is not None:
            answer = self.get(f"{path}{after}", token)
            self.assertEqual(200, answer.status_code, answer.get_data(as_text=True))
            data = answer.get_json()["data"]
            yield [event["id"] for event in data["events"]]
            after = f"&after={data['next']}" if data["next"] else None
            self.assertEqual(bool(after), 'rel="next"' in answer.headers.get("Link", ""))

    def test_own(self) -> None:
        """A user reads their own events and no others."""
        answer = self.get(self.path, self.tokens["ada"])

        data = answer.get_json()["data"]
        self.assertEqual((200, None), (answer.status_code, data["next"]))
        own = [row["id"] for row in stored_events() if row["user_id"] == self.users["ada"].id]
        self.assertEqual(own, [event["id"] for event in data["events"]])
        self.assertEqual([COLUMNS | {"actor_id"}], [set(event) for event in data["events"]])
        self.assertEqual("logged_in", data["events"][0]["kind"])

    def test_who_may(self) -> None:
        """An admin may read them too; no other user may, also while the users API is open."""
        for is_open in (True, False):
            self.app.config["USERS_API_OPEN"] = is_open
            with self.subTest(open=is_open):
                self.assertEqual(200, self.get(self.path, self.tokens["admin"]).status_code)
                self.assert_error(self.get(self.path, self.tokens["bob"]), errors.PermissionDenied)
                self.assert_error(self.get(self.path), errors.TokenMissing)
                odd = self.get(f"/users/0{self.users['bob'].id}/events", self.tokens["bob"])
                self.assert_error(odd, errors.PermissionDenied)

    def test_acts_of_others(self) -> None:
        """A user sees which admin changed their account, but not from where."""
        path, token = f"/users/{self.users['bob'].id}", self.tokens["admin"]
        headers = bearer(token) | {"User-Agent": "their phone"}
        changed = self.client.patch(path, json={"username": "bobby"}, headers=headers)
        self.assertEqual(200, changed.status_code)

        event = self.get(f"{path}/events", self.tokens["bob"]).get_json()["data"]["events"][0]

        shown = {name: event[name] for name in ("actor_id", "ip", "user_agent", "request_id")}
        expected = {"ip": None, "user_agent": "", "request_id": None}
        self.assertEqual(expected | {"actor_id": self.users["admin"].id}, shown)
        self.assertEqual("their phone", stored_events()[-1]["user_agent"])

    def test_unknown_id(self) -> None:
        """An admin gets a 404 for an unknown id."""
        for user_id in ("999999", "0", "abc", "2147483648", str(HUGE)):
            with self.subTest(user_id):
                answer = self.get(f"/users/{user_id}/events", self.tokens["admin"])
                self.assert_error(answer, errors.UserNotFound)

    def test_pages(self) -> None:
        """Pages run from the newest to the oldest and skip no event with the same time."""
        seconds = [MORNING + timedelta(seconds=number // 3) for number in range(10)]
        ids = add_events(self.users["bob"].id, seconds)
        first = [row["id"] for row in stored_events() if row["user_id"] == self.users["bob"].id][:1]
        for limit in (1, 3, 4, 11, 500):
            with self.subTest(limit=limit):
                path = f"/users/{self.users['bob'].id}/events?limit={limit}"
                pages = list(self.walk(path, self.tokens["admin"]))

                self.assertEqual([*first, *ids[::-1]], list(itertools.chain(*pages)))
                self.assertEqual({limit}, {len(page) for page in pages[:-1]} | {limit})

    def test_many_events(self) -> None:
        """An event's id may exceed the largest id of a user."""
        self.assertEqual([HUGE], add_events(self.users["bob"].id, [clock.utcnow()], id=HUGE))
        path = f"/users/{self.users['bob'].id}/events?limit=1"

        self.assertEqual(2, len(list(self.walk(path, self.tokens["bob"]))))

    def test_bad_pages(self) -> None:
        """An invalid limit or cursor is refused."""
        moment = "1795338000000000"
        cursors = ["x", "", "1", f"{moment}-0", f"{moment}-{2**63}", f"{moment}-01", "-1-1"]
        for query in ["limit=0", "limit=501", *(f"after={cursor}" for cursor in cursors)]:
            with self.subTest(query):
                answer = self.get(f"{self.path}?{query}", self.tokens["ada"])
                self.assert_error(answer, errors.InvalidPayload)


class TestCommand(BaseTestCase):
    """manage.py events and manage.py purge."""

    def setUp(self) -> None:
        """Add two users, and an event of one of them an hour ago."""
        super().setUp()
        self.ada = add_user("ada", "ada@test.com", "test")
        self.bob = add_user("bob", "bob@test.com", "test")
        hour_ago = clock.utcnow() - timedelta(hours=1)
        details = {"why": "wrong_password", "pause": 60}
        columns: dict[str, Any] = {"kind": "login_refused", "ip": "203.0.113.7"}
        add_events(self.ada.id, [hour_ago], details=details, **columns)

    @property
    def settings_of_commands(self) -> dict[str, str]:
        """The settings with which a command uses this test's database."""
        return {
            "APP_SETTINGS": "project.config.DevelopmentConfig",
            "DATABASE_URL": self.app.config["SQLALCHEMY_DATABASE_URI"],
            "SECRET_KEY": "any",
        }

    def events(self, *arguments: str) -> list[str]:
        """Return the lines that the command prints."""
        result = scratch.manage("events", *arguments, **self.settings_of_commands)
        self.assertEqual((0, ""), (result.returncode, result.stderr))
        return result.stdout.splitlines()

    def kinds(self, *arguments: str) -> list[str]:
        """Return the kinds of the events that the command prints as JSON."""
        return [json.loads(line)["kind"] for line in self.events("--json", *arguments)]

    def test_table(self) -> None:
        """Each event is a line, the oldest first, below a heading."""
        start_session(self.bob)

        heading, first, second = self.events()

        self.assertEqual(["time", "event", "user", "address", "details"], heading.split())
        words = first.split()
        self.assertRegex(words[0], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")
        expected = ["login_refused", str(self.ada.id), "203.0.113.7"]
        self.assertEqual(expected, words[1:4])
        self.assertEqual({"why=wrong_password", "pause=60", '"tests"'}, set(words[4:]))
        self.assertIn(f" {self.bob.id} ", second)

    def test_json(self) -> None:
        """A line of JSON has every column of the event."""
        (line,) = self.events("--json")

        event = json.loads(line)
        (row,) = stored_events()
        self.assertEqual(row["created_at"], datetime.fromisoformat(event.pop("created_at")))
        self.assertEqual({name: row[name] for name in event}, event)
        self.assertEqual(set(row) - {"created_at"}, set(event))

    def test_options(self) -> None:
        """Events can be limited to a user, and to those since a time or for a duration."""
        start_session(self.bob)
        half = (clock.utcnow() - timedelta(minutes=30)).isoformat()

        self.assertEqual(["login_refused"], self.kinds("--user", "Ada@test.com"))
        for since in (half.removesuffix("+00:00"), "30m"):
            with self.subTest(since):
                self.assertEqual(["logged_in"], self.kinds("--since", since))
        for since in ("2h", "2000-01-01T00:00:00Z"):
            with self.subTest(since):
                self.assertEqual(["login_refused", "logged_in"], self.kinds("--since", since))

    def test_mistakes(self) -> None:
        """An unknown user or an invalid time exits with 1 and one line on stderr."""
        for arguments in (
            ("--user", "a@b.c"),
            ("--since", "yesterday"),
            ("--since", "999999d"),
            ("--since", "0001-01-01T00:00+14:00"),
        ):
            with self.subTest(arguments):
                result = scratch.manage("events", *arguments, **self.settings_of_commands)

                self.assertEqual((1, ""), (result.returncode, result.stdout))
                self.assertEqual(1, len(result.stderr.splitlines()), result.stderr)

    def test_many(self) -> None:
        """More events than one batch are printed in order, each once."""
        moments = [clock.utcnow()] * (audit_log.PAGE + 1)
        ids = add_events(self.bob.id, moments)

        printed = [json.loads(line)["id"] for line in self.events("--json", "--since", "1m")]

        self.assertEqual(ids, printed)

    def test_follow(self) -> None:
        """--follow prints each new event once, including one that is committed late."""
        follower = subprocess.Popen(
            [sys.executable, "manage.py", "events", "--follow", "--json", "--since", "2h"],
            cwd=scratch.ROOT,
            env=scratch.settings(**self.settings_of_commands),
            stdout=subprocess.PIPE,
            text=True,
        )
        with follower:
            assert follower.stdout  # noqa: S101  # for mypy
            self.addCleanup(follower.kill)
            printed = [json.loads(follower.stdout.readline())]
            start_session(self.bob)
            printed.append(json.loads(follower.stdout.readline()))
            add_events(None, [clock.utcnow() - timedelta(seconds=9)], kind="late")
            printed.append(json.loads(follower.stdout.readline()))
            follower.terminate()
            self.assertEqual("", follower.stdout.read())

        self.assertEqual(["login_refused", "logged_in", "late"], [one["kind"] for one in printed])

    def test_commands_are_recorded(self) -> None:
        """What an operator does is recorded with manage.py as its origin."""
        for kind, *command in (
            ("user_deactivated", "deactivate", "ada@test.com"),
            ("user_activated", "activate", "ada@test.com"),
            ("sessions_ended", "end_sessions", "ada@test.com"),
        ):
            with self.subTest(kind):
                start_session(self.ada) if kind == "sessions_ended" else None
                result = scratch.manage(*command, **self.settings_of_commands)

                self.assertEqual(0, result.returncode, result.stderr)
                self.assertEqual(1, len(result.stdout.splitlines()), result.stdout)
                newest = stored_events()[-1]
                self.assertEqual((kind, self.ada.id), (newest["kind"], newest["user_id"]))
                self.assertEqual("manage.py", newest["user_agent"])
        self.assertEqual({"sessions": 1}, newest["details"])

    def test_purge(self) -> None:
        """Purge deletes events older than EVENTS_DAYS and no others."""
        now = clock.utcnow()
        add_events(None, [now - timedelta(days=7, minutes=1)] * 3, kind="old")
        add_events(None, [now - timedelta(days=6, hours=23)], kind="young")
        before = self.kinds()

        result = scratch.manage("purge", EVENTS_DAYS="7", **self.settings_of_commands)

        self.assertIn("events: 3;", result.stdout)
        kept = [kind for kind in before if kind != "old"]
        self.assertEqual([*kept, "purged"], self.kinds())
        self.assertIn("young", kept)
        self.assertEqual({"rows": 3}, stored_events()[-1]["details"])

        scratch.manage("purge", EVENTS_DAYS="7", **self.settings_of_commands)
        self.assertEqual([*kept, "purged"], self.kinds())
