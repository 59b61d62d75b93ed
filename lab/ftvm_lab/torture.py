"""A black-box check, in the way of Jepsen: clients use a register in a protected guest while its cloud is harmed.

Run as `python -m ftvm_lab.torture --minutes N`; brings the lab up if it is down. What the clients saw must be what one
register would have answered, whatever happened: a write that was confirmed and is gone, a value of the past, or two
guests that both speak are violations. The seed that is printed gives the same faults in the same order again.

Ends with 0 only if there was no violation and the server recovered from every fault. Otherwise the server is left as
it is, and the history beside the output file.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftvm_lab import cloud, failover, linear, nemesis
from ftvm_lab.command import LabError, Progress
from ftvm_lab.failover import Stage
from ftvm_lab.faults import Fault, Side
from ftvm_lab.history import Follower, History, Kind, Wait
from ftvm_lab.layout import Layout
from ftvm_lab.linear import Violation
from ftvm_lab.nemesis import Nemesis, Planned, Struck, Watch
from ftvm_lab.register import PORT, Report
from ftvm_lab.seed import IMAGE
from ftvm_lab.servers import Servers
from ftvm_lab.traffic import ClientProgram

NAME = "ftvm-torture"
REGISTER = failover.Kind(IMAGE, "ftvm.demo", PORT, failover.BOOT_TIMEOUT_S)
#: The clients' work before the first fault and after the last one.
CALM_S = 3.0
#: Of the operations of a violation, the report and the screen show so many at most.
SHOWN_OPERATIONS = 40
#: The gaps of the times in which nothing was at fault go by this name.
NO_FAULT = "none"


class Clients(ClientProgram):
    """The clients of the register at work."""

    def __init__(self, address: str, history: Path, seed: int) -> None:
        super().__init__("ftvm_lab.register", address, "--history", str(history), "--seed", str(seed))

    def finish(self) -> Report:
        return Report(**self.end())


@dataclass(slots=True)
class Run:
    """Everything that is known of a torture; grows while it lasts."""

    seed: int
    minutes: float
    history: History = field(default_factory=History)
    struck: list[Struck] = field(default_factory=list)
    clients: Report | None = None
    violations: list[Violation] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None

    @property
    def faults_of_answers(self) -> list[str]:
        """What the clients saw that is wrong whatever the history says."""
        if self.clients is None:
            return []
        again = [f"the guest was started again: boots {self.clients.boots}"] if len(self.clients.boots) > 1 else []
        return again + self.clients.wrong

    @property
    def violation_count(self) -> int:
        return len(self.violations) + len(self.faults_of_answers)

    @property
    def passed(self) -> bool:
        is_whole = self.error is None and self.clients is not None
        return is_whole and not self.violation_count and all(one.is_recovered for one in self.struck)

    def gap(self, struck: Struck) -> Wait | None:
        """The longest time that a client waited for a reply, from the strike until all was as before."""
        return self.history.longest_wait(struck.start_s, struck.end_s)

    def gaps_ms(self) -> dict[str, float | None]:
        """The longest by the side at fault; None for a side that was not."""
        longest: dict[str, float | None] = {side.name.lower(): None for side in Side}
        for one in self.struck:
            side = one.fault.side.name.lower()
            longest[side] = max(longest[side] or 0.0, _ms(self.gap(one)))
        between = zip(self.struck, self.struck[1:], strict=False)
        calm = [_ms(self.history.longest_whole_wait(before.end_s, after.start_s)) for before, after in between]
        longest[NO_FAULT] = max(calm, default=None)
        return longest


def _ms(wait: Wait | None) -> float:
    return 0.0 if wait is None else round(wait.seconds * 1000, 1)


def torture(stage: Stage, chosen: Sequence[Fault], run: Run, path: Path) -> Iterator[Struck]:
    """Creates the server, and does harm until the time is over or a fault is not recovered from; fills `run`."""
    protected = failover.protect(stage, NAME, REGISTER)
    server_id, address = protected.before.server_id, protected.before.address
    start = time.monotonic()
    follower = Follower(path)
    run.history = follower.history
    try:
        with Clients(address, path, run.seed) as clients, Watch(stage.layout, server_id) as watch:
            time.sleep(CALM_S)
            wreaker = Nemesis(stage.layout, server_id, stage.servers, watch)
            for number, planned in enumerate(nemesis.plan(chosen, run.seed), 1):
                if time.monotonic() - start >= run.minutes * 60:
                    break
                _announce(stage, number, planned)
                run.struck.append(wreaker.strike(number, planned))
                follower.catch_up()
                run.seconds = round(time.monotonic() - start, 1)
                yield run.struck[-1]
                if not run.struck[-1].is_recovered:
                    break
            time.sleep(CALM_S)
            run.clients = clients.finish()
            stage.progress.step("the clients have read all keys again; is what they saw one register?")
    finally:
        run.seconds = round(time.monotonic() - start, 1)
        run.violations = list(linear.violations(follower.catch_up().operations.values()))
    if run.passed:
        stage.servers.delete(server_id)
        stage.servers.wait_until_clean(failover.CLEAN_TIMEOUT_S)


def _announce(stage: Stage, number: int, planned: Planned) -> None:
    stage.progress.step(f"fault {number}: {planned.fault.name}, in {planned.quiet_s:.1f} s for {planned.lasts_s:.1f} s")


def report(run: Run) -> dict[str, Any]:
    """As torture.json shows it."""
    operations = run.history.operations.values()
    kinds = Counter(one.kind for one in operations)
    gaps = run.gaps_ms()
    return {
        "passed": run.passed,
        "error": run.error,
        "seed": run.seed,
        "minutes": run.minutes,
        "seconds": run.seconds,
        "operations": len(operations),
        "unknown": len(run.history.unknown),
        "kinds": {kind: kinds[kind] for kind in Kind},
        "keys": run.clients.keys if run.clients else 0,
        "reconnects": run.clients.reconnects if run.clients else 0,
        "violations": run.violation_count,
        "violating": [
            *({"what": text} for text in run.faults_of_answers),
            *({"what": f"key {one.key}", "operations": _shown(one)} for one in run.violations),
        ],
        "faults": len(run.struck),
        "failovers": sum(one.failed_over for one in run.struck),
        "not_recovered": sum(not one.is_recovered for one in run.struck),
        "backup_fault_gap_ms_max": gaps["backup"],
        "gap_ms_max": gaps,
        "struck": [_told(run, one) for one in run.struck],
    }


def _shown(violation: Violation) -> list[str]:
    return [str(one) for one in violation.witness[:SHOWN_OPERATIONS]]


def _told(run: Run, one: Struck) -> dict[str, Any]:
    gap = run.gap(one)
    return {
        "number": one.number,
        "name": one.fault.name,
        "side": one.fault.side,
        "what": one.fault.what,
        "primary": one.scene.primary.name,
        "backup": one.scene.backup.name,
        "primary_after": one.host_after,
        "backup_after": one.backup_after,
        "failed_over": one.failed_over,
        "lasted_s": round(one.lasted_s, 1),
        "protected_after_s": _rounded(one.protected_after_s),
        "hosts_back_after_s": _rounded(one.hosts_back_after_s),
        "longest_gap_ms": _ms(gap),
        "longest_gap_at_s": None if gap is None else round(gap.start_s - one.start_s, 2),
        "unknown": len(run.history.unknown_within(one.start_s, one.end_s)),
        "states": one.states,
        "recovered": one.is_recovered,
        "trouble": one.trouble,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def tell(run: Run, one: Struck, progress: Progress) -> None:
    told = _told(run, one)
    where = f"{told['primary']} -> {told['primary_after']}" if one.failed_over else told["primary"]
    progress.step(
        f"fault {one.number}: {one.fault.name} ({one.fault.side}) on {where}, longest gap {told['longest_gap_ms']} ms"
        f" (at {told['longest_gap_at_s']} s),"
        f" protected after {told['protected_after_s']} s, hosts back after {told['hosts_back_after_s']} s,"
        f" {' > '.join(one.states)}{''.join(f'; TROUBLE: {text}' for text in one.trouble)}"
    )


def tell_verdict(run: Run, progress: Progress) -> None:
    shown = report(run)
    for found in shown["violating"]:
        print(f"VIOLATION: {found['what']}", *found.get("operations", ()), sep="\n  ", flush=True)
    progress.step(
        f"{'PASSED' if run.passed else 'NOT PASSED'}: {shown['operations']} operations ({shown['unknown']} unknown),"
        f" {shown['faults']} faults ({shown['failovers']} failovers, {shown['not_recovered']} not recovered),"
        f" {shown['violations']} violations; longest gaps in ms: {shown['gap_ms_max']}; seed {run.seed}"
    )


def main() -> None:
    arguments = _parse()
    progress = Progress()
    run = Run(arguments.seed, arguments.minutes)
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_suffix(".history.jsonl")
    path.unlink(missing_ok=True)
    try:
        chosen = nemesis.choose(arguments.faults)
        progress.step(f"seed {run.seed}, {run.minutes} minutes, {len(chosen)} kinds of faults")
        layout = Layout.from_environment()
        failover.prepare(layout, progress)
        stage = Stage(layout, Servers(cloud.connect(layout)), progress)
        for struck in torture(stage, chosen, run, path):
            tell(run, struck, progress)
            _write(output, report(run))
    except LabError as failed:
        run.error = str(failed)
        print(f"torture: {run.error}", file=sys.stderr)
    _write(output, report(run))
    tell_verdict(run, progress)
    if run.passed:
        path.unlink(missing_ok=True)
    else:
        print(f"the history is in {path}")
    print(f"the figures are in {output}")
    sys.exit(0 if run.passed else 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--output", type=Path, default=Path("build/torture.json"))
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--faults", type=_names, default=[], help="names, with commas; all if not given")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _write(output: Path, result: dict[str, Any]) -> None:
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
