"""Rate limits: failed logins per account and per address, wrong codes, registrations per address.

An attempt is counted before it is made, and the count is given back when the attempt succeeds. Of
any number of concurrent guesses no more than the limit are therefore checked. The counts are rows:
all processes and hosts share them, and they survive a restart.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from flask import Flask, current_app, g
from sqlalchemy import Connection, and_, delete, literal, select, update

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


class Count(NamedTuple):
    """The attempts that were counted under one key."""

    attempts: int
    resets_at: datetime
    paused_until: datetime


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
    pauses: Sequence[int]  # seconds; the last one applies to all later attempts

    def pause(self, attempts: int) -> int:
        """Return the seconds of the pause that attempt number `attempts` begins, 0 for none."""
        if attempts < self.limit:
            return 0
        return self.pauses[min(attempts - self.limit, len(self.pauses) - 1)]

    def add(self, count: Count, now: datetime) -> Count | None:
        """Return `count` with one more attempt at `now`, or None while it is paused."""
        if count.paused_until > now:
            return None
        if count.resets_at <= now:
            count = Count(0, now + timedelta(seconds=self.window), _NOT_PAUSED)
        attempts = count.attempts + 1
        pause = self.pause(attempts)
        paused_until = now + timedelta(seconds=pause) if pause else _NOT_PAUSED
        return Count(attempts, count.resets_at, paused_until)


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
        """Count a refresh token that is forged or whose session is not live."""

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
        attempt = self._login(email, ip)
        # Never the address: its count tells whether an account is known there.
        shown = {attempt.counts[-1][0]} if own else set()
        attempt.pause = _count(attempt.counts, clock.utcnow(), shown)
        return attempt

    def counted_login(self, email: str, ip: str | None) -> Attempt:
        """Return the attempt whose counts `login` has raised."""
        return _CountedLogin(self._login(email, ip))

    def _login(self, email: str, ip: str | None) -> "_Login":
        account, network = _account(email), addresses.network(ip)
        is_known = self._is_known(account, network)
        if is_known:
            counts = [(f"login:{account}@{network}", self._account)]
        else:
            counts = [(f"login:{network}", self._address), (f"login:{account}", self._account)]
        attempt = _Login(counts, account, network)
        attempt.at_unknown_address = not is_known and bool(self._known_for)
        return attempt

    def _is_known(self, account: str, network: str) -> bool:
        known = select(_known.account).where(
            _known.account == account,
            _known.network == network,
            _known.last_login_at > clock.utcnow() - self._known_for,
        )
        return database.fetch_one(known) is not None

    def code(self, email: str, ip: str | None, login: Attempt) -> Attempt:
        """Count by account, apart from logins; at an address where the user is known, by both."""
        account, network = _account(email), addresses.network(ip)
        at_known = f"@{network}" if self._is_known(account, network) else ""
        counts = [(f"code:{account}{at_known}", self._codes)]
        attempt = _Code(counts, login)
        attempt.pause = _count(counts, clock.utcnow(), set())
        return attempt

    def refresh(self, ip: str | None) -> None:
        """Count by address, together with the logins from there."""
        _count([(f"login:{addresses.network(ip)}", self._address)], clock.utcnow(), set())

    def client(self, name: str, ip: str | None) -> Attempt:
        """Count by address and by client, apart from logins."""
        by_address = f"client:{addresses.network(ip)}", self._address
        return _counted([by_address, (f"client:{_account(name)}", self._account)])

    def registration(self, ip: str | None) -> None:
        """Count by address."""
        key = f"register:{addresses.network(ip)}"
        _count([(key, self._registrations)], clock.utcnow(), {key})

    def mail(self, act: str, email: str, ip: str | None) -> None:
        """Count by network and by email, separately for each act."""
        _count(self._mail_counts(act, email, ip), clock.utcnow(), set())

    def mail_within(self, act: str, email: str, ip: str | None) -> None:
        """Count as `mail` does."""
        counts = self._mail_counts(act, email, ip)
        _, refusal = _add(db.session.connection(), counts, clock.utcnow(), set())
        if refusal:
            raise refusal

    def _mail_counts(self, act: str, email: str, ip: str | None) -> list[tuple[str, Policy]]:
        return [
            (f"mail:{act}:{addresses.network(ip)}", self._mails_of_network),
            (f"mail:{act}:{_account(email)}", self._mails),
        ]

    def notice(self, kind: str, email: str) -> bool:
        """Count by email, separately for each kind, in the transaction of `db.session`."""
        counts = [(f"mail:{kind}:{_account(email)}", self._notices)]
        _, refusal = _add(db.session.connection(), counts, clock.utcnow(), set())
        return refusal is None

    def remember(self, email: str, ip: str | None) -> None:
        """Store the address in the transaction of `db.session`."""
        _remember(_account(email), addresses.network(ip))


def quotas() -> dict[str, Quota]:
    """Return what the client has used of the limits that the current request may tell, by key."""
    shown: dict[str, Quota] = g.setdefault("quotas", {})
    return shown


def _count(counts: Sequence[tuple[str, Policy]], now: datetime, shown: set[str]) -> int:
    """Add an attempt to each count; return the seconds of the longest pause that this begins.

    `shown` are the keys whose state the response may tell.

    Raise TooManyAttempts at the first count that is paused. What was counted before it stays: the
    counts have a separate transaction, committed before anything else begins. Every transaction
    locks users before counts, and addresses before accounts, so that there are no deadlocks.
    """
    with db.engine.begin() as connection:
        pause, refusal = _add(connection, counts, now, shown)
    if refusal:
        raise refusal
    return pause


def _add(
    connection: Connection, counts: Sequence[tuple[str, Policy]], now: datetime, shown: set[str]
) -> tuple[int, TooManyAttempts | None]:
    """Do what `_count` does in a transaction of `connection`, and return the refusal, if any."""
    pause = 0
    for key, policy in counts:
        before = _lock(connection, key, now)
        after = policy.add(before, now)
        if key in shown and after is None:
            quotas()[key] = Quota(policy, policy.limit, before.paused_until)
        elif key in shown and after:
            paused = policy.pause(after.attempts)
            end = after.paused_until if paused else after.resets_at
            quotas()[key] = Quota(policy, after.attempts, end)
        if after is None:
            seconds = (before.paused_until - now).total_seconds()
            return pause, TooManyAttempts(retry_after=math.ceil(seconds))
        this_one = _throttles.key == key
        connection.execute(update(throttles_table).where(this_one).values(after._asdict()))
        pause = max(pause, policy.pause(after.attempts))
    return pause, None


def _lock(connection: Connection, key: str, now: datetime) -> Count:
    """Return the count under `key`, locked until the transaction ends; make it if there is none."""
    new = database.insert(throttles_table).values(
        key=key, attempts=0, resets_at=now, paused_until=_NOT_PAUSED
    )
    unchanged = {"attempts": _throttles.attempts}
    locking = new.on_conflict_do_update(index_elements=[_throttles.key], set_=unchanged)
    columns = _throttles.attempts, _throttles.resets_at, _throttles.paused_until
    return Count(*connection.execute(locking.returning(*columns)).one())


def _account(email: str) -> str:
    """Return what stands for an email in the counts: the table shows no email."""
    return hashlib.sha256(email.encode()).hexdigest()[:32]


def _remember(account: str, network: str) -> None:
    now = clock.utcnow()
    new = database.insert(known_addresses_table).values(
        account=account, network=network, last_login_at=now
    )
    database.write(
        new.on_conflict_do_update(
            index_elements=[_known.account, _known.network], set_={"last_login_at": now}
        )
    )


class _Counted(Attempt):
    def __init__(self, counts: Sequence[tuple[str, Policy]]) -> None:
        self.counts = counts

    def succeed(self) -> None:
        """Take the attempt off each count."""
        self.withdraw()

    def withdraw(self) -> None:
        """Take one off each count, and end the pause that the attempt may have begun."""
        for key, _ in self.counts:
            database.write(
                update(throttles_table)
                .where(_throttles.key == key, _throttles.attempts > 0)
                .values(attempts=_throttles.attempts - 1, paused_until=_NOT_PAUSED)
            )


def _counted(counts: Sequence[tuple[str, Policy]]) -> _Counted:
    """Return an attempt that has been added to these counts; raise TooManyAttempts."""
    attempt = _Counted(counts)
    attempt.pause = _count(counts, clock.utcnow(), set())
    return attempt


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
        database.write(delete(throttles_table).where(_throttles.key == account_key))
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
        keys = [key for key, _ in self.counts]
        database.write(delete(throttles_table).where(_throttles.key.in_(keys)))


_limits = AppState[NoLimits]("rate_limits")


def init_app(app: Flask) -> None:
    """Give `app` the rate limits of its settings."""
    config = app.config
    first, longest = config["LOGIN_PAUSE_SECONDS"], config["LOGIN_PAUSE_MAX_SECONDS"]
    pauses = _pauses(first, longest)
    limits = Limits(
        account=Policy("account", config["LOGIN_FAILURES_PER_ACCOUNT"], DAY, pauses),
        address=Policy("address", config["LOGIN_FAILURES_PER_ADDRESS"], HOUR, [longest]),
        # Two of a million codes are right, so guesses must be fewer than those of passwords. Only a
        # right code ends the count.
        codes=Policy("codes", CODES_PER_ACCOUNT, 365 * DAY, _pauses(first, max(longest, HOUR))),
        registrations=Policy("registrations", config["REGISTRATIONS_PER_ADDRESS"], HOUR, [HOUR]),
        mails=Policy("mails", MAILS_PER_EMAIL, HOUR, [HOUR]),
        mails_of_network=Policy("mails", MAILS_PER_NETWORK, HOUR, [HOUR]),
        notices=Policy("notices", NOTICES_PER_EMAIL, HOUR, [HOUR]),
        known_for=timedelta(days=config["KNOWN_ADDRESS_DAYS"]),
    )
    _limits.set(app, limits if config["RATE_LIMITS"] else NoLimits())


def _pauses(first: int, longest: int) -> list[int]:
    """Return pauses in seconds, each twice as long as the one before."""
    doublings = math.ceil(math.log2(max(1, longest / first)))
    return [min(first * 2**number, longest) for number in range(doublings + 1)]


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
