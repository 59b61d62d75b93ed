"""Does harm to a protected server's cloud, one fault at a time, and watches what becomes of it.

Which fault, when and for how long is drawn from a seed alone; what happens has no say in it. Each fault is over when
the server is protected again and all hosts and services are back, or when that took too long. Called by
ftvm_lab.torture; it knows nothing of the clients.
"""

import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from keystoneauth1.exceptions import ClientException
from openstack.exceptions import SDKException

from ftvm_lab import cloud, faults, lab, pairs
from ftvm_lab.command import LabError, WaitedTooLong, wait_until
from ftvm_lab.faults import Fault, Scene
from ftvm_lab.layout import COMPUTES, Layout, compute
from ftvm_lab.servers import REASON_KEY, STATE_KEY, Servers

#: Seconds without a fault before each one.
QUIET_S = (3.0, 10.0)
LOOK_EVERY_S = 1.0
API_TIMEOUT_S = 20.0
#: The primary's engine writes its statistics once a second.
STATISTICS_AGE_S = 4.0
#: Protection counts as back once it lasts: what Nova shows is a little late.
SETTLE_S = 5.0
#: After a fault was healed.
RECOVERY_TIMEOUT_S = 240.0
#: No single server survives it; the torture is about those that one does.
TOTAL_LOSS = frozenset({"both-hosts-killed"})
#: What an API that is away makes of a question.
API_ERRORS = (SDKException, ClientException)


@dataclass(frozen=True, slots=True)
class Planned:
    fault: Fault
    quiet_s: float
    lasts_s: float


def plan(chosen: Sequence[Fault], seed: int) -> Iterator[Planned]:
    """Without end: all faults in a random order, again and again, each time in another one."""
    draw = random.Random(seed)
    while True:
        for fault in draw.sample(chosen, len(chosen)):
            yield Planned(fault, draw.uniform(*QUIET_S), draw.uniform(*fault.lasts_s))


def choose(names: Sequence[str]) -> list[Fault]:
    """The faults of these names, or of none all that a server can survive; LabError for a name that there is not."""
    wrong = [name for name in names if name not in faults.FAULTS or name in TOTAL_LOSS]
    if wrong:
        known = ", ".join(name for name in faults.FAULTS if name not in TOTAL_LOSS)
        raise LabError(f"no fault to survive: {', '.join(wrong)}; there are {known}")
    return [fault for name, fault in faults.FAULTS.items() if name not in TOTAL_LOSS and (not names or name in names)]


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of the server at a moment; `state` is None if nobody could say."""

    at_s: float
    host: str
    state: str | None
    reason: str
    is_resting: bool
    has_fresh_checkpoints: bool

    @property
    def is_protected(self) -> bool:
        return self.state == "protected" and self.is_resting and self.has_fresh_checkpoints


def protected_since(looks: Sequence[Look]) -> float | None:
    """The begin of the last looks without a break that all found the server protected; None if the last did not."""
    begin = None
    for look in reversed(looks):
        if not look.is_protected:
            break
        begin = look.at_s
    return begin


def states(looks: Sequence[Look]) -> tuple[str, ...]:
    """The states with their reasons as they followed each other."""
    told: list[str] = []
    for look in looks:
        if look.state is not None:
            text = look.reason if look.reason.startswith(look.state) else f"{look.state}: {look.reason}"
            if told[-1:] != [text]:
                told.append(text)
    return tuple(told)


def dead_services(status: Mapping[str, Mapping[str, bool]]) -> list[str]:
    """What does not run though it should, as sentences; `status` is the lab's."""
    dead = [f"{machine} is off" for machine, services in status.items() if not services]
    return dead + [
        f"{service} does not run on {machine}"
        for machine, services in status.items()
        for service, runs in services.items()
        if not runs
    ]


class Watch:
    """Looks at the server all the time, in a thread: a question to an API that is away takes long."""

    def __init__(self, layout: Layout, server_id: str) -> None:
        self.looks: list[Look] = []
        self._layout = layout
        self._server_id = server_id
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(API_TIMEOUT_S * 2)

    def since(self, start_s: float) -> list[Look]:
        return [look for look in self.looks if look.at_s >= start_s]

    def _run(self) -> None:
        connection = cloud.connect(self._layout)
        connection.session.timeout = API_TIMEOUT_S
        servers = Servers(connection)
        while not self._over.wait(LOOK_EVERY_S):
            self.looks.append(self._look(servers))

    def _look(self, servers: Servers) -> Look:
        at_s = time.monotonic()
        try:
            server = servers.get(self._server_id)
        except API_ERRORS as error:
            return Look(at_s, "", None, type(error).__name__, False, False)
        host = str(server.compute_host)
        state, reason = (server.metadata.get(key, "") for key in (STATE_KEY, REASON_KEY))
        is_resting = server.status == "ACTIVE" and server.task_state is None
        return Look(at_s, host, state, reason, is_resting, self._has_fresh_checkpoints(host))

    def _has_fresh_checkpoints(self, host: str) -> bool:
        try:
            statistics = self._layout.runtime(compute(host)) / self._server_id / "epochs.jsonl"
            return time.time() - statistics.stat().st_mtime < STATISTICS_AGE_S
        except (ValueError, OSError):
            return False


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault and what came of it. Seconds: `start_s` and `end_s` on CLOCK_MONOTONIC, the others from the strike.

    `protected_after_s` is 0 if it was protected all the time as far as one could see, None if it never was again.
    """

    number: int
    planned: Planned
    scene: Scene
    start_s: float
    end_s: float
    lasted_s: float
    host_after: str
    backup_after: str | None
    failed_over: bool
    protected_after_s: float | None
    hosts_back_after_s: float | None
    states: tuple[str, ...]
    trouble: tuple[str, ...] = ()

    @property
    def fault(self) -> Fault:
        return self.planned.fault

    @property
    def is_recovered(self) -> bool:
        return self.protected_after_s is not None and self.hosts_back_after_s is not None and not self.trouble


@dataclass(slots=True)
class Nemesis:
    layout: Layout
    server_id: str
    servers: Servers
    watch: Watch
    _trouble: list[str] = field(default_factory=list)

    def strike(self, number: int, planned: Planned) -> Struck:
        """Waits its time, injects the fault, heals it, and waits until everything is as before."""
        self._trouble = []
        scene = faults.scene_of(self.layout, self.server_id)
        time.sleep(planned.quiet_s)
        struck_at = time.time()
        start_s = time.monotonic()
        self._inject(planned, scene)
        healed_s = time.monotonic()
        protected_s, hosts_s = self._await_recovery(healed_s)
        end_s = time.monotonic()
        self._trouble += dead_services(lab.status(self.layout))
        after, failed_over = self._aftermath(scene, struck_at)
        if failed_over and not planned.fault.may_fail_over:
            self._trouble.append("it failed over, which this fault must not lead to")
        return Struck(
            number,
            planned,
            scene,
            start_s,
            end_s,
            healed_s - start_s,
            host_after=after.primary_host if after else "",
            backup_after=after.backup_host if after else None,
            failed_over=failed_over,
            protected_after_s=None if protected_s is None else max(protected_s - start_s, 0.0),
            hosts_back_after_s=None if hosts_s is None else hosts_s - start_s,
            states=states(self.watch.since(start_s)),
            trouble=tuple(self._trouble),
        )

    def _inject(self, planned: Planned, scene: Scene) -> None:
        try:
            heal = planned.fault.strike(scene)
        except (LabError, OSError) as error:
            self._trouble.append(f"not injected: {error}")
            return
        time.sleep(planned.lasts_s)
        try:
            heal()
        except (LabError, OSError) as error:
            self._trouble.append(f"not healed: {error}")

    def _await_recovery(self, healed_s: float) -> tuple[float | None, float | None]:
        """Since when the server is protected for good, and when all hosts could be used; None for what is not so."""
        hosts_s: float | None = None

        def protected_s() -> float | None:
            looks = self.watch.looks
            begin = protected_since(looks)
            is_settled = begin is not None and looks[-1].at_s - max(begin, healed_s) >= SETTLE_S
            return begin if is_settled else None

        def recovered() -> bool:
            nonlocal hosts_s
            if hosts_s is None and self._has_all_hosts():
                hosts_s = time.monotonic()
            return hosts_s is not None and protected_s() is not None and self._has_all_hosts()

        try:
            wait_until("the server to be protected again, and all hosts", recovered, RECOVERY_TIMEOUT_S, LOOK_EVERY_S)
        except WaitedTooLong as error:
            self._trouble.append(str(error))
        return protected_s(), hosts_s

    def _has_all_hosts(self) -> bool:
        try:
            return cloud.usable_hosts(self.servers.connection) >= {node.name for node in COMPUTES}
        except API_ERRORS:
            return False

    def _aftermath(self, scene: Scene, struck_at: float) -> tuple[pairs.Pair | None, bool]:
        """The pair as it is now, and whether the guest went to the other host meanwhile, and perhaps back."""
        try:
            after = pairs.pair(self.layout, self.server_id)
            granted_at = pairs.timeline(self.layout, self.server_id).granted_at
        except LabError as error:
            self._trouble.append(str(error))
            return None, False
        if after.state != "protected" and not self._trouble:
            self._trouble.append(f"Nova shows it as protected, but the pair is {after.state} ({after.reason})")
        was_granted = granted_at is not None and granted_at >= struck_at
        return after, was_granted or after.primary_host != scene.primary.name
