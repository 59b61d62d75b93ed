"""What the product itself knows of a pair: the manager's row, the agent's statistics."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftvm_lab.command import LabError
from ftvm_lab.figures import quantile
from ftvm_lab.ftvm_settings import manager_file
from ftvm_lab.layout import CONTROL, Layout, Node
from ftvm_lab.machine import Machine


@dataclass(frozen=True, slots=True)
class Pair:
    """The manager's row, as far as the lab looks at it."""

    state: str
    reason: str
    #: Grows with each change of who protects the server, and with each end of that.
    generation: int
    primary_host: str
    backup_host: str | None
    #: Whose guest may speak.
    active_host: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """Wall-clock seconds of a failover's steps; None for a step that has not been."""

    detected_at: float | None
    granted_at: float | None
    running_at: float | None
    nova_done_at: float | None


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Figures of a primary's checkpoints; counted from its statistics file."""

    count: int
    pause_ms_p50: float
    pause_ms_p99: float
    pages_p50: float
    epoch_ms_p50: float


def timeline(layout: Layout, server_id: str) -> Timeline:
    """How the server's last failover went, as the manager recorded it."""
    steps = _row(layout, server_id)["timeline"]
    return Timeline(*(steps.get(name) for name in Timeline.__dataclass_fields__))


def pair(layout: Layout, server_id: str) -> Pair:
    row = _row(layout, server_id)
    return Pair(**{name: row[name] for name in Pair.__dataclass_fields__})


def _row(layout: Layout, server_id: str) -> dict[str, Any]:
    argv = ["nova-ftvm-manage", "--config-file", str(manager_file(layout))]
    row: dict[str, Any] = json.loads(Machine(layout, CONTROL).call([*argv, "pair", "show", server_id, "--json"]))
    return row


def checkpoints(layout: Layout, node: Node, server_id: str) -> Checkpoints:
    """Readable while the host is dead: its runtime directory is on the lab's disk."""
    return count_checkpoints(layout.runtime(node) / server_id / "epochs.jsonl")


def count_checkpoints(statistics: Path) -> Checkpoints:
    if not statistics.exists():
        raise LabError(f"the primary's agent left no statistics: {statistics} is not there")
    lines = statistics.read_text().splitlines(keepends=True)
    # The power may fail in the middle of the last line.
    rows = [json.loads(line) for line in lines if line.endswith("\n")]

    def column(name: str) -> list[float]:
        return [value for row in rows for value in row[name]]

    return Checkpoints(
        count=max((row["count"] for row in rows), default=0),
        pause_ms_p50=quantile(column("pause_ms"), 0.5),
        pause_ms_p99=quantile(column("pause_ms"), 0.99),
        pages_p50=quantile(column("pages"), 0.5),
        epoch_ms_p50=quantile(column("epoch_ms"), 0.5),
    )
