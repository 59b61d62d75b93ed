"""host/kvm.py where KVM does not work; tests/kvm/test_libvirt.py has it where it does."""

import pytest

from nova_ftvm.core.kind import Abilities
from nova_ftvm.host import kvm


@pytest.mark.parametrize("device", ["/dev/null", "/dev/no-such-device", "/"])
def test_a_device_that_makes_no_virtual_machine_is_no_kvm(device: str) -> None:
    assert kvm.abilities(device) == Abilities()
