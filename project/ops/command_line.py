"""What the commands share: their origin in the audit log, times, and errors as lines."""

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta

from project.accounts import audit
from project.errors import ServiceError, UserNotFound
from project.tokens import keys

# The origin of a command's events in the audit log.
ORIGIN = audit.Origin(None, "manage.py")
UNITS = {"m": "minutes", "h": "hours", "d": "days"}


@contextlib.contextmanager
def exit_if_not_found(email: str) -> Iterator[None]:
    """End the command when the block raises UserNotFound for the user with this email."""
    try:
        yield
    except UserNotFound:
        sys.exit(f"There is no user with the email {email}.")


def exit_without_issuer() -> None:
    """End the command unless other services can verify tokens."""
    if not keys.issuer():
        sys.exit("ISSUER is not set: the service has no signing keys and no clients.")


def as_duration(text: str) -> timedelta | None:
    """Return the duration that a text such as 90m, 24h or 7d names, or None."""
    duration = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    return timedelta(**{UNITS[duration[2]]: int(duration[1])}) if duration else None


def as_time(time: datetime | None) -> str:
    """Return a time in UTC to the second, or a hyphen for none."""
    return f"{time:%Y-%m-%dT%H:%M:%SZ}" if time else "-"


def describe(error: ServiceError) -> str:
    """Return the message of an error and its reasons, in one line."""
    return f"{error.message} {describe_fields(error.errors or {})}".strip()


def describe_fields(errors: Mapping[str, str]) -> str:
    """Return the reasons by field, in one line."""
    return "; ".join(f"{field} {reason}" for field, reason in errors.items())
