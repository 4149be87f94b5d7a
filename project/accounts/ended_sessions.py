"""The feed of ended sessions, from which other services learn which tokens to refuse.

A row is added in the transaction that ends the session. Rows of long transactions are committed
late, so no number that is taken before the commit gives the order in which they appear. A row
therefore gets its position when the feed is read for the first time after the commit, by one
reader at a time: no row appears before a position that a client has read. Positions grow with the
clock, so that those of rows that were lost, when a backup was restored, are not given again.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, bindparam, func, insert, select, update

from project import clock
from project.errors import InvalidPayload
from project.extensions import db
from project.lib import database
from project.models import ended_sessions_table

NUMBERED_AT_ONCE = 10_000  # rows

_columns = ended_sessions_table.c
_IS_NEW = _columns.position.is_(None)
_NEW = select(_columns.session_id).where(_IS_NEW).limit(1)
_LAST = select(func.coalesce(func.max(_columns.position), 0).label("position"))
_PAGE = (
    select(_columns.session_id, _columns.ended_at, _columns.expires_at, _columns.position)
    .where(
        _columns.position > bindparam("after"),
        _columns.expires_at > bindparam("now", type_=_columns.expires_at.type),
    )
    .order_by(_columns.position)
    .limit(bindparam("limit"))
)
_numbered = (
    select(
        _columns.session_id,
        func.row_number().over(order_by=(_columns.ended_at, _columns.session_id)).label("number"),
    )
    .where(_IS_NEW)
    .order_by(_columns.ended_at, _columns.session_id)
    .limit(NUMBERED_AT_ONCE)
    .subquery()
)
_NUMBER = (
    update(ended_sessions_table)
    .where(_columns.session_id == _numbered.c.session_id)
    .values(position=bindparam("last") + _numbered.c.number)
)


def add(sessions: Sequence[Any]) -> None:
    """Add sessions, whose rows are being deleted, unless their tokens have expired.

    Each has `id`, `token_expires_at` and `expires_at`. The caller commits.
    """
    now = clock.utcnow()
    ends = {session.id: session.token_expires_at or session.expires_at for session in sessions}
    rows = [
        {"session_id": session_id, "ended_at": now, "expires_at": end}
        for session_id, end in ends.items()
        if end > now
    ]
    if rows:
        db.session.execute(insert(ended_sessions_table), rows)


def number() -> None:
    """Give the rows that were committed since the last call their positions; the caller commits."""
    if database.fetch_one(_NEW):
        database.lock("ended_sessions")
        last = db.session.execute(_LAST).one().position
        moment = int(clock.utcnow().timestamp() * 1_000_000)
        db.session.execute(_NUMBER, {"last": max(last, moment)})


def page(after: int, limit: int) -> Sequence[Row[Any]]:
    """Return at most `limit` ended sessions after the position `after`, in their order.

    Sessions whose tokens have expired are left out, and so are those without a position. Raise
    InvalidPayload if `after` is ahead of the feed, as it can be after the database was restored
    from a backup.
    """
    rows = database.fetch_all(_PAGE, after=after, limit=limit, now=clock.utcnow())
    last = None if rows else database.fetch_one(_LAST)
    if last and after > last.position:
        raise InvalidPayload(errors={"after": "is no cursor of this feed"})
    return rows


def delete_expired() -> int:
    """Delete a batch of sessions whose tokens have expired; return how many, 0 at the end.

    The row of the last position stays, from which the next ones are counted.
    """
    expired = _columns.expires_at <= clock.utcnow()
    last = select(func.max(_columns.position)).scalar_subquery()
    deletable = expired & (_IS_NEW | (_columns.position < last))
    return database.delete_batch(ended_sessions_table, deletable, _columns.expires_at)
