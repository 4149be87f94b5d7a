"""/auth: registration, login, refresh and logout, and the caller's own account and sessions."""

from flask import Response, g
from flask.blueprints import BlueprintSetupState

from project import errors
from project.accounts import administration, authentication, registration, sessions
from project.accounts.fields import NewUser
from project.api import guards, requests, responses, schemas
from project.api.openapi import Blueprint
from project.api.responses import full_user, success
from project.extensions import db

auth_blueprint = Blueprint(
    "auth", "Register, log in, and manage your own account and sessions.", url_prefix="/auth"
)


@auth_blueprint.post("/register")
@guards.required(requests.reserve_hash_slot)
@responses.returns(201, schemas.RegisteredUser, errors.UserExists, errors.TooManyAttempts)
def register_user(body: NewUser) -> Response:
    """Register a user and log in.

    The token pair is that of the user's first session. A username or an email that differs only in
    case from that of another user is taken.
    """
    user, pair = registration.register(body.username, body.email, body.password, requests.origin())
    db.session.commit()
    return success(201, message="Successfully registered.", data=full_user(user), **pair._asdict())


@auth_blueprint.post("/login")
@guards.required(requests.reserve_hash_slot)
@responses.returns(
    200, schemas.Tokens, errors.InvalidCredentials, errors.AccountInactive, errors.TooManyAttempts
)
def login_user(body: schemas.Credentials) -> Response:
    """Exchange an email and a password for the token pair of a new session.

    The answers to an unknown email and to a wrong password are the same.
    """
    pair = authentication.log_in(body.email, body.password, requests.origin())
    db.session.commit()
    return success(message="Successfully logged in.", **pair._asdict())


@auth_blueprint.post("/refresh")
@guards.required(requests.reserve_body_slot)
@responses.returns(
    200, schemas.Tokens, *guards.TOKEN_ERRORS, errors.RefreshReused, errors.TooManyAttempts
)
def refresh_tokens(body: schemas.RefreshToken) -> Response:
    """Exchange a refresh token for the next token pair of its session.

    A refresh token is replaced when it is used. Using it again long after that ends the session,
    because two clients have it.
    """
    pair = sessions.refresh(body.refresh_token, requests.origin())
    db.session.commit()
    return success(message="Successfully refreshed.", **pair._asdict())


@auth_blueprint.get("/logout", operation_id="logout_user_get")
@auth_blueprint.post("/logout", operation_id="logout_user_post")
@guards.required(guards.authenticate_to_log_out)
@responses.returns(200, schemas.Done)
def logout_user(query: schemas.LogoutScope) -> Response:
    """End the caller's current session, their other sessions, or all of them.

    The tokens of an ended session are refused at once. GET and POST do the same.
    """
    sessions.log_out(g.user.id, g.user.session_id, query.scope, requests.origin())
    db.session.commit()
    return success(message="Successfully logged out.")


@auth_blueprint.record
def _refuse_head_on_logout(state: BlueprintSetupState) -> None:
    # The lesson logs out with GET, to which Flask adds HEAD, which must be safe (RFC 9110, 9.2.1).
    for rule in state.app.url_map.iter_rules("auth.logout_user"):
        (rule.methods or set()).discard("HEAD")


@auth_blueprint.get("/status")
@guards.required(guards.authenticate)
@responses.returns(200, schemas.TheCaller)
def get_user_status() -> Response:
    """Retrieve the caller.

    The caller is the user whose access token the request carries.
    """
    return success(data=full_user(g.user))


@auth_blueprint.post("/password")
@guards.required(requests.reserve_hash_slot, guards.authenticate)
@responses.returns(200, schemas.Done, errors.WrongPassword, errors.TooManyAttempts)
def change_password(body: schemas.PasswordChange) -> Response:
    """Change the caller's password, and end their other sessions unless `keep_sessions` is true.

    The current session continues with the same tokens.
    """
    authentication.change_password(
        g.user,
        requests.origin(),
        current=body.current_password,
        new=body.new_password,
        keep_sessions=body.keep_sessions,
    )
    db.session.commit()
    return success(message="Password changed.")


@auth_blueprint.delete("/account")
@guards.required(requests.reserve_hash_slot, guards.authenticate)
@responses.returns(
    200, schemas.Done, errors.WrongPassword, errors.LastAdmin, errors.TooManyAttempts
)
def delete_account(body: schemas.AccountDeletion) -> Response:
    """Delete the caller's account: the user, their sessions, and all data that identifies them.

    The events of the account stay in the audit log, without the user. The password is sent in the
    JSON body, so proxies must forward the body of a DELETE request. The last active admin cannot
    be deleted.
    """
    administration.delete(g.user.id, g.user, requests.origin(), password=body.current_password)
    db.session.commit()
    return success(message="Account deleted.")


@auth_blueprint.get("/sessions")
@guards.required(guards.authenticate)
@responses.returns(200, schemas.Sessions)
def list_sessions() -> Response:
    """List the caller's active sessions, newest first.

    `current` marks the session of the access token that the request carries. The list has at most
    1,000 sessions.
    """
    current = g.user.session_id
    live = [
        session._asdict() | {"current": session.id == current}
        for session in sessions.live(g.user.id)
    ]
    return success(data={"sessions": live})


@auth_blueprint.delete("/sessions/<session_id>")
@guards.required(guards.authenticate)
@responses.returns(200, schemas.Done, errors.SessionNotFound)
def end_session(path: schemas.SessionPath) -> Response:
    """End one of the caller's sessions.

    Its tokens are refused at once. It can be the current session.
    """
    sessions.end(g.user.id, path.session_id, requests.origin())
    db.session.commit()
    return success(message="Session ended.")
