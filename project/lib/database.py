"""The database: its engines, the state of its schema, and the meaning of its errors.

`db.session` and `write` use the default engine, in transactions. `fetch_one` and `fetch_all` use an
engine in AUTOCOMMIT: one round trip where a transaction takes three. Nearly all of their statements
read. A third engine with a single connection serves readiness probes.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import cache
from typing import Any, TypeVar, TypeVarTuple, cast

import flask_migrate
import psycopg2.extensions
import structlog
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from flask import Flask, g
from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    CursorResult,
    Engine,
    Executable,
    Row,
    Table,
    delete,
    event,
    func,
    inspect,
    make_url,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import Insert as PostgresqlInsert
from sqlalchemy.dialects.sqlite import Insert as SqliteInsert
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from project.errors import ConfigurationError
from project.extensions import db, migrate
from project.lib import metrics, postgresql

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = structlog.get_logger()

# Bind keys of Flask-SQLAlchemy.
READ = "read"
PROBE = "probe"  # for readiness; requests do not use it

POOL_TIMEOUT = 2  # seconds to wait for a connection of the pool
POOL_RECYCLE = 1_800  # seconds a connection lives
BUSY_TIMEOUT = 3.0  # seconds to wait for SQLite's lock
STREAMED_AT_ONCE = 2_000  # rows
DELETED_AT_ONCE = 1_000  # rows


def _postgresql_options(pool_size: int) -> dict[str, Any]:
    return {
        "pool_size": pool_size,
        "max_overflow": 0,
        "pool_timeout": POOL_TIMEOUT,
        "pool_recycle": POOL_RECYCLE,
        "pool_use_lifo": True,
        "connect_args": {
            "connection_factory": postgresql.TimeLimitedConnection,
        },
    }


def _sqlite_options(pool_size: int) -> dict[str, Any]:
    return {
        "pool_size": pool_size,
        "max_overflow": 0,
        "pool_timeout": BUSY_TIMEOUT,  # a connection waits for the lock
        "connect_args": {"timeout": BUSY_TIMEOUT},
    }


def _reading(options: dict[str, Any], url: URL) -> dict[str, Any]:
    """Return the options of an engine in AUTOCOMMIT, and so without rollbacks."""
    connect_args = dict(options["connect_args"])
    if "connection_factory" in connect_args:
        # A plan made while a table is small must be good when the table is large. The only writes
        # are counts of attempts, which wait neither for the disk nor for a standby: a crash of
        # PostgreSQL may lose those of the last second.
        given = url.query.get("options") or os.environ.get("PGOPTIONS", "")
        connect_args["options"] = f"-c enable_seqscan=off -c synchronous_commit=off {given}"
    return options | {
        "isolation_level": "AUTOCOMMIT",
        "pool_reset_on_return": None,
        "connect_args": connect_args,
    }


class Schema(Enum):
    """The schema of a database, compared with the schema that this code was written for."""

    BEHIND = "behind"
    CURRENT = "current"
    AHEAD = "ahead"  # migrated by newer code; the tables and columns of this code exist
    FOREIGN = "foreign"  # migrated by other software


USABLE = {Schema.CURRENT, Schema.AHEAD}
FOREIGN_SCHEMA = (
    "The database is at a migration that this version does not know, and tables or columns that it"
    " needs are missing. Is DATABASE_URL another program's?"
)


def init_app(app: Flask, *, application_name: str) -> None:
    """Bind `db` and `migrate` to `app`: engines that write, read and probe.

    PostgreSQL shows `application_name` in pg_stat_activity.
    """
    url = make_url(app.config["SQLALCHEMY_DATABASE_URI"])
    # Each of the two pools has as many connections as the process has slots to hash.
    pool_size = app.config["GRANIAN_BLOCKING_THREADS"]
    on_postgresql = url.drivername.startswith("postgresql")
    options = _postgresql_options(pool_size) if on_postgresql else _sqlite_options(pool_size)
    if on_postgresql:
        options["connect_args"]["fallback_application_name"] = application_name
    options["hide_parameters"] = True
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options | {"pool_pre_ping": on_postgresql}
    probing = _reading(options, url) | {"pool_size": 1}
    if on_postgresql:
        probing["connect_args"]["connection_factory"] = postgresql.ProbeConnection
    app.config["SQLALCHEMY_BINDS"] = {
        READ: _reading(options, url) | {"url": url},
        PROBE: probing | {"url": url},
    }
    db.init_app(app)
    migrate.init_app(app)
    with app.app_context():
        if on_postgresql:
            limit = postgresql.WaitLimit(max(1, pool_size // 2))
            psycopg2.extensions.set_wait_callback(limit.wait)
            hosts = postgresql.Hosts(limit)
            for engine in db.engines.values():
                event.listen(engine, "do_connect", hosts.connect)
                event.listen(engine, "handle_error", hosts.drop_read_only_connection)
            event.listen(db.engine, "commit", _note_commit)
            event.listen(db.engine, "do_execute", postgresql.execute_prepared_write)
            event.listen(db.engines[READ], "do_execute", postgresql.execute_prepared)
        else:
            event.listen(db.engine, "connect", _prepare_sqlite_writer)
            event.listen(db.engine, "begin", _begin_immediate)
            event.listen(db.engines[READ], "connect", _prepare_sqlite)
        for name, engine in (("write", db.engine), (READ, db.engines[READ])):
            metrics.of(app).watch(engine, name, pool_size)
        if app.config["EMBEDDED_DATABASE"]:
            upgrade()


def _prepare_sqlite(connection: DBAPIConnection, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _prepare_sqlite_writer(connection: sqlite3.Connection, record: object) -> None:
    _prepare_sqlite(connection, record)  # type: ignore[arg-type]  # it is the DBAPI connection
    # The driver begins no transactions: `_begin_immediate` does, so that DDL is in one too.
    connection.isolation_level = None


def _begin_immediate(connection: Any) -> None:
    """Take SQLite's write lock at once: a transaction that upgrades to it later may fail."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def upgrade() -> None:
    """Migrate the database to the schema of this code, unless newer code has migrated it further.

    Raises ConfigurationError if other software has migrated it.
    """
    match schema(db.engines[PROBE]):  # READ would prepare the statements that inspect it
        case Schema.BEHIND:
            flask_migrate.upgrade()
        case Schema.AHEAD:
            log.warning("schema_is_newer")
        case Schema.FOREIGN:
            raise ConfigurationError(FOREIGN_SCHEMA)


def schema(engine: Engine) -> Schema:
    """Compare the schema of the database of `engine` with that of this code."""
    return run(engine, _schema)


def is_standby(engine: Engine) -> bool:
    """Return whether the database of `engine` is a standby of PostgreSQL, which refuses writes.

    It costs no statement. A connection to a standby is closed: a new one may reach a primary.
    """
    if engine.dialect.name != "postgresql":
        return False
    with engine.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
        standby = postgresql.is_standby(raw)
        if standby:
            connection.invalidate()
    return standby


def _schema(connection: Connection) -> Schema:
    """Do what `schema` does.

    In an upgrade the database is migrated before the code is replaced. So an unknown revision is
    a newer one if the tables and columns of this code exist.
    """
    heads, known = revisions()
    found = set(MigrationContext.configure(connection).get_current_heads())
    if found >= heads:
        return Schema.CURRENT
    if not found or found & known:
        return Schema.BEHIND
    there = {
        (table, column["name"])
        for (_, table), columns in inspect(connection).get_multi_columns().items()
        for column in columns
    }
    needed = {
        (table.name, column.name) for table in db.metadata.sorted_tables for column in table.c
    }
    return Schema.AHEAD if needed <= there else Schema.FOREIGN


@cache
def revisions() -> tuple[frozenset[str], frozenset[str]]:
    """Return the newest revisions of the schema that this code knows, and all revisions."""
    scripts = ScriptDirectory(str(migrate.directory))
    known = frozenset(script.revision for script in scripts.walk_revisions())
    return frozenset(scripts.get_heads()), known


def fetch_one(statement: Executable, **parameters: object) -> Row[Any] | None:
    """Return the first row of a statement that reads, or that writes in AUTOCOMMIT; or None."""
    rows = fetch_all(statement, **parameters)
    return rows[0] if rows else None


def count(statement: Executable, **parameters: object) -> int:
    """Return the number that a reading statement counts."""
    row = fetch_one(statement, **parameters)
    return int(row[0]) if row else 0


def fetch_all(statement: Executable, **parameters: object) -> Sequence[Row[Any]]:
    """Return every row of a statement, in one round trip and no transaction.

    The connection is back in the pool when this returns. If the connection is dead, as after a
    restart of the database, the pool is renewed and the statement is sent once more.
    """
    return run(db.engines[READ], lambda connection: connection.execute(statement, parameters).all())


def run(engine: Engine, query: Callable[[Connection], T]) -> T:
    """Return the result of `query`, a statement that may be executed twice.

    It runs a second time after an error that is transient.
    """
    try:
        with engine.connect() as connection:
            return query(connection)
    except DBAPIError as error:
        if not _is_transient(error):
            raise
    with engine.connect() as connection:
        return query(connection)


def stream(statement: Executable) -> Iterator[Row[Any]]:
    """Yield the rows of a reading statement as of one moment, without loading all of them.

    PostgreSQL needs a cursor for that, and so a transaction. On SQLite a transaction would block
    writers.
    """
    engine = db.engine if is_postgresql() else db.engines[READ]
    with engine.connect() as connection:
        rows = connection.execution_options(yield_per=STREAMED_AT_ONCE).execute(statement)
        yield from rows


def insert(table: Table) -> PostgresqlInsert | SqliteInsert:
    """Return an INSERT with ON CONFLICT, which both databases support."""
    return PostgresqlInsert(table) if is_postgresql() else SqliteInsert(table)


def built_once(build: Callable[[*Ts], T]) -> Callable[[*Ts], T]:
    """Keep what `build` returns, a statement made with `insert`, for each database."""
    built = cache(lambda _dialect, *arguments: build(*arguments))
    return lambda *arguments: built(db.engine.dialect.name, *arguments)


def is_postgresql() -> bool:
    """Return whether the database is PostgreSQL; otherwise it is SQLite."""
    return db.engine.dialect.name == "postgresql"


def set_answer_timeout(seconds: float) -> None:
    """Set how long this process waits for an answer of PostgreSQL; commands wait longer."""
    postgresql.TimeLimitedConnection.answer_timeout = seconds


def write(statement: Executable, **parameters: object) -> int:
    """Execute a writing statement in the transaction of `db.session`; return the row count.

    The caller commits.
    """
    return cast(CursorResult[Any], db.session.execute(statement, parameters)).rowcount


def lock(name: str) -> None:
    """Wait until no other transaction has the lock `name`, and keep it until this one is over.

    On SQLite every transaction that `db.session` begins excludes all others.
    """
    if is_postgresql():
        db.session.execute(select(func.pg_advisory_xact_lock(func.hashtext(name))))


def delete_batch(table: Table, expired: ColumnElement[bool], order: ColumnElement[Any]) -> int:
    """Delete at most DELETED_AT_ONCE rows that match `expired`; return how many, 0 at the end.

    The batch keeps the time short for which rows are locked. Rows that another transaction has
    locked are skipped, so that nothing waits and no deadlock arises. `order` is an indexed column:
    without it PostgreSQL may read the whole table to find the last rows. The caller commits.
    """
    key = list(table.primary_key)
    batch = select(*key).where(expired).order_by(order).limit(DELETED_AT_ONCE)
    return write(delete(table).where(tuple_(*key).in_(batch.with_for_update(skip_locked=True))))


def is_unavailable(error: Exception) -> bool:
    """Return whether `error` means that the database is unreachable, full or read-only.

    Every other error of SQLAlchemy is a fault of this code.
    """
    return isinstance(error, OperationalError | InterfaceError | InternalError | PoolTimeout)


def is_repeatable(error: DBAPIError) -> bool:
    """Return whether the present request may be repeated after `error`, as if it had not begun.

    PostgreSQL has rolled back a transaction that it cancelled, or whose connection ended, before
    COMMIT was sent. If the request has sent a COMMIT, something of it may be stored: the
    transaction whose COMMIT got no answer, or an earlier one. Then the client has to find out.
    What is written in AUTOCOMMIT, the count of an attempt, is counted again.
    """
    return _is_transient(error) and not g.get("commit_sent", False)


def _is_transient(error: DBAPIError) -> bool:
    """Return whether the same statements may succeed on another connection.

    They may if PostgreSQL cancelled the transaction, and if the connection was dead, refused writes
    or has lost its prepared statements. A timeout is left to the client: another one would take too
    long.
    """
    dead = error.connection_invalidated and not isinstance(error.orig, postgresql.AnswerTimeout)
    return dead or is_unprepared(error) or sqlstate(error) in postgresql.CANCELLED


def is_unprepared(error: DBAPIError) -> bool:
    """Return whether a prepared statement does not exist on its connection, or not as it was."""
    return sqlstate(error) in postgresql.NOT_PREPARED


def _note_commit(_connection: Connection) -> None:
    if g:
        g.commit_sent = True


def sqlstate(error: SQLAlchemyError) -> str | None:
    """Return PostgreSQL's code of `error`, or None if it has none."""
    return getattr(getattr(error, "orig", None), "pgcode", None)


def describe(error: SQLAlchemyError) -> str:
    """Return one line about `error` for operators; of a failed connection it names the host."""
    line, *_ = str(getattr(error, "orig", None) or error).strip().split("\n")
    return line
