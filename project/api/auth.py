"""/auth: register, log in, refresh, log out, another password, no account, who am I and where."""

from flask import Response, g
from flask_openapi3 import APIBlueprint

from project import accounts, care, sessions
from project.api import answers, guards, requests
from project.api.responses import success
from project.api.schemas import (
    AccountDeletion,
    Credentials,
    LogoutScope,
    NewUser,
    PasswordChange,
    RefreshToken,
    SessionPath,
)
from project.errors import (
    AccountInactive,
    InvalidCredentials,
    LastAdmin,
    RefreshReused,
    SessionEnded,
    SessionNotFound,
    TokenExpired,
    TokenInvalid,
    TokenOfInactive,
    TooManyAttempts,
    UserExists,
    WrongPassword,
)
from project.extensions import db

REFUSED_REFRESHES = TokenInvalid, TokenExpired, TokenOfInactive, SessionEnded, RefreshReused

auth_blueprint = APIBlueprint("auth", __name__, url_prefix="/auth")


@auth_blueprint.post("/register")
@guards.required(requests.take_turn)
@answers.has(201, answers.Tokens, UserExists, TooManyAttempts)
def register_user(body: NewUser) -> Response:
    """Register a user, and log them in."""
    pair = accounts.register(body.username, body.email, body.password, requests.origin())
    db.session.commit()
    return success(201, message="Successfully registered.", **pair._asdict())


@auth_blueprint.post("/login")
@guards.required(requests.take_turn)
@answers.has(200, answers.Tokens, InvalidCredentials, AccountInactive, TooManyAttempts)
def login_user(body: Credentials) -> Response:
    """Exchange an email and a password for the tokens of a new session."""
    pair = accounts.log_in(body.email, body.password, requests.origin())
    db.session.commit()
    return success(message="Successfully logged in.", **pair._asdict())


@auth_blueprint.post("/refresh")
@guards.required(requests.take_place)
@answers.has(200, answers.Tokens, *REFUSED_REFRESHES, TooManyAttempts)
def refresh_tokens(body: RefreshToken) -> Response:
    """Exchange a refresh token for the next pair of tokens of its session."""
    pair = sessions.refresh(body.refresh_token, requests.origin())
    db.session.commit()
    return success(message="Successfully refreshed.", **pair._asdict())


@auth_blueprint.get("/logout")
@auth_blueprint.post("/logout")
@guards.required(guards.authenticate_to_log_out)
@answers.has(200, answers.Done)
def logout_user(query: LogoutScope) -> Response:
    """End this session of the caller, or all others, or all."""
    sessions.log_out(g.user.id, g.user.session_id, query.scope, requests.origin())
    db.session.commit()
    return success(message="Successfully logged out.")


@auth_blueprint.get("/status")
@guards.required(guards.authenticate)
@answers.has(200, answers.TheCaller)
def get_user_status() -> Response:
    """Say who is calling."""
    user = g.user
    return success(
        data={
            "id": user.id,
            "username": user.username,
            "email": user.email,
            "active": user.active,
            "created_at": user.created_at,
        }
    )


@auth_blueprint.post("/password")
@guards.required(requests.take_turn, guards.authenticate)
@answers.has(200, answers.Done, WrongPassword, TooManyAttempts)
def change_password(body: PasswordChange) -> Response:
    """Give the caller a new password, and end their other sessions unless told otherwise."""
    accounts.change_password(
        g.user,
        requests.origin(),
        current=body.current_password,
        new=body.new_password,
        keep_sessions=body.keep_sessions,
    )
    db.session.commit()
    return success(message="Password changed.")


@auth_blueprint.delete("/account")
@guards.required(requests.take_turn, guards.authenticate)
@answers.has(200, answers.Done, WrongPassword, LastAdmin, TooManyAttempts)
def delete_account(body: AccountDeletion) -> Response:
    """Delete the caller's own account: the user, their sessions, and everything that names them.

    What is in the audit trail stays there, without the person. The password comes in the body, as
    JSON: whatever stands between must pass the body of a DELETE on. The last active admin stays.
    """
    care.delete(g.user.id, g.user, requests.origin(), password=body.current_password)
    db.session.commit()
    return success(message="Account deleted.")


@auth_blueprint.get("/sessions")
@guards.required(guards.authenticate)
@answers.has(200, answers.Sessions)
def list_sessions() -> Response:
    """List the live sessions of the caller, newest first."""
    current = g.user.session_id
    live = [
        session._asdict() | {"current": session.id == current}
        for session in sessions.live(g.user.id)
    ]
    return success(data={"sessions": live})


@auth_blueprint.delete("/sessions/<session_id>")
@guards.required(guards.authenticate)
@answers.has(200, answers.Done, SessionNotFound)
def end_session(path: SessionPath) -> Response:
    """End one session of the caller."""
    sessions.end(g.user.id, path.session_id, requests.origin())
    db.session.commit()
    return success(message="Session ended.")
