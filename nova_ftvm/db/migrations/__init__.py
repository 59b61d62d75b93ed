"""The tables' history, for alembic. `nova-ftvm-manage db sync` applies it."""
