"""Configuration of the product's own services: the manager's and the agents'."""

from pathlib import Path

from ftvm_lab import ini
from ftvm_lab.endpoints import TRANSPORT_URL, credentials, database_url
from ftvm_lab.hostfs import RUNTIME_DIRECTORY
from ftvm_lab.layout import COMPUTES, CONTROL, DATA, Layout

FILE_NAME = "nova-ftvm.conf"


#: The second one runs only when somebody starts it, to see two of them at work.
MANAGERS = ("nova-ftvm-manager", "nova-ftvm-manager-2")

#: One server bears many faults in a row here. With the default of a minute they would count as one trouble that goes
#: on, and each new backup would be put off longer.
RETRY_LIMIT_S = 8

#: What the policy `fixed` keeps to, as its peers do as a rule: the benchmark compares with that.
FIXED_EPOCH_MS = 100


def manager_file(layout: Layout, manager: str = MANAGERS[0]) -> Path:
    return layout.conf / (FILE_NAME if manager == MANAGERS[0] else f"{manager}.conf")


def write(layout: Layout) -> None:
    for manager, host in zip(MANAGERS, (CONTROL.name, f"{CONTROL.name}-2"), strict=True):
        ini.write(
            manager_file(layout, manager),
            {
                "DEFAULT": {"transport_url": TRANSPORT_URL, "host": host, "log_file": layout.log / f"{manager}.log"},
                "database": {"connection": database_url(layout, "ftvm")},
                "service_auth": credentials("ftvm"),
                "manager": {"retry_limit_s": RETRY_LIMIT_S},
            },
        )
    for node in COMPUTES:
        ini.write(
            layout.outside(node) / FILE_NAME,
            {
                "DEFAULT": {
                    "transport_url": TRANSPORT_URL,
                    "host": node.name,
                    "log_file": layout.host / "log/nova-ftvm-agent.log",
                },
                "agent": {
                    "data_address": node.address(DATA),
                    "runtime_dir": RUNTIME_DIRECTORY,
                    "qemu_user": "root",
                },
                "engine": {"epoch_ms": FIXED_EPOCH_MS},
            },
        )
