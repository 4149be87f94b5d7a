"""What the commands share: their origin in the audit log, and times and errors as text."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime

from project.accounts import audit
from project.errors import ServiceError, UserNotFound
from project.tokens import keys

# The origin of a command's events in the audit log.
ORIGIN = audit.Origin(None, "manage.py")


@contextlib.contextmanager
def exit_if_not_found(email: str) -> Iterator[None]:
    """End the command when the block raises UserNotFound for the user with this email."""
    try:
        yield
    except UserNotFound:
        sys.exit(f"There is no user with the email {email}.")


def exit_without_issuer() -> None:
    """End a command about tokens for other services unless ISSUER is set."""
    if keys.issuer() is None:
        sys.exit("ISSUER is not set, so the service issues no tokens for other services.")


def time_of(moment: datetime | None) -> str:
    """Return a time as a cell of a table."""
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}" if moment else "-"


def describe(error: ServiceError) -> str:
    """Return the message of an error and its reasons, in one line."""
    return f"{error.message} {describe_fields(error.errors or {})}".strip()


def describe_fields(errors: Mapping[str, str]) -> str:
    """Return the reasons by field, in one line."""
    return "; ".join(f"{field} {reason}" for field, reason in errors.items())
