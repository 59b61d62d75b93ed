"""What protection costs while nothing happens: idle guests on one host, one of them and eight.

    python -m tests.host.bench_idle [--seconds N] [--output FILE]

Processor time is a share of one core, of a process with all its threads. Memory is what a process has for itself
alone. Each figure is the mean over the guests, each guest and its standby in a network of their own.
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ftvm_lab.bench_probes import cpu_s

from nova_ftvm.conf import engine as engine_conf
from tests.host import machine
from tests.host.bench_disk import place
from tests.host.protection import Protection, protected

#: As an installation has it.
SETTINGS = {option.name: option.default for option in engine_conf.OPTS}
COUNTS = (1, 8)
SETTLE_S = 3.0


def processor_s(pid: int) -> float:
    return cpu_s(Path(f"/proc/{pid}/stat").read_text())


def own_mib(pid: int) -> float:
    """What would be free without this process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"Private_\w+:\s+(\d+) kB", text)) / 1024


def shares(pids: Mapping[str, Sequence[int]], seconds: float) -> dict[str, float]:
    """Of one core, by the name of the part."""
    start = {pid: processor_s(pid) for group in pids.values() for pid in group}
    began = time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    return {name: round(statistics.mean((processor_s(pid) - start[pid]) / took for pid in group), 4)
            for name, group in pids.items()}


def measure(count: int, seconds: float) -> dict[str, Any]:
    with ExitStack() as stack:
        launches = [stack.enter_context(place())[0] for _ in range(count)]
        guests = [launch("p") for launch in launches]
        for guest in guests:
            guest.await_boot()
        time.sleep(SETTLE_S)
        alone = shares({"guest": [guest.pid for guest in guests]}, seconds)
        pairs: list[Protection] = [stack.enter_context(protected(guest, launch("b", standby=True), **SETTINGS))
                                   for guest, launch in zip(guests, launches, strict=True)]
        time.sleep(SETTLE_S)
        engines = {"primary_engine": [pair.primary.process.pid for pair in pairs],
                   "backup_engine": [pair.backup.process.pid for pair in pairs]}
        found = shares({"guest": [guest.pid for guest in guests], **engines,
                        "backup_guest": [pair.standby_qemu.pid for pair in pairs]}, seconds)
        lost = [pair for pair in pairs if pair.primary.heard("ask_degrade")]
        return {"guests": count, "unprotected_guest": alone["guest"], **found, "lost": len(lost),
                **{f"{name}_mib": round(statistics.mean(map(own_mib, group)), 1) for name, group in engines.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=machine.ROOT / "build" / "bench-idle.json")
    options = parser.parse_args()
    points = [measure(count, options.seconds) for count in COUNTS]
    result = {"points": points, "processors": os.cpu_count(), "kernel": platform.release()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(table(points)))


def table(points: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{name:20}" + "".join(f"{point[name]:>12}" for point in points) for name in points[0]]


if __name__ == "__main__":
    main()
