"""From [database] to an engine, and to the tables' version."""

import os

import sqlalchemy as sa
from alembic import command
from alembic import config as alembic_config
from alembic import script as alembic_script
from alembic.runtime import migration
from oslo_config import cfg
from oslo_db import options
from oslo_db.sqlalchemy import enginefacade

_MIGRATIONS = os.path.join(os.path.dirname(__file__), "migrations")
DEFAULT_CONNECTION = "sqlite:////var/lib/nova-ftvm/manager.sqlite"


def register(conf: cfg.ConfigOpts) -> None:
    """Adds oslo.db's [database] to `conf`."""
    # One for each of the manager's threads: a new connection costs more than the question that it is made for.
    options.set_defaults(conf, connection=DEFAULT_CONNECTION, max_pool_size=48)


def engine(conf: cfg.ConfigOpts) -> sa.Engine:
    """The engine of [database]connection. One a process; its pool is thread-safe."""
    return engine_for(**{key: value for key, value in conf.database.items() if value is not None})


def engine_for(connection: str, **settings: object) -> sa.Engine:
    """The engine of one URL: oslo.db's own, so that its exceptions and its reconnecting apply."""
    known = {key: settings[key] for key in _FACADE_OPTIONS if key in settings}
    _make_directory(connection)
    manager = enginefacade.transaction_context()
    manager.configure(connection=connection, **known)
    return manager.writer.get_engine()


_FACADE_OPTIONS = ("sqlite_synchronous", "mysql_sql_mode", "mysql_wsrep_sync_wait", "connection_recycle_time",
                   "max_pool_size", "max_retries", "retry_interval", "max_overflow", "pool_timeout",
                   "connection_debug", "connection_trace", "connection_parameters")


def sync(engine: sa.Engine) -> str:
    """Brings the tables to this release's version; returns it. Repeating it changes nothing."""
    settings = _alembic()
    with engine.begin() as connection:
        settings.attributes["connection"] = connection
        command.upgrade(settings, "head")
    return version(engine)


def version(engine: sa.Engine) -> str:
    """The version that the tables have; '' when there are none."""
    with engine.connect() as connection:
        return migration.MigrationContext.configure(connection).get_current_revision() or ""


def newest() -> str:
    """The version that this release needs."""
    return alembic_script.ScriptDirectory.from_config(_alembic()).get_current_head() or ""


def _alembic() -> alembic_config.Config:
    settings = alembic_config.Config()
    settings.set_main_option("script_location", _MIGRATIONS.replace("%", "%%"))
    return settings


def _make_directory(connection: str) -> None:
    url = sa.make_url(connection)
    if url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:":
        os.makedirs(os.path.dirname(os.path.abspath(url.database)), mode=0o750, exist_ok=True)
