"""The commands about other services: create_client, clients, rotate_client_secret, ..."""

import contextlib
import re
import sys
from collections.abc import Iterator
from datetime import timedelta

from project.accounts import clients as services
from project.errors import InvalidPayload
from project.extensions import db
from project.ops.command_line import ORIGIN, describe, exit_without_issuer, time_of
from project.tokens import keys

MAX_KEEP_HOURS = 720
TABLE_ROW = "{:24}  {:32}  {:20}  {:20}  {:20}  {}"
COLUMNS = "name", "audience", "created", "old secret until", "disabled", "scope"


def create_client(name: str, audience: str | None = None, scope: str = "") -> None:
    """Add a service that authenticates with a secret, and print the secret once.

    It may introspect tokens for --audience, which is TOKEN_AUDIENCE by default. --scope are the
    words that its own tokens may have, separated by blanks.
    """
    exit_without_issuer()
    try:
        secret = services.create(name, audience or keys.audience(), scope.split(), ORIGIN)
    except InvalidPayload as error:
        sys.exit(describe(error))
    db.session.commit()
    _print_secret(name, secret)


def clients() -> None:
    """Print the services that authenticate with a secret, as a table without any secret."""
    exit_without_issuer()
    print(TABLE_ROW.format(*COLUMNS))
    for row in services.listed():
        times = map(time_of, (row.created_at, row.previous_until, row.disabled_at))
        line = TABLE_ROW.format(row.name, row.audience, *times, " ".join(row.scope))
        print(line.rstrip())


def rotate_client_secret(name: str, keep_hours: str = "24") -> None:
    """Give a service another secret, and print it once.

    The present one is valid for --keep-hours more, or not at all with 0.
    """
    exit_without_issuer()
    if not re.fullmatch("[0-9]{1,3}", keep_hours) or int(keep_hours) > MAX_KEEP_HOURS:
        sys.exit(f"--keep-hours is a number from 0 to {MAX_KEEP_HOURS}.")
    with _exit_if_not_found(name):
        secret = services.rotate_secret(name, ORIGIN, keep=timedelta(hours=int(keep_hours)))
    db.session.commit()
    _print_secret(name, secret)
    print(f"The old secret is valid for {keep_hours} hours more.")


def disable_client(name: str) -> None:
    """Refuse a service and its tokens; services that do not ask accept these until they expire."""
    exit_without_issuer()
    with _exit_if_not_found(name):
        services.disable(name, ORIGIN)
    db.session.commit()
    print(f"{name} is disabled.")


@contextlib.contextmanager
def _exit_if_not_found(name: str) -> Iterator[None]:
    try:
        yield
    except services.ClientNotFound:
        sys.exit(f"There is no client {name}.")


def _print_secret(name: str, secret: str) -> None:
    print(f"Client ID: {name}\nClient secret: {secret}\nThe secret is not shown again.")
