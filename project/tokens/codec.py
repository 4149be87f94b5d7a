"""JSON Web Tokens in and out (RFC 7519, JWS compact serialization of RFC 7515).

Pure: the keys and the moment come in as arguments. There are two kinds, told apart by the `typ` of
the header and by `aud` (RFC 8725, 3.11 and 3.12), so that neither is ever taken for the other.
One key signs. Others may verify too, in the order in which they are given: no token says which.
"""

import contextlib
import re
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jwt

from project import identifiers
from project.errors import TokenExpired, TokenInvalid

ALGORITHM = "HS256"
MAX_LENGTH = 4_096  # characters; ours are under 400
IAT_LEEWAY = 5  # seconds another host's clock may be ahead of ours
REMEMBERED = 1_024  # genuine tokens, per process; a signature is as good the second time
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


class _Kind(NamedTuple):
    type: str
    audience: str | None


_ACCESS = _Kind("JWT", None)
_REFRESH = _Kind("refresh+jwt", "refresh")


class Access(NamedTuple):
    """What an `auth_token` says; times are in seconds since 1970."""

    user_id: int
    session_id: str | None  # None in one that was made outside of any session
    issued_at: int
    expires_at: int


class Refresh(NamedTuple):
    """What a `refresh_token` says; times are in seconds since 1970."""

    user_id: int
    session_id: str
    generation: int  # how often the session had been refreshed before
    logged_in_at: int
    issued_at: int
    expires_at: int


def encode_access(claims: Access, *, key: str) -> str:
    """Return the signed token that says `claims`."""
    session = {"sid": claims.session_id} if claims.session_id is not None else {}
    return _sign(_ACCESS, claims, session, key)


def encode_refresh(claims: Refresh, *, key: str) -> str:
    """Return the signed token that says `claims`."""
    session = {
        "sid": claims.session_id,
        "gen": claims.generation,
        "auth_time": claims.logged_in_at,
        "aud": _REFRESH.audience,
    }
    return _sign(_REFRESH, claims, session, key)


def decode_access(token: str, *, keys: tuple[str, ...], now: datetime) -> Access:
    """Return what an auth token that is genuine under one of `keys` says at the moment `now`.

    Raises TokenExpired for a genuine token whose `exp` has come, TokenInvalid for all else.
    """
    claims = _verify_access(token, keys)
    _check_times(claims, now)
    return claims


def decode_refresh(token: str, *, keys: tuple[str, ...], now: datetime) -> Refresh:
    """As `decode_access`, for a refresh token."""
    claims = _verify_refresh(token, keys)
    _check_times(claims, now)
    return claims


def _check_times(claims: Access | Refresh, now: datetime) -> None:
    moment = now.timestamp()
    if claims.issued_at > moment + IAT_LEEWAY:
        raise TokenInvalid
    if claims.expires_at <= moment:
        raise TokenExpired


def _sign(kind: _Kind, claims: Access | Refresh, session: dict[str, Any], key: str) -> str:
    payload = {
        "sub": str(claims.user_id),
        **session,
        "iat": claims.issued_at,
        "exp": claims.expires_at,
    }
    return jwt.encode(payload, key, algorithm=ALGORITHM, headers={"typ": kind.type})


@lru_cache(REMEMBERED)
def _verify_access(token: str, keys: tuple[str, ...]) -> Access:
    """Return what a genuine auth token says, at whatever time; what is refused isn't remembered.

    Nor is what was genuine under keys that are others now.
    """
    payload, user_id = _verify(_ACCESS, token, keys)
    session_id = _session_id(payload) if "sid" in payload else None
    return Access(user_id, session_id, _integer(payload, "iat"), _integer(payload, "exp"))


def _verify_refresh(token: str, keys: tuple[str, ...]) -> Refresh:
    payload, user_id = _verify(_REFRESH, token, keys)
    integers = (_integer(payload, claim) for claim in ("gen", "auth_time", "iat", "exp"))
    claims = Refresh(user_id, _session_id(payload), *integers)
    if not (0 <= claims.generation < identifiers.MAX_ID):
        raise TokenInvalid
    if not (0 <= claims.logged_in_at <= claims.issued_at):
        raise TokenInvalid
    return claims


def _verify(kind: _Kind, token: str, keys: tuple[str, ...]) -> tuple[dict[str, Any], int]:
    """Return the payload and the user id of a genuine token; raises TokenInvalid.

    The header has to be the very one that `_sign` writes, so that no `kid`, `jku`, `x5u`, `jwk`
    or `crit` is ever looked at (RFC 8725, 3.1 and 3.10). PyJWT verifies the signature in its one
    spelling, and the audience; times are checked by `_check_times`, with stricter types.
    """
    if len(token) > MAX_LENGTH or not _COMPACT.fullmatch(token):
        raise TokenInvalid
    try:
        decoded = _decode(kind, token, keys)
        payload: dict[str, Any] = decoded["payload"]
        user_id = identifiers.parse(payload["sub"])
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise TokenInvalid from None
    if decoded["header"] != {"alg": ALGORITHM, "typ": kind.type} or "nbf" in payload:
        raise TokenInvalid
    return payload, user_id


def _decode(kind: _Kind, token: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return header and payload as PyJWT does, by the first of `keys` that the signature fits.

    What else may be wrong with a token is wrong under every key, and ends the search.
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


def _integer(payload: dict[str, Any], claim: str) -> int:
    value = payload.get(claim)
    if type(value) is not int:
        raise TokenInvalid
    return value


def _session_id(payload: dict[str, Any]) -> str:
    try:
        return identifiers.parse_session(payload.get("sid"))
    except ValueError:
        raise TokenInvalid from None
