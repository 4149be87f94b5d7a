"""Additions to psycopg2: a limit on the wait for an answer, and prepared statements.

project/lib/database.py sets them up.
"""

import contextlib
import hashlib
import os
import re
import select
import socket
import threading
from typing import Any

import psycopg2
import psycopg2.extensions
from sqlalchemy.engine.interfaces import ExceptionContext

SUSPICION = 0.5  # seconds without an answer after which PostgreSQL may be hanging
ANSWER_TIMEOUT = 2.0  # seconds to wait for PostgreSQL to connect, or to answer one statement

# SQLSTATEs, https://www.postgresql.org/docs/current/errcodes-appendix.html
READ_ONLY_TRANSACTION = "25006"
# Errors of EXECUTE and PREPARE behind a connection pooler, or after ALTER TABLE: the statement does
# not exist; it exists already; its result has changed.
NOT_PREPARED = {"26000", "42P05", "0A000"}

_PLACEHOLDER = re.compile(r"%\((\w+)\)s|%%")


class TimeLimitedConnection(psycopg2.extensions.connection):
    """A connection with a timeout for each answer, in seconds, and its prepared statements.

    A timeout of None waits for ever, as migrations need.
    """

    answer_timeout: float | None = ANSWER_TIMEOUT

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Connect as psycopg2 does, with no prepared statements."""
        super().__init__(*args, **kwargs)
        # The EXECUTE for each SELECT; None if prepared statements do not work.
        self.prepared: dict[str, str] | None = {}


class AnswerTimeout(psycopg2.OperationalError):
    """PostgreSQL did not answer in time; the connection has been shut down."""


class WaitLimit:
    """Limits how long connections wait for PostgreSQL, and how many wait long at once.

    libpq waits for ever for a server that hangs while its machine still acknowledges packets.
    psycopg2 calls `wait` instead, for connecting and for each statement:
    https://www.psycopg.org/docs/advanced.html#support-for-coroutine-libraries
    """

    def __init__(self, slots: int) -> None:
        self._slots = threading.BoundedSemaphore(slots)

    def wait(self, connection: psycopg2.extensions.connection) -> None:
        """Wait until libpq has the answer; raises AnswerTimeout after `answer_timeout` seconds.

        After SUSPICION seconds the wait goes on only if one of the slots is free. So a database
        that hangs leaves threads for requests that do not need it.
        """
        timeout = getattr(connection, "answer_timeout", None)
        while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
            poller = select.poll()
            reading = state == psycopg2.extensions.POLL_READ
            poller.register(connection.fileno(), select.POLLIN if reading else select.POLLOUT)
            if not (poller.poll(SUSPICION * 1000) or self._wait_longer(poller, timeout)):
                _shut_down(connection.fileno())
                raise AnswerTimeout("the database did not answer in time")

    def _wait_longer(self, poller: "select.poll", timeout: float | None) -> bool:
        """Wait for the rest of `timeout` seconds, or for ever if it is None, if a slot is free."""
        if timeout is None:
            return bool(poller.poll())
        if not self._slots.acquire(blocking=False):
            return False
        try:
            return bool(poller.poll(max(0.0, timeout - SUSPICION) * 1000))
        finally:
            self._slots.release()


def _shut_down(descriptor: int) -> None:
    """Shut a socket down, so that closing the connection does not wait for the server."""
    with socket.socket(fileno=os.dup(descriptor)) as line, contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)  # fails if it is not connected yet


def limit_waits(slots: int) -> None:
    """Apply a `WaitLimit` with this many slots to every connection of this process."""
    psycopg2.extensions.set_wait_callback(WaitLimit(slots).wait)


def drop_read_only_connections(context: ExceptionContext) -> None:
    """Close a connection that refuses writes, as after a failover to another server.

    A session stays read-only after its server became a standby, even after the setting that made
    it read-only was reverted. Only a new connection reaches a primary.
    """
    if getattr(context.original_exception, "pgcode", None) == READ_ONLY_TRANSACTION:
        context.is_disconnect = True


def execute_prepared(
    cursor: Any, statement: str, parameters: dict[str, Any], _context: object
) -> bool:
    """Execute a SELECT as a prepared statement; return False to let SQLAlchemy execute it.

    PostgreSQL takes longer to plan a lookup in two tables than to execute it, and psycopg2 has
    every execution planned. A connection on which prepared statements fail continues without them:
    PgBouncer in transaction mode sends each statement over another connection.
    """
    connection: TimeLimitedConnection = cursor.connection
    if connection.prepared is None or not statement.startswith("SELECT"):
        return False
    try:
        if statement not in connection.prepared:
            connection.prepared[statement] = _prepare(cursor, statement)
        cursor.execute(connection.prepared[statement], parameters)
    except psycopg2.Error as error:
        if error.pgcode not in NOT_PREPARED:
            raise
        connection.prepared = None
        return False
    return True


def _prepare(cursor: Any, statement: str) -> str:
    """Prepare a statement with psycopg2's named placeholders; return its EXECUTE with the same."""
    names: dict[str, int] = {}

    def number(placeholder: re.Match[str]) -> str:
        if placeholder[1] is None:
            return "%"
        return f"${names.setdefault(placeholder[1], len(names) + 1)}"

    query = _PLACEHOLDER.sub(number, statement)
    # The name depends on the text only: on every connection it is the same statement.
    name = f"q_{hashlib.sha256(query.encode()).hexdigest()[:32]}"
    cursor.execute(f"PREPARE {name} AS {query}")
    arguments = ", ".join(f"%({name})s" for name in names)
    return f"EXECUTE {name} ({arguments})" if names else f"EXECUTE {name}"
