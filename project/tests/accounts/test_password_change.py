"""POST /auth/password: the password is changed with the current one, and other sessions end."""

import contextlib
import itertools
import json
import unicodedata
from collections.abc import Iterator
from unittest import mock

from sqlalchemy import update
from werkzeug.test import TestResponse

from project import bcrypt, db, errors
from project.lib import hashing
from project.models import User
from project.tests.accounts.cases import SessionsTestCase
from project.tests.base import bearer
from project.tests.rows import stored_sessions, stored_users
from project.tests.tokens.claims import session_of

OLD, NEW = "test", "correct-horse-battery"


class PasswordTestCase(SessionsTestCase):
    """A test of a user with two sessions."""

    def setUp(self) -> None:
        """Log the user in twice, and another user once."""
        super().setUp()
        self.token, self.second = self.start(), self.start()
        self.others = self.start("other@test.com")

    def change(self, current: object = OLD, new: object = NEW, **members: object) -> TestResponse:
        """Return the response to the user who changes their password."""
        body = {"current_password": current, "new_password": new} | members
        return self.client.post("/auth/password", json=body, headers=bearer(self.token))

    def change_successfully(self, current: str = OLD, new: str = NEW, **members: object) -> None:
        """Change the password, and check that the response is a success."""
        response = self.change(current, new, **members)

        data = {"status": "success", "message": "Password changed."}
        self.assertEqual((200, data), (response.status_code, response.get_json()))

    def assert_wrong(self, current: str) -> None:
        """Check that this is refused as the current password."""
        self.assert_error(self.change(current), errors.WrongPassword)

    def assert_invalid(self, response: TestResponse, field: str) -> None:
        """Check that a body is refused for one field, and no password is echoed."""
        data = self.assert_error(response, errors.InvalidPayload)
        self.assertEqual([field], list(data["errors"]))
        self.assertTrue(data["errors"][field])
        for secret in (NEW, "xxxx", "éé"):
            self.assertNotIn(secret, response.get_data(as_text=True))


class TestChange(PasswordTestCase):
    """What a password change does."""

    def test_password(self) -> None:
        """The new password logs in, and the old one no longer does."""
        self.change_successfully()

        self.assert_error(self.login(password=OLD), errors.InvalidCredentials)
        self.assertEqual(200, self.login(password=NEW).status_code)

    def test_hash(self) -> None:
        """A hash at the configured cost is stored, and nothing else of the user changes."""
        self.app.config["BCRYPT_LOG_ROUNDS"] = 5
        db.session.execute(update(User).values(password=hashing.hash(OLD)))
        db.session.commit()
        before = stored_users()

        self.change_successfully()

        after = stored_users()
        self.assertTrue(after[0]["password"].startswith("$2b$05$"))
        self.assertNotEqual(before[0]["password"], after[0]["password"])
        self.assertEqual([before[0] | {"password": after[0]["password"]}, before[1]], after)

    def test_sessions(self) -> None:
        """The caller's session stays, and every other session of the user ends."""
        self.change_successfully()

        self.assert_live(self.token, self.others)
        self.assert_refused(self.second, errors.SessionEnded)
        self.assertEqual(2, len(stored_sessions()))

    def test_refresh_tokens(self) -> None:
        """The refresh token of the caller's session stays valid; those of other sessions do not."""
        calling, other = self.login().get_json(), self.login().get_json()
        self.token = calling["auth_token"]

        self.change_successfully()

        answers = [
            self.client.post("/auth/refresh", json={"refresh_token": pair["refresh_token"]})
            for pair in (calling, other)
        ]
        self.assertEqual(200, answers[0].status_code)
        self.assert_error(answers[1], errors.SessionEnded)

    def test_sessions_are_kept(self) -> None:
        """With keep_sessions the other sessions stay too."""
        self.change_successfully(keep_sessions=True)

        self.assert_live(self.token, self.second, self.others)

    def test_sessions_are_not_kept(self) -> None:
        """keep_sessions is false by default, and may be given as false."""
        self.change_successfully(keep_sessions=False)

        self.assert_live(self.token)
        self.assert_refused(self.second, errors.SessionEnded)

    def test_other_users(self) -> None:
        """Only the token says whose password changes, whatever else the body has."""
        other = self.other.id

        self.change_successfully(
            user_id=other, id=other, email="other@test.com", admin=True, active=False
        )

        self.assertEqual(200, self.login("other@test.com", OLD).status_code)
        self.assertEqual(200, self.login("test@test.com", NEW).status_code)
        flags = [(user["active"], user["admin"]) for user in stored_users()]
        self.assertEqual(2 * [(True, False)], flags)

    def test_again(self) -> None:
        """A changed password can be changed again, with the new one as the current one."""
        self.change_successfully()

        self.assert_error(self.change(OLD), errors.WrongPassword)
        self.change_successfully(NEW, OLD)
        self.assertEqual(200, self.login().status_code)


class TestRules(PasswordTestCase):
    """New passwords follow the rules of registration, current passwords those of login."""

    def test_wrong(self) -> None:
        """A wrong current password is refused as wrong, and nothing changes."""
        for current in ("Test", "test ", " test", "tes", "test\0", "\0", NEW):
            with self.subTest(current), self.assert_nothing_changes():
                self.assert_wrong(current)
        self.assert_live(self.token, self.second)

    def test_far_too_long(self) -> None:
        """A current password longer than any valid one is wrong, not invalid."""
        for current in ("x" * 1_025, "é" * 513, OLD * 300, "x" * 60_000):
            self.assert_wrong(current)

    def test_current(self) -> None:
        """The current password is a non-empty string."""
        for current in ("", None, 1, True, ["test"], {"text": "test"}):
            with self.subTest(current=current), self.assert_nothing_changes():
                self.assert_invalid(self.change(current), "current_password")

    def test_new(self) -> None:
        """The new password is a string of 1 to 1,024 bytes, and is never echoed."""
        long = ["x" * 1_025, "é" * 512 + "x", "🦀" * 257, NEW * 2_000, "e\u0301" * 513]
        for new in ["", *long, None, 1, False, [NEW], {"text": NEW}]:
            with self.subTest(str(new)[:10]), self.assert_nothing_changes():
                self.assert_invalid(self.change(new=new), "new_password")

    def test_keep_sessions(self) -> None:
        """keep_sessions is true or false, and nothing else."""
        values: list[object] = ["true", "false", "", 1, 0, 1.0, None, [True], {}]
        for keep in values:
            with self.subTest(keep=keep), self.assert_nothing_changes():
                self.assert_invalid(self.change(keep_sessions=keep), "keep_sessions")

    def test_missing(self) -> None:
        """Both passwords are required, and a missing one is named."""
        for body in ({}, {"current_password": OLD}, {"new_password": NEW}):
            with self.subTest(body=body):
                headers = bearer(self.token)
                response = self.client.post("/auth/password", json=body, headers=headers)

                data = self.assert_error(response, errors.InvalidPayload)
                missing = {"current_password", "new_password"} - set(body)
                self.assertEqual(dict.fromkeys(missing, "is required"), data["errors"])

    def test_every_byte_counts(self) -> None:
        """Every byte counts, past the 72nd and past a NUL, in old and new passwords."""
        for password in ("x" * 80, "x" * 79 + "y", "a\0b", "a\0c", "é" * 512, "x" * 1_024, " "):
            with self.subTest(password[:5]):
                self.change_successfully(self.current, password)
                self.current = password

                self.assertEqual(200, self.login(password=password).status_code)
                for other in (password[:-1] + "z", password + "z", password[:72] + "z", "a"):
                    self.assert_error(self.login(password=other), errors.InvalidCredentials)
                    self.assert_wrong(other)

    current = OLD

    def test_normalized(self) -> None:
        """A composed and a decomposed letter are the same password, old or new."""
        whole, parts = (unicodedata.normalize(form, "Amélie" * 100) for form in ("NFC", "NFD"))
        self.change_successfully(OLD, parts)
        self.assertEqual(200, self.login(password=whole).status_code)
        self.change_successfully(whole, OLD)
        self.change_successfully(OLD, whole)
        self.change_successfully(parts, "e\u0301" * 512)
        self.assertEqual(200, self.login(password="é" * 512).status_code)


class TestGuards(PasswordTestCase):
    """Who may change a password, and in which order a request is checked."""

    def post(self, body: bytes, token: str | None = None) -> TestResponse:
        """Return the response to a body given as bytes, with or without a token."""
        headers = bearer(token) if token else {}
        return self.client.post(
            "/auth/password", data=body, headers=headers, content_type="application/json"
        )

    def test_come_before_the_body(self) -> None:
        """The token is checked before the body is read, whatever the body is."""
        self.get("/auth/logout", self.second)
        good = json.dumps({"current_password": OLD, "new_password": NEW}).encode()
        for body in (good, b"", b"{", b"[]", b"{}", b"x" * 70_000):
            with self.subTest(body[:10]):
                response = self.post(body)
                self.assert_error(response, errors.TokenMissing)
                self.assertEqual('Bearer realm="users"', response.headers["WWW-Authenticate"])
                self.assert_error(self.post(body, "invalid"), errors.TokenInvalid)
                self.assert_error(self.post(body, self.second), errors.SessionEnded)
        self.assertEqual(200, self.login().status_code)

    def test_inactive(self) -> None:
        """A deactivated user changes nothing."""
        db.session.execute(update(User).values(active=False))
        db.session.commit()

        with self.assert_nothing_changes():
            self.assert_error(self.change(), errors.AccountInactive)

    def test_gate(self) -> None:
        """When all hash slots are taken, a request is refused at once and before anything else."""
        with self.app.app_context():
            pool: hashing.HashingPool = self.app.extensions["hashing_pool"]
            for _ in range(self.app.config["GRANIAN_BLOCKING_THREADS"]):
                pool.enter()
            for response in (self.change(), self.post(b""), self.post(b"{", "invalid")):
                self.assert_error(response, errors.Busy)
                self.assertEqual("1", response.headers["Retry-After"])
        self.change_successfully()

    def test_hash_slots_are_released(self) -> None:
        """Each request releases its hash slot, whatever its response."""
        for _ in range(self.app.config["GRANIAN_BLOCKING_THREADS"]):
            self.assert_wrong("wrong")
            self.assertEqual(401, self.post(b"").status_code)
            self.assertEqual(400, self.post(b"", self.token).status_code)
        self.change_successfully()

    def test_work(self) -> None:
        """A change costs two hashes, and a wrong password costs one."""
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
    """The user changes while their password is being checked."""

    @contextlib.contextmanager
    def meanwhile(self, **changes: list[object]) -> Iterator[None]:
        """Change a column of the user to the next value after each check of a password."""
        ((column, values),) = changes.items()
        left = iter(values)

        def verify(hashed: str | None, password: str) -> bool:
            genuine = original(hashed, password)
            for value in itertools.islice(left, 1):
                statement = update(User).where(User.id == self.user.id).values({column: value})
                with db.engine.begin() as connection:
                    connection.execute(statement)
            return genuine

        original = hashing.verify
        with mock.patch.object(hashing, "verify", verify):
            yield

    def test_deactivated(self) -> None:
        """A user who is deactivated meanwhile gets neither another password nor a session."""
        hashed, before = stored_users()[0]["password"], stored_sessions()
        with self.meanwhile(active=[False]):
            self.assert_error(self.change(), errors.AccountInactive)
        db.session.execute(update(User).values(active=True))
        db.session.commit()
        with self.meanwhile(active=[False]):
            self.assert_error(self.login(), errors.AccountInactive)

        self.assertEqual((hashed, before), (stored_users()[0]["password"], stored_sessions()))

    def test_ended(self) -> None:
        """A caller whose session is ended meanwhile changes nothing."""
        session_id = session_of(self.token)
        hashed = stored_users()[0]["password"]

        def end(password: str) -> str:
            with mock.patch.object(hashing, "hash", original):
                path = f"/auth/sessions/{session_id}"
                ended = self.client.delete(path, headers=bearer(self.second))
            self.assertEqual(200, ended.status_code)
            return original(password)

        original = hashing.hash
        with mock.patch.object(hashing, "hash", end):
            self.assert_error(self.change(), errors.SessionEnded)

        self.assertEqual(hashed, stored_users()[0]["password"])
        self.assertEqual(200, self.get("/auth/status", self.second).status_code)

    def test_changed(self) -> None:
        """A password that is replaced meanwhile is refused, at a change and at a login."""
        with self.meanwhile(password=[hashing.hash("newer")]):
            self.assert_wrong(OLD)
        with self.meanwhile(password=[hashing.hash("newest")]):
            self.assert_error(self.login(password="newer"), errors.InvalidCredentials)

        self.assertEqual(200, self.login(password="newest").status_code)
        self.assertEqual(4, len(stored_sessions()))

    def test_renewed(self) -> None:
        """A hash that is only renewed meanwhile is accepted, even twice in a row."""
        with self.meanwhile(password=[hashing.hash(OLD), hashing.hash(OLD)]):
            self.assertEqual(200, self.login().status_code)
        with self.meanwhile(password=[hashing.hash(OLD), hashing.hash(OLD)]):
            self.change_successfully()

        self.assertEqual(200, self.login(password=NEW).status_code)

    def test_endlessly(self) -> None:
        """When the account changes under every check, the response is Busy with Retry-After."""
        hashes: list[object] = [hashing.hash(OLD) for _ in range(6)]
        with self.meanwhile(password=hashes):
            for response in (self.change(), self.login()):
                self.assert_error(response, errors.Busy)
                self.assertEqual("1", response.headers["Retry-After"])

        self.assertEqual(hashes[-1], stored_users()[0]["password"])
        self.assertEqual(3, len(stored_sessions()))
