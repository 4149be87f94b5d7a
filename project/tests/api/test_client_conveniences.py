"""What authors of clients look for: IDs, versions, conflicts, limits, safe methods."""

from typing import Any, ClassVar

from werkzeug.test import TestResponse

from project import errors
from project.accounts import rate_limits
from project.api import rate_limit_headers
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import add_user, start_session, stored_events, stored_sessions, stored_users

ADA = {"username": "ada", "email": "ada@test.com", "password": "test"}
BOB = {"username": "bob", "email": "bob@test.com", "password": "test"}


class ConvenienceTestCase(BaseTestCase):
    """A test with an admin and two users."""

    def setUp(self) -> None:
        """Add them, and log in the admin and Ada."""
        super().setUp()
        self.admin = start_session(add_user("admin", "admin@test.com", "test", admin=True))
        self.ada, self.bob = add_user(**ADA), add_user(**BOB)
        self.token = start_session(self.ada).auth_token

    def patch(self, user_id: int, version: str | None, **body: Any) -> TestResponse:
        """Return the response to a change by the admin, with this If-Match."""
        headers = bearer(self.admin.auth_token)
        if version is not None:
            headers["If-Match"] = version
        return self.client.patch(f"/users/{user_id}", json=body, headers=headers)


class TestConflicts(ConvenienceTestCase):
    """A response names everything that is taken."""

    def test_both_names(self) -> None:
        """A taken username and a taken email are reported in one response."""
        both = {"username": "is taken", "email": "is taken"}
        body = ADA | {"username": "BOB"}

        registered = self.assert_error(
            self.client.post("/auth/register", json=body), errors.UserExists
        )
        added = self.assert_error(self.client.post("/users", json=body), errors.EmailExists)
        names = {"username": "ADA", "email": "bob@test.com"}
        admin = stored_users()[0]["id"]
        changed = self.assert_error(
            self.patch(admin, None, **names, current_password="test"), errors.EmailExists
        )

        for data in (registered, added, changed):
            self.assertEqual(both, data["errors"])

    def test_one_name(self) -> None:
        """Otherwise only the name that is taken is reported, with a code of its own."""
        body = ADA | {"email": "new@test.com"}
        data = self.assert_error(self.client.post("/users", json=body), errors.UsernameExists)
        self.assertEqual({"username": "is taken"}, data["errors"])

        body = ADA | {"username": "new"}
        data = self.assert_error(self.client.post("/users", json=body), errors.EmailExists)
        self.assertEqual({"email": "is taken"}, data["errors"])

    def test_own_names(self) -> None:
        """A user's own name is not reported when they change the other one to a taken one."""
        body = {"username": "ADA", "email": "bob@test.com"}

        data = self.assert_error(self.patch(self.ada.id, None, **body), errors.EmailExists)

        self.assertEqual({"email": "is taken"}, data["errors"])


class TestVersions(ConvenienceTestCase):
    """ETag and If-Match (RFC 9110, 8.8.3 and 13.1.1)."""

    def version(self, token: str | None) -> str:
        """Return the ETag of Ada, as the user with this token sees her."""
        return str(self.get(f"/users/{self.ada.id}", token).headers["ETag"])

    def test_change(self) -> None:
        """A change of the version that the client has read succeeds, and returns the next one."""
        for token in (self.admin.auth_token, self.token, None):
            with self.subTest(token):
                version = self.version(token)
                changed = self.patch(self.ada.id, version, username=f"ada {token}"[:9])

                self.assertEqual(200, changed.status_code)
                self.assertNotEqual(version, changed.headers["ETag"])
                again = self.patch(self.ada.id, changed.headers["ETag"], username="ada")
                self.assertEqual(200, again.status_code)

    def test_lost_update(self) -> None:
        """A change of an older version is refused with 412 and changes nothing."""
        version = self.version(self.token)
        self.patch(self.ada.id, None, username="other")
        before = stored_users()

        self.app.config["USERS_API_OPEN"] = False
        for stale in (version, '"x"', f"W/{version}", "x", f'{version}, "x"'):
            with self.subTest(stale):
                response = self.patch(self.ada.id, stale, email="x@test.com")
                self.assert_error(response, errors.PreconditionFailed)

        self.assertEqual(before, stored_users())
        refused = stored_events()[-1]
        self.assertEqual("user_change_refused", refused["kind"])
        self.assertEqual("precondition_failed", refused["details"]["why"])

    def test_forms(self) -> None:
        """A list that contains the version matches, and so does *; no header means no condition."""
        version = self.version(self.token)
        for matching in (f'"x", {version}', "*", None):
            with self.subTest(matching):
                response = self.patch(self.ada.id, matching, active=True)
                self.assertEqual(200, response.status_code)

    def test_hidden_fields(self) -> None:
        """The version that a user sees does not depend on fields that they do not see."""
        version = self.version(self.token)
        self.patch(self.ada.id, None, admin=True)

        self.app.config["USERS_API_OPEN"] = True
        self.assertEqual(version, self.version(None))


class TestIds(ConvenienceTestCase):
    """GET /users?ids=."""

    def ids(self, text: str) -> list[int]:
        """Return the IDs in the response."""
        data = self.get(f"/users?ids={text}").get_json()["data"]
        self.assertIsNone(data["next"])
        return [user["id"] for user in data["users"]]

    def test_users(self) -> None:
        """The users are listed in the order of the IDs, each once; unknown IDs are left out."""
        ada, bob = self.ada.id, self.bob.id
        self.assertEqual([bob, ada], self.ids(f"{bob},{ada},{bob},2147483647"))
        self.assertEqual([ada], self.ids(str(ada)))
        self.assertEqual([], self.ids("2147483647"))
        self.assertEqual([], self.ids("2147483648,9999999999"))
        self.assertEqual([ada], self.ids(",".join(["2147483647"] * 99 + [str(ada)])))

    def test_invalid(self) -> None:
        """Other texts, more than 100 IDs, and another list in the same request are refused."""
        ids = ("", ",", "1,", "x", "01", "0", "1 ", "99999999999", ",".join(["1"] * 101))
        for query in (*(f"ids={text}" for text in ids), "ids=1&query=a", "ids=1&after=1-1"):
            with self.subTest(query):
                self.assert_error(self.get(f"/users?{query}"), errors.InvalidPayload)

    def test_closed(self) -> None:
        """When the users API is closed, only admins may list users by ID, with `admin`."""
        self.app.config["USERS_API_OPEN"] = False
        path = f"/users?ids={self.ada.id}"
        self.assert_error(self.get(path), errors.TokenMissing)
        self.assert_error(self.get(path, self.token), errors.PermissionDenied)

        (user,) = self.get(path, self.admin.auth_token).get_json()["data"]["users"]
        self.assertIs(False, user["admin"])


class TestMethods(ConvenienceTestCase):
    """Methods that must be safe, and acts that have another route."""

    def test_head_does_not_log_out(self) -> None:
        """HEAD is safe (RFC 9110, 9.2.1), so it is refused where GET ends a session."""
        before = stored_sessions()

        response = self.client.head("/auth/logout", headers=bearer(self.token))

        self.assertEqual(405, response.status_code)
        self.assertNotIn("HEAD", response.headers["Allow"])
        self.assertEqual(before, stored_sessions())
        self.assertEqual(200, self.get("/auth/logout", self.token).status_code)

    def test_own_account_by_id(self) -> None:
        """An admin who deletes their own account by its ID is told which route does that."""
        path = f"/users/{stored_users()[0]['id']}"
        response = self.client.delete(path, headers=bearer(self.admin.auth_token))

        data = self.assert_error(response, errors.OwnAccount)

        self.assertIn("DELETE /auth/account", data["message"])
        self.assertEqual(3, len(stored_users()))


class TestRateLimitHeaders(ConvenienceTestCase):
    """RateLimit and RateLimit-Policy (draft-ietf-httpapi-ratelimit-headers-10)."""

    settings: ClassVar[dict[str, Any]] = {
        "RATE_LIMITS": True,
        "REGISTRATIONS_PER_ADDRESS": 2,
        "LOGIN_FAILURES_PER_ADDRESS": 3,
        "LOGIN_FAILURES_PER_ACCOUNT": 2,
    }

    def setUp(self) -> None:
        """Turn the limits on, and stop the clock."""
        super().setUp()
        rate_limits.init_app(self.app)
        rate_limit_headers.init_app(self.app)
        self.move_clock(0)

    def assert_limits(self, response: TestResponse, policy: str | None, state: str | None) -> None:
        """Check both headers."""
        headers = response.headers
        self.assertEqual(
            (policy, state), (headers.get("RateLimit-Policy"), headers.get("RateLimit"))
        )

    def test_registration(self) -> None:
        """A registration says how many are left for the address, refused or not."""
        policy = '"registrations";q=2;w=3600'
        first = self.client.post("/auth/register", json=ADA)
        self.assert_error(first, errors.UserExists)
        self.assert_limits(first, policy, '"registrations";r=1;t=3600')
        for _ in range(2):
            last = self.client.post("/auth/register", json=ADA)
            self.assert_limits(last, policy, '"registrations";r=0;t=3600')
        self.assert_error(last, errors.TooManyAttempts)
        self.assertEqual("3600", last.headers["Retry-After"])

    def test_known_accounts_stay_hidden(self) -> None:
        """No response tells whether a failed login counted against the address.

        It does only for an account that is not known there, so that would reveal known accounts.
        """
        self.assertEqual(200, self.login("bob@test.com").status_code)  # Bob is known here
        for email in ("bob@test.com", "unknown@test.com"):
            self.login(email, "wrong")
            for response in (
                self.client.post("/auth/refresh", json={"refresh_token": "x"}),
                self.login("ada@test.com", "wrong"),
            ):
                self.assert_limits(response, None, None)

    def test_refresh(self) -> None:
        """A refresh says nothing either, whether it succeeds or not."""
        wrong = self.client.post("/auth/refresh", json={"refresh_token": "x"})
        self.assert_limits(wrong, None, None)
        right = self.client.post("/auth/refresh", json={"refresh_token": self.admin.refresh_token})
        self.assertEqual(200, right.status_code)
        self.assert_limits(right, None, None)

    def test_login(self) -> None:
        """A login says nothing, because the counts tell where an account is known."""
        for email in ("ada@test.com", "unknown@test.com"):
            for _ in range(3):
                self.assert_limits(self.login(email, "wrong"), None, None)
        self.assert_limits(self.login("bob@test.com"), None, None)

    def test_own_password(self) -> None:
        """A wrong current password says what is left for the caller's own account."""
        body = {"current_password": "wrong", "new_password": "x"}
        headers = bearer(self.token)
        response = self.client.post("/auth/password", json=body, headers=headers)
        self.assert_limits(
            response,
            '"account";q=2;w=86400',
            '"account";r=1;t=86400',
        )
        right = body | {"current_password": "test"}
        response = self.client.post("/auth/password", json=right, headers=headers)
        self.assertIn('"account";r=2;', response.headers["RateLimit"])

    def test_other_routes(self) -> None:
        """Routes that count nothing have no such header."""
        self.assert_limits(self.get("/auth/status", self.token), None, None)
