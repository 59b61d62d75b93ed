"""The benchmark's workloads: what is asked of the guest, by which program, and what that program's words mean.

Called by bench.py. A workload is run with the seconds that it should take on the unprotected guest. Work of a fixed
amount (`Sized`) is measured once there, and is then the same for all policies.
"""

import csv
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ftvm_lab.bench_client import WORK_PORT
from ftvm_lab.command import LabError, run
from ftvm_lab.traffic import IN_CLIENT, wait_for_guest

#: A protected guest may be so many times as slow before the benchmark gives up.
SLOWEST = 40.0
SLACK_S = 60.0
HTTP_PORT, REDIS_PORT = 80, 6379
PAGES_PER_MIB = 256
#: The memory writer goes round in so much.
WRITER_MIB = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """`throughput` in `unit`; the round trip where there is one, in ms; the distribution's quantiles where known."""

    throughput: float
    unit: str
    rtt_ms_p50: float | None = None
    rtt_ms_p99: float | None = None
    curve_ms: list[float] = field(default_factory=list)
    errors: int = 0


class Workload(Protocol):
    @property
    def name(self) -> str: ...

    def run(self, address: str, seconds: float) -> Outcome: ...


def ask(address: str, seconds: float, *words: str) -> dict[str, Any]:
    """bench_client's answer."""
    way, *rest = words
    argv = [*IN_CLIENT, sys.executable, "-m", "ftvm_lab.bench_client", way, address, *rest]
    answer: dict[str, Any] = json.loads(run(argv, timeout_s=seconds * SLOWEST + SLACK_S))
    return answer


def order(address: str, line: str, limit_s: float = SLACK_S) -> float:
    """The seconds until the guest has done it."""
    return float(ask(address, limit_s, "order", str(limit_s * SLOWEST), *line.split())["seconds"])


def make_ready(address: str, timeout_s: float) -> None:
    """The guest serves orders, nginx and Redis."""
    wait_for_guest(address, timeout_s, WORK_PORT)
    for unit, port in (("nginx", HTTP_PORT), ("redis-server", REDIS_PORT)):
        order(address, f"start {unit}")
        wait_for_guest(address, timeout_s, port)


@dataclass(frozen=True, slots=True)
class Echo:
    """Connections that send a message as soon as the last one is back."""

    name: str
    connections: int
    size: int

    def run(self, address: str, seconds: float) -> Outcome:
        found = ask(address, seconds, "echo", str(self.connections), str(self.size), str(seconds))
        if not found["requests"]:
            raise LabError(f"{self.name}: no reply in {seconds:g} s")
        return Outcome(
            found["requests"] / found["seconds"],
            "requests/s",
            found["rtt_ms_p50"],
            found["rtt_ms_p99"],
            found["curve_ms"],
        )


@dataclass(frozen=True, slots=True)
class Http:
    """Debian's nginx with its own first page; wrk."""

    name: str
    connections: int

    def run(self, address: str, seconds: float) -> Outcome:
        argv = ["wrk", "-t", "1", "-c", str(self.connections), "-d", f"{max(1, round(seconds))}s", "--latency"]
        argv += ["--timeout", "10s", f"http://{address}:{HTTP_PORT}/"]
        text = run([*IN_CLIENT, *argv], timeout_s=seconds + SLACK_S)
        return read_wrk(text)


_UNITS_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


def read_wrk(text: str) -> Outcome:
    """wrk --latency's report."""
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    shares = {share: float(value) * _UNITS_MS[unit]
              for share, value, unit in re.findall(r"^\s+(\d+)%\s+([\d.]+)(us|ms|s|m)\s*$", text, re.MULTILINE)}
    if rate is None or not {"50", "99"} <= shares.keys():
        raise LabError(f"wrk said nothing of use: {text}")
    sockets = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    answers = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    errors = [int(number) for found in (sockets, answers) if found is not None for number in found.groups()]
    return Outcome(float(rate[1]), "requests/s", round(shares["50"], 3), round(shares["99"], 3), errors=sum(errors))


#: redis-benchmark's tests, one after the other; the requests of a first trial; the trials.
_TESTS, _FEW, _TRIALS = 2, 20, 3


@dataclass(frozen=True, slots=True)
class Redis:
    """Debian's Redis without a disk; redis-benchmark, SET and GET one after the other, half the time each."""

    name: str
    connections: int
    pipeline: int

    def run(self, address: str, seconds: float) -> Outcome:
        # It takes a number of requests, not of seconds: a small number tells how many that is.
        requests = max(_FEW, 4 * self.connections * self.pipeline)
        for _ in range(_TRIALS):
            found = self._measure(address, requests, seconds)
            if _TESTS * requests / found.throughput >= seconds / 2:
                break
            requests = max(requests, int(found.throughput * seconds / _TESTS))
        return found

    def _measure(self, address: str, requests: int, seconds: float) -> Outcome:
        argv = ["redis-benchmark", "-h", address, "-p", str(REDIS_PORT), "-t", "set,get", "--csv", "-d", "64"]
        argv += ["-c", str(self.connections), "-P", str(self.pipeline), "-n", str(requests)]
        return read_redis(run([*IN_CLIENT, *argv], timeout_s=seconds * SLOWEST + SLACK_S))


def read_redis(text: str) -> Outcome:
    """redis-benchmark --csv: the rate over all its tests, each of as many requests; the medians' mean, the worst tail.

    A request of a pipeline is timed with its whole batch.
    """
    lines = text[text.index('"test"'):].splitlines() if '"test"' in text else []
    rows = list(csv.DictReader(lines))
    if not rows:
        raise LabError(f"redis-benchmark said nothing of use: {text}")
    rate = len(rows) / sum(1 / float(row["rps"]) for row in rows)
    median = sum(float(row["p50_latency_ms"]) for row in rows) / len(rows)
    return Outcome(round(rate, 1), "requests/s", round(median, 3), max(float(row["p99_latency_ms"]) for row in rows))


@dataclass(frozen=True, slots=True)
class Bulk:
    """One connection, one direction."""

    name: str
    pulls: bool

    def run(self, address: str, seconds: float) -> Outcome:
        found = ask(address, seconds, "pull" if self.pulls else "push", str(seconds))
        return Outcome(round(found["bytes_per_s"] / (1 << 20), 3), "MiB/s")


@dataclass(slots=True)
class Sized:
    """Work of a fixed amount. The first run, which is the unprotected guest's, finds how much fills the time.

    line: the order for an amount; unit: what an amount a second is called, `scale` of it.
    """

    name: str
    line: Callable[[int], str]
    unit: str
    trial: int
    scale: float = 1.0
    amount: int | None = None

    def run(self, address: str, seconds: float) -> Outcome:
        if self.amount is None:
            self.amount = fitting(self.trial, lambda amount: order(address, self.line(amount)), seconds)
        took_s = order(address, self.line(self.amount), seconds)
        return Outcome(round(self.amount * self.scale / took_s, 3), self.unit)


def fitting(trial: int, measure: Callable[[int], float], seconds: float, enough_s: float = 0.5) -> int:
    """How much takes `seconds`: tried with ever more, as a short piece of work is mostly its order's way."""
    amount = trial
    while (took_s := measure(amount)) < min(enough_s, seconds):
        amount *= 4
    return max(1, int(amount * seconds / took_s))


@dataclass(frozen=True, slots=True)
class Writer:
    """Dirties memory at a rate by the guest's clock, for so many of its seconds."""

    name: str
    mib_s: float

    def run(self, address: str, seconds: float) -> Outcome:
        rate = self.mib_s * PAGES_PER_MIB
        pages = max(1, int(rate * seconds))
        took_s = order(address, f"dirty {WRITER_MIB * PAGES_PER_MIB} {pages} {rate:g}", seconds)
        return Outcome(round(pages / PAGES_PER_MIB / took_s, 3), "MiB/s")


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing is asked: what does protection cost then?"""

    name: str = "idle"

    def run(self, address: str, seconds: float) -> Outcome:
        time.sleep(seconds)
        return Outcome(1.0, "")


def full() -> Sequence[Workload]:
    """All of them, the order of the table."""
    everything = WRITER_MIB * PAGES_PER_MIB
    return (
        *(Echo(f"echo_{count}", count, 64) for count in (1, 8, 32, 64)),
        Echo("echo_8_16k", 8, 16 << 10),
        *(Http(f"http_{count}", count) for count in (1, 64)),
        *(Redis("redis_1", 1, 1), Redis("redis_64", 64, 1), Redis("redis_64_pipelined", 64, 16)),
        *(Bulk("download", True), Bulk("upload", False)),
        Sized("processor", lambda rounds: f"spin {rounds}", "million rounds/s", 1_000_000, 1e-6),
        *(Writer(f"memory_{rate}", rate) for rate in (1, 10, 100)),
        Sized("memory_all", lambda pages: f"dirty {everything} {pages}", "MiB/s", everything, 1 / PAGES_PER_MIB),
        Idle(),
    )


QUICK = ("echo_1", "echo_32", "echo_64", "echo_8_16k", "http_64", "redis_64", "processor")


def quick() -> Sequence[Workload]:
    """The essential ones."""
    return [workload for workload in full() if workload.name in QUICK]
