"""The tokens of links in emails: JWTs that are bound to the state which using them changes.

A token names its purpose in `typ` and `aud`, and contains an HMAC over the state of the account at
the time when it was issued. Using the token changes that state, so each works once; and a change of
the password or the email invalidates all tokens from before. The functions are pure.
The token for the second step of a login has the same form, but using it does not change the state.
"""

import base64
import hmac
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from project.errors import TokenInvalid
from project.tokens import codec

STATE_BYTES = 16


class Purpose(StrEnum):
    """What a token is for."""

    VERIFY = "verify"
    RESET = "reset"
    EMAIL = "email"
    INVITATION = "invitation"
    MFA = "mfa"  # the second step of a login, of which no email has a link


class LinkClaims(NamedTuple):
    """The claims of a link; times are in seconds since 1970."""

    subject: int  # the user id; of an invitation, its own id
    state: str  # from `seal`
    email: str | None  # the new email, of a link that changes it
    issued_at: int
    expires_at: int


def encode(purpose: Purpose, claims: LinkClaims, *, key: str) -> str:
    """Return the signed token with these claims."""
    others = {"state": claims.state}
    if claims.email is not None:
        others["email"] = claims.email
    return codec.sign(
        _kind(purpose), claims.subject, others, claims.issued_at, claims.expires_at, key
    )


def decode(purpose: Purpose, token: str, *, keys: tuple[str, ...], now: datetime) -> LinkClaims:
    """Return the claims of a token that one of `keys` has signed and that is valid at `now`.

    The caller compares `state`. Raise TokenExpired for a signed token that has expired, and
    TokenInvalid for any other token.
    """
    payload, subject = codec.verify(_kind(purpose), token, keys)
    state, email = payload.get("state"), payload.get("email")
    if not isinstance(state, str) or not isinstance(email, str | None):
        raise TokenInvalid
    issued_at, expires_at = (codec.integer(payload, claim) for claim in ("iat", "exp"))
    codec.check_times(issued_at, expires_at, now)
    return LinkClaims(subject, state, email, issued_at, expires_at)


def _kind(purpose: Purpose) -> codec.Kind:
    return codec.Kind(f"{purpose}+jwt", purpose.value)


def seal(purpose: Purpose, state: tuple[str, ...], *, key: str) -> str:
    """Return an HMAC-SHA-256 of what a link depends on, shortened to STATE_BYTES, in base64url."""
    parts = (f"link {purpose}", *state)
    # Each part with its length, so that no two tuples give the same text.
    message = "".join(f"{len(part)}:{part}" for part in parts)
    digest = hmac.digest(key.encode(), message.encode(), "sha256")
    return base64.urlsafe_b64encode(digest[:STATE_BYTES]).rstrip(b"=").decode()
