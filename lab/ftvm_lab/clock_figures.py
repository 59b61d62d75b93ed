"""What samples of a guest's clocks say: how far it is off, whether it was set, and how fast it counts. Pure.

An answer waits for a checkpoint before it leaves the guest, a question does not wait. So the guest read its clocks
shortly after the question was sent: `offset` takes it for the same moment, and is too high by the way there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ftvm_lab.figures import quantile

#: Of the samples within this time, s, the one with the shortest way counts.
WINDOW_S = 1.0
#: Less is not told from the time between two looks at clocks.
STEP_NS = 1_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """All in ns. sent and sent_mono: this machine's clocks before the question; took: until the answer was here."""

    sent: int
    sent_mono: int
    took: int
    real: int
    mono: int
    raw: int
    spread: int

    @property
    def offset(self) -> int:
        """The guest's clock less this machine's."""
        return self.real - self.sent

    @property
    def set_by(self) -> int:
        """Changes only when the guest's clock is set: slewing changes both alike."""
        return self.real - self.mono


@dataclass(frozen=True, slots=True)
class Keeping:
    """A guest's clock over some time. Offsets and steps in ms; rates as shares of real time."""

    samples: int
    seconds: float
    offset_ms_p50: float
    #: Of the offsets without their signs.
    off_ms_p50: float
    off_ms_p95: float
    off_ms_max: float
    #: Each time that the clock was set, by how much.
    steps_ms: list[float]
    #: How often an answer told an earlier time than the one before it.
    backwards: int
    #: What CLOCK_REALTIME counted, and what it would have without an NTP client.
    rate: float
    raw_rate: float
    answer_ms_p50: float
    answer_ms_max: float


def keeping(samples: Sequence[Sample]) -> Keeping:
    """Of two samples at least."""
    offsets = [offset_ms for _, offset_ms in offsets_ms(samples)]
    sizes = [abs(offset) for offset in offsets]
    first, last = samples[0], samples[-1]
    passed = last.sent_mono - first.sent_mono
    return Keeping(
        samples=len(samples),
        seconds=round(passed / 1e9, 1),
        offset_ms_p50=quantile(offsets, 0.5),
        off_ms_p50=quantile(sizes, 0.5),
        off_ms_p95=quantile(sizes, 0.95),
        off_ms_max=max(sizes),
        steps_ms=list(steps_ms(samples)),
        backwards=sum(after.real < before.real for before, after in pairwise(samples)),
        rate=round((last.real - first.real) / passed, 5),
        raw_rate=round((last.raw - first.raw) / passed, 5),
        answer_ms_p50=_ms(quantile([sample.took for sample in samples], 0.5)),
        answer_ms_max=_ms(max(sample.took for sample in samples)),
    )


def offsets_ms(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """(seconds since the first sample, offset): one a window, the lowest, which is that of the shortest way."""
    lowest: dict[int, Sample] = {}
    for sample in samples:
        window = int((sample.sent_mono - samples[0].sent_mono) / 1e9 / WINDOW_S)
        if window not in lowest or sample.offset < lowest[window].offset:
            lowest[window] = sample
    return [(round((one.sent_mono - samples[0].sent_mono) / 1e9, 1), _ms(one.offset)) for one in lowest.values()]


def steps_ms(samples: Sequence[Sample]) -> Iterator[float]:
    for before, after in pairwise(samples):
        step = after.set_by - before.set_by
        if abs(step) > STEP_NS + before.spread + after.spread:
            yield _ms(step)


def back_after_s(samples: Sequence[Sample], bound_ms: float) -> float | None:
    """Seconds from the first sample until the clock is within the bound; None if it never is."""
    return next((at_s for at_s, offset_ms in offsets_ms(samples) if abs(offset_ms) <= bound_ms), None)


def settled_after_s(samples: Sequence[Sample], bound_ms: float) -> float | None:
    """The same, and it stays."""
    offsets = offsets_ms(samples)
    beyond = [place for place, (_, offset_ms) in enumerate(offsets) if abs(offset_ms) > bound_ms]
    first = beyond[-1] + 1 if beyond else 0
    return offsets[first][0] if first < len(offsets) else None


def _ms(ns: float) -> float:
    return round(ns / 1e6, 3)
