"""The compute host's agent: starts and ends engines, carries their questions to the arbiter and its answers back.

Implements rpc.agent.AgentApi. Never decides who may speak: it asks, and while there is no answer everything stays held.
It may be restarted at any time: engines outlive it and are found again (`adopt_engines`).
"""

import dataclasses
import itertools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from nova_ftvm.core import domain
from nova_ftvm.core.kind import Abilities
from nova_ftvm.core.losttime import Figures
from nova_ftvm.exception import FtvmError, Unsupported
from nova_ftvm.rpc.common import Failed
from nova_ftvm.rpc.manager import ManagerClient
from nova_ftvm.types import Generation, Grant, InstanceId, PairId, Role

LOG = logging.getLogger(__name__)

Report = dict[str, Any]

#: Seconds between two tries to reach the manager with something that must not be forgotten.
_RETRY_S = 0.5
#: How often a guest that has its checkpoint is tried to be resumed.
_RESUME_TRIES = 10
#: A guest that may speak is let go within so many tries, unless it is gone.
_LET_GO_TRIES = 10
#: How long a planned end may take before the engine is killed.
_STOP_LIMIT_S = 5.0
_LISTEN_LIMIT_S = 15.0


class Engine(Protocol):
    """host.process.EngineProcess."""

    role: str
    pair_id: str
    generation: int
    instance_id: str

    def listen(self, on_report: "Callable[[Any, Report], None]") -> None: ...

    def order(self, what: str, **facts: Any) -> None: ...

    def wait(self, timeout_s: float) -> bool: ...

    def kill(self) -> None: ...


class Guests(Protocol):
    """What the agent does to domains; host.guests.Guests."""

    def make_folder(self, instance_id: str) -> str: ...

    def live_xml(self, instance_id: str) -> str: ...

    def disk_size(self, instance_id: str, target: str) -> int: ...

    def has_monitor(self, instance_id: str, domain_xml: str) -> bool: ...

    def destroy(self, instance_id: str) -> bool: ...

    def is_standby(self, instance_id: str) -> bool: ...

    def finish_promotion(self, instance_id: str) -> bool: ...

    def let_go(self, instance_id: str) -> None: ...


class _Watched:
    """An engine and what it said last."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.state = "starting"
        #: Of a primary: what it has counted, as it said last.
        self.figures: Figures | None = None
        self.port = 0
        self.listening = threading.Event()
        #: It asked for the pair: what runs here since was granted.
        self.asked = False
        self.promoted = False
        self.protected = False
        #: It said how it ended, so its going is no surprise.
        self.ended = False
        self.failure = ""
        #: Another try on this host will fail likewise.
        self.lasting = False


class _Turns:
    """A lock a pair: what was to be done for an engine that is over, and the start of the next one, do not mix."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, threading.RLock] = {}

    def of(self, pair_id: str) -> "threading.RLock":
        with self._lock:
            return self._of.setdefault(pair_id, threading.RLock())


class Agent:
    """One host's engines. Methods named in AgentApi are called by RPC threads, `_on_report` by readers' threads."""

    def __init__(self, host: str, data_address: str, missing: list[str], manager: ManagerClient, guests: Guests,
                 start_engine: Callable[[dict[str, Any]], Engine],
                 sleep: Callable[[float], None] = time.sleep, *, abilities: Abilities) -> None:
        """`start_engine` takes role, pair_id, generation, instance_id, token, address, port, policy."""
        self._abilities = abilities
        self._host = host
        self._data_address = data_address
        self._missing = missing
        self._manager = manager
        self._guests = guests
        self._start_engine = start_engine
        self._sleep = sleep
        #: Which start of the agent this is: what it refused before may work since.
        self._incarnation = str(uuid.uuid4())
        self._lock = threading.Lock()
        self._engines: dict[tuple[str, str], _Watched] = {}
        #: Pair -> the newest generation that an engine was started for here. What is left to be done for an older one,
        #: or ordered late, must not touch the guest any more: it is a newer engine's.
        self._newest: dict[str, int] = {}
        #: Pair -> the newest generation whose end was ordered here: no engine of it is started any more.
        self._over: dict[str, int] = {}
        self._turns = _Turns()

    # AgentApi

    def prepare_domain(self, instance_id: str) -> dict[str, Any]:
        if self._missing:
            return {"monitor": "", "capable": False, "reason": "; ".join(self._missing)}
        return {"monitor": os.path.join(self._guests.make_folder(instance_id), "monitor.sock"), "capable": True,
                "reason": "", "abilities": self._abilities.told()}

    def describe_domain(self, instance_id: str) -> dict[str, Any]:
        try:
            domain_xml = self._guests.live_xml(instance_id)
            disks = {disk.target: self._guests.disk_size(instance_id, disk.target) for disk in domain.disks(domain_xml)}
        except FtvmError as error:
            return {"domain_xml": "", "armed": False, "reason": str(error)}
        armed = self._guests.has_monitor(instance_id, domain_xml)
        reason = "" if armed else (domain.obstacle(domain_xml)
                                   or "the server was started without fault tolerance: hard-reboot it")
        return {"domain_xml": domain_xml, "armed": armed, "reason": reason, "disks": disks}

    def start_backup(self, pair_id: str, generation: int, instance_id: str, token: str) -> dict[str, Any]:
        watched = self._start(Role.BACKUP, pair_id, generation, instance_id, token, self._data_address, 0)
        if not watched.listening.wait(_LISTEN_LIMIT_S) or not watched.port:
            watched.engine.kill()
            refusal = Unsupported if watched.lasting else FtvmError
            raise refusal(watched.failure or f"the backup's engine was not ready within {_LISTEN_LIMIT_S:g} s")
        return {"address": self._data_address, "port": watched.port}

    def start_primary(self, pair_id: str, generation: int, instance_id: str, address: str, port: int,
                      token: str, policy: str = "") -> dict[str, Any]:
        self._start(Role.PRIMARY, pair_id, generation, instance_id, token, address, port, policy)
        return {}

    def stop_engine(self, pair_id: str, generation: int, reason: str) -> dict[str, Any]:
        # Who ends a pair while it is made may be faster than the order that starts its engine. A start that goes on now
        # is waited for, and its engine is stopped below.
        with self._turns.of(pair_id):
            self._over[pair_id] = max(generation, self._over.get(pair_id, 0))
        stopped = True
        for role in Role:
            watched = self._engines.get((pair_id, role.value))
            if watched is None or watched.engine.generation > generation:
                # An order that was long on its way must not end what began after it.
                continue
            if watched.promoted:
                stopped = False
                continue
            self._stop(watched, reason)
        return {"stopped": stopped}

    def hand_over(self, instance_id: str) -> dict[str, Any]:
        for watched in list(self._engines.values()):
            if watched.engine.instance_id == instance_id and watched.engine.role == Role.PRIMARY and watched.protected:
                watched.engine.order("hand_over")
                return {"handed_over": True}
        return {"handed_over": False}

    def fence(self, pair_id: str, generation: int, instance_id: str) -> dict[str, Any]:
        with self._turns.of(pair_id):
            if self._newest.get(pair_id, 0) >= generation:
                LOG.warning("pair %s: an order to fence of generation %d came late, at %d: nothing is done", pair_id,
                            generation, self._newest[pair_id])
                return {}
            watched = self._engines.get((pair_id, Role.PRIMARY.value))
            if watched is not None:
                watched.ended = True
                watched.engine.order("fence", reason=f"generation {generation} is over")
            self._guests.destroy(instance_id)
        return {}

    def discard_standby(self, instance_id: str) -> dict[str, Any]:
        for watched in list(self._engines.values()):
            if watched.engine.instance_id == instance_id and watched.engine.role == Role.BACKUP:
                if watched.promoted:
                    return {"discarded": False}
                self._stop(watched, "the backup server is deleted")
        return {"discarded": self._drop_standby(instance_id)}

    # Its own life

    def adopt_engines(self, engines: list[Engine]) -> None:
        """Takes engines over that outlived the last agent; their last report comes again. So does that of an engine
        that did not, and left its guest held: it is gone."""
        for engine in engines:
            self._note(engine)
        for engine in engines:
            LOG.info("found the %s engine of pair %s, generation %d, again", engine.role, engine.pair_id,
                     engine.generation)
            # What it told the last agent is unknown, so its guest's output is never let go without a grant.
            self._watch(engine, protected=True)

    def report(self) -> None:
        """One sign of life. Raises rpc.common.Failed."""
        with self._lock:
            reported = list(self._engines.values())
        engines = [{"pair_id": w.engine.pair_id, "instance_id": w.engine.instance_id, "role": w.engine.role,
                    "generation": w.engine.generation, "state": w.state,
                    **({"figures": dataclasses.asdict(w.figures)} if w.figures else {})} for w in reported]
        answer = self._manager.agent_report(self._host, {
            "capable": not self._missing, "reason": "; ".join(self._missing), "data_address": self._data_address,
            "incarnation": self._incarnation, "abilities": self._abilities.told(),
            "engines": engines})
        stale = frozenset(answer.get("stale", ()))
        for watched in reported:
            # Only what was reported: an engine that was started since is of a newer generation.
            if watched.engine.pair_id in stale:
                self._end_stale(watched)

    def _end_stale(self, watched: _Watched) -> None:
        if watched.engine.role == Role.PRIMARY:
            LOG.warning("pair %s: generation %d is over, the guest here is fenced", watched.engine.pair_id,
                        watched.engine.generation)
            watched.engine.order("fence", reason="the generation is over")
        elif not watched.promoted:
            self._stop(watched, "the generation is over")

    def _start(self, role: Role, pair_id: str, generation: int, instance_id: str, token: str, address: str,
               port: int, policy: str = "") -> _Watched:
        with self._turns.of(pair_id):
            if self._over.get(pair_id, 0) >= generation:
                raise FtvmError(f"generation {generation} is over, its end was ordered")
            old = self._engines.get((pair_id, role.value))
            if old is not None:
                if old.engine.generation == generation:
                    return old
                if old.engine.generation > generation:
                    raise FtvmError(f"generation {generation} is over, the engine here is of {old.engine.generation}")
                self._stop(old, f"generation {generation} begins")
            LOG.info("pair %s: starting the %s engine of generation %d, server %s", pair_id, role, generation,
                     instance_id)
            return self._watch(self._start_engine({
                "role": role.value, "pair_id": pair_id, "generation": generation, "instance_id": instance_id,
                "token": token, "address": address, "port": port, "policy": policy}))

    def _watch(self, engine: Engine, protected: bool = False) -> _Watched:
        watched = _Watched(engine)
        watched.protected = protected
        self._note(engine)
        with self._lock:
            self._engines[engine.pair_id, engine.role] = watched
        engine.listen(lambda _engine, report: self._on_report(watched, report))
        return watched

    def _note(self, engine: Engine) -> None:
        self._newest[engine.pair_id] = max(engine.generation, self._newest.get(engine.pair_id, 0))

    def _is_settled(self, watched: _Watched) -> bool:
        """Has the guest a newer engine? Then nothing is left to be done for this one."""
        return self._newest.get(watched.engine.pair_id, 0) > watched.engine.generation

    def _stop(self, watched: _Watched, reason: str) -> None:
        """A planned end, of a pair that is disarmed."""
        watched.ended = True
        watched.engine.order("stop", reason=reason)
        if not watched.engine.wait(_STOP_LIMIT_S):
            LOG.warning("pair %s: the %s engine did not end, it is killed", watched.engine.pair_id, watched.engine.role)
            watched.engine.kill()
        if watched.engine.role == Role.PRIMARY and watched.state != "ended":
            # It was killed, or died on the way: what it held is still held.
            self._let_go(watched)
        if watched.engine.role == Role.BACKUP:
            self._drop_standby(watched.engine.instance_id)

    # Reports of engines

    def _on_report(self, watched: _Watched, report: Report) -> None:
        event = report["event"]
        if event == "figures":
            # No state: they go with the next sign of life.
            watched.figures = Figures.parse(report)
            return
        watched.state = event if event != "gone" else watched.state
        handler = getattr(self, f"_on_{event}", None)
        if handler is None:
            return
        try:
            handler(watched, report)
        except FtvmError as error:
            # libvirt is away, for one. The reader has to go on: the next report may be the one that matters.
            LOG.error("pair %s: after '%s': %s", watched.engine.pair_id, event, error)

    def _on_listening(self, watched: _Watched, report: Report) -> None:
        watched.port = report["port"]
        watched.listening.set()

    def _on_syncing(self, watched: _Watched, report: Report) -> None:
        """Told with the next sign of life: progress is not worth a call of its own."""
        watched.state = f"syncing {report['percent']} %"

    def _on_protected(self, watched: _Watched, report: Report) -> None:
        watched.protected = True
        grant = self._insist(lambda: self._protection(watched, "protected", ""))
        if not _is_answer(grant):
            LOG.error("pair %s: the arbiter cannot tell: %s", watched.engine.pair_id, grant.reason)
        elif not grant.granted:
            watched.engine.order("fence" if grant.generation > watched.engine.generation else "stop",
                                 reason=grant.reason)

    def _on_ask_degrade(self, watched: _Watched, report: Report) -> None:
        watched.protected = True
        self._ask(watched, lambda: self._manager.request_degrade(*self._voice(watched), report["reason"]))

    def _on_ask_promotion(self, watched: _Watched, report: Report) -> None:
        watched.asked = True
        self._ask(watched, lambda: self._manager.request_promotion(*self._voice(watched), report["evidence"]))

    def _on_promoted(self, watched: _Watched, report: Report) -> None:
        watched.promoted = watched.ended = True
        LOG.info("pair %s: the guest runs here", watched.engine.pair_id)
        grant = self._insist(lambda: self._manager.report_promoted(*self._voice(watched), report["timeline"]))
        watched.engine.order("seen")
        self._keep_promoted(watched, grant)

    def _on_fenced(self, watched: _Watched, report: Report) -> None:
        watched.protected = watched.ended = True
        self._destroy(watched, report["reason"])

    def _on_guest_shutdown(self, watched: _Watched, report: Report) -> None:
        watched.ended = True
        # In a thread of its own: the manager stops this very engine before it answers.
        threading.Thread(target=self._insist, name=f"shutdown-{watched.engine.pair_id}", daemon=True, args=(
            lambda: self._manager.disarm(InstanceId(watched.engine.instance_id), "the guest was shut down"),)).start()

    def _on_ended(self, watched: _Watched, report: Report) -> None:
        # After a failure its end is no answer: what was granted, and failed, must be told of.
        watched.ended = not watched.failure
        watched.engine.order("seen")
        if watched.ended and watched.engine.role == Role.BACKUP:
            self._drop_standby(watched.engine.instance_id)

    def _on_failed(self, watched: _Watched, report: Report) -> None:
        """The engine could not go on. What that means is settled when it is gone."""
        watched.failure, watched.lasting = report["reason"], report.get("lasting", False)
        watched.asked = watched.asked or report.get("granted", False)
        LOG.error("pair %s: the %s engine failed: %s", watched.engine.pair_id, watched.engine.role, watched.failure)
        watched.engine.order("seen")

    def _on_gone(self, watched: _Watched, report: Report) -> None:
        with self._lock:
            key = (watched.engine.pair_id, watched.engine.role)
            if self._engines.get(key) is watched:
                del self._engines[key]
        watched.listening.set()
        if watched.ended:
            return
        reason = watched.failure or f"the {watched.engine.role} engine died"
        LOG.error("pair %s: %s", watched.engine.pair_id, reason)
        if watched.engine.role == Role.BACKUP:
            self._lose_backup(watched, reason)
        elif watched.protected:
            self._go_on_alone(watched, reason)
        else:
            self._insist(lambda: self._protection(watched, "refused" if watched.lasting else "failed", reason))
            self._let_go(watched)

    def _lose_backup(self, watched: _Watched, reason: str) -> None:
        """The primary notices by itself. What became of a standby that may have been granted the pair must be told:
        its guest may run, as an engine can end between that and its report."""
        if watched.asked or watched.failure:
            watched.promoted = watched.asked and self._is_promoted(watched)
            grant = self._insist(lambda: self._manager.report_promoted(
                *self._voice(watched), {}, "" if watched.promoted else reason))
            if watched.promoted:
                self._keep_promoted(watched, grant)
                return
        self._drop_standby(watched.engine.instance_id)

    def _keep_promoted(self, watched: _Watched, grant: Grant) -> None:
        if not grant.granted and _is_answer(grant):
            # It stood still for long, and the server was given up or elsewhere meanwhile.
            self._destroy(watched, grant.reason)

    def _is_promoted(self, watched: _Watched) -> bool:
        for _ in range(_RESUME_TRIES):
            try:
                return self._guests.finish_promotion(watched.engine.instance_id)
            except FtvmError as error:
                LOG.warning("pair %s: the guest is not resumed yet: %s", watched.engine.pair_id, error)
                self._sleep(_RETRY_S)
        # It has never run, and would be in the way of the one that Nova boots from its disks.
        self._destroy(watched, "the guest could not be resumed")
        return False

    def _go_on_alone(self, watched: _Watched, reason: str) -> None:
        """The guest's output is held by QEMU, and nobody is left to release it: ask in the engine's place."""
        def ask() -> Grant:
            return self._manager.request_degrade(*self._voice(watched), reason)

        while not self._is_settled(watched):
            grant = self._insist(ask)
            # A refusal within the engine's own generation is none for good either: see PrimaryEngine.
            if _is_answer(grant) and (grant.granted or grant.generation != watched.engine.generation):
                if grant.granted:
                    self._let_go(watched)
                else:
                    self._destroy(watched, grant.reason)
                return
            self._sleep(_RETRY_S)

    def _drop_standby(self, instance_id: str) -> bool:
        """Destroys a standby that was never promoted: one that waits for its stream. Whatever runs, or is paused
        otherwise, is the guest itself."""
        return self._guests.is_standby(instance_id) and self._guests.destroy(instance_id)

    def _destroy(self, watched: _Watched, reason: str) -> None:
        """The fence. Until it is done the guest's output stays held, so a libvirt that is away may take its time."""
        LOG.warning("pair %s: fenced: %s", watched.engine.pair_id, reason)
        self._settle(watched, self._guests.destroy, "the guest is not destroyed yet", itertools.count())

    def _let_go(self, watched: _Watched) -> None:
        if not self._settle(watched, self._guests.let_go, "its output and disks are not let go yet",
                            range(_LET_GO_TRIES)):
            # The engine's note is still there.
            LOG.error("pair %s: if its guest is still there, it is not heard: restart this agent to try again",
                      watched.engine.pair_id)

    def _settle(self, watched: _Watched, act: Callable[[str], Any], not_yet: str, tries: Iterable[int]) -> bool:
        """Does it to the guest, unless that has a newer engine; again while libvirt or QEMU does not answer."""
        for _ in tries:
            try:
                with self._turns.of(watched.engine.pair_id):
                    if not self._is_settled(watched):
                        act(watched.engine.instance_id)
                return True
            except FtvmError as error:
                LOG.warning("pair %s: %s: %s", watched.engine.pair_id, not_yet, error)
                self._sleep(_RETRY_S)
        return False

    # The manager

    def _voice(self, watched: _Watched) -> tuple[PairId, Generation, str]:
        return PairId(watched.engine.pair_id), Generation(watched.engine.generation), self._host

    def _protection(self, watched: _Watched, state: str, detail: str) -> Grant:
        return self._manager.report_protection(*self._voice(watched), state, detail)

    def _ask(self, watched: _Watched, question: Callable[[], Grant]) -> None:
        """One question. Without an answer nothing is said: the engine asks again."""
        try:
            grant = question()
        except Failed as error:
            LOG.warning("pair %s: the manager does not answer: %s", watched.engine.pair_id, error)
            return
        if _is_answer(grant):
            watched.engine.order("grant", granted=grant.granted, generation=grant.generation, reason=grant.reason)
        else:
            LOG.error("pair %s: the arbiter cannot tell: %s", watched.engine.pair_id, grant.reason)

    def _insist(self, call: Callable[[], Any]) -> Any:
        """Calls until the manager answers; for what must not be forgotten."""
        while True:
            try:
                return call()
            except Failed as error:
                LOG.warning("the manager does not answer, trying again: %s", error)
                self._sleep(_RETRY_S)


def _is_answer(grant: Grant) -> bool:
    """An arbiter that does not know the pair (its database was lost?) has not said no: output stays held."""
    return grant.generation > 0
