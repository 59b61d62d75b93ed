"""A database guest as its clients see it: everything goes over the network, from the client namespace."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from ftvm_lab.command import CommandFailed, LabError, run, wait_until
from ftvm_lab.ledger import Ledger, Transaction
from ftvm_lab.rows import Contents, Work
from ftvm_lab.traffic import IN_CLIENT, ClientProgram

READ_TIMEOUT_S = 180
AMCHECK_TIMEOUT_S = 300


class Load(ClientProgram):
    """The inserting clients at work."""

    def __init__(self, address: str, first_id: int) -> None:
        super().__init__("ftvm_lab.rows", "insert", address, "--first-id", str(first_id))

    def finish(self) -> Work:
        report = self.end()
        ledger = Ledger(**{name: [Transaction(*sent) for sent in rows] for name, rows in report["ledger"].items()})
        return Work(**{**report, "ledger": ledger})


@dataclass(frozen=True, slots=True)
class DatabaseGuest:
    address: str

    def prepare(self, timeout_s: float) -> None:
        """Waits until the database answers, and makes the table if it is not there."""

        def prepared() -> bool:
            try:
                self._rows("prepare")
            except LabError:
                return False
            return True

        wait_until(f"the database at {self.address}", prepared, timeout_s, every_s=1.0)

    def contents(self) -> Contents:
        return Contents(**json.loads(self._rows("read")))

    def _rows(self, command: str) -> str:
        argv = [*IN_CLIENT, sys.executable, "-m", "ftvm_lab.rows", command, self.address]
        return run(argv, timeout_s=READ_TIMEOUT_S)

    def amcheck(self) -> str:
        """What pg_amcheck finds wrong with tables and indexes, the system's too; '' for nothing."""
        argv = [*IN_CLIENT, _amcheck_program(), "--heapallindexed", "--parent-check"]
        try:
            return run([*argv, "-h", self.address, "-U", "postgres", "postgres"], timeout_s=AMCHECK_TIMEOUT_S)
        except CommandFailed as failed:
            return failed.output or str(failed)


def _amcheck_program() -> str:
    """Debian keeps it out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_amcheck"))
    if not found:
        raise LabError("no pg_amcheck on this machine: make setup")
    return str(found[-1])
