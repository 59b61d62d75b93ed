"""RabbitMQ and MariaDB on the control machine, and the services' schemas."""

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ftvm_lab.command import CommandFailed, wait_until
from ftvm_lab.endpoints import AUTH_URL, CONTROL_ADDRESS, RABBIT_PORT, database_url
from ftvm_lab.layout import PASSWORD, REGION, Layout
from ftvm_lab.machine import Machine

RABBIT, MARIADB = "rabbitmq", "mariadb"
DATABASES = (
    *("keystone", "placement", "glance", "neutron"),
    *("nova_api", "nova", "nova_cell0", "ftvm"),
)
RABBIT_START = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
SCHEMA_TIMEOUT_S = 240


def start(control: Machine) -> None:
    """Begins with an empty broker: no message outlives the lab."""
    shutil.rmtree(_broker_home(control.layout), ignore_errors=True)
    start_rabbit(control)
    start_mariadb(control)


def _broker_home(layout: Layout) -> Path:
    return layout.state / "rabbit"


def start_rabbit(control: Machine) -> None:
    """With what the broker keeps over its own death."""
    layout = control.layout
    home = _broker_home(layout)
    home.mkdir(parents=True, exist_ok=True)
    control.start(
        RABBIT,
        [str(RABBIT_START)],
        environment={"HOME": str(home), "RABBITMQ_CONF_ENV_FILE": str(layout.conf / "rabbit" / "env.conf")},
    )


def start_mariadb(control: Machine) -> None:
    layout = control.layout
    data = layout.state / "mysql"
    if not (data / "mysql").is_dir():
        control.call(
            [
                *("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}"),
                *("--auth-root-authentication-method=normal", "--skip-test-db"),
            ]
        )
    control.start(
        MARIADB,
        [
            *("/usr/sbin/mariadbd", "--no-defaults", "--user=root", f"--datadir={data}"),
            *(f"--socket={layout.sockets / 'mysql.sock'}", "--skip-networking"),
            # The lab's data must survive the program, but need not survive the machine: no waiting for the disk.
            *("--innodb-flush-log-at-trx-commit=2", "--sync-binlog=0", "--skip-log-bin"),
            *("--innodb-buffer-pool-size=128M", "--max-connections=500"),
            *("--character-set-server=utf8mb3", f"--log-error={layout.log / 'mariadb.log'}"),
        ],
    )


def wait(control: Machine) -> None:
    """Until both can be used."""
    wait_until("MariaDB", partial(_succeeds, control, _mariadb_argv(control, "select 1")), 30)
    port_check = f"import socket; socket.create_connection(({CONTROL_ADDRESS!r}, {RABBIT_PORT}), 1)"
    python = str(control.layout.venv / "bin/python")
    wait_until("RabbitMQ", partial(_succeeds, control, [python, "-c", port_check]), 60)


def _succeeds(control: Machine, argv: list[str]) -> bool:
    try:
        control.call(argv)
    except CommandFailed:
        return False
    return True


def _mariadb_argv(control: Machine, statement: str) -> list[str]:
    socket = control.layout.sockets / "mysql.sock"
    return ["mariadb", "--no-defaults", "-uroot", f"--socket={socket}", "-e", statement]


def create_schemas(control: Machine) -> None:
    """Every service's tables; two at a time, Keystone's with its bootstrap first."""
    for database in DATABASES:
        statement = f"create database if not exists {database} character set utf8mb3"
        control.call(_mariadb_argv(control, statement))
    with ThreadPoolExecutor(max_workers=2) as pool:
        chains = (_keystone_chain, _nova_chain, _small_chain)
        for done in [pool.submit(_run_chain, control, chain(control.layout)) for chain in chains]:
            done.result()


Chain = Iterable[list[str]]


def _run_chain(control: Machine, chain: Chain) -> None:
    for argv in chain:
        control.call(argv, timeout_s=SCHEMA_TIMEOUT_S)


def _keystone_chain(layout: Layout) -> Chain:
    for name in ("fernet", "credential"):
        (layout.state / "keystone" / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    manage = ["keystone-manage", "--config-file", str(layout.conf / "keystone/keystone.conf")]
    owner = ["--keystone-user", "root", "--keystone-group", "root"]
    return [
        [*manage, "db_sync"],
        [*manage, "fernet_setup", *owner],
        [*manage, "credential_setup", *owner],
        [
            *(*manage, "bootstrap", "--bootstrap-password", PASSWORD),
            *("--bootstrap-region-id", REGION, "--bootstrap-public-url", AUTH_URL),
            *("--bootstrap-admin-url", AUTH_URL, "--bootstrap-internal-url", AUTH_URL),
        ],
    ]


def _nova_chain(layout: Layout) -> Chain:
    manage = ["nova-manage", "--config-file", str(layout.conf / "nova/nova.conf")]
    cell0 = database_url(layout, "nova_cell0")
    return [
        [*manage, "api_db", "sync"],
        [*manage, "cell_v2", "map_cell0", "--database_connection", cell0],
        [*manage, "db", "sync"],
        [*manage, "cell_v2", "create_cell", "--name", "cell1"],
    ]


def _small_chain(layout: Layout) -> Chain:
    conf = layout.conf
    neutron = ["--config-file", f"{conf}/neutron/neutron.conf"]
    neutron += ["--config-file", f"{conf}/neutron/ml2.ini"]
    return [
        ["placement-manage", "--config-file", f"{conf}/placement/placement.conf", "db", "sync"],
        ["glance-manage", "--config-file", f"{conf}/glance/glance-api.conf", "db_sync"],
        ["neutron-db-manage", *neutron, "upgrade", "heads"],
    ]
