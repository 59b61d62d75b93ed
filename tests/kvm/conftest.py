"""Where KVM works these tests run; elsewhere each is skipped with the reason."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.host.machine import Qemu
from tests.kvm import machine


@pytest.fixture(scope="session", autouse=True)
def needs_kvm() -> None:
    if reason := machine.lacking():
        pytest.skip(f"not tested under KVM: {reason}")


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Qemu]]:
    with ExitStack() as stack:
        yield machine.launcher(stack, tmp_path)
