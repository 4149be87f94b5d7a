"""How the service talks to its database: two engines, bounded waits, faults told apart.

`db.session` and `write` write, on the default engine, in transactions. `fetch_one` and `fetch_all`
read, on an engine of their own in AUTOCOMMIT: one round trip where a transaction would take three.
"""

import contextlib
import os
import select
import socket
import sqlite3
import threading
from collections.abc import Sequence
from typing import Any, cast

import flask_migrate
import psycopg2
import psycopg2.extensions
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from flask import Flask
from sqlalchemy import CursorResult, Engine, Executable, Row, event
from sqlalchemy.engine.interfaces import DBAPIConnection, ExceptionContext
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from project.extensions import db, migrate

READ = "read"  # the bind key of the reading engine

POOL_TIMEOUT = 3  # seconds to wait for a connection of the pool
POOL_RECYCLE = 1_800  # seconds a connection lives
SUSPICION = 0.5  # seconds after which PostgreSQL may be hanging
ANSWER_TIMEOUT = 2.0  # seconds to wait for PostgreSQL to connect, or to answer one statement
BUSY_TIMEOUT = 3.0  # seconds to wait for SQLite's lock

READ_ONLY_TRANSACTION = "25006"  # SQLSTATE


class PatientConnection(psycopg2.extensions.connection):
    """A PostgreSQL connection that knows how long one answer may take, in seconds.

    None is for ever: migrations take the time they take.
    """

    answer_timeout: float | None = ANSWER_TIMEOUT


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


def _postgresql_options(pool_size: int) -> dict[str, Any]:
    return {
        "pool_size": pool_size,
        "max_overflow": 0,
        "pool_timeout": POOL_TIMEOUT,
        "pool_recycle": POOL_RECYCLE,
        "pool_use_lifo": True,
        "connect_args": {
            "connection_factory": PatientConnection,
            "application_name": "users-service",
        },
    }


def _sqlite_options(pool_size: int) -> dict[str, Any]:
    return {
        "pool_size": pool_size,
        "max_overflow": 0,
        "pool_timeout": POOL_TIMEOUT,
        "connect_args": {"timeout": BUSY_TIMEOUT},
    }


def init_app(app: Flask) -> None:
    """Bind `db` and `migrate` to `app`: one engine that writes, one that reads."""
    url = app.config["SQLALCHEMY_DATABASE_URI"]
    # As many connections as the server has threads: nobody waits for one who need not.
    pool_size = app.config["GRANIAN_BLOCKING_THREADS"]
    postgresql = url.startswith("postgresql")
    options = _postgresql_options(pool_size) if postgresql else _sqlite_options(pool_size)
    options["hide_parameters"] = True
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options | {"pool_pre_ping": postgresql}
    app.config["SQLALCHEMY_BINDS"] = {
        # What is in no transaction needs no rollback when it goes back to the pool.
        READ: options | {"url": url, "isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None},
    }
    db.init_app(app)
    migrate.init_app(app)
    with app.app_context():
        if postgresql:
            psycopg2.extensions.set_wait_callback(Patience(max(1, pool_size // 2)).wait)
            event.listen(db.engine, "handle_error", _drop_read_only_connections)
        else:
            event.listen(db.engine, "connect", _prepare_sqlite_writer)
            event.listen(db.engine, "begin", _begin_immediate)
            event.listen(db.engines[READ], "connect", _prepare_sqlite)
        if app.config["EMBEDDED_DATABASE"]:
            _migrate_embedded()


def _drop_read_only_connections(context: ExceptionContext) -> None:
    """Take a connection that refuses writes for one to a server that has stepped down.

    A session stays read-only after its server became a standby, or after the setting that made
    it so was taken back: only a new connection finds out.
    """
    if getattr(context.original_exception, "pgcode", None) == READ_ONLY_TRANSACTION:
        context.is_disconnect = True


def _prepare_sqlite(connection: DBAPIConnection, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _prepare_sqlite_writer(connection: sqlite3.Connection, record: object) -> None:
    _prepare_sqlite(connection, record)  # type: ignore[arg-type]  # it is the DBAPI connection
    # The driver begins no transaction by itself, so that DDL is in one too.
    connection.isolation_level = None


def _begin_immediate(connection: Any) -> None:
    """Take SQLite's write lock first: a transaction that upgrades to it later can only fail."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _migrate_embedded() -> None:
    """Bring the service's own database to the newest schema."""
    heads = ScriptDirectory(str(migrate.directory)).get_heads()
    with db.engines[READ].connect() as connection:
        current = MigrationContext.configure(connection).get_current_heads()
    if set(current) != set(heads):
        flask_migrate.upgrade()


def fetch_one(statement: Executable, **parameters: object) -> Row[Any] | None:
    """Return the first row of a reading statement, or None."""
    rows = fetch_all(statement, **parameters)
    return rows[0] if rows else None


def fetch_all(statement: Executable, **parameters: object) -> Sequence[Row[Any]]:
    """Return every row of a reading statement, in one round trip and no transaction.

    The connection is back in the pool before the caller goes on. When it turns out to be dead
    (the database was restarted), the pool is renewed and the statement sent once more.
    """
    engine = db.engines[READ]
    try:
        return _fetch_all(engine, statement, parameters)
    except DBAPIError as error:
        if not error.connection_invalidated or isinstance(error.orig, AnswerTimeout):
            raise
    return _fetch_all(engine, statement, parameters)


def _fetch_all(
    engine: Engine, statement: Executable, parameters: dict[str, object]
) -> Sequence[Row[Any]]:
    with engine.connect() as connection:
        return connection.execute(statement, parameters).all()


def write(statement: Executable) -> int:
    """Execute a writing statement in the transaction of `db.session`; return how many rows it hit.

    The caller commits.
    """
    return cast(CursorResult[Any], db.session.execute(statement)).rowcount


def is_unavailable(error: Exception) -> bool:
    """Tell whether `error` means that the database is away, full or takes no writes.

    All else that SQLAlchemy raises is a mistake of ours.
    """
    return isinstance(error, OperationalError | InterfaceError | InternalError | PoolTimeout)
