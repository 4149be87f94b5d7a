"""The user as a row, and as the subject of a token."""

from datetime import UTC, datetime

from sqlalchemy.exc import IntegrityError, StatementError

import project
from project import clock, db
from project.api.models import User
from project.tests.base import BaseTestCase
from project.tests.utils import add_user


class TestUserModel(BaseTestCase):
    """The table of users, and the two token methods."""

    def test_imports(self) -> None:
        """The package hands on what code outside it asks for."""
        names: dict[str, object] = {}

        exec("from project import create_app, db, bcrypt", names)  # noqa: S102  # the very line

        self.assertIs(project.create_app, names["create_app"])
        self.assertIs(project.db, names["db"])
        self.assertIs(project.bcrypt, names["bcrypt"])

    def test_add_user(self) -> None:
        """A user has an id, is active, is no admin, and was made at a moment in UTC."""
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
        """The database itself keeps usernames unique."""
        add_user("justatest", "test@test.com", "test")
        for username in ("justatest", "JustATest"):
            with self.subTest(username), self.assertRaises(IntegrityError):
                add_user(username, "test@test2.com", "test")
            db.session.rollback()

    def test_add_user_duplicate_email(self) -> None:
        """The database itself keeps emails unique."""
        add_user("justatest", "test@test.com", "test")

        with self.assertRaises(IntegrityError):
            add_user("justanothertest", "test@test.com", "test")

    def test_add_user_naive_moment(self) -> None:
        """A moment without a time zone is refused: nobody knows what it means."""
        naive = datetime(2026, 11, 22, 9)  # noqa: DTZ001  # that is the point

        with self.assertRaises(StatementError):
            add_user("justatest", "test@test.com", "test", created_at=naive)

    def test_passwords_are_random(self) -> None:
        """One password of two users is kept as two bcrypt hashes, and never itself."""
        one = add_user("justatest", "test@test.com", "greaterthaneight")
        two = add_user("justatest2", "test@test2.com", "greaterthaneight")

        self.assertNotEqual(one.password, two.password)
        for user in (one, two):
            self.assertRegex(user.password, r"\A\$2b\$04\$[./A-Za-z0-9]{53}\Z")
            self.assertNotIn("greaterthaneight", user.password)

    def test_ids_are_given_once(self) -> None:
        """The id of a user who is gone is nobody's again."""
        user = add_user("justatest", "test@test.com", "test")
        db.session.delete(user)
        db.session.commit()

        self.assertGreater(add_user("justatest", "test@test.com", "test").id, user.id)

    def test_encode_auth_token(self) -> None:
        """A token is text of three parts, and names the id that was asked for."""
        user = add_user("justatest", "test@test.com", "test")

        token = user.encode_auth_token(user.id)

        self.assertIsInstance(token, str)
        self.assertEqual(3, len(token.split(".")))
        self.assertEqual(user.id + 1, User.decode_auth_token(user.encode_auth_token(user.id + 1)))

    def test_decode_auth_token(self) -> None:
        """A genuine token gives the integer id."""
        user = add_user("justatest", "test@test.com", "test")

        user_id = User.decode_auth_token(user.encode_auth_token(user.id))

        self.assertIs(int, type(user_id))
        self.assertEqual(user.id, user_id)

    def test_decode_auth_token_expired(self) -> None:
        """A token whose time is over gives the message that says so."""
        user = add_user("justatest", "test@test.com", "test")
        token = user.encode_auth_token(user.id)

        self.move_clock(4)

        self.assertEqual("Signature expired. Please log in again.", User.decode_auth_token(token))

    def test_decode_auth_token_invalid(self) -> None:
        """What is no token of ours gives the message that says so."""
        user = add_user("justatest", "test@test.com", "test")
        token = user.encode_auth_token(user.id)
        for text in ("", "invalid", "a.b.c", token[:-1], token + "A", token.swapcase()):
            with self.subTest(text):
                self.assertEqual(
                    "Invalid token. Please log in again.", User.decode_auth_token(text)
                )
