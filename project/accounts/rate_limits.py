"""How often may somebody try: failed logins per account and per address, registrations per address.

An attempt is counted before it is made, and given back when it was right, so that of any number of
guesses at once no more than the limit are looked at. The counts are rows: every process and every
host shares them, and no restart forgets them.
"""

import hashlib
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol, cast

from flask import Flask, current_app
from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Table,
    case,
    delete,
    literal,
    select,
    tuple_,
    update,
)

from project import addresses, clock, database
from project.api.models import KnownAddress, Throttle
from project.config import DAY
from project.errors import TooManyAttempts
from project.extensions import db

HOUR = 3_600  # seconds
DELETED_AT_ONCE = 1_000
# Until when what is not paused is paused. Not "now": that may be later than another's.
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)

_throttles = cast(Table, Throttle.__table__)
_known = cast(Table, KnownAddress.__table__)


class Policy(NamedTuple):
    """So many attempts in a window; the last of them begins a pause, each one after it a longer."""

    limit: int
    window: int  # seconds from the first attempt, after which the count begins anew
    pauses: Sequence[int]  # seconds; the last is for all that follow

    def pause(self, attempts: int) -> int:
        """Return the seconds of the pause that the attempt of this number begins, 0 for none."""
        if attempts < self.limit:
            return 0
        return self.pauses[min(attempts - self.limit, len(self.pauses) - 1)]

    def paused_until(self, attempts: int, now: datetime) -> datetime:
        """Return the end of that pause."""
        pause = self.pause(attempts)
        return _later(now, pause) if pause else _LONG_AGO


class Attempt(Protocol):
    """Something that somebody tries, and that has been counted."""

    pause: int  # seconds for which no other may be made, unless this one succeeds

    def succeed(self) -> None:
        """Give back what was counted, in the transaction of `db.session`."""


class Limits(Protocol):
    """What is counted; each raises TooManyAttempts when the limit is reached."""

    def login(self, email: str, ip: str | None) -> Attempt:
        """Count a password that is given for an account, which need not exist."""

    def refresh(self, ip: str | None) -> Attempt:
        """Count a refresh token."""

    def registration(self, ip: str | None) -> None:
        """Count a registration, which is never given back."""

    def remember(self, email: str, ip: str | None) -> None:
        """Take an address for the account's own, in the transaction of `db.session`."""


class Off:
    """No limits: what the tests, and those who limit elsewhere, have."""

    def login(self, email: str, ip: str | None) -> Attempt:
        """Count nothing."""
        return _Uncounted()

    def refresh(self, ip: str | None) -> Attempt:
        """Count nothing."""
        return _Uncounted()

    def registration(self, ip: str | None) -> None:
        """Count nothing."""

    def remember(self, email: str, ip: str | None) -> None:
        """Remember nothing."""


class _Uncounted:
    pause = 0

    def succeed(self) -> None:
        """Give nothing back."""


class On:
    """Limits as the settings have them."""

    def __init__(
        self, *, account: Policy, address: Policy, registrations: Policy, known_for: timedelta
    ) -> None:
        self._account = account
        self._address = address
        self._registrations = registrations
        self._known_for = known_for

    def login(self, email: str, ip: str | None) -> Attempt:
        """Count by account and by address.

        From where the account has been logged in to lately, the two together have a count of their
        own instead: nobody elsewhere can lock its owner out.
        """
        account, network = _account(email), addresses.network(ip)
        now = clock.utcnow()
        known = database.fetch_one(
            select(_known.c.account).where(
                _known.c.account == account,
                _known.c.network == network,
                _known.c.last_login_at > now - self._known_for,
            )
        )
        if known:
            counts = [(f"login:{account}@{network}", self._account)]
        else:
            counts = [(f"login:{network}", self._address), (f"login:{account}", self._account)]
        return _Login(counts, _count(counts, now), account, network)

    def refresh(self, ip: str | None) -> Attempt:
        """Count by address, together with its logins."""
        counts = [(f"login:{addresses.network(ip)}", self._address)]
        return _Counted(counts, _count(counts, clock.utcnow()))

    def registration(self, ip: str | None) -> None:
        """Count by address."""
        counts = [(f"register:{addresses.network(ip)}", self._registrations)]
        _count(counts, clock.utcnow())

    def remember(self, email: str, ip: str | None) -> None:
        """Take an address for the account's own, as after a login."""
        _remember(_account(email), addresses.network(ip))


def _count(counts: Sequence[tuple[str, Policy]], now: datetime) -> int:
    """Raise the counts, each in one statement, and return the longest pause that this begins.

    Raises TooManyAttempts at the first that is paused already.

    In a transaction of its own, which ends before anything else begins: what is counted stays so.
    The order is always that of addresses before accounts, so nobody deadlocks.
    """
    pause = 0
    paused_until = None
    with db.engine.begin() as connection:
        for key, policy in counts:
            attempts = _raise(connection, key, policy, now)
            if attempts is None:
                end = select(_throttles.c.paused_until).where(_throttles.c.key == key)
                paused_until = connection.execute(end).scalar_one()
                break
            pause = max(pause, policy.pause(attempts))
    if paused_until is not None:
        raise TooManyAttempts(retry_after=math.ceil((paused_until - now).total_seconds()))
    return pause


def _raise(connection: Connection, key: str, policy: Policy, now: datetime) -> int | None:
    """Count one attempt and return its number, or None while there may be none."""
    columns = _throttles.c
    begins_anew = columns.resets_at <= now
    attempts = case((begins_anew, 1), else_=columns.attempts + 1)
    last = policy.limit + len(policy.pauses) - 1
    pauses = {number: policy.paused_until(number, now) for number in range(policy.limit, last)}
    return connection.execute(
        database.insert(_throttles)
        .values(
            key=key,
            attempts=1,
            resets_at=_later(now, policy.window),
            paused_until=policy.paused_until(1, now),
        )
        .on_conflict_do_update(
            index_elements=[columns.key],
            set_={
                "attempts": attempts,
                "resets_at": case(
                    (begins_anew, _later(now, policy.window)), else_=columns.resets_at
                ),
                "paused_until": case(
                    (attempts < policy.limit, _LONG_AGO),
                    *((attempts == number, until) for number, until in pauses.items()),
                    else_=policy.paused_until(last, now),
                ),
            },
            where=columns.paused_until <= now,
        )
        .returning(columns.attempts)
    ).scalar_one_or_none()


def _later(now: datetime, seconds: int) -> datetime:
    return now + timedelta(seconds=seconds)


def _account(email: str) -> str:
    """Return what stands for an email in the counts: nobody reads there who was guessed at."""
    return hashlib.sha256(email.encode()).hexdigest()[:32]


def _remember(account: str, network: str) -> None:
    now = clock.utcnow()
    database.write(
        database.insert(_known)
        .values(account=account, network=network, last_login_at=now)
        .on_conflict_do_update(
            index_elements=[_known.c.account, _known.c.network], set_={"last_login_at": now}
        )
    )


class _Counted:
    def __init__(self, counts: Sequence[tuple[str, Policy]], pause: int) -> None:
        self._counts = counts
        self.pause = pause

    def succeed(self) -> None:
        """Take one off each count, and lift the pause that it may have begun."""
        for key, _ in self._counts:
            database.write(
                update(_throttles)
                .where(_throttles.c.key == key, _throttles.c.attempts > 0)
                .values(attempts=_throttles.c.attempts - 1, paused_until=_LONG_AGO)
            )


class _Login(_Counted):
    def __init__(
        self, counts: Sequence[tuple[str, Policy]], pause: int, account: str, network: str
    ) -> None:
        super().__init__(counts, pause)
        self._account = account
        self._network = network

    def succeed(self) -> None:
        """Forget the failures of the account, and remember where it was logged in to."""
        *by_address, (account_key, _) = self._counts
        _Counted(by_address, self.pause).succeed()
        database.write(delete(_throttles).where(_throttles.c.key == account_key))
        _remember(self._account, self._network)


def init_app(app: Flask) -> None:
    """Give `app` the limits of its settings."""
    config = app.config
    pause, longest = config["LOGIN_PAUSE_SECONDS"], config["LOGIN_PAUSE_MAX_SECONDS"]
    doublings = math.ceil(math.log2(max(1, longest / pause)))
    app.extensions["ratelimit"] = Off()
    if config["RATE_LIMITS"]:
        app.extensions["ratelimit"] = On(
            account=Policy(
                config["LOGIN_FAILURES_PER_ACCOUNT"],
                DAY,
                [min(pause * 2**number, longest) for number in range(doublings + 1)],
            ),
            address=Policy(config["LOGIN_FAILURES_PER_ADDRESS"], HOUR, [longest]),
            registrations=Policy(config["REGISTRATIONS_PER_ADDRESS"], HOUR, [HOUR]),
            known_for=timedelta(days=config["KNOWN_ADDRESS_DAYS"]),
        )


def limits() -> Limits:
    """Return what limits attempts in the present application."""
    return cast(Limits, current_app.extensions["ratelimit"])


def rename(old: str, new: str) -> None:
    """Let an account whose email changes stay known at its addresses, and forget the old email."""
    _forget_counts(old)
    # Whoever had the new email before was somebody else.
    database.write(delete(_known).where(_known.c.account == _account(new)))
    theirs = _known.c.account == _account(old)
    columns = literal(_account(new)), _known.c.network, _known.c.last_login_at
    moved = database.insert(_known).from_select(list(_known.c), select(*columns).where(theirs))
    # A login that was under way may have remembered it just now.
    keys = _known.c.account, _known.c.network
    database.write(moved.on_conflict_do_nothing(index_elements=list(keys)))
    database.write(delete(_known).where(theirs))


def forget(email: str) -> None:
    """Delete all that is counted and known of an account."""
    _forget_counts(email)
    database.write(delete(_known).where(_known.c.account == _account(email)))


def _forget_counts(email: str) -> None:
    account = f"login:{_account(email)}"
    at_addresses = select(literal(f"{account}@") + _known.c.network).where(
        _known.c.account == _account(email)
    )
    database.write(delete(_throttles).where(_throttles.c.key == account))
    database.write(delete(_throttles).where(_throttles.c.key.in_(at_addresses)))


def delete_expired() -> int:
    """Delete counts and addresses that say nothing any more; return how many, 0 at the end.

    At most DELETED_AT_ONCE of each, and none that somebody else has locked: nobody waits.
    """
    now = clock.utcnow()
    oldest = now - timedelta(days=current_app.config["KNOWN_ADDRESS_DAYS"])
    counts = select(_throttles.c.key).where(
        _throttles.c.resets_at <= now, _throttles.c.paused_until <= now
    )
    known = select(_known.c.account, _known.c.network).where(_known.c.last_login_at <= oldest)
    return _delete(_throttles, [_throttles.c.key], counts) + _delete(
        _known, [_known.c.account, _known.c.network], known
    )


def _delete(table: Table, key: Sequence[ColumnElement[Any]], expired: Select[Any]) -> int:
    expired = expired.limit(DELETED_AT_ONCE).with_for_update(skip_locked=True)
    return database.write(delete(table).where(tuple_(*key).in_(expired)))
