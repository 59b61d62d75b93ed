"""Figures behind decision records (doc/source/contributor/decisions). Prints medians of one run; asserts nothing.

    python -m tests.host.measure
"""

import asyncio
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from qemu.qmp import QMPClient

from nova_ftvm.host import procmem, qmp
from nova_ftvm.host.watchdog import Watchdog
from nova_ftvm.types import PAGE
from tests.host import machine
from tests.host.conftest import keeps_ledgers, launcher
from tests.host.images import Shape, primarys
from tests.host.machine import ROOT, Network, Qemu, die_with_the_tests, wait_for

RAM_PAGES = 65536
ROUNDS = 200
CALLS = 1000
MOST_STOPS = 1000
#: A sweep over the disk takes about a second.
STANDS_STILL_S = 10.0

_HOLDER = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]) * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(int(sys.argv[1])): memory[page * 4096] = 1
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


def median_us(act: Callable[[], object], rounds: int = ROUNDS) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        act()
        times.append((time.perf_counter_ns() - start) / 1000)
    return statistics.median(times)


def standby_memory() -> None:
    """An epoch of scattered pages into the standby's RAM: across processes, or through a shared mapping."""
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(RAM_PAGES)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True, preexec_fn=die_with_the_tests)
    memfd = os.memfd_create("ram")
    try:
        base = int(holder.stdout.readline())
        os.ftruncate(memfd, RAM_PAGES * PAGE)
        shared = np.frombuffer(mmap.mmap(memfd, RAM_PAGES * PAGE), np.uint8).reshape(-1, PAGE)
        shared[:, 0] = 1
        source = np.random.default_rng(1)
        for pages in (64, 1000, 10000):
            numbers = np.sort(source.choice(RAM_PAGES, pages, replace=False))
            contents = source.integers(0, 256, pages * PAGE, np.uint8)
            starts = (base + numbers * PAGE).astype(np.uint64)
            ranges = np.stack((starts, starts + np.uint64(PAGE)), axis=1)

            def across(ranges: np.ndarray = ranges, contents: np.ndarray = contents) -> None:
                procmem.write(holder.pid, ranges, contents)

            def mapped(numbers: np.ndarray = numbers, contents: np.ndarray = contents) -> None:
                shared[numbers] = contents.reshape(-1, PAGE)

            one, other = median_us(across), median_us(mapped)
            print(f"{pages:6} pages: process_vm_writev {one:8.0f} us, shared memfd {other:8.0f} us, "
                  f"ratio {one / other:.2f}")
    finally:
        os.close(memfd)
        holder.kill()
        holder.wait()


def monitors() -> None:
    """Round trips of query-status to a QEMU that does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}.sock" for name in ("one", "other")]
        process = subprocess.Popen(
            ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-S",
             *(word for path in paths for word in ("-qmp", f"unix:{path},server=on,wait=off"))],
            preexec_fn=die_with_the_tests)
        try:
            wait_for("QEMU's monitors", lambda: all(Path(path).exists() for path in paths))
            monitor = qmp.Monitor(paths[0])
            ours = median_us(lambda: monitor.command("query-status"), CALLS)
            theirs = asyncio.run(_ask_by_asyncio(paths[1]))
            print(f"query-status: Monitor {ours:.0f} us, qemu.qmp {theirs:.0f} us, ratio {theirs / ours:.2f}")
        finally:
            process.kill()
            process.wait()


async def _ask_by_asyncio(path: str) -> float:
    client = QMPClient("measure")
    await client.connect(path)
    times = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        await client.execute("query-status")
        times.append((time.perf_counter_ns() - start) / 1000)
    await client.disconnect()
    return statistics.median(times)


def watchdog() -> None:
    """What arming costs, and when a process that is stopped dies."""
    dog = Watchdog(60.0)
    print(f"watchdog: to arm and disarm {median_us(lambda: (dog.arm(), dog.disarm()), CALLS):.1f} us")
    child = subprocess.Popen([sys.executable, "-c", "from nova_ftvm.host.watchdog import Watchdog; import os, signal\n"
                              "d = Watchdog(0.5); print(flush=True); d.arm(); os.kill(os.getpid(), signal.SIGSTOP)"],
                             cwd=ROOT, stdout=subprocess.PIPE, preexec_fn=die_with_the_tests)
    child.stdout.readline()
    start = time.monotonic()
    assert child.wait() == -signal.SIGKILL
    print(f"watchdog: a stopped process with a limit of 0.5 s dies after {time.monotonic() - start:.4f} s")


def iothreads() -> None:
    """How many stops a guest's busy disk lives through, with an iothread and without. Nothing of ours takes part."""
    if reason := machine.lacking():
        print(f"iothreads: {reason}")
        return
    for bus in ("iothread", "blk"):
        network = Network()
        try:
            with tempfile.TemporaryDirectory(dir=machine.guest_folder()) as name, ExitStack() as stack:
                folder = Path(name)
                launch = launcher(stack, folder, machine.ramdisk(machine.guest_folder()), network)
                guest = keeps_ledgers(launch, "p", primarys(folder, (Shape("raw", bus),), "a"), ("vda",))
                stops, went_on = _stop_and_go(guest)
                print(f"{bus}: the disk {'goes on' if went_on else 'stands still'} after {stops} stops")
        finally:
            network.remove()


def _stop_and_go(guest: Qemu) -> tuple[int, bool]:
    """(stops, does the disk still work)"""
    sweeps, moved = 0, time.monotonic()
    for stops in range(1, MOST_STOPS + 1):
        guest.operator.command("stop")
        guest.operator.command("cont")
        time.sleep(0.02)
        now = guest.log().count("sound ledger")
        if now > sweeps:
            sweeps, moved = now, time.monotonic()
        elif time.monotonic() > moved + STANDS_STILL_S:
            return stops, False
    return MOST_STOPS, True


if __name__ == "__main__":
    standby_memory()
    monitors()
    watchdog()
    iothreads()
