"""core/kind.py: which host can take over which guest."""

import pytest

from nova_ftvm.core.kind import Abilities, Needs, misfit

TSC = 2_100_000_000
KVM_HOST = Abilities(kvm=True, tsc_hz=TSC, tsc_adjust=True)


@pytest.mark.parametrize("abilities", [None, Abilities(), KVM_HOST])
def test_a_guest_under_tcg_runs_on_every_host(abilities):
    assert misfit(Needs(), abilities) == ""


def test_a_guest_under_kvm_does_not_load_where_kvm_does_not_work():
    assert misfit(Needs(kvm=True), KVM_HOST) == ""
    assert "KVM does not work there" in misfit(Needs(kvm=True), Abilities())


@pytest.mark.parametrize(("abilities", "says"), [
    (KVM_HOST, ""),
    (Abilities(kvm=True, tsc_hz=TSC + 500_000), ""),
    (Abilities(kvm=True, tsc_hz=TSC - 500_000), ""),
    (Abilities(kvm=True, tsc_hz=TSC + 600_000), "2100.0 MHz, that host's at 2100.6 MHz"),
    (Abilities(kvm=True, tsc_hz=2 * TSC), "use hosts with processors of one kind"),
    (Abilities(kvm=True, tsc_hz=2 * TSC, tsc_scaling=True), ""),
    (Abilities(kvm=True, tsc_scaling=True), "no clock there"),
])
def test_a_promised_tsc_runs_on_a_host_of_its_rate_or_one_that_scales(abilities, says):
    why = misfit(Needs(kvm=True, tsc_hz=TSC), abilities)
    assert says in why and bool(says) == bool(why)
    assert misfit(Needs(kvm=True), abilities) == ""


def test_a_host_whose_agent_does_not_tell_is_taken_as_it_was_before():
    assert Abilities.read(None) is None
    assert misfit(Needs(kvm=True, tsc_hz=TSC), None) == ""


@pytest.mark.parametrize("abilities", [Abilities(), KVM_HOST, Abilities(kvm=True, tsc_hz=1, tsc_scaling=True)])
def test_what_a_host_tells_is_read_as_it_was_meant(abilities):
    assert Abilities.read(abilities.told()) == abilities


def test_what_is_not_told_counts_as_missing_and_what_is_new_is_not_read():
    assert Abilities.read({"kvm": True, "sgx": True}) == Abilities(kvm=True)


def test_a_misfit_leaves_room_for_the_hosts_name():
    assert all(len(misfit(Needs(True, TSC), other)) < 160 for other in (
        Abilities(), Abilities(kvm=True), Abilities(kvm=True, tsc_hz=1)))
