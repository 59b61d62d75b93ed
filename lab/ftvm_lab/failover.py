"""The demo's scenario, once, and its parts for other ones: a protected server's host dies, and its clients go on.

Both the demo and the system tests run it. Every figure counts from the moment
just before the host's power is taken away.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from openstack.compute.v2.server import Server

from ftvm_lab import cloud, computes, lab, network, pairs, strikes
from ftvm_lab.client import PORT, Report
from ftvm_lab.cloud import Client
from ftvm_lab.command import LabError, Progress, wait_until
from ftvm_lab.layout import COMPUTES, CONTROL, Layout, compute
from ftvm_lab.pairs import Checkpoints, Pair, Timeline
from ftvm_lab.seed import IMAGE, NETWORK
from ftvm_lab.servers import STATE_KEY, Servers
from ftvm_lab.traffic import Traffic, measure, wait_for_guest

MEASURE_S = 5.0
BOOT_TIMEOUT_S = 120.0
PROTECT_TIMEOUT_S = 120.0
MOVE_TIMEOUT_S = 120.0
CLEAN_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Kind:
    """What a server is made of, the port that its guest serves, and the time that it may take to boot."""

    image: str
    flavor: str
    port: int
    boot_timeout_s: float


DEMO = Kind(IMAGE, "ftvm.demo", PORT, BOOT_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Placement:
    """What must be the same after a failover, and where the server is."""

    server_id: str
    address: str
    port_id: str
    host: str


@dataclass(frozen=True, slots=True)
class FailoverTimes:
    """Milliseconds from the kill; None for what did not happen."""

    detected: float | None
    granted: float | None
    running: float | None
    first_reply: float | None
    nova_done: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of the scenario. `traffic`: from before the kill until after the catch-up."""

    server: str
    primary_host: str
    backup_host: str
    host_after: str
    same_identity: bool
    traffic: Report
    rtt_ms_p50_unprotected: float
    rtt_ms_p50_protected: float
    times: FailoverTimes
    checkpoints: Checkpoints
    boot_s: float
    protect_s: float

    @property
    def survived(self) -> bool:
        """The same server runs on its backup's host, and no client saw a fault."""
        traffic = self.traffic
        is_clean = not (traffic.lost or traffic.wrong or traffic.reconnects)
        return self.same_identity and self.host_after == self.backup_host and is_clean


def prepare(layout: Layout, progress: Progress) -> float:
    """A clean lab; the seconds that it took."""
    if network.namespaces():
        if computes.is_plain(layout):
            raise LabError("the lab is up without nova_ftvm: ftvm-lab down")
        cloud.enter_control()
    else:
        lab.up(layout, plain=False, progress=progress)
    clear(layout)
    return round(progress.elapsed_s, 1)


def clear(layout: Layout) -> None:
    """Undoes what an interrupted scenario left: faults, dead hosts, and the plain user's servers."""
    for node in (CONTROL, *COMPUTES):
        strikes.mend(layout, node)
    for server in cloud.connect(layout, "demo").compute.servers():
        Servers(cloud.connect(layout)).delete(server.id)
    Servers(cloud.connect(layout)).wait_until_clean(CLEAN_TIMEOUT_S)


class Stage:
    """The lab as the scenario uses it: two users, the hosts, and somebody who watches."""

    def __init__(self, layout: Layout, servers: Servers, progress: Progress) -> None:
        self.layout = layout
        self.servers = servers
        self.progress = progress
        self._clients = {cloud: Client(layout, cloud) for cloud in ("demo", "admin")}

    def openstack(self, arguments: Sequence[str], cloud: str = "demo") -> str:
        """Runs the real client, and shows the command and its answer."""
        as_admin = "" if cloud == "demo" else f"--os-cloud {cloud} "
        print(f"$ openstack {as_admin}{' '.join(arguments)}", flush=True)
        output = self._clients[cloud](arguments)
        print(output, end="", flush=True)
        return output

    def create(self, name: str, *properties: str, kind: Kind = DEMO, port: str | None = None) -> str:
        """Creates a server as the plain user, on a port of its own if one is given; its id, when it is ACTIVE."""
        net = ("--network", NETWORK) if port is None else ("--port", port)
        words = [word for text in properties for word in ("--property", text)]
        self.openstack(
            [
                *("server", "create", *words, "--image", kind.image, "--flavor", kind.flavor),
                *(*net, "--wait", "-c", "id", "-c", "status", "-c", "addresses", name),
            ]
        )
        server = next(server for server in self.servers.all() if server.name == name)
        return str(server.id)

    def place(self, server_id: str) -> Placement:
        servers = self.servers
        return Placement(
            server_id,
            servers.address(server_id),
            servers.port_id(server_id),
            servers.host(server_id),
        )


@dataclass(frozen=True, slots=True)
class Protected:
    """A server that is ready to lose its host."""

    before: Placement
    backup: Server
    boot_s: float
    protect_s: float


def protect(stage: Stage, name: str, kind: Kind = DEMO) -> Protected:
    """Creates a server with ft=true, and waits until it is protected and its guest serves."""
    start = time.monotonic()
    server_id = stage.create(name, "ft=true", kind=kind)
    boot_s = time.monotonic() - start
    backup = stage.servers.wait_for_backup(server_id, PROTECT_TIMEOUT_S)
    stage.progress.step(f"its backup {backup.name} is on {backup.compute_host}")
    stage.servers.wait_for_state(server_id, "protected", PROTECT_TIMEOUT_S)
    protect_s = time.monotonic() - start
    shown = stage.openstack(["server", "show", name, "-c", "properties"])
    if f"{STATE_KEY}='protected'" not in shown:
        raise LabError(f"the client does not show {STATE_KEY}='protected': {shown}")
    stage.openstack(
        ["server", "list", "--all-projects", "--long", "-c", "Name", "-c", "Status", "-c", "Host"],
        cloud="admin",
    )
    before = stage.place(server_id)
    wait_for_guest(before.address, kind.boot_timeout_s, kind.port)
    return Protected(before, backup, boot_s, protect_s)


def wait_for_protection(stage: Stage, server_id: str, timeout_s: float = PROTECT_TIMEOUT_S) -> Pair:
    """Until the server is protected where Nova has it; what it shows may be of before a failover."""

    def protected() -> Pair | None:
        if stage.servers.protection(server_id)[0] != "protected":
            return None
        found = pairs.pair(stage.layout, server_id)
        is_here = stage.servers.host(server_id) == found.primary_host
        return found if found.state == "protected" and is_here else None

    return wait_until(f"{server_id} to be protected", protected, timeout_s)


def measure_unprotected(stage: Stage, name: str) -> float:
    """The client's median round trip with an ordinary server, which is deleted again."""
    server_id = stage.create(name)
    address = stage.servers.address(server_id)
    wait_for_guest(address, BOOT_TIMEOUT_S)
    report = measure(address, MEASURE_S)
    stage.progress.step(f"unprotected: a reply takes {report.rtt_ms_p50} ms (median)")
    stage.servers.delete(server_id)
    return report.rtt_ms_p50


def lose_host(stage: Stage, protected: Protected, rtt_ms_p50_unprotected: float) -> Outcome:
    """Measures, kills the primary's host under traffic, and waits until Nova has caught up."""
    before = protected.before
    backup_host = str(protected.backup.compute_host)
    rtt_protected = measure(before.address, MEASURE_S).rtt_ms_p50
    stage.progress.step(f"protected: a reply takes {rtt_protected} ms (median)")
    with Traffic(before.address) as traffic:
        time.sleep(MEASURE_S)
        check_still_protected(stage, protected)
        killed_at = time.time()
        traffic.mark()
        computes.kill(stage.layout, compute(before.host))
        stage.progress.step(f"{before.host} is dead")
        stage.servers.wait_for_move(before.server_id, backup_host, MOVE_TIMEOUT_S)
        stage.progress.step(f"Nova has the server on {backup_host}")
        time.sleep(MEASURE_S)
        report = traffic.finish()
    after = stage.place(before.server_id)
    stage.openstack(
        [
            *("server", "show", before.server_id, "-c", "id", "-c", "status", "-c", "addresses"),
            *("-c", "OS-EXT-SRV-ATTR:host", "-c", "OS-EXT-STS:task_state"),
        ],
        cloud="admin",
    )
    identity = (before.server_id, before.address, before.port_id)
    return Outcome(
        server=before.server_id,
        primary_host=before.host,
        backup_host=backup_host,
        host_after=after.host,
        same_identity=identity == (after.server_id, after.address, after.port_id),
        traffic=report,
        rtt_ms_p50_unprotected=rtt_ms_p50_unprotected,
        rtt_ms_p50_protected=rtt_protected,
        times=_times(pairs.timeline(stage.layout, before.server_id), killed_at, report.first_reply_ms),
        checkpoints=pairs.checkpoints(stage.layout, compute(before.host), before.server_id),
        boot_s=round(protected.boot_s, 1),
        protect_s=round(protected.protect_s, 1),
    )


def check_still_protected(stage: Stage, protected: Protected) -> None:
    """The scenario is about one failover: there must not have been one before."""
    before = protected.before
    state, reason = stage.servers.protection(before.server_id)
    host = stage.servers.host(before.server_id)
    if state != "protected" or host != before.host or host == protected.backup.compute_host:
        raise LabError(
            f"the server is on {host} and {state} ({reason}) before the kill; it was on {before.host},"
            f" its backup on {protected.backup.compute_host}"
        )


def _times(line: Timeline, killed_at: float, first_reply_ms: float | None) -> FailoverTimes:
    def since_kill(moment: float | None) -> float | None:
        return None if moment is None else round((moment - killed_at) * 1000, 1)

    return FailoverTimes(
        detected=since_kill(line.detected_at),
        granted=since_kill(line.granted_at),
        running=since_kill(line.running_at),
        first_reply=first_reply_ms,
        nova_done=since_kill(line.nova_done_at),
    )


def clean_up(stage: Stage, server_id: str, dead_host: str | None) -> None:
    """Powers the dead host on, deletes the server, and waits until the next run can start."""
    if dead_host is not None:
        computes.power_on(stage.layout, compute(dead_host))
        stage.progress.step(f"{dead_host} has power again")
    stage.servers.delete(server_id)
    stage.servers.wait_until_clean(CLEAN_TIMEOUT_S)
    stage.progress.step("the cloud is clean")
