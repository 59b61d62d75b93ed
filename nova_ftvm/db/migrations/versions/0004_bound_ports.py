"""Ports that were bound to the backup's host."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("pairs", sa.Column("ports", sa.JSON))
