"""The demo: the scenario of ftvm_lab.failover with the real client, and its figures.

Run as `python -m ftvm_lab.demo`; brings the lab up if it is down. Ends with 0
only if every run survived with nothing lost, wrong or opened again.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftvm_lab import cloud, failover, network
from ftvm_lab.command import LabError, Progress
from ftvm_lab.failover import Outcome, Stage
from ftvm_lab.layout import CLIENT, Layout
from ftvm_lab.servers import Servers

NAME = "ftvm-demo"
LINUX_RTO_MIN_MS = 200


def main() -> None:
    arguments = _parse()
    layout = Layout.from_environment()
    progress = Progress()
    outcomes: list[Outcome] = []
    error = None
    setup_s = None
    try:
        setup_s = failover.prepare(layout, progress)
        network.set_rto_min(CLIENT, arguments.rto_min)
        for outcome in _run(layout, progress, arguments.runs):
            outcomes.append(outcome)
    except LabError as failed:
        error = str(failed)
        print(f"demo: {error}", file=sys.stderr)
    _write(arguments.output, {"setup_s": setup_s, "rto_min_ms": arguments.rto_min, "error": error}, outcomes)
    print(f"the figures are in {arguments.output}")
    sys.exit(1 if error or not all(outcome.survived for outcome in outcomes) else 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--rto-min", type=int, default=LINUX_RTO_MIN_MS, metavar="MS",
                        help=f"when the clients' TCP sends again at the earliest: {LINUX_RTO_MIN_MS}, as Linux does")
    parser.add_argument("--output", type=Path, default=Path("build/demo.json"))
    return parser.parse_args()


def _run(layout: Layout, progress: Progress, runs: int) -> Iterator[Outcome]:
    stage = Stage(layout, Servers(cloud.connect(layout)), progress)
    rtt_unprotected = failover.measure_unprotected(stage, f"{NAME}-plain")
    for number in range(1, runs + 1):
        progress.step(f"run {number} of {runs}")
        protected = failover.protect(stage, f"{NAME}-{number}")
        outcome = failover.lose_host(stage, protected, rtt_unprotected)
        _tell(outcome)
        yield outcome
        failover.clean_up(stage, outcome.server, outcome.primary_host)


def _tell(outcome: Outcome) -> None:
    """One run for a person: the time line, then the figures."""
    print("\n  ms after the power failure")
    for step, moment in asdict(outcome.times).items():
        print(f"  {step:12} {'-' if moment is None else moment:>10}")
    for title, record in (("clients", outcome.traffic), ("checkpoints", outcome.checkpoints)):
        figures = ", ".join(f"{name} {value}" for name, value in asdict(record).items())
        print(f"  {title}: {figures}")
    print(f"  {'SURVIVED' if outcome.survived else 'NOT SURVIVED'}\n", flush=True)


def _write(output: Path, report: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """The worst run's fields at the top; all runs below `runs` if there are several."""
    report["survived"] = False
    if outcomes:
        worst = max(outcomes, key=_badness)
        report |= fields(worst)
        report["survived"] = worst.survived and not report["error"]
    if len(outcomes) > 1:
        report["shown_run"] = f"{outcomes.index(worst) + 1}, the worst"
        report["runs"] = [fields(outcome) for outcome in outcomes]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


def _badness(outcome: Outcome) -> tuple[bool, int, float]:
    traffic = outcome.traffic
    faults = traffic.lost + traffic.wrong + traffic.reconnects
    return (not outcome.survived, faults, traffic.longest_gap_ms)


def fields(outcome: Outcome) -> dict[str, Any]:
    """The run as demo.json shows it."""
    traffic = outcome.traffic
    return {
        "server": outcome.server,
        "primary_host": outcome.primary_host,
        "backup_host": outcome.backup_host,
        "host_after": outcome.host_after,
        "survived": outcome.survived,
        "client": {
            "connections": traffic.connections,
            "requests": traffic.requests,
            "lost": traffic.lost,
            "wrong": traffic.wrong,
            "reconnects": traffic.reconnects,
            "longest_gap_ms": traffic.longest_gap_ms,
            "rtt_ms_p50_unprotected": outcome.rtt_ms_p50_unprotected,
            "rtt_ms_p50_protected": outcome.rtt_ms_p50_protected,
        },
        "failover_ms": asdict(outcome.times),
        "checkpoints": asdict(outcome.checkpoints),
        "boot_s": outcome.boot_s,
        "protect_s": outcome.protect_s,
    }


if __name__ == "__main__":
    main()
