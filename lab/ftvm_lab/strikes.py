"""How each kind of fault is injected: functions that make a fault's `strike`, and what that returns, its healing.

A healing may be called again, also after somebody else has put the thing right. faults.py has the list.
"""

import random
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ftvm_lab import clocks, computes, control, network, processes, storage
from ftvm_lab.databases import MARIADB, RABBIT
from ftvm_lab.ftvm_settings import MANAGERS
from ftvm_lab.layout import CONTROL, DATA, MGMT, Bridge, Layout, Node
from ftvm_lab.machine import Machine
from ftvm_lab.memory import FullMemory
from ftvm_lab.network import namespaces

Heal = Callable[[], None]

#: The networks without which a host's programs reach nobody; the guests have one of their own.
LINKS = (DATA, MGMT)
#: In each direction. A tenth of what checkpoints of a small guest under load were seen to take here, 30 MB a second.
SQUEEZED_MBIT_S = 24.0
#: Seconds that a flapping link is down, and that it is up, at most.
FLAP_DOWN_S, FLAP_UP_S = 0.3, 1.0


@dataclass(frozen=True)
class Scene:
    """A protected server, and which host is which when the fault strikes."""

    layout: Layout
    server_id: str
    primary: Node
    backup: Node


Strike = Callable[[Scene], Heal]
Which = Callable[[Scene], Node]


def primary(scene: Scene) -> Node:
    return scene.primary


def backup(scene: Scene) -> Node:
    return scene.backup


def _nothing() -> None:
    """What is injected needs no healing: the product, or the fault itself, ends it."""


# -- programs


def kills_service(which: Which, service: str) -> Strike:
    def strike(scene: Scene) -> Heal:
        machine = Machine(scene.layout, which(scene))
        processes.kill(processes.only(machine, service))
        return lambda: ensure(machine, service)

    return strike


def stops_service(which: Which, service: str) -> Strike:
    def strike(scene: Scene) -> Heal:
        stopped = processes.only(Machine(scene.layout, which(scene)), service)
        processes.send(stopped, signal.SIGSTOP)
        return lambda: processes.send(stopped, signal.SIGCONT)

    return strike


def restarts_service(which: Which, service: str) -> Strike:
    def strike(scene: Scene) -> Heal:
        machine = Machine(scene.layout, which(scene))
        machine.stop(service)
        ensure(machine, service)
        return lambda: ensure(machine, service)

    return strike


def ensure(machine: Machine, service: str) -> None:
    """Starts a service that does not run, unless its whole host is off."""
    if machine.pid1() is None or machine.runs(service):
        return
    if machine.node == CONTROL:
        control.start(machine, service)
    else:
        computes.start(machine, service)


def kills_qemu(which: Which) -> Strike:
    def strike(scene: Scene) -> Heal:
        processes.kill([processes.qemu(which(scene), scene.server_id)])
        return _nothing

    return strike


def kills_engine(which: Which, role: str) -> Strike:
    def strike(scene: Scene) -> Heal:
        processes.kill([processes.engine(which(scene), scene.server_id, role)])
        return _nothing

    return strike


def stops_engine(which: Which, role: str) -> Strike:
    def strike(scene: Scene) -> Heal:
        stopped = [processes.engine(which(scene), scene.server_id, role)]
        processes.send(stopped, signal.SIGSTOP)
        return lambda: processes.send(stopped, signal.SIGCONT)

    return strike


# -- the control plane


def kills_control(service: str) -> Strike:
    def strike(scene: Scene) -> Heal:
        machine = Machine(scene.layout, CONTROL)
        processes.kill(processes.service(machine, service))
        return lambda: ensure(machine, service)

    return strike


def restarts_control(service: str) -> Strike:
    return restarts_service(lambda scene: CONTROL, service)


def kills_first_of_two_managers(scene: Scene) -> Heal:
    machine = Machine(scene.layout, CONTROL)
    first, second = MANAGERS
    ensure(machine, second)
    processes.kill(processes.service(machine, first))

    def heal() -> None:
        ensure(machine, first)
        machine.stop(second)

    return heal


# -- links


def cuts(which: Which, *bridges: Bridge) -> Strike:
    def strike(scene: Scene) -> Heal:
        node = which(scene)
        for bridge in bridges:
            network.set_link(node, bridge, up=False)

        def heal() -> None:
            if node.namespace in namespaces():
                for bridge in bridges:
                    network.set_link(node, bridge, up=True)

        return heal

    return strike


def cuts_towards(which: Which) -> Strike:
    """What is sent to the node over the data network is lost; what it sends arrives."""

    def strike(scene: Scene) -> Heal:
        network.drop_towards(which(scene), DATA)
        return _clears([which(scene)])

    return strike


def squeezes(scene: Scene) -> Heal:
    sides = (scene.primary, scene.backup)
    for node in sides:
        network.squeeze_towards(node, DATA, SQUEEZED_MBIT_S)
    return _clears(sides)


def _clears(nodes: Iterable[Node]) -> Heal:
    def heal() -> None:
        for node in nodes:
            if node.namespace in namespaces():
                network.clear_towards(node, DATA)

    return heal


def flaps(scene: Scene) -> Heal:
    """The backup's data link goes down and up until it is healed."""
    over = threading.Event()

    def flap() -> None:
        while not over.is_set():
            for up, at_most_s in ((False, FLAP_DOWN_S), (True, FLAP_UP_S)):
                network.set_link(scene.backup, DATA, up=up)
                over.wait(random.uniform(0.05, at_most_s))

    flapping = threading.Thread(target=flap, name="flapping link", daemon=True)
    flapping.start()

    def heal() -> None:
        over.set()
        flapping.join()
        if scene.backup.namespace in namespaces():
            network.set_link(scene.backup, DATA, up=True)

    return heal


# -- hosts


def freezes_host(which: Which) -> Strike:
    """As a host that stands still looks from outside: nothing of it answers, its kernel neither."""

    def strike(scene: Scene) -> Heal:
        node = which(scene)
        network.unplug(node)
        frozen = processes.freeze(node)

        def heal() -> None:
            if node.namespace in namespaces():
                network.plug(node)
                processes.send(frozen, signal.SIGCONT)

        return heal

    return strike


def kills_host(*which: Which) -> Strike:
    def strike(scene: Scene) -> Heal:
        nodes = [of(scene) for of in which]
        for node in nodes:
            computes.kill(scene.layout, node)

        def heal() -> None:
            for node in nodes:
                if node.namespace not in namespaces():
                    computes.power_on(scene.layout, node)

        return heal

    return strike


def fills_memory(scene: Scene) -> Heal:
    node = scene.backup
    victims = [processes.engine(node, scene.server_id, "backup"), processes.qemu(node, scene.server_id)]
    return FullMemory.of(node.namespace, victims).end


def fills_disk(scene: Scene) -> Heal:
    storage.fill(scene.layout, scene.backup)
    return lambda: storage.free(scene.layout, scene.backup)


def shifts_clock(which: Which, seconds: int) -> Strike:
    def strike(scene: Scene) -> Heal:
        clocks.set_offset(scene.layout, which(scene), seconds)

        def heal() -> None:
            clocks.set_offset(scene.layout, which(scene), 0)
            restart_if_running(Machine(scene.layout, which(scene)), computes.COMPUTE)

        return heal

    return strike


def restart_if_running(machine: Machine, service: str) -> None:
    """As an operator must whose host's clock was set back, by a fault or by its healing: keystoneauth's limiter (its
    _fair_semaphore.py) goes by the wall clock, and a nova-compute that has seen a later time sleeps for as long."""
    if machine.pid1() is not None and machine.runs(service):
        machine.stop(service)
        ensure(machine, service)


def mend(layout: Layout, node: Node) -> None:
    """Puts right what any fault may have left of a machine, whoever injected it."""
    machine = Machine(layout, node)
    if node == CONTROL:
        for service in (RABBIT, MARIADB, MANAGERS[0]):
            ensure(machine, service)
        return
    storage.free(layout, node)
    if node.namespace not in namespaces():
        computes.power_on(layout, node)
        return
    network.plug(node)
    network.clear_towards(node, DATA)
    processes.send(network.pids(node.namespace), signal.SIGCONT)
    clocks.set_offset(layout, node, 0)
    for service in computes.services(computes.is_plain(layout)):
        ensure(machine, service)
