"""A database whose host is killed again and again under load, and what is left of its rows.

Run as `python -m ftvm_lab.survival --kills N`; brings the lab up if it is down. One protected server; the host that
it runs on is killed at random moments while clients insert, and a new backup comes by itself. After each kill, and
after the reboots between: every row whose commit was confirmed is there once, nothing else is, and tables, indexes
and file systems are whole.
It ends at the first fault, with the server left as it is, and with 0 only if there was none.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftvm_lab import cloud, computes, disks, failover, recovery
from ftvm_lab.command import LabError, Progress, wait_until
from ftvm_lab.failover import Kind, Protected, Stage
from ftvm_lab.layout import COMPUTES, Layout, compute
from ftvm_lab.ledger import Judgement, Ledger, judge
from ftvm_lab.machine import Machine
from ftvm_lab.postgres import DatabaseGuest, Load
from ftvm_lab.rows import PORT, Work
from ftvm_lab.seed import DATABASE_FLAVOR, DATABASE_IMAGE
from ftvm_lab.servers import Servers

NAME = "ftvm-database"
BOOT_TIMEOUT_S = 300.0
DATABASE = Kind(DATABASE_IMAGE, DATABASE_FLAVOR, PORT, BOOT_TIMEOUT_S)
#: Its disks with an ext4 file system, as Nova names their files.
FILE_SYSTEMS = ("disk", "disk.eph0")
#: Seconds of load before a kill: a random time between these.
BEFORE_KILL_S = (2.0, 8.0)
AFTER_KILL_S = 3.0
COPY_LOAD_S = 1.0
PROTECT_TIMEOUT_S = 300.0
HOST_TIMEOUT_S = 180.0
REBOOT_EVERY = 5
#: Of each list of ids, the report shows the first few.
SHOWN_IDS = 20


@dataclass(frozen=True, slots=True)
class Examination:
    """The server's state after a kill or a reboot; the texts are empty where nothing was wrong."""

    rows: Judgement
    damaged: int
    amcheck: str
    #: File of the disk -> what e2fsck said of a copy of it, as a power failure would leave it.
    filesystems: dict[str, str]
    #: The rows that PostgreSQL recovers from these copies; None if it could not.
    stored: Judgement | None
    #: What was wrong with that database besides.
    recovery: str

    @property
    def is_clean(self) -> bool:
        said = (self.amcheck, *self.filesystems.values())
        return self.rows.is_clean and self.is_stored and not (self.damaged or any(said))

    @property
    def is_stored(self) -> bool:
        """The database would be whole after a power failure at the moment of the copies."""
        return self.stored is not None and self.stored.is_clean and not self.recovery


@dataclass(frozen=True, slots=True)
class Kill:
    """One lost host. `reboot`: the kind that followed, if one did."""

    number: int
    from_host: str
    to_host: str
    loaded_s: float
    confirmed: int
    in_doubt: int
    reconnects: int
    last_error: str
    longest_gap_ms: float
    after_failover: Examination
    reboot: str | None
    after_reboot: Examination | None
    seconds: float

    @property
    def examinations(self) -> list[Examination]:
        return [found for found in (self.after_failover, self.after_reboot) if found is not None]

    @property
    def is_clean(self) -> bool:
        return not self.reconnects and all(found.is_clean for found in self.examinations)


class Survivor:
    """The protected server with its database, and the ledger of everything that was ever sent to it."""

    def __init__(self, stage: Stage, protected: Protected) -> None:
        self._stage = stage
        self._protected = protected
        self._ledger = Ledger()
        self._guest = DatabaseGuest(protected.before.address)
        self._reconnects = 0

    @property
    def server_id(self) -> str:
        return self._protected.before.server_id

    def lose_host(self, number: int, reboot: str | None) -> Kill:
        """Kills the server's host under load, and examines the server on its other host."""
        start = time.monotonic()
        self._reconnects = 0
        from_host, to_host = self._protected.before.host, str(self._protected.backup.compute_host)
        loaded_s = random.uniform(*BEFORE_KILL_S)
        work = self._kill_under_load(loaded_s, to_host)
        after_failover = self._examine(to_host)
        after_reboot = None
        if reboot is not None and after_failover.is_clean:
            self._reboot(reboot)
            after_reboot = self._examine(to_host)
        return Kill(
            number=number,
            from_host=from_host,
            to_host=to_host,
            loaded_s=round(loaded_s, 1),
            confirmed=sum(sent.size for sent in work.ledger.confirmed),
            in_doubt=sum(sent.size for sent in work.ledger.in_doubt),
            reconnects=self._reconnects,
            last_error=work.last_error,
            longest_gap_ms=round(work.longest_wait_s * 1000, 1),
            after_failover=after_failover,
            reboot=reboot,
            after_reboot=after_reboot,
            seconds=round(time.monotonic() - start, 1),
        )

    def _kill_under_load(self, loaded_s: float, to_host: str) -> Work:
        stage, before = self._stage, self._protected.before
        with self._load() as load:
            time.sleep(loaded_s)
            failover.check_still_protected(stage, self._protected)
            computes.kill(stage.layout, compute(before.host))
            stage.progress.step(f"{before.host} is dead")
            stage.servers.wait_for_move(before.server_id, to_host, failover.MOVE_TIMEOUT_S)
            time.sleep(AFTER_KILL_S)
            return self._enter(load.finish())

    def _load(self) -> Load:
        return Load(self._protected.before.address, self._ledger.next_id)

    def _enter(self, work: Work) -> Work:
        self._ledger.add(work.ledger)
        self._reconnects += work.reconnects
        return work

    def _examine(self, host: str) -> Examination:
        """The copies are taken under load. What was confirmed before must be on them; what comes meanwhile may be."""
        machine = Machine(self._stage.layout, compute(host))
        with self._load() as load:
            time.sleep(COPY_LOAD_S)
            confirmed = list(self._ledger.confirmed)
            with disks.copied(machine, self.server_id, FILE_SYSTEMS) as copies:
                work = self._enter(load.finish())
                faults = {copy.stem: disks.file_system_faults(copy) for copy in copies}
                on_copies = Ledger(confirmed, self._ledger.in_doubt + work.ledger.confirmed)
                stored, fault = _recovered(copies, on_copies)
        contents = self._guest.contents()
        return Examination(
            rows=judge(self._ledger, contents.ids),
            damaged=contents.damaged,
            amcheck=self._guest.amcheck(),
            filesystems=faults,
            stored=stored,
            recovery=fault,
        )

    def _reboot(self, kind: str) -> None:
        self._stage.openstack(["server", "reboot", f"--{kind}", "--wait", self.server_id])
        self._guest.prepare(BOOT_TIMEOUT_S)
        self._stage.progress.step(f"the database is back after a {kind} reboot")

    def protect_again(self) -> None:
        """Gives the dead host its power back, and waits for the new backup, wherever it was made."""
        stage, dead = self._stage, self._protected.before.host
        start = time.monotonic()
        computes.power_on(stage.layout, compute(dead))
        names = {node.name for node in COMPUTES}
        usable = cloud.usable_hosts
        wait_until(f"{dead} to be up in Nova", lambda: usable(stage.servers.connection) >= names, HOST_TIMEOUT_S)
        failover.wait_for_protection(stage, self.server_id, PROTECT_TIMEOUT_S)
        self._protected = replace(
            self._protected,
            before=stage.place(self.server_id),
            backup=stage.servers.wait_for_backup(self.server_id, PROTECT_TIMEOUT_S),
            protect_s=time.monotonic() - start,
        )

    def delete(self) -> None:
        """After a kill: a clean cloud, with all its hosts."""
        failover.clean_up(self._stage, self.server_id, self._protected.before.host)


def _recovered(copies: Sequence[Path], ledger: Ledger) -> tuple[Judgement | None, str]:
    """The rows on the copies, and what else is wrong there."""
    try:
        contents = recovery.recover(*copies)
    except LabError as failed:
        return None, str(failed)
    return judge(ledger, contents.ids), f"{contents.damaged} rows are damaged" if contents.damaged else ""


def survive(stage: Stage, kills: int, reboot_every: int) -> Iterator[Kill]:
    """Creates the server, and kills its hosts; ends after the first kill that was not clean."""
    protected = failover.protect(stage, NAME, DATABASE)
    DatabaseGuest(protected.before.address).prepare(BOOT_TIMEOUT_S)
    survivor = Survivor(stage, protected)
    for number, reboot in enumerate(reboots(kills, reboot_every), 1):
        if number > 1:
            survivor.protect_again()
        kill = survivor.lose_host(number, reboot)
        yield kill
        if not kill.is_clean:
            return
    survivor.delete()


def reboots(kills: int, every: int) -> list[str | None]:
    """For each kill, the reboot after it: every so many and the last one, hard and soft in turn."""
    kinds = iter(("hard", "soft") * kills)
    return [next(kinds) if number % every == 0 or number == kills else None for number in range(1, kills + 1)]


def report(kills: Sequence[Kill], wanted: int, error: str | None) -> dict[str, Any]:
    """As survival.json shows it."""
    found = [examination for kill in kills for examination in kill.examinations]
    return {
        "survived": not error and len(kills) == wanted and all(kill.is_clean for kill in kills),
        "error": error,
        "kills": len(kills),
        "rows": {
            "confirmed": found[-1].rows.confirmed if found else 0,
            "lost": _most(len(one.rows.lost) for one in found),
            "twice": _most(len(one.rows.twice) for one in found),
            "unknown": _most(len(one.rows.unknown) for one in found),
            "torn": _most(len(one.rows.torn) for one in found),
            "damaged": _most(one.damaged for one in found),
        },
        "in_doubt": sum(kill.in_doubt for kill in kills),
        "reconnects": sum(kill.reconnects for kill in kills),
        "longest_gap_ms": max((kill.longest_gap_ms for kill in kills), default=0.0),
        "examinations": len(found),
        "unclean_filesystems": sum(bool(said) for one in found for said in one.filesystems.values()),
        "unclean_recoveries": sum(not one.is_stored for one in found),
        "unclean_amchecks": sum(bool(one.amcheck) for one in found),
        "reboots": sum(kill.after_reboot is not None for kill in kills),
        "runs": [_shown(asdict(kill)) for kill in kills],
    }


def _most(counts: Iterator[int]) -> int:
    """Each examination is of all rows: a fault would be counted again in the later ones."""
    return max(counts, default=0)


def _shown(value: Any) -> Any:
    """The record with its lists cut."""
    if isinstance(value, dict):
        return {name: _shown(part) for name, part in value.items()}
    return value[:SHOWN_IDS] if isinstance(value, list) else value


def main() -> None:
    arguments = _parse()
    progress = Progress()
    kills: list[Kill] = []
    error = None
    try:
        layout = Layout.from_environment()
        failover.prepare(layout, progress)
        stage = Stage(layout, Servers(cloud.connect(layout)), progress)
        for kill in survive(stage, arguments.kills, arguments.reboot_every):
            kills.append(kill)
            _tell(kill, arguments.kills, progress)
            _write(arguments.output, report(kills, arguments.kills, error))
    except LabError as failed:
        error = str(failed)
        print(f"survival: {error}", file=sys.stderr)
    result = report(kills, arguments.kills, error)
    _write(arguments.output, result)
    print(f"{'SURVIVED' if result['survived'] else 'NOT SURVIVED'}; the figures are in {arguments.output}")
    sys.exit(0 if result["survived"] else 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--reboot-every", type=int, default=REBOOT_EVERY, help="kills between two reboots")
    parser.add_argument("--output", type=Path, default=Path("build/survival.json"))
    return parser.parse_args()


def _tell(kill: Kill, wanted: int, progress: Progress) -> None:
    rows = kill.examinations[-1].rows
    progress.step(
        f"kill {kill.number} of {wanted}: {kill.from_host} -> {kill.to_host}, {kill.confirmed} rows,"
        f" {rows.confirmed} in all, lost {len(rows.lost)}, reconnects {kill.reconnects},"
        f" longest gap {kill.longest_gap_ms:.0f} ms, reboot {kill.reboot},"
        f" {'clean' if kill.is_clean else 'NOT CLEAN'}, {kill.seconds} s"
    )


def _write(output: Path, result: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
