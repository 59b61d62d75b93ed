"""Configuration of the product's own services: the manager's and the agents'."""

from pathlib import Path

from ftvm_lab import ini
from ftvm_lab.endpoints import TRANSPORT_URL, credentials, database_url
from ftvm_lab.hostfs import RUNTIME_DIRECTORY
from ftvm_lab.layout import COMPUTES, CONTROL, DATA, Layout

FILE_NAME = "nova-ftvm.conf"


def manager_file(layout: Layout) -> Path:
    return layout.conf / FILE_NAME


def write(layout: Layout) -> None:
    ini.write(
        manager_file(layout),
        {
            "DEFAULT": {
                "transport_url": TRANSPORT_URL,
                "host": CONTROL.name,
                "log_file": layout.log / "nova-ftvm-manager.log",
            },
            "database": {"connection": database_url(layout, "ftvm")},
            "service_auth": credentials("ftvm"),
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
            },
        )
