"""How a step changes a world.

The rules are the real ones (rules.py, agents.py). What is told again here is what joins them: the engines' reading of
frames and orders (engine/primary.py, engine/backup.py, cmd/engine.py), and the manager's slow work
(failover/pairing.py, catchup.py, reconcile.py) as far as it reaches the pair. Each such place names its original.
"""

from collections.abc import Callable
from typing import Any

from nova_ftvm.core.epoch import OVER, PAUSED, Act
from nova_ftvm.core.lease import HOLDS_REPLICA, Verdict, Watch
from nova_ftvm.core.replica import Acknowledge, Apply
from nova_ftvm.exception import FtvmError
from nova_ftvm.failover.arbiter import NOTHING
from nova_ftvm.types import Grant, PairState
from tests.model import agents
from tests.model.agents import BACKUP, PRIMARY, SILENCE, Call, Facts, Question, Report
from tests.model.rules import NOW, PAIR, SERVER, Answered, Row, Rules, frames, grant_of
from tests.model.world import OTHER, A, B, Backup, Guest, Host, Link, Primary, Seen, World


class Known:
    """What one search knows already: of the rules, and of the agents' turns."""

    def __init__(self) -> None:
        self.rules = Rules()
        self.turns: dict[Any, agents.Outcome] = {}
        self._frames: dict[tuple[int, int], Any] = {}

    def frame(self, generation: int, what: str, epoch: int) -> Any:
        key = (generation, epoch)
        if key not in self._frames:
            self._frames[key] = frames(generation, epoch)
        return self._frames[key][what]


def lingering(row: Row, generation: int) -> int:
    """failover/reconcile.py, `_stop_lingering`: the generation that an order to stop such an engine names."""
    return generation


def lost(host: Host) -> tuple[int, ...]:
    """cmd/agent.py, `lost_engines`: generations of primary's engines that died unseen, by the note of their guest."""
    return (host.guest.noted,) if host.guest and host.guest.noted and host.primary is None else ()


class Stage:
    """A world while a step is taken. Its public methods are the steps."""

    def __init__(self, known: Known, world: World, late: bool, deaf: str) -> None:
        """late: the manager's orders are not carried out in this step. deaf: this host's agent hears nothing any more,
        and is dead at the end of it."""
        self._late = late
        self._deaf = deaf
        self._known = known
        self._rules = known.rules
        self.row = world.row
        self.hosts = {A: world.a, B: world.b}
        self.link = world.link
        self._orders = world.orders
        self._stray = world.stray
        self.seen = world.seen
        self.left = world.left
        self.events: list[Any] = []

    def world(self) -> World:
        if self._deaf:
            self.kill_agent(self._deaf)
        if self.link is not None and not any(self._on_link(engine) for host in self.hosts.values()
                                             for engine in (host.primary, host.backup)):
            self.link = None
        return World(self.row, self.hosts[A], self.hosts[B], self.link, self._orders, self._stray, self.seen, self.left)

    def set(self, name: str, **changes: Any) -> None:
        self.hosts[name] = self.hosts[name]._replace(**changes)

    def _on_link(self, engine: Primary | Backup | None) -> bool:
        return (engine is not None and self.link is not None and engine.linked
                and engine.generation == self.link.generation)

    # -- engine/primary.py

    def loop(self, name: str, event: str, *facts: Any) -> None:
        """An event for the loop; its acts, in their order; and the process's end, when the loop is over."""
        primary = self.hosts[name].primary
        loop, acts = self._rules.happen(primary.loop, event, *facts)
        self.set(name, primary=primary._replace(loop=loop))
        for act in acts or ():
            self._act(name, act)
        if loop.rule.phase in OVER and not primary.done:
            self._forget(name)
            self._end(name, PRIMARY, loop.rule.phase.name.lower())

    def _act(self, name: str, act: Act) -> None:
        host = self.hosts[name]
        primary, guest = host.primary, host.guest
        epoch = primary.loop.rule.epoch
        match act:
            case Act.BUFFER if guest:
                self._open(name)  # what an engine that died has left behind is removed first
                self.set(name, guest=Guest(held=True, noted=primary.generation))
                self.seen = Seen(primary.generation, disarmed=self.seen.disarmed)
            case Act.CAPTURE if guest and guest.held:
                self.set(name, guest=guest._replace(covered=epoch))
            case Act.COMMIT:
                self._say(name, "device state", epoch)
                self._say(name, "commit", epoch)
            case Act.RELEASE if guest and guest.held:
                self.set(name, guest=guest._replace(said=guest.covered))
                self.events.append(("released", name, primary.generation, guest.covered))
                if primary.generation == self.seen.generation:
                    self.seen = self.seen._replace(said=max(self.seen.said, guest.covered))
            case Act.UNBUFFER:
                self._open(name)
            case Act.ASK:
                self._report(name, PRIMARY, "ask_degrade")
            case Act.REPORT_PROTECTED:
                self._report(name, PRIMARY, "protected")
            case Act.FENCE:
                self._destroy(name)
                self._report(name, PRIMARY, "fenced")
            case Act.SAY_BYE | Act.SAY_GUEST_GONE | Act.SAY_HAND_OVER:
                self._say(name, act.name.removeprefix("SAY_").lower().replace("_", " "), epoch)

    def _say(self, name: str, what: str, epoch: int) -> None:
        if self._on_link(self.hosts[name].primary) and self.link.up:
            self.link = self.link._replace(forth=(*self.link.forth, (what, epoch)))

    def hear_ack(self, name: str) -> None:
        epoch, *rest = self.link.back
        self.link = self.link._replace(back=tuple(rest))
        self.loop(name, "on_ack", epoch)

    def finish_checkpoint(self, name: str) -> None:
        """QEMU's STOP, its device state, its RESUME: nothing that another could see is in between."""
        for event, *facts in (("on_stopped",), ("on_state_begins",), ("on_resumed", NOW, 0, 0)):
            primary = self.hosts[name].primary
            if primary and not primary.done:
                self.loop(name, event, *facts)

    def shut_down(self, name: str) -> None:
        self.seen = self.seen._replace(off=True)
        self._report(name, PRIMARY, "guest_shutdown")
        self.set(name, guest=None)
        self.loop(name, "on_guest_shutdown")

    def _order_primary(self, name: str, what: str, grant: Grant | None) -> None:
        primary = self.hosts[name].primary
        match what:
            case "grant" if grant.granted or grant.generation != primary.generation:
                # Refused within our own generation: not now. The loop asks again.
                self.loop(name, "on_grant", grant)
            case "stop":
                self.loop(name, "on_stop", "why")
                if self.hosts[name].primary and self.hosts[name].primary.loop.rule.phase in PAUSED:
                    self.finish_checkpoint(name)  # the agent waits for it
            case "fence":
                self.loop(name, "on_fence", "why")
            case "hand_over":
                self.loop(name, "on_hand_over", NOW)

    def _start_primary(self, name: str, generation: int) -> None:
        """engine/link.py, `dial` and `answer`: a backup takes one connection, before its first epoch. cmd/engine.py,
        `run_primary`: what a dead engine held is let go."""
        primary = Primary(generation, self._rules.loop())
        peer_name = OTHER[name]
        peer = self.hosts[peer_name].backup
        fits = (peer is not None and peer.generation == generation and not (peer.done or peer.promoting or peer.linked)
                and peer.lease.rule.watch is Watch.SYNCING and not peer.replica.rule.committed)
        self.set(name, primary=primary._replace(linked=fits, done=not fits))
        if fits:
            self._release(name)
            self.link = Link(generation)
            self.set(peer_name, backup=peer._replace(linked=True))
        else:
            self._report(name, PRIMARY, "failed")

    # -- engine/backup.py

    def lease(self, name: str, event: str, *facts: Any) -> None:
        backup = self.hosts[name].backup
        lease, verdict = self._rules.happen(backup.lease, event, *facts)
        self.set(name, backup=backup._replace(lease=lease, promoting=verdict is Verdict.PROMOTE))
        if verdict is Verdict.ASK:
            self._report(name, BACKUP, "ask_promotion")
        if lease.rule.watch is Watch.OVER:
            self._end(name, BACKUP, "given up")

    def take_frame(self, name: str) -> None:
        (what, epoch), *rest = self.link.forth
        self.link = self.link._replace(forth=tuple(rest))
        match what:
            case "bye":
                self.lease(name, "on_bye")
            case "guest gone":
                self.lease(name, "on_guest_gone", NOW)
            case "hand over":
                self.lease(name, "on_handed_over", NOW)
            case _ if self.hosts[name].backup.lease.rule.watch in HOLDS_REPLICA:
                self._take(name, what, epoch)

    def _take(self, name: str, what: str, epoch: int) -> None:
        backup = self.hosts[name].backup
        frame = self._known.frame(backup.generation, what, epoch)
        replica, actions = self._rules.happen(backup.replica, "on_frame", frame)
        if isinstance(actions, FtvmError):
            self.lose_link(name, BACKUP)
            return
        self.set(name, backup=backup._replace(replica=replica))
        if what == "commit" and backup.generation == self.seen.generation:
            self.seen = self.seen._replace(whole=epoch)
        for action in actions:
            if isinstance(action, Acknowledge):
                self.lease(name, "on_committed")
                if self.link.up:
                    self.link = self.link._replace(back=(*self.link.back, action.epoch))
            elif isinstance(action, Apply):
                replica, _ = self._rules.happen(replica, "apply")
                self.set(name, backup=self.hosts[name].backup._replace(replica=replica))

    def promote(self, name: str, told: bool = True) -> None:
        """told: its engine lives to say so."""
        backup = self.hosts[name].backup
        replica = backup.replica.rule
        state_of = int(replica.device_state or b"0")
        self.events.append(("promoted", name, backup.generation, replica.committed, state_of))
        self.seen = self.seen._replace(promoted=name, promoted_epoch=replica.committed)
        self.set(name, guest=Guest(), backup=backup._replace(done=True, promoting=False))
        self.hang_up(backup.generation)
        if told:
            self._report(name, BACKUP, "promoted")
        else:
            self.drop_engine(name, BACKUP)

    def fail_backup(self, name: str) -> None:
        """cmd/engine.py, `run_backup`."""
        self._report(name, BACKUP, "failed")
        self._end(name, BACKUP, "given up")

    def _order_backup(self, name: str, what: str, grant: Grant | None) -> None:
        if what == "grant":
            self.lease(name, "on_grant", grant, NOW)
        elif what == "stop":
            self.lease(name, "on_bye")

    def _start_backup(self, name: str, generation: int) -> None:
        self.set(name, backup=Backup(generation, self._rules.lease(generation), self._rules.replica()))

    # -- both engines: the link, the process, and the agent's ear (host/control.py)

    def lose_link(self, name: str, role: str) -> None:
        engine = getattr(self.hosts[name], role)
        self.hang_up(engine.generation)
        if self.link is not None and self.link.generation == engine.generation:
            # What it has not read is lost with the connection.
            self.link = self.link._replace(**{"back" if role == PRIMARY else "forth": ()})
        self.set(name, **{role: engine._replace(linked=False)})
        if role == PRIMARY:
            self.loop(name, "on_peer_lost", "why", NOW)
        else:
            self.lease(name, "on_peer_lost", NOW)

    def hang_up(self, generation: int) -> None:
        if self.link is not None and self.link.generation == generation:
            self.link = self.link._replace(up=False)

    def _end(self, name: str, role: str, phase: str) -> None:
        """It has ended, and stays until an agent has seen its last report."""
        engine = getattr(self.hosts[name], role)
        if engine is None or engine.done:
            return
        self.hang_up(engine.generation)
        self.set(name, **{role: engine._replace(done=True, linked=False, promoting=False) if role == BACKUP
                          else engine._replace(done=True, linked=False)})
        self._report(name, role, "ended", phase)

    def drop_engine(self, name: str, role: str) -> None:
        """The process is gone; its guest is as it was."""
        engine = getattr(self.hosts[name], role)
        self.hang_up(engine.generation)
        self.set(name, **{role: None})
        self._tell_agent(name, role, engine.generation, ("gone", ""))

    def _report(self, name: str, role: str, event: str, phase: str = "") -> None:
        engine = getattr(self.hosts[name], role)
        self.set(name, **{role: engine._replace(last=(event, phase))})
        self._tell_agent(name, role, engine.generation, (event, phase))

    def _tell_agent(self, name: str, role: str, generation: int, report: Report) -> None:
        if name == self._deaf:
            return
        watched = self.hosts[name].watched
        self.set(name, watched=tuple(
            each._replace(backlog=(*each.backlog, report))
            if (each.role, each.generation) == (role, generation) else each for each in watched))
        self._pump(name)

    # -- the agent

    def _pump(self, name: str) -> None:
        """The readers' threads take what they can."""
        while True:
            watched = self.hosts[name].watched
            number = next((number for number, each in enumerate(watched) if each.backlog and not each.reader), None)
            if number is None:
                break
            self._turn(name, agents.hear, number)
        self.set(name, watched=tuple(each for each in self.hosts[name].watched
                                     if each.listed or each.reader or each.shutdown or each.backlog))

    def _turn(self, name: str, run: Callable[..., agents.Outcome], *facts: Any, **more: Any) -> agents.Outcome:
        host = self.hosts[name]
        found = Facts(host.memory, tuple(f"{role} {engine.generation}" for role, engine in
                            ((PRIMARY, host.primary), (BACKUP, host.backup))
                            if engine and not engine.done and not getattr(engine, "promoting", False)),
                      bool(host.guest and host.guest.standby), bool(host.guest and not host.guest.standby))
        key = (name, host.watched, found, run, facts, tuple(more.values()))
        turns = self._known.turns
        if key not in turns:
            turns[key] = run(name, host.watched, found, *facts, **more)
        outcome = turns[key]
        self.set(name, watched=outcome.watched, memory=outcome.memory)
        for what, *rest in outcome.effects:
            self._effect(name, what, *rest)
        return outcome

    def _effect(self, name: str, what: str, *facts: Any) -> None:
        match what:
            case "destroy":
                self._destroy(name)
            case "let go":
                self._release(name)
            case "start":
                role, generation = facts
                (self._start_primary if role == PRIMARY else self._start_backup)(name, generation)
            case "kill":
                role, generation = facts
                engine = getattr(self.hosts[name], role)
                if engine and engine.generation == generation:
                    self.drop_engine(name, role)
            case "order":
                self._order(name, *facts)

    def _order(self, name: str, role: str, generation: int, what: str, grant: Grant | None) -> None:
        engine = getattr(self.hosts[name], role)
        if engine is None or engine.generation != generation:
            return
        if engine.done:
            if what == "seen":
                self.drop_engine(name, role)
        elif role == PRIMARY:
            self._order_primary(name, what, grant)
        elif not engine.promoting:
            self._order_backup(name, what, grant)

    def _release(self, name: str) -> None:
        """host/guests.py, `let_go`."""
        self._open(name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        """host/note.py, `remove`."""
        if self.hosts[name].guest:
            self.set(name, guest=self.hosts[name].guest._replace(noted=0))

    def _destroy(self, name: str) -> None:
        guest = self.hosts[name].guest
        if guest and not guest.standby:
            self.events.append(("destroyed", name))
        self.set(name, guest=None)

    def _open(self, name: str) -> None:
        """host/netbuf.py, `remove`: what is held leaves, unless it died with its engine, and all that follows."""
        guest = self.hosts[name].guest
        if guest and guest.held:
            self.set(name, guest=Guest(noted=guest.noted))
            self.events.append(("opened", name))

    def rpc(self, name: str, method: str, *facts: Any) -> None:
        self._turn(name, agents.rpc, method, *facts)
        self._pump(name)

    def start_agent(self, name: str) -> None:
        """The engines tell it their last reports again, the lost ones that they are gone."""
        host = self.hosts[name]
        engines = [(role, engine.generation, engine.last)
                   for role, engine in ((PRIMARY, host.primary), (BACKUP, host.backup)) if engine]
        engines += [(PRIMARY, generation, ("gone", "")) for generation in lost(host)]
        self.set(name, agent=True)
        self.rpc(name, "adopt_engines", *((role, generation) for role, generation, _ in engines))
        for role, generation, last in engines:
            if last:
                self._tell_agent(name, role, generation, last)

    def kill_agent(self, name: str) -> None:
        """Orders that it has not done yet end with it: at the broker they expire with their sender's deadline."""
        self.set(name, agent=False, watched=(), memory=())
        self._orders = tuple(order for order in self._orders if order[1] != name)

    def report_alive(self, name: str) -> None:
        listed = tuple((each.role, each.generation) for each in self.hosts[name].watched if each.listed)
        stale = self._rules.stale(self.row, name, listed)
        self._turn(name, agents.report, stale)
        self._pump(name)

    # -- the agents' questions

    def judge(self, name: str, number: int, thread: str) -> None:
        call: Call = getattr(self.hosts[name].watched[number], thread)
        self._set_call(name, number, thread, call._replace(answer=self._judge(call.question)))

    def answer(self, name: str, number: int, thread: str) -> None:
        self._turn(name, agents.go_on, number, thread)
        self._pump(name)

    def time_out(self, name: str, number: int, thread: str, stray: bool) -> None:
        call: Call = getattr(self.hosts[name].watched[number], thread)
        if stray:
            self._stray = tuple(sorted({*self._stray, call.question}, key=str))
        self._set_call(name, number, thread, call._replace(answer=SILENCE))
        self.answer(name, number, thread)

    def judge_stray(self, question: Question) -> None:
        self._stray = tuple(each for each in self._stray if each != question)
        self._judge(question)

    def _judge(self, question: Question) -> Any:
        answer = self._manage(self._rules.manager(self.row, question.method, *question.facts))
        if question.method == "disarm":
            return answer["disarmed"]
        return grant_of(answer)

    def _manage(self, answered: Answered) -> Any:
        self.row = answered.row
        for host, generation in answered.stops:
            self.send("stop", host, generation)
        if isinstance(answered.answer, dict) and answered.answer.get("disarmed"):
            self.seen = self.seen._replace(disarmed=True)
        return answered.answer

    def _set_call(self, name: str, number: int, thread: str, call: Call) -> None:
        watched = list(self.hosts[name].watched)
        watched[number] = watched[number]._replace(**{thread: call})
        self.set(name, watched=tuple(watched))

    # -- the manager

    def send(self, what: str, name: str, generation: int) -> None:
        """The manager waits for each for a while. An agent that is away has not heard it."""
        if not self.hosts[name].agent:
            return
        if self._late:
            self._orders = tuple(sorted({*self._orders, (what, name, generation)}))
        else:
            self._obey(what, name, generation)

    def catch_up(self, what: str, name: str, generation: int) -> None:
        self._orders = tuple(each for each in self._orders if each != (what, name, generation))
        self._obey(what, name, generation)

    def _obey(self, what: str, name: str, generation: int) -> None:
        if what == "start":
            self.rpc(name, "start_primary", PAIR, generation, SERVER, "address", 1, "token")
        elif what == "stop":
            self.rpc(name, "stop_engine", PAIR, generation, "why")
        else:
            self.rpc(name, "fence", PAIR, generation, SERVER)

    def decide(self, method: str, *facts: Any) -> None:
        self._manage(self._rules.decide(self.row, method, *facts))

    def disarm(self) -> None:
        """cloud/operations.py asks for it, for whatever the owner wants to do."""
        self._manage(self._rules.manager(self.row, "disarm", SERVER, "why"))

    def begin(self) -> None:
        self.decide("begin", SERVER, "", self.row.active_host, PAIR)
        self.seen = self.seen._replace(disarmed=False)

    def place(self) -> None:
        """failover/pairing.py, `plan`, and cloud/standby.py, `make`: what an earlier standby left is taken away."""
        name = OTHER[self.row.primary_host]
        self.rpc(name, "discard_standby", SERVER)
        if self.hosts[name].guest is not None:
            return
        self.set(name, guest=Guest(standby=True))
        self.row = self.row._replace(backup_host=name)
        self._manage(self._rules.manager(self.row, "standby_ready", PAIR, self.row.generation, name, ""))

    def start_engines(self) -> None:
        """failover/pairing.py, of that name."""
        row = self.row
        there = self.hosts[row.backup_host]
        if there.up and there.agent:
            self.rpc(row.backup_host, "start_backup", PAIR, row.generation, SERVER, "token")
            there = self.hosts[row.backup_host]
        if not there.up or there.backup is None or there.backup.generation != row.generation:
            self.decide("give_up", "why", True)
            return
        self.row = row._replace(step=NOTHING)
        self.send("start", row.primary_host, row.generation)

    def clean_up(self) -> None:
        """failover/pairing.py, `remove_backup`, and cloud/standby.py, `discard_of`."""
        row = self.row
        if row.backup_host is not None and row.backup_host != row.active_host:
            host = self.hosts[row.backup_host]
            if host.up and host.agent:
                self.rpc(row.backup_host, "stop_engine", PAIR, row.generation, "why")
                self.rpc(row.backup_host, "discard_standby", SERVER)
        if row.state is PairState.DISABLED:
            self.send("stop", row.active_host, row.generation)
        self.row = self.row._replace(step=NOTHING, backup_host=None)

    def follow(self) -> None:
        """failover/catchup.py, from `bindings` to `tidy`: what was not resumed, Nova boots from its disks."""
        row = self.row
        guest = self.hosts[row.active_host].guest
        if guest is None or guest.standby:
            self.rpc(row.active_host, "discard_standby", SERVER)
            if self.hosts[row.active_host].guest is None:
                self.set(row.active_host, guest=Guest())
        if row.primary_host != row.active_host:
            self.send("fence", row.primary_host, row.generation)
        self.row = row._replace(primary_host=row.active_host, backup_host=None, step=NOTHING)

    def lose_host(self, name: str) -> None:
        for engine in (self.hosts[name].primary, self.hosts[name].backup):
            if engine:
                self.hang_up(engine.generation)
        self.kill_agent(name)
        self.set(name, **Host(up=False, agent=False)._asdict())
