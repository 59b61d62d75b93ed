"""The benchmark: one guest, unprotected and under each policy, the same work, in one run; forwards and back again, so
that a machine that becomes faster or slower meanwhile does so for all.

Run as `python -m ftvm_lab.bench [--quick]`; brings the lab up if it is down. Writes the figures after each workload,
and at the end the pictures beside them. Ends with 0 if every workload could be measured under every policy.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ftvm_lab import bench_figures, bench_work, cloud, failover
from ftvm_lab.bench_client import WORK_PORT
from ftvm_lab.bench_figures import POLICIES, UNPROTECTED, Row, Rows
from ftvm_lab.bench_probes import Probes
from ftvm_lab.bench_work import Workload
from ftvm_lab.command import LabError, Progress
from ftvm_lab.failover import Kind, Stage
from ftvm_lab.layout import Layout, compute
from ftvm_lab.pairs import pair
from ftvm_lab.seed import DATABASE_FLAVOR, DATABASE_IMAGE
from ftvm_lab.servers import Servers

NAME = "ftvm-bench"
BOOT_TIMEOUT_S = 300.0
PROTECT_TIMEOUT_S = 300.0
END_TIMEOUT_S = 120.0
GUEST = Kind(DATABASE_IMAGE, DATABASE_FLAVOR, WORK_PORT, BOOT_TIMEOUT_S)
#: Seconds of each workload, each time.
FULL_S, QUICK_S = 4.0, 3.0
#: After protection has begun or ended, and what the first copy wrote is on the disks.
SETTLE_S = 3.0


@dataclass(slots=True)
class Bench:
    """All that is known so far."""

    stage: Stage
    name: str
    server_id: str
    address: str
    workloads: Sequence[Workload]
    seconds: float
    quick: bool
    #: What `make bench-pause` found just before.
    pause: dict[str, Any] | None
    #: Of each workload and policy what was measured, each time.
    measured: dict[str, dict[str, list[Row]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def expose(self) -> Probes:
        """Without protection; the guest goes on."""
        self.stage.openstack(["server", "set", "--property", "ft=false", self.name])
        self.stage.servers.wait_for_state(self.server_id, "unprotected", END_TIMEOUT_S)
        _settle()
        return Probes(self.stage.layout, self.server_id, compute(self.stage.servers.host(self.server_id)), None)

    def protect(self, policy: str) -> Probes:
        """With protection, by that policy, from now on."""
        words = ["--property", f"ft:policy={policy}", "--property", "ft=true"]
        self.stage.openstack(["server", "set", *words, self.name])
        found = failover.wait_for_protection(self.stage, self.server_id, PROTECT_TIMEOUT_S)
        if found.backup_host is None:
            raise LabError(f"{self.name} is protected, and its pair names no backup's host")
        _settle()
        return Probes(self.stage.layout, self.server_id, compute(found.primary_host), compute(found.backup_host))

    def measure(self, policy: str, probes: Probes, save: Callable[[], None]) -> None:
        """All workloads under one policy. One that fails is noted, and the next one comes."""
        generation = None if policy == UNPROTECTED else pair(self.stage.layout, self.server_id).generation
        for workload in self.workloads:
            try:
                self._measure_one(policy, workload, probes)
            except (LabError, ValueError) as error:
                self.failures.append(f"{workload.name}, {policy}: {error}")
                print(f"bench: {self.failures[-1]}", file=sys.stderr)
            save()
        if generation is not None and (now := pair(self.stage.layout, self.server_id)).generation != generation:
            self.failures.append(f"{policy}: the pair came to generation {now.generation}: {now.state}, {now.reason}")

    def _measure_one(self, policy: str, workload: Workload, probes: Probes) -> None:
        known = self.measured.setdefault(workload.name, {})
        if policy != UNPROTECTED and UNPROTECTED not in known:
            raise LabError("there is nothing to compare it with")
        before = probes.read()
        outcome = workload.run(self.address, self.seconds)
        after = probes.read()
        row = bench_figures.row(outcome, before, after, probes.epochs(before.at, after.at))
        known.setdefault(policy, []).append(row)
        found = bench_figures.compared(known)[policy]
        self.stage.progress.step(
            f"{policy}: {workload.name} {outcome.throughput:.1f} {outcome.unit}, ratio {found['throughput_ratio']},"
            f" round trip {outcome.rtt_ms_p50} ms, pause {found.get('pause_ms_p50')} ms")

    @property
    def rows(self) -> Rows:
        return {name: bench_figures.compared(policies) for name, policies in self.measured.items() if policies}

    def goals(self) -> list[bench_figures.Goal]:
        return bench_figures.goals(self.rows, self.pause)

    def report(self, error: str | None) -> dict[str, Any]:
        return {
            "error": error,
            "failures": self.failures,
            "seconds": self.seconds,
            "quick": self.quick,
            "drift": bench_figures.drift(self.measured),
            "pause": self.pause,
            "pause_fit": bench_figures.pause_fit(self.rows),
            "goals": [asdict(goal) | {"is_met": goal.is_met} for goal in self.goals()],
            "workloads": self.rows,
        }


def begin(stage: Stage, name: str, workloads: Sequence[Workload], seconds: float, quick: bool,
          pause: dict[str, Any] | None = None) -> Bench:
    """A guest that can be protected, and is, for a start: its domain has all that this needs from its boot on."""
    protected = failover.protect(stage, name, GUEST)
    before = protected.before
    bench_work.make_ready(before.address, BOOT_TIMEOUT_S)
    return Bench(stage, name, before.server_id, before.address, workloads, seconds, quick, pause)


def run_all(bench: Bench, policies: Sequence[str], again: bool, save: Callable[[], None]) -> None:
    """Unprotected first: everything is compared with that. again: and all of it in the opposite order."""
    forwards = [UNPROTECTED, *policies]
    probes = None
    for before, policy in pairwise(["", *forwards, *(reversed(forwards) if again else [])]):
        if probes is None or policy != before:
            probes = bench.expose()
            if policy != UNPROTECTED:
                probes = bench.protect(policy)
        bench.measure(policy, probes, save)


def _settle() -> None:
    os.sync()
    time.sleep(SETTLE_S)


def main() -> None:
    arguments = _parse()
    output: Path = arguments.output
    progress = Progress()
    bench: Bench | None = None
    error = None

    def save() -> None:
        if bench is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(bench.report(error), indent=1) + "\n")

    try:
        layout = Layout.from_environment()
        failover.prepare(layout, progress)
        stage = Stage(layout, Servers(cloud.connect(layout)), progress)
        workloads = _chosen(arguments)
        seconds = arguments.seconds or (QUICK_S if arguments.quick else FULL_S)
        pause = json.loads(arguments.pause.read_text())["pause"] if arguments.pause else None
        bench = begin(stage, NAME, workloads, seconds, arguments.quick, pause)
        run_all(bench, arguments.policies, not arguments.quick, save)
        failover.clean_up(stage, bench.server_id, None)
    except LabError as failed:
        error = str(failed)
        print(f"bench: {error}", file=sys.stderr)
    save()
    if bench is None:
        sys.exit(1)
    print(f"\n{bench_figures.table(bench.rows)}\n\n{bench_figures.goal_table(bench.goals())}\n\n"
          f"the figures are in {output}")
    _draw(bench, output)
    sys.exit(1 if error or bench.failures else 0)


def _draw(bench: Bench, output: Path) -> None:
    # Only here: it takes its time, and the figures are safe by now.
    from ftvm_lab import bench_plots

    for file in bench_plots.draw(bench.rows, bench_figures.pause_fit(bench.rows), output.parent, output.stem):
        print(f"a picture is in {file}")


def _chosen(arguments: argparse.Namespace) -> Sequence[Workload]:
    known = bench_work.quick() if arguments.quick else bench_work.full()
    if not arguments.workloads:
        return known
    named = {workload.name: workload for workload in bench_work.full()}
    if unknown := [name for name in arguments.workloads if name not in named]:
        raise LabError(f"no workload {', '.join(unknown)}: there are {', '.join(named)}")
    return [named[name] for name in arguments.workloads]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the essential workloads, shortly")
    parser.add_argument("--seconds", type=float,
                        help=f"of each workload, each time: {FULL_S:g}, with --quick {QUICK_S:g}")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--workloads", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--pause", type=Path, metavar="FILE", help="what bench-pause wrote; goes among the figures")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
