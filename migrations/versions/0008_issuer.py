"""Tokens for other services: roles, signing keys, clients, and the feed of ended sessions.

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("users", sa.Column("roles", sa.String(512), nullable=False, server_default=""))
    op.add_column(
        "sessions", sa.Column("token_expires_at", sa.DateTime(timezone=True), nullable=True)
    )
    op.create_table(
        "ended_sessions",
        sa.Column("session_id", sa.String(22), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("session_id", name=op.f("ended_sessions_pkey")),
        sa.UniqueConstraint("position", name=op.f("ended_sessions_position_key")),
    )
    op.create_index(op.f("ended_sessions_expires_at_idx"), "ended_sessions", ["expires_at"])
    op.create_table(
        "signing_keys",
        sa.Column("kid", sa.String(43), nullable=False),
        sa.Column("public", sa.JSON(), nullable=False),
        sa.Column("private", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("signs_from", sa.DateTime(timezone=True), nullable=False),
        sa.Column("verifies_until", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("kid", name=op.f("signing_keys_pkey")),
    )
    op.create_table(
        "clients",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("audience", sa.String(255), nullable=False),
        sa.Column("scope", sa.String(512), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("previous_hash", sa.String(64), nullable=True),
        sa.Column("previous_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("clients_pkey")),
    )


def downgrade() -> None:
    op.drop_table("clients")
    op.drop_table("signing_keys")
    op.drop_table("ended_sessions")
    op.drop_column("sessions", "token_expires_at")
    op.drop_column("users", "roles")
