"""ftvm_lab.linear: accepts what a register can do, and nothing else.

Histories are drawn as scenarios in the way that they are told: who asked what, from when to when, and what it saw.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations, count, permutations
from pathlib import Path

import pytest
from ftvm_lab import history, linear
from ftvm_lab.history import NOTHING, Follower, Kind, Operation

KEY = "k"
_numbers = count(1)


def operation(kind: Kind, start: float, end: float | None, key: str = KEY, **rest: str) -> Operation:
    number = next(_numbers)
    return Operation(number, number, 0, kind, key, start, completed_s=end, **rest)


def read(seen: str, start: float, end: float) -> Operation:
    return operation(Kind.READ, start, end, seen=seen)


def write(value: str, start: float, end: float | None) -> Operation:
    return operation(Kind.WRITE, start, end, value=value)


def cas(expected: str, value: str, start: float, end: float | None) -> Operation:
    return operation(Kind.CAS, start, end, expected=expected, value=value)


def failed_cas(expected: str, value: str, start: float, end: float, seen: str) -> Operation:
    return operation(Kind.CAS, start, end, expected=expected, value=value, seen=seen)


UNKNOWN = None

GOOD = {
    "nothing at all": [],
    "a key that nobody wrote": [read(NOTHING, 0, 1), failed_cas("a", "b", 2, 3, seen=NOTHING)],
    "one after the other": [write("a", 0, 1), read("a", 2, 3), cas("a", "b", 4, 5), read("b", 6, 7)],
    "a read beside a write sees the old value": [write("a", 0, 1), write("b", 2, 5), read("a", 3, 4)],
    "a read beside a write sees the new value": [write("a", 0, 1), write("b", 2, 5), read("b", 3, 4)],
    "two reads beside a write see first the old value and then the new one": [
        *(write("a", 0, 1), write("b", 2, 9), read("a", 3, 4), read("b", 5, 6)),
    ],
    "of two writes at once the first to end may be the last": [write("a", 0, 9), write("b", 1, 2), read("b", 10, 11)],
    "of two cas at once one fails": [
        *(write("a", 0, 1), cas("a", "b", 2, 5), failed_cas("a", "c", 2, 5, seen="b"), read("b", 6, 7)),
    ],
    "an unknown write takes effect": [write("a", 0, 1), write("b", 2, UNKNOWN), read("b", 3, 4)],
    "an unknown write takes effect late": [
        *(write("a", 0, 1), write("b", 2, UNKNOWN), read("a", 10, 11), write("c", 12, 13), read("b", 14, 15)),
    ],
    "an unknown write never takes effect": [write("a", 0, 1), write("b", 2, UNKNOWN), read("a", 3, 4)],
    "an unknown cas takes effect": [write("a", 0, 1), cas("a", "b", 2, UNKNOWN), read("b", 3, 4)],
    "an unknown cas on an unknown write": [
        *(write("a", 0, UNKNOWN), cas("a", "b", 1, UNKNOWN), read(NOTHING, 2, 3), read("b", 4, 5)),
    ],
    "an unknown cas that cannot have found its value": [
        *(write("a", 0, 1), cas("x", "b", 2, UNKNOWN), read("a", 3, 4)),
    ],
    "what ends when another begins may be later": [write("a", 0, 1), read(NOTHING, 1, 2)],
    "the same value twice": [write("a", 0, 1), write("b", 2, 3), write("a", 4, 5), read("a", 6, 7)],
}

BAD = {
    "a stale read": [write("a", 0, 1), write("b", 2, 3), read("a", 4, 5)],
    "a lost write": [write("a", 0, 1), read(NOTHING, 2, 3)],
    "a value never written": [write("a", 0, 1), read("b", 2, 3)],
    "a value read before it was written": [read("a", 0, 1), write("a", 2, 3)],
    "a cas that took effect twice": [
        *(write("a", 0, 1), cas("a", "b", 2, 3), write("c", 4, 5), read("b", 6, 7)),
    ],
    "two cas from one value": [write("a", 0, 1), cas("a", "b", 2, 5), cas("a", "c", 2, 5), read("c", 6, 7)],
    "a cas that found what was not there": [write("a", 0, 1), cas("x", "b", 2, 3)],
    "a failed cas that had no reason": [write("a", 0, 1), failed_cas("a", "b", 2, 3, seen="a")],
    "a failed cas that saw the past": [write("a", 0, 1), write("b", 2, 3), failed_cas("x", "y", 4, 5, seen="a")],
    "a failed cas that changed the value all the same": [
        *(write("a", 0, 1), failed_cas("x", "b", 2, 3, seen="a"), read("b", 4, 5)),
    ],
    "two reads beside a write see first the new value and then the old one": [
        *(write("a", 0, 1), write("b", 2, 9), read("b", 3, 4), read("a", 5, 6)),
    ],
    "an unknown write comes and goes": [
        *(write("a", 0, 1), write("b", 2, UNKNOWN), read("b", 3, 4), read("a", 5, 6)),
    ],
    "an unknown write that takes effect twice": [
        *(write("a", 0, 1), write("b", 2, UNKNOWN), read("b", 3, 4), write("c", 5, 6), read("b", 7, 8)),
    ],
    "an unknown write that was not yet asked for": [write("a", 0, 1), read("b", 2, 3), write("b", 4, UNKNOWN)],
    "an unknown cas that cannot have found its value takes effect": [
        *(write("a", 0, 1), cas("x", "b", 2, UNKNOWN), read("b", 3, 4)),
    ],
    "a failover that goes back behind confirmed writes": [
        *(write("a", 0, 1), write("b", 2, 3), write("c", 4, 5), read("c", 5.5, 5.8)),
        *(write("d", 6, UNKNOWN), read("b", 8, 9)),
    ],
    "a machine that was started again with nothing": [write("a", 0, 1), read("a", 2, 3), read(NOTHING, 4, 5)],
    "two brains": [
        *(write("a", 0, 1), cas("a", "left", 2, 3), cas("a", "right", 2, 3)),
        *(read("left", 4, 5), read("right", 4, 5), read("left", 6, 7), read("right", 6, 7)),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_possible_history_is_accepted(name: str) -> None:
    assert linear.is_linearizable(GOOD[name])
    assert list(linear.violations(GOOD[name])) == []


@pytest.mark.parametrize("name", BAD)
def test_an_impossible_history_is_rejected_with_an_impossible_part_of_it(name: str) -> None:
    (violation,) = linear.violations(BAD[name])
    assert violation.key == KEY
    assert violation.witness
    assert {one.number for one in violation.witness} <= {one.number for one in BAD[name]}
    assert not by_brute_force(violation.witness)


def test_the_order_in_which_operations_are_listed_does_not_matter() -> None:
    draw = random.Random(1)
    for histories, verdict in ((GOOD, True), (BAD, False)):
        for listed in histories.values():
            assert linear.is_linearizable(draw.sample(listed, len(listed))) is verdict


def test_keys_are_judged_apart() -> None:
    other = [replace(one, key="other") for one in BAD["a stale read"]]
    assert [found.key for found in linear.violations([*GOOD["one after the other"], *other])] == ["other"]


def test_a_witness_has_nothing_that_is_not_needed_and_keeps_the_writes_that_were_read() -> None:
    noise = [write(f"n{at}", 0.1 * at, 0.1 * at + 0.05) for at in range(1, 50)]
    noise += [read("n49", 6 + at, 6.5 + at) for at in range(20)]
    stale = [write("old", 30, 31), read("old", 32, 33), write("new", 34, 35), read("old", 36, 37)]
    later = [write(f"m{at}", 40 + at, 40.5 + at) for at in range(20)]
    witness = linear.witness([*noise, *stale, *later])
    assert [(one.kind, one.value or one.seen) for one in witness] == [
        (Kind.WRITE, "old"),
        (Kind.WRITE, "new"),
        (Kind.READ, "old"),
    ]


# -- against the definition itself


def by_brute_force(operations: Sequence[Operation]) -> bool:
    """Every order of the known operations and any of the unknown ones, each tried."""
    known = [one for one in operations if one.is_known]
    unknown = [one for one in operations if not one.is_known]
    return any(
        _is_right(order)
        for size in range(len(unknown) + 1)
        for chosen in combinations(unknown, size)
        for order in permutations([*known, *chosen])
    )


def _is_right(order: Sequence[Operation]) -> bool:
    state = NOTHING
    for place, one in enumerate(order):
        if any(later.completed_s is not None and later.completed_s < one.invoked_s for later in order[place + 1 :]):
            return False
        if one.kind is Kind.WRITE:
            assert one.value is not None
            state = one.value
        elif one.kind is Kind.CAS and one.seen is None:
            if state != one.expected:
                return False
            assert one.value is not None
            state = one.value
        elif one.is_known and (state != one.seen or (one.kind is Kind.CAS and one.seen == one.expected)):
            return False
    return True


def any_history(draw: random.Random, size: int) -> list[Operation]:
    """Of few values, so that about as many are possible as are not."""
    values = [NOTHING, "a", "b", "c"]
    made: list[Operation] = []
    for _ in range(size):
        start = draw.randint(0, 8)
        end = None if draw.random() < 0.25 else start + draw.randint(1, 4)
        kind = draw.choice(list(Kind))
        expected, value, seen = (draw.choice(values) for _ in range(3))
        if kind is Kind.WRITE:
            made.append(write(value, start, end))
        elif kind is Kind.READ:
            made.append(operation(kind, start, end, **({} if end is None else {"seen": seen})))
        elif end is not None and draw.random() < 0.5:
            made.append(failed_cas(expected, value, start, end, seen))
        else:
            made.append(cas(expected, value, start, end))
    return made


def test_random_histories_are_judged_as_by_trying_every_order() -> None:
    draw = random.Random(2)
    verdicts = []
    for _ in range(3000):
        listed = any_history(draw, draw.randint(1, 5))
        verdict = by_brute_force(listed)
        assert linear.is_linearizable(listed) is verdict, "\n".join(map(str, listed))
        if not verdict:
            assert not by_brute_force(linear.witness(listed)), "\n".join(map(str, listed))
        verdicts.append(verdict)
    assert 500 < sum(verdicts) < 2500


# -- against a register that really is one


def simulate(
    draw: random.Random, size: int, processes: int, key: str = KEY, lost: float = 0.0, values: int | None = None
) -> list[Operation]:
    """Operations of several processes on a true register. Each takes effect somewhere between its two ends.

    Of the share `lost` the answer does not come: half of these take effect, at once or much later.
    """
    made: list[Operation] = []
    effects: list[tuple[float, Operation]] = []
    free = [0.0] * processes
    for number in range(size):
        process = min(range(processes), key=free.__getitem__)
        start = free[process] + draw.random()
        end = start + draw.expovariate(1.0) + 0.001
        free[process] = end
        value = str(number if values is None else draw.randrange(values))
        kind = draw.choice(list(Kind))
        one = Operation(number, process, process, kind, key, start, value=None if kind is Kind.READ else value)
        if draw.random() < lost:
            free[process] = start + 5
            if draw.random() < 0.5:
                effects.append((start + draw.expovariate(0.1), one))
            else:
                made.append(_aimed(one, draw, NOTHING))
        else:
            effects.append((draw.uniform(start, end), replace(one, completed_s=end)))
    state = NOTHING
    for _, one in sorted(effects, key=lambda effect: effect[0]):
        one = _aimed(one, draw, state)
        found: str | None = state
        if one.kind is Kind.WRITE or (one.kind is Kind.CAS and one.expected == state):
            assert one.value is not None
            state = one.value
            found = None
        made.append(replace(one, seen=found if one.is_known else None))
    return made


def _aimed(one: Operation, draw: random.Random, state: str) -> Operation:
    """A cas that expects, mostly, what is there."""
    if one.kind is not Kind.CAS:
        return one
    return replace(one, expected=state if draw.random() < 0.7 else "other")


@pytest.mark.parametrize("values", [None, 3], ids=["each value once", "three values"])
@pytest.mark.parametrize("lost", [0.0, 0.02])
def test_whatever_a_true_register_does_is_accepted(lost: float, values: int | None) -> None:
    draw = random.Random(3)
    for processes in (1, 2, 5, 8):
        for _ in range(10):
            assert linear.is_linearizable(simulate(draw, 150, processes, lost=lost, values=values))


def read_the_past(draw: random.Random, listed: list[Operation]) -> list[Operation]:
    """One read or failed cas is told a value that the register had at some other time, or never."""
    told = [one for one in listed if one.seen is not None]
    victim = draw.choice(told)
    seen = draw.choice([value for value in ("0", "1", "2", "3", "never") if value != victim.seen])
    return [replace(one, seen=seen) if one is victim else one for one in listed]


def forget_a_write(draw: random.Random, listed: list[Operation]) -> list[Operation]:
    victim = draw.choice([one for one in listed if one.kind is Kind.WRITE])
    return [one for one in listed if one is not victim]


def answer_a_failed_cas_ok(draw: random.Random, listed: list[Operation]) -> list[Operation]:
    failed = [one for one in listed if one.kind is Kind.CAS and one.seen is not None]
    victim = draw.choice(failed) if failed else None
    return [replace(one, seen=None) if one is victim else one for one in listed]


Mutation = Callable[[random.Random, list[Operation]], list[Operation]]


@pytest.mark.parametrize("mutate", [read_the_past, forget_a_write, answer_a_failed_cas_ok])
def test_a_changed_history_is_judged_as_by_trying_every_order(mutate: Mutation) -> None:
    draw = random.Random(4)
    rejected = 0
    for _ in range(300):
        listed = simulate(draw, 6, 3, lost=0.1, values=4)
        if not any(one.kind is Kind.WRITE for one in listed) or not any(one.seen for one in listed):
            continue
        changed = mutate(draw, listed)
        verdict = by_brute_force(changed)
        assert linear.is_linearizable(changed) is verdict, "\n".join(map(str, changed))
        rejected += not verdict
    assert rejected > 20


def test_a_single_wrong_answer_in_a_long_history_is_found() -> None:
    draw = random.Random(5)
    for _ in range(20):
        listed = simulate(draw, 300, 8, lost=0.01)
        ends = sorted(one.completed_s for one in listed if one.completed_s is not None)
        late = read("5", ends[-1] + 1, ends[-1] + 2)
        assert not linear.is_linearizable([*listed, late])


def test_fifty_thousand_operations_on_many_keys_are_judged() -> None:
    draw = random.Random(6)
    listed = [one for number in range(170) for one in simulate(draw, 300, 8, f"k{number}", lost=0.01)]
    assert len(listed) > 50_000
    assert list(linear.violations(listed)) == []


# -- on disk


def test_a_history_is_the_same_after_it_was_on_disk(tmp_path: Path) -> None:
    listed = simulate(random.Random(7), 200, 5, lost=0.05)
    history.save(tmp_path / "history", listed)
    loaded = history.load(tmp_path / "history")
    assert sorted(loaded.operations.values(), key=_number) == sorted(listed, key=_number)
    assert set(loaded.unknown) == {one.number for one in listed if not one.is_known}


def _number(one: Operation) -> int:
    return one.number


def test_a_history_is_followed_while_it_grows_and_a_line_that_was_cut_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "history"
    history.save(path, simulate(random.Random(8), 50, 3))
    text = path.read_text()
    follower = Follower(tmp_path / "growing")
    assert follower.catch_up().operations == {}
    for size in _cuts(len(text)):
        (tmp_path / "growing").write_text(text[:size])
        follower.catch_up()
    assert follower.history == history.load(path)


def _cuts(length: int) -> Iterable[int]:
    return (*range(7, length, 101), length)


def test_a_wait_lasts_from_the_first_request_without_a_reply_to_the_connections_next_reply(tmp_path: Path) -> None:
    listed = [
        Operation(1, 0, 0, Kind.READ, KEY, 10.0, completed_s=10.1, seen=NOTHING),
        Operation(2, 0, 0, Kind.READ, KEY, 11.0),
        Operation(3, 8, 0, Kind.READ, KEY, 13.0, completed_s=13.5, seen=NOTHING),
        Operation(4, 1, 1, Kind.READ, KEY, 13.2, completed_s=13.3, seen=NOTHING),
        Operation(5, 1, 1, Kind.READ, KEY, 13.4),
    ]
    history.save(tmp_path / "history", listed)
    loaded = history.load(tmp_path / "history")

    def longest_s(start_s: float, end_s: float) -> float:
        longest = loaded.longest_wait(start_s, end_s)
        assert longest is not None
        return longest.seconds

    assert longest_s(0, 13.35) == pytest.approx(2.5)
    assert longest_s(12, 12.5) == pytest.approx(2.5)
    assert longest_s(10.05, 10.5) == pytest.approx(0.1)
    assert loaded.longest_wait(10.2, 10.9) is None
    assert longest_s(13.45, 20) == pytest.approx(6.6)
    assert [one.number for one in loaded.unknown_within(11.5, 12)] == [2]
    assert [one.number for one in loaded.unknown_within(10, 10.5)] == []
