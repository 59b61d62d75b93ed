"""Whatever fails, no client of a protected server loses a reply, and the protection comes back by itself.

One server bears all faults, one after the other, each at a random moment of its clients' work.
"""

import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest
from ftvm_lab import cloud, control, failover, faults, leftovers, pairs
from ftvm_lab.blocks import PORT as BLOCKS_PORT
from ftvm_lab.blocks import Blocks, Extent, sum_of
from ftvm_lab.client import Report
from ftvm_lab.command import LabError, wait_until
from ftvm_lab.failover import Stage
from ftvm_lab.faults import FAULTS, Fault, Scene
from ftvm_lab.ftvm_settings import MANAGERS
from ftvm_lab.layout import COMPUTES, CONTROL, compute
from ftvm_lab.machine import Machine
from ftvm_lab.pairs import Pair
from ftvm_lab.strikes import ensure, mend
from ftvm_lab.traffic import Traffic, wait_for_guest
from openstack.exceptions import SDKException

from tests.system.claims import CLAIMS, GAP_MS, Claim, Fate

pytestmark = [pytest.mark.trial, pytest.mark.timeout(420)]

#: Seconds of traffic before a strike: a random time between these.
BEFORE_S = (0.5, 1.5)
#: It must stay so, with traffic, at the end.
AFTER_S = 4.0
#: How long the protection may take to come back while the fault lasts, and once it is healed.
BACK_S = 40.0
HEALED_S = 120.0
CLEAN_S = 90.0
#: Two services, of which one is away as long as an operator needs to start it again.
LASTS_S = {"mariadb-down": 60.0}


@dataclass(slots=True)
class Story:
    """The server that bears it all."""

    stage: Stage
    id: str
    address: str
    chance: random.Random

    @property
    def scene(self) -> Scene:
        return faults.scene_of(self.stage.layout, self.id)

    @property
    def pair(self) -> Pair:
        return pairs.pair(self.stage.layout, self.id)

    def domain_state(self, host: str) -> str:
        return Machine(self.stage.layout, compute(host)).call(["virsh", "domstate", self.id]).strip()

    def in_order(self) -> bool:
        """Every host can be used, and has what belongs there, nothing else."""
        found = self.pair
        sides = (found.primary_host, found.backup_host)
        expected = {node.name: leftovers.OF_A_SIDE if node.name in sides else [] for node in COMPUTES}
        usable = cloud.usable_hosts(self.stage.servers.connection)
        return leftovers.on_hosts(self.stage.layout) == expected and usable >= set(expected)

    def wait_for_order(self) -> None:
        try:
            wait_until("the lab in order", self.in_order, CLEAN_S, every_s=1.0)
        except LabError:
            usable = cloud.usable_hosts(self.stage.servers.connection)
            pytest.fail(f"{self.pair}; on the hosts: {leftovers.on_hosts(self.stage.layout)}; usable: {usable}")


@dataclass(slots=True)
class Watch:
    """What the server shows, from a strike on."""

    story: Story
    struck: float = field(default_factory=time.monotonic)
    #: Each state with its reason, once, in the order in which they came.
    shown: list[tuple[str, str]] = field(default_factory=list)
    #: Seconds after the strike: when it was protected again, having not been.
    back_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.struck

    def until(self, over: Callable[[], bool]) -> None:
        while not over():
            # Nova cannot be asked while its database or its broker is away.
            with suppress(SDKException):
                self._look()
            time.sleep(0.3)

    def _look(self) -> None:
        seen = self.story.stage.servers.protection(self.story.id)
        if not self.shown or self.shown[-1] != seen:
            self.shown.append(seen)
        states = [state for state, _ in self.shown]
        if self.back_s is None and states[-1] == "protected" and set(states) - {"protected"}:
            self.back_s = self.elapsed_s


@dataclass(frozen=True, slots=True)
class Borne:
    """How it went."""

    scene: Scene
    before: Pair
    after: Pair
    watch: Watch
    #: Did the protection come back while the fault still lasted?
    unhealed: bool
    traffic: Report

    def tell(self, name: str) -> str:
        back = "" if self.watch.back_s is None else f" after {self.watch.back_s:.1f} s"
        states = " -> ".join(f"{state} ({reason})" if reason else state for state, reason in self.watch.shown)
        return (
            f"FAULT {name}: longest gap {self.traffic.longest_gap_ms:.0f} ms, {self.before.primary_host} ->"
            f" {self.after.primary_host}, backup {self.before.backup_host} -> {self.after.backup_host},"
            f" protected{back}{' unhealed' if self.unhealed else ''}, generation {self.before.generation} ->"
            f" {self.after.generation}; {states}"
        )


@pytest.fixture(scope="module")
def story(stage: Stage) -> Iterator[Story]:
    seed = random.randrange(1 << 32)
    stage.progress.step(f"the faults strike at random moments, seed {seed}")
    before = failover.protect(stage, "patient").before
    wait_for_guest(before.address, failover.BOOT_TIMEOUT_S, BLOCKS_PORT)
    yield Story(stage, before.server_id, before.address, random.Random(seed))
    failover.clear(stage.layout)


@pytest.fixture(autouse=True)
def protected(story: Story) -> Iterator[None]:
    """Before each fault, also after one that was borne badly."""
    if not story.in_order():
        for node in (CONTROL, *COMPUTES):
            mend(story.stage.layout, node)
        story.wait_for_order()
    yield


def bear(story: Story, fault: Fault, fate: Fate, lasts_s: float) -> Borne:
    """Strikes, watches, heals, and waits until all is as it was."""
    stage, scene, before = story.stage, story.scene, story.pair

    def is_back() -> bool:
        return fate is Fate.UNTOUCHED or watch.back_s is not None

    with Traffic(story.address) as traffic:
        time.sleep(story.chance.uniform(*BEFORE_S))
        watch = Watch(story)
        heal = fault.strike(scene)
        try:
            watch.until(lambda: watch.elapsed_s > lasts_s and (is_back() or watch.elapsed_s > BACK_S))
            unhealed = watch.back_s is not None
        finally:
            heal()
        healed = watch.elapsed_s
        watch.until(lambda: is_back() or watch.elapsed_s > healed + HEALED_S)
        settled = watch.elapsed_s
        watch.until(lambda: watch.elapsed_s > settled + AFTER_S)
        report = traffic.finish()
    after = failover.wait_for_protection(stage, story.id, HEALED_S)
    borne = Borne(scene, before, after, watch, unhealed, report)
    stage.progress.step(borne.tell(fault.name))
    return borne


def judge(story: Story, borne: Borne, claim: Claim) -> None:
    traffic, watch = borne.traffic, borne.watch
    assert (traffic.lost, traffic.wrong, traffic.reconnects) == (0, 0, 0), traffic
    assert traffic.requests > traffic.connections
    assert borne.after.primary_host in _hosts_after(borne.scene, claim.fate)
    if claim.fate is Fate.UNTOUCHED:
        assert {state for state, _ in watch.shown} == {"protected"}, watch.shown
        assert replace(borne.after, reason="") == replace(borne.before, reason="")
    else:
        assert watch.back_s is not None and borne.after.generation > borne.before.generation
        assert any(re.search(claim.reason, reason) for _, reason in watch.shown), watch.shown
    assert story.domain_state(borne.after.primary_host) == "running"
    story.wait_for_order()
    assert traffic.longest_gap_ms < GAP_MS


def _hosts_after(scene: Scene, fate: Fate) -> set[str]:
    stays, moves = {scene.primary.name}, {scene.backup.name}
    return {Fate.MOVED: moves, Fate.EITHER: stays | moves}.get(fate, stays)


@pytest.mark.parametrize("name", CLAIMS)
def test_the_guest_goes_on_and_is_protected_again(story: Story, name: str) -> None:
    fault, claim = FAULTS[name], CLAIMS[name]
    judge(story, bear(story, fault, claim.fate, LASTS_S.get(name, fault.lasts_s[0])), claim)


# -- faults that need more than a strike


@pytest.mark.parametrize("name", ["data-link-flapping", "data-link-squeezed"])
def test_a_bad_link_costs_the_backup_or_nothing(story: Story, name: str) -> None:
    """Whether an epoch is late enough to lose the backup is chance; that no client waits for long is not."""
    borne = bear(story, FAULTS[name], Fate.UNTOUCHED, FAULTS[name].lasts_s[0])
    changed = borne.after.generation > borne.before.generation
    judge_bad_link(story, borne, changed)


def judge_bad_link(story: Story, borne: Borne, changed: bool) -> None:
    traffic = borne.traffic
    assert (traffic.lost, traffic.wrong, traffic.reconnects) == (0, 0, 0), traffic
    assert borne.after.primary_host in _hosts_after(borne.scene, Fate.EITHER if changed else Fate.UNTOUCHED)
    story.wait_for_order()
    assert traffic.longest_gap_ms < GAP_MS


@pytest.mark.parametrize(("name", "reason"), [("backup-disk-full", "No space left"), ("backup-memory-full", "")])
def test_a_backup_without_room_for_what_the_guest_writes_is_lost_and_no_write_is(
    story: Story, name: str, reason: str
) -> None:
    """What it writes to a disk takes room on the backup's, and as its page cache in the standby's memory."""
    blocks = Blocks(story.address)
    written = Extent("vda", 200 << 10, 32 << 10)

    def strike(scene: Scene) -> Callable[[], None]:
        heal = FAULTS[name].strike(scene)
        # Beside the watch, which must not miss what the server shows meanwhile.
        filled = writer.submit(blocks.fill, written, name)

        def end() -> None:
            heal()
            filled.result()

        return end

    fault = replace(FAULTS[name], strike=strike)
    with ThreadPoolExecutor(1) as writer:
        borne = bear(story, fault, Fate.ALONE, fault.lasts_s[0])
    judge(story, borne, Claim(Fate.ALONE, f"no backup: .*{reason}"))
    assert blocks.sum(written) == sum_of(name, written.size)


def test_without_an_arbiter_a_cut_link_promotes_nobody_and_loses_nothing(story: Story) -> None:
    stage, scene, before = story.stage, story.scene, story.pair
    with Traffic(story.address) as traffic:
        time.sleep(story.chance.uniform(*BEFORE_S))
        bring_arbiter = FAULTS["manager-killed"].strike(scene)
        mend_link = FAULTS["data-link-cut"].strike(scene)
        try:
            watch = Watch(story)
            watch.until(lambda: watch.elapsed_s > 5.0)
            assert story.pair == before
            assert story.domain_state(scene.primary.name) == "running"
            assert story.domain_state(scene.backup.name) == "paused"
            bring_arbiter()
            watch.until(lambda: watch.back_s is not None or watch.elapsed_s > BACK_S)
        finally:
            bring_arbiter()
            mend_link()
        after = failover.wait_for_protection(stage, story.id, HEALED_S)
        report = traffic.finish()
    stage.progress.step(Borne(scene, before, after, watch, True, report).tell("no arbiter, and the data link cut"))
    assert (report.lost, report.wrong, report.reconnects) == (0, 0, 0), report
    assert after.primary_host in (scene.primary.name, scene.backup.name)
    story.wait_for_order()
    # The output was held: that is the price of not knowing.
    assert report.longest_gap_ms > 5000


def test_two_managers_at_work_make_one_backup(story: Story) -> None:
    machine = Machine(story.stage.layout, CONTROL)
    first, second = MANAGERS
    control.start(machine, second)
    try:
        fault = FAULTS["backup-qemu-killed"]
        judge(story, bear(story, fault, Fate.ALONE, 0.0), CLAIMS[fault.name])
        fault = FAULTS["primary-qemu-killed"]
        judge(story, bear(story, fault, Fate.MOVED, 0.0), CLAIMS[fault.name])
    finally:
        ensure(machine, first)
        machine.stop(second)


# -- the end


def test_the_loss_of_both_hosts_needs_a_hand_and_only_to_start_the_server(story: Story) -> None:
    stage, scene = story.stage, story.scene
    heal = FAULTS["both-hosts-killed"].strike(scene)
    try:
        time.sleep(FAULTS["both-hosts-killed"].lasts_s[0])
    finally:
        heal()
    server = wait_until("the server to be known as down", lambda: _stopped(story), CLEAN_S)
    assert server == "SHUTOFF"
    stage.progress.step(f"both hosts lost: {stage.servers.protection(story.id)}")
    stage.openstack(["server", "start", story.id])
    after = failover.wait_for_protection(stage, story.id, HEALED_S)
    stage.progress.step(f"both hosts lost, the server started: {after}")
    wait_for_guest(story.address, failover.BOOT_TIMEOUT_S)
    story.wait_for_order()


def _stopped(story: Story) -> str:
    status = str(story.stage.servers.get(story.id).status)
    return status if status in ("SHUTOFF", "ERROR") else ""


def test_nothing_is_left_when_the_server_is_deleted(story: Story) -> None:
    stage = story.stage
    stage.servers.delete(story.id)
    stage.servers.wait_until_clean(failover.CLEAN_TIMEOUT_S)
    wait_until("hosts with nothing on them", lambda: not any(leftovers.on_hosts(stage.layout).values()), CLEAN_S)
    assert leftovers.in_cloud(stage.servers.connection) == []
