"""/ping and /users: add, read and list users, while the API is open and closed."""

import itertools
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from unittest import mock

from sqlalchemy import event, insert, text
from werkzeug.test import TestResponse

from project import clock, db, errors
from project.lib import database
from project.models import User
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import add_user, start_session, stored_users

NEW_USER = {"username": "michael", "email": "michael@realpython.com", "password": "test"}
MORNING = datetime(2024, 11, 22, 9, 0, 0, tzinfo=UTC)


def public(user: User) -> dict[str, Any]:
    """Return the public fields of a user."""
    return {
        "id": user.id,
        "username": user.username,
        "email": user.email,
        "created_at": user.created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


class TestUserService(BaseTestCase):
    """The users API in development, open to anyone."""

    def test_users(self) -> None:
        """Ping is answered."""
        response = self.client.get("/ping")

        self.assertEqual(200, response.status_code)
        self.assertEqual("application/json", response.content_type)
        self.assertEqual({"status": "success", "message": "pong!"}, response.get_json())

    def test_add_user(self) -> None:
        """A user is added and can log in."""
        response = self.client.post("/users", json=NEW_USER)

        user = stored_users()[0]
        added = {
            "status": "success",
            "message": "michael@realpython.com was added!",
            "data": {
                "id": user["id"],
                "username": "michael",
                "email": "michael@realpython.com",
                "active": True,
                "admin": False,
                "created_at": user["created_at"].strftime("%Y-%m-%dT%H:%M:%SZ"),
            },
        }
        self.assertEqual((201, added), (response.status_code, response.get_json()))
        self.assertEqual(f"/users/{user['id']}", response.headers["Location"])
        self.assertEqual(200, self.get(response.headers["Location"]).status_code)
        self.assertEqual(200, self.login("michael@realpython.com", "test").status_code)

    def test_add_user_invalid_json(self) -> None:
        """An empty object is refused, and each missing field is named."""
        data = self.assert_error(self.client.post("/users", json={}), errors.InvalidPayload)

        self.assertEqual({"username", "email", "password"}, set(data["errors"]))
        self.assertEqual([], stored_users())

    def assert_user_requires(self, field: str) -> None:
        """Check that a user without `field` is refused, and the field is named."""
        body = {key: value for key, value in NEW_USER.items() if key != field}

        data = self.assert_error(self.client.post("/users", json=body), errors.InvalidPayload)

        self.assertEqual({field: "is required"}, data["errors"])
        self.assertEqual([], stored_users())

    def test_add_user_invalid_json_keys(self) -> None:
        """A user needs a username and an email."""
        for field in ("username", "email"):
            with self.subTest(field):
                self.assert_user_requires(field)

    def test_add_user_invalid_json_keys_no_password(self) -> None:
        """A user needs a password."""
        self.assert_user_requires("password")

    def test_add_user_duplicate_user(self) -> None:
        """A taken email is refused, in any case."""
        self.client.post("/users", json=NEW_USER)
        before = stored_users()
        for email in ("michael@realpython.com", "Michael@RealPython.COM"):
            with self.subTest(email):
                body = NEW_USER | {"username": "another", "email": email}

                response = self.client.post("/users", json=body)

                self.assert_error(response, errors.EmailExists)
                self.assertEqual(before, stored_users())

    def test_add_user_duplicate_username(self) -> None:
        """A taken username is refused, in any case."""
        self.client.post("/users", json=NEW_USER)
        body = NEW_USER | {"username": "MICHAEL", "email": "another@test.com"}

        data = self.assert_error(self.client.post("/users", json=body), errors.UsernameExists)

        self.assertEqual({"username": "is taken"}, data["errors"])
        self.assertEqual(1, len(stored_users()))

    def test_single_user(self) -> None:
        """A user is found by id, and only public fields are shown."""
        user = add_user("michael", "michael@realpython.com", "test")
        add_user("another", "another@test.com", "test")

        response = self.get(f"/users/{user.id}")

        self.assertEqual(200, response.status_code)
        self.assertEqual({"status": "success", "data": public(user)}, response.get_json())

    def test_single_user_no_id(self) -> None:
        """A word is an unknown id."""
        self.assert_error(self.get("/users/blah"), errors.UserNotFound)

    def test_single_user_incorrect_id(self) -> None:
        """A number that is no user's id is an unknown id."""
        user = add_user("michael", "michael@realpython.com", "test")

        self.assert_error(self.get(f"/users/{user.id + 1}"), errors.UserNotFound)

    def test_all_users(self) -> None:
        """All users are listed, the newest first whatever their ids."""
        newer = add_user("michael", "michael@realpython.com", "test")
        older = add_user(
            "fletcher", "fletcher@test.com", "test", created_at=clock.utcnow() - timedelta(days=30)
        )

        response = self.get("/users")

        self.assertEqual(200, response.status_code)
        self.assertEqual(
            {"status": "success", "data": {"users": [public(newer), public(older)], "next": None}},
            response.get_json(),
        )


class TestPages(BaseTestCase):
    """The list of users in pages."""

    def add_users(self, *moments: datetime) -> list[int]:
        """Add a user created at each of these times, and return the ids."""
        known = len(stored_users())
        names = [f"user{number}" for number in range(known, known + len(moments))]
        rows = [
            {
                "username": name,
                "username_key": name,
                "email": f"{name}@test.com",
                "password": "no hash",
                "created_at": moment,
            }
            for name, moment in zip(names, moments, strict=True)
        ]
        db.session.execute(insert(User), rows)
        db.session.commit()
        return [user["id"] for user in stored_users()[known:]]

    def list_ids(self, response: TestResponse) -> list[int]:
        """Return the ids on a page."""
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        return [user["id"] for user in response.get_json()["data"]["users"]]

    def walk(self, path: str) -> Iterator[list[int]]:
        """Yield the ids on each page, following the Link headers to the end."""
        while True:
            response = self.get(path)
            yield self.list_ids(response)
            cursor = response.get_json()["data"]["next"]
            link = response.headers.get("Link")
            if link is None:
                self.assertIsNone(cursor)
                return
            target = re.fullmatch(r'<(/users\?[^>]*)>; rel="next"', link)
            assert target is not None, link  # noqa: S101  # for mypy
            self.assertIn(f"after={cursor}", target[1])
            self.assertNotEqual(path, target[1])
            path = target[1]

    def test_no_users(self) -> None:
        """An empty list is one page."""
        response = self.get("/users")

        self.assertEqual({"users": [], "next": None}, response.get_json()["data"])
        self.assertNotIn("Link", response.headers)

    def test_default_limit(self) -> None:
        """By default a page has 50 users."""
        ids = self.add_users(*(MORNING + timedelta(seconds=n) for n in range(51)))

        self.assertEqual([ids[:0:-1], ids[:1]], list(self.walk("/users")))

    def test_limit_bounds(self) -> None:
        """A page may have 1 to 500 users."""
        ids = self.add_users(*itertools.repeat(MORNING, 501))

        self.assertEqual(ids[:-2:-1], self.list_ids(self.get("/users?limit=1")))
        self.assertEqual(ids[:0:-1], self.list_ids(self.get("/users?limit=500")))

    def test_bad_limits(self) -> None:
        """Any other limit is refused."""
        limits = ["0", "501", "-1", "", "%20", "abc", "1.0", "1e1", "%2B1", "%201", "1%20", "0x1"]
        for limit in [*limits, "1_0", "%D9%A1", "%ff", "%00", "9" * 9, "9" * 30, "9" * 5_000]:
            with self.subTest(limit):
                data = self.assert_error(self.get(f"/users?limit={limit}"), errors.InvalidPayload)

                self.assertEqual({"limit"}, set(data["errors"]))

    def test_full_last_page(self) -> None:
        """A full last page has no next page."""
        ids = self.add_users(*itertools.repeat(MORNING, 4))

        self.assertEqual([ids[:1:-1], ids[1::-1]], list(self.walk("/users?limit=2")))

    def test_cursor(self) -> None:
        """A cursor can be combined with another limit."""
        ids = self.add_users(*itertools.repeat(MORNING, 5))
        cursor = self.get("/users?limit=2").get_json()["data"]["next"]

        self.assertEqual(ids[2::-1], self.list_ids(self.get(f"/users?after={cursor}")))
        self.assertEqual([ids[2]], self.list_ids(self.get(f"/users?limit=1&after={cursor}")))

    def test_ties(self) -> None:
        """Users created at the same time have one order, also across pages."""
        tick = timedelta(microseconds=1)
        moments = [MORNING, MORNING + tick, MORNING, MORNING + tick, MORNING, MORNING - tick]
        ids = self.add_users(*moments)

        pages = list(self.walk("/users?limit=2"))

        expected = [[ids[3], ids[1]], [ids[4], ids[2]], [ids[0], ids[5]]]
        self.assertEqual(expected, pages)
        self.assertEqual(
            [[n] for page in expected for n in page], list(self.walk("/users?limit=1"))
        )

    def test_changes_between_pages(self) -> None:
        """Users who come or go between two pages make no other user appear twice or vanish."""
        ids = self.add_users(*(MORNING + timedelta(seconds=n) for n in range(6)))
        pages = self.walk("/users?limit=2")
        seen = next(pages)

        self.add_users(MORNING + timedelta(hours=1))
        db.session.execute(text("DELETE FROM users WHERE id = :id"), {"id": ids[4]})
        db.session.commit()

        self.assertEqual(ids[::-1], seen + [user_id for page in pages for user_id in page])

    def test_bad_cursors(self) -> None:
        """An invalid cursor is refused."""
        cursors = ["", "x", "1", "1-", "-1", "1-0", "1-01", "1--1", "1-x", "1-2147483648", "1-1-1"]
        more = ["%201-1", "1-1%20", "1%2B1", "%D9%A1-1", "1-%D9%A1", "%00", "%ff", "1-1%00", "-1-1"]
        for cursor in [*cursors, *more, "9" * 18 + "-1", "9" * 5_000 + "-1", "1-" + "9" * 5_000]:
            with self.subTest(cursor):
                data = self.assert_error(self.get(f"/users?after={cursor}"), errors.InvalidPayload)

                self.assertEqual({"after"}, set(data["errors"]))

    def test_far_cursors(self) -> None:
        """A cursor beyond the first or the last user is accepted."""
        ids = self.add_users(MORNING)

        self.assertEqual([], self.list_ids(self.get("/users?after=0-1")))
        self.assertEqual(ids, self.list_ids(self.get(f"/users?after={'9' * 17}-2147483647")))

    def test_index(self) -> None:
        """Every page is read by index, without sorting, filtering or scanning."""
        self.add_users(*itertools.repeat(MORNING, 3))
        statements: list[tuple[str, Any]] = []
        engine = db.engines[database.READ]

        def listen(_c: object, _k: object, sql: str, parameters: Any, *_: object) -> None:
            statements.append((sql, parameters))

        event.listen(engine, "before_cursor_execute", listen)
        self.assertEqual(3, len(list(self.walk("/users?limit=1"))))
        event.remove(engine, "before_cursor_execute", listen)

        self.assertEqual(3, len(statements))
        for page, (sql, parameters) in enumerate(statements):
            with self.subTest(page=page), db.engine.connect() as connection:
                if self.on_postgresql:
                    connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
                    connection.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
                explain = "EXPLAIN " if self.on_postgresql else "EXPLAIN QUERY PLAN "
                plan = str(connection.exec_driver_sql(explain + sql, parameters).all())
                self.assertIn("LIMIT", sql.upper())
                self.assertIn("users_created_at_id_idx", plan)
                self.assertNotRegex(plan, "Sort|TEMP B-TREE|Filter")
                if page:
                    self.assertRegex(plan, "Index Cond|SEARCH")


class TestClosedUsers(BaseTestCase):
    """The users API in production, closed to other clients than admins."""

    settings: ClassVar[dict[str, Any]] = {"USERS_API_OPEN": False}

    def setUp(self) -> None:
        """Add one user of each kind with a token, and stop the clock."""
        super().setUp()
        self.move_clock(0)
        self.ordinary = add_user("ordinary", "ordinary@test.com", "test")
        self.other = add_user("other", "other@test.com", "test")
        admin = add_user("admin", "admin@test.com", "test", admin=True)
        deactivated = add_user("deactivated", "deactivated@test.com", "test", admin=True)
        deactivated_token = start_session(deactivated).auth_token
        deactivated.active = False
        db.session.commit()
        self.token = start_session(self.ordinary).auth_token
        self.admin_token = start_session(admin).auth_token
        with mock.patch("project.clock.utcnow", return_value=MORNING):
            expired = start_session(admin).auth_token
        self.refusals: dict[str, tuple[dict[str, str], type[errors.ServiceError]]] = {
            "no token": ({}, errors.TokenMissing),
            "bad token": (bearer(self.admin_token[:-2]), errors.TokenInvalid),
            "expired token": (bearer(expired), errors.TokenExpired),
            "other scheme": ({"Authorization": f"Basic {self.admin_token}"}, errors.TokenInvalid),
            "ordinary user": (bearer(self.token), errors.PermissionDenied),
            "deactivated admin": (bearer(deactivated_token), errors.AccountInactive),
        }

    def routes(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Return a request for each thing that only an admin may do."""
        return [
            ("GET", "/users", {}),
            ("GET", "/users?limit=0", {}),
            ("GET", "/users?after=x", {}),
            ("HEAD", "/users", {}),
            ("POST", "/users", {"json": NEW_USER}),
            ("POST", "/users", {"json": {}}),
            ("POST", "/users", {"data": b"{", "content_type": "text/plain"}),
            ("POST", "/users", {"data": b"x" * 70_000, "content_type": "application/json"}),
            ("GET", f"/users/{self.other.id}", {}),
            ("GET", f"/users/0{self.ordinary.id}", {}),
            ("GET", f"/users/{self.other.id + 1_000}", {}),
            ("GET", "/users/blah", {}),
        ]

    def test_refusals(self) -> None:
        """Every caller but an active admin is refused, before the rest of the request is read."""
        before = stored_users()
        for (method, path, body), (caller, (headers, refusal)) in itertools.product(
            self.routes(), self.refusals.items()
        ):
            with self.subTest(caller, method=method, path=path, body=str(body)[:40]):
                response = self.client.open(path, method=method, headers=headers, **body)

                if method == "HEAD":
                    self.assertEqual(refusal.status, response.status_code)
                else:
                    self.assert_error(response, refusal)
        self.assertEqual(before, stored_users())

    def test_self(self) -> None:
        """Users may read themselves."""
        response = self.get(f"/users/{self.ordinary.id}", self.token)

        self.assertEqual(200, response.status_code)
        self.assertEqual(public(self.ordinary), response.get_json()["data"])

    def test_deactivated_self(self) -> None:
        """A deactivated user may not read themselves."""
        self.ordinary.active = False
        db.session.commit()

        response = self.get(f"/users/{self.ordinary.id}", self.token)

        self.assert_error(response, errors.AccountInactive)

    def test_admin(self) -> None:
        """An active admin may do everything, until the user loses the admin flag."""
        headers = bearer(self.admin_token)

        self.assertEqual(4, len(self.get("/users", self.admin_token).get_json()["data"]["users"]))
        self.assertEqual(200, self.get(f"/users/{self.other.id}", self.admin_token).status_code)
        added = self.client.post("/users", json=NEW_USER, headers=headers)
        self.assertEqual(201, added.status_code)
        self.assert_error(self.get("/users/blah", self.admin_token), errors.UserNotFound)
        self.assert_error(self.get("/users?limit=0", self.admin_token), errors.InvalidPayload)
        self.assert_error(
            self.client.post("/users", json={}, headers=headers), errors.InvalidPayload
        )

        db.session.execute(text("UPDATE users SET admin = (1 = 0)"))
        db.session.commit()
        self.assert_error(self.get("/users", self.admin_token), errors.PermissionDenied)

    def test_open_routes(self) -> None:
        """Ping, registration and login need no token."""
        self.assertEqual(200, self.get("/ping").status_code)
        self.register()
        self.assertEqual(200, self.login().status_code)
