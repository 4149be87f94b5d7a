"""Other services, which authenticate as OAuth clients with a secret (RFC 6749, 2.3.1).

Functions here write and may flush. The caller commits; a refusal commits its own event.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

from sqlalchemy import Row, bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError

from project import clock
from project.accounts import audit, rate_limits
from project.errors import InvalidClient, InvalidPayload
from project.extensions import db
from project.lib import database
from project.models import MAX_STORED_AUDIENCE, MAX_STORED_WORDS, clients_table
from project.tokens import auth_tokens

SECRET_BYTES = 32
# Begins with a letter: `sub` of a client's token is never the id of a user (RFC 9068, 5).
_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
_NAME_RULE = (
    "must be at most 63 lower-case letters, digits and hyphens, begin with a letter, and not be"
    f" {auth_tokens.FIRST_PARTY}"
)
# RFC 6749, 3.3.
_WORD = re.compile(r"[\x21\x23-\x5B\x5D-\x7E]+")
_WORD_RULE = "a word of ASCII without quotes and backslashes"

_columns = clients_table.c
_BY_NAME = select(*_columns).where(_columns.name == bindparam("name"))
_ALL = select(*_columns).order_by(_columns.name)


class ClientNotFound(Exception):
    """There is no client of this name."""


def create(name: str, audience: str, scope: list[str], origin: audit.Origin) -> str:
    """Add a client, and return its secret, of which only a hash is stored.

    The client may introspect tokens for `audience`, and its own tokens are for it too. `scope` is
    what it can ask for in its own tokens. Raise InvalidPayload.
    """
    problems = {}
    if not _NAME.fullmatch(name) or name == auth_tokens.FIRST_PARTY:
        problems["name"] = _NAME_RULE
    if len(audience) > MAX_STORED_AUDIENCE or not _WORD.fullmatch(audience):
        problems["audience"] = f"must be {_WORD_RULE}, of at most {MAX_STORED_AUDIENCE} characters"
    if len(" ".join(scope)) > MAX_STORED_WORDS or not all(map(_WORD.fullmatch, scope)):
        problems["scope"] = f"must be at most {MAX_STORED_WORDS} characters, each {_WORD_RULE}"
    if problems:
        raise InvalidPayload(errors=problems)
    secret = _new_secret()
    values = {"name": name, "audience": audience, "scope": scope, "secret_hash": _hash(secret)}
    try:
        with db.session.begin_nested():
            db.session.execute(insert(clients_table).values(created_at=clock.utcnow(), **values))
    except IntegrityError:
        raise InvalidPayload(errors={"name": "is taken"}) from None
    audit.record(audit.Kind.CLIENT_ADDED, origin, user_id=None, client=name)
    return secret


def authenticate(name: str, secret: str, origin: audit.Origin) -> Row[Any]:
    """Return the client of this name and secret; raise InvalidClient or TooManyAttempts.

    A wrong secret is counted like a wrong password. The right one is accepted nevertheless, so that
    an attacker cannot lock a service out: no number of guesses finds 256 random bits.
    """
    client = find(name) if _NAME.fullmatch(name) else None
    if client is None:
        _refuse("unknown_client", name, origin)
    if not _matches(client, secret):
        _refuse("wrong_secret", name, origin, client=name)
    if client.disabled_at is not None:
        _refuse("client_disabled", name, origin, client=name)
    return client


def _refuse(why: str, name: str, origin: audit.Origin, **details: str) -> NoReturn:
    """Count and record a refusal; `details` name the client only if there is one."""
    attempt = rate_limits.limits().client(name, origin.ip)
    kind = audit.Kind.CLIENT_REFUSED
    about = {"why": why, "pause": attempt.pause, **details}
    audit.refuse(InvalidClient(), kind, origin, user_id=None, **about)


def _matches(client: Row[Any], secret: str) -> bool:
    """Return whether a secret is that of a client, or the previous one, which is valid a while."""
    hashes = [client.secret_hash]
    if client.previous_until is not None and client.previous_until > clock.utcnow():
        hashes.append(client.previous_hash)
    return any(hmac.compare_digest(_hash(secret), each) for each in hashes)


def find(name: str) -> Row[Any] | None:
    """Return the client of this name, enabled or not."""
    return database.fetch_one(_BY_NAME, name=name)


def listed() -> Sequence[Row[Any]]:
    """Return all clients by name."""
    return database.fetch_all(_ALL)


def rotate_secret(name: str, origin: audit.Origin, *, keep: timedelta) -> str:
    """Give a client another secret, and return it; the present one is valid as long as `keep`.

    Raise ClientNotFound.
    """
    secret, this_one = _new_secret(), _columns.name == name
    values = {
        "previous_hash": _columns.secret_hash,
        "previous_until": clock.utcnow() + keep,
        "secret_hash": _hash(secret),
    }
    if not database.write(update(clients_table).where(this_one).values(values)):
        raise ClientNotFound
    audit.record(audit.Kind.CLIENT_SECRET_ROTATED, origin, user_id=None, client=name)
    return secret


def disable(name: str, origin: audit.Origin) -> None:
    """Refuse a client from now on; raise ClientNotFound."""
    disabled = update(clients_table).where(_columns.name == name)
    if not database.write(disabled.values(disabled_at=clock.utcnow())):
        raise ClientNotFound
    audit.record(audit.Kind.CLIENT_DISABLED, origin, user_id=None, client=name)


def _new_secret() -> str:
    return secrets.token_urlsafe(SECRET_BYTES)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
