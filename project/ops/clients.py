"""The commands about other services, which are OAuth clients: create_client, clients ..."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Row

from project import clock
from project.accounts.clients import ClientNotFound, create, disable, listed, rotate_secret
from project.errors import InvalidPayload
from project.extensions import db
from project.ops.command_line import (
    ORIGIN,
    as_duration,
    as_time,
    describe,
    exit_without_issuer,
)
from project.tokens import keys

TABLE_ROW = "{:24}  {:8}  {:20}  {:20}  {:32}  {}"
COLUMNS = "client", "state", "created", "old secret until", "audience", "scope"


def create_client(name: str, audience: str | None = None, scope: str = "") -> None:
    """Add a client, another service that asks about tokens, and print its secret once.

    --audience is the `aud` of the tokens that it can ask about, by default TOKEN_AUDIENCE or
    ISSUER; its own tokens are for it too. --scope "a b" is what it can ask for in its own tokens.
    """
    exit_without_issuer()
    try:
        secret = create(name, audience or keys.audience(), scope.split(), ORIGIN)
    except InvalidPayload as error:
        sys.exit(describe(error))
    db.session.commit()
    _print_secret(name, secret)


def clients() -> None:
    """Print the clients by name, as a table without secrets."""
    exit_without_issuer()
    print(TABLE_ROW.format(*COLUMNS))
    for client in listed():
        print(_as_row(client))


def rotate_client_secret(name: str, keep: str = "24h") -> None:
    """Give a client a new secret and print it once; the present one stays valid for 24 hours.

    --keep takes another duration (90m, 24h, 7d); use 0m if the secret leaked. Of a client whose
    secret is replaced twice within this time, the newest two secrets are valid.
    """
    exit_without_issuer()
    duration = as_duration(keep)
    if duration is None:
        sys.exit(f"{keep!r} is not a duration: write 90m, 24h, 7d.")
    with _exit_if_not_found(name):
        secret = rotate_secret(name, ORIGIN, keep=duration)
    db.session.commit()
    _print_secret(name, secret)
    if duration:
        print(f"The previous secret is valid until {as_time(clock.utcnow() + duration)}.")
    else:
        print("The previous secret is no longer valid.")


def disable_client(name: str) -> None:
    """Refuse a client from now on."""
    exit_without_issuer()
    with _exit_if_not_found(name):
        disable(name, ORIGIN)
    db.session.commit()
    print(f"{name} is disabled. Tokens that it got for itself are valid until they expire.")


@contextlib.contextmanager
def _exit_if_not_found(name: str) -> Iterator[None]:
    try:
        yield
    except ClientNotFound:
        sys.exit(f"There is no client {name}.")


def _print_secret(name: str, secret: str) -> None:
    print(f"Client ID: {name}")
    print(f"Secret:    {secret}")
    print("The secret is not stored, and is not shown again.")


def _as_row(client: Row[Any]) -> str:
    state = "disabled" if client.disabled_at else "enabled"
    until = client.previous_until
    old = as_time(until if until and until > clock.utcnow() else None)
    columns = client.name, state, as_time(client.created_at), old, client.audience
    return TABLE_ROW.format(*columns, " ".join(client.scope)).rstrip()
