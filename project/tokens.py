"""JSON Web Tokens in and out (RFC 7519, JWS compact serialization of RFC 7515).

Pure: the key, the moment and the lifetime come in as arguments.
"""

import re
from datetime import datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

import jwt

from project import identifiers
from project.errors import TokenExpired, TokenInvalid

ALGORITHM = "HS256"
MAX_LENGTH = 4_096  # characters; ours are under 300
IAT_LEEWAY = 5  # seconds another host's clock may be ahead of ours
REMEMBERED = 1_024  # genuine tokens, per process; a signature is as good the second time
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_HEADER = {"alg": ALGORITHM, "typ": "JWT"}
# PyJWT verifies the signature in its one spelling, `crit`, and that there is no foreign `aud`.
# Times are checked here, against the moment that was given and with stricter types.
_OPTIONS: jwt.types.Options = {
    "require": ["exp", "iat", "sub"],
    "verify_exp": False,
    "verify_iat": False,
    "verify_nbf": False,
}


def encode(user_id: int, *, key: str, now: datetime, lifetime: timedelta) -> str:
    """Return a signed token whose subject is `user_id`, valid from `now` for `lifetime`."""
    issued_at = int(now.timestamp())
    claims = {
        "sub": str(user_id),
        "iat": issued_at,
        "exp": issued_at + int(lifetime.total_seconds()),
    }
    return jwt.encode(claims, key, algorithm=ALGORITHM)


def decode(token: str, *, key: str, now: datetime) -> int:
    """Return the user id that a genuine token names at the moment `now`.

    Raises TokenExpired for a genuine token whose `exp` has come, TokenInvalid for all else.
    """
    claims = _verify(token, key)
    moment = now.timestamp()
    if claims.issued_at > moment + IAT_LEEWAY:
        raise TokenInvalid
    if claims.expires_at <= moment:
        raise TokenExpired
    return claims.user_id


class _Claims(NamedTuple):
    user_id: int
    issued_at: int  # seconds since 1970, as in the token
    expires_at: int


@lru_cache(REMEMBERED)
def _verify(token: str, key: str) -> _Claims:
    """Return what a genuine token says, at whatever time; raises TokenInvalid.

    The header has to be the very one that `encode` writes, so that no `kid`, `jku`, `x5u`,
    `jwk` or `crit` is ever looked at (RFC 8725, 3.1 and 3.10). What is refused is not remembered.
    """
    if len(token) > MAX_LENGTH or not _COMPACT.fullmatch(token):
        raise TokenInvalid
    try:
        decoded = jwt.decode_complete(token, key, algorithms=[ALGORITHM], options=_OPTIONS)
        claims = decoded["payload"]
        user_id = identifiers.parse(claims["sub"])
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise TokenInvalid from None
    if decoded["header"] != _HEADER or "nbf" in claims:
        raise TokenInvalid
    if type(claims["iat"]) is not int or type(claims["exp"]) is not int:
        raise TokenInvalid
    return _Claims(user_id, claims["iat"], claims["exp"])
