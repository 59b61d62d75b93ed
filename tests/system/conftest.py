"""A fresh lab for the session: up before the first test that asks for it, down after the last."""

from collections.abc import Iterator
from typing import Any

import pytest
from ftvm_lab import cloud, lab
from ftvm_lab.command import Progress
from ftvm_lab.failover import Stage
from ftvm_lab.layout import COMPUTES, CONTROL, Layout
from ftvm_lab.servers import Servers
from keystoneauth1.exceptions import ClientException


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A failure shows what the cloud said of its servers: the lab is gone when it is read."""
    report = yield
    stage = getattr(item, "funcargs", {}).get("stage")
    if report.failed and stage is not None:
        report.sections.append(("the cloud", "\n".join(_told(stage))))
    return report


def _told(stage: Stage) -> Iterator[str]:
    try:
        for server in stage.servers.all():
            shown = {key: value for key, value in server.metadata.items() if key.startswith("ft")}
            yield f"{server.name} is {server.status}/{server.task_state} on {server.compute_host}: {shown}"
            for node in COMPUTES:
                console = stage.layout.instances(node) / server.id / "console.log"
                if console.exists():
                    yield f"its console on {node.name}:"
                    yield from console.read_text(errors="replace").splitlines()[-12:]
                for engine in sorted((stage.layout.runtime(node) / server.id).glob("*.log")):
                    yield f"its {engine.stem} engine on {node.name}:"
                    yield from engine.read_text(errors="replace").splitlines()[-12:]
    except ClientException as error:
        yield f"Nova does not answer: {error}"
    log = stage.layout.logs(CONTROL) / "nova-ftvm-manager.log"
    if log.exists():
        yield from log.read_text(errors="replace").splitlines()[-40:]
