"""Run the migrations on the database of the application.

On PostgreSQL each migration is a transaction of its own, so that requests wait for one at most.
Migrations build indexes on tables with rows CONCURRENTLY, outside of any transaction.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from alembic import context
from flask import current_app
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import OperationalError

from project import models  # noqa: F401  # registers the tables in the metadata
from project.extensions import db
from project.lib import database

# An arbitrary number, which identifies the lock that concurrent migrations wait for.
ADVISORY_LOCK = 7_201_712
# A statement that waits for a table lock blocks all later statements on that table, so it gives up
# early. The migration is undone, and tried again when those statements have been executed.
LOCK_TIMEOUT = "300ms"
LOCK_ATTEMPTS = 10
LOCK_PAUSE = 2.0  # seconds
LOCK_NOT_AVAILABLE = "55P03"  # SQLSTATE
TURN_PAUSE = 0.5  # seconds between two attempts to get ADVISORY_LOCK

log = structlog.get_logger()


def run_offline() -> None:
    """Print the SQL statements instead of executing them."""
    context.configure(
        dialect_name=db.engine.dialect.name, target_metadata=db.metadata, literal_binds=True
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Run the migrations. One that fails is undone, and can be run again; those before it stay.

    Concurrent processes take turns, and the second finds the migrations done. On SQLite all
    migrations are one transaction, which takes the write lock at its begin
    (project/lib/database.py); on PostgreSQL processes take an advisory lock.
    """
    with db.engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            # A migration can take longer than a request.
            connection.connection.dbapi_connection.answer_timeout = None
            event.listen(connection, "begin", limit_locks)
            try:
                with turn():
                    run_until_locked(connection)
            finally:
                connection.invalidate()
        else:
            with connection.begin():
                run(connection)


@contextmanager
def turn() -> Iterator[None]:
    """Wait for the advisory lock, and keep it.

    It belongs to a transaction, because PgBouncer may give each transaction another session. The
    attempts are transactions of their own: one that waited would be waited for by an index that is
    built CONCURRENTLY.
    """
    taken = text("SELECT pg_try_advisory_xact_lock(:key)")
    with db.engine.connect() as connection:
        while not connection.scalar(taken, {"key": ADVISORY_LOCK}):
            connection.rollback()
            time.sleep(TURN_PAUSE)
        yield


def limit_locks(connection: Connection) -> None:
    """Limit how long the statements of a transaction wait for locks.

    Outside of a transaction this does nothing: what runs there lets requests pass while it waits.
    """
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")


def run_until_locked(connection: Connection) -> None:
    """Run the migrations; go on after a pause if a table stays locked for LOCK_TIMEOUT."""
    for attempt in range(1, LOCK_ATTEMPTS + 1):
        try:
            run(connection)
        except OperationalError as error:
            locked = database.sqlstate(error) == LOCK_NOT_AVAILABLE
            if not locked or attempt == LOCK_ATTEMPTS:
                raise
            connection.rollback()
            log.warning("migration_waits_for_lock", attempt=attempt, attempts=LOCK_ATTEMPTS)
            time.sleep(LOCK_PAUSE)
        else:
            return


def run(connection: Connection) -> None:
    """Run the migrations on a connection; a transaction that has begun contains all of them."""
    options = current_app.extensions["migrate"].configure_args
    context.configure(
        connection=connection,
        target_metadata=db.metadata,
        transactional_ddl=True,
        transaction_per_migration=True,
        **options,
    )
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
