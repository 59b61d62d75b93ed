"""Hosts that refused a server, and since when a host's agent has told the same."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("pairs", sa.Column("refused", sa.JSON))
    op.add_column("hosts", sa.Column("incarnation", sa.String(64)))
    op.add_column("hosts", sa.Column("since", sa.Double))
