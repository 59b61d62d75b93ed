"""Simulated agents: real RPC over the real broker, no guests.

Run as `python -m tests.scale.fleet FOLDER PAIRS SHARE OF` by the benchmark; plays every OF-th host, from number SHARE
on. Each host reports its engines every second, and answers the manager's calls at once. A line of JSON on standard
input is an order, a line on standard output its answer.

    {"do": "measure"}                 forgets what was measured so far
    {"do": "collect"}                 {"latencies_ms": [...] of agent_report, "failed": n}
    {"do": "die", "hosts": [...]}     these are silent from now on; all play along, as their partners are to be known
    {"do": "ask"}                     every partner of the dead asks for its pair, all at once:
                                      {"promote": [...], "degrade": [...]} each
                                      {"ms", "granted", "again": calls that were not answered, "start", "end"}
"""

import concurrent.futures
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nova_ftvm.rpc import agent as agent_rpc
from nova_ftvm.rpc import common
from nova_ftvm.rpc import server as rpc_server
from nova_ftvm.rpc.manager import ManagerClient
from nova_ftvm.types import Generation, Grant
from tests.scale import services
from tests.scale.population import Member, hosts_of, members

REPORT_INTERVAL_S = 1.0
#: As cmd/agent.py's.
RPC_TIMEOUT_S = 3.0
_CALLS = 20
_AGAIN_S = 0.2
#: How long a backup takes from its grant until its guest runs.
RESUME_S = 0.04


class Answers:
    """An agent with nothing to do. Every call comes to its end at once."""

    def prepare_domain(self, **arguments: Any) -> dict[str, Any]:
        return {"monitor": "/nowhere", "capable": True, "reason": ""}

    def describe_domain(self, **arguments: Any) -> dict[str, Any]:
        return {"domain_xml": "<domain/>", "armed": True, "reason": "", "disks": {}}

    def start_backup(self, **arguments: Any) -> dict[str, Any]:
        return {"address": "127.0.0.1", "port": 1}

    def start_primary(self, **arguments: Any) -> dict[str, Any]:
        return {}

    def stop_engine(self, **arguments: Any) -> dict[str, Any]:
        return {"stopped": True}

    def fence(self, **arguments: Any) -> dict[str, Any]:
        return {}

    def hand_over(self, **arguments: Any) -> dict[str, Any]:
        return {"handed_over": False}

    def discard_standby(self, **arguments: Any) -> dict[str, Any]:
        return {"discarded": True}


class Fleet:
    def __init__(self, folder: Path, pairs: int, share: int, of: int) -> None:
        self._population = members(pairs)
        self._hosts = hosts_of(self._population)[share::of]
        self._engines: dict[str, dict[str, dict[str, Any]]] = {host: {} for host in self._hosts}
        for member in self._population:
            for host, role in ((member.primary_host, "primary"), (member.backup_host, "backup")):
                if host in self._engines:
                    self._engines[host][member.pair_id] = member.engine(role)
        transport = common.transport(services.configuration(folder))
        endpoint = rpc_server.Endpoint(Answers(), rpc_server.methods_of(agent_rpc.AgentApi))
        self._servers = {host: rpc_server.serve(transport, common.AGENT_TOPIC, host, endpoint) for host in self._hosts}
        self._manager = ManagerClient(transport, RPC_TIMEOUT_S)
        self._dead: set[str] = set()
        self._latencies_ms: list[float] = []
        self._failed = 0

    def start(self) -> None:
        for number, host in enumerate(self._hosts):
            self._servers[host].start()
            phase_s = REPORT_INTERVAL_S * number / len(self._hosts)
            threading.Thread(target=self._report, args=(host, phase_s), daemon=True).start()

    def _report(self, host: str, phase_s: float) -> None:
        due = time.monotonic()
        while host not in self._dead:
            time.sleep(max(0.0, due - time.monotonic()))
            # The first ones come together, so that there is a connection to the broker for each of them.
            due = max(due + REPORT_INTERVAL_S, time.monotonic()) + phase_s
            phase_s = 0.0
            start = time.monotonic()
            try:
                self._manager.agent_report(host, {
                    "capable": True, "reason": "", "data_address": "192.0.2.1", "incarnation": "one",
                    "engines": list(dict(self._engines[host]).values())})
                self._latencies_ms.append((time.monotonic() - start) * 1000)
            except common.Failed:
                self._failed += 1

    # -- orders

    def measure(self) -> dict[str, Any]:
        self._latencies_ms, self._failed = [], 0
        return {}

    def collect(self) -> dict[str, Any]:
        return {"latencies_ms": [round(found, 2) for found in self._latencies_ms], "failed": self._failed}

    def die(self, hosts: list[str]) -> dict[str, Any]:
        self._dead = set(hosts)
        for host in self._dead & set(self._hosts):
            # Its queue stays, as that of a host without power does: what is sent there is not answered.
            self._servers[host].stop()
        return {}

    def ask(self) -> dict[str, Any]:
        promote = [member for member in self._population
                   if member.primary_host in self._dead and member.backup_host in self._engines]
        degrade = [member for member in self._population
                   if member.backup_host in self._dead and member.primary_host in self._engines]
        with concurrent.futures.ThreadPoolExecutor(max(1, len(promote) + len(degrade))) as pool:
            asked = {"promote": [pool.submit(self._asked, member, self._promote) for member in promote],
                     "degrade": [pool.submit(self._asked, member, self._degrade) for member in degrade]}
            return {kind: [one.result() for one in ones] for kind, ones in asked.items()}

    def _asked(self, member: Member, ask: Callable[[Member], Grant]) -> dict[str, Any]:
        """As an agent does: whoever gets no answer asks again."""
        start = time.monotonic()
        grant, again = _insist(lambda: ask(member))
        end = time.monotonic()
        for host in {member.primary_host, member.backup_host} & self._engines.keys():
            self._engines[host].pop(member.pair_id, None)
        if grant.granted and ask == self._promote:
            time.sleep(RESUME_S)
            now = time.time()
            _insist(lambda: self._manager.report_promoted(member.pair_id, Generation(1), member.backup_host, {
                "detected_at": now - RESUME_S - (end - start), "granted_at": now - RESUME_S, "running_at": now}))
        return {"ms": round((end - start) * 1000, 2), "granted": grant.granted, "again": again,
                "start": start, "end": end}

    def _promote(self, member: Member) -> Grant:
        return self._manager.request_promotion(member.pair_id, Generation(1), member.backup_host,
                                               "no heartbeat for 320 ms")

    def _degrade(self, member: Member) -> Grant:
        return self._manager.request_degrade(member.pair_id, Generation(1), member.primary_host,
                                             "no acknowledgement for 500 ms")


def _insist(ask: Callable[[], Grant]) -> tuple[Grant, int]:
    """The answer, and how often it took another call; a refusal if none came."""
    for again in range(_CALLS):
        try:
            return ask(), again
        except common.Failed:
            time.sleep(_AGAIN_S)
    return Grant(False, Generation(0), "no answer"), _CALLS


def main() -> None:
    folder, pairs, share, of = sys.argv[1:]
    fleet = Fleet(Path(folder), int(pairs), int(share), int(of))
    fleet.start()
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(fleet, order.pop("do"))(**order)), flush=True)


if __name__ == "__main__":
    main()
