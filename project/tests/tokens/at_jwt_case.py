"""Shared by the tests of forged tokens: a session, its token, and tokens that are made of it."""

import base64
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from project import clock
from project.tests.rows import stored_sessions
from project.tests.tokens.cases import IssuerTestCase, stored_ended, stored_keys
from project.tests.tokens.claims import claims_of, encode
from project.tokens import signing_keys

# The order of the curve P-256 (FIPS 186-5).
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
MISSING = object()  # a claim or a header that is left out


def to_base64(part: bytes) -> str:
    """Return bytes in base64url without padding."""
    return base64.urlsafe_b64encode(part).decode().rstrip("=")


def from_base64(part: str) -> bytes:
    """Return the bytes of a part of a token."""
    return base64.urlsafe_b64decode(part + "==")


def respelled(token: str) -> str:
    """Return a token with the other spelling of its signature: r, n - s instead of r, s."""
    bare, _, signature = token.rpartition(".")
    raw = from_base64(signature)
    opposite = ORDER - int.from_bytes(raw[32:])
    return f"{bare}.{to_base64(raw[:32] + opposite.to_bytes(32))}"


def without(members: dict[str, Any]) -> dict[str, Any]:
    """Return the members that are not MISSING."""
    return {name: value for name, value in members.items() if value is not MISSING}


class AtJwtTestCase(IssuerTestCase):
    """A test with a session, its token, and the private key of the service."""

    def setUp(self) -> None:
        """Log in, and stop the clock at a whole second."""
        super().setUp()
        self.move_clock(-clock.utcnow().microsecond / 1_000_000)
        self.now = int(clock.utcnow().timestamp())
        self.pair = self.log_in()
        self.token: str = self.pair["auth_token"]
        self.kid, self.key = signing_keys.signing_key()

    def signed(
        self,
        claims: dict[str, Any] | str | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
        /,
        header: str | None = None,
        **headers: Any,
    ) -> str:
        """Return the token with these claims and headers, by default with the service's own key."""
        parts = without({"alg": "ES256", "kid": self.kid, "typ": "at+jwt"} | headers)
        payload = claims_of(self.token) if claims is None else claims
        signed = f"{encode(header or parts)}.{encode(payload)}"
        signature = (key or self.key).sign(signed.encode(), ec.ECDSA(SHA256()))
        r, s = decode_dss_signature(signature)
        return f"{signed}.{to_base64(r.to_bytes(32) + s.to_bytes(32))}"

    def with_claims(self, **changes: Any) -> str:
        """Return the token with changed claims, signed by the service."""
        return self.signed(without(claims_of(self.token) | changes))

    def assert_all_invalid(self, **tokens: str) -> None:
        """Check that each of the named tokens is refused as invalid, and nothing changes."""
        before = stored_sessions(), stored_keys(), stored_ended()
        for name, token in tokens.items():
            with self.subTest(name):
                self.assert_invalid(token)
        self.assertEqual(before, (stored_sessions(), stored_keys(), stored_ended()))
