"""sessions

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        use_autoincrement()
    op.create_table(
        "sessions",
        sa.Column("id", sa.String(22), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ip", sa.String(64), nullable=True),
        sa.Column("user_agent", sa.String(512), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("sessions_user_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("sessions_pkey")),
    )
    op.create_index(op.f("sessions_user_id_expires_at_idx"), "sessions", ["user_id", "expires_at"])
    op.create_index(op.f("sessions_expires_at_idx"), "sessions", ["expires_at"])


def use_autoincrement() -> None:
    """Recreate the table `users` with AUTOINCREMENT, so that SQLite never reuses an id."""
    users = sa.Table(
        "users",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("username", sa.String(512), nullable=False),
        sa.Column("username_key", sa.String(512), nullable=False),
        sa.Column("email", sa.String(128), nullable=False),
        sa.Column("password", sa.String(255), nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.true(), nullable=False),
        sa.Column("admin", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="users_pkey"),
        sa.UniqueConstraint("email", name="users_email_key"),
        sa.UniqueConstraint("username_key", name="users_username_key_key"),
        sa.Index("users_created_at_id_idx", "created_at", "id"),
    )
    options = {"sqlite_autoincrement": True}
    with op.batch_alter_table("users", copy_from=users, recreate="always", table_kwargs=options):
        pass


def downgrade() -> None:
    op.drop_index(op.f("sessions_expires_at_idx"), table_name="sessions")
    op.drop_index(op.f("sessions_user_id_expires_at_idx"), table_name="sessions")
    op.drop_table("sessions")
