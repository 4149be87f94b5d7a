"""Rate limits: failed logins per account and per address, wrong codes, registrations per address.

An attempt is counted before it is made, and the count is given back when the attempt succeeds. Of
any number of concurrent guesses no more than the limit are therefore checked. The counts are rows:
all processes and hosts share them, and they survive a restart.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Self

from flask import Flask, current_app, g
from sqlalchemy import (
    BindParameter,
    Executable,
    Row,
    and_,
    bindparam,
    case,
    delete,
    literal,
    select,
    true,
    update,
)

from project import clock
from project.config import DAY
from project.errors import TooManyAttempts
from project.extensions import db
from project.lib import addresses, database
from project.lib.app_state import AppState
from project.models import known_addresses_table, throttles_table

HOUR = 3_600  # seconds
MAILS_PER_EMAIL, MAILS_PER_NETWORK = 3, 20  # an hour, requested by clients
NOTICES_PER_EMAIL = 5  # an hour, of one kind
CODES_PER_ACCOUNT = 5  # wrong ones, until the first pause
# `paused_until` of a count that is not paused. Not "now", which another server may put later.
_NOT_PAUSED = datetime(1970, 1, 1, tzinfo=UTC)

_throttles = throttles_table.c
_known = known_addresses_table.c


def _time(name: str) -> BindParameter[datetime]:
    return bindparam(name, type_=_throttles.resets_at.type)


_PAUSED = select(_throttles.paused_until).where(
    _throttles.key == bindparam("key"), _throttles.paused_until > _time("now")
)
_TAKE_OFF = (
    update(throttles_table)
    .where(_throttles.key == bindparam("counted"), _throttles.attempts > 0)
    .values(attempts=_throttles.attempts - 1, paused_until=_NOT_PAUSED)
)
_DELETE = (
    delete(throttles_table)
    .where(_throttles.key == bindparam("counted"))
    .execution_options(prepare=True)
)
_KNOWN = select(_known.account).where(
    _known.account == bindparam("account"),
    _known.network == bindparam("network"),
    _known.last_login_at > _time("known_since"),
)


@dataclass
class Quota:
    """What one client has used of a limit, for the RateLimit headers of the response."""

    policy: "Policy"
    attempts: int
    resets_at: datetime


class Policy(NamedTuple):
    """`limit` attempts per window: the last of them begins a pause, each later one a longer one."""

    name: str
    limit: int
    window: int  # seconds from the first attempt, after which the count starts again
    pauses: tuple[int, ...]  # seconds; the last one applies to all later attempts

    def pause(self, attempts: int) -> int:
        """Return the seconds of the pause that attempt number `attempts` begins, 0 for none."""
        if attempts < self.limit:
            return 0
        return self.pauses[min(attempts - self.limit, len(self.pauses) - 1)]

    def times(self, now: datetime) -> dict[str, datetime]:
        """Return the times of an attempt at `now`, as the parameters of `_counting`."""
        pauses = {f"pause_{n}": timedelta(seconds=each) for n, each in enumerate(self.pauses)}
        ends = pauses | {"window_end": timedelta(seconds=self.window)}
        return {"now": now} | {name: now + interval for name, interval in ends.items()}


class Attempt:
    """An attempt that is not counted."""

    pause = 0  # seconds for which further attempts are refused, unless this one succeeds
    at_unknown_address = False  # whether the user of the account is not known at the address

    def succeed(self) -> None:
        """Give back what was counted, in the transaction of `db.session`."""

    def withdraw(self) -> None:
        """Take one off each count, because the attempt could not be made."""


class NoLimits:
    """No rate limits: under test, and where the operator limits requests elsewhere."""

    def login(self, email: str, ip: str | None, *, own: bool = False) -> Attempt:
        """Count a password that a client sends for an account, which need not exist.

        If it is the caller's `own` account, the response may tell what is left of the limit.
        """
        return Attempt()

    def counted_login(self, email: str, ip: str | None) -> Attempt:
        """Return the attempt that an earlier request of the same login has counted."""
        return Attempt()

    def code(self, email: str, ip: str | None, login: Attempt) -> Attempt:
        """Count a code of an account. If it is right, the attempt `login` has succeeded too."""
        return login

    def refresh(self, ip: str | None) -> None:
        """Count a refresh token that is not valid or whose session is not live."""

    def client(self, name: str, ip: str | None) -> Attempt:
        """Count a wrong secret that was sent for a client, which need not exist."""
        return Attempt()

    def registration(self, ip: str | None) -> None:
        """Count a registration, which is never given back."""

    def mail(self, act: str, email: str, ip: str | None) -> None:
        """Count an email that a client requests for an address, which need not have an account."""

    def mail_within(self, act: str, email: str, ip: str | None) -> None:
        """Count an email in the transaction of `db.session`, for an act that has begun one."""

    def notice(self, kind: str, email: str) -> bool:
        """Count a security notice to an address; return whether it may be sent."""
        return True

    def remember(self, email: str, ip: str | None) -> None:
        """Store that the user of an account is known at an address, as after a login."""


class Limits(NoLimits):
    """Rate limits as configured; each raises TooManyAttempts when its limit is reached."""

    def __init__(
        self,
        *,
        account: Policy,
        address: Policy,
        codes: Policy,
        registrations: Policy,
        mails: Policy,
        mails_of_network: Policy,
        notices: Policy,
        known_for: timedelta,
    ) -> None:
        self._account = account
        self._address = address
        self._codes = codes
        self._registrations = registrations
        self._mails = mails
        self._mails_of_network = mails_of_network
        self._notices = notices
        self._known_for = known_for

    def login(self, email: str, ip: str | None, *, own: bool = False) -> Attempt:
        """Count by account and by address.

        At an address where the user is known, account and address have one count of their own
        instead. An attacker at another address can therefore not lock the user out.
        """
        account, network = _account(email), addresses.network(ip)
        # The count of the address is never shown: it tells whether an account is known there.
        try:
            known = self._known(account, network)
            return self._login(account, network, is_known=True).count(shown=own, known=known)
        except _UnknownAddress:
            return self._login(account, network, is_known=False).count(shown=own)

    def counted_login(self, email: str, ip: str | None) -> Attempt:
        """Return the attempt whose counts `login` has raised."""
        account, network = _account(email), addresses.network(ip)
        return _CountedLogin(self._login(account, network, self._is_known(account, network)))

    def _login(self, account: str, network: str, is_known: bool) -> "_Login":
        if is_known:
            counts = [(f"login:{account}@{network}", self._account)]
        else:
            counts = [(f"login:{network}", self._address), (f"login:{account}", self._account)]
        attempt = _Login(counts, account, network)
        attempt.at_unknown_address = not is_known and bool(self._known_for)
        return attempt

    def _is_known(self, account: str, network: str) -> bool:
        return database.fetch_one(_KNOWN, **self._known(account, network)) is not None

    def _known(self, account: str, network: str) -> dict[str, Any]:
        """Return the parameters of `_KNOWN`."""
        since = clock.utcnow() - self._known_for
        return {"account": account, "network": network, "known_since": since}

    def code(self, email: str, ip: str | None, login: Attempt) -> Attempt:
        """Count by account, apart from logins; at an address where the user is known, by both."""
        account, network = _account(email), addresses.network(ip)
        at_known = f"@{network}" if self._is_known(account, network) else ""
        return _Code([(f"code:{account}{at_known}", self._codes)], login).count()

    def refresh(self, ip: str | None) -> None:
        """Count by address, together with the logins from there."""
        _Counted([(f"login:{addresses.network(ip)}", self._address)]).count()

    def client(self, name: str, ip: str | None) -> Attempt:
        """Count by address and by client, apart from logins."""
        by_address = f"client:{addresses.network(ip)}", self._address
        return _Counted([by_address, (f"client:{_account(name)}", self._account)]).count()

    def registration(self, ip: str | None) -> None:
        """Count by address."""
        _Counted([(f"register:{addresses.network(ip)}", self._registrations)]).count(shown=True)

    def mail(self, act: str, email: str, ip: str | None) -> None:
        """Count by network and by email, separately for each act."""
        _Counted(self._mail_counts(act, email, ip)).count()

    def mail_within(self, act: str, email: str, ip: str | None) -> None:
        """Count as `mail` does."""
        _Counted(self._mail_counts(act, email, ip)).count(execute=_execute_within)

    def _mail_counts(self, act: str, email: str, ip: str | None) -> list[tuple[str, Policy]]:
        return [
            (f"mail:{act}:{addresses.network(ip)}", self._mails_of_network),
            (f"mail:{act}:{_account(email)}", self._mails),
        ]

    def notice(self, kind: str, email: str) -> bool:
        """Count by email, separately for each kind, in the transaction of `db.session`."""
        try:
            _Counted([(f"mail:{kind}:{_account(email)}", self._notices)]).count(
                execute=_execute_within
            )
        except TooManyAttempts:
            return False
        return True

    def remember(self, email: str, ip: str | None) -> None:
        """Store the address in the transaction of `db.session`."""
        _remember(_account(email), addresses.network(ip))


def quotas() -> dict[str, Quota]:
    """Return what the client has used of the limits that the current request may tell, by key."""
    shown: dict[str, Quota] = g.setdefault("quotas", {})
    return shown


@database.built_once
def _counting(policy: Policy, if_known: bool) -> Executable:
    """Return the statement that adds an attempt to a count.

    It returns the count; or no row, and changes nothing, while the count is paused. `if_known` adds
    the condition that the user is known at the address.
    """
    first = _time("pause_0") if policy.limit == 1 else literal(_NOT_PAUSED, _time("now").type)
    new = select(bindparam("key", type_=_throttles.key.type), 1, _time("window_end"), first)
    expired = _throttles.resets_at <= _time("now")
    attempts = case((expired, 1), else_=_throttles.attempts + 1)
    pauses = [
        (attempts >= policy.limit + number, _time(f"pause_{number}"))
        for number in reversed(range(len(policy.pauses)))
    ]
    return (
        database.insert(throttles_table)
        .from_select(list(_throttles), new.where(_KNOWN.exists() if if_known else true()))
        .on_conflict_do_update(
            index_elements=[_throttles.key],
            set_={
                "attempts": attempts,
                "resets_at": case((expired, _time("window_end")), else_=_throttles.resets_at),
                "paused_until": case(*pauses, else_=_throttles.paused_until),
            },
            where=_throttles.paused_until <= _time("now"),
        )
        .returning(_throttles.attempts, _throttles.resets_at, _throttles.paused_until)
    )


def _execute_within(statement: Executable, **parameters: object) -> Row[Any] | None:
    """Execute a statement as `database.fetch_one` does, but in the transaction of `db.session`."""
    return db.session.execute(statement, parameters).first()


def _account(email: str) -> str:
    """Return what stands for an email in the counts: the table shows no email."""
    return hashlib.sha256(email.encode()).hexdigest()[:32]


@database.built_once
def _remembering() -> Executable:
    at = _time("last_login_at")
    new = database.insert(known_addresses_table).values(
        account=bindparam("account"), network=bindparam("network"), last_login_at=at
    )
    keys = [_known.account, _known.network]
    replacing = new.on_conflict_do_update(index_elements=keys, set_={"last_login_at": at})
    return replacing.execution_options(prepare=True)


def _remember(account: str, network: str) -> None:
    here = {"account": account, "network": network, "last_login_at": clock.utcnow()}
    database.write(_remembering(), **here)


class _UnknownAddress(Exception):
    """The user of the account is not known at the address; nothing was counted."""


class _Counted(Attempt):
    """An attempt that is counted under some keys, the addresses first."""

    def __init__(self, counts: Sequence[tuple[str, Policy]]) -> None:
        self.counts = counts

    def count(
        self,
        *,
        shown: bool = False,
        known: dict[str, Any] | None = None,
        execute: Callable[..., Row[Any] | None] = database.fetch_one,
    ) -> Self:
        """Add the attempt to each count, store the longest pause that this begins, return self.

        If `shown`, the response may tell the state of the last count. Raise TooManyAttempts at the
        first count that is paused; what was counted before it stays. With `known`, the parameters
        of `_KNOWN`, raise _UnknownAddress instead of counting where the user is not known.

        By default each count is a statement in AUTOCOMMIT: it is stored before anything else
        begins, and waits for no other count. After a lost connection, a statement is sent again,
        which may count an attempt twice.
        """
        now = clock.utcnow()
        for key, policy in self.counts:
            is_shown = shown and key == self.counts[-1][0]
            counting = _counting(policy, known is not None)
            parameters = {"key": key} | policy.times(now) | (known or {})
            while (count := execute(counting, **parameters)) is None:
                if paused := execute(_PAUSED, key=key, now=now):
                    if is_shown:
                        quotas()[key] = Quota(policy, policy.limit, paused.paused_until)
                    seconds = (paused.paused_until - now).total_seconds()
                    raise TooManyAttempts(retry_after=math.ceil(seconds))
                if known:
                    raise _UnknownAddress
            pause = policy.pause(count.attempts)
            if is_shown:
                end = count.paused_until if pause else count.resets_at
                quotas()[key] = Quota(policy, count.attempts, end)
            self.pause = max(self.pause, pause)
        return self

    def succeed(self) -> None:
        """Take the attempt off each count."""
        self.withdraw()

    def withdraw(self) -> None:
        """Take one off each count, and end the pause that the attempt may have begun."""
        for key, _ in self.counts:
            database.write(_TAKE_OFF, counted=key)


class _Login(_Counted):
    def __init__(self, counts: Sequence[tuple[str, Policy]], account: str, network: str) -> None:
        super().__init__(counts)
        self._account = account
        self._network = network

    def succeed(self) -> None:
        """Delete the count of the account, take one off the address, and store it as known."""
        *by_address, (account_key, _) = self.counts
        _Counted(by_address).succeed()
        if quota := quotas().get(account_key):
            quota.attempts = 0
        database.write(_DELETE, counted=account_key)
        _remember(self._account, self._network)


class _CountedLogin(Attempt):
    """A login that an earlier request has counted; it can be completed more than once."""

    def __init__(self, login: _Login) -> None:
        self._login = login
        self.at_unknown_address = login.at_unknown_address

    def succeed(self) -> None:
        """Do what the login does; take nothing off the address if it has been completed before.

        The user is locked.
        """
        *_, (account_key, _) = self._login.counts
        counted = select(_throttles.key).where(_throttles.key == account_key)
        if db.session.scalars(counted).one_or_none() is None:
            self._login.counts = self._login.counts[-1:]
        self._login.succeed()


class _Code(_Counted):
    def __init__(self, counts: Sequence[tuple[str, Policy]], login: Attempt) -> None:
        super().__init__(counts)
        self._login = login
        self.at_unknown_address = login.at_unknown_address

    def withdraw(self) -> None:
        """Take one off each count, also off those of the login."""
        super().withdraw()
        self._login.withdraw()

    def succeed(self) -> None:
        """Delete the count of codes, and do the same as a login without a second factor."""
        self._login.succeed()
        for key, _ in self.counts:
            database.write(_DELETE, counted=key)


_limits = AppState[NoLimits]("rate_limits")


def init_app(app: Flask) -> None:
    """Give `app` the rate limits of its settings."""
    config = app.config
    first, longest = config["LOGIN_PAUSE_SECONDS"], config["LOGIN_PAUSE_MAX_SECONDS"]
    pauses = _pauses(first, longest)
    limits = Limits(
        account=Policy("account", config["LOGIN_FAILURES_PER_ACCOUNT"], DAY, pauses),
        address=Policy("address", config["LOGIN_FAILURES_PER_ADDRESS"], HOUR, (longest,)),
        # Two of a million codes are right, so guesses must be fewer than those of passwords. Only a
        # right code ends the count.
        codes=Policy("codes", CODES_PER_ACCOUNT, 365 * DAY, _pauses(first, max(longest, HOUR))),
        registrations=Policy("registrations", config["REGISTRATIONS_PER_ADDRESS"], HOUR, (HOUR,)),
        mails=Policy("mails", MAILS_PER_EMAIL, HOUR, (HOUR,)),
        mails_of_network=Policy("mails", MAILS_PER_NETWORK, HOUR, (HOUR,)),
        notices=Policy("notices", NOTICES_PER_EMAIL, HOUR, (HOUR,)),
        known_for=timedelta(days=config["KNOWN_ADDRESS_DAYS"]),
    )
    _limits.set(app, limits if config["RATE_LIMITS"] else NoLimits())


def _pauses(first: int, longest: int) -> tuple[int, ...]:
    """Return pauses in seconds, each twice as long as the one before."""
    doublings = math.ceil(math.log2(max(1, longest / first)))
    return tuple(min(first * 2**number, longest) for number in range(doublings + 1))


def limits() -> NoLimits:
    """Return the rate limits of the current application."""
    return _limits.get()


def rename(old: str, new: str) -> None:
    """Keep an account known at its addresses when its email changes; forget the old email."""
    # The account that had the new email before is another one.
    database.write(delete(known_addresses_table).where(_known.account == _account(new)))
    values = literal(_account(new)), _known.network, _known.last_login_at
    known = select(*values).where(_known.account == _account(old))
    moved = database.insert(known_addresses_table).from_select(list(_known), known)
    # A concurrent login with the new email may have stored an address just now.
    keys = [_known.account, _known.network]
    database.write(moved.on_conflict_do_nothing(index_elements=keys))
    forget(old)


def lift_pause(email: str) -> None:
    """Delete the counts of failed logins of an account, and so end its pause."""
    _delete_counts("login", email)


def lift_pause_of_codes(email: str) -> None:
    """Delete the counts of wrong codes of an account, and so end its pause."""
    _delete_counts("code", email)


def _delete_counts(act: str, email: str) -> None:
    account = _account(email)
    here = _known.account == account
    at_addresses = select(literal(f"{act}:{account}@") + _known.network).where(here)
    database.write(delete(throttles_table).where(_throttles.key == f"{act}:{account}"))
    database.write(delete(throttles_table).where(_throttles.key.in_(at_addresses)))


def forget(email: str) -> None:
    """Delete the counts and the known addresses of an account."""
    lift_pause(email)
    lift_pause_of_codes(email)
    database.write(delete(known_addresses_table).where(_known.account == _account(email)))


def delete_expired() -> int:
    """Delete a batch of expired counts and known addresses; return how many, 0 at the end."""
    now = clock.utcnow()
    oldest = now - timedelta(days=current_app.config["KNOWN_ADDRESS_DAYS"])
    expired = and_(_throttles.resets_at <= now, _throttles.paused_until <= now)
    unknown = _known.last_login_at <= oldest
    counts = database.delete_batch(throttles_table, expired, _throttles.resets_at)
    return counts + database.delete_batch(known_addresses_table, unknown, _known.last_login_at)
