"""Checkpoint statistics for people and benchmarks: one JSON line a second, beside the guest's monitor.

{"at": wall-clock s, "count": checkpoints so far,
 "pause_ms": [...], "pages": [...], "epoch_ms": [...], "state_bytes": [...], "stop_ms": [...], "disk_bytes": [...]}
with one entry a checkpoint of that second. epoch_ms: from one checkpoint's start to the next one's;
stop_ms: from the batch of commands to the guest's stop, in which the guest runs.
"""

import json
import time
from collections.abc import Callable

from nova_ftvm.engine.capture import Checkpoint

PERIOD_S = 1.0
#: The file is started anew at this size, so that it never fills a disk.
_MOST_BYTES = 4 << 20


class EpochLog:
    """Collects; writes at most once a second, never within a pause."""

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = open(path, "w", encoding="ascii")  # noqa: SIM115 - lives as long as the engine
        self._clock = clock
        self._count = 0
        self._last_start: float | None = None
        self._next_write = clock() + PERIOD_S
        self._rows: list[tuple[float, int, float, int, float, int]] = []
        self._epoch_ms = self._stop_ms = 0.0

    def began(self) -> None:
        now = self._clock()
        self._epoch_ms = (now - self._last_start) * 1000 if self._last_start is not None else 0.0
        self._last_start = now

    def stopped(self) -> None:
        assert self._last_start is not None
        self._stop_ms = (self._clock() - self._last_start) * 1000

    def ended(self, checkpoint: Checkpoint) -> None:
        self._count += 1
        self._rows.append((checkpoint.pause_ms, checkpoint.page_count, self._epoch_ms, len(checkpoint.state),
                           self._stop_ms, checkpoint.cut.bytes))
        if self._clock() >= self._next_write:
            self.write()

    def write(self) -> None:
        if not self._rows:
            return
        pause, pages, epoch, state, stop, disk = zip(*self._rows, strict=True)
        if self._file.tell() > _MOST_BYTES:
            self._file.seek(0)
            self._file.truncate()
        self._file.write(json.dumps({
            "at": round(time.time(), 3), "count": self._count, "pause_ms": [round(x, 3) for x in pause],
            "pages": pages, "epoch_ms": [round(x, 3) for x in epoch], "state_bytes": state,
            "stop_ms": [round(x, 3) for x in stop], "disk_bytes": disk}) + "\n")
        self._file.flush()
        self._rows.clear()
        self._next_write = self._clock() + PERIOD_S

    def close(self) -> None:
        self.write()
        self._file.close()
