"""The lab as a whole: up, down, and how it is.

The databases, keys and images of a lab that was up once are kept: then `up` only
starts things. A lab whose first start did not end well starts again from nothing.
"""

import os
import shutil
import signal
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from ftvm_lab import (
    cloud,
    computes,
    control,
    control_settings,
    databases,
    ftvm_settings,
    network,
    nova_settings,
    seed,
    storage,
)
from ftvm_lab.command import LabError, Progress, wait_until
from ftvm_lab.endpoints import KEYSTONE
from ftvm_lab.layout import CLIENT, COMPUTES, CONTROL, Layout
from ftvm_lab.machine import Machine
from ftvm_lab.nova_settings import Product

HOSTS_TIMEOUT_S = 90


def up(layout: Layout, *, plain: bool, progress: Progress) -> None:
    """Starts the lab. This process is inside the control namespace afterwards."""
    _check_parts(layout, plain)
    if network.namespaces():
        raise LabError("a lab is up already, or left over: ftvm-lab down")
    is_new = not _seeded(layout).exists()
    if is_new:
        _wipe(layout)
    control.make_directories(layout)
    _set_plain(layout, plain)
    machine = _start_control(layout, progress)
    if is_new:
        _seed_identity(layout, machine, progress)
    else:
        control.start_apis(machine, [KEYSTONE])
    _write_nova(layout, plain)
    control.start_apis(machine, control.OTHER_APIS)
    control.start_nova_workers(machine)
    if not plain:
        control.start_manager(machine)
    for node in COMPUTES:
        computes.boot(layout, node)
        progress.step(f"{node.name} has power")
    control.wait_for_apis(machine, control.ALL_APIS)
    progress.step("the APIs answer")
    # A nova-compute that has servers asks Neutron about them, and gives up if it is not there.
    for node in COMPUTES:
        computes.start(Machine(layout, node), computes.COMPUTE)
    if not plain:
        _load_metadefs(machine, progress)
    _finish(layout, machine, progress, is_new=is_new)


def _check_parts(layout: Layout, plain: bool) -> None:
    if os.geteuid() != 0:
        raise LabError("the lab makes namespaces: run it as root")
    for guest in (layout.guest, layout.debian):
        if not (guest / "disk.qcow2").exists():
            raise LabError(f"no guest in {guest}: make setup")
    if not plain and find_spec("nova.virt.ftvm") is None:
        raise LabError("nova_ftvm is not installed: make setup, or ftvm-lab up --plain")


def _seeded(layout: Layout) -> Path:
    """Holds the service project's id once everything is seeded."""
    return layout.state / "seeded"


def _service_project(layout: Layout) -> Path:
    return layout.state / "service-project"


def _set_plain(layout: Layout, plain: bool) -> None:
    mark = layout.conf / "plain"
    mark.unlink(missing_ok=True)
    if plain:
        mark.touch()


def _start_control(layout: Layout, progress: Progress) -> Machine:
    """Networks, control machine, message broker and databases."""
    network.create_control()
    network.create_client(CLIENT)
    cloud.enter_control()
    control_settings.write(layout)
    machine = Machine(layout, CONTROL)
    machine.boot()
    databases.start(machine)
    databases.wait(machine)
    progress.step("RabbitMQ and MariaDB run")
    return machine


def _seed_identity(layout: Layout, machine: Machine, progress: Progress) -> None:
    # The schemas need Nova's database settings, not yet the service project.
    nova_settings.write(layout, Product(plain=True, service_project_id=""))
    databases.create_schemas(machine)
    progress.step("the schemas are made")
    control.start_apis(machine, [KEYSTONE])
    control.wait_for_apis(machine, [KEYSTONE])
    _service_project(layout).write_text(seed.seed_identity(cloud.connect(layout)))
    progress.step("accounts and catalogue are made")


def _write_nova(layout: Layout, plain: bool) -> None:
    nova_settings.write(layout, Product(plain, _service_project(layout).read_text()))
    ftvm_settings.write(layout)


def _load_metadefs(machine: Machine, progress: Progress) -> None:
    if control.load_metadefs(machine):
        progress.step("Glance knows the product's definitions")
    else:
        progress.step(f"no metadefs loaded: {machine.layout.metadefs} is not there")


def _finish(layout: Layout, machine: Machine, progress: Progress, *, is_new: bool) -> None:
    connection = cloud.connect(layout)
    if is_new:
        seed.seed_resources(connection, layout)
        progress.step("images, flavors and network are made")
    names = {node.name for node in COMPUTES}
    wait_until(
        "all compute hosts to be up in Nova",
        lambda: cloud.usable_hosts(connection) >= names,
        HOSTS_TIMEOUT_S,
    )
    if is_new:
        manage = ["nova-manage", "--config-file", f"{layout.conf}/nova/nova.conf"]
        machine.call([*manage, "cell_v2", "discover_hosts"])
    _seeded(layout).touch()
    progress.step("the lab is up")


def down(layout: Layout, *, wipe: bool) -> None:
    """Ends everything inside the lab's namespaces, whichever directory it used."""
    names = network.namespaces()
    for node in COMPUTES:
        if node.namespace in names and (machine := Machine(layout, node)).pid1():
            machine.kill()
    if CONTROL.namespace in names:
        Machine(layout, CONTROL).shut_down()
    for name in names:
        _end_stragglers(name)
        network.remove(name)
    storage.detach_all(layout)
    if wipe:
        _wipe(layout)


def _end_stragglers(namespace: str) -> None:
    """Kills what was started in the namespace from outside: clients, commands."""
    for pid in network.pids(namespace):
        # The list also has those that end by themselves, such as the program that made it.
        if pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _wipe(layout: Layout) -> None:
    storage.detach_all(layout)
    for directory in (layout.state, layout.conf, layout.log, layout.sockets, layout.hosts):
        shutil.rmtree(directory, ignore_errors=True)


def status(layout: Layout) -> dict[str, dict[str, bool]]:
    """Machine -> service -> whether it runs. A machine that is off has no services."""
    plain = computes.is_plain(layout)
    expected = {CONTROL: control.SERVICES + (() if plain else (control.MANAGER,))}
    expected |= {node: computes.services(plain) for node in COMPUTES}
    result: dict[str, dict[str, bool]] = {}
    for node, services in expected.items():
        machine = Machine(layout, node)
        is_on = machine.pid1() is not None
        result[node.name] = {name: machine.runs(name) for name in services} if is_on else {}
    return result
