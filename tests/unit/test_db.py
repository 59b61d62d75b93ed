"""The tables and the compare-and-set."""

import dataclasses
import json
import sys
import threading

import pytest
import sqlalchemy
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from nova_ftvm.cmd import manage
from nova_ftvm.core.kind import Abilities
from nova_ftvm.db import connect
from nova_ftvm.db.records import Engine, Host, Refusal
from nova_ftvm.db.schema import Base
from nova_ftvm.db.store import Store
from nova_ftvm.exception import LostRace, PairNotFound
from nova_ftvm.types import PairId, PairState
from tests.unit.test_arbiter import pair_in


@pytest.fixture
def engine(tmp_path):
    engine = connect.engine_for(f"sqlite:///{tmp_path}/sub/d.sqlite")
    connect.sync(engine)
    return engine


@pytest.fixture
def store(engine):
    return Store(engine)


def test_the_migrations_make_the_tables_that_the_code_uses(engine):
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_syncing_again_changes_nothing(engine):
    assert connect.sync(engine) == connect.newest() == connect.version(engine)


def test_an_older_releases_pairs_are_kept(tmp_path):
    engine = connect.engine_for(f"sqlite:///{tmp_path}/old.sqlite")
    settings = connect._alembic()
    with engine.begin() as connection:
        settings.attributes["connection"] = connection
        command.upgrade(settings, "0001")
    pair = pair_in(progress=40)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(
            "INSERT INTO pairs VALUES (:id, :instance_id, :project_id, NULL, :primary_host, :backup_host, :generation,"
            " 'protected', '', :active_host, :active_since, '', :token, '{}', 40, 0, 0, 0, 0, 0, NULL, 0)"),
            {name: getattr(pair, name) for name in ("id", "instance_id", "project_id", "primary_host", "backup_host",
                                                    "generation", "active_host", "active_since", "token")})
        connection.execute(sqlalchemy.text("INSERT INTO hosts VALUES ('hx', 1, '', 'a', 5.0, '[]', 0, 0.0)"))
    connect.sync(engine)
    store = Store(engine)
    assert store.hosts() == {"hx": Host("hx", True, "", "a", 5.0)} and store.host("hx") == store.hosts()["hx"]
    assert store.pair(pair.id) == pair
    assert store.change(pair, progress=40.25).progress == store.pair(pair.id).progress == 40.25
    assert {index["name"] for index in sqlalchemy.inspect(engine).get_indexes("pairs")} == {"ix_pairs_backup_id"}


def test_an_empty_database_has_no_version(tmp_path):
    assert connect.version(connect.engine_for(f"sqlite:///{tmp_path}/e.sqlite")) == ""


def test_a_pair_comes_back_as_it_was_written(store):
    added = store.add(pair_in(timeline={"granted_at": 1795380846.762921}, backup_id="b", progress=42.37,
                              refused={"hy": Refusal(5.5, "its disks are shared")}))
    assert store.pair(added.id) == store.pair_of(added.instance_id) == store.pair_of_backup("b") == added
    assert store.pairs() == store.pairs([added.id]) == [added]
    assert store.pairs([]) == [] == store.pairs_in(PairState.SYNCING)
    assert store.pairs_in(PairState.SYNCING, PairState.PROTECTED) == [added]


def test_a_server_has_one_pair(store):
    store.add(pair_in())
    with pytest.raises(LostRace):
        store.add(pair_in(id=PairId("q")))
    assert len(store.pairs()) == 1


@pytest.mark.parametrize("stale", [{"generation": 4}, {"state": PairState.SYNCING}])
def test_a_change_of_what_is_not_there_any_more_writes_nothing(store, stale):
    pair = store.add(pair_in())
    with pytest.raises(LostRace):
        store.change(dataclasses.replace(pair, **stale), step="x")
    assert store.pair(pair.id) == pair


def test_a_change_to_the_same_values_still_counts(store):
    pair = store.add(pair_in())
    assert store.change(pair, step=pair.step).step == pair.step


def test_moved_at_tells_the_last_change_of_state_only(engine):
    times = iter([1.0, 2.0, 3.0])
    store = Store(engine, lambda: next(times))
    pair = store.change(store.add(pair_in()), step="x")
    assert (pair.moved_at, pair.updated_at) == (1.0, 2.0)
    pair = store.change(pair, state=PairState.DISABLED)
    assert (pair.moved_at, pair.updated_at) == (3.0, 3.0)
    assert store.pair(pair.id) == pair


def test_a_forgotten_pair_is_not_found(store):
    pair = store.add(pair_in())
    store.forget(pair)
    with pytest.raises(PairNotFound):
        store.pair(pair.id)
    with pytest.raises(LostRace):
        store.forget(pair)


def test_of_many_writers_one_wins(tmp_path, store):
    pair = store.add(pair_in())
    won = []
    start = threading.Barrier(8)

    def write(number):
        mine = Store(connect.engine_for(f"sqlite:///{tmp_path}/sub/d.sqlite"))
        start.wait()
        try:
            mine.change(pair, generation=pair.generation + 1, step=str(number))
            won.append(number)
        except LostRace:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1 and store.pair(pair.id).step == str(won[0])


def test_a_claim_keeps_others_out_until_it_ends(engine):
    now = [0.0]
    store = Store(engine, lambda: now[0])
    pair = store.add(pair_in())
    assert store.claim(pair.id, "a", 10) and store.claim(pair.id, "a", 10)
    assert not store.claim(pair.id, "b", 10)
    store.release(pair.id, "b")
    assert not store.claim(pair.id, "b", 10)
    now[0] = 11.0
    assert store.claim(pair.id, "b", 10)
    store.release(pair.id, "b")
    assert store.claim(pair.id, "a", 10)


def test_a_host_keeps_what_was_said_of_it(store):
    host = Host("hx", True, "", "10.0.0.1", 5.0, (Engine("p", "primary", 1, "running"),),
                abilities=Abilities(kvm=True, tsc_hz=2_100_000_000))
    store.report(host)
    store.report(host)
    assert store.hosts() == {"hx": host}
    store.mark_forced_down("hx", True)
    assert store.hosts()["hx"].forced_down_by_us


def run_manage(monkeypatch, tmp_path, *arguments):
    config = tmp_path / "m.conf"
    config.write_text(f"[database]\nconnection = sqlite:///{tmp_path}/sub/d.sqlite\n")
    monkeypatch.setattr(manage.log, "setup", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["nova-ftvm-manage", "--config-file", str(config), *arguments])
    return manage.main()


def test_manage_shows_a_pair_without_its_token(monkeypatch, tmp_path, store, capsys):
    pair = store.add(pair_in(timeline={"running_at": 2.5}, token="very-secret"))
    assert run_manage(monkeypatch, tmp_path, "pair", "show", pair.instance_id, "--json") == 0
    written = capsys.readouterr().out
    shown = json.loads(written)
    assert "very-secret" not in written
    assert shown["state"] == "protected" and shown["timeline"] == {"running_at": 2.5}
    assert {"backup_id", "primary_host", "backup_host", "reason", "generation"} <= set(shown)
    assert run_manage(monkeypatch, tmp_path, "pair", "show", pair.instance_id) == 0
    assert run_manage(monkeypatch, tmp_path, "pair", "list") == 0
    assert "very-secret" not in capsys.readouterr().out


def test_manage_says_when_there_is_no_pair(monkeypatch, tmp_path, store, capsys):
    assert run_manage(monkeypatch, tmp_path, "pair", "show", "nobody") == 1
    assert "no pair" in capsys.readouterr().err


def test_manage_syncs_and_tells_the_version(monkeypatch, tmp_path, capsys):
    assert run_manage(monkeypatch, tmp_path, "db", "version") == 0
    assert capsys.readouterr().out.strip() == "none"
    assert run_manage(monkeypatch, tmp_path, "db", "sync") == 0
    assert capsys.readouterr().out.strip() == connect.newest()
