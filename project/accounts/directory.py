"""The directory of users: find one, list them, search them."""

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import (
    BindParameter,
    Row,
    Select,
    SQLColumnExpression,
    bindparam,
    false,
    select,
    true,
    tuple_,
    union_all,
)

from project.accounts import audit
from project.errors import UserNotFound
from project.lib import database
from project.models import username_key, users_table
from project.tokens import keys

_users = users_table.c
_BY_EMAIL = select(_users.id).where(_users.email == bindparam("email"))
# Each statement twice: by whether it returns `active`, `admin` and `roles` too.
_PUBLIC: list[Any] = [_users.id, _users.username, _users.email, _users.created_at]
_FULL = [*_PUBLIC, _users.active, _users.admin, _users.roles]
_RETURNED: dict[bool, Select[Any]] = {False: select(*_PUBLIC), True: select(*_FULL)}
_BY_ID = {full: query.where(_users.id == bindparam("user_id")) for full, query in _RETURNED.items()}
_IDS: BindParameter[Any] = bindparam("user_ids", expanding=True)
_BY_IDS = {full: query.where(_users.id.in_(_IDS)) for full, query in _RETURNED.items()}
_NEWEST = {
    full: query.order_by(_users.created_at.desc(), _users.id.desc()).limit(bindparam("limit"))
    for full, query in _RETURNED.items()
}
_AFTER = tuple_(_users.created_at, _users.id) < tuple_(
    bindparam("created_at", type_=_users.created_at.type), bindparam("user_id")
)
_NEWEST_AFTER = {full: newest.where(_AFTER) for full, newest in _NEWEST.items()}

# A position in the list of all names: a name, and whether it is an email. Both databases and
# Python order names by code points.
Position = tuple[str, bool]


def _names(name: SQLColumnExpression[str], is_email: SQLColumnExpression[bool]) -> Select[Any]:
    entries = _RETURNED[True].add_columns(
        _users.username_key, name.label("name"), is_email.label("is_email")
    )
    start = name >= bindparam("start")
    return select(entries.where(start).order_by(name).limit(bindparam("limit")).subquery())


_NAMES = (
    union_all(_names(_users.username_key, false()), _names(_users.email, true()))
    .order_by("name", "is_email")
    .limit(bindparam("limit"))
)


def find_by_email(email: str) -> int:
    """Return the id of the user with this email; raise UserNotFound."""
    user = database.fetch_one(_BY_EMAIL, email=email)
    if user is None:
        raise UserNotFound
    return int(user.id)


def find(user_id: int, *, full: bool = False) -> Row[Any]:
    """Return id, username, email and created_at of a user; raise UserNotFound.

    With `full`, return `active`, `admin` and `roles` too.
    """
    user = database.fetch_one(_BY_ID[full], user_id=user_id)
    if user is None:
        raise UserNotFound
    return user


def find_all(user_ids: Sequence[int], *, full: bool = False) -> Sequence[Row[Any]]:
    """Return the users with these ids as `find` does, in this order; unknown ids are left out."""
    rows = database.fetch_all(_BY_IDS[full], user_ids=list(user_ids))
    users = {row.id: row for row in rows}
    return [users[user_id] for user_id in dict.fromkeys(user_ids) if user_id in users]


def members(user: Row[Any], *, full: bool) -> dict[str, Any]:
    """Return what a client sees of a user, as `find` returns them."""
    shown = {column.name: getattr(user, column.name) for column in (_FULL if full else _PUBLIC)}
    if full:
        del shown["roles"]
        shown |= shown_roles(user)
    return shown


def version(user: Row[Any], *, full: bool) -> str:
    """Return a hash that changes with every field that `find` returns of a user, and no other."""
    values = [str(getattr(user, column.name)) for column in _PUBLIC]
    if full:
        values += [str(user.active), str(user.admin), *user.roles]
    return hashlib.sha256(orjson.dumps(values)).hexdigest()[:32]


def newest(
    limit: int, after: tuple[datetime, int] | None = None, *, full: bool = False
) -> Sequence[Row[Any]]:
    """Return at most `limit` users as `find` does, newest first.

    `after` is the created_at and id of a user: the list continues after that user. The cost is
    that of `limit` rows of an index, however many users there are.
    """
    if after is None:
        return database.fetch_all(_NEWEST[full], limit=limit)
    created_at, user_id = after
    return database.fetch_all(
        _NEWEST_AFTER[full], limit=limit, created_at=created_at, user_id=user_id
    )


def search(
    query: str, limit: int, after: Position | None, origin: audit.Origin, *, full: bool = False
) -> tuple[Sequence[dict[str, Any]], Position | None]:
    """Return at most `limit` users whose username or email begins with `query`, as `find` does.

    Also return the position after which the next page begins, or None at the end. Case is ignored.
    If the caller is known, the search is recorded in the audit log.

    The list of names has two entries for each user, the username and the email. A user who matches
    by both is returned at the first of the two. For example, these users and the query "ad",

        id 1: username "ada",  email "ada@example.com"
        id 2: username "bob",  email "adams@example.com"

    give the entries "ada" (1), "ada@example.com" (1) and "adams@example.com" (2). The first page
    of one user is user 1, and the next one begins after ("ada", False). There the entry
    "ada@example.com" is left out, because it is not the first of user 1, and user 2 follows.

    A page reads 2 * `limit` + 3 entries at most: each user can have two entries, up to two
    entries at the beginning are not after `after`, and one more shows that the list goes on. The
    page may have fewer than `limit` users and still be followed by another one.
    """
    prefix = username_key(query)
    start = after or ("", False)
    size = 2 * limit + 3
    entries = database.fetch_all(_NAMES, start=max(start[0], prefix), limit=size)
    found = [
        entry
        for entry in entries
        if _position(entry) == _first_match(entry, prefix) and _position(entry) > start
    ]
    page, rest = found[:limit], found[limit:]
    following = None
    if rest:
        following = _position(page[-1])
    elif len(entries) == size and entries[-1].name.startswith(prefix):
        following = _position(entries[-1])
    if origin.actor_id is not None:
        audit.record(audit.Kind.USERS_SEARCHED, origin, user_id=None, users=len(page))
    return [members(entry, full=full) for entry in page], following


def _position(entry: Row[Any]) -> Position:
    return entry.name, entry.is_email


def _first_match(entry: Row[Any], prefix: str) -> Position | None:
    """Return the first position of the entry's user whose name begins with `prefix`."""
    positions = (entry.username_key, False), (entry.email, True)
    return min((each for each in positions if each[0].startswith(prefix)), default=None)


def shown_roles(user: Any) -> dict[str, Any]:
    """Return the member `roles`, if ISSUER is set or the user has roles; otherwise nothing."""
    return {"roles": roles_of(user)} if keys.issuer() or user.roles else {}


def roles_of(user: Any) -> list[str]:
    """Return the roles of a user, of whom `user` has the columns as attributes.

    Admins have the role `admin` before all others.
    """
    return [*(["admin"] if user.admin else []), *user.roles]
