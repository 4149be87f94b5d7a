"""The error catalogue: status, code and message of every error are contract."""

import unittest

from project import errors

CATALOGUE: dict[str, tuple[int, str, str]] = {
    "ServiceError": (500, "internal_error", "Something went wrong. Please try again."),
    "InternalError": (500, "internal_error", "Something went wrong. Please try again."),
    "BadRequest": (400, "bad_request", "The request could not be understood."),
    "InvalidPayload": (400, "invalid_payload", "Invalid payload."),
    "NotFound": (404, "not_found", "There is nothing at this address."),
    "MethodNotAllowed": (405, "method_not_allowed", "This address does not take that method."),
    "HttpsRequired": (403, "https_required", "Please use https."),
    "PayloadTooLarge": (413, "payload_too_large", "The payload is too large."),
    "UserExists": (400, "user_exists", "Sorry. That user already exists."),
    "EmailExists": (400, "email_exists", "Sorry. That email already exists."),
    "UsernameExists": (400, "username_exists", "Invalid payload."),
    "OwnAccount": (
        400,
        "own_account",
        "Please delete your own account with DELETE /auth/account.",
    ),
    "OwnTotp": (
        400,
        "own_account",
        "Please turn your own authenticator off with DELETE /auth/totp.",
    ),
    "PreconditionFailed": (
        412,
        "precondition_failed",
        "The user has changed in the meantime.",
    ),
    "UserNotFound": (404, "user_not_found", "User does not exist"),
    "InvalidCredentials": (404, "invalid_credentials", "User does not exist."),
    "AccountInactive": (401, "account_inactive", "Something went wrong. Please contact us."),
    "WrongPassword": (400, "wrong_password", "Current password is wrong."),
    "EmailUnverified": (403, "email_unverified", "Please confirm your email address."),
    "MfaRequired": (401, "mfa_required", "Please enter the code from your authenticator."),
    "StepUpRequired": (403, "mfa_required", "Please enter the code from your authenticator."),
    "WrongCode": (400, "wrong_code", "The code is wrong. Please enter a new one."),
    "TotpExists": (
        400,
        "totp_exists",
        "There is an authenticator already. Please turn it off first.",
    ),
    "TotpNotFound": (404, "totp_not_found", "There is no authenticator."),
    "MfaEnrolmentRequired": (
        403,
        "mfa_enrolment_required",
        "Please set up an authenticator first.",
    ),
    "LinkInvalid": (
        400,
        "link_invalid",
        "This link is no longer valid. Please request a new one.",
    ),
    "LastAdmin": (400, "last_admin", "There has to be another active admin first."),
    "TokenMissing": (401, "token_missing", "Provide a valid auth token."),
    "LogoutTokenMissing": (403, "token_missing", "Provide a valid auth token."),
    "TokenInvalid": (401, "token_invalid", "Invalid token. Please log in again."),
    "SessionEnded": (401, "session_ended", "Invalid token. Please log in again."),
    "RefreshReused": (401, "refresh_reused", "Invalid token. Please log in again."),
    "TokenExpired": (401, "token_expired", "Signature expired. Please log in again."),
    "TokenOfInactive": (401, "account_inactive", "Something went wrong. Please contact us."),
    "SessionNotFound": (404, "session_not_found", "Session does not exist."),
    "PermissionDenied": (403, "permission_denied", "You do not have permission to do that."),
    "TooManyAttempts": (429, "too_many_attempts", "Too many attempts. Please try again later."),
    "InvalidClient": (401, "invalid_client", "The client could not be authenticated."),
    "UnsupportedGrantType": (
        400,
        "unsupported_grant_type",
        "This grant type is not supported.",
    ),
    "InvalidScope": (400, "invalid_scope", "The client may not have this scope."),
    "UnsupportedTokenType": (
        400,
        "unsupported_token_type",
        "Tokens of this type cannot be revoked.",
    ),
    "Busy": (503, "busy", "The service is busy. Please try again."),
    "MailNotConfigured": (503, "mail_not_configured", "The service cannot send email."),
    "MfaNotConfigured": (503, "mfa_not_configured", "The service cannot use authenticators."),
    "Draining": (503, "draining", "The server is about to stop."),
    "DatabaseNotMigrated": (
        503,
        "database_not_migrated",
        "The database has not been migrated yet.",
    ),
    "DatabaseUnavailable": (
        503,
        "database_unavailable",
        "The service is not available right now. Please try again.",
    ),
}


class TestErrorCatalogue(unittest.TestCase):
    """Clients read the statuses and codes, and show the messages."""

    def test_catalogue(self) -> None:
        """No error is added, removed or reworded without a change of this table."""
        found = {
            name: (kind.status, kind.code, kind.message)
            for name, kind in vars(errors).items()
            if isinstance(kind, type) and issubclass(kind, errors.ServiceError)
        }

        self.assertEqual(CATALOGUE, found)
