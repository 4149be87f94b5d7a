"""/oauth and /.well-known: what other services need to verify tokens; only where ISSUER is set."""

from flask import Response, current_app, g, request

from project import errors
from project.accounts import ended_sessions, introspection
from project.api import guards, requests, responses, schemas
from project.api.openapi import Blueprint
from project.api.paging import RevocationsPage
from project.api.responses import success
from project.extensions import db
from project.tokens import auth_tokens, signing_keys

KEYS_MAX_AGE = 300  # seconds
GRANT_TYPE = "client_credentials"

oauth_blueprint = Blueprint(
    "oauth",
    "Verify the tokens of this service in other services, which are OAuth clients. A body is a form"
    " (RFC 6749, appendix B), and an error has the `error` of RFC 6749 too.",
)


@oauth_blueprint.get("/.well-known/jwks.json")
@responses.returns(200, schemas.KeySet)
def list_keys() -> Response:
    """Retrieve the public keys that auth tokens are signed with (RFC 7517).

    A key is published 15 minutes before it signs. The answer may be kept for 300 seconds.
    """
    keys = signing_keys.published()
    db.session.commit()
    response = responses.document({"keys": keys})
    response.headers["Cache-Control"] = f"public, max-age={KEYS_MAX_AGE}"
    response.add_etag()
    response.make_conditional(request)
    return response


@oauth_blueprint.get("/.well-known/oauth-authorization-server")
@responses.returns(200, schemas.ServerMetadata)
def get_metadata() -> Response:
    """Retrieve the names and addresses that an OAuth client needs (RFC 8414).

    There is no `response_types_supported`, because there is no authorization endpoint.
    """
    issuer = current_app.config["ISSUER"]
    authentication = ["client_secret_basic"]
    return responses.document(
        {
            "issuer": issuer,
            "jwks_uri": f"{issuer}/.well-known/jwks.json",
            "token_endpoint": f"{issuer}/oauth/token",
            "token_endpoint_auth_methods_supported": authentication,
            "grant_types_supported": [GRANT_TYPE],
            "introspection_endpoint": f"{issuer}/oauth/introspect",
            "introspection_endpoint_auth_methods_supported": authentication,
            "revocation_endpoint": f"{issuer}/oauth/revoke",
            "revocation_endpoint_auth_methods_supported": authentication,
        }
    )


@oauth_blueprint.post("/oauth/token")
@guards.required(guards.client, requests.reserve_form_slot)
@responses.returns(200, schemas.ClientToken, errors.UnsupportedGrantType, errors.InvalidScope)
def issue_token(body: schemas.TokenRequest) -> Response:
    """Issue a token to the client for itself (RFC 6749, 4.4).

    Without `scope`, the token has everything that the client may have.
    """
    if body.grant_type != GRANT_TYPE:
        raise errors.UnsupportedGrantType
    token, scope = introspection.issue(g.client, body.words)
    db.session.commit()
    lifetime = signing_keys.CLIENT_TOKEN_LIFETIME
    granted = {"scope": " ".join(scope)} if scope else {}
    return responses.document(
        {"access_token": token, "token_type": auth_tokens.BEARER, "expires_in": lifetime, **granted}
    )


@oauth_blueprint.post("/oauth/introspect")
@guards.required(guards.client, requests.reserve_form_slot)
@responses.returns(200, schemas.Introspection)
def introspect_token(body: schemas.PresentedToken) -> Response:
    """Tell whether the service would accept a token now, and what it says (RFC 7662).

    The token is an auth token, a refresh token, or a client's own token. One for another audience
    than the client's is not active. `scope` are the roles that the user has now.
    """
    return responses.document(introspection.introspect(body.token, g.client))


@oauth_blueprint.post("/oauth/revoke")
@guards.required(guards.client, requests.reserve_form_slot)
@responses.returns(200, schemas.Done, errors.UnsupportedTokenType)
def revoke_token(body: schemas.PresentedToken) -> Response:
    """End the session of an auth token or a refresh token (RFC 7009).

    The answer is the same for a token that is unknown, has expired, or is for another audience.
    """
    introspection.revoke(body.token, g.client, requests.origin())
    db.session.commit()
    return success(message="Revoked.")


@oauth_blueprint.get("/oauth/revocations")
@guards.required(guards.client)
@responses.returns(200, schemas.Revocations)
def list_revocations(query: RevocationsPage) -> Response:
    """List the sessions that ended while their auth tokens have not expired, oldest first.

    `next` is the `after` of the next request, also on an empty page. A service that requests the
    list every few seconds learns of every session. If `after` is refused with 400, the database
    was restored from a backup: start again without it.
    """
    ended_sessions.number()
    db.session.commit()
    rows = ended_sessions.page(query.after, query.limit)
    revocations = [
        {"sid": row.session_id, "ended_at": row.ended_at, "expires_at": row.expires_at}
        for row in rows
    ]
    following = rows[-1].position if rows else query.after
    return success(data={"revocations": revocations, "next": str(following)})
