"""account administration: indexes for the search by prefix and for admins, erasures

Revision ID: 0005
Revises: 0004

On PostgreSQL the indexes are built while requests use the tables.
"""

import logging
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

log = logging.getLogger("alembic.runtime.migration")


def upgrade() -> None:
    create_index(
        "users_admins_idx",
        "users",
        ["id"],
        postgresql_where=sa.text("active AND admin"),
        sqlite_where=sa.text("active = 1 AND admin = 1"),
    )
    create_index(
        op.f("events_actor_id_created_at_id_idx"),
        "events",
        ["actor_id", "created_at", "id"],
        postgresql_where=sa.text("actor_id IS NOT NULL"),
        sqlite_where=sa.text("actor_id IS NOT NULL"),
    )
    order_names_by("C")
    op.create_table(
        "erasures",
        sa.Column("user_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("erased_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("user_id", name=op.f("erasures_pkey")),
    )


def order_names_by(collation: str) -> None:
    """Set the collation of usernames and emails on PostgreSQL; SQLite always compares bytes.

    ALTER COLUMN rebuilds the indexes of a column while it locks the table, except those that have
    the new collation already. So these are built before, and then replace the others.
    """
    if op.get_context().dialect.name != "postgresql":
        return
    lengths = {"username_key": 512, "email": 128}
    for column in lengths:
        ordered = sa.text(f'{column} COLLATE "{collation}"')
        create_index(f"users_{column}_new", "users", [ordered], unique=True)
    for action in (
        "DROP CONSTRAINT users_{column}_key",
        'ALTER {column} TYPE VARCHAR({length}) COLLATE "{collation}"',
        "ADD CONSTRAINT users_{column}_key UNIQUE USING INDEX users_{column}_new",
    ):
        actions = [
            action.format(column=column, length=length, collation=collation)
            for column, length in lengths.items()
        ]
        op.execute(f"ALTER TABLE users {', '.join(actions)}")


def create_index(name: str, table: str, columns: list[Any], **options: Any) -> None:
    """Create an index, on PostgreSQL without keeping requests from the table.

    An attempt that failed may have left the index, whole or invalid.
    """
    context = op.get_context()
    if context.dialect.name != "postgresql":
        op.create_index(name, table, columns, **options)
        return
    log.info("Building the index %s", name)
    with context.autocommit_block():
        invalid = sa.text(
            "SELECT true FROM pg_index WHERE indexrelid = to_regclass(:name) AND NOT indisvalid"
        )
        if not context.as_sql and op.get_bind().scalar(invalid, {"name": name}):
            op.execute(f"DROP INDEX CONCURRENTLY {name}")
        op.create_index(
            name, table, columns, if_not_exists=True, postgresql_concurrently=True, **options
        )


def downgrade() -> None:
    op.drop_table("erasures")
    op.drop_index(op.f("events_actor_id_created_at_id_idx"), table_name="events")
    op.drop_index("users_admins_idx", table_name="users")
    order_names_by("default")
