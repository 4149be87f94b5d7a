"""GET /users?query=: users whose username or email starts with a text."""

import itertools
import re
from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.parse import quote

from sqlalchemy import event
from werkzeug.test import TestResponse

from project import db, errors
from project.lib import database
from project.models import User
from project.tests.base import BaseTestCase
from project.tests.rows import add_user, start_session, stored_events

MAX_PAGES = 200
PUBLIC = {"id", "username", "email", "created_at"}


class SearchTestCase(BaseTestCase):
    """A test that searches while the users API is open."""

    token: str | None = None

    def search(self, query: str, **more: object) -> TestResponse:
        """Return the response to a search."""
        parts = [f"query={quote(query)}", *(f"{key}={value}" for key, value in more.items())]
        return self.get(f"/users?{'&'.join(parts)}", self.token)

    def names(self, response: TestResponse) -> list[str]:
        """Return the usernames on a page."""
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        return [user["username"] for user in response.get_json()["data"]["users"]]

    def walk(self, query: str, limit: int) -> Iterator[list[str]]:
        """Yield the usernames on each page of a search, following the Link headers to the end."""
        response = self.search(query, limit=limit)
        for _ in range(MAX_PAGES):
            yield self.names(response)
            following, link = response.get_json()["data"]["next"], response.headers.get("Link")
            self.assertEqual(following is None, link is None)
            if link is None:
                return
            target, _, relation = link.partition(">; ")
            self.assertEqual('rel="next"', relation)
            response = self.get(target.removeprefix("<"), self.token)
        self.fail("the search has no last page")

    def found(self, query: str) -> list[str]:
        """Return all usernames that a search finds."""
        return list(itertools.chain(*self.walk(query, 50)))


class TestSearch(SearchTestCase):
    """What a search finds, and in which order."""

    def setUp(self) -> None:
        """Add users with various names."""
        super().setUp()
        for username, email in (
            ("Ada Lovelace", "countess@test.com"),
            ("alan", "adam@test.com"),
            ("Straße", "strasse@test.com"),
            ("Zoë 🦀", "zoe@test.com"),
            ("100%", "under_score@test.com"),
            ("a_b", "percent%sign@test.com"),
            ("axb", "plus+minus@test.com"),
        ):
            add_user(username, email, "test")

    def test_prefix(self) -> None:
        """A search finds usernames and emails by prefix, ordered by the name that matches."""
        for query, expected in {
            "ada": ["Ada Lovelace", "alan"],
            "ADA": ["Ada Lovelace", "alan"],
            "adam@TEST.com": ["alan"],
            "a": ["a_b", "Ada Lovelace", "alan", "axb"],
            "countess": ["Ada Lovelace"],
            "STRASS": ["Straße"],
            "zoë": ["Zoë 🦀"],
            "zoe": ["Zoë 🦀"],
            "\uff5aoe\u0308 🦀": ["Zoë 🦀"],
            " ada ": ["Ada Lovelace", "alan"],
        }.items():
            with self.subTest(query):
                self.assertEqual(expected, self.found(query))

    def test_nothing_else(self) -> None:
        """Text inside a name is not found, and no character is a wildcard."""
        for query in ("lovelace", "test.com", "%", "_", "*", "a%", "1_0", "ada*", "\\", "'", "🦀"):
            with self.subTest(query):
                self.assertEqual([], self.found(query))
        for query, name in {"a_": "a_b", "100%": "100%", "under_": "100%", "plus+": "axb"}.items():
            with self.subTest(query):
                self.assertEqual([name], self.found(query))

    def test_shape(self) -> None:
        """A page has the shape of the list of users."""
        response = self.search("countess")

        data = response.get_json()["data"]
        self.assertEqual(({"users", "next"}, None), (set(data), data["next"]))
        self.assertEqual([PUBLIC], [set(user) for user in data["users"]])
        self.assertNotIn("Link", response.headers)

    def test_whole_name(self) -> None:
        """A whole name finds its user, and a longer text does not."""
        self.assertEqual(["alan"], self.found("alan"))
        self.assertEqual([], self.found("alan."))

    def test_longest(self) -> None:
        """A name of 128 characters is found by all of them, even when folding makes it longer."""
        add_user("ΐ" * 128, "long@test.com", "test")
        self.assertEqual(["ΐ" * 128], self.found("ΐ" * 128))
        self.assertEqual(["ΐ" * 128], list(itertools.chain(*self.walk("ΐ", 1))))

    def test_invalid(self) -> None:
        """A search has 1 to 128 characters and no control characters."""
        for query in ("", " ", "x" * 129, "\0", "a\nb", "\x7f"):
            with self.subTest(query):
                data = self.assert_error(self.search(query), errors.InvalidPayload)
                self.assertEqual(["query"], list(data["errors"]))
        for limit in ("0", "501", "x"):
            data = self.assert_error(self.search("ada", limit=limit), errors.InvalidPayload)
            self.assertEqual(["limit"], list(data["errors"]))


class TestPages(SearchTestCase):
    """Pages of a search."""

    def expected(self, prefix: str) -> list[str]:
        """Return the usernames with this prefix, ordered by the first name that matches."""
        first: dict[str, str] = {}
        for user in db.session.execute(db.select(User)).scalars():
            names = [name for name in (user.username_key, user.email) if name.startswith(prefix)]
            first |= {user.username: min(names)} if names else {}
        return sorted(first, key=lambda username: first[username])

    def test_each_user_once(self) -> None:
        """A user who matches by one name or both is listed once, and in one order at any limit."""
        for number in range(12):
            add_user(f"user{number}", f"user{number}@test.com", "test")
            add_user(f"user {number}", f"user.{number}@test.com", "test")
            add_user(f"person{number}", f"user+{number}@test.com", "test")
            add_user(f"user_{number}", f"person.{number}@test.com", "test")
            add_user(f"z{number}", f"z{number}@test.com", "test")
        expected = self.expected("user")
        self.assertEqual(48, len(expected))
        for limit in (1, 2, 3, 7, 47, 48, 500):
            with self.subTest(limit=limit):
                pages = list(self.walk("user", limit))

                self.assertEqual(expected, list(itertools.chain(*pages)))
                self.assertLessEqual(max(len(page) for page in pages), limit)
                self.assertEqual(min(limit, 48), len(pages[0]))

    def test_last_page(self) -> None:
        """A full last page has no next page."""
        for number in range(4):
            add_user(f"user{number}", f"user{number}@test.com", "test")

        self.assertEqual([["user0", "user1"], ["user2", "user3"]], list(self.walk("user", 2)))

    def test_name_of_two(self) -> None:
        """A username equal to another user's email ends no page too early or too late."""
        for name in ("a@b.c", "a@b.d"):
            add_user(f"x{name}", name, "test")
            add_user(name, f"x{name}", "test")

        for limit in (1, 2, 3):
            found = sorted(itertools.chain(*self.walk("a@b", limit)))
            self.assertEqual(["a@b.c", "a@b.d", "xa@b.c", "xa@b.d"], found)

    def test_changes_between_pages(self) -> None:
        """Users who come or go between two pages make no other user appear twice or vanish."""
        for number in range(6):
            add_user(f"user{number}", f"user{number}@test.com", "test")
        pages = self.walk("user", 2)
        seen = next(pages)

        add_user("user00", "user00@test.com", "test")
        db.session.execute(db.delete(User).where(User.username.in_(["user1", "user4"])))
        db.session.commit()

        rest = itertools.chain(*pages)
        self.assertEqual(["user0", "user1", "user2", "user3", "user5"], [*seen, *rest])

    def test_cursors(self) -> None:
        """An invalid cursor is refused, and so is a cursor of the list of users."""
        add_user("user", "user@test.com", "test")
        add_user("user2", "user2@test.com", "test")
        own = self.search("user", limit=1).get_json()["data"]["next"]
        other = self.get("/users?limit=1").get_json()["data"]["next"]
        bad = ["", "u", "e", "x", "uYQ", "xYQ==", "uYQ==x", "u!", "u////", "uAA==", "u%FF", "uYR=="]
        for cursor in [*bad, other, own.swapcase(), "u" + "YWFh" * 200]:
            with self.subTest(cursor):
                data = self.assert_error(self.search("user", after=cursor), errors.InvalidPayload)
                self.assertEqual({"after": "must be a cursor that a page gave"}, data["errors"])
        data = self.assert_error(self.get(f"/users?after={own}"), errors.InvalidPayload)
        self.assertEqual(["after"], list(data["errors"]))

    def test_far_cursors(self) -> None:
        """A cursor of another search is accepted."""
        add_user("user", "other@test.com", "test")
        add_user("zebra", "zebra@test.com", "test")
        add_user("zoo", "zoo@test.com", "test")
        late = self.search("z", limit=1).get_json()["data"]["next"]

        self.assertEqual([], self.names(self.search("user", after=late)))
        self.assertEqual(["zoo"], self.names(self.search("z", after=late)))

    def test_index(self) -> None:
        """Both names are read by index, starting where the page begins and stopping at its end."""
        for number in range(3):
            add_user(f"user{number}", f"user{number}@test.com", "test")
        statements: list[tuple[str, Any]] = []
        engine = db.engines[database.READ]

        def listen(_c: object, _k: object, sql: str, parameters: Any, *_: object) -> None:
            statements.append((sql, parameters))

        event.listen(engine, "before_cursor_execute", listen)
        self.assertEqual(3, len(list(self.walk("user", 1))))
        event.remove(engine, "before_cursor_execute", listen)

        for sql, parameters in statements:
            with db.engine.connect() as connection:
                if self.on_postgresql:
                    connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
                    connection.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
                explain = "EXPLAIN " if self.on_postgresql else "EXPLAIN QUERY PLAN "
                plan = str(connection.exec_driver_sql(explain + sql, parameters).all())
            self.assertNotRegex(plan, "Seq Scan|Filter|SCAN users")
            self.assertIn("LIMIT", sql)
            ranges = re.findall(
                r"Index Cond: \(\((username_key|email)|\((username_key|email)>", plan
            )
            self.assertEqual(2, len(set(ranges)), plan)


class TestAdmin(SearchTestCase):
    """Searches while the users API is closed: who may, what is shown and what is recorded."""

    settings: ClassVar[dict[str, Any]] = {"USERS_API_OPEN": False, "TOKEN_EXPIRATION_SECONDS": 900}

    def setUp(self) -> None:
        """Add an admin with a session, and a deactivated user."""
        super().setUp()
        self.admin = add_user("admin", "admin@test.com", "test", admin=True)
        self.ada = add_user("ada", "ada@test.com", "test", active=False)
        self.token = start_session(self.admin).auth_token

    def test_who_may(self) -> None:
        """Only an admin may search."""
        token = start_session(add_user("bob", "bob@test.com", "test")).auth_token
        self.assert_error(self.get("/users?query=ada", token), errors.PermissionDenied)
        self.assert_error(self.get("/users?query=ada"), errors.TokenMissing)
        self.assertEqual(["logged_in"] * 2, [row["kind"] for row in stored_events()])

    def test_privileges(self) -> None:
        """An admin sees who is active and who is an admin, in every view of users."""
        expected = {"admin": (True, True), "ada": (False, False)}
        paths = ["/users", "/users?query=a", f"/users/{self.ada.id}", f"/users/{self.admin.id}"]
        for path in paths:
            with self.subTest(path):
                data = self.get(path, self.token).get_json()["data"]
                for user in data.get("users", [data]):
                    self.assertEqual(PUBLIC | {"active", "admin"}, set(user))
                    shown = (user["active"], user["admin"])
                    self.assertEqual(expected[user["username"]], shown)

    def test_privileges_are_hidden(self) -> None:
        """Users who look at themselves, and clients of an open API, do not see privileges."""
        bob = add_user("bob", "bob@test.com", "test")
        own = self.get(f"/users/{bob.id}", start_session(bob).auth_token)
        self.assertEqual(PUBLIC, set(own.get_json()["data"]))
        self.app.config["USERS_API_OPEN"] = True
        for path in ("/users", "/users?query=a"):
            for user in self.get(path, self.token).get_json()["data"]["users"]:
                self.assertEqual(PUBLIC, set(user))

    def test_event(self) -> None:
        """A search by an admin is recorded with the number of results, but not the query."""
        for query, users in (("a", 2), ("ada", 1), ("unknown", 0)):
            self.search(query)

            newest = stored_events()[-1]
            self.assertEqual("users_searched", newest["kind"])
            self.assertEqual({"users": users}, newest["details"])
            self.assertEqual((None, self.admin.id), (newest["user_id"], newest["actor_id"]))
            self.assertNotIn(query, [str(value) for value in newest.values()])

    def test_no_event(self) -> None:
        """An anonymous search and a list are not recorded."""
        before = stored_events()
        self.get("/users", self.token)
        self.app.config["USERS_API_OPEN"] = True
        self.search("a")

        self.assertEqual(before, stored_events())
