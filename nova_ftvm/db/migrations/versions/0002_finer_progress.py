"""A first copy moves by less than a percent."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # Batches: SQLite cannot change a column's type in place.
    with op.batch_alter_table("pairs") as pairs:
        pairs.alter_column("progress", existing_type=sa.Integer, existing_nullable=False, type_=sa.Double)
