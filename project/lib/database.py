"""How the service talks to its database: its engines, its schema, and what their faults mean.

`db.session` and `write` write, on the default engine, in transactions. `fetch_one` and `fetch_all`
read, on an engine of their own in AUTOCOMMIT: one round trip where a transaction would take three.
A third one with a single connection is there for who asks how the database is (`probe`).
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import cache
from typing import Any, TypeVar, cast

import flask_migrate
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from flask import Flask
from sqlalchemy import Connection, CursorResult, Engine, Executable, Row, Table, event, inspect
from sqlalchemy.dialects.postgresql import Insert as PostgresqlInsert
from sqlalchemy.dialects.sqlite import Insert as SqliteInsert
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from project import metrics, postgresql
from project.extensions import db, migrate

T = TypeVar("T")

READ = "read"  # the bind key of the reading engine
PROBE = "probe"  # and of the one that no request waits for, nor takes a connection from

POOL_TIMEOUT = 3  # seconds to wait for a connection of the pool
POOL_RECYCLE = 1_800  # seconds a connection lives
BUSY_TIMEOUT = 3.0  # seconds to wait for SQLite's lock
STREAMED_AT_ONCE = 2_000  # rows


def _postgresql_options(pool_size: int) -> dict[str, Any]:
    return {
        "pool_size": pool_size,
        "max_overflow": 0,
        "pool_timeout": POOL_TIMEOUT,
        "pool_recycle": POOL_RECYCLE,
        "pool_use_lifo": True,
        "connect_args": {
            "connection_factory": postgresql.PatientConnection,
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


def _reading(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the engine that reads, in no transaction that would need a rollback."""
    connect_args = dict(options["connect_args"])
    if "connection_factory" in connect_args:
        # A plan that was made while the tables were small has to be good when they are large.
        connect_args["options"] = "-c enable_seqscan=off"
    return options | {
        "isolation_level": "AUTOCOMMIT",
        "pool_reset_on_return": None,
        "connect_args": connect_args,
    }


class Schema(Enum):
    """How the schema of a database compares with the one that this code was written for."""

    BEHIND = "behind"
    CURRENT = "current"
    AHEAD = "ahead"  # newer code has migrated it, and has left the tables that this code knows
    FOREIGN = "foreign"  # somebody has migrated it to something else


USABLE = {Schema.CURRENT, Schema.AHEAD}


def init_app(app: Flask) -> None:
    """Bind `db` and `migrate` to `app`: engines that write, read and probe."""
    url = app.config["SQLALCHEMY_DATABASE_URI"]
    # As many connections as the server has threads: nobody waits for one who need not.
    pool_size = app.config["GRANIAN_BLOCKING_THREADS"]
    on_postgresql = url.startswith("postgresql")
    options = _postgresql_options(pool_size) if on_postgresql else _sqlite_options(pool_size)
    options["hide_parameters"] = True
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options | {"pool_pre_ping": on_postgresql}
    app.config["SQLALCHEMY_BINDS"] = {
        READ: _reading(options) | {"url": url},
        PROBE: _reading(options) | {"url": url, "pool_size": 1},
    }
    db.init_app(app)
    migrate.init_app(app)
    with app.app_context():
        if on_postgresql:
            postgresql.be_patient(max(1, pool_size // 2))
            event.listen(db.engine, "handle_error", postgresql.drop_read_only_connections)
            event.listen(db.engines[READ], "do_execute", postgresql.execute_prepared)
        else:
            event.listen(db.engine, "connect", _prepare_sqlite_writer)
            event.listen(db.engine, "begin", _begin_immediate)
            event.listen(db.engines[READ], "connect", _prepare_sqlite)
        for name, engine in (("write", db.engine), (READ, db.engines[READ])):
            metrics.of(app).watch(engine, name, pool_size)
        if app.config["EMBEDDED_DATABASE"]:
            _migrate_embedded()


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
    if schema(db.engines[READ]) not in USABLE:
        flask_migrate.upgrade()


def schema(engine: Engine) -> Schema:
    """Tell what the schema of the database behind `engine` is to this code."""
    return ask(engine, _schema)


def _schema(connection: Connection) -> Schema:
    """As `schema`.

    While the service is brought to a newer version, its database is migrated first: a revision that
    is not among ours is a newer one, if the tables are there that this code works with.
    """
    heads, known = revisions()
    found = set(MigrationContext.configure(connection).get_current_heads())
    if found >= heads:
        return Schema.CURRENT
    if not found or found & known:
        return Schema.BEHIND
    tables = inspect(connection).get_table_names()
    return Schema.AHEAD if set(db.metadata.tables) <= set(tables) else Schema.FOREIGN


@cache
def revisions() -> tuple[frozenset[str], frozenset[str]]:
    """Return the newest revisions of the schema that this code has, and all of them."""
    scripts = ScriptDirectory(str(migrate.directory))
    known = frozenset(script.revision for script in scripts.walk_revisions())
    return frozenset(scripts.get_heads()), known


def fetch_one(statement: Executable, **parameters: object) -> Row[Any] | None:
    """Return the first row of a reading statement, or None."""
    rows = fetch_all(statement, **parameters)
    return rows[0] if rows else None


def fetch_all(statement: Executable, **parameters: object) -> Sequence[Row[Any]]:
    """Return every row of a reading statement, in one round trip and no transaction.

    The connection is back in the pool before the caller goes on. When it turns out to be dead
    (the database was restarted), the pool is renewed and the statement sent once more.
    """
    return ask(db.engines[READ], lambda connection: connection.execute(statement, parameters).all())


def ask(engine: Engine, question: Callable[[Connection], T]) -> T:
    """Return what `question` reads; it is put a second time when the connection was dead."""
    try:
        with engine.connect() as connection:
            return question(connection)
    except DBAPIError as error:
        if not error.connection_invalidated or isinstance(error.orig, postgresql.AnswerTimeout):
            raise
    with engine.connect() as connection:
        return question(connection)


def stream(statement: Executable) -> Iterator[Row[Any]]:
    """Yield the rows of a reading statement, all as of one moment, however many there are.

    On PostgreSQL that takes a cursor and so a transaction; one on SQLite would keep writers out.
    """
    engine = db.engine if is_postgresql() else db.engines[READ]
    with engine.connect() as connection:
        rows = connection.execution_options(yield_per=STREAMED_AT_ONCE).execute(statement)
        yield from rows


def insert(table: Table) -> PostgresqlInsert | SqliteInsert:
    """Return an INSERT that knows ON CONFLICT, which both databases spell alike."""
    return PostgresqlInsert(table) if is_postgresql() else SqliteInsert(table)


def is_postgresql() -> bool:
    """Tell which of the two databases it is."""
    return db.engine.dialect.name == "postgresql"


def wait_longer(seconds: float) -> None:
    """Have this process wait so long for an answer of PostgreSQL, as a command may."""
    postgresql.PatientConnection.answer_timeout = seconds


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
