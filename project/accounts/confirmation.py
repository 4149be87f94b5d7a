"""Confirmation: callers prove who they are before an act on an account.

They send their password for an act on their own account, and a code if they have a second factor.
Verifying a password takes long and happens in no transaction. The account may change meanwhile, so
the transaction of the act checks that the same hash is still stored, and then uses the code up.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn, TypeVar

from sqlalchemy import Row, bindparam, select

from project import errors
from project.accounts import audit, mails, rate_limits, second_factor, sessions
from project.accounts.sessions import AccountChanged
from project.extensions import db
from project.lib import database, hashing
from project.models import users_table

T = TypeVar("T")

MAX_TRIES = 3  # of an act that verifies a password, while the account changes meanwhile

_users = users_table.c
_PASSWORD = select(_users.password).where(_users.id == bindparam("user_id"), _users.active)
_LOCKED_PASSWORD = _PASSWORD.with_for_update(key_share=True)  # as `sessions.lock_user`


def retry_if_changed(act: Callable[[], T]) -> T:
    """Return what `act` returns; roll back and call it again when it raises AccountChanged.

    An act verifies a password, which takes long, in no transaction. Then it begins one, in which
    it raises AccountChanged when the stored hash is another by now. Raise Busy after MAX_TRIES.
    """
    for _ in range(MAX_TRIES):
        try:
            return act()
        except AccountChanged:
            db.session.rollback()
    raise errors.Busy(retry_after=1)


class Confirmation:
    """The password and the code with which a caller confirms an act."""

    def __init__(
        self,
        caller: Row[Any],
        origin: audit.Origin,
        refused: audit.Kind,
        *,
        password: str | None,
        code: str | None,
        user_id: int | None = None,
    ) -> None:
        """Take what `caller` has sent, and count the password.

        `caller` is as `sessions.identify` returned them, and `refused` the kind of event that a
        refusal is. `user_id` is the account if it is another one than the caller's. Raise
        StepUpRequired without a code where one is needed; TooManyAttempts.
        """
        second_factor.check_step_up(caller, code)
        self._caller = caller
        self._origin = origin
        self._refused = refused
        self._password = password
        self._code = code if caller.mfa_enabled else None
        own = user_id is None
        # Fields of every event of the act.
        self.about: dict[str, Any] = {
            "origin": origin,
            "user_id": caller.id if own else user_id,
            "session_id": caller.session_id if own else None,
        }
        self._login = rate_limits.Attempt()
        if password is not None:
            self._login = rate_limits.limits().login(caller.email, origin.ip, own=True)
        self._attempt = self._login  # that of the code, as soon as it is counted
        self._count_code = cache(
            lambda: rate_limits.limits().code(caller.email, origin.ip, self._login)
        )

    def verify(self) -> str | None:
        """Verify the password, if there is one, and return the stored hash; count the code.

        No transaction may be open. Raise TokenOfInactive when the caller is deleted or
        deactivated; WrongPassword, which stays counted; TooManyAttempts.
        """
        stored_hash = None
        if self._password is not None:
            stored = database.fetch_one(_PASSWORD, user_id=self._caller.id)
            if stored is None:
                raise errors.TokenOfInactive
            if not hashing.verify(stored.password, self._password):
                pause = self._login.pause
                self._refuse(errors.WrongPassword(), why="wrong_password", pause=pause)
            stored_hash = str(stored.password)
        if self._code is not None:
            # Not earlier: a client that does not know the password must not use up the attempts.
            self._attempt = self._count_code()
        return stored_hash

    def lock(self, stored_hash: str | None) -> None:
        """Begin a transaction, lock the caller's own account and session, and use the code up.

        Raise AccountChanged when `stored_hash`, from `verify`, is no longer stored; SessionEnded;
        and as `use_code`.
        """
        stored = db.session.execute(_LOCKED_PASSWORD, {"user_id": self._caller.id}).one_or_none()
        if stored is None or stored.password != stored_hash:
            raise AccountChanged
        sessions.lock(self._caller.id, self._caller.session_id)
        self.use_code()

    def use_code(self) -> None:
        """Use the code up, if there is one; raise WrongCode, which stays counted.

        The caller and their session are locked, and nothing has been written yet.
        """
        if self._code is None:
            return
        method = use_code(
            self._caller.id,
            self._caller.email,
            self._code,
            self._attempt,
            self._origin,
            self._refuse,
        )
        sessions.step_up(self._caller, method, self._origin)

    def succeed(self) -> None:
        """Give back what was counted. Call it last: every transaction locks counts at last."""
        self._attempt.succeed()

    def refuse(self, error: errors.ServiceError, why: str) -> NoReturn:
        """Refuse the act for another reason than the password or the code, which were right."""
        self.succeed()
        self._refuse(error, why=why)

    def _refuse(self, error: errors.ServiceError, **details: Any) -> NoReturn:
        audit.refuse(error, self._refused, **self.about, **details)


def use_code(
    user_id: int,
    email: str,
    code: str,
    attempt: rate_limits.Attempt,
    origin: audit.Origin,
    refuse: Callable[..., NoReturn],
) -> second_factor.Method:
    """Use up the code of a user who is locked, and return what kind it is.

    `attempt` is that of the code. Call `refuse` with WrongCode and the details of the event if it
    is wrong. The user is told when wrong codes begin a pause, because another person may know the
    password or have a session; and when a recovery code was used.
    """
    try:
        method = second_factor.use(user_id, code)
    except errors.MfaNotConfigured:
        # Recovery codes still work, so their attempts must not be used up.
        attempt.withdraw()
        db.session.commit()
        raise
    if method is None:
        if attempt.pause:
            mails.notify(mails.Kind.WRONG_CODES, email, origin, user_id=user_id)
        refuse(errors.WrongCode(), why="wrong_code", pause=attempt.pause)
    if method is second_factor.Method.RECOVERY_CODE:
        audit.record(audit.Kind.RECOVERY_CODE_USED, origin, user_id=user_id)
        mails.notify(mails.Kind.RECOVERY_CODE_USED, email, origin, user_id=user_id)
    return method
