"""The demo's figures, from what the agent's statistics and a run's outcome hold."""

import json
from pathlib import Path

from ftvm_lab.figures import quantile
from ftvm_lab.pairs import count_checkpoints


def test_checkpoints_are_counted_over_all_seconds(tmp_path: Path) -> None:
    rows = [
        {"count": 2, "pause_ms": [1.0, 2.0], "pages": [60, 70], "epoch_ms": [20.0, 21.0]},
        {"count": 3, "pause_ms": [9.0], "pages": [80], "epoch_ms": [25.0]},
    ]
    file = tmp_path / "epochs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = count_checkpoints(file)
    assert (found.count, found.pause_ms_p50, found.pause_ms_p99) == (3, 2.0, 9.0)
    assert (found.pages_p50, found.epoch_ms_p50) == (70, 21.0)


def test_a_line_that_the_power_failure_cut_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "epochs.jsonl"
    file.write_text('{"count": 1, "pause_ms": [1.5], "pages": [3], "epoch_ms": [20.0]}\n{"count": 2, "pau')
    assert count_checkpoints(file).count == 1


def test_the_quantile_of_nothing_is_zero() -> None:
    assert quantile([], 0.5) == 0.0
