"""The runtime folders of servers: kept while they are of use."""

import os
import socket
from pathlib import Path

from nova_ftvm.host.guests import MONITOR, Guests

LONG_AGO = 1_000_000.0


def folder(base: Path, name: str, changed: float | None = None) -> Path:
    made = base / name
    made.mkdir()
    (made / "primary.log").write_text("")
    if changed is not None:
        for place in (made / "primary.log", made):
            os.utime(place, (changed, changed))
    return made


def test_the_sweep_takes_only_folders_that_are_old_and_without_a_guest(tmp_path: Path) -> None:
    gone = folder(tmp_path, "gone", LONG_AGO)
    young = folder(tmp_path, "young")
    empty = tmp_path / "empty"
    empty.mkdir()
    served = folder(tmp_path, "served")
    with socket.socket(socket.AF_UNIX) as guest:
        guest.bind(str(served / MONITOR))
        guest.listen(1)
        for place in (served / MONITOR, served / "primary.log", served):
            os.utime(place, (LONG_AGO, LONG_AGO))
        Guests(str(tmp_path), (0, 0), "qemu:///system").sweep(keep_s=60.0)
    assert not gone.exists()
    assert young.exists() and empty.exists() and served.exists()


def test_the_sweep_takes_what_a_dead_guest_left(tmp_path: Path) -> None:
    left = folder(tmp_path, "left")
    with socket.socket(socket.AF_UNIX) as guest:
        guest.bind(str(left / MONITOR))
    for place in (left / MONITOR, left / "primary.log", left):
        os.utime(place, (LONG_AGO, LONG_AGO))
    Guests(str(tmp_path), (0, 0), "qemu:///system").sweep(keep_s=60.0)
    assert not left.exists()
