"""manage.py keys, rotate_keys and reencrypt_keys, and what they mean for tokens."""

import secrets
from datetime import timedelta
from typing import Any

import jwt
from sqlalchemy import update

from project import clock, db, errors
from project.accounts import audit
from project.models import SigningKey
from project.tests.api.oauth_case import KEYS
from project.tests.ops.issuer_case import ENCRYPTION_KEY, LIFETIME, IssuerTestCase
from project.tests.rows import stored_events
from project.tokens import signing_keys

OTHER_KEY = secrets.token_hex(32)


def kids() -> list[str]:
    """Return the kid of each key, the newest first."""
    return [row.kid for row in signing_keys.all_keys()]


def signer(token: str) -> str:
    """Return the kid in the header of a token."""
    kid: str = jwt.get_unverified_header(token)["kid"]
    return kid


class TestKeys(IssuerTestCase):
    """The commands about signing keys."""

    def setUp(self) -> None:
        """Register a user, whose token the first key signs."""
        super().setUp()
        self.token = self.register()
        (self.first,) = kids()

    def published(self) -> set[str]:
        """Return the kid of each public key that the service publishes."""
        return {key["kid"] for key in self.get(KEYS).get_json()["keys"]}

    def table(self, **environment: str) -> list[tuple[str, str, str]]:
        """Return kid, state and readability of each line of the table of keys."""
        head, *lines = self.manage("keys", **environment)
        self.assertEqual("kid", head.split()[0])
        cells = [line.replace("will sign", "will-sign").split() for line in lines]
        return [(line[0], line[1], line[-1]) for line in cells]

    def signed(self) -> dict[str, Any]:
        """Log in, and return the token pair."""
        pair: dict[str, Any] = self.login().get_json()
        return pair

    def test_rotation(self) -> None:
        """The new key is published at once and signs 15 minutes later; no token is refused."""
        lines = self.manage("rotate_keys")

        new, first = signing_keys.all_keys()
        self.assertEqual(self.first, first.kid)
        signs_from = f"{new.signs_from:%Y-%m-%dT%H:%M:%SZ}"
        until = f"{first.verifies_until:%Y-%m-%dT%H:%M:%SZ}"
        self.assertEqual(
            [
                f"The new key is {new.kid}. It signs from {signs_from}.",
                f"The earlier keys verify until {until}.",
            ],
            lines,
        )
        event = stored_events()[-1]
        self.assertEqual(
            (audit.Kind.KEYS_ROTATED, {"key": new.kid}, None, "manage.py"),
            (event["kind"], event["details"], event["user_id"], event["user_agent"]),
        )

        self.move_clock(60)
        self.assertEqual({self.first, new.kid}, self.published())
        self.assertEqual(self.first, signer(self.signed()["auth_token"]))
        self.move_clock(840)
        last = self.signed()["auth_token"]
        self.move_clock(60)
        self.assertEqual(new.kid, signer(self.signed()["auth_token"]))
        self.assertEqual(200, self.get("/auth/status", last).status_code)
        self.move_clock(LIFETIME)
        self.assertEqual({new.kid}, self.published())

    def test_leak(self) -> None:
        """With --now earlier keys verify nothing any more, and refresh tokens continue to work."""
        pair = self.signed()
        added, ended, *warning = self.manage("rotate_keys", "--now")

        new, _ = kids()
        self.assertIn(new, added)
        self.assertEqual("The earlier keys verify nothing any more.", ended)
        for words in ("clients have to refresh", "Refresh tokens continue", "up to 5 minutes"):
            self.assertIn(words, " ".join(warning).replace("so clients", "clients"))
        self.move_clock(60)
        self.assert_error(self.get("/auth/status", self.token), errors.TokenInvalid)
        refreshed = self.client.post(
            "/auth/refresh", json={"refresh_token": pair["refresh_token"]}
        ).get_json()
        self.assertEqual(new, signer(refreshed["auth_token"]))
        self.assertEqual({new}, self.published())

    def test_table(self) -> None:
        """The table has the state of each key, and whether it can be decrypted."""
        self.manage("rotate_keys", "--now")
        self.manage("rotate_keys")
        third, second, _ = kids()
        expected = [(third, "will-sign"), (second, "signs"), (self.first, "retired")]
        self.assertEqual([(*row, "yes") for row in expected], self.table())
        self.assertEqual([(*row, "no") for row in expected], self.table(ENCRYPTION_KEYS=OTHER_KEY))

        begun = {"signs_from": clock.utcnow() - timedelta(seconds=1)}
        db.session.execute(update(SigningKey).where(SigningKey.kid == third).values(begun))
        db.session.commit()
        states = dict(row[:2] for row in self.table())
        self.assertEqual({third: "signs", second: "verifies", self.first: "retired"}, states)

    def test_encryption_again(self) -> None:
        """All private keys are encrypted under the first key, after which the old one can go."""
        self.manage("rotate_keys")
        both = f"{OTHER_KEY},{ENCRYPTION_KEY}"

        for number in (2, 0):
            lines = self.manage("reencrypt_keys", ENCRYPTION_KEYS=both)
            self.assertEqual([f"Private keys encrypted again: {number}."], lines)
        readable = {row[2] for row in self.table(ENCRYPTION_KEYS=OTHER_KEY)}
        self.assertEqual({"yes"}, readable)
        self.assert_refused("No key of ENCRYPTION_KEYS decrypts", "reencrypt_keys")

    def test_first_key(self) -> None:
        """Without any key, a rotation makes the one that signs."""
        db.session.query(SigningKey).delete()
        db.session.commit()

        self.assertEqual([], self.table())
        (line,) = self.manage("rotate_keys")
        self.assertEqual([(kids()[0], "signs", "yes")], self.table())
        self.assertIn(kids()[0], line)

    def test_lost_key(self) -> None:
        """A server does not start with a key that it cannot decrypt; a new one helps."""
        other = {"ENCRYPTION_KEYS": OTHER_KEY}
        self.assert_refused("rotate_keys --now", "serve", **other)

        self.manage("rotate_keys", "--now", **other)
        states = [(row[1], row[2]) for row in self.table(**other)]
        self.assertEqual([("signs", "yes"), ("retired", "no")], states)

    def test_without_issuer(self) -> None:
        """Without ISSUER every command about keys and clients exits with a line."""
        for arguments in (
            ("keys",),
            ("rotate_keys",),
            ("rotate_keys", "--now"),
            ("reencrypt_keys",),
            ("clients",),
            ("create_client", "orders", "--audience", "https://api.example"),
            ("rotate_client_secret", "orders"),
            ("disable_client", "orders"),
        ):
            with self.subTest(arguments):
                self.assert_refused("ISSUER is not set", *arguments, ISSUER="")
        self.assertEqual([self.first], kids())
