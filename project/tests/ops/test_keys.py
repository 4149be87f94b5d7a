"""The commands about the keys that sign tokens: rotate_keys, keys, reencrypt_keys."""

import re
import secrets
import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, ClassVar
from unittest import mock

import jwt
import pyotp
from sqlalchemy import insert, select

from project import clock, db
from project.accounts import administration, second_factor
from project.errors import TokenInvalid, WrongCode
from project.models import TotpFactor, User
from project.tests import scratch
from project.tests.base import bearer
from project.tests.ops.issuer import (
    ENCRYPTION_KEY,
    PRODUCTION,
    SECRET_KEY,
    SETTINGS,
    IssuerTestCase,
)
from project.tests.rows import ORIGIN, stored_events
from project.tests.tokens.claims import claims_of

ANOTHER_KEY = secrets.token_hex(32)


def kid_of(token: str) -> str:
    """Return the `kid` of a token."""
    return str(jwt.get_unverified_header(token)["kid"])


def printed_by_reencryption(private_keys: int, authenticators: int) -> str:
    """Return what reencrypt_keys prints on standard output."""
    return (
        f"Authenticators encrypted again: {authenticators}.\n"
        f"Private keys encrypted again: {private_keys}.\n"
    )


class FactorsTestCase(IssuerTestCase):
    """A test of these commands, in which users set authenticators up."""

    def setUp(self) -> None:
        """Start without authenticators."""
        super().setUp()
        self.tokens: dict[str, str] = {}
        self.secrets: dict[str, str] = {}  # in base32

    def run_command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Return what a command in production returns."""
        settings = PRODUCTION | SETTINGS | {"DATABASE_URL": self.url}
        return scratch.manage(*arguments, **settings | environment)

    def begin(self, name: str, token: str) -> None:
        """Begin to set an authenticator up."""
        self.tokens[name] = token
        body = {"current_password": "test"}
        answer = self.client.post("/auth/totp", json=body, headers=bearer(token))
        self.assertEqual(200, answer.status_code, answer.get_data(as_text=True))
        self.secrets[name] = answer.get_json()["data"]["secret"]

    def code(self, name: str) -> str:
        """Return the code that the authenticator of a user shows."""
        return pyotp.TOTP(self.secrets[name]).at(clock.utcnow())

    def confirm(self, name: str) -> None:
        """Turn the authenticator of a user on."""
        body = {"code": self.code(name)}
        headers = bearer(self.tokens[name])
        answer = self.client.post("/auth/totp/confirm", json=body, headers=headers)
        self.assertEqual(200, answer.status_code, answer.get_data(as_text=True))


class KeysTestCase(FactorsTestCase):
    """A test of these commands, with a user who is logged in."""

    def setUp(self) -> None:
        """Register a user, for whose token the first key is made."""
        super().setUp()
        response = self.add("ada")
        self.assertEqual(201, response.status_code)
        self.pair = response.get_json()
        self.token: str = self.pair["auth_token"]
        self.first = kid_of(self.token)

    def rotate(self, *options: str) -> tuple[str, str]:
        """Rotate the keys; return the `kid` of the new one, and the other lines."""
        printed = self.manage("rotate_keys", *options)
        first, rest = printed.split("\n", 1)
        return first.removeprefix("New key: "), rest

    def published(self) -> list[str]:
        """Return the `kid` of each public key that other services get."""
        return [key["kid"] for key in self.get("/.well-known/jwks.json").get_json()["keys"]]

    def log_in(self) -> str:
        """Return the auth token of a login."""
        response = self.login("ada@test.com")
        self.assertEqual(200, response.status_code)
        return str(response.get_json()["auth_token"])

    def states(self, **environment: str) -> dict[str, tuple[str, str]]:
        """Return, by `kid`, the state that `keys` prints, and whether the key can be decrypted."""
        header, *lines = self.manage("keys", **environment).splitlines()
        self.assertEqual("kid", header.split()[0])
        rows = [re.split(" {2,}", line) for line in lines]
        return {kid: (state, decrypts) for kid, state, *_, decrypts in rows}


class TestRotation(KeysTestCase):
    """rotate_keys."""

    def test_rotation(self) -> None:
        """The new key signs 15 minutes later, and the other verifies until its last token ends."""
        before = clock.utcnow()

        new, printed = self.rotate()

        begin, end = (datetime.fromisoformat(one) for one in re.findall(r"\S+Z", printed))
        self.assertAlmostEqual(900, (begin - before).total_seconds(), delta=30)
        self.assertEqual(timedelta(seconds=3_600 + 60), end - begin)
        self.assertNotIn("Warning", printed)
        self.move_clock(61)
        self.assertEqual(self.first, kid_of(self.log_in()))
        self.assertEqual({self.first, new}, set(self.published()))
        self.move_clock(900)
        self.assertEqual(new, kid_of(self.log_in()))
        self.assertEqual(200, self.get("/auth/status", self.token).status_code)
        self.move_clock(3_660)
        self.assertEqual([new], self.published())
        rotations = [event for event in stored_events() if event["kind"] == "keys_rotated"]
        self.assertEqual([{"key": new}], [event["details"] for event in rotations])

    def test_leak(self) -> None:
        """With --now tokens of earlier keys are refused within a minute; refresh tokens are not."""
        new, printed = self.rotate("--now")

        self.assertIn("It signs from now on.\nNo earlier key verifies tokens.", printed)
        self.assertIn("Warning: this breaks tokens that are in use.", printed)
        self.move_clock(61)
        self.assert_error(self.get("/auth/status", self.token), TokenInvalid)
        body = {"refresh_token": self.pair["refresh_token"]}
        refreshed = self.client.post("/auth/refresh", json=body).get_json()["auth_token"]
        self.assertEqual(new, kid_of(refreshed))
        self.assertEqual(200, self.get("/auth/status", refreshed).status_code)
        self.assertEqual([new], self.published())

    def test_lost_encryption_key(self) -> None:
        """Without the key that encrypted the private key, --now makes logins possible again.

        Until then `serve` does not start.
        """
        lost = "No key of ENCRYPTION_KEYS decrypts the key that signs tokens"
        self.assert_refused(lost, "serve", ENCRYPTION_KEYS=ANOTHER_KEY)
        self.app.config["ENCRYPTION_KEYS"] = (ANOTHER_KEY,)
        self.assertEqual(500, self.login("ada@test.com").status_code)

        printed = self.manage("rotate_keys", "--now", ENCRYPTION_KEYS=ANOTHER_KEY)

        self.move_clock(61)
        self.assertIn(kid_of(self.log_in()), printed)


class TestTable(KeysTestCase):
    """keys."""

    def test_states(self) -> None:
        """Each key is listed with its state."""
        self.assertEqual({self.first: ("signs", "yes")}, self.states())
        second, _ = self.rotate()
        self.assertEqual({"signs", "published"}, {state for state, _ in self.states().values()})
        self.assertEqual(("published", "yes"), self.states()[second])
        self.execute("UPDATE signing_keys SET signs_from = created_at WHERE kid = :kid", kid=second)
        self.assertEqual({second: ("signs", "yes"), self.first: ("verifies", "yes")}, self.states())
        third, _ = self.rotate("--now")
        self.assertEqual(
            {third: ("signs", "yes"), second: ("retired", "yes"), self.first: ("retired", "yes")},
            self.states(),
        )

    def test_secrets(self) -> None:
        """Keys that cannot be decrypted are listed too, and no secret is."""
        self.assertEqual({self.first: ("signs", "no")}, self.states(ENCRYPTION_KEYS=ANOTHER_KEY))
        printed = self.manage("keys")
        for secret in (ENCRYPTION_KEY, SECRET_KEY):
            self.assertNotIn(secret, printed)


class TestReencryption(KeysTestCase):
    """reencrypt_keys."""

    def test_another_key(self) -> None:
        """After the re-encryption the old key is not needed any more, and tokens stay valid."""
        both = f"{ANOTHER_KEY},{ENCRYPTION_KEY}"

        for number in (1, 0):
            printed = self.manage("reencrypt_keys", ENCRYPTION_KEYS=both)
            self.assertEqual(printed_by_reencryption(number, 0), printed)

        self.assertEqual({self.first: ("signs", "yes")}, self.states(ENCRYPTION_KEYS=ANOTHER_KEY))
        self.app.config["ENCRYPTION_KEYS"] = (ANOTHER_KEY,)
        self.move_clock(61)
        self.assertEqual(self.first, kid_of(self.log_in()))
        self.assertEqual(200, self.get("/auth/status", self.token).status_code)

    def test_unknown_key(self) -> None:
        """If a private key cannot be decrypted, none is changed, but authenticators are."""
        before = self.execute("SELECT * FROM signing_keys")
        self.begin("ada", self.token)
        for keys, authenticators in ((ANOTHER_KEY, 0), (f"{ANOTHER_KEY},{ENCRYPTION_KEY}", 1)):
            result = self.run_command("reencrypt_keys", ENCRYPTION_KEYS=keys)

            self.assertEqual(1, result.returncode)
            printed = f"Authenticators encrypted again: {authenticators}.\n"
            self.assertEqual(printed, result.stdout)
            self.assertRegex(result.stderr, r"\ANo private key has changed[^\n]*\n\Z")
            self.assertEqual(before, self.execute("SELECT * FROM signing_keys"))

            self.execute("UPDATE signing_keys SET private = :key", key=b"x")
            before = self.execute("SELECT * FROM signing_keys")


class TestReencryptionOfAuthenticators(KeysTestCase):
    """reencrypt_keys, where users have authenticators."""

    both = f"{ANOTHER_KEY},{ENCRYPTION_KEY}"

    def add_user(self, name: str) -> None:
        """Register a user who begins to set an authenticator up."""
        self.begin(name, self.add(name).get_json()["auth_token"])

    def stored(self) -> dict[int, bytes]:
        """Return the stored secrets by the id of their user."""
        rows = self.execute("SELECT user_id, secret FROM totp_factors")
        return {user_id: bytes(secret) for user_id, secret in rows}

    def id_of(self, name: str) -> int:
        """Return the id of a user."""
        ((user_id,),) = self.execute("SELECT id FROM users WHERE username = :name", name=name)
        return int(user_id)

    def log_in_with_code(self, name: str) -> dict[str, Any]:
        """Return the tokens of a login with a code."""
        body = {"email": f"{name}@test.com", "password": "test", "code": self.code(name)}
        answer = self.client.post("/auth/login", json=body)
        self.assertEqual(200, answer.status_code, answer.get_data(as_text=True))
        tokens: dict[str, Any] = answer.get_json()
        return tokens

    def test_all(self) -> None:
        """Then the first key alone decrypts all secrets, also those that are being set up."""
        for name in ("bob", "cho", "dan"):
            self.add_user(name)
        for name in ("bob", "cho"):
            self.confirm(name)
        before = self.stored()
        for private_keys, authenticators in ((1, 3), (0, 0)):
            printed = self.manage("reencrypt_keys", ENCRYPTION_KEYS=self.both)
            self.assertEqual(printed_by_reencryption(private_keys, authenticators), printed)

        after = self.stored()
        self.assertEqual(before.keys(), after.keys())
        self.assertEqual(set(), set(before.values()) & set(after.values()))
        self.app.config["ENCRYPTION_KEYS"] = (ANOTHER_KEY,)
        self.move_clock(61)
        for name in ("bob", "cho"):
            token = self.log_in_with_code(name)["auth_token"]
            self.assertEqual(["pwd", "otp"], claims_of(token)["amr"])
        self.confirm("dan")

    def test_nothing_else_changes(self) -> None:
        """A code that was used before is wrong after it, and recovery codes stay."""
        self.add_user("bob")
        self.confirm("bob")
        query = "SELECT user_id, last_step, email_verified FROM totp_factors"
        before = self.execute(query), self.execute("SELECT * FROM recovery_codes")

        self.manage("reencrypt_keys", ENCRYPTION_KEYS=self.both)

        after = self.execute(query), self.execute("SELECT * FROM recovery_codes")
        self.assertEqual(before, after)

    def test_unreadable(self) -> None:
        """A secret that no key decrypts stays as it is; the others are done, and the code is 1."""
        for name in ("bob", "cho", "dan", "eve"):
            self.add_user(name)
        copied, damaged = self.id_of("bob"), self.id_of("dan")
        statement = "UPDATE totp_factors SET secret = :secret WHERE user_id = :user_id"
        self.execute(statement, secret=self.stored()[self.id_of("cho")], user_id=copied)
        self.execute(statement, secret=b"x", user_id=damaged)
        before = self.stored()

        result = self.run_command("reencrypt_keys", ENCRYPTION_KEYS=self.both)

        self.assertEqual(1, result.returncode)
        self.assertEqual(printed_by_reencryption(1, 2), result.stdout)
        expected = "Authenticators that no key of ENCRYPTION_KEYS decrypts: 2.\n"
        self.assertEqual(expected, result.stderr)
        after = self.stored()
        unchanged = {user_id for user_id in before if before[user_id] == after[user_id]}
        self.assertEqual({copied, damaged}, unchanged)
        self.app.config["ENCRYPTION_KEYS"] = (ANOTHER_KEY,)
        self.move_clock(61)
        for name in ("cho", "eve"):
            self.confirm(name)

    def test_batches(self) -> None:
        """More authenticators than fit in a batch are all encrypted again, batch by batch."""
        number = second_factor.REENCRYPTED_AT_ONCE + 5
        users = [
            {
                "username": f"user{each}",
                "username_key": f"user{each}",
                "email": f"user{each}@test.com",
                "password": "x",
                "active": True,
                "admin": False,
                "created_at": clock.utcnow(),
            }
            for each in range(number)
        ]
        db.session.execute(insert(User), users)
        ids = db.session.scalars(select(User.id).where(User.password == "x")).all()
        rows = [
            {"user_id": each, "secret": second_factor.encrypt(f"SECRET{each}", each)}
            for each in ids
        ]
        db.session.execute(insert(TotpFactor), rows)
        db.session.commit()
        with mock.patch.dict(self.app.config, ENCRYPTION_KEYS=(ANOTHER_KEY, ENCRYPTION_KEY)):
            batches = []
            for batch in second_factor.reencrypt():
                db.session.rollback()
                batches.append(batch)
            self.assertEqual([(second_factor.REENCRYPTED_AT_ONCE, 0), (5, 0)], batches)

        printed = self.manage("reencrypt_keys", ENCRYPTION_KEYS=self.both)

        self.assertEqual(printed_by_reencryption(1, number), printed)
        with mock.patch.dict(self.app.config, ENCRYPTION_KEYS=(ANOTHER_KEY,)):
            for user_id, secret in self.stored().items():
                self.assertEqual(f"SECRET{user_id}", second_factor.decrypt(secret, user_id))

    def meanwhile(self, act: Callable[[], object]) -> list[tuple[int, int]]:
        """Encrypt again, and do something after a batch was read; return the batches."""
        original, acts = second_factor.decrypt, [act]

        def decrypt(stored: bytes, user_id: int) -> str:
            if acts:
                with mock.patch.dict(self.app.config, ENCRYPTION_KEYS=(ENCRYPTION_KEY,)):
                    acts.pop()()
            return original(stored, user_id)

        keys = ANOTHER_KEY, ENCRYPTION_KEY
        with (
            mock.patch.dict(self.app.config, ENCRYPTION_KEYS=keys),
            mock.patch.object(second_factor, "decrypt", decrypt),
        ):
            batches = []
            for batch in second_factor.reencrypt():
                db.session.commit()
                batches.append(batch)
        self.assertEqual([], acts)
        return batches

    def test_set_up_again_meanwhile(self) -> None:
        """A secret that its user replaces meanwhile is the one that is stored afterwards."""
        self.add_user("bob")
        token = self.tokens["bob"]

        self.assertEqual([(0, 0)], self.meanwhile(lambda: self.begin("bob", token)))

        self.confirm("bob")
        with mock.patch.dict(self.app.config, ENCRYPTION_KEYS=(ANOTHER_KEY, ENCRYPTION_KEY)):
            self.move_clock(61)
            self.log_in_with_code("bob")
        self.manage("reencrypt_keys", ENCRYPTION_KEYS=self.both)
        with mock.patch.dict(self.app.config, ENCRYPTION_KEYS=(ANOTHER_KEY,)):
            self.move_clock(61)
            self.log_in_with_code("bob")

    def test_used_meanwhile(self) -> None:
        """A code that is used meanwhile stays used."""
        self.add_user("bob")
        self.confirm("bob")
        self.move_clock(30)
        code = self.code("bob")

        self.assertEqual([(1, 0)], self.meanwhile(lambda: self.log_in_with_code("bob")))

        body = {"email": "bob@test.com", "password": "test", "code": code}
        with mock.patch.dict(self.app.config, ENCRYPTION_KEYS=(ANOTHER_KEY, ENCRYPTION_KEY)):
            self.assert_error(self.client.post("/auth/login", json=body), WrongCode)

    def test_turned_off_meanwhile(self) -> None:
        """A factor that is removed meanwhile stays removed."""
        self.add_user("bob")
        self.confirm("bob")

        def reset() -> None:
            with self.app.app_context():
                administration.reset_totp_of("bob@test.com", ORIGIN)
                db.session.commit()

        self.assertEqual([(0, 0)], self.meanwhile(reset))

        self.assertEqual({}, self.stored())


class TestPurge(KeysTestCase):
    """purge."""

    def test_purge(self) -> None:
        """Retired keys and sessions in the feed whose tokens have expired are deleted."""
        for _ in range(3):
            token = self.log_in()
            self.client.get("/auth/logout", headers=bearer(token))
        new, _ = self.rotate("--now")
        self.execute(
            "UPDATE ended_sessions SET expires_at = ended_at WHERE session_id IN"
            " (SELECT session_id FROM ended_sessions LIMIT 2)"
        )

        printed = self.manage("purge")

        self.assertIn("sessions in the feed: 2; retired keys: 1.", printed)
        self.assertEqual({new: ("signs", "yes")}, self.states())
        self.assertEqual(1, len(self.execute("SELECT * FROM ended_sessions")))


class TestWithoutIssuer(FactorsTestCase):
    """A service whose tokens only it verifies."""

    environment: ClassVar = SETTINGS | {"ISSUER": ""}

    def test_refused(self) -> None:
        """The commands about keys that sign are refused and change nothing."""
        for arguments in (["rotate_keys"], ["rotate_keys", "--now"], ["keys"]):
            with self.subTest(arguments):
                self.assert_refused("ISSUER is not set", *arguments, ISSUER="")
        self.assertEqual([], self.execute("SELECT * FROM signing_keys"))

    def test_reencryption(self) -> None:
        """Authenticators are encrypted again; without ENCRYPTION_KEYS one line says that."""
        both = f"{ANOTHER_KEY},{ENCRYPTION_KEY}"
        answer = self.add("ada")
        self.begin("ada", answer.get_json()["auth_token"])
        before = self.execute("SELECT * FROM totp_factors")
        reason = "ENCRYPTION_KEYS is not set: the service encrypts nothing."
        self.assert_refused(reason, "reencrypt_keys", ISSUER="", ENCRYPTION_KEYS="")
        self.assertEqual(before, self.execute("SELECT * FROM totp_factors"))

        printed = self.manage("reencrypt_keys", ISSUER="", ENCRYPTION_KEYS=both)

        self.assertEqual(printed_by_reencryption(0, 1), printed)
        self.app.config["ENCRYPTION_KEYS"] = (ANOTHER_KEY,)
        self.confirm("ada")
