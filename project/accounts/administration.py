"""Care for accounts: change one, or delete it, by its user or by an admin.

Whoever touches their own account gives their password, an admin too; for others' they need none.
Functions here write and may flush; the caller commits, but for what goes with a refusal.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, NoReturn, cast

from sqlalchemy import Row, Select, Table, select, update
from sqlalchemy.exc import IntegrityError

from project import accounts, audit, database, ratelimit, sessions
from project.api.models import User, username_key
from project.errors import (
    EmailExists,
    InvalidPayload,
    LastAdmin,
    PermissionDenied,
    ServiceError,
    TokenOfInactive,
    UserNotFound,
)
from project.extensions import db

PRIVILEGES = {"active", "admin"}  # what only an admin changes

_CONFIRMATION = "current_password"  # the field

_users = cast(Table, User.__table__)
_SHOWN = [column for column in _users.c if column.name not in {"username_key", "password"}]
_ALL: Select[Any] = select(*_SHOWN, _users.c.password)
_ADMINS = select(_users.c.id).where(_users.c.active, _users.c.admin)
_TAKEN: dict[str, type[ServiceError]] = {"username": InvalidPayload, "email": EmailExists}


class _Account(NamedTuple):
    """An account that nobody else changes before this transaction is over."""

    user: Row[Any]
    is_last_admin: bool
    about: dict[str, Any]  # what every event of this act has
    attempt: ratelimit.Attempt
    refused: audit.Kind  # what a refusal is called

    def refuse(self, error: ServiceError, why: str) -> NoReturn:
        """Refuse what somebody would do who gave the right password, or needed none."""
        self.attempt.succeed()
        audit.refuse(error, self.refused, **self.about, why=why)


def change(
    user_id: int,
    changes: Mapping[str, str | bool],
    caller: Row[Any],
    origin: audit.Origin,
    *,
    password: str | None,
) -> Row[Any]:
    """Change the username, email, `active` or `admin` of a user, and return them as they are now.

    `caller` is an active admin or that user, as `sessions.identify` returned them. Sessions are
    ended when `active` changes, and else live on: their tokens name neither username nor email.
    Raises PermissionDenied for a privilege that is not the caller's to change; InvalidPayload or
    EmailExists for what is taken; LastAdmin; and what `_take` raises.
    """
    refused = audit.Kind.USER_CHANGE_REFUSED
    if not caller.admin:
        if PRIVILEGES & changes.keys():
            raise PermissionDenied
        # Like a registration this can tell who has an account.
        ratelimit.limits().registration(origin.ip)
    account = _take(user_id, caller, origin, password, refused)
    before = account.user
    different = {name: value for name, value in changes.items() if getattr(before, name) != value}
    if account.is_last_admin and PRIVILEGES & different.keys():
        account.refuse(LastAdmin(), "last_admin")
    try:
        after = _update(user_id, different)
    except IntegrityError as error:
        field = accounts.taken(error)
        account.refuse(_TAKEN[field](errors={field: "is taken"}), f"{field}_taken")
    _record(user_id, different, account.about)
    account.attempt.succeed()
    if after.email != before.email:
        ratelimit.rename(before.email, after.email)
    return after


def delete(user_id: int, caller: Row[Any], origin: audit.Origin, *, password: str | None) -> None:
    """Delete a user, their sessions, and all that names them; events stay without the person.

    `caller` is as for `change`. Raises LastAdmin, and what `_take` raises.
    """
    account = _take(user_id, caller, origin, password, audit.Kind.DELETION_REFUSED)
    if account.is_last_admin:
        account.refuse(LastAdmin(), "last_admin")
    # First the sessions: whoever is refreshing one has recorded it then.
    sessions.end_all(user_id)
    audit.erase(user_id)
    account.attempt.succeed()
    ratelimit.forget(account.user.email)
    database.write(_users.delete().where(_users.c.id == user_id))
    if user_id == caller.id:
        audit.record(audit.Kind.ACCOUNT_DELETED, audit.NOWHERE, user_id=None)
    else:
        audit.record(audit.Kind.USER_DELETED, origin, user_id=None)


def _take(
    user_id: int, caller: Row[Any], origin: audit.Origin, password: str | None, refused: audit.Kind
) -> _Account:
    """Return an account for the caller to change, in a transaction that begins here.

    Raises UserNotFound; PermissionDenied, TokenOfInactive or SessionEnded when the caller lost
    their rights a moment ago; for their own account InvalidPayload without a password,
    WrongPassword, which counts as a failed login, and TooManyAttempts.
    """
    about = _about(user_id, caller, origin)
    if user_id != caller.id:
        attempt = ratelimit.Off().login(caller.email, origin.ip)
        return _Account(*_lock(user_id, caller), about, attempt, refused)
    if password is None:
        raise InvalidPayload(errors={_CONFIRMATION: "is required"})
    attempt = ratelimit.limits().login(caller.email, origin.ip)
    refuse = partial(audit.refuse, kind=refused, **about)
    verified = accounts.confirm(user_id, password, attempt, refuse)
    while True:
        stored = next(verified)
        user, is_last_admin = _lock(user_id, caller)
        if user.password == stored:
            return _Account(user, is_last_admin, about, attempt, refused)


def _about(user_id: int, caller: Row[Any], origin: audit.Origin) -> dict[str, Any]:
    """Return what every event has that tells of what the caller does to this user."""
    own = user_id == caller.id
    return {
        "origin": origin,
        "user_id": user_id,
        "session_id": caller.session_id if own else None,
    }


def _lock(user_id: int, caller: Row[Any]) -> tuple[Row[Any], bool]:
    """Lock a user, and return them and whether they are the only active admin.

    When the caller is an admin all admins are locked too, always in the order of the ids: of
    those who would demote each other one comes first, and the others see what they did.
    """
    ids = {user_id, caller.id}
    if caller.admin:
        ids.update(db.session.scalars(_ADMINS))
    locking = _ALL.where(_users.c.id.in_(ids)).order_by(_users.c.id).with_for_update()
    locked = {row.id: row for row in db.session.execute(locking)}
    now = locked.get(caller.id)
    if now is None or not now.active:
        raise TokenOfInactive
    if caller.admin and not now.admin:
        raise PermissionDenied
    if user_id not in locked:
        raise UserNotFound
    sessions.hold(caller.id, caller.session_id)
    admins = {row.id for row in locked.values() if row.active and row.admin}
    return locked[user_id], admins == {user_id}


def _update(user_id: int, different: Mapping[str, str | bool]) -> Row[Any]:
    """Store what is different about a user, and return them; raises IntegrityError."""
    if not different:
        return db.session.execute(select(*_SHOWN).where(_users.c.id == user_id)).one()
    values: dict[str, Any] = dict(different)
    if "username" in values:
        values["username_key"] = username_key(values["username"])
    statement = update(_users).where(_users.c.id == user_id).values(values).returning(*_SHOWN)
    with db.session.begin_nested():
        return db.session.execute(statement).one()


def _record(user_id: int, different: Mapping[str, str | bool], about: Mapping[str, Any]) -> None:
    """Record what was changed, each privilege by itself, and end the sessions that it ends."""
    kinds = audit.Kind
    if fields := sorted(different.keys() - PRIVILEGES):
        audit.record(kinds.USER_CHANGED, **about, fields=",".join(fields))
    if "active" in different:
        kind = kinds.USER_ACTIVATED if different["active"] else kinds.USER_DEACTIVATED
        audit.record(kind, **about, sessions=sessions.end_all(user_id))
    if "admin" in different:
        audit.record(kinds.ADMIN_GRANTED if different["admin"] else kinds.ADMIN_REVOKED, **about)
