"""Which steps a world can take. Whatever may be late may be late at any time, and timers run out when they like."""

from collections.abc import Callable, Iterator
from typing import Any

from nova_ftvm.core.epoch import PAUSED, Phase
from nova_ftvm.core.lease import Watch
from nova_ftvm.failover.arbiter import CATCH_UP, CLEANUP, ENGINES, NOTHING
from nova_ftvm.types import Grant, PairState
from tests.model import stage
from tests.model.agents import BACKUP, PRIMARY, Question
from tests.model.rules import NOW, PAIR, SERVER, SOON
from tests.model.stage import Known, Stage
from tests.model.world import HOSTS, OTHER, Backup, Bounds, Host, Primary, Step, World

SLOW = frozenset({PairState.DISABLED, PairState.DEGRADED, PairState.ERROR})


class Model:
    """All steps of all worlds, for one search."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.known = Known()

    def steps(self, world: World) -> Iterator[Step]:
        return _Enabled(self, world).all()


class _Enabled:
    """The steps that one world can take."""

    def __init__(self, model: Model, world: World) -> None:
        self._model = model
        self._world = world

    def all(self) -> Iterator[Step]:
        for name in HOSTS:
            host = self._world.host(name)
            if not host.up:
                if self._world.left.pairings:  # else nothing comes of it
                    yield self._step(f"host {name} comes back, empty", True,
                                     lambda s, n=name: s.set(n, up=True, agent=True))
                continue
            if host.primary:
                yield from self._primary(name, host, host.primary)
            if host.backup:
                yield from self._backup(name, host, host.backup)
            if host.agent:
                yield from self._agent(name, host)
            else:
                yield self._step(f"{name}'s agent is started again", True, lambda s, n=name: s.start_agent(n))
            if self._world.left.faults:
                yield from self._faults(name, host)
        yield from self._network()
        yield from self._manager()

    def _step(self, label: str, fair: bool, do: Callable[[Stage], None], late: bool = False, deaf: str = "",
              **less: int) -> Step:
        taken = Stage(self._model.known, self._world, late, deaf)
        do(taken)
        for what, number in less.items():
            taken.left = taken.left._replace(**{what: getattr(taken.left, what) - number})
        return Step(label, fair, taken.world(), tuple(taken.events))

    def _hearing(self, name: str, label: str, do: Callable[[Stage], None]) -> Iterator[Step]:
        """A step of an agent that its engines may answer; the agent may die before it reads that."""
        yield self._step(label, True, do)
        if self._world.left.faults:
            yield self._step(f"{label}; it is killed at once", False, do, deaf=name, faults=1)

    def _ordering(self, label: str, fair: bool, do: Callable[[Stage], None], **less: int) -> Iterator[Step]:
        """A step of the manager, with its orders carried out at once, or later."""
        yield self._step(label, fair, do, **less)
        if self._world.left.losses:
            step = self._step(f"{label}; its order is late", False, do, late=True, losses=1, **less)
            if step.world.orders != self._world.orders:
                yield step

    # -- the primary's engine (engine/primary.py)

    def _primary(self, name: str, host: Host, primary: Primary) -> Iterator[Step]:
        link, loop = self._world.link, primary.loop.rule
        engine = f"{name}'s primary engine of generation {primary.generation}"
        if primary.done:
            if not host.agent and not self._ended_before(host.backup, primary):
                yield self._step(f"{engine} waits for an agent no longer", False,
                                 lambda s: s.drop_engine(name, PRIMARY))
            return
        if host.guest is None:
            yield self._step(f"{engine} sees QEMU gone", True, lambda s: s.loop(name, "on_guest_gone"))
            return
        if primary.linked and (link is None or not link.up):
            yield self._step(f"{engine} sees the connection lost", True, lambda s: s.lose_link(name, PRIMARY))
        if primary.linked and link and link.back:
            yield self._step(f"{engine} hears the acknowledgement of epoch {link.back[0]}", True,
                             lambda s: s.hear_ack(name))
        if loop.phase is Phase.COPYING:
            yield self._step(f"{engine} has copied RAM, and begins epoch 1", True,
                             lambda s: s.loop(name, "on_live_pass", 0))
            yield self._step(f"{engine} hears nothing during the copy", False, lambda s: s.loop(name, "tick", SOON))
        elif loop.phase in PAUSED:
            yield self._step(f"{engine} finishes the checkpoint of epoch {loop.epoch}", True,
                             lambda s: s.finish_checkpoint(name))
        elif loop.phase is Phase.UNACKNOWLEDGED:
            yield self._step(f"{engine} waits for the acknowledgement no longer", False,
                             lambda s: s.loop(name, "tick", SOON))
        elif loop.phase is Phase.RUNNING and loop.epoch < self._model.bounds.epochs:
            yield self._step(f"{engine} begins epoch {loop.epoch + 1}", True, lambda s: s.loop(name, "tick", SOON))
        elif loop.phase is Phase.HOLDING and not self._is_asking(host, PRIMARY):
            yield self._step(f"{engine} asks again to go on alone", True, lambda s: s.loop(name, "tick", SOON))
        if self._world.left.faults and loop.phase in PAUSED:
            yield self._step(f"{engine}'s checkpoint fails", False,
                             lambda s: s.loop(name, "on_checkpoint_failed", "why", NOW), faults=1)
        if self._world.left.ends:
            yield self._step(f"{name}'s guest shuts itself down", False, lambda s: s.shut_down(name), ends=1)

    @staticmethod
    def _ended_before(one: Primary | Backup | None, other: Primary | Backup) -> bool:
        """All engines wait equally long."""
        return one is not None and one.done and one.generation < other.generation

    @staticmethod
    def _is_asking(host: Host, role: str) -> bool:
        return any(each.role == role and each.listed and (each.reader or each.backlog) for each in host.watched)

    # -- the backup's engine (engine/backup.py)

    def _backup(self, name: str, host: Host, backup: Backup) -> Iterator[Step]:
        link, watch = self._world.link, backup.lease.rule.watch
        engine = f"{name}'s backup engine of generation {backup.generation}"
        if backup.done:
            if not host.agent and not self._ended_before(host.primary, backup):
                yield self._step(f"{engine} waits for an agent no longer", False, lambda s: s.drop_engine(name, BACKUP))
            return
        if host.guest is None:
            yield self._step(f"{engine} sees its standby gone", True, lambda s: s.fail_backup(name))
            return
        if backup.promoting:
            yield self._step(f"{engine} promotes epoch {backup.replica.rule.committed}", True,
                             lambda s: s.promote(name))
            if self._world.left.faults:
                yield self._step(f"{engine} cannot promote", False, lambda s: s.fail_backup(name), faults=1)
                yield self._step(f"{engine} promotes epoch {backup.replica.rule.committed}, and is killed before it "
                                 "can say so", False, lambda s: s.promote(name, told=False), faults=1)
            return
        if backup.linked and (link is None or not link.up):
            yield self._step(f"{engine} sees the connection lost", True, lambda s: s.lose_link(name, BACKUP))
        if backup.linked and link and link.forth:
            what, epoch = link.forth[0]
            yield self._step(f"{engine} gets the {what} of epoch {epoch}", True, lambda s: s.take_frame(name))
        if watch is Watch.WATCHING:
            yield self._step(f"{engine} misses the heartbeat", not backup.linked, lambda s: s.lease(name, "tick", SOON))
        elif watch is Watch.ASKING and not self._is_asking(host, BACKUP):
            yield self._step(f"{engine} asks again for the pair", True, lambda s: s.lease(name, "tick", SOON))
        elif watch is Watch.SYNCING and not backup.linked:
            yield self._step(f"{engine} waits for the primary no longer", False, lambda s: s.fail_backup(name))

    # -- the agent

    def _agent(self, name: str, host: Host) -> Iterator[Step]:
        for number, each in enumerate(host.watched):
            for thread in ("reader", "shutdown"):
                call = getattr(each, thread)
                if call is None:
                    continue
                asked = f"{name}'s question {_told(call.question)}"
                if call.answer is None:
                    yield from self._ordering(f"the arbiter judges {asked}", True,
                                              lambda s, n=number, t=thread: s.judge(name, n, t))
                    if self._world.left.losses:
                        yield self._step(f"{asked} is late: {name}'s agent waits for it no longer", False,
                                         lambda s, n=number, t=thread: s.time_out(name, n, t, stray=True), losses=1)
                else:
                    yield from self._hearing(
                        name, f"{name}'s agent hears the answer to {_told(call.question)}: {_told(call.answer)}",
                        lambda s, n=number, t=thread: s.answer(name, n, t))
                    if self._world.left.losses:
                        yield self._step(f"the answer to {asked} is lost", False,
                                         lambda s, n=number, t=thread: s.time_out(name, n, t, stray=False), losses=1)
        report = tuple((each.role, each.generation) for each in host.watched if each.listed)
        if report and self._model.known.rules.stale(self._world.row, name, report):
            yield from self._hearing(name, f"{name}'s agent reports, and hears that its generation is over",
                                     lambda s: s.report_alive(name))
        for role, generation in report:
            if self._model.known.rules.lingers(self._world.row, name, role, generation):
                yield from self._ordering(
                    f"the manager sees {name}'s {role} engine linger, and tells it to stop", True,
                    lambda s, g=generation: s.send("stop", name, stage.lingering(s.row, g)))

    # -- what breaks

    def _faults(self, name: str, host: Host) -> Iterator[Step]:
        if host.primary and not host.primary.done:
            yield self._step(f"{name}'s primary engine is killed", False,
                             lambda s: s.drop_engine(name, PRIMARY), faults=1)
        if host.backup and not host.backup.done:
            yield self._step(f"{name}'s backup engine is killed", False,
                             lambda s: s.drop_engine(name, BACKUP), faults=1)
        if host.agent:
            yield self._step(f"{name}'s agent is killed", False,
                             lambda s: s.kill_agent(name), faults=1)
        if host.guest and not host.guest.standby:
            yield self._step(f"{name}'s QEMU is killed", False, lambda s: s.set(name, guest=None), faults=1)
        if host.guest or host.primary or host.backup:
            yield self._step(f"host {name} loses its power", False, lambda s: s.lose_host(name), faults=1)

    def _network(self) -> Iterator[Step]:
        world = self._world
        if world.link and world.link.up and world.left.faults:
            yield self._step("the link is cut", False, lambda s: s.hang_up(world.link.generation), faults=1)
        for question in world.stray:
            yield self._step(f"the arbiter judges a late question {_told(question)}", False,
                             lambda s, q=question: s.judge_stray(q))
        for what, name, generation in world.orders:
            if self._reachable(name):
                yield self._step(f"{name}'s agent is late to {what} generation {generation}, as ordered", False,
                                 lambda s, o=(what, name, generation): s.catch_up(*o))

    # -- the manager's slow work

    def _manager(self) -> Iterator[Step]:
        world, row = self._world, self._world.row
        if row.state is PairState.PENDING:
            place = world.host(OTHER[row.primary_host])
            # The engine of a guest that is gone has seen that long before another guest is here.
            awake = place.primary is not None and not place.primary.done
            if place.up and place.agent and not awake and (place.guest is None or place.guest.standby):
                yield self._step(f"a standby is made on {OTHER[row.primary_host]}", True, lambda s: s.place())
        if row.state is PairState.SYNCING and row.step == ENGINES:
            yield from self._ordering(f"the manager starts the engines of generation {row.generation}", True,
                                      lambda s: s.start_engines())
        if row.state in SLOW and row.step == CLEANUP:
            yield from self._ordering("the manager removes the backup", True, lambda s: s.clean_up())
        if row.state is PairState.DEGRADED and row.step in CATCH_UP and self._reachable(row.active_host):
            yield from self._ordering(f"Nova follows the guest to {row.active_host}", True, lambda s: s.follow())
        if row.state is PairState.PROMOTING and self._reachable(row.active_host):
            idle = not any(each.listed for each in world.host(row.active_host).watched)
            yield self._step("the manager waits for the promotion no longer: Nova starts the server anew there", idle,
                             lambda s: s.decide("start_anew", "why"))
        if self._none_left():
            yield self._step("the manager sees no engine left, and gives the pair up", True,
                             lambda s: s.decide("give_up", "why", True))
        if world.left.ends:
            if row.state is not PairState.DISABLED:
                yield from self._ordering("the owner's operation disarms the pair", False, lambda s: s.disarm(), ends=1)
            if row.state is PairState.PROTECTED and self._reachable(row.primary_host):
                yield self._step("the owner moves the server to its backup's host", False,
                                 lambda s: s.rpc(row.primary_host, "hand_over", SERVER), ends=1)
        guest = world.host(row.active_host).guest
        if (row.state in (PairState.DEGRADED, PairState.DISABLED) and row.step == NOTHING and world.left.pairings
                and guest and not guest.standby and self._reachable(row.active_host)):
            waiting = sum(call is not None for host in (world.a, world.b) for each in host.watched
                          for call in (each.reader, each.shutdown))
            if waiting <= world.left.losses:
                yield self._step(f"the manager begins a new pair, generation {row.generation + 1}", False,
                                 lambda s: s.begin(), pairings=1, losses=waiting)

    def _reachable(self, name: str) -> bool:
        host = self._world.host(name)
        return host.up and host.agent

    def _none_left(self) -> bool:
        """failover/judge.py, `_protected` and `_syncing`: nobody is left who would ask."""
        row = self._world.row
        if row.state not in (PairState.PROTECTED, PairState.SYNCING) or row.step != NOTHING or row.backup_host is None:
            return False
        here, there = self._world.host(row.primary_host), self._world.host(row.backup_host)
        unheard = here.up and here.agent and not _lists(here, row.generation) and not any(
            what == "start" for what, *_ in self._world.orders)
        if row.state is PairState.SYNCING:
            return unheard
        return unheard and not (there.up and there.agent and _lists(there, row.generation))


def _lists(host: Host, generation: int) -> bool:
    return any(each.listed and each.generation == generation for each in host.watched)


def _told(what: Any) -> str:
    if isinstance(what, Question):
        words = [str(fact) for fact in what.facts[1:] if fact not in ("", (), PAIR, SERVER)]
        return f"{what.method}({', '.join(words)})"
    if isinstance(what, Grant):
        return f"{'granted' if what.granted else 'refused'}, generation {what.generation}"
    return str(what)
