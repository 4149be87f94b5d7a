"""What another service may know of a token, revoke a token, and get a token of its own.

Functions here write and may flush. The caller commits.
"""

from typing import Any, NamedTuple

from sqlalchemy import Row

from project import clock, ids
from project.accounts import audit, clients, directory, second_factor, sessions
from project.errors import (
    InvalidScope,
    ServiceError,
    TokenInvalid,
    UnsupportedTokenType,
)
from project.tokens import at_jwt, auth_tokens, codec, keys, signing_keys

_BEARER = {"token_type": auth_tokens.BEARER}


class _Token(NamedTuple):
    """A token that this service has signed and that has not expired."""

    claims: dict[str, Any]
    generation: int | None = None  # of a refresh token

    @property
    def of_client(self) -> bool:
        """Whether a client got the token for itself; all others belong to a session."""
        return "sid" not in self.claims


def introspect(text: str, client: Row[Any]) -> dict[str, Any]:
    """Return what RFC 7662, 2.2 says of a token: its claims, or only that it is not active.

    A token is active if this service would accept it now, from a user or from a client of the same
    audience as `client`. `scope` are the roles that the user has now, and `amr` says how they have
    proved who they are in the session up to now.
    """
    try:
        token = _parse(text, client)
        state = _state(token)
    except ServiceError:
        return {"active": False}
    # The roles in the token may be outdated, and so may `amr`, which `state` has too.
    claims = {name: value for name, value in token.claims.items() if name != "scope"}
    return {"active": True, **claims, **state}


def _parse(text: str, client: Row[Any]) -> _Token:
    """Return a valid token for the audience of `client`; raise TokenInvalid or TokenExpired."""
    token = _verify(text)
    if token.claims["aud"] != client.audience:
        raise TokenInvalid
    return token


def _verify(text: str) -> _Token:
    now, secret_keys = clock.utcnow(), keys.verification_keys()
    try:
        return _Token(dict(signing_keys.verify(text)))
    except at_jwt.OtherAlgorithm:
        pass
    try:
        access = codec.decode_access(text, keys=secret_keys, now=now)
    except TokenInvalid:
        refresh = codec.decode_refresh(text, keys=secret_keys, now=now)
        others = {
            "jti": f"{refresh.session_id}.{refresh.generation}",
            "auth_time": refresh.logged_in_at,
        }
        return _Token(_claims(refresh) | others, refresh.generation)
    if access.session_id is None:
        raise TokenInvalid
    return _Token(_claims(access))


def _claims(claims: codec.AccessClaims | codec.RefreshClaims) -> dict[str, Any]:
    """Return the claims of a token for this service alone, as one for others would have them."""
    return {
        "iss": keys.issuer(),
        "aud": keys.audience(),
        "sub": str(claims.user_id),
        "client_id": auth_tokens.FIRST_PARTY,
        "iat": claims.issued_at,
        "exp": claims.expires_at,
        "sid": claims.session_id,
    }


def _state(token: _Token) -> dict[str, Any]:
    """Return what the claims do not say; raise a ServiceError if the token is not active."""
    if token.of_client:
        owner = clients.find(token.claims["client_id"])
        if owner is None or owner.disabled_at is not None:
            raise TokenInvalid
        return _BEARER | _scope(token.claims.get("scope", ""))
    if token.claims["aud"] != keys.audience():  # from before a change of TOKEN_AUDIENCE
        raise TokenInvalid
    session = sessions.find_live(ids.parse(token.claims["sub"]), token.claims["sid"])
    if second_factor.must_enrol(session):
        raise TokenInvalid
    roles = " ".join(directory.roles_of(session))
    found = {"username": session.username, "amr": session.amr, **_scope(roles)}
    if token.generation is None:
        return found | _BEARER
    if session.generation != token.generation and not sessions.is_repeated(
        session, token.generation, clock.utcnow()
    ):
        raise TokenInvalid
    return found


def _scope(words: str) -> dict[str, str]:
    return {"scope": words} if words else {}


def revoke(text: str, client: Row[Any], origin: audit.Origin) -> None:
    """End the session of an auth token or a refresh token (RFC 7009).

    A token that is not valid, or is for another audience, changes nothing. Raise
    UnsupportedTokenType for a client's own token, which is valid until it expires.
    """
    try:
        token = _parse(text, client)
    except ServiceError:
        return
    if token.of_client:
        raise UnsupportedTokenType
    user_id = ids.parse(token.claims["sub"])
    sessions.revoke(user_id, token.claims["sid"], client.name, origin)


def issue(client: Row[Any], scope: list[str] | None) -> tuple[str, list[str]]:
    """Return a token of a client's own (RFC 6749, 4.4), and its scope.

    Without `scope`, it is everything that the client may have. Raise InvalidScope.
    """
    granted = client.scope if scope is None else scope
    if not set(granted) <= set(client.scope):
        raise InvalidScope
    now = int(clock.utcnow().timestamp())
    claims: at_jwt.Claims = {
        "aud": client.audience,
        "sub": client.name,
        "client_id": client.name,
        "iat": now,
        "exp": now + signing_keys.CLIENT_TOKEN_LIFETIME,
        "jti": ids.new_session(),
    }
    if granted:
        claims["scope"] = " ".join(granted)
    return signing_keys.sign(claims), granted
