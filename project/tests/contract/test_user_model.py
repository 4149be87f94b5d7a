"""The User model and its two token methods, as the lesson has them."""

from datetime import UTC, datetime

from sqlalchemy.exc import IntegrityError

import project
from project import clock, db
from project.models import User
from project.tests.base import BaseTestCase
from project.tests.rows import add_user, stored_users


class TestUserModel(BaseTestCase):
    """The table of users, and the two token methods."""

    def test_imports(self) -> None:
        """create_app, db and bcrypt can be imported from the package."""
        names: dict[str, object] = {}

        exec("from project import create_app, db, bcrypt", names)  # noqa: S102  # the very line

        self.assertIs(project.create_app, names["create_app"])
        self.assertIs(project.db, names["db"])
        self.assertIs(project.bcrypt, names["bcrypt"])

    def test_add_user(self) -> None:
        """A new user has an id, is active, is no admin, and was created at a time in UTC."""
        before = clock.utcnow()

        user = add_user("justatest", "test@test.com", "test")

        after = clock.utcnow()
        db.session.expire_all()
        self.assertGreater(user.id, 0)
        self.assertEqual("justatest", user.username)
        self.assertEqual("test@test.com", user.email)
        self.assertIs(True, user.active)
        self.assertIs(False, user.admin)
        self.assertIs(UTC, user.created_at.tzinfo)
        self.assertLessEqual(before, user.created_at)
        self.assertLessEqual(user.created_at, after)

    def test_add_user_duplicate_username(self) -> None:
        """The database keeps usernames unique."""
        add_user("justatest", "test@test.com", "test")
        for username in ("justatest", "JustATest"):
            with self.subTest(username), self.assertRaises(IntegrityError):
                add_user(username, "test@test2.com", "test")
            db.session.rollback()

    def test_add_user_duplicate_email(self) -> None:
        """The database keeps emails unique."""
        add_user("justatest", "test@test.com", "test")

        with self.assertRaises(IntegrityError):
            add_user("justanothertest", "test@test.com", "test")

    def test_add_user_naive_time(self) -> None:
        """A time without a time zone is taken as UTC."""
        naive = datetime(2026, 11, 22, 9)  # noqa: DTZ001  # that is the point

        user = add_user("justatest", "test@test.com", "test", created_at=naive)

        self.assertEqual(naive.replace(tzinfo=UTC), stored_users()[0]["created_at"])
        self.assertEqual(
            "2026-11-22T09:00:00Z",
            self.get(f"/users/{user.id}").get_json()["data"]["created_at"],
        )

    def test_passwords_are_random(self) -> None:
        """Equal passwords of two users have different bcrypt hashes."""
        one = add_user("justatest", "test@test.com", "greaterthaneight")
        two = add_user("justatest2", "test@test2.com", "greaterthaneight")

        self.assertNotEqual(one.password, two.password)
        for user in (one, two):
            self.assertRegex(user.password, r"\A\$2b\$04\$[./A-Za-z0-9]{53}\Z")
            self.assertNotIn("greaterthaneight", user.password)

    def test_ids_are_never_reused(self) -> None:
        """The id of a deleted user is never used again."""
        user = add_user("justatest", "test@test.com", "test")
        db.session.delete(user)
        db.session.commit()

        self.assertGreater(add_user("justatest", "test@test.com", "test").id, user.id)

    def test_encode_auth_token(self) -> None:
        """A token is a text of three parts and carries the given id."""
        user = add_user("justatest", "test@test.com", "test")

        token = user.encode_auth_token(user.id)

        self.assertIsInstance(token, str)
        self.assertEqual(3, len(token.split(".")))
        self.assertEqual(user.id + 1, User.decode_auth_token(user.encode_auth_token(user.id + 1)))

    def test_decode_auth_token(self) -> None:
        """A valid token is decoded to the id as an integer."""
        user = add_user("justatest", "test@test.com", "test")

        user_id = User.decode_auth_token(user.encode_auth_token(user.id))

        self.assertIs(int, type(user_id))
        self.assertEqual(user.id, user_id)

    def test_decode_auth_token_expired(self) -> None:
        """An expired token is decoded to the message that says so."""
        user = add_user("justatest", "test@test.com", "test")
        token = user.encode_auth_token(user.id)

        self.move_clock(4)

        self.assertEqual("Signature expired. Please log in again.", User.decode_auth_token(token))

    def test_decode_auth_token_invalid(self) -> None:
        """An invalid token is decoded to the message that says so."""
        user = add_user("justatest", "test@test.com", "test")
        token = user.encode_auth_token(user.id)
        for text in ("", "invalid", "a.b.c", token[:-1], token + "A", token.swapcase()):
            with self.subTest(text):
                self.assertEqual(
                    "Invalid token. Please log in again.", User.decode_auth_token(text)
                )
