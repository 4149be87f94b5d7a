"""What the commands share: their origin in the audit log, and errors as lines for a terminal."""

import contextlib
import sys
from collections.abc import Iterator, Mapping

from project.accounts import audit
from project.errors import ServiceError, UserNotFound

# The origin of a command's events in the audit log.
ORIGIN = audit.Origin(None, "manage.py")


@contextlib.contextmanager
def exit_if_not_found(email: str) -> Iterator[None]:
    """End the command when the block raises UserNotFound for the user with this email."""
    try:
        yield
    except UserNotFound:
        sys.exit(f"There is no user with the email {email}.")


def describe(error: ServiceError) -> str:
    """Return the message of an error and its reasons, in one line."""
    return f"{error.message} {describe_fields(error.errors or {})}".strip()


def describe_fields(errors: Mapping[str, str]) -> str:
    """Return the reasons by field, in one line."""
    return "; ".join(f"{field} {reason}" for field, reason in errors.items())
