"""A protected guest's clock under load: without an NTP client, with chrony, and after its host died.

Run as `python -m ftvm_lab.timekeeping --percent N`; brings the lab up if it is down. One protected Debian server with
[engine] max_pause_percent N, Redis in it busy all the time, an NTP server outside. The guest's clock is compared with
this machine's over the network, and never by what the guest says of it alone.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftvm_lab import bench_figures, bench_work, clock_figures, cloud, computes, failover, ntp, survival
from ftvm_lab.clock_figures import Keeping, Sample
from ftvm_lab.command import LabError, Progress, run
from ftvm_lab.failover import Protected, Stage
from ftvm_lab.figures import quantile
from ftvm_lab.layout import Layout, compute
from ftvm_lab.machine import Machine
from ftvm_lab.ntp import Tracking
from ftvm_lab.servers import Servers
from ftvm_lab.traffic import IN_CLIENT, ClientProgram, wait_for_guest

NAME = "ftvm-clock"
CONNECTIONS = 8
SYNC_TIMEOUT_S = 120.0
#: chrony finds out what the load costs.
SETTLE_S = 60.0
#: How often chrony is asked what it thinks.
TRACK_S = 10.0
#: More is not left to be corrected while chrony keeps up, but after a failover or a new backup's beginning.
FOLLOWED_S = 1.0
#: A clock within this of the true time is back.
BACK_MS = 50.0


@dataclass(frozen=True, slots=True)
class Watched:
    """One time under load. tracking: what chrony said of itself meanwhile; empty if it did not run."""

    clock: Keeping
    tracking: list[Tracking]
    #: The pauses' share of the guest's time, and the median pause, by the engine; None without protection.
    paused_percent: float | None
    pause_ms_p50: float | None
    requests_per_s: float
    #: (seconds, ms)
    offsets: list[tuple[float, float]]

    @property
    def is_followed(self) -> bool:
        """Each time that chrony was asked it was synchronised, with little left to be corrected: it calls itself
        synchronised as well while it falls behind for good."""
        return bool(self.tracking) and all(
            one.is_synchronised and abs(one.left_s) < FOLLOWED_S for one in self.tracking
        )


@dataclass(frozen=True, slots=True)
class Lost:
    """The same while the host dies. late_ms: the clock's offset in the first second with an answer after the kill."""

    silence_ms: float
    late_ms: float
    #: Seconds until the clock is within BACK_MS, and until it stays there: the new backup's beginning lies between.
    back_s: float | None
    settled_s: float | None
    watched: Watched


class Asked(ClientProgram):
    """Somebody asks the guest for its clocks."""

    def __init__(self, address: str) -> None:
        super().__init__("ftvm_lab.clock_client", address)

    def finish(self) -> list[Sample]:
        samples = [Sample(*numbers) for numbers in self.end()]
        if len(samples) < 2:
            raise LabError("the guest did not tell its clocks")
        return samples


@contextmanager
def loaded(address: str) -> Iterator[None]:
    """Redis answers as fast as it can, on some connections."""
    argv = [*IN_CLIENT, "redis-benchmark", "-h", address, "-t", "set,get", "-c", str(CONNECTIONS)]
    argv += ["-d", "64", "-l", "-q"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as load:
        try:
            yield
            if load.poll() is not None:
                raise LabError(f"the load ended with {load.returncode}")
        finally:
            load.kill()


class Timekeeper:
    """The protected server, and those who look at its clock."""

    def __init__(self, stage: Stage, protected: Protected) -> None:
        self._stage = stage
        self._protected = protected
        self.address = protected.before.address

    @property
    def server_id(self) -> str:
        return self._protected.before.server_id

    def start_redis(self) -> None:
        bench_work.order(self.address, "start redis-server")
        wait_for_guest(self.address, survival.BOOT_TIMEOUT_S, bench_work.REDIS_PORT)

    def start_chrony(self) -> Tracking:
        bench_work.order(self.address, "start chrony")
        return ntp.wait_for_sync(self._stage.layout, self.address, SYNC_TIMEOUT_S)

    def watch(self, seconds: float) -> Watched:
        """Under load."""
        began, requests = time.time(), self._requests()
        with loaded(self.address), Asked(self.address) as asked:
            tracking = self._track(seconds)
            samples = asked.finish()
        return self._watched(samples, tracking, began, self._requests() - requests)

    def lose_host(self, seconds: float) -> Lost:
        """Kills the host under load, and goes on looking."""
        stage, before = self._stage, self._protected.before
        backup, requests = str(self._protected.backup.compute_host), self._requests()
        with loaded(self.address), Asked(self.address) as asked:
            time.sleep(5.0)
            failover.check_still_protected(stage, self._protected)
            killed, began = time.monotonic_ns(), time.time()
            computes.kill(stage.layout, compute(before.host))
            stage.progress.step(f"{before.host} is dead")
            stage.servers.wait_for_move(before.server_id, backup, failover.MOVE_TIMEOUT_S)
            tracking = self._track(seconds)
            samples = asked.finish()
        after = [sample for sample in samples if sample.sent_mono > killed]
        return Lost(
            silence_ms=round((after[0].sent_mono + after[0].took - killed) / 1e6, 1),
            late_ms=clock_figures.offsets_ms(after)[0][1],
            back_s=clock_figures.back_after_s(after, BACK_MS),
            settled_s=clock_figures.settled_after_s(after, BACK_MS),
            watched=self._watched(samples, tracking, began, self._requests() - requests),
        )

    def _track(self, seconds: float) -> list[Tracking]:
        """Returns after this time, s. A guest whose chrony was not started does not answer on its command port."""
        end = time.monotonic() + seconds
        found: list[Tracking] = []
        while (left_s := end - time.monotonic()) > 0:
            time.sleep(min(TRACK_S, left_s))
            try:
                found.append(ntp.tracking(self._stage.layout, self.address))
            except LabError:
                continue
        return found

    def _watched(self, samples: list[Sample], tracking: list[Tracking], began: float, requests: int) -> Watched:
        clock = clock_figures.keeping(samples)
        host = compute(self._stage.servers.host(self.server_id))
        statistics = self._stage.layout.runtime(host) / self.server_id / "epochs.jsonl"
        text = statistics.read_text() if statistics.exists() else ""
        epochs = bench_figures.epochs_between(text, began, time.time())
        passed_ms = sum(epochs.epoch_ms)
        return Watched(
            clock=clock,
            tracking=tracking,
            paused_percent=round(100 * sum(epochs.pause_ms) / passed_ms, 2) if passed_ms else None,
            pause_ms_p50=quantile(epochs.pause_ms, 0.5) if passed_ms else None,
            requests_per_s=round(requests / clock.seconds, 1),
            offsets=clock_figures.offsets_ms(samples),
        )

    def _requests(self) -> int:
        told = run([*IN_CLIENT, "redis-cli", "-h", self.address, "info", "stats"])
        (line,) = [line for line in told.splitlines() if line.startswith("total_commands_processed:")]
        return int(line.split(":")[1])


@contextmanager
def timekeeper(stage: Stage, percent: float) -> Iterator[Timekeeper]:
    """A protected server under that bound, with its NTP server; its host may be dead at the end."""
    with ntp.served(stage.layout), computes.engine_options(stage.layout, max_pause_percent=percent):
        protected = failover.protect(stage, NAME, survival.DATABASE)
        one = Timekeeper(stage, protected)
        one.start_redis()
        yield one
        host = protected.before.host
        failover.clean_up(stage, one.server_id, None if _is_on(stage, host) else host)


def _is_on(stage: Stage, host: str) -> bool:
    return Machine(stage.layout, compute(host)).pid1() is not None


def main() -> None:
    arguments = _parse()
    progress = Progress()
    layout = Layout.from_environment()
    failover.prepare(layout, progress)
    stage = Stage(layout, Servers(cloud.connect(layout)), progress)
    found: dict[str, Any] = {"max_pause_percent": arguments.percent}

    def note(name: str, value: Watched | Lost) -> None:
        found[name] = asdict(value)
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
        watched = value if isinstance(value, Watched) else value.watched
        progress.step(f"{name}: {shown(watched)}")
        if isinstance(value, Lost):
            progress.step(
                f"late by {value.late_ms} ms, silent for {value.silence_ms} ms, back after {value.back_s} s,"
                f" settled after {value.settled_s} s"
            )

    with timekeeper(stage, arguments.percent) as one:
        note("without", one.watch(arguments.without))
        progress.step(f"chrony: {one.start_chrony()}")
        note("settling", one.watch(SETTLE_S))
        note("with", one.watch(arguments.seconds))
        if arguments.kill:
            note("host_lost", one.lose_host(arguments.kill))


def shown(watched: Watched) -> str:
    clock, last = watched.clock, watched.tracking[-1:]
    return (
        f"rate {clock.rate} (raw {clock.raw_rate}), offset {clock.offset_ms_p50} ms, off {clock.off_ms_p50} (median),"
        f" {clock.off_ms_p95} (95 %), {clock.off_ms_max} (worst), steps {clock.steps_ms}, backwards {clock.backwards},"
        f" paused {watched.paused_percent} %, {watched.pause_ms_p50} ms, answers {clock.answer_ms_p50} ms,"
        f" {clock.answer_ms_max} (worst), {watched.requests_per_s} requests/s, followed {watched.is_followed}, {last}"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--percent", type=float, default=5.0, help="[engine] max_pause_percent")
    parser.add_argument("--without", type=float, default=60.0, help="seconds without chrony")
    parser.add_argument("--seconds", type=float, default=600.0, help="seconds with it")
    parser.add_argument("--kill", type=float, default=60.0, help="seconds after the host's death; 0: it lives")
    parser.add_argument("--output", type=Path, default=Path("build/timekeeping.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
