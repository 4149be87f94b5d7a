"""The command that prints the audit log: events."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from time import sleep
from typing import Any

import orjson
from sqlalchemy import Row, Select, select, tuple_

from project import clock
from project.accounts import directory
from project.lib import database
from project.models import events_table
from project.ops.command_line import as_duration, as_time, exit_if_not_found

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TABLE_ROW = "{:20}  {:24}  {:>7}  {:39}  {}"
COLUMNS = "time", "event", "user", "address", "details"

PAGE = 500  # events that are read at once
FOLLOW_INTERVAL = 0.5  # seconds between two reads
# How long a transaction may last whose events are seen only when it has been committed.
FOLLOW_OVERLAP = timedelta(seconds=30)

_columns = events_table.c


def events(
    user: str | None = None, since: str | None = None, follow: bool = False, json: bool = False
) -> None:
    """Print the audit log, oldest event first, as a table or as JSON Lines.

    --user EMAIL prints the events of one user only. --since takes a time (2026-11-22T09:00:00Z)
    or a duration up to now (90m, 24h, 7d). --follow keeps printing new events, from now on unless
    --since is given.
    """
    user_id = None
    if user:
        with exit_if_not_found(user):
            user_id = directory.find_by_email(user.lower())
    start = _start(since) if since else clock.utcnow() if follow else EPOCH
    # When the reader of a pipe (head, less) ends first, end without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if not json:
        print(TABLE_ROW.format(*COLUMNS))
    with contextlib.suppress(KeyboardInterrupt):
        for event in (_follow if follow else _since)(start, user_id):
            print(_as_json(event) if json else _as_row(event), flush=follow)


def _start(since: str) -> datetime:
    """Return the time that `since` names: ISO 8601, UTC by default, or a duration up to now."""
    try:
        if (duration := as_duration(since)) is not None:
            return clock.utcnow() - duration
        time = datetime.fromisoformat(since)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        sys.exit(f"{since!r} is not a time: write 2026-11-22T09:00:00Z, or 90m, 24h, 7d.")


def _since(moment: datetime, user_id: int | None = None) -> Iterator[Row[Any]]:
    """Yield the events from `moment` on, of one user or of all, oldest first."""
    order = _columns.created_at, _columns.id
    wanted: Select[Any] = select(events_table).order_by(*order).limit(PAGE)
    if user_id is not None:
        wanted = wanted.where(_columns.user_id == user_id)
    page = database.fetch_all(wanted.where(_columns.created_at >= moment))
    while page:
        yield from page
        last = page[-1]
        page = database.fetch_all(wanted.where(tuple_(*order) > (last.created_at, last.id)))


def _follow(moment: datetime, user_id: int | None = None) -> Iterator[Row[Any]]:
    """Yield events as `_since` does, then new events as they are committed, without end.

    An event that is committed after a later one is yielded when it becomes visible.
    """
    seen: dict[int, datetime] = {}
    while True:
        for happened in _since(moment, user_id):
            if happened.id not in seen:
                seen[happened.id] = happened.created_at
                yield happened
        if seen:
            moment = max(moment, max(seen.values()) - FOLLOW_OVERLAP)
            seen = {number: at for number, at in seen.items() if at >= moment}
        sleep(FOLLOW_INTERVAL)


def _as_json(event: Row[Any]) -> str:
    return orjson.dumps(event._asdict(), option=orjson.OPT_UTC_Z).decode()


def _as_row(event: Row[Any]) -> str:
    details = " ".join(f"{name}={value}" for name, value in event.details.items())
    if event.actor_id:
        details = f"by={event.actor_id} {details}"
    user, ip = event.user_id or "-", event.ip or "-"
    # Quoted, so that a client cannot pass off its User-Agent as details.
    user_agent = orjson.dumps(event.user_agent).decode()
    columns = as_time(event.created_at), event.kind, user, ip, f"{details} {user_agent}".strip()
    return TABLE_ROW.format(*columns)
