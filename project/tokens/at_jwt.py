"""Access tokens that other services can verify: RFC 9068, signed with ES256.

The functions are pure: keys, issuer and time are arguments. A token names its key in `kid`. The
signature of a token has two spellings (r, s and r, n - s), which both are valid: a token is
identified by its `jti`, never by its text.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NotRequired, TypedDict

import jwt

from project.errors import TokenInvalid
from project.tokens import codec, jwk

ALGORITHM = "ES256"
TYPE = "at+jwt"
_REQUIRED = ["iss", "aud", "sub", "client_id", "iat", "exp", "jti"]


class Claims(TypedDict):
    """The claims of a token, without `iss`; times are in seconds since 1970."""

    aud: str
    sub: str  # the user id, or the name of a client
    client_id: str
    iat: int
    exp: int
    jti: str
    scope: NotRequired[str]
    sid: NotRequired[str]  # the session; a client's own token has none
    auth_time: NotRequired[int]
    amr: NotRequired[list[str]]


class Issuer:
    """The name and the public keys, by `kid`, that tokens are verified with.

    Two are equal only if they are the same object, so that verified tokens can be cached.
    """

    def __init__(self, name: str, keys: Mapping[str, jwk.PublicKey]) -> None:
        self.name = name
        self.keys = keys


class OtherAlgorithm(TokenInvalid):
    """The token does not say that it is signed with ES256."""


class UnknownKey(TokenInvalid):
    """The token names a key that the issuer does not have."""


def encode(claims: Claims, *, issuer: str, kid: str, key: jwk.PrivateKey) -> str:
    """Return the signed token with these claims."""
    headers = {"typ": TYPE, "kid": kid}
    return jwt.encode({"iss": issuer, **claims}, key, algorithm=ALGORITHM, headers=headers)


@lru_cache(codec.CACHE_SIZE)
def verify(token: str, issuer: Issuer) -> tuple[str, Claims]:
    """Return the `kid` and the claims of a signed token, whatever the time and the audience.

    Raise OtherAlgorithm, UnknownKey, or TokenInvalid. Refusals are not cached. The header must
    equal the one that `encode` writes, so that no `jku`, `jwk`, `x5c` or `crit` is evaluated, and
    a key is used with ES256 only (RFC 8725, 3.1 and 3.10).
    """
    if not codec.is_compact(token):
        raise TokenInvalid
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise TokenInvalid from None
    if header.get("alg") != ALGORITHM:
        raise OtherAlgorithm
    kid = header.get("kid", "")
    if header != {"alg": ALGORITHM, "typ": TYPE, "kid": kid}:
        raise TokenInvalid
    if kid not in issuer.keys:
        raise UnknownKey
    return kid, _decode(token, issuer.keys[kid], issuer.name)


def _decode(token: str, key: jwk.PublicKey, issuer: str) -> Claims:
    try:
        payload: Any = jwt.decode(
            token,
            key,
            algorithms=[ALGORITHM],
            issuer=issuer,
            options={
                "require": _REQUIRED,
                "verify_aud": False,
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
            },
        )
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise TokenInvalid from None
    codec.integer(payload, "iat")
    codec.integer(payload, "exp")
    claims: Claims = payload
    return claims
