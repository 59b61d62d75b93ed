"""What the replication of disks costs: bare QEMU guests, a disk on a real file system, cache=none as in Nova.

    python -m tests.host.bench_disk [--rounds N] [--output FILE]

One guest, protected and unprotected in turns, so that both see the same machine; medians over the rounds. Rates are by
the host's clock, from the order to the guest's answer: the guest's own clock stands still in a pause. Latencies are by
the guest's clock. The first copy is compared with a plain copy: one process reads the image and sends it over the
loopback, another writes it to a file.

A machine whose disk is memory shows what the replication itself can do; a usual disk is slower than that. So some cases
are measured once more on a disk that the kernel holds back.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nova_ftvm.conf import engine as engine_conf
from tests.host import machine
from tests.host.conftest import IDLE, launcher
from tests.host.images import MIB, Shape, arguments, can_be_slowed, primarys, slow_disk, standbys
from tests.host.machine import Bench, Network, Qemu, die_with_the_tests, wait_for
from tests.host.protection import protected

#: As an installation has it, but for the first copy.
SETTINGS = {**{option.name: option.default for option in engine_conf.OPTS}, "disk_copy_mib_s": 0}
SPAN_MIB = 256
SECONDS = 3.0
COPIED = Shape("raw", size=512 * MIB)
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    pattern: str
    size: int
    sync: bool
    #: Writes under way.
    depth: int
    limited: bool = False


CASES = {
    "seq_1m": Case("seq", 1 << 20, False, 4),
    "seq_1m_fsync": Case("seq", 1 << 20, True, 1),
    "rand_4k": Case("rand", 4096, False, 4),
    "rand_4k_fsync": Case("rand", 4096, True, 1),
    "limited_seq_1m": Case("seq", 1 << 20, False, 4, limited=True),
    "limited_rand_4k": Case("rand", 4096, False, 4, limited=True),
}
#: A cloud's usual disk.
LIMITS = {"wbps": 150 * MIB, "wiops": 3000}


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    mib_s: float
    writes_s: float
    p50_ms: float
    p99_ms: float


def measure(bench: Bench, case: Case, seconds: float = SECONDS) -> Measured:
    start = time.monotonic()
    bench.start("vda", case.pattern, case.size, sync=case.sync, seconds=seconds, depth=case.depth, span_mib=SPAN_MIB)
    writes, _, p50_us, p99_us, _ = bench.result()
    took = time.monotonic() - start
    return Measured(writes * case.size / MIB / took, writes / took, p50_us / 1000, p99_us / 1000)


def medians(rounds: list[Measured]) -> dict[str, float]:
    return {field.name: round(statistics.median(getattr(one, field.name) for one in rounds), 3)
            for field in dataclasses.fields(Measured)}


def writes(launch: Callable[..., Qemu], folder: Path, network: Network, rounds: int) -> dict[str, Any]:
    """Rates and latencies of the guest's writes, protected and not."""
    shapes = (Shape("backed", size=(SPAN_MIB + 64) * MIB),)
    guest = launch("p", work="bench", extra=arguments(primarys(folder, shapes, "a")))
    guest.await_boot()
    bench = Bench(network)
    # Once over all of it: a qcow2 image grows with the first write to a place.
    assert any(measure(bench, CASES["seq_1m"], seconds).writes_s * seconds > SPAN_MIB for seconds in (5.0, 15.0, 45.0))
    found: dict[str, dict[str, list[Measured]]] = {
        side: {name: [] for name in CASES} for side in ("unprotected", "protected")}

    def measure_all(side: str) -> None:
        for name, case in CASES.items():
            held_back = slow_disk(folder, guest.pid, **LIMITS) if case.limited else contextlib.nullcontext()
            with held_back:
                found[side][name].append(measure(bench, case))

    for number in range(rounds):
        measure_all("unprotected")
        disks = standbys(folder, shapes, "a", f"b{number}")
        with protected(guest, launch("b", work="bench", extra=arguments(disks), standby=True), **SETTINGS) as pair:
            measure_all("protected")
            assert not pair.primary.ended() and pair.primary.heard("ask_degrade") is None, "the protection was lost"
            pair.primary.order("stop", reason="the round is over")
            pair.primary.hear("ended")
        for disk in disks:
            disk.path.unlink()
    bench.close()
    guest.kill()
    return {side: {name: medians(each) for name, each in cases.items()} for side, cases in found.items()}


def first_copies(launch: Callable[..., Qemu], folder: Path, rounds: int) -> dict[str, float]:
    """MiB a second of a mirror's first copy, and of a plain copy of the same image."""
    own = folder / "copied"
    own.mkdir()
    source = primarys(own, (COPIED,), "a")
    guest = launch("p", work=IDLE, extra=arguments(source))
    guest.await_boot()
    mirrored, plain = [], []
    target = own / "plain"
    for _ in range(rounds):
        target.write_bytes(b"")
        disks = standbys(own, (COPIED,), "a")
        drop(source[0].path)
        standby = launch("b", work=IDLE, extra=arguments(disks), standby=True)
        with protected(guest, standby, until="", **SETTINGS) as pair:
            mirrored.append(COPIED.size / MIB / mirror_takes_s(guest))
            pair.primary.order("stop", reason="the round is over")
            pair.primary.hear("ended")
        drop(source[0].path)
        plain.append(COPIED.size / MIB / plain_copy_takes_s(source[0].path, target))
    return {"mirror_mib_s": round(statistics.median(mirrored), 1), "plain_mib_s": round(statistics.median(plain), 1)}


def drop(path: Path) -> None:
    """The host's cache forgets the file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def mirror_takes_s(guest: Qemu) -> float:
    """From the job's start to its end."""
    def jobs() -> list[dict[str, Any]]:
        return guest.operator.command("query-block-jobs")

    wait_for("the mirror starts", jobs, 60.0, 0.002)
    start = time.monotonic()
    wait_for("the mirror is ready", lambda: [job["ready"] for job in jobs()] == [True], 300.0, 0.01)
    return time.monotonic() - start


def plain_copy_takes_s(source: Path, target: Path) -> float:
    """Until all is on the disk."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        sender = subprocess.Popen([sys.executable, "-m", __spec__.name, "--send", str(source),
                                   str(listener.getsockname()[1])], cwd=machine.ROOT, preexec_fn=die_with_the_tests)
        connection, _ = listener.accept()
        start = time.monotonic()
        with connection, target.open("r+b", buffering=0) as file:
            into = memoryview(bytearray(_CHUNK))
            while count := connection.recv_into(into):
                file.write(into[:count])
            os.fdatasync(file.fileno())
        took = time.monotonic() - start
        assert sender.wait(30.0) == 0
    return took


def send(path: str, port: int) -> None:
    with open(path, "rb", buffering=0) as file, socket.create_connection(("127.0.0.1", port)) as connection:
        while connection.sendfile(file, file.tell(), _CHUNK):
            pass


@contextlib.contextmanager
def place() -> Iterator[tuple[Callable[..., Qemu], Path, Network]]:
    """Guests, a folder on a disk, and their network."""
    if reason := machine.lacking():
        raise SystemExit(reason)
    network = Network()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=machine.guest_folder()) as name, ExitStack() as stack:
            yield launcher(stack, Path(name), machine.ramdisk(machine.guest_folder()), network), Path(name), network
    finally:
        network.remove()


def ratio(measured: dict[str, Any], name: str) -> float:
    return round(measured["protected"][name]["mib_s"] / measured["unprotected"][name]["mib_s"], 3)


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':16}{'unprotected':>28}{'protected':>28}{'ratio':>8}",
             f"{'':16}" + 2 * f"{'MiB/s':>8}{'p50 ms':>10}{'p99 ms':>10}"]
    for name in CASES:
        sides = [result[side][name] for side in ("unprotected", "protected")]
        cells = "".join(f"{side['mib_s']:>8.1f}{side['p50_ms']:>10.2f}{side['p99_ms']:>10.2f}" for side in sides)
        lines.append(f"{name:16}{cells}{ratio(result, name):>8.2f}")
    copy = result["first_copy"]
    lines.append(f"first copy {copy['mirror_mib_s']:.0f} MiB/s, plain copy {copy['plain_mib_s']:.0f} MiB/s, "
                 f"ratio {result['first_copy_ratio']:.2f}; an fsync takes "
                 f"{result['fsync_added_ms_p50']:.2f} ms longer (median)")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=machine.ROOT / "build" / "bench-disk.json")
    parser.add_argument("--send", nargs=2, metavar=("FILE", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.send:
        send(options.send[0], int(options.send[1]))
        return
    if not can_be_slowed(machine.guest_folder()):
        raise SystemExit("no control group can slow this disk down")
    with place() as (launch, folder, network):
        measured = writes(launch, folder, network, options.rounds)
        copy = first_copies(launch, folder, options.rounds)
    fsync_ms = {side: cases["rand_4k_fsync"]["p50_ms"] for side, cases in measured.items()}
    result = {
        "seq_1m_write_ratio": ratio(measured, "seq_1m"),
        "rand_4k_write_ratio": ratio(measured, "rand_4k"),
        "fsync_added_ms_p50": round(fsync_ms["protected"] - fsync_ms["unprotected"], 3),
        "first_copy_ratio": round(copy["mirror_mib_s"] / copy["plain_mib_s"], 3),
        "limited_seq_1m_write_ratio": ratio(measured, "limited_seq_1m"),
        "limited_rand_4k_write_ratio": ratio(measured, "limited_rand_4k"),
        **measured, "first_copy": copy, "rounds": options.rounds, "processors": os.cpu_count(),
        "kernel": platform.release()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
