"""cmd/agent.py: which engines an agent finds when it starts, living and lost."""

import os
import threading
from pathlib import Path
from typing import Any

from nova_ftvm.cmd.agent import lost_engines, surviving_engines
from nova_ftvm.host import note
from nova_ftvm.host.control import ControlServer
from nova_ftvm.host.note import NoteFile
from nova_ftvm.host.process import LostEngine

GONE = {"event": "gone"}


def leave_note(runtime: Path, server: str, pid: int | None = None) -> Path:
    folder = runtime / server
    folder.mkdir()
    NoteFile(str(folder), f"pair of {server}", 3, server, pid or os.getpid()).leave()
    return folder


def test_a_guest_whose_engine_is_nowhere_is_lost_and_found(tmp_path: Path) -> None:
    leave_note(tmp_path, "forsaken")
    (tmp_path / "another").mkdir()
    (lost,) = lost_engines(str(tmp_path), surviving_engines(str(tmp_path)))
    assert (lost.role, lost.pair_id, lost.generation, lost.instance_id) == (
        "primary", "pair of forsaken", 3, "forsaken")


def test_a_guest_whose_engine_lives_is_its_engines(tmp_path: Path) -> None:
    folder = leave_note(tmp_path, "attended")
    control = ControlServer(str(folder / "primary.ctl"), {
        "role": "primary", "pair_id": "pair", "generation": 4, "instance_id": "attended"})
    served = threading.Event()

    def serve() -> None:
        while not served.wait(0.01):
            control.orders()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        living = surviving_engines(str(tmp_path))
        assert [engine.generation for engine in living] == [4]
        assert lost_engines(str(tmp_path), living) == []
    finally:
        served.set()
        thread.join()
        control.close()
    assert note.find(str(folder)) is not None


def test_the_socket_of_an_engine_that_died_does_not_hide_its_guest(tmp_path: Path) -> None:
    folder = leave_note(tmp_path, "forsaken")
    control = ControlServer(str(folder / "primary.ctl"), {})
    control._listener.close()
    living = surviving_engines(str(tmp_path))
    assert living == [] and len(lost_engines(str(tmp_path), living)) == 1


def test_a_note_whose_guest_is_gone_is_taken_away(tmp_path: Path) -> None:
    folder = leave_note(tmp_path, "gone", pid=2 ** 22 + 1)
    assert lost_engines(str(tmp_path), []) == [] and list(folder.iterdir()) == []


def test_a_lost_engine_says_that_it_is_gone_and_not_in_its_callers_thread(tmp_path: Path) -> None:
    """The agent insists until the manager answers; it must not be kept from starting by that."""
    leave_note(tmp_path, "forsaken")
    (lost,) = lost_engines(str(tmp_path), [])
    assert isinstance(lost, LostEngine) and lost.wait(0.0)
    heard: list[tuple[Any, int]] = []
    told = threading.Event()
    lost.listen(lambda engine, report: (heard.append((report, threading.get_ident())), told.set()))
    assert told.wait(5.0)
    assert heard[0][0] == GONE and heard[0][1] != threading.get_ident()
