"""Administration of accounts: change, deactivate, activate or delete one.

Users do so with their own account, and admins with every account. For their own account both send
their password; an admin needs none for another account. Callers with a second factor send a code,
unless their session has given one just now.
Functions here write and may flush. The caller commits; a refusal commits its own event.
"""

from collections.abc import Container, Mapping
from typing import Any, NamedTuple, NoReturn, cast

from sqlalchemy import Row, Select, select, update
from sqlalchemy.exc import IntegrityError

from project import errors
from project.accounts import (
    audit,
    confirmation,
    directory,
    invitations,
    mails,
    rate_limits,
    registration,
    second_factor,
    sessions,
    verification,
)
from project.accounts.confirmation import Confirmation
from project.extensions import db
from project.lib import database
from project.mail import outbox
from project.models import username_key, users_table

PRIVILEGES = {"active", "admin", "roles"}  # only an admin changes these
_CONFIRMATION_FIELD = "current_password"

_users = users_table.c
_RETURNED = [column for column in _users if column.name not in {"username_key", "password"}]
_WITH_PASSWORD: Select[Any] = select(*_RETURNED, _users.password)
_ACTIVE_ADMINS = select(_users.id).where(_users.active, _users.admin)


class _LockedAccount(NamedTuple):
    """An account that no other transaction changes until this one is over."""

    user: Row[Any]
    is_last_admin: bool
    confirmation: Confirmation

    def refuse(self, error: errors.ServiceError, why: str) -> NoReturn:
        """Refuse the act, for which the password and the code, if needed, were right."""
        self.confirmation.refuse(error, why)


class Changed(NamedTuple):
    """The outcome of a change."""

    user: Row[Any]
    email_unconfirmed: bool  # whether the new email replaces the old one when the user confirms it


def change(
    user_id: int,
    changes: Mapping[str, Any],
    caller: Row[Any],
    origin: audit.Origin,
    *,
    password: str | None,
    code: str | None = None,
    versions: Container[str] | None = None,
    confirm_email: bool = False,
) -> Changed:
    """Change the username, email, `active`, `admin` or roles of a user.

    `caller` is an active admin or that user, as `sessions.identify` returned them. A change of
    `active` ends the user's sessions; other changes end none, because tokens name neither the
    username nor the email. With `confirm_email`, a new email is not stored, but gets a link to
    confirm it. Raise PermissionDenied for a privilege that the caller may not change;
    InvalidPayload or EmailExists for a name that is taken; PreconditionFailed if `versions` are
    given and the user has none of them (`directory.version`); LastAdmin; MailNotConfigured; and as
    `_lock_account`.
    """
    refused = audit.Kind.USER_CHANGE_REFUSED
    if confirm_email and "email" in changes:
        mails.check_configured()
    if not caller.admin:
        if PRIVILEGES & changes.keys():
            raise errors.PermissionDenied
        second_factor.check_step_up(caller, code)
        if password is not None:
            # Like a registration, a change of a name can reveal who has an account.
            rate_limits.limits().registration(origin.ip)
    unconfirmed = errors.InvalidPayload(errors={_CONFIRMATION_FIELD: "is required"})
    account = _lock_account(user_id, caller, origin, refused, password, code, unconfirmed)
    before = account.user
    if versions is not None and not any(
        directory.version(before, full=full) in versions for full in (False, True)
    ):
        account.refuse(errors.PreconditionFailed(), "precondition_failed")
    different = {name: value for name, value in changes.items() if getattr(before, name) != value}
    if account.is_last_admin and {"active", "admin"} & different.keys():
        account.refuse(errors.LastAdmin(), "last_admin")
    to_confirm = cast(str | None, different.pop("email", None)) if confirm_email else None
    if to_confirm:
        try:
            rate_limits.limits().mail_within(mails.Kind.EMAIL, to_confirm, origin.ip)
        except errors.TooManyAttempts as error:
            account.refuse(error, "too_many_attempts")
    try:
        # Admins vouch for the email that they give to another user.
        after, ended = _update(user_id, different, email_verified=user_id != caller.id)
    except IntegrityError as error:
        username, email = (cast(str | None, different.get(name)) for name in ("username", "email"))
        taken = registration.taken_names(error, username, email, but=user_id)
        refusal = registration.conflict(taken, errors.InvalidPayload)
        account.refuse(refusal, f"{next(iter(taken))}_taken")
    _record(different, ended, account.confirmation.about)
    account.confirmation.succeed()
    if to_confirm:
        verification.request_change(before, to_confirm, origin)
    if after.email != before.email:
        rate_limits.rename(before.email, after.email)
        mails.notify(mails.Kind.EMAIL_CHANGED, before.email, origin, user_id=user_id)
    if before.active and not after.active:
        mails.notify(mails.Kind.ACCOUNT_DEACTIVATED, after.email, origin, user_id=user_id)
    return Changed(after, bool(to_confirm))


def delete(
    user_id: int,
    caller: Row[Any],
    origin: audit.Origin,
    *,
    password: str | None,
    code: str | None = None,
) -> None:
    """Delete a user with their sessions and counts; their events stay and become anonymous.

    `caller` is as for `change`. Raise LastAdmin; OwnAccount when `password` is None for the
    caller's own account; and as `_lock_account`.
    """
    refused = audit.Kind.DELETION_REFUSED
    own = errors.OwnAccount()
    account = _lock_account(user_id, caller, origin, refused, password, code, own)
    if account.is_last_admin:
        account.refuse(errors.LastAdmin(), "last_admin")
    # The sessions first: a refresh locks its session before it records an event for the user.
    sessions.end_all(user_id)
    audit.anonymize(user_id)
    account.confirmation.succeed()
    rate_limits.forget(account.user.email)
    outbox.forget(account.user.email)
    invitations.forget(account.user.email)
    database.write(users_table.delete().where(_users.id == user_id))
    if user_id == caller.id:
        audit.record(audit.Kind.ACCOUNT_DELETED, audit.ANONYMOUS, user_id=None)
    else:
        audit.record(audit.Kind.USER_DELETED, origin, user_id=None)
        email = account.user.email
        mails.notify(mails.Kind.ACCOUNT_DELETED, email, origin, user_id=user_id)


def reset_totp(user_id: int, caller: Row[Any], origin: audit.Origin, *, code: str | None) -> None:
    """Remove the second factor of a user who has lost it, and end their sessions.

    `caller` is an active admin, as `sessions.identify` returned them. Raise TotpNotFound;
    OwnTotp for their own account, where a password is needed; and as `_lock_account`.
    """
    refused = audit.Kind.TOTP_REFUSED
    account = _lock_account(user_id, caller, origin, refused, None, code, errors.OwnTotp())
    if not account.user.mfa_enabled:
        account.refuse(errors.TotpNotFound(), "totp_not_found")
    _remove_totp(user_id, account.user.email, origin, "admin")
    account.confirmation.succeed()


def reset_totp_of(email: str, origin: audit.Origin) -> int:
    """Remove the second factor of a user as the operator; return how many sessions that ended.

    Raise UserNotFound; TotpNotFound.
    """
    user_id = directory.find_by_email(email)
    sessions.lock_user(user_id)
    if not second_factor.is_enabled(user_id):
        raise errors.TotpNotFound
    return _remove_totp(user_id, email, origin, "operator")


def _remove_totp(user_id: int, email: str, origin: audit.Origin, why: str) -> int:
    """Remove the second factor of a locked user; return how many sessions that ended.

    The sessions end because the device that was lost may have one. Pauses end, because the user
    has tried codes.
    """
    ended = sessions.end_all(user_id)
    second_factor.remove(user_id)
    audit.record(audit.Kind.TOTP_RESET, origin, user_id=user_id, why=why, sessions=ended)
    rate_limits.lift_pause(email)
    rate_limits.lift_pause_of_codes(email)
    mails.notify(mails.Kind.TOTP_DISABLED, email, origin, user_id=user_id)
    return ended


def _lock_account(
    user_id: int,
    caller: Row[Any],
    origin: audit.Origin,
    refused: audit.Kind,
    password: str | None,
    code: str | None,
    without_password: errors.ServiceError,
) -> _LockedAccount:
    """Return an account that the caller may change, in a transaction that begins here.

    Raise UserNotFound; PermissionDenied, TokenOfInactive or SessionEnded when the caller has lost
    their rights in the meantime. For their own account raise `without_password` if there is none.
    Also raise as `Confirmation`, which confirms the act and records a refusal as `refused`.
    """
    own = user_id == caller.id
    if own and password is None:
        raise without_password
    if not own:
        directory.find(user_id)  # before a code is counted
    confirmed = Confirmation(
        caller,
        origin,
        refused,
        password=password if own else None,
        code=code,
        user_id=None if own else user_id,
    )

    def verify_and_lock() -> _LockedAccount:
        stored = confirmed.verify()
        user, is_last_admin = _lock_rows(user_id, caller)
        if own and user.password != stored:
            raise sessions.AccountChanged
        confirmed.use_code()
        return _LockedAccount(user, is_last_admin, confirmed)

    return confirmation.retry_if_changed(verify_and_lock)


def _lock_rows(user_id: int, caller: Row[Any]) -> tuple[Row[Any], bool]:
    """Lock a user; return them, and whether they are the only active admin.

    When the caller is an admin, all admins are locked too, always in the order of their ids. Of
    admins who demote each other at once, one therefore comes first and the others see the result.
    """
    ids = {user_id, caller.id}
    if caller.admin:
        ids.update(db.session.scalars(_ACTIVE_ADMINS))
    # FOR NO KEY UPDATE: an event that is recorded for one of them does not wait (`audit.record`).
    locking = _WITH_PASSWORD.where(_users.id.in_(ids)).order_by(_users.id)
    rows = db.session.execute(locking.with_for_update(key_share=True))
    locked = {row.id: row for row in rows}
    now = locked.get(caller.id)
    if now is None or not now.active:
        raise errors.TokenOfInactive
    if caller.admin and not now.admin:
        raise errors.PermissionDenied
    if user_id not in locked:
        raise errors.UserNotFound
    sessions.lock(caller.id, caller.session_id)
    admins = {row.id for row in locked.values() if row.active and row.admin}
    return locked[user_id], admins == {user_id}


def _update(
    user_id: int, different: Mapping[str, Any], *, email_verified: bool
) -> tuple[Row[Any], int]:
    """Store the changes of a user; return the user, and how many sessions that ended.

    `email_verified` says whether a new email counts as confirmed. Raise IntegrityError, and leave
    the user and the sessions as they were, if a name is taken.
    """
    values: dict[str, Any] = dict(different)
    if "username" in values:
        values["username_key"] = username_key(values["username"])
    if "email" in values:
        values["email_verified"] = email_verified
    this_user = _users.id == user_id
    with db.session.begin_nested():
        # Before the UPDATE, which makes events for the user wait when it changes a name: a refresh
        # that waits with its event has locked its session.
        ended = sessions.end_all(user_id) if "active" in different else 0
        changed = update(users_table).where(this_user).values(values).returning(*_RETURNED)
        unchanged = select(*_RETURNED).where(this_user)
        return db.session.execute(changed if values else unchanged).one(), ended


def _record(different: Mapping[str, Any], ended: int, about: Mapping[str, Any]) -> None:
    """Record the changes: one event for the names, and one for each privilege."""
    kinds = audit.Kind
    if fields := sorted(different.keys() - PRIVILEGES):
        audit.record(kinds.USER_CHANGED, **about, fields=",".join(fields))
    if "active" in different:
        kind = kinds.USER_ACTIVATED if different["active"] else kinds.USER_DEACTIVATED
        audit.record(kind, **about, sessions=ended)
    if "admin" in different:
        audit.record(kinds.ADMIN_GRANTED if different["admin"] else kinds.ADMIN_REVOKED, **about)
    if "roles" in different:
        audit.record(kinds.ROLES_CHANGED, **about, roles=" ".join(different["roles"]))


def set_active(email: str, active: bool, origin: audit.Origin) -> None:
    """Deactivate or activate a user; raise UserNotFound.

    Both end all sessions of the user: no earlier session becomes valid again.
    """
    user_id = directory.find_by_email(email)
    ended = sessions.end_all(user_id)
    database.write(update(users_table).where(_users.id == user_id).values(active=active))
    kind = audit.Kind.USER_ACTIVATED if active else audit.Kind.USER_DEACTIVATED
    audit.record(kind, origin, user_id=user_id, sessions=ended)
    if not active:
        mails.notify(mails.Kind.ACCOUNT_DEACTIVATED, email, origin, user_id=user_id)


def end_sessions(email: str, origin: audit.Origin) -> int:
    """End all sessions of a user, and return how many; raise UserNotFound."""
    user_id = directory.find_by_email(email)
    ended = sessions.end_all(user_id)
    audit.record(audit.Kind.SESSIONS_ENDED, origin, user_id=user_id, sessions=ended)
    return ended
