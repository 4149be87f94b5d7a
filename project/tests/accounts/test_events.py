"""Who may read the audit trail, over HTTP and on the command line, and how long it is kept."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from sqlalchemy import insert

from project import audit, clock, db
from project.api.models import Event
from project.tests import scratch
from project.tests.base import BaseTestCase, bearer
from project.tests.utils import add_user, start_session, stored_events

MORNING = datetime(2026, 11, 22, 9, tzinfo=UTC)
HUGE = 2**62  # an id of an event, too large for one of a user
COLUMNS = {"id", "created_at", "kind", "session_id", "ip", "user_agent", "request_id", "details"}


def add_events(user_id: int | None, moments: list[datetime], **columns: Any) -> list[int]:
    """Return the ids of new events of a user at these moments."""
    common: dict[str, Any] = {
        "kind": "logged_in",
        "user_id": user_id,
        "user_agent": "tests",
        "details": {},
    }
    rows = [common | {"created_at": moment} | columns for moment in moments]
    for row in rows:
        db.session.execute(insert(Event), row)
    db.session.commit()
    return [event["id"] for event in stored_events()[-len(rows) :]]


class TestReading(BaseTestCase):
    """GET /users/<id>/events."""

    settings: ClassVar[dict[str, Any]] = {"TOKEN_EXPIRATION_SECONDS": 3_600}

    def setUp(self) -> None:
        """Add a user, another, and an admin, each of whom has logged in."""
        super().setUp()
        self.users = {
            name: add_user(name, f"{name}@test.com", "test", admin=name == "admin")
            for name in ("ada", "bob", "admin")
        }
        self.tokens = {name: start_session(user).auth_token for name, user in self.users.items()}
        self.path = f"/users/{self.users['ada'].id}/events"

    def walk(self, path: str, token: str) -> Iterator[list[int]]:
        """Yield the ids on each page, along data.next to the end."""
        after: str | None = ""
        while after is not None:
            answer = self.get(f"{path}{after}", token)
            self.assertEqual(200, answer.status_code, answer.get_data(as_text=True))
            data = answer.get_json()["data"]
            yield [event["id"] for event in data["events"]]
            after = f"&after={data['next']}" if data["next"] else None
            self.assertEqual(bool(after), 'rel="next"' in answer.headers.get("Link", ""))

    def test_own(self) -> None:
        """A user reads what happened to them, and nothing of anybody else."""
        answer = self.get(self.path, self.tokens["ada"])

        data = answer.get_json()["data"]
        self.assertEqual((200, None), (answer.status_code, data["next"]))
        own = [row["id"] for row in stored_events() if row["user_id"] == self.users["ada"].id]
        self.assertEqual(own, [event["id"] for event in data["events"]])
        self.assertEqual([COLUMNS | {"actor_id"}], [set(event) for event in data["events"]])
        self.assertEqual("logged_in", data["events"][0]["kind"])

    def test_who_may(self) -> None:
        """An admin may too; nobody else, however open the users API is."""
        refused = 403, "You do not have permission to do that.", "permission_denied"
        missing = 401, "Provide a valid auth token.", "token_missing"
        for is_open in (True, False):
            self.app.config["USERS_API_OPEN"] = is_open
            with self.subTest(open=is_open):
                self.assertEqual(200, self.get(self.path, self.tokens["admin"]).status_code)
                self.assert_error(self.get(self.path, self.tokens["bob"]), *refused)
                self.assert_error(self.get(self.path), *missing)
                odd = self.get(f"/users/0{self.users['bob'].id}/events", self.tokens["bob"])
                self.assert_error(odd, *refused)

    def test_acts_of_others(self) -> None:
        """A user sees that an admin did something, and which, but not from where."""
        path, token = f"/users/{self.users['bob'].id}", self.tokens["admin"]
        headers = bearer(token) | {"User-Agent": "their phone"}
        changed = self.client.patch(path, json={"username": "bobby"}, headers=headers)
        self.assertEqual(200, changed.status_code)

        event = self.get(f"{path}/events", self.tokens["bob"]).get_json()["data"]["events"][0]

        shown = {name: event[name] for name in ("actor_id", "ip", "user_agent", "request_id")}
        expected = {"ip": None, "user_agent": "", "request_id": None}
        self.assertEqual(expected | {"actor_id": self.users["admin"].id}, shown)
        self.assertEqual("their phone", stored_events()[-1]["user_agent"])

    def test_nobody(self) -> None:
        """An id that is no user's is a 404, to an admin."""
        unknown = 404, "User does not exist", "user_not_found", "fail"
        for nobody in ("999999", "0", "abc", "2147483648", str(HUGE)):
            with self.subTest(nobody):
                answer = self.get(f"/users/{nobody}/events", self.tokens["admin"])
                self.assert_error(answer, *unknown)

    def test_pages(self) -> None:
        """Pages go from the newest to the oldest, and miss none that have one moment in common."""
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
        """Ids go on where those of users end."""
        self.assertEqual([HUGE], add_events(self.users["bob"].id, [clock.utcnow()], id=HUGE))
        path = f"/users/{self.users['bob'].id}/events?limit=1"

        self.assertEqual(2, len(list(self.walk(path, self.tokens["bob"]))))

    def test_bad_pages(self) -> None:
        """What is no page is refused."""
        invalid = 400, "Invalid payload.", "invalid_payload", "fail"
        moment = "1795338000000000"
        cursors = ["x", "", "1", f"{moment}-0", f"{moment}-{2**63}", f"{moment}-01", "-1-1"]
        for query in ["limit=0", "limit=501", *(f"after={cursor}" for cursor in cursors)]:
            with self.subTest(query):
                answer = self.get(f"{self.path}?{query}", self.tokens["ada"])
                self.assert_error(answer, *invalid)


class TestCommand(BaseTestCase):
    """manage.py events, and purge."""

    def setUp(self) -> None:
        """Add two users, and what happened to one of them an hour ago."""
        super().setUp()
        self.ada = add_user("ada", "ada@test.com", "test")
        self.bob = add_user("bob", "bob@test.com", "test")
        hour_ago = clock.utcnow() - timedelta(hours=1)
        details = {"why": "wrong_password", "pause": 60}
        columns: dict[str, Any] = {"kind": "login_refused", "ip": "203.0.113.7"}
        add_events(self.ada.id, [hour_ago], details=details, **columns)

    @property
    def settings_of_commands(self) -> dict[str, str]:
        """The settings with which a command finds this test's database."""
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
        """Return what the events are that the command prints as JSON."""
        return [json.loads(line)["kind"] for line in self.events("--json", *arguments)]

    def test_table(self) -> None:
        """A line an event, the oldest first, under a heading."""
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
        """A line of JSON has everything that the row has."""
        (line,) = self.events("--json")

        event = json.loads(line)
        (row,) = stored_events()
        self.assertEqual(row["created_at"], datetime.fromisoformat(event.pop("created_at")))
        self.assertEqual({name: row[name] for name in event}, event)
        self.assertEqual(set(row) - {"created_at"}, set(event))

    def test_choice(self) -> None:
        """Of one user, and since a moment or for some time."""
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
        """Who is nobody and what is no time end the command with 1 and a line."""
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
        """More than are read at once come out in order, and each once."""
        moments = [clock.utcnow()] * (audit.PAGE + 1)
        ids = add_events(self.bob.id, moments)

        printed = [json.loads(line)["id"] for line in self.events("--json", "--since", "1m")]

        self.assertEqual(ids, printed)

    def test_follow(self) -> None:
        """What happens while it follows is printed, once, and what is only now committed too."""
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
        """What an operator does is told with the command line as its origin."""
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
        """Events are deleted when EVENTS_DAYS are over, and not before."""
        now = clock.utcnow()
        add_events(None, [now - timedelta(days=7, minutes=1)] * 3, kind="old")
        add_events(None, [now - timedelta(days=6, hours=23)], kind="young")
        before = self.kinds()

        result = scratch.manage("purge", EVENTS_DAYS="7", **self.settings_of_commands)

        self.assertIn("events: 3;", result.stdout)
        self.assertEqual([kind for kind in before if kind != "old"], self.kinds())
        self.assertIn("young", before)
