"""Moving in and out: users with the hashes of their passwords, from a file and into one.

Functions here write and may flush; the caller commits, batch by batch.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, cast

import orjson
from sqlalchemy import (
    CompoundSelect,
    FromClause,
    Insert,
    Integer,
    Row,
    Table,
    Text,
    bindparam,
    column,
    func,
    select,
    union_all,
)

from project import clock, database, passwords, records
from project.api.models import User, username_key
from project.api.schemas import ImportedUser
from project.extensions import db
from project.records import Record

BATCH = 5_000  # records

_users = cast(Table, User.__table__)
_COLUMNS = [each for each in _users.c if each.name != "id"]
_EXPORTED = select(*_COLUMNS).order_by(_users.c.id)


class Refusal(NamedTuple):
    """A record that was not taken in."""

    line: int
    errors: dict[str, str]  # by field, as in `records.Record`


class Batch(NamedTuple):
    """What became of some records that follow one another in a file."""

    end: int  # bytes of the file up to here
    added: int
    there: int  # users who had been there before, just as the file has them
    refused: list[Refusal]  # in the order of the lines


class _Newcomer(NamedTuple):
    line: int
    user: ImportedUser
    key: str


def take_in(file: BinaryIO, *, as_csv: bool) -> Iterator[Batch]:
    """Add the users of a file, and yield what became of each batch, which is then to be committed.

    Whoever is there stays as they are: a file that was taken in, or a part of it, can be taken in
    again, and what has happened to its users since then is not undone.
    """
    read = records.read(file, as_csv=as_csv)
    while batch := list(islice(read, BATCH)):
        yield _take_in(batch)


def _take_in(batch: Sequence[Record]) -> Batch:
    refused = [Refusal(record.line, record.errors) for record in batch if not record.user]
    newcomers = [
        _Newcomer(record.line, record.user, username_key(record.user.username))
        for record in batch
        if record.user
    ]
    left = _add(newcomers)
    objections = [refusal for refusal in _compare(left) if refusal.errors]
    return Batch(
        end=batch[-1].end,
        added=len(newcomers) - len(left),
        there=len(left) - len(objections),
        refused=sorted(refused + objections, key=lambda refusal: refusal.line),
    )


def _add(newcomers: Sequence[_Newcomer]) -> list[_Newcomer]:
    """Add those whose email and username nobody has; return the others."""
    rows = orjson.dumps(list(_rows(newcomers))).decode()
    result = db.session.execute(_insert(), {"batch": rows})
    added = {tuple(row) for row in result}
    left = []
    for newcomer in newcomers:
        names = newcomer.user.email, newcomer.key
        if names in added:
            added.remove(names)  # so that another with both is not taken for them
        else:
            left.append(newcomer)
    return left


def _rows(newcomers: Sequence[_Newcomer]) -> Iterator[dict[str, Any]]:
    """Yield the columns of each, in JSON as the database would have them."""
    dialect = db.engine.dialect
    # SQLite keeps moments as text of a form of its own.
    moment: Any = _users.c.created_at.type.dialect_impl(dialect).bind_processor(dialect)
    now = clock.utcnow()
    for line, user, key in newcomers:
        yield {
            "line": line,
            "username": user.username,
            "username_key": key,
            "email": user.email,
            "password": user.password_hash,
            "active": user.active,
            "admin": user.admin,
            "created_at": moment(user.created_at or now),
        }


def _insert() -> Insert:
    """Return the statement that adds the rows of the JSON array `batch`, in their order.

    Whoever is there is left out before ON CONFLICT does it, which uses up an id each time.
    """
    batch = _unpacked()
    there = select(_users.c.id).where(_users.c.email == batch.c.email).exists()
    new = select(*(batch.c[each.name] for each in _COLUMNS)).where(~there).order_by(batch.c.line)
    return (
        database.insert(_users)
        .from_select(_COLUMNS, new)
        .on_conflict_do_nothing()
        .returning(_users.c.email, _users.c.username_key)
    )


def _unpacked() -> FromClause:
    """Return the JSON array `batch` as a table: one parameter, however many rows there are."""
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


def _compare(left: Sequence[_Newcomer]) -> Iterator[Refusal]:
    """Yield what speaks against each who was not added: nothing, when they are there already."""
    if not left:
        return
    rows = [{"email": user.email, "username_key": key} for _, user, key in left]
    stored = db.session.execute(_select_same(), {"batch": orjson.dumps(rows).decode()}).all()
    by_email = {row.email: row for row in stored}
    taken = {row.username_key for row in stored}
    for line, user, key in left:
        same = by_email.get(user.email)
        if same and same.username_key == key:
            yield Refusal(line, _differences(user, same))
        else:
            names = {"username": key in taken, "email": bool(same)}
            errors = {name: "is taken" for name, is_taken in names.items() if is_taken}
            # Nobody has either where who had it was deleted a moment ago.
            yield Refusal(line, errors or {"it": "could not be added; try it again"})


def _select_same() -> CompoundSelect[Any]:
    """Return a query for those who have the email or the username of a row of `batch`.

    Each is looked up: asked for thousands of emails, PostgreSQL would rather read the whole table.
    """
    batch = _unpacked()
    return union_all(
        *(
            select(*_COLUMNS).join_from(batch, _users, _users.c[name] == batch.c[name])
            for name in ("email", "username_key")
        )
    )


def _differences(user: ImportedUser, stored: Row[Any]) -> dict[str, str]:
    """Return as a refusal which fields that the file has are others than those of a user.

    A hash from elsewhere is replaced when its user logs in, which makes them nobody else.
    """
    renewed = passwords.is_foreign(user.password_hash) > passwords.is_foreign(stored.password)
    same = {
        "username": user.username == stored.username,
        "password_hash": user.password_hash == stored.password or renewed,
        "active": user.active == stored.active,
        "admin": user.admin == stored.admin,
        "created_at": user.created_at == stored.created_at,
    }
    others = [name for name in same if name in user.model_fields_set and not same[name]]
    return {"it": f"is there already, with another {', '.join(others)}"} if others else {}


def give_out() -> Iterator[dict[str, Any]]:
    """Yield every user as `records.write` takes them, in the order in which they came."""
    for user in database.stream(_EXPORTED):
        yield {
            "username": user.username,
            "email": user.email,
            "password_hash": passwords.export_hash(user.password),
            "active": user.active,
            "admin": user.admin,
            "created_at": user.created_at.isoformat().replace("+00:00", "Z"),
        }
