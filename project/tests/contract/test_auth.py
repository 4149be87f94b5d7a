"""Register, log in, log out, and who am I."""

import threading
from typing import Any
from unittest import mock

from project import bcrypt
from project.api.models import User
from project.tests.base import BaseTestCase, bearer
from project.tests.utils import add_user, stored_users

REGISTRATION = {"username": "justatest", "email": "test@test.com", "password": "123456"}
TAKEN = (400, "Sorry. That user already exists.", "user_exists")
INVALID_PAYLOAD = (400, "Invalid payload.", "invalid_payload")
UNKNOWN = (404, "User does not exist.", "invalid_credentials")
INVALID_TOKEN = (401, "Invalid token. Please log in again.", "token_invalid")
PAIR = {"auth_token", "refresh_token", "expires_in"}
EXPIRED_TOKEN = (401, "Signature expired. Please log in again.", "token_expired")


class TestAuthBlueprint(BaseTestCase):
    """The four routes under /auth."""

    def setUp(self) -> None:
        """Stop the clock: no token expires by itself."""
        super().setUp()
        self.move_clock(0)

    def assert_registration_lacks(self, field: str) -> None:
        """Check that a registration without `field` is refused, and says which it was."""
        body = {key: value for key, value in REGISTRATION.items() if key != field}

        response = self.client.post("/auth/register", json=body)

        data = self.assert_error(response, *INVALID_PAYLOAD)
        self.assertEqual({field: "is required"}, data["errors"])
        self.assertEqual(0, len(stored_users()))

    def test_user_registration(self) -> None:
        """Whoever registers gets a token, and it is theirs."""
        response = self.client.post("/auth/register", json=REGISTRATION)

        data = response.get_json()
        self.assertEqual(201, response.status_code)
        self.assertEqual("application/json", response.content_type)
        self.assertEqual(PAIR | {"status", "message"}, set(data))
        self.assertEqual("success", data["status"])
        self.assertEqual("Successfully registered.", data["message"])
        caller = self.get("/auth/status", data["auth_token"]).get_json()["data"]
        self.assertEqual(("justatest", "test@test.com"), (caller["username"], caller["email"]))

    def test_user_registration_duplicate_email(self) -> None:
        """An email registers once."""
        add_user("test", "test@test.com", "test")

        response = self.client.post("/auth/register", json=REGISTRATION)

        self.assert_error(response, *TAKEN)
        self.assertEqual(1, len(stored_users()))

    def test_user_registration_duplicate_username(self) -> None:
        """A username registers once."""
        add_user("justatest", "test@test.com2", "test")

        response = self.client.post("/auth/register", json=REGISTRATION)

        self.assert_error(response, *TAKEN)
        self.assertEqual(1, len(stored_users()))

    def test_user_registration_duplicate_of_two_users(self) -> None:
        """The email of one user and the name of another register nobody."""
        add_user("justatest", "test@test.com2", "test")
        add_user("test", "test@test.com", "test")

        response = self.client.post("/auth/register", json=REGISTRATION)

        self.assert_error(response, *TAKEN)
        self.assertEqual(2, len(stored_users()))

    def test_user_registration_at_once(self) -> None:
        """Of registrations that arrive together for one email or one name, one is accepted."""
        for shared in ("email", "username"):
            with self.subTest(shared=shared):
                bodies: list[dict[str, Any]] = [
                    {
                        "username": f"{shared}{number}",
                        "email": f"{shared}{number}@test.com",
                        "password": "test",
                    }
                    | {shared: f"shared@{shared}.com"}
                    for number in range(4)
                ]
                barrier = threading.Barrier(len(bodies))
                answers: list[tuple[int, str | None]] = []

                def send(
                    body: dict[str, Any],
                    barrier: threading.Barrier = barrier,
                    answers: list[tuple[int, str | None]] = answers,
                ) -> None:
                    client = self.app.test_client()
                    barrier.wait()
                    response = client.post("/auth/register", json=body)
                    answers.append((response.status_code, response.get_json().get("code")))

                threads = [threading.Thread(target=send, args=(body,)) for body in bodies]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

                self.assertEqual(
                    [(201, None)] + 3 * [(400, "user_exists")], sorted(answers, key=str)
                )

    def test_user_registration_invalid_json(self) -> None:
        """An empty object registers nobody, and each missing field is named."""
        response = self.client.post("/auth/register", json={})

        data = self.assert_error(response, *INVALID_PAYLOAD)
        self.assertEqual({"username", "email", "password"}, set(data["errors"]))
        self.assertEqual(0, len(stored_users()))

    def test_user_registration_invalid_json_keys_no_username(self) -> None:
        """A registration needs a username."""
        self.assert_registration_lacks("username")

    def test_user_registration_invalid_json_keys_no_email(self) -> None:
        """A registration needs an email."""
        self.assert_registration_lacks("email")

    def test_user_registration_invalid_json_keys_no_password(self) -> None:
        """A registration needs a password."""
        self.assert_registration_lacks("password")

    def test_registered_user_login(self) -> None:
        """The right email and password give a token, and it is theirs."""
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

    def test_registered_user_login_after_registration(self) -> None:
        """Who registered can log in with what they registered with."""
        self.register(**REGISTRATION)

        response = self.login(password="123456")

        self.assertEqual(200, response.status_code)

    def test_not_registered_user_login(self) -> None:
        """An email that nobody registered does not log in."""
        self.assert_error(self.login(), *UNKNOWN)

    def test_wrong_password_login(self) -> None:
        """A wrong password answers as an unknown email does, byte for byte."""
        unknown = self.login()
        add_user("test", "test@test.com", "test")

        wrong = self.login(password="Test")

        self.assert_error(wrong, *UNKNOWN)
        self.assertEqual(unknown.get_data(), wrong.get_data())
        for answer in (unknown, wrong):
            self.assertTrue(answer.headers.pop("X-Request-ID"))
        self.assertEqual(sorted(unknown.headers), sorted(wrong.headers))

    def test_wrong_password_login_takes_as_long(self) -> None:
        """An unknown email costs the same single hash as a wrong password."""
        self.app.config["BCRYPT_LOG_ROUNDS"] = 5
        add_user("test", "test@test.com", "test")
        check = mock.patch.object(
            bcrypt, "check_password_hash", side_effect=bcrypt.check_password_hash
        )
        for name, email in {"wrong": "test@test.com", "unknown": "nobody@test.com"}.items():
            with self.subTest(name), check as checked:
                self.login(email, "not the password")

                self.assertEqual(1, checked.call_count)
                self.assertEqual("$2b$05$", str(checked.call_args.args[0])[:7])
                self.assertEqual(60, len(checked.call_args.args[0]))

    def test_invalid_json_login(self) -> None:
        """A login needs an email and a password."""
        for body in ({}, {"email": "test@test.com"}, {"password": "test"}):
            with self.subTest(body=body):
                data = self.assert_error(
                    self.client.post("/auth/login", json=body), *INVALID_PAYLOAD
                )

                self.assertEqual({"email", "password"} - set(body), set(data["errors"]))

    def test_valid_logout(self) -> None:
        """A token logs out, by GET and by POST."""
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
        """A token whose time is over does not log out."""
        add_user("test", "test@test.com", "test")
        token = self.login().get_json()["auth_token"]

        self.move_clock(4)

        self.assert_error(self.get("/auth/logout", token), *EXPIRED_TOKEN)

    def test_invalid_logout(self) -> None:
        """What is no token does not log out."""
        self.assert_error(self.get("/auth/logout", "invalid"), *INVALID_TOKEN)

    def test_logout_without_token(self) -> None:
        """Logging out without a token is forbidden."""
        for method in ("GET", "POST"):
            with self.subTest(method):
                response = self.client.open("/auth/logout", method=method)

                self.assert_error(response, 403, "Provide a valid auth token.", "token_missing")

    def test_user_status(self) -> None:
        """A token tells who is calling, and nothing that is not listed."""
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
                    "created_at": user.created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
                },
            },
            response.get_json(),
        )

    def test_invalid_status(self) -> None:
        """What is no token tells nobody's name."""
        self.assert_error(self.get("/auth/status", "invalid"), *INVALID_TOKEN)

    def test_status_expired_token(self) -> None:
        """A token whose time is over tells nobody's name."""
        token = self.register()

        self.move_clock(4)

        self.assert_error(self.get("/auth/status", token), *EXPIRED_TOKEN)

    def test_status_without_token(self) -> None:
        """Status wants a token."""
        response = self.get("/auth/status")

        self.assert_error(response, 401, "Provide a valid auth token.", "token_missing")
