"""Alembic's entry. Called by db.connect only, which hands in the connection."""

from alembic import context

from nova_ftvm.db.schema import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata,
                  render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
