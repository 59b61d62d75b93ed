"""Checkpoint statistics for people and benchmarks: one JSON line a second, beside the guest's monitor.

{"at": wall-clock s, "count": checkpoints so far, "paused_percent": the pauses' share of the time since the last line,
 "pause_ms": [...], "excess_ms": [...], "pages": [...], "epoch_ms": [...], "state_bytes": [...], "disk_bytes": [...],
 "wire_bytes": [...],
 "stop_ms": [...], "rest_ms": [...], "capture_ms": [...], "resume_ms": [...], "ship_ms": [...], "ack_ms": [...]}

with one entry a committed checkpoint. epoch_ms: from one checkpoint's start to the next one's. pause_ms: from
QEMU's STOP to its RESUME, by its own clock. excess_ms: what the guest's virtual clock lost beyond that
(core/virtualclock.py); paused_percent has it too, unless the guest's clock goes on in pauses. The last six follow one
another, see Stage.

As often it tells the figures that go to the agent, and warns if a guest loses time that its clock does not get back.
"""

import enum
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from nova_ftvm.core.losttime import Figures, GuestClock, LostTime
from nova_ftvm.engine.capture import Checkpoint

LOG = logging.getLogger(__name__)

PERIOD_S = 1.0
#: The file is started anew at this size, so that it never fills a disk.
_MOST_BYTES = 4 << 20


class Stage(enum.StrEnum):
    """What ends at a mark; each begins where the one before it ended, the first with the command to save."""

    #: The guest's processors stand.
    STOP = "stop"
    #: Its disks have come to rest.
    REST = "rest"
    #: Its pages are copied.
    CAPTURE = "capture"
    #: The device state is read, and the guest runs.
    RESUME = "resume"
    #: The epoch is handed to the kernel, for the link.
    SHIP = "ship"
    #: The backup has all of it.
    ACK = "ack"


class EpochLog:
    """Collects; writes at most once a second, never within a pause."""

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic,
                 guest_clock: GuestClock = GuestClock.UNKNOWN,
                 tell: Callable[[Figures], None] = lambda figures: None) -> None:
        """tell: takes the figures, once a second while there are checkpoints."""
        self._guest_clock = self._guest_clock_alone = guest_clock
        self._tell = tell
        self._lost = LostTime()
        self._file = open(path, "w", encoding="ascii")  # noqa: SIM115 - lives as long as the engine
        self._clock = clock
        self._count = 0
        self._began: float | None = None
        self._began_us = 0
        self._last = clock()
        self._next_write = clock() + PERIOD_S
        #: When the last line was written, and what was lost by then.
        self._wrote, self._wrote_paused_s = clock(), 0.0
        self._row: dict[str, float] = {}
        self._rows: list[dict[str, float]] = []

    def on_kvmclock(self, goes_on: bool) -> None:
        """Is it set forward in pauses? Then whichever clock the guest takes goes on."""
        self._guest_clock = GuestClock.GOES_ON if goes_on else self._guest_clock_alone

    def began(self) -> None:
        now = self._clock()
        self._began_us = time.time_ns() // 1000
        self._row = {"epoch_ms": _ms(now - self._began) if self._began is not None else 0.0}
        self._began = self._last = now

    def mark(self, stage: Stage) -> None:
        now = self._clock()
        self._row[f"{stage}_ms"] = _ms(now - self._last)
        self._last = now

    def shipped(self, checkpoint: Checkpoint, wire_bytes: int) -> None:
        """wire_bytes: what RAM and devices took on the link."""
        self.mark(Stage.SHIP)
        excess_s = 0.0 if self._guest_clock is GuestClock.GOES_ON else checkpoint.excess_s
        self._lost.on_pause(self._last, max(0.0, checkpoint.pause_ms / 1000) + excess_s)
        # When it stopped only QEMU knows; by the wall clock.
        at_rest = self._row[f"{Stage.REST}_ms"]
        stop = min(max(0.0, (checkpoint.stopped_us - self._began_us) / 1000), at_rest)
        self._row |= {f"{Stage.STOP}_ms": round(stop, 3), f"{Stage.REST}_ms": round(at_rest - stop, 3)}
        self._row |= {"pause_ms": round(checkpoint.pause_ms, 3), "excess_ms": _ms(checkpoint.excess_s),
                      "pages": checkpoint.page_count,
                      "state_bytes": len(checkpoint.state), "disk_bytes": checkpoint.cut.bytes,
                      "wire_bytes": wire_bytes}

    def committed(self) -> None:
        self.mark(Stage.ACK)
        self._count += 1
        self._rows.append(self._row)
        if self._last >= self._next_write:
            self.write()

    def write(self) -> None:
        if not self._rows:
            return
        if self._file.tell() > _MOST_BYTES:
            self._file.seek(0)
            self._file.truncate()
        columns: dict[str, Any] = {name: [row.get(name, 0.0) for row in self._rows] for name in self._rows[-1]}
        now = self._clock()
        self._file.write(json.dumps({"at": round(time.time(), 3), "count": self._count,
                                     "paused_percent": self._percent_since_last(now), **columns}) + "\n")
        self._file.flush()
        self._rows.clear()
        self._next_write = now + PERIOD_S
        self._tell_figures(now)

    def _percent_since_last(self, now: float) -> float:
        paused_s, passed_s = self._lost.paused_s - self._wrote_paused_s, now - self._wrote
        self._wrote, self._wrote_paused_s = now, self._lost.paused_s
        return round(100 * min(1.0, paused_s / passed_s), 2) if passed_s > 0 else 0.0

    def _tell_figures(self, now: float) -> None:
        share = self._lost.share(now)
        self._tell(Figures(self._count, round(self._lost.paused_s, 3), round(100 * share, 2), self._guest_clock.value))
        if self._guest_clock is GuestClock.STANDS and self._lost.is_news(now, share):
            LOG.warning("the guest's clock stood for %.1f %% of the last minute, in checkpoints: if no "
                        "NTP client in it keeps up (most follow 10 %% or less), lower [engine] max_pause_percent; "
                        "under KVM give it a processor with invtsc, whose clock goes on", 100 * share)

    def close(self) -> None:
        self.write()
        self._file.close()


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
