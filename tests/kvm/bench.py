"""What dirty tracking costs a guest that runs natively under KVM, and what its clocks do.

    python -m tests.kvm.bench [--seconds N] [--output FILE]

One guest for each working set, which it reads over and over. In turns within one run: stopped, saved and started again
with nobody looking at its memory; protected, while it writes pages in each epoch; and stopped and started again. The
guest's speed is of its processor's time, and the ratio is over the mean of both turns beside it: what else runs on the
machine changes it little. Pages are random ones, which nobody can learn, or the same ones in every epoch. `whole` is
one scan that finds and protects, as for a guest under TCG.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from nova_ftvm.core import dirty
from nova_ftvm.host.memory import RangedMemory, TrackedMemory
from tests.host.machine import ROOT, Qemu
from tests.kvm import clocks, machine, native
from tests.kvm.checkpoints import Checkpoints, Taken
from tests.kvm.native import Native, Processor

SIZES_MIB = (16, 256, 1024)
PAGES = (20, 100, 1000)
EPOCH_S = 0.005
#: Huge pages are taken apart at the first write to each, and mapped anew page by page: a turn begins when a round of
#: this length has no more than these faults for a page that was written, or after the longest time.
ROUND_S, STEADY_FAULTS, LONGEST_WARM_S = 0.5, 2.2, 30.0


class Timed(TrackedMemory):
    """Sums up what a checkpoint's looks, protections and copies take, s."""

    scan_s = copy_s = 0.0

    def begin_capture(self) -> None:
        super().begin_capture()
        self.scan_s = self.copy_s = 0.0

    def _copy(self, block: int, runs: np.ndarray) -> dirty.Pages:
        with self._timed("copy_s"):
            return super()._copy(block, runs)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        setattr(self, what, getattr(self, what) + time.perf_counter() - began)


class TimedRanged(Timed, RangedMemory):
    """The way of a guest under KVM."""

    def _look(self, spots: list[Any]) -> list[tuple[int, np.ndarray]]:
        with self._timed("scan_s"):
            return super()._look(spots)

    def _protect(self, block: int, runs: np.ndarray) -> None:
        with self._timed("scan_s"):
            super()._protect(block, runs)


class TimedWhole(Timed):
    """The way of one under TCG."""

    def take_written(self) -> list[tuple[int, np.ndarray]]:
        with self._timed("scan_s"):
            return super().take_written()


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """What the guest did meanwhile. speed: million pages read a second of its processor's time."""

    speed: float
    faults: int
    written: int
    taken: list[Taken]
    scans_ms: list[float]
    copies_ms: list[float]
    #: Were its faults those of the written pages alone?
    is_steady: bool

    @property
    def pause_ms(self) -> float:
        return statistics.median(taken.pause_ms for taken in self.taken)


class Subject:
    """One guest, and turns of it."""

    def __init__(self, launch: Callable[..., Qemu], mib: int, seconds: float) -> None:
        self._mib = mib
        self._seconds = seconds
        self._qemu = launch(f"p{mib}", native.rom(mib), memory_mib=native.memory_mib(mib),
                            machine_type=clocks.machine_type(), cpu=clocks.cpu())
        self._guest = Native(self._qemu)
        self._guest.await_start()
        self._processor = Processor(self._qemu)

    def turn(self, memory: type[TrackedMemory] | None, pages: int, *, repeated: bool = False) -> Turn:
        def ask() -> None:
            if taken := checkpoints.memory:
                scans.append(taken.scan_s * 1000)
                copies.append(taken.copy_s * 1000)
            self._guest.ask_for(pages, repeated=repeated)

        scans: list[float] = []
        copies: list[float] = []
        with contextlib.closing(Checkpoints(self._qemu, memory)) as checkpoints:
            is_steady = self._warm_up(lambda: checkpoints.run(ROUND_S, EPOCH_S, ask))
            scans.clear(), copies.clear()
            passes, faults, seconds, written = self._now()
            taken = checkpoints.run(self._seconds, EPOCH_S, ask)
            now = self._now()
        assert self._guest.differed() == 0, "the guest's memory is spoilt"
        read = (now[0] - passes) * self._mib * 256
        return Turn(read / 1e6 / (now[2] - seconds), now[1] - faults, now[3] - written, taken, scans, copies, is_steady)

    def end(self) -> None:
        self._qemu.kill()

    def _warm_up(self, run: Callable[[], object]) -> bool:
        """False: it did not come to that."""
        deadline = time.monotonic() + LONGEST_WARM_S
        while time.monotonic() < deadline:
            _, faults, _, written = self._now()
            run()
            _, later, _, wrote = self._now()
            if later - faults <= STEADY_FAULTS * max(100, wrote - written):
                return True
        return False

    def _now(self) -> tuple[int, int, float, int]:
        return (self._guest.passes(), self._processor.faults(), self._processor.seconds(), self._guest.written())


def point(subject: Subject, mib: int, pages: int, how: str) -> dict[str, Any]:
    before = subject.turn(None, pages)
    memory = TimedWhole if how == "whole" else TimedRanged
    between = subject.turn(memory, pages, repeated=how == "repeated")
    after = subject.turn(None, pages)
    stop_ms = (before.pause_ms + after.pause_ms) / 2
    copy_ms, scan_ms = statistics.median(between.copies_ms), statistics.median(between.scans_ms)
    found = {
        "mib": mib, "pages": pages, "how": how,
        "guest_ratio": between.speed / ((before.speed + after.speed) / 2), "drift": after.speed / before.speed,
        "faults_per_page": between.faults / max(1, between.written), "pause_ms_p50": between.pause_ms,
        "stop_ms_p50": stop_ms, "scan_ms_p50": scan_ms, "copy_ms_p50": copy_ms,
        "added_ms": between.pause_ms - stop_ms - copy_ms,
        "pages_p50": statistics.median(taken.pages for taken in between.taken), "checkpoints": len(between.taken),
        "steady": between.is_steady}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}


def measure(seconds: float) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="ftvm-kvm-") as folder, ExitStack() as stack:
        launch = machine.launcher(stack, Path(folder))
        for mib in SIZES_MIB:
            subject = Subject(launch, mib, seconds)
            for pages in PAGES:
                for how in ("random", "repeated", *(("whole",) if pages == 100 else ())):
                    yield point(subject, mib, pages, how)
            subject.end()


def goals(points: list[dict[str, Any]], shares: dict[str, float]) -> list[dict[str, Any]]:
    """Each goal with what was measured, for pages of which nothing can be learned and for those that repeat."""
    by_place = {(point["mib"], point["pages"], point["how"]): point for point in points}

    def value(mib: int, pages: int, how: str, name: str) -> float:
        return float(by_place[mib, pages, how][name])

    found = []
    for how in ("random", "repeated"):
        wanted = [(f"guest_ratio, {mib} MiB", value(mib, 100, how, "guest_ratio"), ">=", goal)
                  for mib, goal in zip(SIZES_MIB, (0.85, 0.75, 0.75), strict=True)]
        wanted += [(f"faults a page, {mib} MiB", value(mib, 100, how, "faults_per_page"), "<=", 1.3)
                   for mib in SIZES_MIB]
        wanted += [("added to the pause at 100 pages, 256 MiB, ms", value(256, 100, how, "added_ms"), "<=", 0.3),
                   ("added to the pause at 1,000 pages, 256 MiB, ms", value(256, 1000, how, "added_ms"), "<=", 0.6)]
        found += [{"goal": f"{what} ({how} pages)", "value": value, "wanted": f"{sign} {bound}",
                   "met": value >= bound if sign == ">=" else value <= bound} for what, value, sign, bound in wanted]
    for name, bound in (("tsc", 0.999), ("pit", 0.8)):
        found.append({"goal": f"clock {name}", "value": shares[name], "wanted": f">= {bound}",
                      "met": shares[name] >= bound})
    return found


def table(result: dict[str, Any]) -> str:
    names = ("mib", "pages", "how", "guest_ratio", "drift", "faults_per_page", "pause_ms_p50", "stop_ms_p50",
             "scan_ms_p50", "copy_ms_p50", "added_ms")
    lines = ["".join(f"{name:>16}" for name in names)]
    lines += ["".join(f"{point[name]:>16}" for name in names) for point in result["points"]]
    lines += ["", "clocks: " + ", ".join(f"{name} {share:.4f}" for name, share in result["clocks"].items()), ""]
    lines += [f"{'met    ' if goal['met'] else 'NOT met'}  {goal['goal']}: {goal['value']} ({goal['wanted']})"
              for goal in result["goals"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench-kvm.json")
    options = parser.parse_args()
    if reason := machine.lacking():
        raise SystemExit(f"KVM cannot be measured here: {reason}")
    points = list(measure(options.seconds))
    shares = {name: round(share, 5) for name, share in clocks.measure(10.0).items()}
    result = {"points": points, "clocks": shares, "goals": goals(points, shares), "processors": os.cpu_count(),
              "kernel": platform.release()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
