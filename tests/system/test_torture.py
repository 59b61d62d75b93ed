"""The torture: its clients see every way in which a register can be wrong, and a protected one stays right."""

import asyncio
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from ftvm_lab import failover, history, linear, nemesis, torture
from ftvm_lab.command import LabError
from ftvm_lab.failover import Stage
from ftvm_lab.faults import FAULTS, Fault, Scene, Side
from ftvm_lab.history import NOTHING, History, Kind, Operation, Recorder
from ftvm_lab.layout import COMPUTES, Layout
from ftvm_lab.nemesis import TOTAL_LOSS, Look, Planned, Struck
from ftvm_lab.register import Pace, Plan, Report, Work, run_clients
from ftvm_lab.torture import Run

from tests.system.serving import serving

# -- the clients, at registers that misbehave on purpose

FAST = Pace(think_s=0.0, connect_s=1.0, silence_s=0.2, read_again_s=1.0, grace_s=0.5)
CONNECTIONS = 4
#: The request that goes wrong: early enough to be reached, late enough to have something to forget.
FAULTY_REQUEST = 100


class Register:
    """The guest's half of the protocol. `put` and `reply` may be replaced by faulty ones."""

    boot = "b001"

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.requests = 0

    def answer(self, line: str) -> str | None:
        self.requests += 1
        number, kind, key, *rest = line.split()
        found = self.values.get(key, NOTHING)
        if kind == Kind.READ:
            return self.reply(number, f"ok {found}")
        if kind == Kind.CAS and found != rest[0]:
            return self.reply(number, f"no {found}")
        self.put(key, rest[-1])
        return self.reply(number, "ok")

    def put(self, key: str, value: str) -> None:
        self.values[key] = value

    def reply(self, number: str, text: str) -> str | None:
        return f"{number} {self.boot} {text}"

    @property
    def is_due(self) -> bool:
        return self.requests >= FAULTY_REQUEST


class LosesAWrite(Register):
    """Confirms one write that it never makes."""

    def put(self, key: str, value: str) -> None:
        if self.requests % FAULTY_REQUEST:
            super().put(key, value)


class GoesBack(Register):
    """As if an older state of its memory went on running."""

    def __init__(self) -> None:
        super().__init__()
        self.older: dict[str, str] = {}

    def answer(self, line: str) -> str | None:
        if self.requests == FAULTY_REQUEST // 2:
            self.older = dict(self.values)
        if self.requests == FAULTY_REQUEST:
            self.values = dict(self.older)
        return super().answer(line)


class TwoBrains(Register):
    """From some request on there are two, and the clients speak with the one or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.other: dict[str, str] | None = None

    def answer(self, line: str) -> str | None:
        if self.is_due:
            mine = self.values
            self.values, self.other = (dict(mine) if self.other is None else self.other), mine
        return super().answer(line)


class StartsAgain(Register):
    def answer(self, line: str) -> str | None:
        if self.requests == FAULTY_REQUEST:
            self.values, self.boot = {}, "b002"
        return super().answer(line)


class AnswersAnother(Register):
    def reply(self, number: str, text: str) -> str | None:
        return super().reply("7" if self.requests == FAULTY_REQUEST else number, text)


class SaysNothing(Register):
    """Does what it is asked for, and does not say so."""

    def reply(self, number: str, text: str) -> str | None:
        return None if self.requests == FAULTY_REQUEST else super().reply(number, text)


class HangsUp(Register):
    def reply(self, number: str, text: str) -> str | None:
        if self.requests == FAULTY_REQUEST:
            raise ConnectionAbortedError
        return super().reply(number, text)


def answers(register: Register, line: bytes) -> list[bytes]:
    reply = register.answer(line.decode())
    return [] if reply is None else [reply.encode() + b"\n"]


def used(make: Callable[[], Register], directory: Path, seconds: float = 0.6) -> tuple[Report, History]:
    """What the clients of such a register report, and their history as it is on disk."""
    path = directory / "history"

    async def run() -> Report:
        stop = asyncio.Event()
        register = make()
        async with serving(lambda: lambda line: answers(register, line)) as address:
            asyncio.get_running_loop().call_later(seconds, stop.set)
            with path.open("w") as output:
                return await run_clients(address, CONNECTIONS, FAST, Work(Plan(1), Recorder(output)), stop)

    return asyncio.run(run()), history.load(path)


def violations_in(found: History) -> list[linear.Violation]:
    return list(linear.violations(found.operations.values()))


def test_a_faithful_register_is_found_to_be_one(tmp_path: Path) -> None:
    report, found = used(Register, tmp_path)
    assert len(found.operations) > 2 * FAULTY_REQUEST
    assert (found.unknown, report.reconnects, report.wrong, report.boots) == ({}, 0, [], [Register.boot])
    assert violations_in(found) == []


def test_every_key_is_read_again_at_the_end(tmp_path: Path) -> None:
    report, found = used(Register, tmp_path)
    last = sorted(found.operations.values(), key=lambda one: one.number)[-report.keys :]
    assert {one.kind for one in last} == {Kind.READ}
    assert len({one.key for one in last}) == report.keys >= 3


@pytest.mark.parametrize("register", [LosesAWrite, GoesBack, TwoBrains, StartsAgain])
def test_a_register_that_forgets_or_is_two_is_seen(register: type[Register], tmp_path: Path) -> None:
    _, found = used(register, tmp_path)
    assert violations_in(found)


def test_a_guest_that_was_started_again_is_a_violation_by_itself(tmp_path: Path) -> None:
    run = Run(seed=1, minutes=0)
    run.clients, _ = used(StartsAgain, tmp_path)
    assert len(run.faults_of_answers) == 1
    assert run.violation_count == 1 and not run.passed


def test_an_answer_to_another_request_is_a_violation_and_the_connection_is_not_used_any_more(tmp_path: Path) -> None:
    run = Run(seed=1, minutes=0)
    run.clients, run.history = used(AnswersAnother, tmp_path)
    assert (len(run.clients.wrong), run.clients.reconnects, len(run.history.unknown)) == (1, 1, 1)
    assert not run.passed
    assert violations_in(run.history) == []


@pytest.mark.parametrize("register", [SaysNothing, HangsUp])
def test_without_an_answer_the_outcome_is_unknown_and_another_process_goes_on(
    register: type[Register], tmp_path: Path
) -> None:
    report, found = used(register, tmp_path)
    ((number, _),) = found.unknown.items()
    lost = found.operations[number]
    assert report.reconnects == 1 and report.wrong == []
    later = [one for one in found.operations.values() if one.connection == lost.connection and one.number > number]
    assert later and lost.process not in {one.process for one in later}
    assert violations_in(found) == []


def test_a_silence_is_a_gap_as_long_as_it_lasts(tmp_path: Path) -> None:
    _, found = used(SaysNothing, tmp_path)
    (number,) = found.unknown
    asked_s = found.operations[number].invoked_s
    gap = found.longest_wait(asked_s, asked_s + 0.01)
    assert gap is not None
    assert gap.start_s == asked_s and gap.seconds >= FAST.silence_s
    assert found.longest_wait(asked_s - 10, asked_s - 5) is None


# -- the nemesis, without a lab


def test_a_seed_gives_the_same_faults_again_and_another_seed_others() -> None:
    chosen = nemesis.choose([])
    first, again, other = ([*islice(nemesis.plan(chosen, seed), 60)] for seed in (1, 1, 2))
    assert first == again != other


def test_each_fault_has_its_turn_before_one_comes_again() -> None:
    chosen = nemesis.choose([])
    planned = [one.fault.name for one in islice(nemesis.plan(chosen, 5), len(chosen))]
    assert sorted(planned) == sorted(fault.name for fault in chosen) == sorted(set(FAULTS) - TOTAL_LOSS)


def test_what_no_server_survives_cannot_be_chosen() -> None:
    for name in (*TOTAL_LOSS, "no-such-fault"):
        with pytest.raises(LabError, match=name):
            nemesis.choose([name])


def look(at_s: float, state: str | None = "protected", reason: str = "p", fresh: bool = True) -> Look:
    return Look(at_s, "compute1", state, reason, True, fresh)


def test_a_server_is_protected_since_the_last_time_that_it_was_not() -> None:
    looks = [look(1), look(2, "syncing"), look(3), look(4)]
    assert nemesis.protected_since(looks) == 3
    assert nemesis.protected_since([*looks, look(5, None)]) is None
    assert nemesis.protected_since([*looks, look(5, fresh=False)]) is None
    assert nemesis.protected_since([]) is None


def test_states_are_told_as_they_follow_each_other() -> None:
    looks = [look(1), look(2), look(3, None), look(4, "degraded", "lost"), look(5, "degraded", "lost"), look(6)]
    assert nemesis.states(looks) == ("protected: p", "degraded: lost", "protected: p")


def test_a_service_that_did_not_come_back_is_told() -> None:
    status = {"control": {"nova": True}, "compute1": {"taps": True, "libvirtd": False}, "compute2": {}}
    assert nemesis.dead_services(status) == ["compute2 is off", "libvirtd does not run on compute1"]


# -- the verdict


def struck(side: Side, start_s: float, end_s: float, trouble: tuple[str, ...] = ()) -> Struck:
    fault = Fault("made-up", side, "Nothing.", lambda scene: lambda: None, (0.0, 0.0))
    scene = Scene(Layout(Path("/nowhere")), "id", *COMPUTES[:2])
    planned = Planned(fault, 1.0, 1.0)
    return Struck(1, planned, scene, start_s, end_s, 1.0, "compute1", "compute2", False, 0.0, 1.0, (), trouble)


def run_with(*faults: Struck) -> Run:
    run = Run(seed=1, minutes=1, struck=[*faults], clients=Report(0, ["b"], [], 3))
    answered = [(0, 10.0, 10.2), (1, 12.0, 12.1), (1, 16.0, 16.3), (0, 20.0, 21.5), (1, 20.1, 20.4), (0, 30.0, 30.05)]
    for number, (connection, start_s, end_s) in enumerate(answered):
        one = Operation(number, connection, connection, Kind.READ, "k", start_s, completed_s=end_s, seen=NOTHING)
        run.history.operations[number] = one
        run.history.waits.append(history.Wait(connection, start_s, end_s))
    run.history.waits.sort(key=lambda wait: wait.end_s)
    return run


def test_gaps_are_told_by_the_side_at_fault() -> None:
    run = run_with(struck(Side.BACKUP, 10.1, 15), struck(Side.PRIMARY, 20.2, 25), struck(Side.BACKUP, 29, 31))
    shown = torture.report(run)
    assert shown["backup_fault_gap_ms_max"] == pytest.approx(200)
    assert shown["gap_ms_max"] == {"backup": 200, "primary": 1500, "control": None, "link": None, "none": 300}
    assert (shown["operations"], shown["faults"], shown["violations"]) == (6, 3, 0)
    assert shown["passed"]


def test_a_fault_that_was_not_recovered_from_is_not_passed() -> None:
    run = run_with(struck(Side.BACKUP, 10.1, 15, trouble=("waited in vain",)))
    assert not run.passed
    assert torture.report(run)["not_recovered"] == 1


# -- on the lab

MINUTES = 2.0
SEED = 20
QUICK_FAULTS = [
    *("backup-qemu-killed", "backup-engine-killed", "backup-engine-stopped"),
    *("primary-host-killed", "manager-killed", "data-link-cut"),
]
MOST_BACKUP_GAP_MS = 1000.0


@pytest.fixture(scope="module")
def tortured(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    failover.clear(stage.layout)
    run = Run(SEED, MINUTES)
    path = tmp_path_factory.mktemp("torture") / "history.jsonl"
    for one in torture.torture(stage, nemesis.choose(QUICK_FAULTS), run, path):
        torture.tell(run, one, stage.progress)
    torture.tell_verdict(run, stage.progress)
    yield run
    failover.clear(stage.layout)


@pytest.mark.trial
@pytest.mark.timeout(1200)
def test_a_protected_register_is_one_register_whatever_happens(tortured: Run) -> None:
    assert len(tortured.history.operations) > 1000
    assert [str(one) for found in tortured.violations for one in found.witness] == []
    assert tortured.faults_of_answers == []


@pytest.mark.trial
@pytest.mark.timeout(1200)
def test_protection_comes_back_after_each_fault(tortured: Run) -> None:
    assert len(tortured.struck) > 1
    assert [(one.fault.name, one.trouble) for one in tortured.struck if not one.is_recovered] == []
    assert tortured.passed


@pytest.mark.trial
@pytest.mark.timeout(1200)
def test_no_request_is_left_without_an_answer(tortured: Run) -> None:
    assert tortured.clients is not None
    assert (len(tortured.history.unknown), tortured.clients.reconnects) == (0, 0)


@pytest.mark.trial
@pytest.mark.timeout(1200)
def test_clients_wait_less_than_a_second_while_only_the_backups_side_is_at_fault(tortured: Run) -> None:
    gap_ms = torture.report(tortured)["backup_fault_gap_ms_max"]
    assert gap_ms is not None
    assert gap_ms < MOST_BACKUP_GAP_MS
