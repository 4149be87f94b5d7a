"""account administration: indexes for the search by prefix and for admins, erasures

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    order_names_by("C")
    op.create_index(
        "users_admins_idx",
        "users",
        ["id"],
        postgresql_where=sa.text("active AND admin"),
        sqlite_where=sa.text("active = 1 AND admin = 1"),
    )
    op.create_index(
        op.f("events_actor_id_created_at_id_idx"),
        "events",
        ["actor_id", "created_at", "id"],
        postgresql_where=sa.text("actor_id IS NOT NULL"),
        sqlite_where=sa.text("actor_id IS NOT NULL"),
    )
    op.create_table(
        "erasures",
        sa.Column("user_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("erased_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("user_id", name=op.f("erasures_pkey")),
    )


def order_names_by(collation: str) -> None:
    """Set the collation of usernames and emails on PostgreSQL; SQLite always compares bytes."""
    if op.get_context().dialect.name == "postgresql":
        op.execute(
            f'ALTER TABLE users ALTER username_key TYPE VARCHAR(512) COLLATE "{collation}",'
            f' ALTER email TYPE VARCHAR(128) COLLATE "{collation}"'
        )


def downgrade() -> None:
    op.drop_table("erasures")
    op.drop_index(op.f("events_actor_id_created_at_id_idx"), table_name="events")
    op.drop_index("users_admins_idx", table_name="users")
    order_names_by("default")
