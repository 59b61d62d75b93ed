"""The command ftvm-lab: turns its arguments into calls of the other modules."""

import argparse
import os
import sys
import time

from ftvm_lab import cloud, computes, control, faults, lab, network, strikes
from ftvm_lab.command import LabError, Progress
from ftvm_lab.layout import CLIENT, COMPUTE_NAMES, CONTROL, DATA, Layout, Node, compute
from ftvm_lab.machine import Machine

MACHINES = (*COMPUTE_NAMES, CONTROL.name)


def main() -> None:
    arguments = _parser().parse_args()
    try:
        arguments.action(Layout.from_environment(), arguments)
    except LabError as error:
        sys.exit(f"ftvm-lab: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ftvm-lab", description="An OpenStack on one machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="start the lab")
    up.add_argument("--plain", action="store_true", help="without nova_ftvm")
    up.set_defaults(action=_up)
    down = commands.add_parser("down", help="stop the lab")
    down.add_argument("--wipe", action="store_true", help="and forget its state")
    down.set_defaults(action=_down)
    commands.add_parser("status", help="what runs").set_defaults(action=_status)

    openstack = commands.add_parser("openstack", help="the OpenStack client")
    openstack.add_argument("--as", dest="cloud", default="admin", choices=("admin", "demo"))
    openstack.add_argument("words", nargs="+", metavar="ARGUMENT")
    openstack.set_defaults(action=_openstack)
    client = commands.add_parser("client", help="run a program in the clients' network")
    client.add_argument("words", nargs="+", metavar="WORD")
    client.set_defaults(action=_client)
    host = commands.add_parser("host", help="run a program on a machine")
    host.add_argument("node", choices=MACHINES)
    host.add_argument("words", nargs="+", metavar="WORD")
    host.set_defaults(action=_host)

    for name, action, text in (
        ("kill", _kill, "take a compute host's power away"),
        ("power-on", _power_on, "give it back"),
        ("cut", _cut, "cut a compute host's data link"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("node", choices=COMPUTE_NAMES)
        command.set_defaults(action=action)
    heal = commands.add_parser("heal", help="undo all faults of a machine: links, power, stopped programs, full disk")
    heal.add_argument("node", choices=MACHINES)
    heal.set_defaults(action=_heal)
    fault = commands.add_parser("fault", help="inject a fault into a protected server's hosts, and heal it")
    fault.add_argument("name", choices=faults.FAULTS, metavar="NAME", help="; ".join(faults.FAULTS))
    fault.add_argument("server", help="name or UUID")
    fault.add_argument("--seconds", type=float, help="how long it lasts; an interrupt heals it at once")
    fault.set_defaults(action=_fault)
    for name, action in (("start", _start), ("stop", _stop)):
        command = commands.add_parser(name, help=f"{name} one service of a machine")
        command.add_argument("node", choices=MACHINES)
        command.add_argument("service", choices=(*computes.services(plain=False), *control.STARTERS))
        command.set_defaults(action=action)
    logs = commands.add_parser("logs", help="a machine's logs")
    logs.add_argument("node", choices=MACHINES)
    logs.add_argument("-f", "--follow", action="store_true")
    logs.set_defaults(action=_logs)
    return parser


def _node(name: str) -> Node:
    return CONTROL if name == CONTROL.name else compute(name)


def _machine_of_service(layout: Layout, arguments: argparse.Namespace) -> Machine:
    """Some are on the control machine only, the others on the hosts."""
    node = _node(arguments.node)
    if (node == CONTROL) != (arguments.service in control.STARTERS):
        raise LabError(f"{arguments.service} does not belong to {node.name}")
    return Machine(layout, node)


def _up(layout: Layout, arguments: argparse.Namespace) -> None:
    lab.up(layout, plain=arguments.plain, progress=Progress())


def _down(layout: Layout, arguments: argparse.Namespace) -> None:
    lab.down(layout, wipe=arguments.wipe)


def _status(layout: Layout, arguments: argparse.Namespace) -> None:
    report = lab.status(layout)
    for machine, services in report.items():
        print(f"{machine}: {'on' if services else 'off'}")
        for service, runs in services.items():
            print(f"  {'runs' if runs else 'DOWN'}  {service}")
    if not all(services and all(services.values()) for services in report.values()):
        sys.exit(1)


def _replace(argv: list[str], environment: dict[str, str] | None = None) -> None:
    """Becomes that program: its terminal, signals and exit code are the user's."""
    os.execvpe(argv[0], argv, os.environ if environment is None else environment)


def _require(namespace: str) -> None:
    if namespace not in network.namespaces():
        raise LabError("the lab is not up: ftvm-lab up")


def _openstack(layout: Layout, arguments: argparse.Namespace) -> None:
    _require(CONTROL.namespace)
    cloud.enter_control()
    program = str(layout.venv / "bin/openstack")
    environment = cloud.client_environment(layout, arguments.cloud)
    _replace([program, *arguments.words], environment)


def _client(layout: Layout, arguments: argparse.Namespace) -> None:
    _require(CLIENT.namespace)
    _replace(["ip", "netns", "exec", CLIENT.namespace, *arguments.words])


def _host(layout: Layout, arguments: argparse.Namespace) -> None:
    machine = Machine(layout, _node(arguments.node))
    _replace(machine.inside(arguments.words), machine.environment())


def _kill(layout: Layout, arguments: argparse.Namespace) -> None:
    computes.kill(layout, compute(arguments.node))


def _power_on(layout: Layout, arguments: argparse.Namespace) -> None:
    _require(CONTROL.namespace)
    computes.power_on(layout, compute(arguments.node))


def _cut(layout: Layout, arguments: argparse.Namespace) -> None:
    network.set_link(compute(arguments.node), DATA, up=False)


def _heal(layout: Layout, arguments: argparse.Namespace) -> None:
    _require(CONTROL.namespace)
    strikes.mend(layout, _node(arguments.node))


def _fault(layout: Layout, arguments: argparse.Namespace) -> None:
    _require(CONTROL.namespace)
    cloud.enter_control()
    fault = faults.FAULTS[arguments.name]
    server = cloud.connect(layout).compute.find_server(arguments.server, ignore_missing=False, all_projects=True)
    scene = faults.scene_of(layout, server.id)
    print(f"{fault.what} The guest is on {scene.primary.name}, its backup on {scene.backup.name}.", flush=True)
    heal = fault.strike(scene)
    try:
        time.sleep(fault.lasts_s[0] if arguments.seconds is None else arguments.seconds)
    except KeyboardInterrupt:
        print()
    finally:
        heal()
    print("healed", flush=True)


def _start(layout: Layout, arguments: argparse.Namespace) -> None:
    machine = _machine_of_service(layout, arguments)
    if machine.node == CONTROL:
        control.start(machine, arguments.service)
    else:
        computes.start(machine, arguments.service)


def _stop(layout: Layout, arguments: argparse.Namespace) -> None:
    _machine_of_service(layout, arguments).stop(arguments.service)


def _logs(layout: Layout, arguments: argparse.Namespace) -> None:
    directory = layout.logs(_node(arguments.node))
    files = sorted(str(path) for path in directory.rglob("*") if path.is_file())
    if not files:
        raise LabError(f"no logs in {directory}")
    _replace(["tail", "-n", "50", *(["-F"] if arguments.follow else []), *files])
