"""A backup goes to a host that the guest's state loads on, and whose TSC runs as the guest's does."""

import pytest

from nova_ftvm.core.kind import Abilities
from nova_ftvm.types import PairState
from tests.unit.failover_world import VM, World

TSC = 2_100_000_000
EQUAL = Abilities(kvm=True, tsc_hz=TSC, tsc_adjust=True)
WITHOUT_KVM = Abilities()
OTHER_RATE = Abilities(kvm=True, tsc_hz=2_400_000_000)
GUEST = (f"<domain type='kvm'><features><ioapic driver='qemu'/></features><cpu mode='host-model'>"
         "<feature policy='disable' name='vmx'/><feature policy='disable' name='svm'/>"
         "<feature policy='require' name='invtsc'/></cpu>"
         f"<clock offset='utc'><timer name='tsc' frequency='{TSC}'/></clock></domain>")


@pytest.fixture
def world(tmp_path):
    """hx, hy and hz; the server runs on hx, under KVM, and its TSC was promised."""
    world = World(f"sqlite:///{tmp_path}/k.sqlite", hosts=("hx", "hy", "hz"))
    world.agents.domain_xml = GUEST
    return world


def begin(world, **abilities):
    """One pass, after each host told what its KVM can; None: an old agent, which does not."""
    report = world.report

    def told(host, **changes):
        able = abilities.get(host, EQUAL)
        return report(host, **changes, **({} if able is None else {"abilities": able.told()}))

    world.report = told
    world.cloud.boot()
    world.pass_by()


def asked_for(world):
    return [hosts for _, _, hosts, *_ in world.cloud.named("create_backup")]


@pytest.mark.parametrize("other", [WITHOUT_KVM, OTHER_RATE, Abilities(kvm=True)])
def test_a_host_of_another_kind_is_passed_over(world, other):
    begin(world, hy=other)
    assert asked_for(world) == [("hz",)]


@pytest.mark.parametrize("other", [EQUAL, Abilities(kvm=True, tsc_hz=2_400_000_000, tsc_scaling=True), None])
def test_a_host_that_fits_or_does_not_tell_is_chosen(world, other):
    begin(world, hy=other)
    assert asked_for(world) == [("hy", "hz")]


def test_a_guest_under_tcg_may_go_anywhere(world):
    world.agents.domain_xml = "<domain type='qemu'/>"
    begin(world, hy=WITHOUT_KVM, hz=OTHER_RATE)
    assert asked_for(world) == [("hy", "hz")]


def test_when_no_host_of_the_kind_is_left_the_owner_reads_why_and_nothing_is_made(world):
    begin(world, hy=WITHOUT_KVM, hz=OTHER_RATE)
    state, reason = world.shown
    assert state == "unprotected"
    assert "hy cannot hold the backup: the guest runs under KVM, and KVM does not work there" in reason
    assert world.store.pair_of(VM) is None and world.cloud.backups() == [] and asked_for(world) == []


def test_a_host_that_has_learned_it_is_chosen_at_the_next_pass(world):
    begin(world, hy=WITHOUT_KVM, hz=WITHOUT_KVM)
    assert world.store.pair_of(VM) is None
    world.report = type(world).report.__get__(world)
    for host in world.hosts:
        world.report(host, abilities=EQUAL.told())
    world.manager.reconciler.all()
    world.work()
    assert asked_for(world) == [("hy", "hz")]


def test_a_host_that_loses_kvm_before_the_backup_is_asked_for_gives_the_pair_up(world):
    begin(world, hz=WITHOUT_KVM)
    pair = world.pair
    world.cloud.store.pop(pair.backup_id)
    pair = world.store.change(pair, backup_id=None)
    world.report = type(world).report.__get__(world)
    world.report("hy", abilities=WITHOUT_KVM.told())
    world.manager.follow(pair.id)
    assert world.pair.state is PairState.DISABLED and "KVM does not work there" in world.pair.reason
    assert len(asked_for(world)) == 1


def test_a_guest_whose_domain_nobody_describes_is_left_to_the_later_questions(world):
    world.agents.broken.add("describe_domain")
    begin(world, hy=WITHOUT_KVM)
    assert "does not describe" in world.shown[1] and asked_for(world) == []
