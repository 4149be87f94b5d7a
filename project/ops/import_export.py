"""Import users with their password hashes from a file, and export them.

Functions here write and may flush; the caller commits after each batch.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import orjson
from sqlalchemy import (
    CompoundSelect,
    FromClause,
    Insert,
    Integer,
    Row,
    Text,
    bindparam,
    column,
    func,
    select,
    union_all,
)

from project import clock
from project.accounts import second_factor
from project.extensions import db
from project.lib import database, hashing
from project.models import totp_factors_table, username_key, users_table
from project.ops import exported_factors, user_files
from project.ops.exported_factors import Factor
from project.ops.user_files import ImportedUser, Record

BATCH = 5_000  # records

_COLUMNS = [each for each in users_table.c if each.name != "id"]
# By whether second factors are exported too.
_EXPORTED = {
    False: select(*_COLUMNS).order_by(users_table.c.id),
    True: select(*_COLUMNS, *exported_factors.COLUMNS)
    .select_from(exported_factors.USERS)
    .order_by(users_table.c.id),
}
_WITH_FACTOR = select(func.count()).where(users_table.c.mfa_enabled)


class Refusal(NamedTuple):
    """A record that was not imported."""

    line: int
    errors: dict[str, str]  # by field, as in `user_files.Record`


class Batch(NamedTuple):
    """The outcome of consecutive records of a file."""

    end: int  # bytes of the file up to the end of the batch
    added: int
    existing: int  # users that the database had before, exactly as in the file
    refused: list[Refusal]  # in the order of the lines


class _Candidate(NamedTuple):
    """A valid record, whose user is added unless the email or the username is taken."""

    line: int
    user: ImportedUser
    username_key: str


def import_users(file: BinaryIO, *, as_csv: bool) -> Iterator[Batch]:
    """Add the users of a file; yield the outcome of each batch, for the caller to commit.

    Existing users are never changed. A file, or a part of it, can therefore be imported again
    without undoing what has happened to its users since. Raise MfaNotConfigured if the second
    factor of an existing user is to be compared and cannot be decrypted.
    """
    records = user_files.read(file, as_csv=as_csv)
    while batch := list(islice(records, BATCH)):
        yield _import_batch(batch)


def _import_batch(batch: Sequence[Record]) -> Batch:
    invalid = [Refusal(record.line, record.errors) for record in batch if not record.user]
    candidates = [
        _Candidate(record.line, record.user, username_key(record.user.username))
        for record in batch
        if record.user
    ]
    not_added = _add(candidates)
    conflicting = [refusal for refusal in _compare(not_added) if refusal.errors]
    return Batch(
        end=batch[-1].end,
        added=len(candidates) - len(not_added),
        existing=len(not_added) - len(conflicting),
        refused=sorted(invalid + conflicting, key=lambda refusal: refusal.line),
    )


def _add(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Add the users whose email and username are free; return the other candidates."""
    rows = orjson.dumps(list(_rows(candidates))).decode()
    result = db.session.execute(_insert(), {"batch": rows})
    added = {(email, key): user_id for email, key, user_id in result}
    not_added, factors = [], []
    for candidate in candidates:
        # A later candidate with the same key was not added.
        user_id = added.pop((candidate.user.email, candidate.username_key), None)
        if user_id is None:
            not_added.append(candidate)
        elif candidate.user.second_factor:
            factors.append((user_id, candidate.user.second_factor))
    exported_factors.add(factors)
    return not_added


def _rows(candidates: Sequence[_Candidate]) -> Iterator[dict[str, Any]]:
    """Yield the columns of each candidate, as JSON values that the database can convert."""
    dialect = db.engine.dialect
    # SQLite stores times as text, in a format of its own.
    as_column: Any = users_table.c.created_at.type.dialect_impl(dialect).bind_processor(dialect)
    now = clock.utcnow()
    for line, user, key in candidates:
        yield {
            "line": line,
            "username": user.username,
            "username_key": key,
            "email": user.email,
            "password": user.password_hash,
            "active": user.active,
            "admin": user.admin,
            "email_verified": user.email_verified,
            "roles": " ".join(user.roles),
            "mfa_enabled": user.second_factor is not None,
            "created_at": as_column(user.created_at or now),
        }


def _insert() -> Insert:
    """Return the statement that inserts the rows of the JSON array `batch`, in their order.

    Rows with an existing email are filtered out first: ON CONFLICT would use up an id for each.
    """
    batch = _batch_table()
    exists = select(users_table.c.id).where(users_table.c.email == batch.c.email).exists()
    new = select(*(batch.c[each.name] for each in _COLUMNS)).where(~exists).order_by(batch.c.line)
    return (
        database.insert(users_table)
        .from_select(_COLUMNS, new)
        .on_conflict_do_nothing()
        .returning(users_table.c.email, users_table.c.username_key, users_table.c.id)
    )


def _batch_table() -> FromClause:
    """Return the JSON array in the parameter `batch` as a table: one parameter for any number."""
    fields = [column("line", Integer), *(column(each.name, each.type) for each in _COLUMNS)]
    batch = bindparam("batch", type_=Text)
    if database.is_postgresql():
        table = func.json_to_recordset(batch).table_valued(*fields, name="batch")
        return table.render_derived(with_types=True)
    values = func.json_each(batch).table_valued("value")
    cells = (func.json_extract(values.c.value, f"$.{field.name}") for field in fields)
    return select(
        *(cell.label(field.name) for cell, field in zip(cells, fields, strict=True))
    ).subquery("batch")


def _compare(not_added: Sequence[_Candidate]) -> Iterator[Refusal]:
    """Yield a refusal for each candidate; without errors, if the same user exists already."""
    if not not_added:
        return
    rows = [{"email": user.email, "username_key": key} for _, user, key in not_added]
    stored = db.session.execute(_select_conflicts(), {"batch": orjson.dumps(rows).decode()}).all()
    by_email = {row.email: row for row in stored}
    taken_keys = {row.username_key for row in stored}
    for line, user, key in not_added:
        existing = by_email.get(user.email)
        if existing and existing.username_key == key:
            yield Refusal(line, _differences(user, existing))
        else:
            taken = {"username": key in taken_keys, "email": bool(existing)}
            errors = {name: "is taken" for name, is_taken in taken.items() if is_taken}
            # Neither is taken if the user who had it was deleted in the meantime.
            yield Refusal(line, errors or {"it": "could not be added; try it again"})


def _select_conflicts() -> CompoundSelect[Any]:
    """Return a query for the users that have the email or the username of a row of `batch`.

    Each is looked up in an index by a join: with an IN of thousands of emails, PostgreSQL prefers
    to scan the whole table.
    """
    batch = _batch_table()
    columns = *_COLUMNS, users_table.c.id, totp_factors_table.c.secret
    return union_all(
        *(
            select(*columns).select_from(
                batch.join(exported_factors.USERS, users_table.c[name] == batch.c[name])
            )
            for name in ("email", "username_key")
        )
    )


def _differences(user: ImportedUser, stored: Row[Any]) -> dict[str, str]:
    """Return an error that names the fields in which an existing user differs from the file.

    Only fields that the file has are compared. A hash from another program that has been replaced
    at a login does not count as a difference.
    """
    rehashed = hashing.is_foreign(user.password_hash) > hashing.is_foreign(stored.password)
    same = {
        "username": user.username == stored.username,
        "password_hash": user.password_hash == stored.password or rehashed,
        "active": user.active == stored.active,
        "admin": user.admin == stored.admin,
        "email_verified": user.email_verified == stored.email_verified,
        "roles": user.roles == stored.roles,
        "second_factor": user.second_factor is None or _has_factor(stored, user.second_factor),
        "created_at": user.created_at == stored.created_at,
    }
    others = [name for name in same if name in user.model_fields_set and not same[name]]
    return {"it": f"is there already, with another {', '.join(others)}"} if others else {}


def _has_factor(stored: Row[Any], factor: Factor) -> bool:
    """Return whether an existing user has this second factor, whatever codes are left."""
    if stored.secret is None:
        return False
    return second_factor.decrypt(stored.secret, stored.id) == factor.secret


def users_with_factor() -> int:
    """Return how many users have a second factor."""
    return database.count(_WITH_FACTOR)


def export_users(*, with_factors: bool = False) -> Iterator[dict[str, Any]]:
    """Yield all users as `user_files.write` takes them, in the order of their ids.

    Raise MfaNotConfigured if a second factor is to be exported and cannot be decrypted.
    """
    for user in database.stream(_EXPORTED[with_factors]):
        factor = exported_factors.of_row(user) if with_factors else None
        sealed = {"second_factor": exported_factors.seal(factor, user.email)} if factor else {}
        yield {
            "username": user.username,
            "email": user.email,
            "password_hash": hashing.export_hash(user.password),
            "active": user.active,
            "admin": user.admin,
            "email_verified": user.email_verified,
            "roles": user.roles,
            "created_at": user.created_at.isoformat().replace("+00:00", "Z"),
            **sealed,
        }
