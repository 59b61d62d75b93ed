"""Pairs and hosts."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "pairs",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("instance_id", sa.String(36), nullable=False, unique=True),
        sa.Column("project_id", sa.String(255), nullable=False),
        sa.Column("backup_id", sa.String(36)),
        sa.Column("primary_host", sa.String(255), nullable=False),
        sa.Column("backup_host", sa.String(255)),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("active_host", sa.String(255), nullable=False),
        sa.Column("active_since", sa.Integer, nullable=False),
        sa.Column("step", sa.String(32), nullable=False),
        sa.Column("token", sa.String(64), nullable=False),
        sa.Column("timeline", sa.JSON, nullable=False),
        sa.Column("progress", sa.Integer, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("retry_at", sa.Double, nullable=False),
        sa.Column("moved_at", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        sa.Column("worker", sa.String(255)),
        sa.Column("worker_until", sa.Double, nullable=False),
    )
    op.create_index("ix_pairs_backup_id", "pairs", ["backup_id"])
    op.create_table(
        "hosts",
        sa.Column("host", sa.String(255), primary_key=True),
        sa.Column("capable", sa.Boolean, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("data_address", sa.String(255), nullable=False),
        sa.Column("reported_at", sa.Double, nullable=False),
        sa.Column("engines", sa.JSON, nullable=False),
        sa.Column("forced_down_by_us", sa.Boolean, nullable=False),
        sa.Column("forced_at", sa.Double, nullable=False),
    )
