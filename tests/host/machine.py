"""What the tests of host/ stand on: a guest, a network of their own, QEMUs, and engines as processes.

The guest is the lab's (kernel, ramdisk), with a second ramdisk behind it: its own `/etc/start`, and the workloads.
All that is made here belongs to a context manager: it goes away with the test, also with a failed one.
"""

import contextlib
import ctypes
import gzip
import hashlib
import itertools
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import numpy as np

from nova_ftvm.conf import engine as engine_conf
from nova_ftvm.core import dirty
from nova_ftvm.engine.faults import TRIPPED
from nova_ftvm.exception import GuestGone
from nova_ftvm.host import netfilter, procmem, qmp
from nova_ftvm.host.disks import AttendedMonitor
from nova_ftvm.types import PAGE, RamBlock

ROOT = Path(__file__).parents[2]
LAB_GUEST = ROOT / "build" / "guest"
SOURCES = Path(__file__).parent / "guest"
#: What the ramdisk adds to /bin, each from one C file.
PROGRAMS = ("work", "storage")
QEMU = "qemu-system-x86_64"
GUEST_ADDRESS, HOST_ADDRESS = "10.99.0.2", "10.99.0.1"
SESSION_PORT, DATAGRAM_PORT, BENCH_PORT = 7000, 7001, 7002
MEMORY_MIB = 128
#: A guest of this size boots in two or three seconds under TCG; a busy machine takes its time.
BOOT_S = 60.0

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000


def die_with_the_tests() -> None:
    """In a child, before exec: the kernel ends it when the tests end, however they end."""
    # SAFE: two integers.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_a_core() -> None:
    """In a child, before exec: should it crash, where it did can be told."""
    die_with_the_tests()
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = 20.0, pause_s: float = 0.01) -> Any:
    """The first true value of `condition`; fails with `what` when none comes in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(pause_s)


# -- the guest


def lacking() -> str:
    """What the tests with guests need and this machine lacks; '' when it has all."""
    for name in ("gcc", "cpio", "ip", QEMU):
        if shutil.which(name) is None:
            return f"{name} is not installed"
    for name in ("kernel", "ramdisk"):
        if not (LAB_GUEST / name).exists():
            return "the lab's guest is not built: make setup"
    return "not root" if os.geteuid() else ""


def guest_folder() -> Path:
    """What the tests build, and their disks."""
    folder = ROOT / "build" / "test-guest"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def ramdisk(work: Path) -> Path:
    """The lab's ramdisk and ours behind it: the kernel unpacks both, the later file wins."""
    start = SOURCES / "start"
    digest = hashlib.sha256()
    for path in (*(SOURCES / f"{name}.c" for name in PROGRAMS), start, LAB_GUEST / "ramdisk"):
        digest.update(path.read_bytes())
    made = work / f"ramdisk-{digest.hexdigest()[:16]}"
    if made.exists():
        return made
    with tempfile.TemporaryDirectory(dir=work) as name:
        root = Path(name)
        for place in ("etc", "bin"):
            (root / place).mkdir()
        shutil.copy(start, root / "etc" / "start")
        (root / "etc" / "start").chmod(0o755)
        for program in PROGRAMS:
            subprocess.run(["gcc", "-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror",
                            "-o", root / "bin" / program, SOURCES / f"{program}.c"], check=True)
        names = "\n".join(["etc", "etc/start", "bin", *(f"bin/{program}" for program in PROGRAMS), ""])
        archive = subprocess.run(["cpio", "--create", "--format=newc", "--quiet"], cwd=root, check=True,
                                 input=names.encode(), capture_output=True).stdout
        partial = root / "ramdisk"
        partial.write_bytes((LAB_GUEST / "ramdisk").read_bytes() + gzip.compress(archive, mtime=0))
        partial.rename(made)
    return made


# -- the network


_numbers = itertools.count(1)


class Network:
    """A network namespace with a bridge (HOST_ADDRESS) and a tap for the primary, and for each of two standbys."""

    def __init__(self) -> None:
        self.name = f"ftvmt-{os.getpid()}-{next(_numbers)}"
        self._run("netns", "add", self.name)
        try:
            self.ip("link", "set", "lo", "up")
            self.ip("link", "add", "br0", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
            self.ip("addr", "add", f"{HOST_ADDRESS}/24", "dev", "br0")
            self.ip("link", "set", "br0", "up")
            for side in "pbc":
                self.ip("tuntap", "add", f"tap-{side}", "mode", "tap")
                self.ip("link", "set", f"tap-{side}", "master", "br0", "up")
        except BaseException:
            self.remove()
            raise

    def ip(self, *words: str) -> None:
        self._run("-n", self.name, *words)

    def set_rto_min(self, milliseconds: int) -> None:
        """How long its TCP waits at least before it sends again."""
        self.ip("route", "change", f"{ip_interface(HOST_ADDRESS + '/24').network}", "dev", "br0", "proto", "kernel",
                "scope", "link", "src", HOST_ADDRESS, "rto_min", f"{milliseconds}ms")

    def socket(self, kind: socket.SocketKind = socket.SOCK_STREAM,
               family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
        """A socket within the namespace; where it was made is where it stays."""
        made: list[socket.socket] = []

        def make() -> None:
            with open(f"/run/netns/{self.name}") as namespace:
                # SAFE: two integers; changes only this thread, which ends below.
                if _libc.setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(socket.socket(family, kind))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        return made[0]

    def remove(self) -> None:
        self._run("netns", "del", self.name)

    def _run(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def connect(network: Network, port: int, timeout_s: float) -> socket.socket | None:
    """A connection to the guest; None when nobody listens yet."""
    connection = network.socket()
    connection.settimeout(timeout_s)
    try:
        connection.connect((GUEST_ADDRESS, port))
    except OSError:
        connection.close()
        return None
    return connection


class Session:
    """A client of the guest's stateful service: each reply carries the count and the chain of all requests so far."""

    def __init__(self, network: Network, timeout_s: float = 15.0) -> None:
        self.connection = wait_for("the guest's service listens", lambda: connect(network, SESSION_PORT, timeout_s))
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self.connection.makefile("rb")
        self.count = self.chain = 0

    def send(self) -> bytes:
        """One request; the reply that must come."""
        nonce = (self.count * 7919 + 13) % 10007
        self.count += 1
        self.chain = (self.chain * 31 + nonce) % 2147483647
        self.connection.sendall(b"%d %d\n" % (self.count, nonce))
        return b"%d %d %d\n" % (self.count, self.count, self.chain)

    def receive(self, expected: bytes) -> None:
        assert self._lines.readline() == expected, "a request was lost, repeated or forgotten"

    def exchange(self, times: int = 1) -> None:
        for _ in range(times):
            self.receive(self.send())

    def hears_within(self, seconds: float) -> bool:
        return bool(select.select([self.connection], [], [], seconds)[0])

    def close(self) -> None:
        self._lines.close()
        self.connection.close()


class Bench:
    """Measurements within the guest; see guest/storage.c."""

    def __init__(self, network: Network) -> None:
        self._connection = wait_for("the guest measures", lambda: connect(network, BENCH_PORT, BOOT_S))
        self._lines = self._connection.makefile("rb")

    def start(self, disk: str, pattern: str, size: int, *, sync: bool, seconds: float, depth: int,
              span_mib: int) -> None:
        """pattern: seq or rand. size: bytes of a write. depth: writes under way. span_mib: of the disk."""
        words = (disk, pattern, size, int(sync), int(seconds * 1000), depth, span_mib)
        self._connection.sendall(" ".join(map(str, words)).encode())

    def result(self) -> list[int]:
        """[writes, microseconds in all, of a write: median, 99th percentile, longest], by the guest's clock."""
        return [int(word) for word in self._lines.readline().split()]

    def close(self) -> None:
        self._lines.close()
        self._connection.close()


# -- QEMU


class Qemu:
    """One QEMU. monitor.sock is the product's, operator.sock the test's."""

    def __init__(self, folder: Path, arguments: list[str], network: Network | None = None) -> None:
        self.folder = folder
        self.serial = folder / "serial.log"
        self.process = subprocess.Popen(
            [*(["ip", "netns", "exec", network.name] if network else []), QEMU, *arguments,
             "-serial", f"file:{self.serial}",
             "-chardev", f"socket,id=ftvm,path={folder}/monitor.sock,server=on,wait=off", "-mon", "ftvm,mode=control",
             "-qmp", f"unix:{folder}/operator.sock,server=on,wait=off"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(folder / "qemu.log").open("wb"), cwd=folder,
            preexec_fn=leave_a_core)
        try:
            self.operator = wait_for("QEMU's monitors", self._operator)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return self.serial.read_text(errors="replace") if self.serial.exists() else ""

    def ticks(self) -> int:
        """The last tick on the guest's console."""
        return max((int(line.split()[1]) for line in self.log().splitlines()
                    if line.startswith("tick ") and line[5:].strip().isdigit()), default=0)

    def await_log(self, line: str) -> None:
        self._wait_for(f"the guest says: {line}", lambda: line in self.log(), BOOT_S)

    def await_boot(self, times: int = 1) -> None:
        self._wait_for("the guest is up", lambda: self.log().count("guest is up") >= times, BOOT_S)

    def await_ticks(self, number: int = 2) -> None:
        """The guest runs: its console goes on."""
        first = self.ticks()
        self._wait_for("the guest's console goes on", lambda: self.ticks() >= first + number, 10.0)

    def await_sound(self, *kinds: str, times: int = 1) -> None:
        """Each workload has checked itself again, and found nothing."""
        wanted = {kind: self.log().count(f"sound {kind}") + times for kind in kinds}
        for kind, count in wanted.items():
            self._wait_for(f"{kind} checks itself",
                           lambda kind=kind, count=count: self.log().count(f"sound {kind}") >= count, BOOT_S)
        assert "CORRUPT" not in self.log()

    def await_sound_disks(self, *names: str) -> None:
        """Every sector in the disks' ledgers holds what memory says: the second sweep from now began after now."""
        self.await_sound(*(f"{half} {name}" for half in ("ledger", "fsync") for name in names), times=2)

    def is_running(self) -> bool:
        return self.operator.command("query-status")["status"] == "running"

    def mirrors(self) -> list[str]:
        """What there is of mirrors of disks: jobs and nodes."""
        jobs = [job["id"] for job in self.operator.command("query-jobs")]
        nodes = [node["node-name"] for node in self.operator.command("query-named-block-nodes", flat=True)]
        return [name for name in jobs + nodes if name.startswith("ftvm-")]

    def exports(self) -> list[str]:
        return [export["id"] for export in self.operator.command("query-block-exports")]

    def unbuffer(self) -> None:
        """What the agent does in the place of a dead engine."""
        with self.monitor() as monitor:
            netfilter.remove(monitor, netfilter.interfaces(monitor))

    @contextlib.contextmanager
    def monitor(self) -> Iterator[AttendedMonitor]:
        """The product's monitor, for as long as no engine has it."""
        monitor = AttendedMonitor(f"{self.folder}/monitor.sock")
        try:
            yield monitor
        finally:
            monitor.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _wait_for(self, what: str, condition: Callable[[], Any], timeout_s: float) -> None:
        wait_for(what, lambda: self._lives() and condition(), timeout_s)

    def _lives(self) -> bool:
        assert self.process.poll() is None, self._obituary()
        return True

    def _obituary(self) -> str:
        said = f"QEMU ended with {self.process.returncode}: {(self.folder / 'qemu.log').read_text()}"
        core = self.folder / "core"
        if core.exists() and shutil.which("gdb"):
            said += subprocess.run(["gdb", "-batch", "-ex", "thread apply all bt 30", shutil.which(QEMU), core],
                                   capture_output=True, text=True, check=False).stdout[-20_000:]
        return said

    def _operator(self) -> qmp.Monitor | None:
        """The test's monitor, which QEMU opens last; its socket refuses until QEMU listens."""
        try:
            return qmp.Monitor(f"{self.folder}/operator.sock", timeout_s=20.0)
        except GuestGone:
            self._lives()
            return None


def read_all(pid: int, blocks: list[RamBlock]) -> dict[str, np.ndarray]:
    """All RAM of a QEMU, by plain reads that know nothing of tracking."""
    contents = {}
    for block in blocks:
        into = np.empty(block.pages * PAGE, np.uint8)
        procmem.read(pid, dirty.ranges_of(np.array([[0, block.pages]], np.uint32), block.address), into)
        contents[block.name] = into
    return contents


# -- engines as processes


#: As the agent makes it from the configuration, with limits that a test can wait for.
ORDER = {**{option.name: option.default for option in engine_conf.OPTS},
         "pair_id": "pair", "generation": 1, "instance_id": "server", "token": "token",
         "qemu_owner": [0, 0], "epoch_ms": 20.0, "hold_limit_ms": 400.0, "beat_ms": 100.0, "beat_misses": 5,
         "ack_limit_ms": 400.0, "live_passes": 4, "live_rest_pages": 2048, "frame_limit_bytes": 4 << 20}


class Engine:
    """One engine's process and the test in its agent's place."""

    def __init__(self, role: str, folder: Path, address: str = "127.0.0.1", port: int = 0, fault: str = "",
                 **settings: Any) -> None:
        order = {**ORDER, **settings, "role": role, "folder": str(folder), "address": address, "port": port}
        path = folder / f"{role}.ctl"
        path.unlink(missing_ok=True)
        self.log = folder / f"{role}.log"
        #: Engines before it wrote so much.
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.host.engine_process"], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=self.log.open("ab"), preexec_fn=die_with_the_tests,
            env={**os.environ, "FTVM_FAULT": fault})
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.close()
        self._socket = socket.socket(socket.AF_UNIX)
        self._rest = b""
        self.reports: list[dict[str, Any]] = []
        try:
            wait_for(f"the {role} engine's control socket", lambda: path.exists() or self.ended())
            wait_for(f"the {role} engine listens", lambda: self._socket.connect_ex(str(path)) == 0)
        except BaseException:
            self.kill()
            raise
        self._socket.setblocking(False)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def heard(self, event: str) -> dict[str, Any] | None:
        """The engine's report of that name, if it came; each is heard once."""
        self._read()
        for i, report in enumerate(self.reports):
            if report["event"] == event:
                del self.reports[:i + 1]
                return report
        return None

    def hear(self, event: str, timeout_s: float = 30.0) -> dict[str, Any]:
        return wait_for(f"the engine reports {event} ({self.log})", lambda: self.heard(event), timeout_s, 0.001)

    def order(self, what: str, **facts: Any) -> None:
        self._socket.send(json.dumps({"do": what, **facts}).encode() + b"\n")

    def has_tripped(self) -> bool:
        """Has its fault come?"""
        return TRIPPED in self.log.read_bytes()[self._log_start:]

    def resident_mib(self) -> float:
        """RAM that the process has."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def grant(self, generation: int = 2) -> None:
        self.order("grant", granted=True, generation=generation, reason="")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._socket.close()

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while received := self._socket.recv(1 << 16):
                *lines, self._rest = (self._rest + received).split(b"\n")
                self.reports += [json.loads(line) for line in lines]
