"""What psycopg2 lacks for a service: bounded waits, and statements that are planned once.

Both are PostgreSQL's and the driver's matters; project/database.py puts them to use.
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

SUSPICION = 0.5  # seconds after which PostgreSQL may be hanging
ANSWER_TIMEOUT = 2.0  # seconds to wait for PostgreSQL to connect, or to answer one statement

# SQLSTATEs, https://www.postgresql.org/docs/current/errcodes-appendix.html
READ_ONLY_TRANSACTION = "25006"
# What an EXECUTE or a PREPARE meets where connections are pooled by somebody else, or after a
# table was altered: no such statement; there is one already; its result is not what it was.
NOT_PREPARED = {"26000", "42P05", "0A000"}

_PLACEHOLDER = re.compile(r"%\((\w+)\)s|%%")


class PatientConnection(psycopg2.extensions.connection):
    """A connection that knows how long one answer may take, in seconds, and what it has prepared.

    A timeout of None is for ever: migrations take the time they take.
    """

    answer_timeout: float | None = ANSWER_TIMEOUT

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Connect as psycopg2 does, with nothing prepared yet."""
        super().__init__(*args, **kwargs)
        # EXECUTEs by the SELECT they stand for; None where preparing does not work.
        self.prepared: dict[str, str] | None = {}


class AnswerTimeout(psycopg2.OperationalError):
    """PostgreSQL did not answer in time; the connection has been cut."""


class Patience:
    """How long, and how many at once, wait for PostgreSQL.

    libpq by itself waits for ever on a server that hangs but whose machine still acknowledges.
    psycopg2 calls this in place of that wait, for the connect as for every statement:
    https://www.psycopg.org/docs/advanced.html#support-for-coroutine-libraries
    """

    def __init__(self, places: int) -> None:
        self._places = threading.BoundedSemaphore(places)

    def wait(self, connection: psycopg2.extensions.connection) -> None:
        """Wait until libpq has the answer; raises AnswerTimeout when its time is over.

        After SUSPICION seconds only so many go on waiting: threads that do not need the database
        stay free while it hangs.
        """
        timeout = getattr(connection, "answer_timeout", None)
        while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
            poller = select.poll()
            reading = state == psycopg2.extensions.POLL_READ
            poller.register(connection.fileno(), select.POLLIN if reading else select.POLLOUT)
            if not (poller.poll(SUSPICION * 1000) or self._wait_longer(poller, timeout)):
                _cut(connection.fileno())
                raise AnswerTimeout("the database did not answer in time")

    def _wait_longer(self, poller: "select.poll", timeout: float | None) -> bool:
        """Wait for what is left of `timeout` seconds, if there is a place to; None is for ever."""
        if timeout is None:
            return bool(poller.poll())
        if not self._places.acquire(blocking=False):
            return False
        try:
            return bool(poller.poll(max(0.0, timeout - SUSPICION) * 1000))
        finally:
            self._places.release()


def _cut(descriptor: int) -> None:
    """Shut a socket down: what then closes the connection finds nothing left to wait for."""
    with socket.socket(fileno=os.dup(descriptor)) as line, contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)  # refused where it was not even connected yet


def be_patient(places: int) -> None:
    """Let every connection of this process wait as `Patience` says."""
    psycopg2.extensions.set_wait_callback(Patience(places).wait)


def drop_read_only_connections(context: ExceptionContext) -> None:
    """Take a connection that refuses writes for one to a server that has stepped down.

    A session stays read-only after its server became a standby, or after the setting that made
    it so was taken back: only a new connection finds out.
    """
    if getattr(context.original_exception, "pgcode", None) == READ_ONLY_TRANSACTION:
        context.is_disconnect = True


def execute_prepared(
    cursor: Any, statement: str, parameters: dict[str, Any], _context: object
) -> bool:
    """Execute a SELECT as a prepared statement; return False to have it executed as it is.

    PostgreSQL takes longer to plan a lookup in two tables than to do it, and psycopg2 leaves the
    planning to every execution. Where preparing turns out not to work (PgBouncer in transaction
    mode hands each statement to another connection) this connection goes on without.
    """
    connection: PatientConnection = cursor.connection
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
    """Prepare a statement with psycopg2's named placeholders; return the EXECUTE with the same."""
    names: dict[str, int] = {}

    def number(placeholder: re.Match[str]) -> str:
        if placeholder[1] is None:
            return "%"
        return f"${names.setdefault(placeholder[1], len(names) + 1)}"

    query = _PLACEHOLDER.sub(number, statement)
    # The same name means the same text, on whatever connection it is met.
    name = f"q_{hashlib.sha256(query.encode()).hexdigest()[:32]}"
    cursor.execute(f"PREPARE {name} AS {query}")
    arguments = ", ".join(f"%({name})s" for name in names)
    return f"EXECUTE {name} ({arguments})" if names else f"EXECUTE {name}"
