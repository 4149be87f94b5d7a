"""The lesson's tests of registration, login, logout and status."""

from project import errors
from project.models import User
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import add_user, stored_users

REGISTRATION = {"username": "justatest", "email": "test@test.com", "password": "123456"}
PAIR = {"auth_token", "refresh_token", "expires_in", "refresh_expires_in"}


class TestAuthBlueprint(BaseTestCase):
    """The four routes under /auth."""

    def setUp(self) -> None:
        """Stop the clock, so that no token expires."""
        super().setUp()
        self.move_clock(0)

    def assert_registration_requires(self, field: str) -> None:
        """Check that a registration without `field` is refused and names it."""
        body = {key: value for key, value in REGISTRATION.items() if key != field}

        response = self.client.post("/auth/register", json=body)

        data = self.assert_error(response, errors.InvalidPayload)
        self.assertEqual({field: "is required"}, data["errors"])
        self.assertEqual(0, len(stored_users()))

    def test_user_registration(self) -> None:
        """A registration returns a token of the new user."""
        response = self.client.post("/auth/register", json=REGISTRATION)

        data = response.get_json()
        self.assertEqual(201, response.status_code)
        self.assertEqual("application/json", response.content_type)
        self.assertEqual(PAIR | {"status", "message", "data"}, set(data))
        self.assertEqual("success", data["status"])
        self.assertEqual("Successfully registered.", data["message"])
        caller = self.get("/auth/status", data["auth_token"]).get_json()["data"]
        self.assertEqual(data["data"], caller)
        self.assertEqual(("justatest", "test@test.com"), (caller["username"], caller["email"]))

    def test_user_registration_duplicate_email(self) -> None:
        """A taken email is refused."""
        add_user("test", "test@test.com", "test")

        response = self.client.post("/auth/register", json=REGISTRATION)

        self.assert_error(response, errors.UserExists)
        self.assertEqual(1, len(stored_users()))

    def test_user_registration_duplicate_username(self) -> None:
        """A taken username is refused."""
        add_user("justatest", "test@test.com2", "test")

        response = self.client.post("/auth/register", json=REGISTRATION)

        self.assert_error(response, errors.UserExists)
        self.assertEqual(1, len(stored_users()))

    def test_user_registration_invalid_json(self) -> None:
        """An empty object is refused, and each missing field is named."""
        response = self.client.post("/auth/register", json={})

        data = self.assert_error(response, errors.InvalidPayload)
        self.assertEqual({"username", "email", "password"}, set(data["errors"]))
        self.assertEqual(0, len(stored_users()))

    def test_user_registration_invalid_json_keys_no_username(self) -> None:
        """A registration needs a username."""
        self.assert_registration_requires("username")

    def test_user_registration_invalid_json_keys_no_email(self) -> None:
        """A registration needs an email."""
        self.assert_registration_requires("email")

    def test_user_registration_invalid_json_keys_no_password(self) -> None:
        """A registration needs a password."""
        self.assert_registration_requires("password")

    def test_registered_user_login(self) -> None:
        """The right email and password return a token of the user."""
        user = add_user("test", "test@test.com", "test")
        add_user("another", "another@test.com", "test")

        response = self.login()

        data = response.get_json()
        self.assertEqual(200, response.status_code)
        self.assertEqual("application/json", response.content_type)
        self.assertEqual(PAIR | {"status", "message"}, set(data))
        self.assertEqual("success", data["status"])
        self.assertEqual("Successfully logged in.", data["message"])
        self.assertEqual(user.id, User.decode_auth_token(data["auth_token"]))

    def test_not_registered_user_login(self) -> None:
        """An unknown email is refused."""
        self.assert_error(self.login(), errors.InvalidCredentials)

    def test_valid_logout(self) -> None:
        """A valid token logs out, by GET and by POST."""
        add_user("test", "test@test.com", "test")
        token = self.login().get_json()["auth_token"]
        for method in ("GET", "POST"):
            with self.subTest(method):
                response = self.client.open("/auth/logout", method=method, headers=bearer(token))

                self.assertEqual(200, response.status_code)
                self.assertEqual(
                    {"status": "success", "message": "Successfully logged out."},
                    response.get_json(),
                )
                token = self.login().get_json()["auth_token"]

    def test_invalid_logout_expired_token(self) -> None:
        """An expired token does not log out."""
        add_user("test", "test@test.com", "test")
        token = self.login().get_json()["auth_token"]

        self.move_clock(4)

        self.assert_error(self.get("/auth/logout", token), errors.TokenExpired)

    def test_invalid_logout(self) -> None:
        """An invalid token does not log out."""
        self.assert_error(self.get("/auth/logout", "invalid"), errors.TokenInvalid)

    def test_user_status(self) -> None:
        """Status returns the caller and no undocumented field."""
        user = add_user("test", "test@test.com", "test", admin=True)
        token = self.login().get_json()["auth_token"]

        response = self.get("/auth/status", token)

        self.assertEqual(200, response.status_code)
        self.assertEqual(
            {
                "status": "success",
                "data": {
                    "id": user.id,
                    "username": "test",
                    "email": "test@test.com",
                    "active": True,
                    "admin": True,
                    "created_at": user.created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
                },
            },
            response.get_json(),
        )

    def test_invalid_status(self) -> None:
        """Status refuses an invalid token."""
        self.assert_error(self.get("/auth/status", "invalid"), errors.TokenInvalid)


class TestTokenRequired(BaseTestCase):
    """Logout and status without a token, or with an expired one."""

    def test_logout_without_token(self) -> None:
        """A logout without a token is a 403."""
        for method in ("GET", "POST"):
            with self.subTest(method):
                response = self.client.open("/auth/logout", method=method)

                self.assert_error(response, errors.LogoutTokenMissing)

    def test_status_expired_token(self) -> None:
        """Status refuses an expired token."""
        token = self.register()

        self.move_clock(4)

        self.assert_error(self.get("/auth/status", token), errors.TokenExpired)

    def test_status_without_token(self) -> None:
        """Status requires a token."""
        response = self.get("/auth/status")

        self.assert_error(response, errors.TokenMissing)
