"""Encode and decode JSON Web Tokens (RFC 7519, JWS compact serialization of RFC 7515).

The functions are pure: the keys and the time are arguments. Each kind of token has its own `typ`
and `aud` (RFC 8725, 3.11 and 3.12), so that none is accepted as another one. The kinds of links are
in `links`.
One key signs. Several keys may verify, and are tried in their order: no token names its key.
"""

import contextlib
import re
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jwt

from project import ids
from project.errors import TokenExpired, TokenInvalid

ALGORITHM = "HS256"
MAX_LENGTH = 4_096  # characters; the service's own tokens have fewer than 400
IAT_LEEWAY = 5  # seconds by which the clock of another server may be ahead
CACHE_SIZE = 1_024  # valid tokens whose signature is not verified again, per process
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


class Kind(NamedTuple):
    """What distinguishes one kind of token from all others."""

    type: str
    audience: str | None


_ACCESS = Kind("JWT", None)
_REFRESH = Kind("refresh+jwt", "refresh")


class AccessClaims(NamedTuple):
    """The claims of an `auth_token`; times are in seconds since 1970."""

    user_id: int
    session_id: str | None  # None in a token that belongs to no session
    issued_at: int
    expires_at: int


class RefreshClaims(NamedTuple):
    """The claims of a `refresh_token`; times are in seconds since 1970."""

    user_id: int
    session_id: str
    generation: int  # the number of refreshes of the session before
    logged_in_at: int
    issued_at: int
    expires_at: int


def encode_access(claims: AccessClaims, *, key: str, amr: list[str] | None = None) -> str:
    """Return the signed token with these claims, which says with `amr` how the user logged in."""
    session: dict[str, Any] = {}
    if claims.session_id is not None:
        session["sid"] = claims.session_id
    if amr is not None:
        session["amr"] = amr
    return sign(_ACCESS, claims.user_id, session, claims.issued_at, claims.expires_at, key)


def encode_refresh(claims: RefreshClaims, *, key: str) -> str:
    """Return the signed token with these claims."""
    session = {
        "sid": claims.session_id,
        "gen": claims.generation,
        "auth_time": claims.logged_in_at,
    }
    return sign(_REFRESH, claims.user_id, session, claims.issued_at, claims.expires_at, key)


def decode_access(token: str, *, keys: tuple[str, ...], now: datetime) -> AccessClaims:
    """Return the claims of an auth token that one of `keys` has signed and that is valid at `now`.

    Raise TokenExpired for a signed token that has expired, and TokenInvalid for any other token.
    """
    claims = _verify_access(token, keys)
    check_times(claims.issued_at, claims.expires_at, now)
    return claims


def decode_refresh(token: str, *, keys: tuple[str, ...], now: datetime) -> RefreshClaims:
    """Return the claims of a refresh token, as `decode_access` does of an auth token."""
    claims = _verify_refresh(token, keys)
    check_times(claims.issued_at, claims.expires_at, now)
    return claims


def check_times(issued_at: int, expires_at: int, now: datetime) -> None:
    """Raise TokenInvalid for a token from the future, and TokenExpired for one that has expired."""
    moment = now.timestamp()
    if issued_at > moment + IAT_LEEWAY:
        raise TokenInvalid
    if expires_at <= moment:
        raise TokenExpired


def sign(
    kind: Kind, subject: int, claims: dict[str, Any], issued_at: int, expires_at: int, key: str
) -> str:
    """Return a signed token of a kind; `claims` are those that not every kind has."""
    audience = {"aud": kind.audience} if kind.audience is not None else {}
    payload = {"sub": str(subject), **claims, **audience, "iat": issued_at, "exp": expires_at}
    return jwt.encode(payload, key, algorithm=ALGORITHM, headers={"typ": kind.type})


@lru_cache(CACHE_SIZE)
def _verify_access(token: str, keys: tuple[str, ...]) -> AccessClaims:
    """Return the claims of a signed auth token, whatever the time. Refusals are not cached.

    The keys are part of the cache key: a token of a key that was removed is verified again.
    """
    payload, user_id = verify(_ACCESS, token, keys)
    session_id = _session_id(payload) if "sid" in payload else None
    return AccessClaims(user_id, session_id, integer(payload, "iat"), integer(payload, "exp"))


def _verify_refresh(token: str, keys: tuple[str, ...]) -> RefreshClaims:
    payload, user_id = verify(_REFRESH, token, keys)
    integers = (integer(payload, claim) for claim in ("gen", "auth_time", "iat", "exp"))
    claims = RefreshClaims(user_id, _session_id(payload), *integers)
    if not (0 <= claims.generation < ids.MAX_ID):
        raise TokenInvalid
    if not (0 <= claims.logged_in_at <= claims.issued_at):
        raise TokenInvalid
    return claims


def verify(kind: Kind, token: str, keys: tuple[str, ...]) -> tuple[dict[str, Any], int]:
    """Return the payload and the subject of a signed token; raise TokenInvalid.

    The header must equal the one that `sign` writes, so that no `kid`, `jku`, `x5u`, `jwk` or
    `crit` is evaluated (RFC 8725, 3.1 and 3.10). PyJWT verifies the signature and the audience.
    `check_times` checks the times, with stricter types than PyJWT.
    """
    if not is_compact(token):
        raise TokenInvalid
    try:
        decoded = _decode(kind, token, keys)
        payload: dict[str, Any] = decoded["payload"]
        subject = ids.parse(payload["sub"])
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise TokenInvalid from None
    if decoded["header"] != {"alg": ALGORITHM, "typ": kind.type} or "nbf" in payload:
        raise TokenInvalid
    return payload, subject


def is_compact(token: str) -> bool:
    """Return whether a text has the form of a JWS in compact serialization, and is not too long."""
    return len(token) <= MAX_LENGTH and bool(_COMPACT.fullmatch(token))


def _decode(kind: Kind, token: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return header and payload as PyJWT does, verified by the first of `keys` that fits.

    A token that has another fault than its signature is refused without trying the other keys.
    """
    for key in keys:
        with contextlib.suppress(jwt.InvalidSignatureError):
            return jwt.decode_complete(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=kind.audience,
                options={
                    "require": ["exp", "iat", "sub"],
                    "strict_aud": kind.audience is not None,
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
    raise TokenInvalid


def integer(payload: dict[str, Any], claim: str) -> int:
    """Return a claim that is an integer; raise TokenInvalid if it is anything else."""
    value = payload.get(claim)
    if type(value) is not int:
        raise TokenInvalid
    return value


def _session_id(payload: dict[str, Any]) -> str:
    try:
        return ids.parse_session(payload.get("sid"))
    except ValueError:
        raise TokenInvalid from None
