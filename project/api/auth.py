"""/auth: registration, login, refresh and logout, and the caller's own account and sessions."""

from flask import Response, g
from flask.blueprints import BlueprintSetupState

from project import errors
from project.accounts import (
    administration,
    authentication,
    enrolment,
    invitations,
    recovery,
    registration,
    second_factor,
    sessions,
    verification,
)
from project.accounts.fields import NewUser
from project.api import guards, requests, responses, schemas
from project.api.openapi import Blueprint
from project.api.responses import full_user, success
from project.extensions import db

# Says nothing about whether there is such an account.
_ON_ITS_WAY = "If there is an account with this address, an email is on its way."

_CONFIRMATION_ERRORS = (
    errors.WrongPassword,
    errors.StepUpRequired,
    errors.WrongCode,
    errors.TooManyAttempts,
    errors.MfaNotConfigured,
)

auth_blueprint = Blueprint(
    "auth", "Register, log in, and manage your own account and sessions.", url_prefix="/auth"
)


@auth_blueprint.post("/register")
@guards.required(requests.reserve_hash_slot)
@responses.returns(
    201,
    schemas.RegisteredUser,
    errors.UserExists,
    errors.TooManyAttempts,
    errors.MailNotConfigured,
    accepted=schemas.Done,
)
def register_user(body: NewUser) -> Response:
    """Register a user and log in.

    The token pair is that of the user's first session. A username or an email that differs only in
    case from that of another user is taken. If EMAIL_VERIFICATION is `required`, the answer is 202
    without tokens: the user confirms the email with a link first. The answer is the same if the
    email is taken; its owner is told by email.
    """
    registered = registration.register(body.username, body.email, body.password, requests.origin())
    db.session.commit()
    if registered is None:
        return success(202, message="Please confirm your email address.")
    user, pair = registered
    return success(201, message="Successfully registered.", data=full_user(user), **pair._asdict())


@auth_blueprint.post("/login")
@guards.required(requests.reserve_hash_slot)
@responses.returns(
    200,
    schemas.Tokens,
    errors.InvalidCredentials,
    errors.AccountInactive,
    errors.EmailUnverified,
    errors.MfaRequired,
    errors.WrongCode,
    errors.TooManyAttempts,
    errors.MfaNotConfigured,
)
def login_user(body: schemas.Credentials) -> Response:
    """Exchange an email and a password for the token pair of a new session.

    The answers to an unknown email and to a wrong password are the same. A user with a second
    factor sends `code` too, or sends it with the `mfa_token` of the 401 to `/auth/login/mfa`.
    """
    pair = authentication.log_in(body.email, body.password, body.code or None, requests.origin())
    db.session.commit()
    return success(message="Successfully logged in.", **pair._asdict())


@auth_blueprint.post("/login/mfa")
@guards.required(requests.reserve_body_slot)
@responses.returns(
    200,
    schemas.Tokens,
    errors.TokenInvalid,
    errors.TokenExpired,
    errors.WrongCode,
    errors.TooManyAttempts,
    errors.MfaNotConfigured,
)
def login_with_code(body: schemas.SecondStep) -> Response:
    """Exchange an `mfa_token` and a code for the token pair of a new session.

    The `mfa_token` is valid for five minutes, and until the password or the email changes. The code
    is one from the authenticator or a recovery code; each works once.
    """
    pair = authentication.log_in_with_code(body.mfa_token, body.code, requests.origin())
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
@responses.returns(200, schemas.Done, *_CONFIRMATION_ERRORS)
def change_password(body: schemas.PasswordChange) -> Response:
    """Change the caller's password, and end their other sessions unless `keep_sessions` is true.

    The current session continues with the same tokens.
    """
    authentication.change_password(
        g.user,
        requests.origin(),
        current=body.current_password,
        new=body.new_password,
        code=body.code or None,
        keep_sessions=body.keep_sessions,
    )
    db.session.commit()
    return success(message="Password changed.")


@auth_blueprint.post("/password/forgot")
@guards.required(requests.reserve_body_slot)
@responses.returns(202, schemas.Done, errors.TooManyAttempts, errors.MailNotConfigured)
def forgot_password(body: schemas.EmailAddress) -> Response:
    """Send a link to set a new password to an email address.

    The answer is the same whether or not a user has this email. The link is valid for
    RESET_LINK_SECONDS.
    """
    recovery.request_reset(body.email, requests.origin())
    db.session.commit()
    return success(202, message=_ON_ITS_WAY)


@auth_blueprint.post("/password/reset")
@guards.required(requests.reserve_hash_slot)
@responses.returns(200, schemas.Done, errors.LinkInvalid)
def reset_password(body: schemas.PasswordReset) -> Response:
    """Set a new password with the token of a link, and end all sessions of the user.

    A token works once. A password that is refused does not use it up. The user's email is
    confirmed thereby.
    """
    recovery.reset_password(body.token, body.new_password, requests.origin())
    db.session.commit()
    return success(message="Password changed. Please log in.")


@auth_blueprint.post("/verification")
@guards.required(requests.reserve_body_slot)
@responses.returns(202, schemas.Done, errors.TooManyAttempts, errors.MailNotConfigured)
def request_verification(body: schemas.EmailAddress) -> Response:
    """Send a link to confirm an email address again.

    The answer is the same whether or not a user has this email and has not confirmed it.
    """
    verification.request(body.email, requests.origin())
    db.session.commit()
    return success(202, message=_ON_ITS_WAY)


@auth_blueprint.post("/verify")
@guards.required(requests.reserve_body_slot)
@responses.returns(200, schemas.Done, errors.LinkInvalid)
def verify_email(body: schemas.LinkToken) -> Response:
    """Confirm the email of a user with the token of a link.

    A token works once, and is valid for VERIFICATION_LINK_SECONDS.
    """
    verification.verify(body.token, requests.origin())
    db.session.commit()
    return success(message="Email confirmed.")


@auth_blueprint.post("/email")
@guards.required(requests.reserve_hash_slot, guards.authenticate)
@responses.returns(202, schemas.Done, *_CONFIRMATION_ERRORS, errors.MailNotConfigured)
def change_email(body: schemas.EmailChange) -> Response:
    """Send a link to the new email of the caller, with which they confirm the change.

    The answer is the same whether or not another user has this email.
    """
    if body.email == g.user.email:
        raise errors.InvalidPayload(errors={"email": "is your email already"})
    administration.change(
        g.user.id,
        {"email": body.email},
        g.user,
        requests.origin(),
        password=body.current_password,
        code=body.code or None,
        confirm_email=True,
    )
    db.session.commit()
    return success(202, message=responses.CONFIRM_CHANGE)


@auth_blueprint.post("/email/confirm")
@guards.required(requests.reserve_body_slot)
@responses.returns(200, schemas.Done, errors.LinkInvalid, errors.EmailExists)
def confirm_email(body: schemas.LinkToken) -> Response:
    """Change the email of a user with the token of a link that was sent to the new email.

    A token works once, and is valid for EMAIL_LINK_SECONDS. The old email is told.
    """
    verification.confirm_change(body.token, requests.origin())
    db.session.commit()
    return success(message="Email changed.")


@auth_blueprint.post("/invitation")
@guards.required(requests.reserve_hash_slot)
@responses.returns(201, schemas.RegisteredUser, errors.LinkInvalid, errors.UserExists)
def accept_invitation(body: schemas.AcceptedInvitation) -> Response:
    """Register with the token of an invitation, which works once, and log in.

    The email of the user is that of the invitation, and is confirmed thereby.
    """
    user, pair = invitations.accept(
        body.token, body.username or None, body.password, requests.origin()
    )
    db.session.commit()
    return success(201, message="Successfully registered.", data=full_user(user), **pair._asdict())


@auth_blueprint.delete("/account")
@guards.required(requests.reserve_hash_slot, guards.authenticate)
@responses.returns(200, schemas.Done, *_CONFIRMATION_ERRORS, errors.LastAdmin)
def delete_account(body: schemas.AccountDeletion) -> Response:
    """Delete the caller's account: the user, their sessions, and all data that identifies them.

    The events of the account stay in the audit log, without the user. The password is sent in the
    JSON body, so proxies must forward the body of a DELETE request. The last active admin cannot
    be deleted.
    """
    administration.delete(
        g.user.id,
        g.user,
        requests.origin(),
        password=body.current_password,
        code=body.code or None,
    )
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


@auth_blueprint.get("/totp")
@guards.required(guards.authenticate_to_enrol)
@responses.returns(200, schemas.Totp)
def get_totp() -> Response:
    """Retrieve the state of the caller's second factor.

    It says whether an authenticator is on, and how many recovery codes are left.
    """
    left = second_factor.recovery_codes_left(g.user.id)
    return success(data={"enabled": g.user.mfa_enabled, "recovery_codes_left": left})


@auth_blueprint.post("/totp")
@guards.required(requests.reserve_hash_slot, guards.authenticate_to_enrol)
@responses.returns(
    200,
    schemas.NewTotp,
    errors.WrongPassword,
    errors.TotpExists,
    errors.TooManyAttempts,
    errors.MfaNotConfigured,
)
def begin_totp(body: schemas.CurrentPassword) -> Response:
    """Get a secret for an authenticator.

    A code from the authenticator turns it on (`/auth/totp/confirm`); until then, logins need none.
    Another request replaces the secret.
    """
    secret = enrolment.begin(g.user, requests.origin(), password=body.current_password)
    db.session.commit()
    return success(data=secret._asdict())


@auth_blueprint.post("/totp/confirm")
@guards.required(requests.reserve_body_slot, guards.authenticate_to_enrol)
@responses.returns(
    200,
    schemas.RecoveryCodes,
    errors.WrongCode,
    errors.TotpExists,
    errors.TotpNotFound,
    errors.TooManyAttempts,
    errors.MfaNotConfigured,
)
def confirm_totp(body: schemas.RequiredCode) -> Response:
    """Turn the authenticator on with a code from it, and get ten recovery codes.

    The recovery codes are shown only now. The caller's other sessions end.
    """
    recovery_codes = enrolment.confirm(g.user, requests.origin(), code=body.code)
    db.session.commit()
    data = {"recovery_codes": recovery_codes}
    return success(message="Authenticator turned on.", data=data)


@auth_blueprint.delete("/totp")
@guards.required(requests.reserve_hash_slot, guards.authenticate)
@responses.returns(200, schemas.Done, *_CONFIRMATION_ERRORS, errors.TotpNotFound)
def turn_off_totp(body: schemas.Confirmation) -> Response:
    """Turn the authenticator off, and delete the recovery codes.

    A login needs the password only from then on. The caller's sessions continue.
    """
    enrolment.turn_off(
        g.user, requests.origin(), password=body.current_password, code=body.code or None
    )
    db.session.commit()
    return success(message="Authenticator turned off.")


@auth_blueprint.post("/recovery_codes")
@guards.required(requests.reserve_hash_slot, guards.authenticate)
@responses.returns(200, schemas.RecoveryCodes, *_CONFIRMATION_ERRORS, errors.TotpNotFound)
def replace_recovery_codes(body: schemas.Confirmation) -> Response:
    """Get ten new recovery codes, which replace all earlier ones.

    They are shown only now.
    """
    recovery_codes = enrolment.replace_recovery_codes(
        g.user, requests.origin(), password=body.current_password, code=body.code or None
    )
    db.session.commit()
    data = {"recovery_codes": recovery_codes}
    return success(message="Recovery codes replaced.", data=data)
