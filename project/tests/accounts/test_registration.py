"""Registration, beyond the lesson's tests in contract/test_auth.py."""

from functools import partial
from typing import Any

from project import errors
from project.tests.accounts.cases import at_once
from project.tests.base import BaseTestCase
from project.tests.rows import add_user, stored_users

REGISTRATION = {"username": "justatest", "email": "test@test.com", "password": "123456"}


class TestRegistration(BaseTestCase):
    """Usernames and emails that are taken."""

    def test_username_and_email_of_two_users(self) -> None:
        """The username of one user and the email of another are refused together."""
        add_user("justatest", "test@test.com2", "test")
        add_user("test", "test@test.com", "test")

        response = self.client.post("/auth/register", json=REGISTRATION)

        self.assert_error(response, errors.UserExists)
        self.assertEqual(2, len(stored_users()))

    def test_registrations_at_once(self) -> None:
        """Of simultaneous registrations with one email or one username, one succeeds."""
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

                responses = at_once(
                    *[
                        partial(self.app.test_client().post, "/auth/register", json=body)
                        for body in bodies
                    ]
                )

                answers = [(each.status_code, each.get_json().get("code")) for each in responses]
                self.assertEqual(
                    [(201, None)] + 3 * [(400, "user_exists")], sorted(answers, key=str)
                )
