"""Whose turn it is to synchronise, decided from the rows alone, so that all managers decide the same. PURE.

A host, counted with the pairs that it is the primary's side of and those that it is the backup's side of, runs
[manager]sync_limit_per_host first copies at a time. A pair may begin when, on each of its two hosts, fewer than so
many pairs that are SYNCING have been so for longer, whether they copy or wait. So the oldest one never waits for a
younger one, nobody is overtaken for ever, and the first in line waits for copies only, which end or are given up.

Pairs do not get older than others later on, so the limit holds, but for managers whose clocks differ: a row that is
written with an earlier time than one that has begun already exceeds it by one.
"""

from collections import Counter
from collections.abc import Iterable

from nova_ftvm.db.records import Pair
from nova_ftvm.types import PairState


def sides(pair: Pair) -> tuple[str, ...]:
    return (pair.primary_host,) if pair.backup_host is None else (pair.primary_host, pair.backup_host)


def ahead(pair: Pair, pairs: Iterable[Pair], limit: int) -> int:
    """How many pairs are before this one on the host that keeps it waiting; 0: it may begin."""
    older = [other for other in pairs if other.state is PairState.SYNCING and other.id != pair.id
             and (other.moved_at, other.id) < (pair.moved_at, pair.id)]
    counts = [sum(host in sides(other) for other in older) for host in sides(pair)]
    return max((count for count in counts if count >= limit), default=0)


def load(pairs: Iterable[Pair]) -> Counter[str]:
    """How many pairs are being made on each host."""
    return Counter(host for pair in pairs if pair.state in (PairState.PENDING, PairState.SYNCING)
                   for host in sides(pair))
