"""nova-ftvm-agent: one a compute host, as root. Joins configuration, probe, RPC server and the agent."""

from nova_ftvm.cmd import native  # noqa: F401

# isort: split
import dataclasses
import glob
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from oslo_config import cfg
from oslo_log import log

from nova_ftvm.cmd.engine import Order
from nova_ftvm.conf import agent as agent_conf
from nova_ftvm.conf import engine as engine_conf
from nova_ftvm.conf import service as service_conf
from nova_ftvm.engine.agent import Agent, Engine
from nova_ftvm.exception import FtvmError
from nova_ftvm.host import guests, kvm, note, probe, process
from nova_ftvm.rpc import common
from nova_ftvm.rpc import server as rpc_server
from nova_ftvm.rpc.agent import AgentApi
from nova_ftvm.rpc.manager import ManagerClient
from nova_ftvm.types import Generation, Role

LOG = log.getLogger(__name__)

#: An answer of the arbiter is waited for no longer; the engine then asks again.
_RPC_TIMEOUT_S = 3.0
#: How often folders of servers that are gone are looked for, and how long their logs are kept.
_SWEEP_S = 600.0
_KEEP_S = 3600.0


def configure(arguments: list[str]) -> cfg.ConfigOpts:
    """Options of the agent, from --config-file and the usual places."""
    conf = cfg.ConfigOpts()
    for group in (service_conf, agent_conf, engine_conf):
        group.register(conf)
    log.register_options(conf)
    conf(arguments, project="nova-ftvm")
    log.setup(conf, "nova-ftvm-agent")
    return conf


class EngineFactory:
    """Starts engines with this host's settings."""

    def __init__(self, conf: cfg.ConfigOpts, qemu_owner: tuple[int, int]) -> None:
        self._conf = conf
        self._owner = qemu_owner

    def __call__(self, request: dict[str, Any]) -> process.EngineProcess:
        """request: the fields of Order that belong to the pair."""
        folder = os.path.join(self._conf.agent.runtime_dir, request["instance_id"])
        settings = {option.name: self._conf.engine[option.name] for option in engine_conf.OPTS}
        if request["policy"]:
            settings["policy"] = request["policy"]
        order = Order(
            role=Role(request["role"]), pair_id=request["pair_id"], generation=Generation(request["generation"]),
            instance_id=request["instance_id"], token=request["token"], folder=folder,
            address=request["address"], port=request["port"],
            qemu_owner=self._owner, **settings)
        return process.start(dataclasses.asdict(order), os.path.join(folder, f"{order.role.value}.log"),
                             order.path(f"{order.role.value}.ctl"), self._conf.agent.engine_start_timeout_s)


def surviving_engines(runtime_dir: str) -> list[process.EngineProcess]:
    """Engines that the last agent left running."""
    found = []
    for path in glob.glob(os.path.join(runtime_dir, "*", "*.ctl")):
        try:
            found.append(process.EngineProcess(path, 0.0))
        except process.EngineLost:
            os.unlink(path)
    return found


def lost_engines(runtime_dir: str, living: Iterable[Engine]) -> list[process.LostEngine]:
    """Primaries' engines that died while no agent was there, and left their guests held. AFTER the living ones were
    found: one that hung was killed then."""
    attended = {engine.instance_id for engine in living if engine.role == Role.PRIMARY}
    found = []
    for folder in note.folders(runtime_dir):
        if os.path.basename(folder) in attended:
            continue
        left = note.find(folder)
        if left is None:
            note.remove(folder)
        else:
            found.append(process.LostEngine(left))
    return found


def main() -> int:
    conf = configure(sys.argv[1:])
    missing = probe.missing()
    try:
        qemu_owner = guests.owner(conf.agent.qemu_user)
    except FtvmError as error:
        missing.append(str(error))
        qemu_owner = (0, 0)
    for sentence in missing:
        LOG.error("this host cannot protect servers: %s", sentence)
    transport = common.transport(conf)
    os.makedirs(conf.agent.runtime_dir, mode=0o755, exist_ok=True)
    here = guests.Guests(conf.agent.runtime_dir, qemu_owner, conf.agent.libvirt_uri)
    agent = Agent(conf.host, conf.agent.data_address, missing, ManagerClient(transport, _RPC_TIMEOUT_S), here,
                  EngineFactory(conf, qemu_owner), abilities=kvm.abilities())
    living = surviving_engines(conf.agent.runtime_dir)
    agent.adopt_engines([*living, *lost_engines(conf.agent.runtime_dir, living)])
    server = rpc_server.serve(transport, common.AGENT_TOPIC, conf.host,
                              rpc_server.Endpoint(agent, rpc_server.methods_of(AgentApi)))
    server.start()
    LOG.info("agent of %s is up", conf.host)
    try:
        report_until_told(agent, here, conf.agent.report_interval_s)
    finally:
        server.stop()
        server.wait()
    return 0


def report_until_told(agent: Agent, here: guests.Guests, interval_s: float) -> None:
    """Reports, and sweeps now and then, until SIGTERM or SIGINT. Engines run on."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    next_sweep = time.monotonic()
    while not told.wait(interval_s):
        if time.monotonic() >= next_sweep:
            next_sweep = time.monotonic() + _SWEEP_S
            here.sweep(_KEEP_S)
        try:
            agent.report()
        except common.Failed as error:
            LOG.warning("the manager does not answer: %s", error)
        except FtvmError as error:
            LOG.error("an engine that is over could not be ended: %s", error)


if __name__ == "__main__":
    sys.exit(main())
