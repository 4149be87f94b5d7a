"""Additions to psycopg2: a limit on the wait for an answer, and prepared statements.

project/lib/database.py sets them up.
"""

import contextlib
import functools
import hashlib
import math
import os
import re
import select
import socket
import threading
import time
from typing import Any

import psycopg2
import psycopg2.extensions
from flask import g
from sqlalchemy.engine.interfaces import ExceptionContext, ExecutionContext

SUSPICION = 0.5  # seconds without an answer after which PostgreSQL may be hanging
ANSWER_TIMEOUT = 2.0  # seconds to wait for PostgreSQL to answer one statement
REQUEST_TIMEOUT = 2.5  # seconds to wait for all answers to a request that take SUSPICION or longer
CONNECT_TIMEOUT = 2.0  # seconds to connect to one of its hosts

# SQLSTATEs, https://www.postgresql.org/docs/current/errcodes-appendix.html
READ_ONLY_TRANSACTION = "25006"
# PostgreSQL has cancelled the transaction, and the same statements may succeed when repeated: a
# serialization failure, a deadlock, the end of the connection in a restart or planned failover.
CANCELLED = {"40001", "40P01", "57P01"}
# Errors of EXECUTE and PREPARE behind a connection pooler, or after ALTER TABLE: the statement does
# not exist; it exists already; its result has changed.
NOT_PREPARED = {"26000", "42P05", "0A000"}

_PREPARABLE = "SELECT", "INSERT", "DELETE"
_PLACEHOLDER = re.compile(r"%\((\w+)\)s|%%")


class TimeLimitedConnection(psycopg2.extensions.connection):
    """A connection with a timeout for each answer, in seconds, and its prepared statements.

    A timeout of None waits for ever, as migrations need.
    """

    answer_timeout: float | None = ANSWER_TIMEOUT
    needs_slot = True  # whether a wait takes a slot of `WaitLimit`
    prepares_writes = True  # whether prepared statements work in transactions

    def __init__(self, connect_timeout: float, *args: Any) -> None:
        """Connect as psycopg2 does in at most `connect_timeout` seconds."""
        self.answer_timeout = connect_timeout
        super().__init__(*args)
        del self.answer_timeout
        # The EXECUTE for each statement; None if prepared statements do not work.
        self.prepared: dict[str, str] | None = {}


class ProbeConnection(TimeLimitedConnection):
    """A connection that a thread of its own waits for, and no request."""

    needs_slot = False


class AnswerTimeout(psycopg2.OperationalError):
    """PostgreSQL did not answer in time; the connection has been shut down."""


def begin_request() -> None:
    """Begin a request, which waits REQUEST_TIMEOUT in total, and whose writes are prepared."""
    g.database_patience = REQUEST_TIMEOUT


def _in_request() -> bool:
    # Not flask.has_request_context: a command has one too.
    return bool(g) and "database_patience" in g


class WaitLimit:
    """Limits how long connections wait for PostgreSQL, and how many wait at once while it hangs.

    libpq waits for ever for a server that hangs while its machine still acknowledges packets.
    psycopg2 calls `wait` instead, for connecting and for each statement:
    https://www.psycopg.org/docs/advanced.html#support-for-coroutine-libraries
    """

    def __init__(self, slots: int) -> None:
        self._slots = threading.BoundedSemaphore(slots)
        self._answered_at = time.monotonic()
        self._hangs = False  # no connection has had an answer since one waited SUSPICION seconds

    def wait(self, connection: psycopg2.extensions.connection) -> None:
        """Wait until libpq has the answer; raises AnswerTimeout after `answer_timeout` seconds.

        After SUSPICION seconds the wait goes on only if one of the slots is free. While no
        connection gets an answer, that is so from the beginning. So a database that hangs leaves
        threads for requests that do not need it. A request that has used up REQUEST_TIMEOUT waits
        no longer than SUSPICION for any further answer.
        """
        began = time.monotonic()
        while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
            poller = select.poll()
            reading = state == psycopg2.extensions.POLL_READ
            poller.register(connection.fileno(), select.POLLIN if reading else select.POLLOUT)
            if not self._is_answered(poller, connection, began):
                _shut_down(connection.fileno())
                raise AnswerTimeout("the database did not answer in time")
        self._answered_at = time.monotonic()
        self._hangs = False

    def refuses(self) -> bool:
        """Return whether a wait would be in vain: the database hangs, and no slot is free."""
        if not self._hangs:
            return False
        free = self._slots.acquire(blocking=False)
        if free:
            self._slots.release()
        return not free

    def _is_answered(
        self, poller: "select.poll", connection: psycopg2.extensions.connection, began: float
    ) -> bool:
        """Wait for the next packet, until `answer_timeout` seconds after `began` at most."""
        timeout = getattr(connection, "answer_timeout", None)
        if timeout is None:
            return bool(poller.poll())
        at_first = 0.0 if self._hangs else min(SUSPICION, timeout)
        if poller.poll(at_first * 1000):
            return True
        if self._answered_at < began:
            self._hangs = True
        needs_slot = getattr(connection, "needs_slot", False)
        if needs_slot and not self._slots.acquire(blocking=False):
            return False
        patience = g.database_patience if _in_request() else math.inf
        try:
            until = began + min(timeout, patience)
            return bool(poller.poll(max(0.0, until - time.monotonic()) * 1000))
        finally:
            if needs_slot:
                self._slots.release()
            if _in_request():
                g.database_patience -= time.monotonic() - began


def _shut_down(descriptor: int) -> None:
    """Shut a socket down, so that closing the connection does not wait for the server."""
    with socket.socket(fileno=os.dup(descriptor)) as line, contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)  # fails if it is not connected yet


class Hosts:
    """The hosts of a database URL; `connect` tries one after the other, as libpq does.

    libpq's own limit, `connect_timeout`, has no effect under psycopg2's wait callback: libpq would
    never leave a host that accepts connections and does not answer. The host that was connected to
    last is tried first, so that only one connection waits for the others.
    """

    def __init__(self, limit: WaitLimit) -> None:
        self._limit = limit
        self._first = 0

    def connect(
        self, _dialect: object, _record: object, _args: object, parameters: dict[str, Any]
    ) -> psycopg2.extensions.connection:
        """Return a connection; SQLAlchemy's event `do_connect`.

        With several hosts it is one to a primary, unless target_session_attrs is set. Raises
        psycopg2.OperationalError with the reason of each host after at most CONNECT_TIMEOUT
        seconds.
        """
        kind: type[TimeLimitedConnection] = parameters["connection_factory"]
        if kind.needs_slot and self._limit.refuses():
            # A server that hangs keeps each attempt, and answers all of them when it continues.
            raise AnswerTimeout("the database does not answer")
        hosts = _hosts(parameters)
        deadline = time.monotonic() + CONNECT_TIMEOUT
        reasons = []
        for tried in range(len(hosts)):
            number = (self._first + tried) % len(hosts)
            host = hosts[number]
            # The lookup of a host's name has no time limit, and may have used up all of it.
            timeout = max(0.0, deadline - time.monotonic()) / (len(hosts) - tried)
            factory = functools.partial(kind, timeout)
            try:
                connection: psycopg2.extensions.connection = psycopg2.connect(
                    **host | {"connection_factory": factory}
                )
            except psycopg2.OperationalError as error:
                reasons.append(_reason(error, host))
            else:
                self._first = number
                return connection
        raise psycopg2.OperationalError("; ".join(reasons))

    def drop_read_only_connection(self, context: ExceptionContext) -> None:
        """Close a connection that refuses writes, as after a failover to another server.

        A session stays read-only after its server became a standby, even after the setting that
        made it read-only was reverted. Only a new connection reaches a primary.
        """
        if getattr(context.original_exception, "pgcode", None) == READ_ONLY_TRANSACTION:
            context.is_disconnect = True
            self._first = 0


def is_standby(connection: psycopg2.extensions.connection) -> bool:
    """Return whether a server is a standby, which refuses writes; earlier than 14, it is unknown.

    The server has told so without a statement when it was connected to, and tells when it changes.
    """
    return connection.info.parameter_status("in_hot_standby") == "on"


def _hosts(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parameters for each host, of which libpq separates several with commas."""
    lists = {
        name: str(parameters[name]).split(",")
        for name in ("host", "hostaddr", "port")
        if name in parameters
    }
    count = max(map(len, lists.values()), default=1)
    if count > 1:
        parameters = {"target_session_attrs": "primary"} | parameters
    return [
        parameters | {name: values[number % len(values)] for name, values in lists.items()}
        for number in range(count)
    ]


def _reason(error: psycopg2.Error, host: dict[str, Any]) -> str:
    """Return one line that says why a host cannot be connected to; it names the host."""
    reason, *_ = str(error).strip().split("\n")
    if reason.startswith("connection to server"):  # the local socket
        return reason
    place = f'"{host.get("host", "")}", port {host.get("port") or 5432}'
    return f"connection to server at {place} failed: {reason.removeprefix('FATAL:').strip()}"


def execute_prepared(
    cursor: Any, statement: str, parameters: dict[str, Any], _context: object
) -> bool:
    """Execute a statement as a prepared one, if it can be; return False for SQLAlchemy to do it.

    PostgreSQL takes longer to plan a lookup in two tables than to execute it, and psycopg2 has
    every execution planned. A connection on which prepared statements fail continues without them:
    PgBouncer in transaction mode sends each statement over another connection.
    """
    connection: TimeLimitedConnection = cursor.connection
    if connection.prepared is None or not statement.startswith(_PREPARABLE):
        return False
    try:
        if statement not in connection.prepared:
            connection.prepared[statement] = _prepare(cursor, statement)
        cursor.execute(connection.prepared[statement], parameters)
    except psycopg2.Error as error:
        if error.pgcode not in NOT_PREPARED:
            raise
        connection.prepared = None
        if not connection.autocommit:
            # The transaction is lost. When the request is repeated, no connection may fail again.
            TimeLimitedConnection.prepares_writes = False
            raise
        return False
    return True


def execute_prepared_write(
    cursor: Any, statement: str, parameters: dict[str, Any], context: ExecutionContext
) -> bool:
    """Do the same in a transaction, with a statement that has the execution option `prepare`.

    The text of the other statements depends on how many rows or values they have. Only requests
    prepare them, because they are repeated if that fails (`database.is_repeatable`). Afterwards
    this process prepares none any longer: the connection leads to a pooler, or a type was altered.
    """
    wanted = context.execution_options.get("prepare") and TimeLimitedConnection.prepares_writes
    if not (wanted and _in_request()):
        return False
    return execute_prepared(cursor, statement, parameters, context)


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
