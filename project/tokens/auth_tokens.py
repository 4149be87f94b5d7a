"""The auth tokens of sessions: for this service alone, or for other services too.

Without ISSUER they are those of `codec`, with it those of `at_jwt`, unless other services may not
accept a token yet. With ISSUER the tokens from before remain valid until they expire.
"""

from project import clock, ids
from project.errors import TokenInvalid
from project.tokens import at_jwt, codec, keys, signing_keys

# `client_id` of users' tokens: apps that use /auth/login are not registered as clients.
FIRST_PARTY = "first-party"
BEARER = "Bearer"  # the `token_type` of auth tokens and of clients' own tokens (RFC 6750)


def encode(
    claims: codec.AccessClaims,
    generation: int,
    logged_in_at: int,
    amr: list[str],
    roles: list[str] | None,
) -> str:
    """Return the auth token of a session, after as many refreshes as `generation`.

    `logged_in_at` is in seconds since 1970. Only tokens for other services name it, and the roles.
    Without `roles`, the token is for this service alone.
    """
    if roles is None:
        return codec.encode_access(claims, key=keys.signing_key(), amr=amr)
    session_id = str(claims.session_id)
    for_others: at_jwt.Claims = {
        "aud": keys.audience(),
        "sub": str(claims.user_id),
        "client_id": FIRST_PARTY,
        "iat": claims.issued_at,
        "exp": claims.expires_at,
        "jti": f"{session_id}.{generation}",
        "sid": session_id,
        "auth_time": logged_in_at,
        "amr": amr,
    }
    if roles:
        for_others["scope"] = " ".join(roles)
    return signing_keys.sign(for_others)


def decode(token: str) -> codec.AccessClaims:
    """Return the claims of an auth token that is valid now; raise TokenInvalid or TokenExpired."""
    if keys.issuer():
        try:
            claims = signing_keys.verify(token)
        except at_jwt.OtherAlgorithm:
            pass
        else:
            if claims["aud"] != keys.audience() or "sid" not in claims:
                raise TokenInvalid
            return codec.AccessClaims(
                ids.parse(claims["sub"]), claims["sid"], claims["iat"], claims["exp"]
            )
    return codec.decode_access(token, keys=keys.verification_keys(), now=clock.utcnow())
