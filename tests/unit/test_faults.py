"""engine/faults.py: nothing is armed in production; what is armed strikes where and when it is said."""

import ast
import importlib
import os
import signal
from pathlib import Path

import pytest

from nova_ftvm.engine import faults
from nova_ftvm.engine.faults import Fault

ENGINE = Path(faults.__file__).parent


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch):
    """arm(text) -> the list of what was done to this process instead."""
    def arm(text: str) -> list:
        done: list = []
        monkeypatch.setenv("FTVM_FAULT", text)
        importlib.reload(faults)
        monkeypatch.setattr(faults.os, "kill", lambda pid, number: done.append((pid == os.getpid(), number)))
        monkeypatch.setattr(faults.time, "sleep", lambda seconds: done.append(seconds))
        return done

    yield arm
    monkeypatch.delenv("FTVM_FAULT", raising=False)
    importlib.reload(faults)


def names() -> list[str]:
    return [fault.value for fault in Fault]


def test_nothing_is_armed_by_itself(armed) -> None:
    done = armed("")
    for fault in faults.Fault:
        faults.trip(fault)
    assert done == []


@pytest.mark.parametrize("name", names())
def test_a_fault_strikes_at_its_own_point_only(armed, name: str) -> None:
    done = armed(f"{name}:kill")
    for fault in faults.Fault:
        faults.trip(fault)
    assert done == [(True, signal.SIGKILL)]


@pytest.mark.parametrize(("how", "harm"), [("kill", (True, signal.SIGKILL)), ("stop", (True, signal.SIGSTOP)),
                                           ("hang", 3600.0)])
def test_each_harm_is_what_it_says(armed, how: str, harm) -> None:
    done = armed(f"captured:{how}")
    faults.trip(faults.Fault.CAPTURED)
    assert done == [harm]


def test_a_point_is_passed_unharmed_as_often_as_told(armed) -> None:
    done = armed("shipped:kill:2")
    for _ in range(2):
        faults.trip(faults.Fault.SHIPPED)
    assert done == []
    faults.trip(faults.Fault.SHIPPED)
    assert len(done) == 1


def test_every_point_is_somewhere_in_the_engine() -> None:
    tripped = {node.attr for path in ENGINE.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Fault"}
    assert tripped == {fault.name for fault in Fault}
