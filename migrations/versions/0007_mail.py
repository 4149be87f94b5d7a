"""Email: verified addresses, the outbox, and invitations.

Revision ID: 0007
Revises: 0006

Users from before count as verified. So do users whom a server of the version before adds while
the upgrade is under way: it does not know the column.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# Of `mails`, each with the condition for its rows.
PARTIAL_INDEXES = (
    (["next_try_at", "id"], "failed_at IS NULL"),
    (["address"], "failed_at IS NOT NULL"),
    (["user_id"], "user_id IS NOT NULL"),
)


def upgrade() -> None:
    op.add_column(
        "users", sa.Column("email_verified", sa.Boolean(), nullable=False, server_default=sa.true())
    )
    op.create_table(
        "invitations",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("email", bytewise(128), nullable=False),
        sa.Column("username", sa.String(512), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("invitations_pkey")),
        sa.UniqueConstraint("email", name=op.f("invitations_email_key")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("invitations_expires_at_idx"), "invitations", ["expires_at"])
    op.create_table(
        "mails",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("address", bytewise(128), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=True),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("language", sa.String(16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("next_try_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("claimed_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("failed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.String(256), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("mails_pkey")),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("mails_user_id_fkey"), ondelete="CASCADE"
        ),
        sqlite_autoincrement=True,
    )
    for columns, there in PARTIAL_INDEXES:
        op.create_index(
            op.f(f"mails_{'_'.join(columns)}_idx"),
            "mails",
            columns,
            postgresql_where=sa.text(there),
            sqlite_where=sa.text(there),
        )


def bytewise(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def downgrade() -> None:
    op.drop_table("mails")
    op.drop_table("invitations")
    # Not with batch_alter_table: SQLite would copy the table, and the foreign keys that reference
    # the old one would act on its rows.
    op.drop_column("users", "email_verified")
