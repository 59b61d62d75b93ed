"""The real agent (engine/agent.py), a thread's turn at a time.

A turn runs the agent's own method until it needs an answer of the manager that has not come yet. Then it is broken off,
and its question is noted; when the answer is there the method is run again from its beginning, on the flags that it
began with, and goes on from the answer with the flags of then. All that it did before its first question is to set
flags, so nothing happens twice.
"""

import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from nova_ftvm.core.kind import Abilities
from nova_ftvm.engine import agent as agent_module
from nova_ftvm.engine.agent import Agent, _Watched
from nova_ftvm.exception import FtvmError
from nova_ftvm.rpc import common
from nova_ftvm.types import Grant
from tests.model.rules import PAIR, SERVER, plain

PRIMARY, BACKUP = "primary", "backup"
#: An engine's report: the event, and the phase in which it ended.
Report = tuple[str, str]

Flags = tuple[tuple[str, Any], ...]


class Question(NamedTuple):
    """What an agent asks the manager, as rpc.manager.ManagerApi names it."""

    method: str
    facts: tuple[Any, ...]


class Call(NamedTuple):
    """A thread of the agent that waits for the manager."""

    report: Report
    #: The flags that its turn began with.
    flags: Flags
    question: Question
    #: None: it has not come yet. SILENCE: it will not.
    answer: Any = None


SILENCE = "silence"


class Watched(NamedTuple):
    """What an agent knows of an engine. Its reader's thread has one call at most, and a shutdown's thread another."""

    role: str
    generation: int
    flags: Flags
    #: Is it the one that the agent names for its pair and role?
    listed: bool = True
    reader: Call | None = None
    shutdown: Call | None = None
    backlog: tuple[Report, ...] = ()


class Facts(NamedTuple):
    """What a turn finds out about its host."""

    #: What else the agent keeps in mind: its tables, by name.
    memory: tuple[tuple[str, tuple[tuple[Any, Any], ...]], ...]
    #: The engines that answer an order to stop.
    responsive: tuple[str, ...]
    standby: bool
    #: Is there a guest that is no standby?
    runs: bool


class Outcome(NamedTuple):
    watched: tuple[Watched, ...]
    #: ("destroy",), ("let go",), ("start", role, generation), ("kill", role, generation),
    #: ("order", role, generation, what, facts): in their order.
    effects: tuple[Any, ...]
    #: The manager's question, for `report`.
    question: Question | None
    answer: Any
    memory: tuple[tuple[str, tuple[tuple[Any, Any], ...]], ...]


class _Asked(BaseException):
    """The turn ends here: it waits for an answer."""


class _Turn:
    """One run of the real agent. It is its own manager, guests and engines."""

    def __init__(self, host: str, watched: tuple[Watched, ...], facts: Facts, script: tuple[Any, ...] = ()) -> None:
        self.effects: list[Any] = []
        self.question: Question | None = None
        #: The question came from a thread that was started in the turn.
        self.aside = False
        self.facts = facts
        self.script = list(script)
        self.before_answer: Any = None
        self.agent = Agent(host, "address", [], self, self, self._start, lambda seconds: None,  # type: ignore
                           abilities=Abilities())
        for name, table in facts.memory:
            getattr(self.agent, name).update(table)
        self.watched = [_awake(_Engine(self, each.role, each.generation), each.flags) for each in watched]
        for each, awake in zip(watched, self.watched, strict=True):
            if each.listed:
                self.agent._engines[PAIR, each.role] = awake

    def run(self, call: Any) -> Any:
        """The answer; an error of ours is one."""
        try:
            return call()
        except FtvmError as error:
            return error
        except _Asked:
            return None

    # ManagerClient

    def __getattr__(self, name: str) -> Any:
        return lambda *facts, **more: self._ask(name, facts, more)

    def _ask(self, method: str, facts: tuple[Any, ...], more: dict[str, Any]) -> Any:
        if not self.script:
            self.question = _question(method, facts, more)
            raise _Asked
        if self.before_answer:
            self.before_answer()
        answer = self.script.pop(0)
        if answer == SILENCE:
            raise common.Failed[0]
        return answer

    # Guests

    def destroy(self, instance_id: str) -> bool:
        self.effects.append(("destroy",))
        return True

    def is_standby(self, instance_id: str) -> bool:
        return self.facts.standby and ("destroy",) not in self.effects

    def finish_promotion(self, instance_id: str) -> bool:
        return self.facts.runs and ("destroy",) not in self.effects

    def let_go(self, instance_id: str) -> None:
        self.effects.append(("let go",))

    # Engines

    def _start(self, request: dict[str, Any]) -> Any:
        self.effects.append(("start", request["role"], request["generation"]))
        return _Engine(self, request["role"], request["generation"])


class _Engine:
    """engine.agent.Engine."""

    def __init__(self, turn: _Turn, role: str, generation: int) -> None:
        self._turn = turn
        self.role, self.generation, self.pair_id, self.instance_id = role, generation, PAIR, SERVER

    def listen(self, on_report: Any) -> None:
        if self.role == BACKUP:
            on_report(self, {"event": "listening", "port": 1})

    def order(self, what: str, **facts: Any) -> None:
        grant = Grant(facts["granted"], facts["generation"], "so it is") if what == "grant" else None
        self._turn.effects.append(("order", self.role, self.generation, what, grant))
        if what == "stop" and self.wait(0):
            for each in self._turn.watched:
                if each.engine is self:
                    each.state = "ended"

    def wait(self, timeout_s: float) -> bool:
        return f"{self.role} {self.generation}" in self._turn.facts.responsive

    def kill(self) -> None:
        self._turn.effects.append(("kill", self.role, self.generation))


class _Aside:
    """threading.Thread of the agent: its target's question is the turn's, and the thread that started it goes on."""

    turn: _Turn

    def __init__(self, target: Any, args: tuple[Any, ...] = (), **_: Any) -> None:
        self._target, self._args = target, args

    def start(self) -> None:
        self.turn.aside = True
        self._target(*self._args)


def rpc(host: str, watched: tuple[Watched, ...], facts: Facts, method: str, *arguments: Any,
        answers: tuple[Any, ...] = ()) -> Outcome:
    """A method of AgentApi, or `adopt_engines` or `report` of the agent's own."""
    turn = _Turn(host, watched, facts, answers)
    if method == "adopt_engines":
        arguments = ([_Engine(turn, role, generation) for role, generation in arguments],)
    answer = turn.run(lambda: getattr(turn.agent, method)(*arguments))
    return _outcome(turn, watched, answer)


def report(host: str, watched: tuple[Watched, ...], facts: Facts, stale: tuple[str, ...]) -> Outcome:
    """A sign of life, and the manager's answer to it."""
    return rpc(host, watched, facts, "report", answers=({"stale": stale},))


def hear(host: str, watched: tuple[Watched, ...], facts: Facts, number: int) -> Outcome:
    """The reader's thread of engine `number` takes the first report of its backlog."""
    mine = watched[number]
    outcome = _handle(host, watched, facts, number, mine.backlog[0], mine.flags, ())
    return _changed(outcome, number, backlog=mine.backlog[1:])


def go_on(host: str, watched: tuple[Watched, ...], facts: Facts, number: int, thread: str) -> Outcome:
    """The thread that waits for the manager has its answer."""
    call: Call = getattr(watched[number], thread)
    return _handle(host, watched, facts, number, call.report, call.flags, (call.answer,), thread)


def _handle(host: str, watched: tuple[Watched, ...], facts: Facts, number: int, report: Report, flags: Flags,
            script: tuple[Any, ...], thread: str = "reader") -> Outcome:
    turn = _Turn(host, watched, facts, script)
    mine = turn.watched[number]
    live = _flags(mine)
    _set(mine, flags)
    turn.before_answer = lambda: (_set(mine, live), setattr(turn, "before_answer", None))
    _Aside.turn = turn
    event, phase = report
    turn.run(lambda: turn.agent._on_report(mine, {
        "event": event, "phase": phase, "reason": "why", "evidence": "why", "timeline": {}, "percent": 0, "port": 1}))
    waiting = None
    if turn.question is not None:
        waiting = Call(report, flags, turn.question)
    if turn.aside and thread == "reader":
        thread = "shutdown"
    return _changed(_outcome(turn, watched, None), number, **{thread: waiting})


def _changed(outcome: Outcome, number: int, **changes: Any) -> Outcome:
    watched = list(outcome.watched)
    watched[number] = watched[number]._replace(**changes)
    return outcome._replace(watched=tuple(watched))


def _outcome(turn: _Turn, before: tuple[Watched, ...], answer: Any) -> Outcome:
    engines = turn.agent._engines
    after = [each._replace(flags=_flags(awake), listed=engines.get((PAIR, each.role)) is awake)
             for each, awake in zip(before, turn.watched, strict=True)]
    after += [Watched(role, awake.engine.generation, _flags(awake)) for (_, role), awake in engines.items()
              if awake not in turn.watched]
    memory = tuple((name, tuple(table.items())) for name, table in vars(turn.agent).items()
                   if isinstance(table, dict) and table is not engines and table)
    return Outcome(tuple(after), tuple(turn.effects), turn.question, answer, memory)


def _question(method: str, facts: tuple[Any, ...], more: dict[str, Any]) -> Question:
    """As the manager's RPC method takes it, people's reasons aside."""
    if method == "report_promoted":
        return Question(method, (*facts[:3], (), "why" if [*facts[4:], *more.values(), ""][0] else ""))
    if method == "agent_report":
        return Question(method, facts)
    return Question(method, tuple(fact if fact in (PAIR, SERVER) else plain_fact(fact) for fact in facts))


def plain_fact(fact: Any) -> Any:
    """Names are kept, sentences are not."""
    return "why" if isinstance(fact, str) and " " in fact else fact


_NOT_FLAGS = ("engine", "listening")


def _awake(engine: _Engine, flags: Flags) -> Any:
    watched = _Watched(engine)  # type: ignore[arg-type]
    watched.listening.set()
    _set(watched, flags)
    return watched


def _set(watched: Any, flags: Flags) -> None:
    for name, value in flags:
        setattr(watched, name, value)


def _flags(watched: Any) -> Flags:
    return tuple((name, value if name == "state" else plain(value)) for name, value in vars(watched).items()
                 if name not in _NOT_FLAGS)


@contextmanager
def threads_aside() -> Iterator[None]:
    """The agent starts no threads: they are run in the turn."""
    real = agent_module.threading
    agent_module.threading = types.SimpleNamespace(  # type: ignore[assignment]
        Thread=_Aside, Lock=threading.Lock, RLock=threading.RLock, Event=threading.Event,
        Condition=threading.Condition)
    try:
        yield
    finally:
        agent_module.threading = real
