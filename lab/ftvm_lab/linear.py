"""Is a register's history linearizable? Pure: operations in, a witness out.

A history is linearizable if its operations can be put in one order, each at one moment between its invocation and its
completion, in which every answer is right. An operation whose outcome is unknown may take any moment after its
invocation, or none. Keys are independent of each other, so each is judged alone.

The search is that of Wing and Gong (Testing and Verifying Concurrent Objects, 1993), iterative, with the memory of
visited configurations that Lowe added to it (Testing for Linearizability, 2016). Called by ftvm_lab.torture.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ftvm_lab.history import NOTHING, Kind, Operation, completed


@dataclass(frozen=True, slots=True)
class Violation:
    """A key whose history is impossible, and a small part of it that is impossible already."""

    key: str
    witness: tuple[Operation, ...]

    def __str__(self) -> str:
        return "\n  ".join((f"key {self.key}", *map(str, self.witness)))


@dataclass(frozen=True, slots=True)
class _Effect:
    """What an operation asks of the value before it (None: nothing), and the value after it (None: as before)."""

    needs: str | None
    leaves: str | None

    @property
    def changes(self) -> bool:
        return self.leaves is not None


def violations(operations: Iterable[Operation]) -> Iterator[Violation]:
    """The keys whose histories are not linearizable, in the order of their first operations."""
    keys: defaultdict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        keys[operation.key].append(operation)
    for key, of_key in keys.items():
        if not is_linearizable(of_key):
            yield Violation(key, witness(of_key))


def is_linearizable(operations: Sequence[Operation]) -> bool:
    """Of one key's operations. The register holds NOTHING before the first."""
    for operation in operations:
        if operation.kind is Kind.CAS and operation.seen is not None and operation.seen == operation.expected:
            return False
    steps = [(operation, _effect(operation)) for operation in operations]
    return _Search(_relevant(steps)).succeeds()


def _effect(operation: Operation) -> _Effect:
    if operation.kind is Kind.WRITE:
        return _Effect(None, operation.value)
    if operation.kind is Kind.CAS and operation.seen is None:
        return _Effect(operation.expected, operation.value)
    return _Effect(operation.seen, None)


_Step = tuple[Operation, _Effect]


def _relevant(steps: Sequence[_Step]) -> list[_Step]:
    """Without the unknown operations that cannot matter: what changes nothing, or leaves what nobody needs.

    Such an operation may be left out of any order that has it: only one that sees its value could tell.
    """
    kept = list(steps)
    while True:
        needed = Counter(effect.needs for _, effect in kept)
        fewer = [
            (operation, effect)
            for operation, effect in kept
            if operation.is_known or (effect.changes and _others_need(needed, effect))
        ]
        if len(fewer) == len(kept):
            return kept
        kept = fewer


def _others_need(needed: Counter[str | None], effect: _Effect) -> bool:
    return needed[effect.leaves] > (effect.needs == effect.leaves)


class _Search:
    """A list of invocations and completions in the order of time, out of which operations are taken and put back.

    Entry 2n is the invocation of operation n, 2n + 1 its completion; unknown operations have none. Whatever is
    invoked before the list's first completion may be the next in the order.
    """

    def __init__(self, steps: Sequence[_Step]) -> None:
        self._effects = [effect for _, effect in steps]
        self._is_known = [operation.is_known for operation, _ in steps]
        moments = [(operation.invoked_s, 0, 2 * n) for n, (operation, _) in enumerate(steps)]
        moments += [(one.completed_s, 1, 2 * n + 1) for n, (one, _) in enumerate(steps) if one.completed_s is not None]
        # At one time, invocations come first: then nothing is taken for earlier that may not have been.
        order = [entry for _, _, entry in sorted(moments)]
        self._head = len(steps) * 2
        self._next = [self._head] * (self._head + 1)
        self._previous = [self._head] * (self._head + 1)
        for before, after in zip([self._head, *order], [*order, self._head], strict=True):
            self._next[before] = after
            self._previous[after] = before

    def succeeds(self) -> bool:
        """Depth first over the choices of the next operation; each configuration is entered once."""
        state = NOTHING
        done = 0
        waiting = sum(self._is_known)
        taken: list[tuple[int, str, int, bool]] = []
        visited: set[tuple[int, str]] = set()
        entry = self._next[self._head]
        while waiting:
            if entry != self._head and entry % 2 == 0:
                number = entry // 2
                effect = self._effects[number]
                if effect.needs is None or effect.needs == state:
                    after = state if effect.leaves is None else effect.leaves
                    configuration = (done | 1 << number, after)
                    if configuration not in visited:
                        visited.add(configuration)
                        taken.append((number, state, done, effect.changes))
                        done, state = configuration
                        waiting -= self._is_known[number]
                        self._take(number)
                        entry = self._next[self._head]
                        continue
                entry = self._next[entry]
                continue
            # A completion of what was not taken yet, or the end: one of the choices before was wrong.
            while True:
                if not taken:
                    return False
                number, state, done, has_alternatives = taken.pop()
                waiting += self._is_known[number]
                self._put_back(number)
                # What only looks at the value, and can be next, never hurts there: not taking it helps nobody.
                if has_alternatives:
                    break
            entry = self._next[2 * number]
        return True

    def _take(self, number: int) -> None:
        self._unlink(2 * number)
        if self._is_known[number]:
            self._unlink(2 * number + 1)

    def _put_back(self, number: int) -> None:
        if self._is_known[number]:
            self._link(2 * number + 1)
        self._link(2 * number)

    def _unlink(self, entry: int) -> None:
        before, after = self._previous[entry], self._next[entry]
        self._next[before], self._previous[after] = after, before

    def _link(self, entry: int) -> None:
        self._next[self._previous[entry]] = self._previous[self._next[entry]] = entry


def witness(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """A part of a history that is not linearizable, which is not so either, and out of which nothing can be left."""
    kept = _shortest_beginning(operations)
    is_shorter = True
    while is_shorter:
        is_shorter = False
        for operation in reversed(kept):
            rest = [one for one in kept if one is not operation]
            if _may_be_left_out(operation, rest) and not is_linearizable(rest):
                kept, is_shorter = rest, True
    return tuple(kept)


def _shortest_beginning(operations: Sequence[Operation]) -> list[Operation]:
    """Until the first completion that makes it impossible; what was under way then counts as unknown."""
    ends = sorted(operation.completed_s for operation in operations if operation.completed_s is not None)
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        if is_linearizable(_until(operations, ends[middle])):
            low = middle + 1
        else:
            high = middle
    return _until(operations, ends[low])


def _until(operations: Sequence[Operation], end_s: float) -> list[Operation]:
    return [
        operation
        if operation.completed_s is not None and operation.completed_s <= end_s
        else completed(operation, None, None)
        for operation in sorted(operations, key=lambda one: one.invoked_s)
        if operation.invoked_s <= end_s
    ]


def _may_be_left_out(operation: Operation, rest: Sequence[Operation]) -> bool:
    """Whether a linearizable history would be so without it too: nobody in the rest needs what it leaves.

    A write that somebody read may not: without it, any history would look wrong.
    """
    effect = _effect(operation)
    return not effect.changes or all(_effect(one).needs != effect.leaves for one in rest)
