"""The catalogue of errors, each with a stable code for programs and a message for people.

The exceptions know nothing of HTTP requests; `status` is the HTTP status (RFC 9110) of the answer.
"""

from collections.abc import Sequence
from typing import ClassVar

OPERATOR_RETRY_AFTER = 3_600  # seconds, of a 503 until the operator has changed the settings


class ConfigurationError(SystemExit):
    """A setting is missing or invalid; the text names the variable.

    It is a SystemExit: the command line and a worker process print one line on stderr and exit
    with code 1.
    """

    def __init__(self, text: str, *, complaints: Sequence[str] = ()) -> None:
        """Carry the line to print, and the problems in it one by one."""
        super().__init__(text)
        self.complaints = complaints or (text.removeprefix("Configuration error: "),)


class ServiceError(Exception):
    """Base class of every error that a client is told about."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    message: ClassVar[str] = "Something went wrong. Please try again."

    def __init__(
        self, *, errors: dict[str, str] | None = None, retry_after: int | None = None
    ) -> None:
        """Carry the details of the answer.

        `errors` describes the problem with each field and never contains the value of a secret;
        `retry_after` is in whole seconds.
        """
        super().__init__(self.message)
        self.errors = errors
        self.retry_after = retry_after


class InternalError(ServiceError):
    """An unexpected error occurred."""


# Requests


class BadRequest(ServiceError):
    """The request is not valid HTTP, or the framework refused it for another reason."""

    status = 400
    code = "bad_request"
    message = "The request could not be understood."


class InvalidPayload(ServiceError):
    """The body or the query is not valid; `errors` names the fields."""

    status = 400
    code = "invalid_payload"
    message = "Invalid payload."


class NotFound(ServiceError):
    """No route has this path."""

    status = 404
    code = "not_found"
    message = "There is nothing at this address."


class MethodNotAllowed(ServiceError):
    """The path does not support this method."""

    status = 405
    code = "method_not_allowed"
    message = "This address does not take that method."


class HttpsRequired(ServiceError):
    """The request was not sent over HTTPS, so its content may have been read on the way."""

    status = 403
    code = "https_required"
    message = "Please use https."


class PayloadTooLarge(ServiceError):
    """The body is larger than the service accepts."""

    status = 413
    code = "payload_too_large"
    message = "The payload is too large."


# Accounts


class UserExists(ServiceError):
    """The client registers with an email or username that is taken."""

    status = 400
    code = "user_exists"
    message = "Sorry. That user already exists."


class EmailExists(ServiceError):
    """A user is added or changed with an email that is taken."""

    status = 400
    code = "email_exists"
    message = "Sorry. That email already exists."


class UsernameExists(ServiceError):
    """The client adds a user with a username that is taken."""

    status = 400
    code = "username_exists"
    message = "Invalid payload."


class UserNotFound(ServiceError):
    """No user has this ID."""

    status = 404
    code = "user_not_found"
    message = "User does not exist"


class InvalidCredentials(ServiceError):
    """The client logs in with an unknown email or a wrong password; the answers are the same."""

    status = 404
    code = "invalid_credentials"
    message = "User does not exist."


class AccountInactive(ServiceError):
    """The credentials are correct, but the user is deactivated."""

    status = 401
    code = "account_inactive"
    message = "Something went wrong. Please contact us."


class WrongPassword(ServiceError):
    """The current password in the request is wrong."""

    status = 400
    code = "wrong_password"
    message = "Current password is wrong."


class EmailUnverified(ServiceError):
    """The credentials are correct, but the user has not confirmed their email yet."""

    status = 403
    code = "email_unverified"
    message = "Please confirm your email address."


class MfaRequired(ServiceError):
    """The credentials are correct, and the user has to send a code too.

    `mfa_token` lets them send it in another request.
    """

    status = 401
    code = "mfa_required"
    message = "Please enter the code from your authenticator."

    def __init__(
        self, *, errors: dict[str, str] | None = None, mfa_token: str | None = None
    ) -> None:
        """Carry the token for the second step of a login."""
        super().__init__(errors=errors)
        self.mfa_token = mfa_token


class StepUpRequired(MfaRequired):
    """The caller has an authenticator, and the request needs a code from it."""

    status = 403


class WrongCode(ServiceError):
    """The code is wrong, or has been used."""

    status = 400
    code = "wrong_code"
    message = "The code is wrong. Please enter a new one."


class TotpExists(ServiceError):
    """The user sets up an authenticator and has one."""

    status = 400
    code = "totp_exists"
    message = "There is an authenticator already. Please turn it off first."


class TotpNotFound(ServiceError):
    """The user has no authenticator, or has not begun to set one up."""

    status = 404
    code = "totp_not_found"
    message = "There is no authenticator."


class LinkInvalid(ServiceError):
    """The token of a link was not issued by this service, has expired or has been used."""

    status = 400
    code = "link_invalid"
    message = "This link is no longer valid. Please request a new one."


class LastAdmin(ServiceError):
    """The request would delete, deactivate or demote the only active admin."""

    status = 400
    code = "last_admin"
    message = "There has to be another active admin first."


class OwnAccount(ServiceError):
    """An admin deletes their own account by its ID, which takes no password."""

    status = 400
    code = "own_account"
    message = "Please delete your own account with DELETE /auth/account."


class OwnTotp(OwnAccount):
    """An admin turns their own authenticator off by their ID, which takes no password."""

    message = "Please turn your own authenticator off with DELETE /auth/totp."


class PreconditionFailed(ServiceError):
    """The user has changed since the client read it (RFC 9110, 13.1.1)."""

    status = 412
    code = "precondition_failed"
    message = "The user has changed in the meantime."


# Authentication and authorization


class TokenMissing(ServiceError):
    """The route requires a token, and the request has no Authorization header."""

    status = 401
    code = "token_missing"
    message = "Provide a valid auth token."


class LogoutTokenMissing(TokenMissing):
    """The logout request has no Authorization header; logout has always answered 403."""

    status = 403


class TokenInvalid(ServiceError):
    """The Authorization header has no Bearer token, or the token was not issued by this service."""

    status = 401
    code = "token_invalid"
    message = "Invalid token. Please log in again."


class SessionEnded(TokenInvalid):
    """The token is valid, but its session was ended or has expired."""

    code = "session_ended"


class RefreshReused(TokenInvalid):
    """A refresh token was used again long after it was replaced; its session has been ended.

    Two clients hold the token, and one of them is an attacker (RFC 9700, 4.14.2).
    """

    code = "refresh_reused"


class TokenExpired(ServiceError):
    """The token has expired."""

    status = 401
    code = "token_expired"
    message = "Signature expired. Please log in again."


class TokenOfInactive(AccountInactive):
    """The token is valid, but its user is deactivated or deleted."""


class SessionNotFound(ServiceError):
    """The caller has no active session with this ID."""

    status = 404
    code = "session_not_found"
    message = "Session does not exist."


class PermissionDenied(ServiceError):
    """The caller is authenticated but does not have permission."""

    status = 403
    code = "permission_denied"
    message = "You do not have permission to do that."


class MfaEnrolmentRequired(ServiceError):
    """The operator requires a second factor of the caller, who has none (REQUIRE_MFA)."""

    status = 403
    code = "mfa_enrolment_required"
    message = "Please set up an authenticator first."


class TooManyAttempts(ServiceError):
    """Too many attempts were made from this address, or on this account from any address."""

    status = 429
    code = "too_many_attempts"
    message = "Too many attempts. Please try again later."


# Other services, as OAuth clients; each code is an error of RFC 6749 or RFC 7009


class InvalidClient(ServiceError):
    """The client is unknown or disabled, its secret is wrong, or the request has none."""

    status = 401
    code = "invalid_client"
    message = "The client could not be authenticated."


class UnsupportedGrantType(ServiceError):
    """The client asks for a token with another grant than `client_credentials`."""

    status = 400
    code = "unsupported_grant_type"
    message = "This grant type is not supported."


class InvalidScope(ServiceError):
    """The client asks for a scope that it may not have."""

    status = 400
    code = "invalid_scope"
    message = "The client may not have this scope."


class UnsupportedTokenType(ServiceError):
    """The client revokes a client's own token, which belongs to no session."""

    status = 400
    code = "unsupported_token_type"
    message = "Tokens of this type cannot be revoked."


# The service itself


class Busy(ServiceError):
    """Too many requests are hashing passwords or sending bodies at once."""

    status = 503
    code = "busy"
    message = "The service is busy. Please try again."


class MailNotConfigured(ServiceError):
    """The route sends email, and the operator has not configured a mail server."""

    status = 503
    code = "mail_not_configured"
    message = "The service cannot send email."


class MfaNotConfigured(ServiceError):
    """ENCRYPTION_KEYS are not set, or decrypt the secret of the user's authenticator no longer."""

    status = 503
    code = "mfa_not_configured"
    message = "The service cannot use authenticators."


class Draining(ServiceError):
    """The operator is about to stop the server (DRAIN_FILE), which still answers requests."""

    status = 503
    code = "draining"
    message = "The server is about to stop."


class DatabaseNotMigrated(ServiceError):
    """The database answers, but this code cannot work with its schema."""

    status = 503
    code = "database_not_migrated"
    message = "The database has not been migrated yet."


class DatabaseUnavailable(ServiceError):
    """The database is unreachable, full or read-only."""

    status = 503
    code = "database_unavailable"
    message = "The service is not available right now. Please try again."
