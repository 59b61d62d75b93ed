"""Lost time: counted (core/losttime.py), written (engine/stats.py), passed on, and shown among a pair's figures."""

import itertools
import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from nova_ftvm.cmd import manage
from nova_ftvm.core.losttime import WINDOW_S, Figures, GuestClock, LostTime
from nova_ftvm.db import connect
from nova_ftvm.db.records import Engine, Host
from nova_ftvm.db.store import Store
from nova_ftvm.engine.capture import Checkpoint
from nova_ftvm.engine.stats import EpochLog, Stage
from nova_ftvm.exception import QemuError
from nova_ftvm.host import guestclock
from nova_ftvm.host.control import ControlServer
from tests.unit.engine_fakes import Clock
from tests.unit.failover_world import World
from tests.unit.test_agent import Host as ComputeHost
from tests.unit.test_arbiter import pair_in

SAID = {"checkpoints": 7, "paused_s": 0.5, "paused_percent": 2.5, "clock": "stands in pauses"}


# Counted


def lose(lost: LostTime, since: float, until: float, share: float) -> float:
    """Ten pauses a second; asked once a second, as the engine does. Returns the last share."""
    told = 0.0
    for tenth in range(int(since * 10), int(until * 10)):
        lost.on_pause((tenth + 1) / 10, share / 10)
        if tenth % 10 == 9:
            told = lost.share((tenth + 1) / 10)
    return told


def test_the_share_is_of_the_last_minute_and_the_sum_of_all_time() -> None:
    lost = LostTime()
    assert lost.share(5.0) == 0.0
    assert lose(lost, 100, 110, 0.2) == pytest.approx(0.2, rel=0.02), "of the time since the first pause"
    lose(lost, 110, 300, 0.1)
    assert lost.share(300.0) == pytest.approx(0.1)
    assert lose(lost, 300, 330, 0.3) == pytest.approx(0.2, rel=0.05)
    assert lost.paused_s == pytest.approx(2 + 19 + 9)
    assert len(lost._marks) < WINDOW_S + 5, "what is older is forgotten"


def test_lost_time_is_news_once_and_again_when_it_has_doubled() -> None:
    lost, news = LostTime(), []
    for since, share in ((0, 0.02), (200, 0.03), (400, 0.005), (600, 0.02), (800, 0.045), (1000, 0.5)):
        for second in range(since, since + 200):
            told = lose(lost, second, second + 1, share)
            if lost.is_news(second + 1.0, told):
                news.append((second, round(told, 3)))
    assert [since // 200 for since, _ in news] == [0, 4, 5, 5, 5], "a share that falls, or grows by half, is none"
    assert all(later >= 2 * earlier for (_, earlier), (_, later) in itertools.pairwise(news))
    assert news[0][0] >= WINDOW_S - 1, "not before a whole minute is known"


def test_a_little_lost_time_is_no_news() -> None:
    lost = LostTime()
    assert not lost.is_news(0.0, 0.5)
    for second in range(300):
        assert not lost.is_news(second + 1.0, lose(lost, second, second + 1, 0.009))


# Written and told by the engine


class Log:
    """An EpochLog, a checkpoint each `period_s` of the test's clock."""

    def __init__(self, folder: Path, guest_clock: GuestClock) -> None:
        self.clock, self.told = Clock(), []
        self.path = folder / "epochs.jsonl"
        self.log = EpochLog(str(self.path), self.clock, guest_clock, self.told.append)

    def run(self, seconds: float, pause_s: float, period_s: float = 0.1, excess_s: float = 0.0) -> list[dict[str, Any]]:
        for _ in range(round(seconds / period_s)):
            self.log.began()
            self.log.mark(Stage.REST)
            checkpoint = Checkpoint(excess_s=excess_s)
            checkpoint.stopped_us, checkpoint.resumed_us = 1, 1 + round(pause_s * 1e6)
            self.clock.now += period_s
            self.log.shipped(checkpoint, 0)
            self.log.committed()
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def test_a_seconds_line_tells_the_share_of_its_pauses(tmp_path: Path) -> None:
    rows = Log(tmp_path, GuestClock.GOES_ON).run(10, pause_s=0.005)
    assert len(rows) >= 9 and all(row["paused_percent"] == pytest.approx(5.0, rel=0.01) for row in rows)


@pytest.mark.parametrize(("guest_clock", "percent"), [
    (GuestClock.STANDS, 6.0), (GuestClock.UNKNOWN, 6.0), (GuestClock.GOES_ON, 5.0)])
def test_a_clock_that_stands_is_counted_by_what_it_lost_and_another_by_its_pauses(
        tmp_path: Path, guest_clock: GuestClock, percent: float) -> None:
    log = Log(tmp_path, guest_clock)
    rows = log.run(10, pause_s=0.005, excess_s=0.001)
    assert all(row["paused_percent"] == pytest.approx(percent, rel=0.01) for row in rows)
    assert log.told[-1].paused_percent == pytest.approx(percent, rel=0.02)
    assert {*rows[-1]["pause_ms"]} == {5.0} and {*rows[-1]["excess_ms"]} == {1.0}


def test_figures_are_told_once_a_second_and_not_by_each_checkpoint(tmp_path: Path) -> None:
    log = Log(tmp_path, GuestClock.STANDS)
    log.run(10, pause_s=0.005, period_s=0.01)
    assert 9 <= len(log.told) <= 11
    last = log.told[-1]
    assert last.clock == "stands in pauses" and last.paused_percent == pytest.approx(50, rel=0.02)
    assert last.paused_s == pytest.approx(0.005 * last.checkpoints)


def test_a_guest_whose_clock_stands_is_warned_of_once_with_what_to_do(tmp_path: Path,
                                                                     caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Log(tmp_path, GuestClock.STANDS).run(180, pause_s=0.005)
    (record,) = caplog.records
    for word in ("5.0 % of the last minute", "max_pause_percent", "invtsc", "NTP"):
        assert word in record.getMessage()


@pytest.mark.parametrize("guest_clock", [GuestClock.GOES_ON, GuestClock.UNKNOWN])
def test_a_guest_whose_clock_goes_on_is_not_warned_of(tmp_path: Path, guest_clock: GuestClock,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Log(tmp_path, guest_clock).run(180, pause_s=0.03)
    assert caplog.records == []


# Which clock


class Monitor:
    """Answers as QEMU does."""

    def __init__(self, kvm: bool, invariant: dict[str, bool | None]) -> None:
        self._kvm, self._invariant = kvm, invariant

    def command(self, command: str, **arguments: Any) -> Any:
        if command == "query-kvm":
            return {"enabled": self._kvm, "present": True}
        if command == "query-cpus-fast":
            return [{"qom-path": path, "thread-id": 1} for path in self._invariant]
        assert (command, arguments["property"]) == ("qom-get", "invtsc")
        found = self._invariant[arguments["path"]]
        if found is None:
            raise QemuError(command, "Property 'host-arm-cpu.invtsc' not found")
        return found


@pytest.mark.parametrize(("kvm", "invariant", "clock"), [
    (False, {"/a": True}, GuestClock.STANDS), (True, {"/a": True, "/b": True}, GuestClock.GOES_ON),
    (True, {"/a": True, "/b": False}, GuestClock.STANDS), (True, {"/a": None}, GuestClock.UNKNOWN)])
def test_a_clock_goes_on_where_kvm_gives_every_processor_an_invariant_tsc(
        kvm: bool, invariant: dict[str, bool | None], clock: GuestClock) -> None:
    assert guestclock.of(Monitor(kvm, invariant)) is clock


# Passed on


def lines(agent: socket.socket) -> list[dict[str, Any]]:
    return [json.loads(line) for line in agent.recv(1 << 16).splitlines()]


def test_figures_are_no_state_that_the_next_agent_is_told(tmp_path: Path) -> None:
    control = ControlServer(str(tmp_path / "c.ctl"), {"role": "primary"})
    try:
        control.report("protected")
        seen = []
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as agent:
                agent.connect(str(tmp_path / "c.ctl"))
                control.orders()
                control.tell("figures", **SAID)
                seen.append([line["event"] for line in lines(agent)])
        assert seen == [["hello", "protected", "figures"]] * 2
    finally:
        control.close()


def test_figures_go_with_the_sign_of_life_and_are_no_state() -> None:
    host = ComputeHost()
    primary, _ = host.primary(), host.backup()
    primary.say("protected")
    before = len(host.manager.asked)
    primary.say("figures", **SAID)
    assert len(host.manager.asked) == before, "no call of its own"
    host.agent.report()
    listed = {engine["role"]: engine for engine in host.manager.calls[-1][1][1]["engines"]}
    assert listed["primary"]["state"] == "protected" and listed["primary"]["figures"] == SAID
    assert "figures" not in listed["backup"]


def test_the_manager_keeps_figures_and_takes_reports_without_or_with_odd_ones(tmp_path: Path) -> None:
    world = World(f"sqlite:///{tmp_path}/f.sqlite", repair=False)
    world.protect()
    engine = {"pair_id": world.pair.id, "instance_id": "x", "role": "primary", "generation": 1, "state": "protected"}
    kept = []
    for figures in ({}, {"figures": SAID}, {"figures": {"checkpoints": "many"}}, {"figures": None},
                    {"figures": SAID | {"of a newer release": 1}}):
        assert world.report("hx", engines=[engine | figures]) == []
        kept.append(world.store.host("hx").engines[0].figures)
    assert kept == [None, Figures(**SAID), None, None, Figures(**SAID)]


# Shown


def show(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    config = folder / "m.conf"
    config.write_text(f"[database]\nconnection = sqlite:///{folder}/d.sqlite\n")
    monkeypatch.setattr(manage.log, "setup", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["nova-ftvm-manage", "--config-file", str(config), "pair", "show", *arguments])
    return manage.main()


def test_a_pairs_figures_are_its_primary_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    engine = connect.engine_for(f"sqlite:///{tmp_path}/d.sqlite")
    connect.sync(engine)
    store, pair = Store(engine), pair_in()
    store.add(pair)

    def shown() -> Any:
        assert show(monkeypatch, tmp_path, pair.instance_id, "--json") == 0
        return json.loads(capsys.readouterr().out)["figures"]

    def report(role: str, generation: int, figures: Figures | None, host: str = pair.active_host) -> None:
        store.report(Host(host, True, reported_at=5.0, engines=(
            Engine("another", "primary", 1, "", Figures(1, 1.0, 1.0)),
            Engine(pair.id, role, generation, "protected", figures))))

    assert shown() is None, "its host has never reported"
    report("primary", pair.generation, None)
    assert shown() is None, "an older agent"
    report("backup", pair.generation, Figures(**SAID))
    assert shown() is None
    report("primary", pair.generation + 1, Figures(**SAID))
    assert shown() is None, "of another generation"
    report("primary", pair.generation, Figures(**SAID))
    assert shown() == SAID | {"reported_at": 5.0}
    assert show(monkeypatch, tmp_path, pair.instance_id) == 0
    text = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {name: text[f"figures.{name}"] for name in SAID} == {name: str(fact) for name, fact in SAID.items()}


def test_a_row_without_figures_is_as_older_managers_read_it(tmp_path: Path) -> None:
    engine = connect.engine_for(f"sqlite:///{tmp_path}/d.sqlite")
    connect.sync(engine)
    store = Store(engine)
    store.report(Host("hx", True, engines=(Engine("p", "primary", 1, "protected"),)))
    with engine.connect() as connection:
        (row,) = connection.exec_driver_sql("SELECT engines FROM hosts").scalars()
    assert json.loads(row) == [{"pair_id": "p", "role": "primary", "generation": 1, "state": "protected"}]
