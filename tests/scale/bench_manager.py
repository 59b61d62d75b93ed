"""What the failover manager costs a pair, and how fast it grants when many hosts die at once.

    python -m tests.scale.bench_manager [--pairs 250 500 1000 2000] [--output FILE]

The manager's own process with its defaults, on a MariaDB and a RabbitMQ of its own; the agents are simulated, but their
calls are real, and so are the manager's requests to an OpenStack of fixed answers (cloud_api.py). For each number of
pairs: a quiet time in which all agents report. For the last one also the death of ten hosts with 200 primaries and 200
backups: 200 requests to promote and 200 to go on alone come at one moment; then Nova follows.
"""

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from nova_ftvm.db import connect
from nova_ftvm.db.records import Pair
from nova_ftvm.db.store import Store
from nova_ftvm.types import Generation, InstanceId, PairId, PairState
from tests.scale import services
from tests.scale.cloud_api import TENANT
from tests.scale.population import Member, dying, hosts_of, members
from tests.scale.services import Daemon

#: Processes of the fleet: the requests of one would wait for each other.
SHARES = 3
SETTLE_S = 8.0
Figures = dict[str, Any]


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


class Shares:
    """The fleet's processes."""

    def __init__(self, folder: Path, pairs: int) -> None:
        self._daemons = [Daemon(f"fleet{share}", [
            *services.python("tests.scale.fleet"), str(folder), str(pairs), str(share), str(SHARES)], folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE) for share in range(SHARES)]
        for daemon in self._daemons:
            self._heard(daemon)

    def order(self, do: str, **arguments: Any) -> list[Any]:
        """All get it before the first one's answer is awaited."""
        line = json.dumps({"do": do, **arguments}).encode() + b"\n"
        for daemon in self._daemons:
            assert daemon.process.stdin is not None
            daemon.process.stdin.write(line)
            daemon.process.stdin.flush()
        return [self._heard(daemon) for daemon in self._daemons]

    @staticmethod
    def _heard(daemon: Daemon) -> Any:
        assert daemon.process.stdout is not None
        line = daemon.process.stdout.readline()
        if not line:
            raise SystemExit(f"the fleet ended: {daemon.log.read_text()[-2000:]}")
        return json.loads(line)

    def stop(self) -> None:
        for daemon in self._daemons:
            daemon.stop()


class Stage:
    """All the processes, and the tables, for one number of pairs."""

    def __init__(self, folder: Path, database: str, population: Sequence[Member], base: dict[str, Daemon],
                 options: Sequence[str]) -> None:
        self.population = list(population)
        self.engine = connect.engine_for(database)
        self._fill()
        pairs = str(len(population))
        self.cloud = Daemon("cloud", [*services.python("tests.scale.cloud_api"), str(folder), pairs], folder)
        services.wait_for("the cloud", lambda: services.listens(services.CLOUD_PORT))
        self.manager = services.manager(folder, database, options)
        self.daemons = {"manager": self.manager, **base}
        self.fleet = Shares(folder, len(population))

    def _fill(self) -> None:
        with self.engine.begin() as connection:
            for table in ("pairs", "hosts", "alembic_version"):
                connection.execute(sa.text(f"drop table if exists {table}"))
        connect.sync(self.engine)
        store = Store(self.engine)
        for member in self.population:
            store.add(Pair(
                id=PairId(member.pair_id), instance_id=InstanceId(member.instance_id), project_id=TENANT,
                primary_host=member.primary_host, generation=Generation(1), state=PairState.PROTECTED,
                active_host=member.primary_host, active_since=Generation(1), token="t" * 64,
                backup_id=member.backup_id, backup_host=member.backup_host, progress=100.0))

    def questions(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.execute(sa.text("show global status like 'Questions'")).one()[1])

    def cpu_s(self) -> dict[str, float]:
        return {name: daemon.cpu_s() for name, daemon in self.daemons.items()}

    def close(self) -> None:
        self.fleet.stop()
        self.manager.stop()
        self.cloud.stop()
        self.engine.dispose()


@contextlib.contextmanager
def staged(folder: Path, database: str, pairs: int, base: dict[str, Daemon],
           arguments: argparse.Namespace) -> Iterator[Stage]:
    inner = folder / str(pairs)
    inner.mkdir()
    stage = Stage(inner, database, members(pairs), base, arguments.set)
    try:
        yield stage
    finally:
        stage.close()
        if arguments.logs is not None:
            _keep(inner, arguments.logs)


@contextlib.contextmanager
def profiled(stage: Stage, py_spy: str | None, output: Path) -> Iterator[None]:
    """Where the manager spends its time, if asked for: py-spy's collapsed stacks. It costs a little itself."""
    if py_spy is None:
        yield
        return
    spy = subprocess.Popen([py_spy, "record", "--format", "raw", "--gil", "--nonblocking", "--duration", "1000",
                            "--output", str(output), "--pid", str(stage.manager.process.pid)],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        spy.send_signal(2)
        spy.wait(30)


def quiet(stage: Stage, seconds: float) -> Figures:
    """All agents report, nothing happens."""
    stage.fleet.order("measure")
    questions, before, start = stage.questions(), stage.cpu_s(), time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - start
    after, asked = stage.cpu_s(), stage.questions() - questions
    heard = stage.fleet.order("collect")
    latencies = [found for one in heard for found in one["latencies_ms"]]
    pairs = len(stage.population)
    cpu = {name: (after[name] - before[name]) / took for name in after}
    return {
        "pairs": pairs, "hosts": len(hosts_of(stage.population)), "seconds": round(took, 1),
        "reports_per_s": round(len(latencies) / took, 1), "reports_failed": sum(one["failed"] for one in heard),
        "manager_cpu_ms_per_s": round(cpu["manager"] * 1000, 1),
        "manager_cpu_us_per_pair_s": round(cpu["manager"] / pairs * 1e6, 1),
        "database_cpu_us_per_pair_s": round(cpu["mariadb"] / pairs * 1e6, 1),
        "broker_cpu_us_per_pair_s": round(cpu["rabbitmq"] / pairs * 1e6, 1),
        "statements_per_pair_s": round(asked / took / pairs, 3),
        "report_ms_p50": round(quantile(latencies, 0.5), 2), "report_ms_p99": round(quantile(latencies, 0.99), 2),
        "manager_rss_mib": round(stage.manager.rss_mib(), 1),
    }


def mass_failover(stage: Stage, limit_s: float) -> Figures:
    """Ten hosts die; their 200 backups and the 200 primaries whose backups they held ask at one moment."""
    dead = dying(stage.population)
    stage.fleet.order("measure")
    before, died_at, start = stage.cpu_s(), time.time(), time.monotonic()
    stage.fleet.order("die", hosts=dead)
    answers = stage.fleet.order("ask")
    asked = {kind: [found for one in answers for found in one[kind]] for kind in ("promote", "degrade")}
    first = min(found["start"] for ones in asked.values() for found in ones)
    figures: Figures = {"hosts": len(dead)}
    for kind, ones in asked.items():
        latencies = [found["ms"] for found in ones]
        figures[kind] = {
            "asked": len(ones), "granted": sum(found["granted"] for found in ones),
            "unanswered_calls": sum(found["again"] for found in ones),
            "last_after_ms": round((max(found["end"] for found in ones) - first) * 1000, 1),
            "ms_p50": quantile(latencies, 0.5), "ms_p99": quantile(latencies, 0.99)}
    figures["grants_cpu_s"] = round(stage.manager.cpu_s() - before["manager"], 2)
    figures["catch_up"] = _catch_up(stage, dead, died_at, limit_s)
    figures["cpu_s"] = {name: round(value - before[name], 2) for name, value in stage.cpu_s().items()}
    figures["seconds"] = round(time.monotonic() - start, 1)
    heard = stage.fleet.order("collect")
    latencies = [found for one in heard for found in one["latencies_ms"]]
    figures["report_ms_p50"], figures["report_ms_p99"] = (
        round(quantile(latencies, share), 2) for share in (0.5, 0.99))
    figures["reports_failed"] = sum(one["failed"] for one in heard)
    return figures


def _catch_up(stage: Stage, dead: Sequence[str], died_at: float, limit_s: float) -> Figures:
    """Until Nova has every server where its guest runs, and nothing is left to be done for those without a backup."""
    store = Store(stage.engine)
    promoted = {member.pair_id for member in stage.population if member.primary_host in dead}
    end = time.monotonic() + limit_s
    tidy_s = None
    while True:
        pairs = store.pairs_in(PairState.PROMOTING, PairState.DEGRADED)
        done = [pair.timeline["nova_done_at"] - died_at for pair in pairs
                if pair.id in promoted and "nova_done_at" in pair.timeline]
        if tidy_s is None and all(not pair.step for pair in pairs if pair.id not in promoted):
            tidy_s = round(time.time() - died_at, 1)
        if (len(done) == len(promoted) and tidy_s is not None) or time.monotonic() > end:
            break
        time.sleep(0.5)
    return {"followed": len(done), "of": len(promoted), "first_s": round(min(done, default=0.0), 1),
            "p50_s": round(quantile(done, 0.5), 1), "last_s": round(max(done, default=0.0), 1),
            "lost_backups_tidied_s": tidy_s}


COLUMNS = (("pairs", "pairs"), ("hosts", "hosts"), ("reports_per_s", "reports/s"),
           ("manager_cpu_ms_per_s", "manager ms/s"), ("manager_cpu_us_per_pair_s", "us/pair/s"),
           ("database_cpu_us_per_pair_s", "MariaDB us/pair/s"), ("broker_cpu_us_per_pair_s", "RabbitMQ us/pair/s"),
           ("statements_per_pair_s", "statements/pair/s"), ("report_ms_p50", "report p50 ms"),
           ("report_ms_p99", "p99 ms"), ("manager_rss_mib", "manager MiB"))


def table(rows: Sequence[Figures]) -> str:
    heads = [title for _, title in COLUMNS]
    lines = ["  ".join(heads)]
    lines += ["  ".join(f"{row[name]:>{len(title)}}" for name, title in COLUMNS) for row in rows]
    return "\n".join(lines)


def ratios(rows: Sequence[Figures]) -> Figures:
    """The largest number of pairs over the smallest one: 1 is flat, less is better than that."""
    small, large = rows[0], rows[-1]
    return {name: round(large[name] / small[name], 2) for name in (
        "manager_cpu_us_per_pair_s", "database_cpu_us_per_pair_s", "broker_cpu_us_per_pair_s",
        "statements_per_pair_s", "report_ms_p50", "report_ms_p99") if small[name]}


def main() -> None:
    arguments = _parse()
    services.in_namespaces("tests.scale.bench_manager")
    report: Figures = {"quiet": [], "mass_failover": None}
    with tempfile.TemporaryDirectory(prefix="ftvm-scale-", dir="/var/tmp") as name:
        folder = Path(name)
        database, url = services.mariadb(folder)
        base = {"mariadb": database, "rabbitmq": services.rabbitmq(folder)}
        try:
            for pairs in sorted(arguments.pairs):
                with staged(folder, url, pairs, base, arguments) as stage:
                    profile = arguments.output.with_suffix(f".{pairs}.stacks")
                    time.sleep(SETTLE_S)
                    with profiled(stage, arguments.profile, profile):
                        report["quiet"].append(quiet(stage, arguments.seconds))
                    print(table(report["quiet"][-1:]), flush=True)
                    if pairs == max(arguments.pairs) and dying(stage.population):
                        with profiled(stage, arguments.profile, profile.with_suffix(".failover.stacks")):
                            report["mass_failover"] = mass_failover(stage, arguments.limit)
        finally:
            for daemon in base.values():
                daemon.stop()
    report["ratios"] = ratios(report["quiet"])
    report["processors"] = os.cpu_count()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{table(report['quiet'])}\n\nlargest over smallest: {json.dumps(report['ratios'])}")
    print(f"mass failover: {json.dumps(report['mass_failover'], indent=2)}\nthe figures are in {arguments.output}")


def _keep(folder: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for log in (*folder.glob("*.out"), *folder.glob("*.log")):
        (target / f"{folder.name}-{log.name}").write_bytes(log.read_bytes())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--seconds", type=float, default=25.0, help="of each quiet time")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that Nova's following is watched for")
    parser.add_argument("--output", type=Path, default=Path("build/bench-manager.json"))
    parser.add_argument("--profile", metavar="PY_SPY", help="the program py-spy: stacks go beside the output")
    parser.add_argument("--set", action="append", default=[], metavar="GROUP.OPTION=VALUE",
                        help="another setting of the manager than its default")
    parser.add_argument("--logs", type=Path, help="keeps the processes' logs in this directory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
