"""Run the migrations on the application's own database, all of them in one transaction."""

from alembic import context
from flask import current_app
from sqlalchemy import text

from project.api import models  # noqa: F401  # fills the metadata
from project.extensions import db

# Migrations that start together take turns: any number will do, as long as it is always this one.
ADVISORY_LOCK = 7_201_712
# Whoever waits for a lock on a table stops everybody behind it: rather give up, and be run again.
LOCK_TIMEOUT = "2s"


def run_offline() -> None:
    """Print the statements instead of running them."""
    context.configure(
        dialect_name=db.engine.dialect.name, target_metadata=db.metadata, literal_binds=True
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Run the migrations; a failure leaves the schema as it was.

    On SQLite the transaction takes the write lock when it begins (project/database.py), on
    PostgreSQL an advisory lock: of two processes the second finds the work done.
    """
    with db.engine.connect() as connection:
        postgresql = connection.dialect.name == "postgresql"
        if postgresql:
            # A migration may take its time.
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
