"""The commands about the keys that sign tokens: rotate_keys, keys, reencrypt_keys."""

import re
import secrets
from datetime import datetime, timedelta

import jwt

from project import clock
from project.errors import TokenInvalid
from project.tests.base import bearer
from project.tests.ops.issuer import ENCRYPTION_KEY, SECRET_KEY, IssuerTestCase
from project.tests.rows import stored_events

ANOTHER_KEY = secrets.token_hex(32)


def kid_of(token: str) -> str:
    """Return the `kid` of a token."""
    return str(jwt.get_unverified_header(token)["kid"])


class KeysTestCase(IssuerTestCase):
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

        self.assertIn("again: 1.", self.manage("reencrypt_keys", ENCRYPTION_KEYS=both))
        self.assertIn("again: 0.", self.manage("reencrypt_keys", ENCRYPTION_KEYS=both))

        self.assertEqual({self.first: ("signs", "yes")}, self.states(ENCRYPTION_KEYS=ANOTHER_KEY))
        self.app.config["ENCRYPTION_KEYS"] = (ANOTHER_KEY,)
        self.move_clock(61)
        self.assertEqual(self.first, kid_of(self.log_in()))
        self.assertEqual(200, self.get("/auth/status", self.token).status_code)

    def test_unknown_key(self) -> None:
        """If a private key cannot be decrypted, nothing is changed."""
        before = self.execute("SELECT * FROM signing_keys")

        self.assert_refused("Nothing has changed", "reencrypt_keys", ENCRYPTION_KEYS=ANOTHER_KEY)

        self.assertEqual(before, self.execute("SELECT * FROM signing_keys"))


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


class TestWithoutIssuer(IssuerTestCase):
    """A service whose tokens only it verifies."""

    def test_refused(self) -> None:
        """Each of the commands is refused and changes nothing."""
        for arguments in (["rotate_keys"], ["rotate_keys", "--now"], ["keys"], ["reencrypt_keys"]):
            with self.subTest(arguments):
                self.assert_refused("ISSUER is not set", *arguments, ISSUER="")
        self.assertEqual([], self.execute("SELECT * FROM signing_keys"))
