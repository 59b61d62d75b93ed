"""A database on replicated disks: its hosts die under load, and no confirmed row is lost."""

import time
from collections.abc import Iterator

import pytest
from ftvm_lab import disks, failover, recovery, survival
from ftvm_lab.command import run
from ftvm_lab.failover import Stage
from ftvm_lab.layout import compute
from ftvm_lab.ledger import Ledger, judge
from ftvm_lab.machine import Machine
from ftvm_lab.postgres import DatabaseGuest, Load
from ftvm_lab.survival import Kill
from ftvm_lab.traffic import IN_CLIENT

pytestmark = pytest.mark.timeout(900)

KILLS = 2


@pytest.fixture(autouse=True, scope="module")
def clean_cloud(stage: Stage) -> Iterator[None]:
    yield
    failover.clear(stage.layout)


@pytest.fixture(scope="module")
def kills(stage: Stage) -> list[Kill]:
    return list(survival.survive(stage, KILLS, reboot_every=KILLS))


def test_each_kill_is_survived_with_every_confirmed_row_and_whole_disks(kills: list[Kill]) -> None:
    for kill in kills:
        for found in kill.examinations:
            assert found.rows.is_clean, found.rows
            assert found.stored is not None, found.recovery
            assert found.stored.is_clean, found.stored
            assert found.is_clean, found
    assert len(kills) == KILLS


def test_the_connections_go_on_and_rows_are_confirmed_under_each_kill(kills: list[Kill]) -> None:
    assert [kill.reconnects for kill in kills] == [0] * KILLS
    assert all(kill.confirmed > 0 for kill in kills)


def test_the_database_goes_on_from_host_to_host_and_is_rebooted_at_the_end(kills: list[Kill]) -> None:
    first, second = kills
    assert second.from_host == first.to_host != second.to_host
    assert second.after_reboot is not None


# -- the check itself, on a database that really has the faults


@pytest.fixture(scope="module")
def unprotected(stage: Stage) -> str:
    """A server with the same database, alone in the cloud, that nobody protects."""
    failover.clear(stage.layout)
    server_id = stage.create("tampered", kind=survival.DATABASE)
    DatabaseGuest(stage.servers.address(server_id)).prepare(survival.BOOT_TIMEOUT_S)
    return server_id


def _tamper(address: str, statement: str) -> None:
    run([*IN_CLIENT, "psql", "-h", address, "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-c", statement])


def _copied(stage: Stage, server_id: str, ledger: Ledger) -> tuple[list[str], list[int]]:
    """The faults of the file systems, and the rows that are lost on a copy of the disks."""
    machine = Machine(stage.layout, compute(stage.servers.host(server_id)))
    with disks.copied(machine, server_id, survival.FILE_SYSTEMS) as copies:
        faults = [disks.file_system_faults(copy) for copy in copies]
        contents = recovery.recover(*copies)
    return faults, judge(ledger, contents.ids).lost


def test_a_row_that_is_lost_changed_or_there_twice_is_seen_on_the_server_and_on_its_disks(
    stage: Stage, unprotected: str
) -> None:
    address = stage.servers.address(unprotected)
    guest = DatabaseGuest(address)
    with Load(address, 1) as load:
        time.sleep(1)
        ledger = load.finish().ledger
    assert judge(ledger, guest.contents().ids).is_clean
    assert _copied(stage, unprotected, ledger) == (["", ""], [])

    _tamper(address, "delete from rows where id = 1; update rows set payload = 'x' where id = 2")
    _tamper(address, "insert into rows select * from rows where id = 3")
    contents = guest.contents()
    verdict = judge(ledger, contents.ids)
    assert (verdict.lost, verdict.twice, contents.damaged) == ([1], [3], 1)
    assert _copied(stage, unprotected, ledger) == (["", ""], [1])


def test_a_table_that_was_changed_behind_the_databases_back_is_seen(stage: Stage, unprotected: str) -> None:
    address = stage.servers.address(unprotected)
    assert DatabaseGuest(address).amcheck() == ""
    # An index that misses a row: what a lost write of one of its pages makes of it.
    _tamper(address, "update pg_index set indisready = false where indexrelid = 'rows_id'::regclass")
    _tamper(address, "insert into rows select 0, repeat(md5('0'), 8)")
    _tamper(address, "update pg_index set indisready = true where indexrelid = 'rows_id'::regclass")
    assert "rows_id" in DatabaseGuest(address).amcheck()
