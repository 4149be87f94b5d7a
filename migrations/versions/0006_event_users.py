"""Events reference users with foreign keys: deleting a user sets them to NULL.

Revision ID: 0006
Revises: 0005

The table `erasures` of 0005 is no longer used. It stays until no server of the version before runs
any more; a later migration drops it.
"""

import logging

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

log = logging.getLogger("alembic.runtime.migration")

# Events of users who were deleted, where the version before had not got round to all of them.
DELETED_USERS = """
    UPDATE events SET user_id = NULL, session_id = NULL,
        ip = CASE WHEN actor_id IS NOT NULL THEN ip END,
        user_agent = CASE WHEN actor_id IS NOT NULL THEN user_agent ELSE '' END,
        request_id = CASE WHEN actor_id IS NOT NULL THEN request_id END
    WHERE user_id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM users WHERE users.id = events.user_id)
"""
DELETED_ACTORS = """
    UPDATE events SET actor_id = NULL, ip = NULL, user_agent = '', request_id = NULL
    WHERE actor_id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM users WHERE users.id = events.actor_id)
"""


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        reference_users()
        return
    op.execute(DELETED_USERS)
    op.execute(DELETED_ACTORS)
    with op.batch_alter_table("events", copy_from=events()) as batch:
        for column in ("user_id", "actor_id"):
            batch.create_foreign_key(
                f"events_{column}_fkey", "users", [column], ["id"], ondelete="SET NULL"
            )


def reference_users() -> None:
    """Add the foreign keys on PostgreSQL: for new rows, and then for those that are there.

    Only the first step keeps requests from writing, for a moment. Each step can be repeated.
    """
    # In the order in which requests lock them.
    op.execute("LOCK TABLE users, events IN SHARE ROW EXCLUSIVE MODE")
    for column in ("user_id", "actor_id"):
        name = f"events_{column}_fkey"
        op.execute(
            f"ALTER TABLE events DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name}"
            f" FOREIGN KEY ({column}) REFERENCES users (id) ON DELETE SET NULL NOT VALID"
        )
    with op.get_context().autocommit_block():
        log.info("Looking for the events of deleted users")
        op.execute(DELETED_USERS)
        op.execute(DELETED_ACTORS)
        log.info("Checking the foreign keys of the events")
        for column in ("user_id", "actor_id"):
            op.execute(f"ALTER TABLE events VALIDATE CONSTRAINT events_{column}_fkey")


def downgrade() -> None:
    foreign_keys = [
        sa.ForeignKeyConstraint(
            [column], ["users.id"], name=f"events_{column}_fkey", ondelete="SET NULL"
        )
        for column in ("user_id", "actor_id")
    ]
    with op.batch_alter_table("events", copy_from=events(*foreign_keys)) as batch:
        for foreign_key in foreign_keys:
            batch.drop_constraint(foreign_key.name, type_="foreignkey")


def events(*foreign_keys: sa.ForeignKeyConstraint) -> sa.Table:
    """Return the table as it is before; SQLite adds no constraint, but copies the table."""
    there = sa.text("actor_id IS NOT NULL")
    return sa.Table(
        "events",
        sa.MetaData(),
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=True),
        sa.Column("actor_id", sa.Integer(), nullable=True),
        sa.Column("session_id", sa.String(22), nullable=True),
        sa.Column("ip", sa.String(64), nullable=True),
        sa.Column("user_agent", sa.String(512), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="events_pkey"),
        sa.Index("events_user_id_created_at_id_idx", "user_id", "created_at", "id"),
        sa.Index("events_created_at_id_idx", "created_at", "id"),
        sa.Index(
            "events_actor_id_created_at_id_idx", "actor_id", "created_at", "id", sqlite_where=there
        ),
        *foreign_keys,
    )
