"""users

Revision ID: 0001
Revises:
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("username", sa.String(512), nullable=False),
        sa.Column("username_key", sa.String(512), nullable=False),
        sa.Column("email", sa.String(128), nullable=False),
        sa.Column("password", sa.String(255), nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.true(), nullable=False),
        sa.Column("admin", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("users_pkey")),
        sa.UniqueConstraint("email", name=op.f("users_email_key")),
        sa.UniqueConstraint("username_key", name=op.f("users_username_key_key")),
    )
    op.create_index(op.f("users_created_at_id_idx"), "users", ["created_at", "id"])


def downgrade() -> None:
    op.drop_index(op.f("users_created_at_id_idx"), table_name="users")
    op.drop_table("users")
