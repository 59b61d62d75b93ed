"""A fresh lab for the session: up before the first test that asks for it, down after the last."""

from collections.abc import Iterator

import pytest
from ftvm_lab import cloud, lab
from ftvm_lab.command import Progress
from ftvm_lab.failover import Stage
from ftvm_lab.layout import Layout
from ftvm_lab.servers import Servers


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    layout = Layout.from_environment()
    progress = Progress()
    lab.down(layout, wipe=True)
    try:
        lab.up(layout, plain=False, progress=progress)
        yield Stage(layout, Servers(cloud.connect(layout)), progress)
    finally:
        lab.down(layout, wipe=True)
