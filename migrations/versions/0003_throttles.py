"""throttles

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "throttles",
        sa.Column("key", sa.String(128), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("resets_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("paused_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("throttles_pkey")),
    )
    op.create_index(op.f("throttles_resets_at_idx"), "throttles", ["resets_at"])
    op.create_table(
        "known_addresses",
        sa.Column("account", sa.String(64), nullable=False),
        sa.Column("network", sa.String(64), nullable=False),
        sa.Column("last_login_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("account", "network", name=op.f("known_addresses_pkey")),
    )
    op.create_index(op.f("known_addresses_last_login_at_idx"), "known_addresses", ["last_login_at"])


def downgrade() -> None:
    op.drop_index(op.f("known_addresses_last_login_at_idx"), table_name="known_addresses")
    op.drop_table("known_addresses")
    op.drop_index(op.f("throttles_resets_at_idx"), table_name="throttles")
    op.drop_table("throttles")
