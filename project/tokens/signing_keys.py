"""The keys that sign auth tokens for other services, in the table `signing_keys`.

Which key signs and which keys verify follows from the rows and the clock alone, so all processes
agree without talking to each other. Each keeps the rows for a while. A new key is therefore
published before it signs, and its predecessors verify until their last token has expired.
Functions that write use the transaction of `db.session`; the caller commits.
"""

import threading
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from flask import Flask, current_app
from sqlalchemy import Row, insert, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from project import clock
from project.errors import TokenInvalid
from project.extensions import db
from project.lib import database, encryption
from project.lib.app_state import AppState
from project.models import signing_keys_table
from project.tokens import at_jwt, codec, jwk, keys

MAX_AGE = 60  # seconds for which a process keeps the rows
MIN_AGE = 5  # seconds for which it keeps them if a token names an unknown key
PUBLISHED_BEFORE = 900  # seconds; longer than other services keep the public keys
CLIENT_TOKEN_LIFETIME = 900  # seconds, of the token that a client gets for itself
_LOCK = "signing_keys"

_columns = signing_keys_table.c
_ALL = select(*_columns).order_by(_columns.signs_from.desc(), _columns.kid)

SigningKeyRow = Row[Any]


def signing(rows: Sequence[SigningKeyRow], now: datetime) -> SigningKeyRow | None:
    """Return the row of the key that signs at `now`: the newest that has begun to."""
    valid = verifying(rows, now)
    begun = [row for row in valid if row.signs_from <= now]
    # The clock of this server may be behind, so that none has begun: then it is the first of them.
    return max(begun, key=_begin) if begun else min(valid, key=_begin, default=None)


def verifying(rows: Sequence[SigningKeyRow], now: datetime) -> list[SigningKeyRow]:
    """Return the rows of the keys that verify tokens at `now`, and are published."""
    return [row for row in rows if _verifies(row, now)]


def _verifies(row: SigningKeyRow, now: datetime) -> bool:
    return row.verifies_until is None or row.verifies_until > now


def _begin(row: SigningKeyRow) -> tuple[datetime, str]:
    return row.signs_from, row.kid


class _Keys:
    """The rows as one process read them last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rows: Sequence[SigningKeyRow] = []
        self.issuer = at_jwt.Issuer("", {})
        self.read_at: datetime | None = None
        self.failed_at: datetime | None = None  # when the database was unavailable

    def is_older_than(self, seconds: float, now: datetime) -> bool:
        """Return whether the rows have to be read; also if the clock was set back.

        Without a key, they always have to: another process may have made the first one. While the
        database is unavailable, they are asked for every MIN_AGE seconds.
        """
        if not self.rows:
            return True
        return not (
            _is_within(seconds, self.read_at, now) or _is_within(MIN_AGE, self.failed_at, now)
        )


def _is_within(seconds: float, moment: datetime | None, now: datetime) -> bool:
    return moment is not None and 0 <= (now - moment).total_seconds() < seconds


_keys = AppState[_Keys]("signing_keys")


def init_app(app: Flask) -> None:
    """Prepare `app`; nothing is read before the first request that needs a key."""
    _keys.set(app, _Keys())


def _current(now: datetime, max_age: float = MAX_AGE) -> _Keys:
    """Return the keys, at `now` not older than `max_age` seconds.

    They may be older while the database is unavailable. While one thread reads them, the others
    use the earlier ones, unless those may lack a key that is needed: at the beginning, and with
    another `max_age`.
    """
    kept = _keys.get()
    must_wait = not kept.rows or max_age < MAX_AGE
    if kept.is_older_than(max_age, now) and kept.lock.acquire(blocking=must_wait):
        try:
            now = clock.utcnow()  # another thread may have read them meanwhile
            if kept.is_older_than(max_age, now):
                _read(kept, now)
        except SQLAlchemyError as error:
            if not kept.rows or not database.is_unavailable(error):
                raise
            kept.failed_at = now
        finally:
            kept.lock.release()
    return kept


def _read(kept: _Keys, now: datetime) -> None:
    rows = database.fetch_all(_ALL)
    if rows != kept.rows or kept.read_at is None:
        public = {row.kid: jwk.parse_public(row.public) for row in rows}
        # The rows first: other threads refuse a key of the issuer that is not among them.
        kept.rows = rows
        # A new object: tokens that were verified with other keys are verified again.
        kept.issuer = at_jwt.Issuer(str(keys.issuer()), public)
    kept.read_at = now


def sign(claims: at_jwt.Claims) -> str:
    """Return a token with these claims, signed with `signing_key`."""
    kid, key = signing_key()
    return at_jwt.encode(claims, issuer=str(keys.issuer()), kid=kid, key=key)


def signing_key() -> tuple[str, jwk.PrivateKey]:
    """Return `kid` and private key of the key that signs now.

    If there is no key yet, it is made in the current transaction. Raise
    encryption.DecryptionFailed if no key of ENCRYPTION_KEYS decrypts the private key.
    """
    now = clock.utcnow()
    row = signing(_current(now).rows, now) or _first()
    return row.kid, _private_key(row.private, row.kid, current_app.config["ENCRYPTION_KEYS"])


@lru_cache(8)
def _private_key(encrypted: bytes, kid: str, encryption_keys: tuple[str, ...]) -> jwk.PrivateKey:
    """Return the private key of a row; parsing takes longer than a signature."""
    return jwk.parse_private(encryption.decrypt(encrypted, kid, encryption_keys))


def verify(token: str) -> at_jwt.Claims:
    """Return the claims of a token that one of the keys has signed and that is valid now.

    The caller checks the audience. Raise at_jwt.OtherAlgorithm for a token that is not signed with
    ES256, TokenExpired for a signed token that has expired, and TokenInvalid for any other.
    """
    now = clock.utcnow()
    kept = _current(now)
    try:
        kid, claims = at_jwt.verify(token, kept.issuer)
    except at_jwt.UnknownKey:
        kept = _current(now, MIN_AGE)
        kid, claims = at_jwt.verify(token, kept.issuer)
    if not any(row.kid == kid and _verifies(row, now) for row in kept.rows):
        raise TokenInvalid
    codec.check_times(claims["iat"], claims["exp"], now)
    return claims


def published() -> list[dict[str, str]]:
    """Return the public keys, as JWKs, that tokens are or will be signed with.

    If there is no key yet, it is made in the current transaction.
    """
    now = clock.utcnow()
    rows = verifying(_current(now, MIN_AGE).rows, now) or [_first()]
    return [row.public for row in rows]


def _first() -> SigningKeyRow:
    """Return the first key; of several processes that need it at once, one makes it."""
    database.lock(_LOCK)
    row = db.session.execute(_ALL).first()
    if row is None:
        _add(clock.utcnow())
        row = db.session.execute(_ALL).one()
    return row


def _add(signs_from: datetime) -> str:
    kid, public, private = jwk.make()
    encrypted = encryption.encrypt(private, kid, current_app.config["ENCRYPTION_KEYS"])
    now = clock.utcnow()
    db.session.execute(
        insert(signing_keys_table).values(
            kid=kid, public=public, private=encrypted, created_at=now, signs_from=signs_from
        )
    )
    return kid


def rotate(*, at_once: bool = False) -> str:
    """Add a key that replaces all others, and return its `kid`.

    It signs PUBLISHED_BEFORE seconds later, and the others verify until their last token has
    expired. `at_once` is for a key that leaked: the new one signs and the others verify nothing
    from now on.
    """
    database.lock(_LOCK)
    signs_from = until = clock.utcnow()
    if not at_once:
        signs_from += timedelta(seconds=PUBLISHED_BEFORE)
        longest = max(keys.auth_token_lifetime(), CLIENT_TOKEN_LIFETIME)
        until = signs_from + timedelta(seconds=longest + MAX_AGE)
    later = or_(_columns.verifies_until.is_(None), _columns.verifies_until > until)
    database.write(update(signing_keys_table).where(later).values(verifies_until=until))
    return _add(signs_from)


def all_keys() -> Sequence[SigningKeyRow]:
    """Return all rows, also of keys that verify no longer, the newest first."""
    return database.fetch_all(_ALL)


def is_readable(row: SigningKeyRow, encryption_keys: tuple[str, ...]) -> bool:
    """Return whether one of `encryption_keys` decrypts the private key of a row."""
    return encryption.can_decrypt(row.private, row.kid, encryption_keys)


def reencrypt() -> int:
    """Encrypt all private keys under the first of ENCRYPTION_KEYS; return how many were not.

    Raise encryption.DecryptionFailed if none of them decrypts one.
    """
    database.lock(_LOCK)
    encryption_keys = current_app.config["ENCRYPTION_KEYS"]
    outdated = [
        row for row in db.session.execute(_ALL) if not is_readable(row, encryption_keys[:1])
    ]
    for row in outdated:
        private = encryption.decrypt(row.private, row.kid, encryption_keys)
        encrypted = encryption.encrypt(private, row.kid, encryption_keys)
        this_one = _columns.kid == row.kid
        database.write(update(signing_keys_table).where(this_one).values(private=encrypted))
    return len(outdated)


def delete_expired() -> int:
    """Delete a batch of keys that verify no longer; return how many, 0 at the end."""
    retired = _columns.verifies_until <= clock.utcnow()
    return database.delete_batch(signing_keys_table, retired, _columns.verifies_until)
