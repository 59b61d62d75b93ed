"""A small world for the control path: a cloud, agents and a clock, as plain classes. Nothing sleeps."""

import dataclasses
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import oslo_messaging

from nova_ftvm.db import connect
from nova_ftvm.db.store import Store
from nova_ftvm.failover.cloud import (
    BACKUP_PREFIX,
    GENERATION_KEY,
    PRIMARY_KEY,
    Binding,
    CloudRefused,
    CloudUnavailable,
    Port,
    Server,
)
from nova_ftvm.failover.loops import Queue
from nova_ftvm.failover.manager import Manager
from nova_ftvm.failover.settings import Settings
from nova_ftvm.types import PairId

SERVICE_PROJECT = "service"
VM = "11111111-1111-1111-1111-111111111111"
PORT = "port-1"
#: How long Nova takes, in the fake cloud.
EVACUATION_S = 0.6
DELETION_S = 0.4


class Killed(BaseException):
    """The manager's process is killed here."""


class Fuse:
    """Counts the manager's effects, and kills it at one of them: just before it, or just after."""

    def __init__(self) -> None:
        self.count = 0
        self.kill_at: int | None = None
        self.dead = False

    def effect(self) -> Iterator[None]:
        for _ in ("before", "after"):
            if self.dead:
                raise Killed
            self.count += 1
            if self.count == self.kill_at:
                self.dead = True
                raise Killed
            yield

    def read(self) -> None:
        if self.dead:
            raise Killed


class FakeClock:
    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class FakeCloud:
    """Servers, bindings, allocations, services. `refuse` and `break_down` make the next calls of a name fail."""

    def __init__(self, clock: FakeClock, fuse: Fuse) -> None:
        self.clock = clock
        self.fuse = fuse
        self.store: dict[str, Server] = {}
        self.bound: dict[str, dict[str, Binding]] = {}
        self.allocations: set[str] = set()
        self.forced_down: dict[str, bool] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.refuse: dict[str, list[CloudRefused]] = {}
        self.broken: dict[str, int] = {}
        self.port_list = [Port(PORT, "normal")]
        self.fail_evacuations = 0
        self.done_evacuations: set[str] = set()
        #: Hosts whose nova-compute does nothing, and that Nova does not know to be dead.
        self.dead: set[str] = set()
        #: Live migrations under way: server -> where to.
        self.moves: dict[str, list[str]] = {}
        self._ids = itertools.count(1)
        self._due: list[tuple[float, Any]] = []

    # The fake's own controls

    def boot(self, server_id: str = VM, host: str = "hx", **changes: Any) -> Server:
        server = dataclasses.replace(Server(
            id=server_id, name="web", project_id="tenant", host=host, vm_state="active", task_state=None,
            metadata={"ft": "true"}, extra_specs={}, image_properties={}, image_id="image", volumes=0,
            updated_at=self.clock.now()), **changes)
        self.store[server_id] = server
        self.bound[PORT] = {host: Binding(host, True, "tap")}
        self.allocations.add(server_id)
        return server

    def alter(self, server_id: str, **changes: Any) -> None:
        self.store[server_id] = dataclasses.replace(
            self.store[server_id], **{"updated_at": self.clock.now(), **changes})

    def backups(self) -> list[Server]:
        self._advance()
        return [server for server in self.store.values() if server.project_id == SERVICE_PROJECT]

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]

    def _advance(self) -> None:
        due = [event for event in self._due if event[0] <= self.clock.now()]
        self._due = [event for event in self._due if event[0] > self.clock.now()]
        for _, event in due:
            event()

    def _look(self, name: str) -> None:
        self.fuse.read()
        self._fail(name)
        self._advance()

    def _do(self, name: str, *arguments: Any) -> Iterator[None]:
        steps = self.fuse.effect()
        next(steps)
        self._fail(name)
        self._advance()
        self.calls.append((name, *arguments))
        yield
        next(steps)

    def _fail(self, name: str) -> None:
        if self.refuse.get(name):
            raise self.refuse[name].pop(0)
        if self.broken.get(name, 0) > 0:
            self.broken[name] -= 1
            raise CloudUnavailable(f"{name}: no answer")

    # cloud.Cloud

    def service_project(self) -> str:
        return SERVICE_PROJECT

    def servers(self) -> list[Server]:
        self._look("servers")
        return list(self.store.values())

    def server(self, server_id: str) -> Server | None:
        self._look("server")
        return self.store.get(server_id)

    def backups_of(self, instance_id: str) -> list[Server]:
        self._look("backups_of")
        return [server for server in self.store.values() if server.name == BACKUP_PREFIX + instance_id
                and server.project_id == SERVICE_PROJECT]

    def create_backup(self, primary: Server, hosts: Sequence[str], generation: int) -> str:
        for _ in self._do("create_backup", primary.id, tuple(hosts), generation):
            backup_id = f"backup-{next(self._ids)}"
            self.store[backup_id] = Server(
                id=backup_id, name=BACKUP_PREFIX + primary.id, project_id=SERVICE_PROJECT, host=None,
                vm_state="building", task_state="spawning",
                metadata={PRIMARY_KEY: primary.id, GENERATION_KEY: str(generation)}, extra_specs={},
                image_properties={}, image_id="image", volumes=0, updated_at=self.clock.now())
            self.allocations.add(backup_id)
        return backup_id

    def delete_server(self, server_id: str) -> None:
        for _ in self._do("delete_server", server_id):
            if server_id in self.store:
                self.alter(server_id, task_state="deleting")
                host = self.store[server_id].host or ""
                if host in self.dead and not self.forced_down.get(host):
                    continue  # Nova believes that the host lives, and gives the order to nobody.
                self._due.append((self.clock.now() + DELETION_S, lambda: self.store.pop(server_id, None)))

    def set_metadata(self, server_id: str, items: Mapping[str, str]) -> None:
        for _ in self._do("set_metadata", server_id, dict(items)):
            if server_id not in self.store:
                raise CloudRefused("metadata", 404, "no such server")
            if self.store[server_id].vm_state not in ("active", "paused", "suspended", "stopped", "building"):
                raise CloudRefused("metadata", 409, f"the server is {self.store[server_id].vm_state}")
            self.alter(server_id, metadata={**self.store[server_id].metadata, **items})

    def delete_metadata(self, server_id: str, key: str) -> None:
        for _ in self._do("delete_metadata", server_id, key):
            left = {name: value for name, value in self.store[server_id].metadata.items() if name != key}
            self.alter(server_id, metadata=left)

    def reset_state(self, server_id: str) -> None:
        for _ in self._do("reset_state", server_id):
            self.alter(server_id, vm_state="active", task_state=None, fault="")

    def evacuate(self, server_id: str, host: str) -> None:
        for _ in self._do("evacuate", server_id, host):
            server = self.store[server_id]
            if not self.forced_down.get(server.host or ""):
                raise CloudRefused("evacuate", 409, f"the compute service of {server.host} is in use")
            if server.task_state not in (None, "deleting") or server.vm_state != "active":
                raise CloudRefused("evacuate", 409, f"{server.vm_state}, {server.task_state}")
            self.alter(server_id, task_state="rebuilding")
            self._due.append((self.clock.now() + EVACUATION_S, lambda: self._evacuated(server_id, host)))

    def tell_of_backups(self) -> threading.Event:
        """Set once a backup was asked for; for tests with the manager's real threads."""
        asked = threading.Event()
        create = self.create_backup

        def created(*arguments: Any) -> str:
            backup_id = create(*arguments)
            asked.set()
            return backup_id

        self.create_backup = created  # type: ignore[method-assign]
        return asked

    def moving_to(self, server_id: str) -> list[str]:
        self._look("moving_to")
        return self.moves.get(server_id, [])

    def _evacuated(self, server_id: str, host: str) -> None:
        if server_id not in self.store or self.store[server_id].task_state != "rebuilding":
            return
        if self.fail_evacuations:
            self.fail_evacuations -= 1
            self.alter(server_id, vm_state="error", task_state=None, fault="No valid host was found")
            return
        self.done_evacuations.add(self.store[server_id].host or "")
        self.alter(server_id, host=host, task_state=None)

    def force_down(self, host: str, down: bool) -> None:
        for _ in self._do("force_down", host, down):
            if not down and host in self.done_evacuations:
                raise CloudRefused("force_down", 400, "`done` evacuation records remain")
            self.forced_down[host] = down

    def delete_allocation(self, consumer_id: str) -> None:
        for _ in self._do("delete_allocation", consumer_id):
            self.allocations.discard(consumer_id)

    def release_allocation(self, server_id: str, host: str) -> None:
        for _ in self._do("release_allocation", server_id, host):
            assert server_id not in self.store or self.store[server_id].host != host

    def ports(self, instance_id: str) -> list[Port]:
        self._look("ports")
        return self.port_list if instance_id in self.store else []

    def bindings(self, port_id: str) -> list[Binding]:
        self._look("bindings")
        return list(self.bound[port_id].values())

    def bind(self, port: Port, host: str) -> Binding:
        for _ in self._do("bind", port.id, host):
            self.bound[port.id].setdefault(host, Binding(host, False, "tap", {"port_filter": False}))
        return self.bound[port.id][host]

    def activate(self, port_id: str, host: str) -> None:
        for _ in self._do("activate", port_id, host):
            self.bound[port_id] = {name: dataclasses.replace(binding, active=name == host)
                                   for name, binding in self.bound[port_id].items()}

    def unbind(self, port_id: str, host: str) -> None:
        for _ in self._do("unbind", port_id, host):
            self.bound[port_id].pop(host, None)


class FakeAgents:
    """The agents of all hosts. A host in `silent` does not answer."""

    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse
        self.silent: set[str] = set()
        self.unarmed = ""
        self.domain_xml = "<domain/>"
        self.disks = {"vda": 1 << 30}
        self.calls: list[tuple[Any, ...]] = []
        self.broken: set[str] = set()
        #: Calls that an agent refuses for a lasting reason.
        self.refused: set[str] = set()
        #: Of each start_primary.
        self.policies: list[str] = []

    def _call(self, name: str, host: str, *arguments: Any) -> None:
        steps = self.fuse.effect()
        next(steps)
        self.calls.append((name, host, *arguments))
        if host in self.silent:
            raise oslo_messaging.MessagingTimeout(f"{host} does not answer {name}")
        if name in self.broken:
            raise oslo_messaging.RemoteError("FtvmError", f"{name} broke")
        if name in self.refused:
            raise oslo_messaging.RemoteError("Unsupported", f"{name} needs a newer QEMU")
        next(steps)

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]

    def describe_domain(self, host: str, instance_id: str) -> dict[str, Any]:
        self._call("describe_domain", host, instance_id)
        return {"domain_xml": self.domain_xml, "armed": not self.unarmed, "reason": self.unarmed, "disks": self.disks}

    def start_backup(self, host: str, pair_id: str, generation: int, instance_id: str, token: str) -> dict[str, Any]:
        self._call("start_backup", host, generation)
        return {"address": "10.0.0.2", "port": 4242}

    def start_primary(self, host: str, pair_id: str, generation: int, instance_id: str, address: str, port: int,
                      token: str, policy: str) -> dict[str, Any]:
        self._call("start_primary", host, generation, address, port)
        self.policies.append(policy)
        return {}

    def stop_engine(self, host: str, pair_id: str, generation: int, reason: str,
                    timeout_s: float | None = None) -> bool:
        self._call("stop_engine", host, generation)
        return True

    def fence(self, host: str, pair_id: str, generation: int, instance_id: str,
              timeout_s: float | None = None) -> None:
        self._call("fence", host, generation)

    def discard_standby(self, host: str, instance_id: str) -> bool:
        self._call("discard_standby", host)
        return True


class MortalStore(Store):
    """A store that a killed manager cannot reach any more, so that its claims stay as a crash leaves them."""

    fuse: Fuse

    def change(self, pair: Any, **changes: Any) -> Any:
        steps = self.fuse.effect()
        next(steps)
        changed = super().change(pair, **changes)
        next(steps)
        return changed

    def claim(self, *arguments: Any) -> bool:
        self.fuse.read()
        return super().claim(*arguments)

    def release(self, *arguments: Any) -> None:
        self.fuse.read()
        super().release(*arguments)

    def mark_forced_down(self, host: str, forced: bool) -> None:
        steps = self.fuse.effect()
        next(steps)
        super().mark_forced_down(host, forced)
        next(steps)


class World:
    """Two compute hosts (hx, hy) with agents, one server, one manager at a time."""

    def __init__(self, url: str, hosts: Sequence[str] = ("hx", "hy"), **settings: Any) -> None:
        self.engine = connect.engine_for(url, sqlite_synchronous=False)
        connect.sync(self.engine)
        self.clock = FakeClock()
        self.fuse = Fuse()
        self.cloud = FakeCloud(self.clock, self.fuse)
        self.agents = FakeAgents(self.fuse)
        self.settings = settings
        self.hosts = list(hosts)
        #: What every engine says of itself.
        self.engine_state = "x"
        #: The moves that were announced: (from, to).
        self.moves: list[tuple[Any, Any]] = []
        self.manager = self.new_manager("m1")
        self.report_all()

    def new_manager(self, name: str) -> Manager:
        """A manager process; the one before it is gone."""
        self.fuse.dead, self.fuse.kill_at = False, None
        self.store = MortalStore(self.engine, self.clock.now)
        self.store.fuse = self.fuse
        self.queue: Queue[PairId] = Queue(self.clock.now)
        self.manager = Manager(
            self.store, self.cloud, self.agents, self.clock, Settings(name=name, **self.settings), self.queue,
            announce=lambda before, after: self.moves.append((before and before.state.value, after.state.value)))
        return self.manager

    def report_all(self, **changes: Any) -> None:
        for host in self.hosts:
            self.report(host, **changes)

    def report(self, host: str, **changes: Any) -> list[str]:
        return self.manager.agent_report(host, {"capable": True, "reason": "", "data_address": "10.0.0.1",
                                                "engines": [], **changes})["stale"]

    def work(self, limit: int = 100) -> None:
        """The workers, until nothing is due."""
        for _ in range(limit):
            pair_id = self.queue.take(0)
            if pair_id is None:
                return
            again = self.manager.follow(pair_id)
            self.queue.done(pair_id)
            if again is not None:
                self.queue.put(pair_id, again)
        raise AssertionError("the pair's work does not come to rest")

    def pass_by(self, seconds: float = 0.0) -> None:
        """Time goes by; one reconcile, and all the work that it makes."""
        self.clock.time += seconds
        self.report_all_alive()
        self.manager.reconciler.all()
        self.work()

    def report_all_alive(self) -> None:
        for host in self.hosts:
            if host not in self.agents.silent:
                self.report(host, engines=self.engines_of(host))

    def engines_of(self, host: str) -> list[dict[str, Any]]:
        pair = self.store.pair_of(VM)  # type: ignore[arg-type]
        if pair is None or pair.state not in ("protected", "syncing") or host not in (
                pair.primary_host, pair.backup_host):
            return []
        role = "primary" if host == pair.primary_host else "backup"
        return [{"pair_id": pair.id, "role": role, "generation": pair.generation, "state": self.engine_state,
                 "instance_id": pair.instance_id}]

    @property
    def pair(self) -> Any:
        return self.store.pair_of(VM)  # type: ignore[arg-type]

    @property
    def shown(self) -> tuple[str | None, str | None]:
        metadata = self.cloud.store[VM].metadata
        return metadata.get("ft:state"), metadata.get("ft:reason")

    @property
    def progress_shown(self) -> str | None:
        return self.cloud.store[VM].metadata.get("ft:progress")

    # The life of a pair

    def spawn_backup(self, host: str = "hy") -> dict[str, Any]:
        """Nova's scheduler and the driver on `host`."""
        backup = self.cloud.backups()[-1]
        plan = self.manager.standby_plan(backup.id, host)
        assert plan is not None
        grant = self.manager.standby_ready(plan["pair_id"], plan["generation"], host, "")
        self.cloud.alter(backup.id, host=host, vm_state="active", task_state=None)
        self.work()
        return grant

    def start_copy(self) -> None:
        """From a fresh server to SYNCING on hx, with its backup on hy."""
        self.cloud.boot()
        self.pass_by()
        self.spawn_backup()

    def protect(self) -> None:
        """From a fresh server to PROTECTED on hx, with its backup on hy."""
        self.start_copy()
        self.finish_copy()

    def finish_copy(self) -> None:
        pair = self.pair
        self.manager.report_protection(pair.id, pair.generation, pair.primary_host, "protected", "")
        self.work()

    def lose_backup(self) -> None:
        """The primary notices it, and goes on alone."""
        pair = self.pair
        self.manager.request_degrade(pair.id, pair.generation, pair.primary_host, "no acknowledgement for 500 ms")
        self.work()

    def promote(self, work: bool = True) -> dict[str, Any]:
        """hx dies; the backup's engine asks, resumes and reports."""
        pair = self.pair
        self.agents.silent.add("hx")
        now = self.clock.now()
        grant = self.manager.request_promotion(pair.id, pair.generation, "hy", "no heartbeat for 320 ms")
        self.manager.report_promoted(pair.id, pair.generation, "hy", {
            "detected_at": now, "granted_at": now + 0.01, "running_at": now + 0.04}, "")
        if work:
            self.work()
        return grant
