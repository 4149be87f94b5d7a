"""Run the migrations on the database of the application, all in one transaction."""

from alembic import context
from flask import current_app
from sqlalchemy import text

from project import models  # noqa: F401  # registers the tables in the metadata
from project.extensions import db

# An arbitrary number, which identifies the lock that concurrent migrations wait for.
ADVISORY_LOCK = 7_201_712
# A statement that waits for a table lock blocks all later statements on that table. A migration
# gives up after this time, and can be run again.
LOCK_TIMEOUT = "2s"


def run_offline() -> None:
    """Print the SQL statements instead of executing them."""
    context.configure(
        dialect_name=db.engine.dialect.name, target_metadata=db.metadata, literal_binds=True
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Run the migrations; after a failure the schema is unchanged.

    Concurrent processes take turns, and the second finds the migrations done. On SQLite each waits
    for the write lock, which a transaction takes at its begin (project/lib/database.py), on
    PostgreSQL for an advisory lock.
    """
    with db.engine.connect() as connection:
        postgresql = connection.dialect.name == "postgresql"
        if postgresql:
            # A migration can take longer than a request.
            connection.connection.dbapi_connection.answer_timeout = None
        try:
            with connection.begin():
                if postgresql:
                    connection.execute(
                        text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK}
                    )
                    connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
                options = current_app.extensions["migrate"].configure_args
                context.configure(
                    connection=connection,
                    target_metadata=db.metadata,
                    transactional_ddl=True,
                    **options,
                )
                with context.begin_transaction():
                    context.run_migrations()
        finally:
            if postgresql:
                connection.invalidate()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
