"""Published prompts, their files and their withdrawals; the database itself refuses to change or remove a row."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

KEPT = ("prompts", "files", "withdrawals")


def upgrade() -> None:
    """Make the tables and their triggers."""
    op.create_table(
        "prompts",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("created", sa.String(20), nullable=False),
        sa.Column("method", sa.String(200), nullable=False),
        sa.Column("task", sa.String(16), nullable=False),
        sa.Column("encoder", sa.String(200), nullable=False),
        sa.Column("fingerprint", sa.String(200), nullable=False),
        sa.Column("private", sa.Boolean, nullable=False),
        sa.Column("simulated", sa.Boolean, nullable=False),
        sa.Column("epsilon", sa.Float(53)),
        sa.Column("manifest", sa.LargeBinary, nullable=False),
        sa.Column("signature", sa.String(100), nullable=False),
        sa.Column("public_key", sa.String(64), nullable=False),
        sa.UniqueConstraint("name", "version", name="one_row_a_version"),
        sa.CheckConstraint("version >= 1", name="versions_from_1"),
    )
    op.create_table(
        "files",
        sa.Column("prompt", sa.Integer, sa.ForeignKey("prompts.id"), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("content", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "withdrawals",
        sa.Column("prompt", sa.Integer, sa.ForeignKey("prompts.id"), primary_key=True),
        sa.Column("at", sa.String(20), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION sordino_keep() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'published versions are never changed or removed'; END $$"
        )
        for table in KEPT:
            op.execute(
                f"CREATE TRIGGER {table}_keep BEFORE UPDATE OR DELETE ON {table} "
                "FOR EACH ROW EXECUTE FUNCTION sordino_keep()"
            )
        return
    for table in KEPT:
        for change in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} "
                "BEGIN SELECT RAISE(ABORT, 'published versions are never changed or removed'); END"
            )
