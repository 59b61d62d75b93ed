"""The database's check must see every fault: ledgers, servers and disks with faults on purpose prove it."""

import asyncio
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ftvm_lab import disks, survival
from ftvm_lab.ledger import Judgement, Ledger, Transaction, judge
from ftvm_lab.rows import Pace, Work, insert_until, transactions
from ftvm_lab.survival import Examination, Kill

FAST = Pace(think_s=0.0, silence_s=0.2, grace_s=0.2)
FAULTY_INSERT = 5
CONNECTIONS = 3

# -- the ledger


def ledger() -> Ledger:
    """Rows 1 to 6 are confirmed, 7 to 9 are in doubt."""
    return Ledger([Transaction(1, 2), Transaction(3, 1), Transaction(4, 3)], [Transaction(7, 3)])


def test_a_database_with_the_confirmed_rows_is_clean_with_and_without_those_in_doubt() -> None:
    for in_doubt in ([], [7, 8, 9]):
        verdict = judge(ledger(), [1, 2, 3, 4, 5, 6, *in_doubt])
        assert verdict.is_clean
        assert verdict.confirmed == 6


CLEAN = Judgement(confirmed=6, lost=[], twice=[], unknown=[], torn=[])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([1, 2, 3, 4, 6], replace(CLEAN, lost=[5])),
        ([1, 2, 3, 4, 5, 6, 6], replace(CLEAN, twice=[6])),
        ([1, 2, 3, 4, 5, 6, 10], replace(CLEAN, unknown=[10])),
        ([1, 2, 3, 4, 5, 6, 8], replace(CLEAN, torn=[7, 8, 9])),
    ],
)
def test_each_kind_of_fault_is_seen_alone(found: list[int], expected: Judgement) -> None:
    assert judge(ledger(), found) == expected
    assert not expected.is_clean


def test_a_row_in_doubt_that_is_there_twice_is_a_fault() -> None:
    assert judge(ledger(), [1, 2, 3, 4, 5, 6, 7, 7, 8, 9]).twice == [7]


def test_the_next_id_is_behind_all_that_was_ever_sent() -> None:
    assert Ledger().next_id == 1
    assert ledger().next_id == 10
    both = ledger()
    both.add(Ledger([Transaction(10, 2)]))
    assert both.next_id == 12


# -- the clients


class FakeDatabase:
    """A server that confirms everything. One for all connections: `stored` is its table."""

    def __init__(self) -> None:
        self.stored: list[int] = []
        self.inserts = 0

    async def insert(self, transaction: Transaction) -> None:
        self.inserts += 1
        await self.answer(transaction, self.inserts)

    async def answer(self, transaction: Transaction, number: int) -> None:
        await asyncio.sleep(0)
        self.stored += transaction.ids

    async def close(self) -> None:
        pass


class LosesARow(FakeDatabase):
    """Confirms a transaction, and stores all of it but one row."""

    async def answer(self, transaction: Transaction, number: int) -> None:
        await super().answer(transaction, number)
        if number == FAULTY_INSERT:
            self.stored.pop()


class HangsUpBeforeTheCommit(FakeDatabase):
    async def answer(self, transaction: Transaction, number: int) -> None:
        if number == FAULTY_INSERT:
            raise ConnectionResetError
        await super().answer(transaction, number)


class HangsUpAfterTheCommit(FakeDatabase):
    async def answer(self, transaction: Transaction, number: int) -> None:
        await super().answer(transaction, number)
        if number == FAULTY_INSERT:
            raise ConnectionResetError


class NeverAnswers(FakeDatabase):
    """From some insert on."""

    async def answer(self, transaction: Transaction, number: int) -> None:
        if number >= FAULTY_INSERT:
            await asyncio.Event().wait()
        await super().answer(transaction, number)


def work_of(database: FakeDatabase, pace: Pace = FAST) -> Work:
    async def run() -> Work:
        async def open_one() -> FakeDatabase:
            return database

        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, stop.set)
        return await insert_until(stop, open_one, 1, CONNECTIONS, pace)

    return asyncio.run(run())


def sent(work: Work) -> list[int]:
    return sorted(row for part in (work.ledger.confirmed, work.ledger.in_doubt) for one in part for row in one.ids)


def test_a_faithful_server_has_every_row_and_no_connection_is_opened_again() -> None:
    database = FakeDatabase()
    work = work_of(database)
    assert work.reconnects == 0
    assert work.ledger.in_doubt == []
    assert len(work.ledger.confirmed) > FAULTY_INSERT
    assert judge(work.ledger, database.stored).is_clean


def test_no_id_is_sent_twice_by_all_connections_together() -> None:
    ids = sent(work_of(FakeDatabase()))
    assert ids == list(range(1, len(ids) + 1))


def test_a_confirmed_row_that_is_not_stored_is_lost() -> None:
    database = LosesARow()
    verdict = judge(work_of(database).ledger, database.stored)
    assert len(verdict.lost) == 1
    assert not verdict.is_clean


@pytest.mark.parametrize("make", [HangsUpBeforeTheCommit, HangsUpAfterTheCommit])
def test_a_broken_connection_leaves_its_rows_in_doubt_and_is_counted(make: Callable[[], FakeDatabase]) -> None:
    database = make()
    work = work_of(database)
    assert len(work.ledger.in_doubt) == work.reconnects == 1
    assert "ConnectionResetError" in work.last_error
    assert judge(work.ledger, database.stored).is_clean


def test_an_answer_that_never_comes_is_in_doubt_and_ends_the_connection() -> None:
    work = work_of(NeverAnswers(), replace(FAST, silence_s=0.05))
    assert work.reconnects >= CONNECTIONS
    assert len(work.ledger.in_doubt) >= work.reconnects
    assert len(work.ledger.confirmed) == FAULTY_INSERT - 1


def test_what_is_unanswered_at_the_end_is_in_doubt_and_counts_as_waiting() -> None:
    work = work_of(NeverAnswers(), replace(FAST, silence_s=30.0))
    assert work.reconnects == 0
    assert len(work.ledger.in_doubt) == CONNECTIONS
    assert work.longest_wait_s >= FAST.grace_s


def test_transactions_follow_each_other_without_a_gap() -> None:
    plan = transactions(10)
    first, second = next(plan), next(plan)
    assert first.first == 10
    assert second.first == first.first + first.size


# -- the file systems


@pytest.fixture
def image(tmp_path: Path) -> Path:
    files = tmp_path / "files"
    files.mkdir()
    (files / "table").write_bytes(b"x" * 100_000)
    made = tmp_path / "image"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", files, made, "16M"], check=True)
    return made


def test_a_whole_file_system_has_no_faults(image: Path) -> None:
    assert disks.file_system_faults(image) == ""


def test_a_file_whose_blocks_are_free_is_a_fault(image: Path) -> None:
    subprocess.run(["debugfs", "-w", "-R", "freei <12>", image], check=True, capture_output=True)
    assert disks.file_system_faults(image)


def test_a_disk_without_a_file_system_is_a_fault(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(bytes(1 << 20))
    assert "journal" in disks.file_system_faults(empty)


# -- the report

EXAMINED = Examination(rows=CLEAN, damaged=0, amcheck="", filesystems={"disk": ""}, stored=CLEAN, recovery="")
KILL = Kill(
    number=1,
    from_host="compute1",
    to_host="compute2",
    loaded_s=2.0,
    confirmed=100,
    in_doubt=0,
    reconnects=0,
    last_error="",
    longest_gap_ms=500.0,
    after_failover=EXAMINED,
    reboot="hard",
    after_reboot=EXAMINED,
    seconds=40.0,
)
FAULTS = {
    "a lost row": replace(EXAMINED, rows=replace(CLEAN, lost=[7])),
    "a damaged row": replace(EXAMINED, damaged=1),
    "a broken index": replace(EXAMINED, amcheck="heap tuple lacks matching index tuple"),
    "a broken file system": replace(EXAMINED, filesystems={"disk": "", "disk.eph0": "i_blocks is 1, should be 2"}),
    "a row that is not on the disk": replace(EXAMINED, stored=replace(CLEAN, lost=[7])),
    "a database that cannot be recovered": replace(EXAMINED, stored=None, recovery="PANIC"),
    "a damaged row on the disk": replace(EXAMINED, recovery="1 rows are damaged"),
}


def test_kills_without_a_fault_have_survived() -> None:
    result = survival.report([KILL, KILL], 2, None)
    assert result["survived"]
    assert (result["kills"], result["reboots"], result["examinations"]) == (2, 2, 4)


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_in_one_examination_is_no_survival(fault: str) -> None:
    for kill in (replace(KILL, after_failover=FAULTS[fault]), replace(KILL, after_reboot=FAULTS[fault])):
        assert not kill.is_clean
        assert not survival.report([KILL, kill], 2, None)["survived"]


def test_a_connection_that_was_opened_again_is_no_survival() -> None:
    assert not survival.report([replace(KILL, reconnects=1)], 1, None)["survived"]


def test_fewer_kills_than_asked_for_or_an_error_are_no_survival() -> None:
    assert not survival.report([KILL], 2, None)["survived"]
    assert not survival.report([], 0, "the lab is not up")["survived"]


def test_a_lost_row_is_counted_once_however_often_it_is_missed() -> None:
    lost = replace(KILL, after_failover=FAULTS["a lost row"], after_reboot=FAULTS["a lost row"])
    assert survival.report([lost], 1, None)["rows"]["lost"] == 1


def test_the_server_is_rebooted_every_so_often_and_at_the_end() -> None:
    assert survival.reboots(7, 3) == [None, None, "hard", None, None, "soft", "hard"]
    assert survival.reboots(1, 5) == ["hard"]
