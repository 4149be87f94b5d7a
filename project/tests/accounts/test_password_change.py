"""The password: changed by whoever knows it, and what that does to the sessions."""

import contextlib
import itertools
import json
import unicodedata
from collections.abc import Iterator
from unittest import mock

from sqlalchemy import update
from werkzeug.test import TestResponse

from project import bcrypt, db, passwords
from project.api.models import User
from project.tests.base import bearer
from project.tests.test_sessions import (
    CONTACT_US,
    ENDED,
    INVALID,
    INVALID_PAYLOAD,
    SessionsTestCase,
    session_of,
)
from project.tests.utils import stored_sessions, stored_users

OLD, NEW = "test", "correct-horse-battery"
WRONG = (400, "Current password is wrong.", "wrong_password")
UNKNOWN = (404, "User does not exist.", "invalid_credentials")
BUSY = (503, "The service is busy. Please try again.", "busy")


class PasswordTestCase(SessionsTestCase):
    """A test of somebody who is logged in twice."""

    def setUp(self) -> None:
        """Log the user in twice, and another one too."""
        super().setUp()
        self.token, self.second = self.start(), self.start()
        self.others = self.start("other@test.com")

    def change(self, current: object = OLD, new: object = NEW, **members: object) -> TestResponse:
        """Return the answer to the user who changes their password."""
        body = {"current_password": current, "new_password": new} | members
        return self.client.post("/auth/password", json=body, headers=bearer(self.token))

    def changed(self, current: str = OLD, new: str = NEW, **members: object) -> None:
        """Change the password."""
        response = self.change(current, new, **members)

        data = {"status": "success", "message": "Password changed."}
        self.assertEqual((200, data), (response.status_code, response.get_json()))

    @contextlib.contextmanager
    def nothing_changes(self) -> Iterator[None]:
        """Check that what is done in the block changes neither a user nor a session."""
        before = stored_users(), stored_sessions()
        yield
        self.assertEqual(before, (stored_users(), stored_sessions()))

    def assert_wrong(self, current: str) -> None:
        """Check that this isn't the current password."""
        self.assert_error(self.change(current), *WRONG)

    def assert_invalid(self, response: TestResponse, field: str) -> None:
        """Check that a body is refused for one field, and that no password is echoed."""
        data = self.assert_error(response, *INVALID_PAYLOAD)
        self.assertEqual([field], list(data["errors"]))
        self.assertTrue(data["errors"][field])
        for secret in (NEW, "xxxx", "éé"):
            self.assertNotIn(secret, response.get_data(as_text=True))


class TestChange(PasswordTestCase):
    """What a change does."""

    def test_password(self) -> None:
        """The new password logs in, and the old one doesn't any more."""
        self.changed()

        self.assert_error(self.login(password=OLD), *UNKNOWN)
        self.assertEqual(200, self.login(password=NEW).status_code)

    def test_hash(self) -> None:
        """A hash at the configured cost is stored, and nothing else of the user changes."""
        self.app.config["BCRYPT_LOG_ROUNDS"] = 5
        db.session.execute(update(User).values(password=passwords.hash(OLD)))
        db.session.commit()
        before = stored_users()

        self.changed()

        after = stored_users()
        self.assertTrue(after[0]["password"].startswith("$2b$05$"))
        self.assertNotEqual(before[0]["password"], after[0]["password"])
        self.assertEqual([before[0] | {"password": after[0]["password"]}, before[1]], after)

    def test_sessions(self) -> None:
        """The calling session lives, and every other one of the user has ended."""
        self.changed()

        self.assert_live(self.token, self.others)
        self.assert_refused(self.second, ENDED)
        self.assertEqual(2, len(stored_sessions()))

    def test_refresh_tokens(self) -> None:
        """The refresh token of the calling session is still good; those of others are not."""
        calling, other = self.login().get_json(), self.login().get_json()
        self.token = calling["auth_token"]

        self.changed()

        answers = [
            self.client.post("/auth/refresh", json={"refresh_token": pair["refresh_token"]})
            for pair in (calling, other)
        ]
        self.assertEqual(200, answers[0].status_code)
        self.assert_error(answers[1], *ENDED)

    def test_sessions_are_kept(self) -> None:
        """With keep_sessions the others live on."""
        self.changed(keep_sessions=True)

        self.assert_live(self.token, self.second, self.others)

    def test_sessions_are_not_kept(self) -> None:
        """To keep none is what happens unless told, and can be told."""
        self.changed(keep_sessions=False)

        self.assert_live(self.token)
        self.assert_refused(self.second, ENDED)

    def test_somebody_else(self) -> None:
        """Whose password it is says the token alone, whatever else is in the body."""
        other = self.other.id

        self.changed(user_id=other, id=other, email="other@test.com", admin=True, active=False)

        self.assertEqual(200, self.login("other@test.com", OLD).status_code)
        self.assertEqual(200, self.login("test@test.com", NEW).status_code)
        flags = [(user["active"], user["admin"]) for user in stored_users()]
        self.assertEqual(2 * [(True, False)], flags)

    def test_again(self) -> None:
        """A password that was changed can be changed again, with the new one."""
        self.changed()

        self.assert_error(self.change(OLD), *WRONG)
        self.changed(NEW, OLD)
        self.assertEqual(200, self.login().status_code)


class TestRules(PasswordTestCase):
    """A new password is what it is at registration, and the current one what it is at a login."""

    def test_wrong(self) -> None:
        """A wrong current password is said to be wrong, and nothing changes."""
        for current in ("Test", "test ", " test", "tes", "test\0", "\0", NEW):
            with self.subTest(current), self.nothing_changes():
                self.assert_wrong(current)
        self.assert_live(self.token, self.second)

    def test_far_too_long(self) -> None:
        """A current password too long to be anybody's is wrong, and not invalid."""
        for current in ("x" * 1_025, "é" * 513, OLD * 300, "x" * 60_000):
            self.assert_wrong(current)

    def test_current(self) -> None:
        """The current password is a string that is not empty."""
        for current in ("", None, 1, True, ["test"], {"text": "test"}):
            with self.subTest(current=current), self.nothing_changes():
                self.assert_invalid(self.change(current), "current_password")

    def test_new(self) -> None:
        """The new password is a string of 1 to 1,024 bytes, and is never echoed."""
        long = ["x" * 1_025, "é" * 512 + "x", "🦀" * 257, NEW * 2_000, "e\u0301" * 513]
        for new in ["", *long, None, 1, False, [NEW], {"text": NEW}]:
            with self.subTest(str(new)[:10]), self.nothing_changes():
                self.assert_invalid(self.change(new=new), "new_password")

    def test_keep_sessions(self) -> None:
        """To keep sessions is said with true and false, and with nothing like them."""
        values: list[object] = ["true", "false", "", 1, 0, 1.0, None, [True], {}]
        for keep in values:
            with self.subTest(keep=keep), self.nothing_changes():
                self.assert_invalid(self.change(keep_sessions=keep), "keep_sessions")

    def test_missing(self) -> None:
        """Both passwords are needed, and what is missing is named."""
        for body in ({}, {"current_password": OLD}, {"new_password": NEW}):
            with self.subTest(body=body):
                headers = bearer(self.token)
                response = self.client.post("/auth/password", json=body, headers=headers)

                data = self.assert_error(response, *INVALID_PAYLOAD)
                missing = {"current_password", "new_password"} - set(body)
                self.assertEqual(dict.fromkeys(missing, "is required"), data["errors"])

    def test_every_byte_counts(self) -> None:
        """Past the 72nd byte and past a NUL too, in the old password as in the new one."""
        for password in ("x" * 80, "x" * 79 + "y", "a\0b", "a\0c", "é" * 512, "x" * 1_024, " "):
            with self.subTest(password[:5]):
                self.changed(self.current, password)
                self.current = password

                self.assertEqual(200, self.login(password=password).status_code)
                for other in (password[:-1] + "z", password + "z", password[:72] + "z", "a"):
                    self.assert_error(self.login(password=other), *UNKNOWN)
                    self.assert_wrong(other)

    current = OLD

    def test_normalized(self) -> None:
        """A letter and its parts are one password, in the old one as in the new one."""
        whole, parts = (unicodedata.normalize(form, "Amélie" * 100) for form in ("NFC", "NFD"))
        self.changed(OLD, parts)
        self.assertEqual(200, self.login(password=whole).status_code)
        self.changed(whole, OLD)
        self.changed(OLD, whole)
        self.changed(parts, "e\u0301" * 512)
        self.assertEqual(200, self.login(password="é" * 512).status_code)


class TestGuards(PasswordTestCase):
    """Who may change a password, and when."""

    def post(self, body: bytes, token: str | None = None) -> TestResponse:
        """Return the answer to bytes, with a token or without."""
        headers = bearer(token) if token else {}
        return self.client.post(
            "/auth/password", data=body, headers=headers, content_type="application/json"
        )

    def test_come_before_the_body(self) -> None:
        """Who is calling is asked before the body is read, whatever is in it."""
        self.get("/auth/logout", self.second)
        good = json.dumps({"current_password": OLD, "new_password": NEW}).encode()
        for body in (good, b"", b"{", b"[]", b"{}", b"x" * 70_000):
            with self.subTest(body[:10]):
                response = self.post(body)
                message = "Provide a valid auth token."
                self.assert_error(response, 401, message, "token_missing")
                self.assertEqual("Bearer", response.headers["WWW-Authenticate"])
                self.assert_error(self.post(body, "invalid"), *INVALID)
                self.assert_error(self.post(body, self.second), *ENDED)
        self.assertEqual(200, self.login().status_code)

    def test_inactive(self) -> None:
        """Who is deactivated changes nothing any more."""
        db.session.execute(update(User).values(active=False))
        db.session.commit()

        with self.nothing_changes():
            self.assert_error(self.change(), *CONTACT_US)

    def test_gate(self) -> None:
        """When the line for hashing is full one is told so at once, before anything else."""
        with self.app.app_context():
            gate: passwords.Gate = self.app.extensions["password_gate"]
            for _ in range(self.app.config["GRANIAN_BLOCKING_THREADS"] // 2):
                gate.enter()
            for response in (self.change(), self.post(b""), self.post(b"{", "invalid")):
                self.assert_error(response, *BUSY)
                self.assertEqual("1", response.headers["Retry-After"])
        self.changed()

    def test_places_are_given_back(self) -> None:
        """Each request gives its place at the line back, however it ends."""
        for _ in range(self.app.config["GRANIAN_BLOCKING_THREADS"]):
            self.assert_wrong("wrong")
            self.assertEqual(401, self.post(b"").status_code)
            self.assertEqual(400, self.post(b"", self.token).status_code)
        self.changed()

    def test_work(self) -> None:
        """A change costs two hashes, and a wrong password one."""
        for current, checks, hashes in (("wrong", 1, 0), (OLD, 1, 1)):
            with mock.patch.multiple(
                bcrypt,
                check_password_hash=mock.Mock(wraps=bcrypt.check_password_hash),
                generate_password_hash=mock.Mock(wraps=bcrypt.generate_password_hash),
            ):
                self.change(current)
                made = (
                    bcrypt.check_password_hash.call_count,
                    bcrypt.generate_password_hash.call_count,
                )

            self.assertEqual((checks, hashes), made)


class TestMeanwhile(PasswordTestCase):
    """What happens to a user while their password is checked."""

    @contextlib.contextmanager
    def meanwhile(self, **changes: list[object]) -> Iterator[None]:
        """Let somebody else change the user's column, once after each check of a password."""
        ((column, values),) = changes.items()
        left = iter(values)

        def verify(hashed: str | None, password: str) -> bool:
            genuine = original(hashed, password)
            for value in itertools.islice(left, 1):
                statement = update(User).where(User.id == self.user.id).values({column: value})
                with db.engine.begin() as connection:
                    connection.execute(statement)
            return genuine

        original = passwords.verify
        with mock.patch.object(passwords, "verify", verify):
            yield

    def test_deactivated(self) -> None:
        """Who is deactivated meanwhile gets no other password, and no session."""
        hashed, before = stored_users()[0]["password"], stored_sessions()
        with self.meanwhile(active=[False]):
            self.assert_error(self.change(), *CONTACT_US)
        db.session.execute(update(User).values(active=True))
        db.session.commit()
        with self.meanwhile(active=[False]):
            self.assert_error(self.login(), *CONTACT_US)

        self.assertEqual((hashed, before), (stored_users()[0]["password"], stored_sessions()))

    def test_ended(self) -> None:
        """Whose session is ended meanwhile changes nothing: that was the answer to who ended it."""
        session_id = session_of(self.token)
        hashed = stored_users()[0]["password"]

        def end(password: str) -> str:
            with mock.patch.object(passwords, "hash", original):
                path = f"/auth/sessions/{session_id}"
                ended = self.client.delete(path, headers=bearer(self.second))
            self.assertEqual(200, ended.status_code)
            return original(password)

        original = passwords.hash
        with mock.patch.object(passwords, "hash", end):
            self.assert_error(self.change(), *ENDED)

        self.assertEqual(hashed, stored_users()[0]["password"])
        self.assertEqual(200, self.get("/auth/status", self.second).status_code)

    def test_changed(self) -> None:
        """A password that was replaced meanwhile is no more the current one, nor logs it in."""
        with self.meanwhile(password=[passwords.hash("newer")]):
            self.assert_wrong(OLD)
        with self.meanwhile(password=[passwords.hash("newest")]):
            self.assert_error(self.login(password="newer"), *UNKNOWN)

        self.assertEqual(200, self.login(password="newest").status_code)
        self.assertEqual(4, len(stored_sessions()))

    def test_renewed(self) -> None:
        """A hash that was only renewed meanwhile is no obstacle, not even when it was twice."""
        with self.meanwhile(password=[passwords.hash(OLD), passwords.hash(OLD)]):
            self.assertEqual(200, self.login().status_code)
        with self.meanwhile(password=[passwords.hash(OLD), passwords.hash(OLD)]):
            self.changed()

        self.assertEqual(200, self.login(password=NEW).status_code)

    def test_endlessly(self) -> None:
        """Where the account changes under every check, the user is told to come again."""
        hashes: list[object] = [passwords.hash(OLD) for _ in range(6)]
        with self.meanwhile(password=hashes):
            for response in (self.change(), self.login()):
                self.assert_error(response, *BUSY)
                self.assertEqual("1", response.headers["Retry-After"])

        self.assertEqual(hashes[-1], stored_users()[0]["password"])
        self.assertEqual(3, len(stored_sessions()))
