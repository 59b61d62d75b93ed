"""What the clients know of their rows, and what the database must hold for it: pure.

A transaction inserts rows with consecutive ids, which no other transaction has. It is confirmed when the server
said so, and in doubt when the connection ended before: then either all of its rows are there or none.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Transaction(NamedTuple):
    """The rows `first` to `first + size - 1`."""

    first: int
    size: int

    @property
    def ids(self) -> range:
        return range(self.first, self.first + self.size)


@dataclass(slots=True)
class Ledger:
    """All transactions that were sent to one database, each in one of the two lists."""

    confirmed: list[Transaction] = field(default_factory=list)
    in_doubt: list[Transaction] = field(default_factory=list)

    @property
    def next_id(self) -> int:
        """An id that no transaction had, and no later one will have without being asked for."""
        return max((sent.first + sent.size for sent in (*self.confirmed, *self.in_doubt)), default=1)

    def add(self, other: "Ledger") -> None:
        self.confirmed += other.confirmed
        self.in_doubt += other.in_doubt


@dataclass(frozen=True, slots=True)
class Judgement:
    """The database against the ledger. Ids, except for `confirmed`, which counts rows."""

    confirmed: int
    #: Confirmed, and not there.
    lost: list[int]
    #: There more than once.
    twice: list[int]
    #: There, and never sent.
    unknown: list[int]
    #: Of transactions in doubt that are there in part.
    torn: list[int]

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.twice or self.unknown or self.torn)


def judge(ledger: Ledger, found: Iterable[int]) -> Judgement:
    """`found`: the id of every row in the table."""
    counts = Counter(found)
    confirmed = {number for sent in ledger.confirmed for number in sent.ids}
    in_doubt = {number for sent in ledger.in_doubt for number in sent.ids}
    return Judgement(
        confirmed=len(confirmed),
        lost=sorted(confirmed - counts.keys()),
        twice=sorted(number for number, count in counts.items() if count > 1),
        unknown=sorted(counts.keys() - confirmed - in_doubt),
        torn=sorted(number for sent in ledger.in_doubt if _is_torn(sent, counts) for number in sent.ids),
    )


def _is_torn(sent: Transaction, counts: Counter[int]) -> bool:
    present = sum(number in counts for number in sent.ids)
    return 0 < present < sent.size
