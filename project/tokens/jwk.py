"""Key pairs for ES256, and JSON Web Keys (RFC 7517, RFC 7518 6.2). The functions are pure."""

import base64
import hashlib
import json
from typing import Any, NamedTuple, cast

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)
from jwt.algorithms import ECAlgorithm

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


class KeyPair(NamedTuple):
    """A new key pair."""

    kid: str  # the thumbprint of the public key
    public: dict[str, str]  # a JWK
    private: bytes  # PKCS #8 in DER, not encrypted


def make() -> KeyPair:
    """Return a new key pair on the curve P-256."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = {name: str(value) for name, value in _as_jwk(key.public_key()).items()}
    kid = thumbprint(public)
    private = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return KeyPair(kid, {**public, "kid": kid, "alg": "ES256", "use": "sig"}, private)


def thumbprint(public: dict[str, str]) -> str:
    """Return the SHA-256 thumbprint of an elliptic curve key (RFC 7638), in base64url."""
    members = {name: public[name] for name in ("crv", "kty", "x", "y")}
    digest = hashlib.sha256(json.dumps(members, separators=(",", ":")).encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def parse_public(public: dict[str, str]) -> PublicKey:
    """Return the key of a JWK that `make` returned."""
    return cast(PublicKey, ECAlgorithm.from_jwk(public))


def parse_private(private: bytes) -> PrivateKey:
    """Return the key that `make` returned in DER."""
    return cast(PrivateKey, load_der_private_key(private, password=None))


def _as_jwk(key: PublicKey) -> dict[str, Any]:
    return ECAlgorithm.to_jwk(key, as_dict=True)
