"""What can go wrong, each with the stable code that programs read: the one catalogue of both.

Nothing here knows of HTTP requests; `status` is the HTTP status (RFC 9110) the answer will have.
"""

from collections.abc import Sequence
from typing import ClassVar


class ConfigurationError(SystemExit):
    """A setting is missing or wrong; the text names the variable.

    It is a SystemExit so that wherever it ends the start (the command line, a worker process)
    one line on stderr and exit code 1 are all that is seen of it.
    """

    def __init__(self, text: str, *, complaints: Sequence[str] = ()) -> None:
        """Carry the line, and what it complains of one by one where that is more than one thing."""
        super().__init__(text)
        self.complaints = complaints or (text.removeprefix("Configuration error: "),)


class ServiceError(Exception):
    """Base of every refusal that a client is told about."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    message: ClassVar[str] = "Something went wrong. Please try again."

    def __init__(
        self, *, errors: dict[str, str] | None = None, retry_after: int | None = None
    ) -> None:
        """Carry what the answer adds to the message.

        `errors` says per field what is wrong with it, never with the value of a secret;
        `retry_after` is in whole seconds.
        """
        super().__init__(self.message)
        self.errors = errors
        self.retry_after = retry_after


class InternalError(ServiceError):
    """Raised for nothing: it stands for every exception that nobody foresaw."""


# What the client sent


class BadRequest(ServiceError):
    """The request could not be read as HTTP, or was refused by the framework in another way."""

    status = 400
    code = "bad_request"
    message = "The request could not be understood."


class InvalidPayload(ServiceError):
    """The body or the query is not what the route takes; `errors` says where."""

    status = 400
    code = "invalid_payload"
    message = "Invalid payload."


class NotFound(ServiceError):
    """No route has this path."""

    status = 404
    code = "not_found"
    message = "There is nothing at this address."


class MethodNotAllowed(ServiceError):
    """The path exists, for other methods."""

    status = 405
    code = "method_not_allowed"
    message = "This address does not take that method."


class HttpsRequired(ServiceError):
    """The request came in the clear, and what it carried may have been read on the way."""

    status = 403
    code = "https_required"
    message = "Please use https."


class PayloadTooLarge(ServiceError):
    """The body is larger than the service reads."""

    status = 413
    code = "payload_too_large"
    message = "The payload is too large."


# Accounts


class UserExists(ServiceError):
    """Somebody registers with an email or a username that is taken."""

    status = 400
    code = "user_exists"
    message = "Sorry. That user already exists."


class EmailExists(ServiceError):
    """A user is added with an email that is taken."""

    status = 400
    code = "email_exists"
    message = "Sorry. That email already exists."


class UserNotFound(ServiceError):
    """No user has this id."""

    status = 404
    code = "user_not_found"
    message = "User does not exist"


class InvalidCredentials(ServiceError):
    """Login with an unknown email or a wrong password; the two are not told apart."""

    status = 404
    code = "invalid_credentials"
    message = "User does not exist."


class AccountInactive(ServiceError):
    """The credentials are genuine, but the user is deactivated."""

    status = 401
    code = "account_inactive"
    message = "Something went wrong. Please contact us."


class WrongPassword(ServiceError):
    """Somebody who is logged in gives a wrong password for their current one."""

    status = 400
    code = "wrong_password"
    message = "Current password is wrong."


class LastAdmin(ServiceError):
    """Somebody would delete, deactivate or demote the only active admin there is."""

    status = 400
    code = "last_admin"
    message = "There has to be another active admin first."


# Who is calling


class TokenMissing(ServiceError):
    """The route wants a token and there is no Authorization header."""

    status = 401
    code = "token_missing"
    message = "Provide a valid auth token."


class LogoutTokenMissing(TokenMissing):
    """The same at logout, which has always said 403."""

    status = 403


class TokenInvalid(ServiceError):
    """The Authorization header is no Bearer token, or the token is not a genuine one of ours."""

    status = 401
    code = "token_invalid"
    message = "Invalid token. Please log in again."


class SessionEnded(TokenInvalid):
    """The token is genuine, and its session has been ended: logged out, or the password changed."""

    code = "session_ended"


class RefreshReused(TokenInvalid):
    """A refresh token came back long after its successor was given out; its session is ended now.

    Two hold it, and one of them is a thief (RFC 9700, 4.14.2).
    """

    code = "refresh_reused"


class TokenExpired(ServiceError):
    """The token is genuine and its time is over."""

    status = 401
    code = "token_expired"
    message = "Signature expired. Please log in again."


class TokenOfInactive(AccountInactive):
    """The token is genuine, and its user is deactivated or gone."""


class SessionNotFound(ServiceError):
    """The caller has no live session with this id."""

    status = 404
    code = "session_not_found"
    message = "Session does not exist."


class PermissionDenied(ServiceError):
    """The caller is known and may not do this."""

    status = 403
    code = "permission_denied"
    message = "You do not have permission to do that."


class TooManyAttempts(ServiceError):
    """Something was tried too often: by this address, or on this account by whomever."""

    status = 429
    code = "too_many_attempts"
    message = "Too many attempts. Please try again later."


# The service itself


class Busy(ServiceError):
    """Too many hash passwords, or read a body, at once."""

    status = 503
    code = "busy"
    message = "The service is busy. Please try again."


class DatabaseNotMigrated(ServiceError):
    """The database answers, but its schema is not the one that this code works with."""

    status = 503
    code = "database_not_migrated"
    message = "The database has not been migrated yet."


class DatabaseUnavailable(ServiceError):
    """The database is away, full, or takes no writes."""

    status = 503
    code = "database_unavailable"
    message = "The service is not available right now. Please try again."
