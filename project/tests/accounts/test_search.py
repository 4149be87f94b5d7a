"""GET /users?query=: whoever's username or email begins with something."""

import itertools
import re
from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.parse import quote

from sqlalchemy import event
from werkzeug.test import TestResponse

from project import database, db
from project.api.models import User
from project.tests.base import BaseTestCase
from project.tests.utils import add_user, start_session, stored_events

INVALID_PAYLOAD = (400, "Invalid payload.", "invalid_payload", "fail")
FORBIDDEN = (403, "You do not have permission to do that.", "permission_denied")
MOST = 200  # pages of a search here
PUBLIC = {"id", "username", "email", "created_at"}


class SearchTestCase(BaseTestCase):
    """A test that searches, while the users API is open."""

    token: str | None = None

    def search(self, query: str, **more: object) -> TestResponse:
        """Return the answer to a search."""
        parts = [f"query={quote(query)}", *(f"{key}={value}" for key, value in more.items())]
        return self.get(f"/users?{'&'.join(parts)}", self.token)

    def names(self, response: TestResponse) -> list[str]:
        """Return the usernames on a page."""
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        return [user["username"] for user in response.get_json()["data"]["users"]]

    def walk(self, query: str, limit: int) -> Iterator[list[str]]:
        """Yield the usernames on each page of a search, along the Link headers to the end."""
        response = self.search(query, limit=limit)
        for _ in range(MOST):
            yield self.names(response)
            following, link = response.get_json()["data"]["next"], response.headers.get("Link")
            self.assertEqual(following is None, link is None)
            if link is None:
                return
            target, _, relation = link.partition(">; ")
            self.assertEqual('rel="next"', relation)
            response = self.get(target.removeprefix("<"), self.token)
        self.fail("there is no end to it")

    def found(self, query: str) -> list[str]:
        """Return all usernames that a search finds."""
        return list(itertools.chain(*self.walk(query, 50)))


class TestSearch(SearchTestCase):
    """What is found, and in which order."""

    def setUp(self) -> None:
        """Add people with all sorts of names."""
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
        """Who has a username or an email that begins so, in the order of that name."""
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
        """What is in the middle of a name is not found, and no character stands for others."""
        for query in ("lovelace", "test.com", "%", "_", "*", "a%", "1_0", "ada*", "\\", "'", "🦀"):
            with self.subTest(query):
                self.assertEqual([], self.found(query))
        for query, name in {"a_": "a_b", "100%": "100%", "under_": "100%", "plus+": "axb"}.items():
            with self.subTest(query):
                self.assertEqual([name], self.found(query))

    def test_shape(self) -> None:
        """A page is one of the list of users."""
        response = self.search("countess")

        data = response.get_json()["data"]
        self.assertEqual(({"users", "next"}, None), (set(data), data["next"]))
        self.assertEqual([PUBLIC], [set(user) for user in data["users"]])
        self.assertNotIn("Link", response.headers)

    def test_whole_name(self) -> None:
        """A whole name is a beginning too, and what would go on is none."""
        self.assertEqual(["alan"], self.found("alan"))
        self.assertEqual([], self.found("alan."))

    def test_longest(self) -> None:
        """A name of 128 characters is found by all of them, however many they are folded."""
        add_user("ΐ" * 128, "long@test.com", "test")
        self.assertEqual(["ΐ" * 128], self.found("ΐ" * 128))
        self.assertEqual(["ΐ" * 128], list(itertools.chain(*self.walk("ΐ", 1))))

    def test_invalid(self) -> None:
        """A search has 1 to 128 characters, none of which controls anything."""
        for query in ("", " ", "x" * 129, "\0", "a\nb", "\x7f"):
            with self.subTest(query):
                data = self.assert_error(self.search(query), *INVALID_PAYLOAD)
                self.assertEqual(["query"], list(data["errors"]))
        for limit in ("0", "501", "x"):
            data = self.assert_error(self.search("ada", limit=limit), *INVALID_PAYLOAD)
            self.assertEqual(["limit"], list(data["errors"]))


class TestPages(SearchTestCase):
    """Page after page."""

    def expected(self, prefix: str) -> list[str]:
        """Return the usernames of who has a name with this prefix, by the first such name."""
        first: dict[str, str] = {}
        for user in db.session.execute(db.select(User)).scalars():
            names = [name for name in (user.username_key, user.email) if name.startswith(prefix)]
            first |= {user.username: min(names)} if names else {}
        return sorted(first, key=lambda username: first[username])

    def test_everybody_once(self) -> None:
        """Whoever matches, by one name or both, is listed once, in one order for all limits."""
        for number in range(12):
            add_user(f"user{number}", f"user{number}@test.com", "test")
            add_user(f"user {number}", f"user.{number}@test.com", "test")
            add_user(f"anybody{number}", f"user+{number}@test.com", "test")
            add_user(f"user_{number}", f"anybody.{number}@test.com", "test")
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
        """A last page that happens to be full is the last."""
        for number in range(4):
            add_user(f"user{number}", f"user{number}@test.com", "test")

        self.assertEqual([["user0", "user1"], ["user2", "user3"]], list(self.walk("user", 2)))

    def test_name_of_two(self) -> None:
        """A username that is somebody else's email makes no page end too early, or too late."""
        for name in ("a@b.c", "a@b.d"):
            add_user(f"x{name}", name, "test")
            add_user(name, f"x{name}", "test")

        for limit in (1, 2, 3):
            found = sorted(itertools.chain(*self.walk("a@b", limit)))
            self.assertEqual(["a@b.c", "a@b.d", "xa@b.c", "xa@b.d"], found)

    def test_changes_between_pages(self) -> None:
        """Who comes or goes between two pages makes nobody else appear twice or not at all."""
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
        """A cursor that no page of a search gave is refused, and so is one in the other list."""
        add_user("user", "user@test.com", "test")
        add_user("user2", "user2@test.com", "test")
        own = self.search("user", limit=1).get_json()["data"]["next"]
        other = self.get("/users?limit=1").get_json()["data"]["next"]
        bad = ["", "u", "e", "x", "uYQ", "xYQ==", "uYQ==x", "u!", "u////", "uAA==", "u%FF", "uYR=="]
        for cursor in [*bad, other, own.swapcase(), "u" + "YWFh" * 200]:
            with self.subTest(cursor):
                data = self.assert_error(self.search("user", after=cursor), *INVALID_PAYLOAD)
                self.assertEqual({"after": "must be a cursor that a page gave"}, data["errors"])
        data = self.assert_error(self.get(f"/users?after={own}"), *INVALID_PAYLOAD)
        self.assertEqual(["after"], list(data["errors"]))

    def test_far_cursors(self) -> None:
        """A cursor of another search answers in good order."""
        add_user("user", "other@test.com", "test")
        add_user("zebra", "zebra@test.com", "test")
        add_user("zoo", "zoo@test.com", "test")
        late = self.search("z", limit=1).get_json()["data"]["next"]

        self.assertEqual([], self.names(self.search("user", after=late)))
        self.assertEqual(["zoo"], self.names(self.search("z", after=late)))

    def test_index(self) -> None:
        """Both names are read along an index, from where the page begins, and no further."""
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
    """Who may search where the users API is not open, what they see, and what is told of it."""

    settings: ClassVar[dict[str, Any]] = {"USERS_API_OPEN": False, "TOKEN_EXPIRATION_SECONDS": 900}

    def setUp(self) -> None:
        """Add an admin, who is logged in, and a user who is deactivated."""
        super().setUp()
        self.admin = add_user("admin", "admin@test.com", "test", admin=True)
        self.ada = add_user("ada", "ada@test.com", "test", active=False)
        self.token = start_session(self.admin).auth_token

    def test_who_may(self) -> None:
        """Nobody but an admin."""
        token = start_session(add_user("bob", "bob@test.com", "test")).auth_token
        self.assert_error(self.get("/users?query=ada", token), *FORBIDDEN)
        missing = 401, "Provide a valid auth token.", "token_missing"
        self.assert_error(self.get("/users?query=ada"), *missing)
        self.assertEqual(["logged_in"] * 2, [row["kind"] for row in stored_events()])

    def test_privileges(self) -> None:
        """An admin sees who is active and who an admin, in a search, the list and one by one."""
        expected = {"admin": (True, True), "ada": (False, False)}
        paths = ["/users", "/users?query=a", f"/users/{self.ada.id}", f"/users/{self.admin.id}"]
        for path in paths:
            with self.subTest(path):
                data = self.get(path, self.token).get_json()["data"]
                for user in data.get("users", [data]):
                    self.assertEqual(PUBLIC | {"active", "admin"}, set(user))
                    shown = (user["active"], user["admin"])
                    self.assertEqual(expected[user["username"]], shown)

    def test_others_see_none(self) -> None:
        """A user who looks at themselves does not, nor does anybody where the API is open."""
        bob = add_user("bob", "bob@test.com", "test")
        own = self.get(f"/users/{bob.id}", start_session(bob).auth_token)
        self.assertEqual(PUBLIC, set(own.get_json()["data"]))
        self.app.config["USERS_API_OPEN"] = True
        for path in ("/users", "/users?query=a"):
            for user in self.get(path, self.token).get_json()["data"]["users"]:
                self.assertEqual(PUBLIC, set(user))

    def test_event(self) -> None:
        """That an admin searched is told, with how many they were shown, and not for what."""
        for query, users in (("a", 2), ("ada", 1), ("nobody", 0)):
            self.search(query)

            newest = stored_events()[-1]
            self.assertEqual("users_searched", newest["kind"])
            self.assertEqual({"users": users}, newest["details"])
            self.assertEqual((None, self.admin.id), (newest["user_id"], newest["actor_id"]))
            self.assertNotIn(query, [str(value) for value in newest.values()])

    def test_no_event(self) -> None:
        """Where nobody knows who is asking nothing is told, and a list is none that is."""
        before = stored_events()
        self.get("/users", self.token)
        self.app.config["USERS_API_OPEN"] = True
        self.search("a")

        self.assertEqual(before, stored_events())
