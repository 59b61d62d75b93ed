"""nova-ftvm-manage: the tables' version, and a look at the pairs. Never shows a token."""

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

from oslo_config import cfg
from oslo_log import log

from nova_ftvm.db import connect
from nova_ftvm.db.records import Host, Pair
from nova_ftvm.db.store import Store
from nova_ftvm.types import InstanceId, Role

_COLUMNS = ("instance_id", "state", "generation", "primary_host", "backup_host", "active_host", "reason")


def _add_commands(commands: Any) -> None:
    database = commands.add_parser("db", help="the manager's tables").add_subparsers(required=True)
    database.add_parser("sync", help="bring the tables to this release's version").set_defaults(run=db_sync)
    database.add_parser("version", help="show the tables' version").set_defaults(run=db_version)
    pairs = commands.add_parser("pair", help="protected servers").add_subparsers(required=True)
    pairs.add_parser("list", help="all pairs").set_defaults(run=pair_list)
    show = pairs.add_parser("show", help="one pair")
    show.add_argument("instance", metavar="INSTANCE_UUID")
    show.add_argument("--json", action="store_true")
    show.set_defaults(run=pair_show)


def db_sync(conf: cfg.ConfigOpts, _: argparse.Namespace) -> int:
    print(connect.sync(connect.engine(conf)))
    return 0


def db_version(conf: cfg.ConfigOpts, _: argparse.Namespace) -> int:
    print(connect.version(connect.engine(conf)) or "none")
    return 0


def pair_list(conf: cfg.ConfigOpts, _: argparse.Namespace) -> int:
    rows = [_COLUMNS, *(tuple(str(pair.public()[name] or "") for name in _COLUMNS)
                        for pair in Store(connect.engine(conf)).pairs())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def pair_show(conf: cfg.ConfigOpts, arguments: argparse.Namespace) -> int:
    store = Store(connect.engine(conf))
    pair = store.pair_of(InstanceId(arguments.instance))
    if pair is None:
        print(f"Server {arguments.instance} has no pair. Its property ft:reason may say why.", file=sys.stderr)
        return 1
    shown = pair.public() | {"figures": figures(pair, store.host(pair.active_host))}
    print(json.dumps(shown, sort_keys=True) if arguments.json else described(shown))
    return 0


def figures(pair: Pair, host: Host | None) -> dict[str, Any] | None:
    """What the pair's primary engine has counted, as its host's agent told last; None: it told nothing."""
    if host is None:
        return None
    of_pair = (pair.id, Role.PRIMARY, pair.generation)
    for engine in host.engines:
        if (engine.pair_id, engine.role, engine.generation) == of_pair and engine.figures is not None:
            return dataclasses.asdict(engine.figures) | {"reported_at": host.reported_at}
    return None


def described(shown: dict[str, Any]) -> str:
    """One line a column, times as local time."""
    for group in ("timeline", "figures"):
        shown = shown | {f"{group}.{name}": fact for name, fact in (shown[group] or {}).items()}
        del shown[group]
    return "\n".join(f"{name:<24} {_readable(name, value)}" for name, value in shown.items())


def _readable(name: str, value: Any) -> str:
    if name.endswith("_at"):
        if not value:
            return "-"
        return time.strftime("%F %T", time.localtime(value)) + f".{int(value * 1000) % 1000:03d}"
    return "-" if value in (None, "") else str(value)


def main() -> int:
    conf = cfg.ConfigOpts()
    log.set_defaults(default_log_levels=[*log.get_default_log_levels(), "alembic=WARN"])
    log.register_options(conf)
    connect.register(conf)
    conf.register_cli_opt(cfg.SubCommandOpt("command", handler=_add_commands))
    conf(sys.argv[1:], project="nova-ftvm", prog="nova-ftvm-manage")
    log.setup(conf, "nova-ftvm-manage")
    return conf.command.run(conf, conf.command)


if __name__ == "__main__":
    sys.exit(main())
