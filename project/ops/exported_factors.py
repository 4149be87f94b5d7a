"""Second factors in a file of users: encrypted under ENCRYPTION_KEYS, bound to the user's email.

In the database a secret is bound to the ID of its user, who gets another one by an import.
"""

import base64
from collections.abc import Iterable
from typing import Any, NamedTuple

import orjson
from flask import current_app
from sqlalchemy import Row, func, insert, select

from project import clock
from project.accounts import second_factor
from project.extensions import db
from project.lib import codes, encryption
from project.models import recovery_codes_table, totp_factors_table, users_table

_factors = totp_factors_table.c
_codes = recovery_codes_table.c
# For a query about users: the columns of `of_row`, and the table that they are joined with.
COLUMNS: list[Any] = [
    users_table.c.id,
    _factors.secret,
    _factors.email_verified.label("factor_email_verified"),
    select(func.aggregate_strings(_codes.code_hash, " "))
    .where(_codes.user_id == users_table.c.id)
    .scalar_subquery()
    .label("code_hashes"),
]
USERS = users_table.outerjoin(
    totp_factors_table,
    (_factors.user_id == users_table.c.id) & _factors.last_step.is_not(None),
)


class Factor(NamedTuple):
    """A second factor."""

    secret: str  # of the authenticator, in base32
    email_verified: bool  # whether the user's email was, when they set it up
    code_hashes: list[str]  # of the recovery codes


def of_row(row: Row[Any]) -> Factor | None:
    """Return the second factor in a row with COLUMNS, or None; raise MfaNotConfigured."""
    if row.secret is None:
        return None
    secret = second_factor.decrypt(row.secret, row.id)
    return Factor(secret, row.factor_email_verified, (row.code_hashes or "").split())


def seal(factor: Factor, email: str) -> str:
    """Return a second factor as it is in a file."""
    plain = orjson.dumps(factor._asdict())
    keys = current_app.config["ENCRYPTION_KEYS"]
    return base64.b64encode(encryption.encrypt(plain, _context(email), keys)).decode()


def unseal(text: str, email: str) -> Factor:
    """Return the second factor in a file; raise ValueError if it is not one of this user."""
    try:
        encrypted = base64.b64decode(text, validate=True)
        keys = current_app.config["ENCRYPTION_KEYS"]
        return Factor(**orjson.loads(encryption.decrypt(encrypted, _context(email), keys)))
    except (ValueError, TypeError, encryption.DecryptionFailed):
        raise ValueError("cannot be decrypted with ENCRYPTION_KEYS for this email") from None


def _context(email: str) -> str:
    return f"second factor of {email}"


def add(factors: Iterable[tuple[int, Factor]]) -> None:
    """Give new users, by their IDs, these second factors; the caller commits.

    Codes that were shown until now are refused: they may have been used elsewhere.
    """
    step = codes.present_step(clock.utcnow())
    rows, hashes = [], []
    for user_id, factor in factors:
        secret = second_factor.encrypt(factor.secret, user_id)
        about = {"user_id": user_id, "email_verified": factor.email_verified}
        rows.append(about | {"secret": secret, "last_step": step})
        hashes += [{"user_id": user_id, "code_hash": each} for each in factor.code_hashes]
    if rows:
        db.session.execute(insert(totp_factors_table), rows)
    if hashes:
        db.session.execute(insert(recovery_codes_table), hashes)
