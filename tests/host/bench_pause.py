"""What a checkpoint's pause is made of: bare QEMU guests, one for each number of pages that are written all the time.

    python -m tests.host.bench_pause [--seconds N] [--output FILE]

The floor is what QEMU needs by itself: `xen-save-devices-state` to a file, with nobody looking at the guest's memory.
The rest is ours. A page is compared with the copy of a page between two arrays, as scattered as the guest's are. All in
one run; medians.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nova_ftvm.conf import engine as engine_conf
from nova_ftvm.engine.stats import Stage
from nova_ftvm.host import qmp
from nova_ftvm.types import PAGE
from tests.host import machine
from tests.host.bench_disk import place
from tests.host.machine import Qemu
from tests.host.protection import protected

#: As an installation has it, but with checkpoints that come by themselves.
SETTINGS = {**{option.name: option.default for option in engine_conf.OPTS}, "policy": "fixed", "epoch_ms": 20.0}
#: Pages that the guest writes beside its own few.
WRITTEN = (1, 100, 400, 1600)
#: MiB of RAM of two guests, most of it in use, that write a hundred pages.
SIZES = (256, 8192)
_IN_USE = 0.9
#: What the kernel and its ramdisk take at least.
_KERNELS_MIB = 128
SAVES = 100
SETTLE_S = 2.0
#: For the first copy of the largest guest.
_COPY_S = 300.0
_COPIED_PAGES = 1 << 14


def floor_ms(guest: Qemu, path: Path) -> float:
    """QEMU's own pause, by its own clock."""
    pauses = []
    with guest.monitor() as monitor:
        monitor.receive()
        for _ in range(SAVES):
            monitor.command("xen-save-devices-state", filename=str(path), live=False)
            at = {message["event"]: _us(message["timestamp"]) for message in _events(monitor)}
            pauses.append((at["RESUME"] - at["STOP"]) / 1000)
            time.sleep(0.02)
    return statistics.median(pauses)


def _events(monitor: qmp.Monitor) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    machine.wait_for("QEMU has stopped and gone on", lambda: (found.extend(
        message for message in monitor.receive() if message.get("event") in ("STOP", "RESUME")), len(found) == 2)[1])
    return found


def _us(stamp: dict[str, int]) -> int:
    return stamp["seconds"] * 1_000_000 + stamp["microseconds"]


def copy_us() -> float:
    """A page from one place to another, neither in a cache."""
    source = np.ones((_COPIED_PAGES, PAGE), np.uint8)
    order = np.random.default_rng(1).permutation(_COPIED_PAGES)[:1000]
    target = np.empty((1000, PAGE), np.uint8)
    rounds = []
    for _ in range(20):
        source += 1
        start = time.perf_counter()
        np.take(source, order, axis=0, out=target, mode="clip")
        rounds.append((time.perf_counter() - start) / len(order) * 1e6)
    return statistics.median(rounds)


def measure(launch: Callable[..., Qemu], folder: Path, written: int, seconds: float) -> dict[str, float]:
    """Medians of one guest's checkpoints, and its floor."""
    guest = launch("p", work=f"writer:{written}")
    guest.await_boot()
    time.sleep(SETTLE_S)
    found = {"floor_ms": floor_ms(guest, folder / "devices")}
    with protected(guest, launch("b", standby=True), **SETTINGS) as pair:
        time.sleep(SETTLE_S + seconds)
        pair.primary.order("stop", reason="measured")
        pair.primary.hear("ended")
        rows = [json.loads(line) for line in (guest.folder / "epochs.jsonl").read_text().splitlines()]
    guest.kill()
    for name in ("pause_ms", "pages", "wire_bytes", "state_bytes", *(f"{stage}_ms" for stage in Stage)):
        # The first second is that of the first copy.
        found[name] = statistics.median(value for row in rows[1:] for value in row[name])
    return {name: round(value, 3) for name, value in found.items()}


def measure_size(launch: Callable[..., Qemu], mib: int, seconds: float) -> dict[str, float]:
    """Medians of a guest's checkpoints that has so much RAM."""
    guest = launch("p", work=f"writer:100,filler:{int(_IN_USE * (mib - _KERNELS_MIB))}", memory_mib=mib)
    guest.await_log("filled")
    standby = launch("b", memory_mib=mib, standby=True)
    with protected(guest, standby, **SETTINGS, until="") as pair:
        pair.primary.hear("protected", _COPY_S)
        time.sleep(SETTLE_S + seconds)
        pair.primary.order("stop", reason="measured")
        pair.primary.hear("ended")
        (*_, row) = (json.loads(line) for line in (guest.folder / "epochs.jsonl").read_text().splitlines())
    guest.kill()
    shown = ("pages", "pause_ms", "capture_ms")
    return {"mib": mib, **{name: round(statistics.median(row[name]), 3) for name in shown}}


def has_room() -> bool:
    """For the largest guest and its standby."""
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(available.split()[1]) >> 10 > 2.2 * max(SIZES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--output", type=Path, default=machine.ROOT / "build" / "bench-pause.json")
    options = parser.parse_args()
    with place() as (launch, folder, _):
        points = [measure(launch, folder, written, options.seconds) for written in WRITTEN]
        sizes = [measure_size(launch, mib, options.seconds) for mib in SIZES] if has_room() else []
    pages, pauses = ([point[name] for point in points] for name in ("pages", "pause_ms"))
    per_page_ms, at_none_ms = np.polyfit(pages, pauses, 1)
    floor, copied_us = statistics.median(point["floor_ms"] for point in points), copy_us()
    at_100_ms = at_none_ms + 100 * per_page_ms
    result = {
        "pause": {"floor_ms": round(floor, 3), "at_100_pages_ms": round(at_100_ms, 3),
                  "per_page_us": round(1000 * per_page_ms, 3), "memcpy_page_us": round(copied_us, 3),
                  "over_floor": round(at_100_ms / floor, 3), "over_memcpy": round(1000 * per_page_ms / copied_us, 3)},
        "points": points, "sizes": sizes, "processors": os.cpu_count(), "kernel": platform.release()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    names = ["pages", "pause_ms", "floor_ms", *(f"{stage}_ms" for stage in Stage), "wire_bytes"]
    lines = ["".join(f"{name:>12}" for name in names)]
    lines += ["".join(f"{point[name]:>12.2f}" for name in names) for point in result["points"]]
    pause = result["pause"]
    lines.append(f"at 100 pages {pause['at_100_pages_ms']:.2f} ms, {pause['over_floor']:.2f} of the floor; "
                 f"each further page {pause['per_page_us']:.2f} us, {pause['over_memcpy']:.1f} of its copy")
    lines += [f"{size['mib']:>6} MiB of RAM in use: pause {size['pause_ms']:.2f} ms, of which the pages "
              f"{size['capture_ms']:.2f} ms" for size in result["sizes"]] or ["too little memory for the large guest"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
