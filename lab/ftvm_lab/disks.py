"""Copies of a server's disks as a power failure would leave them, and whether their file systems are whole."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftvm_lab.machine import Machine

COPIES = "copies"
TIMEOUT_S = 180


@contextmanager
def copied(machine: Machine, server_id: str, names: tuple[str, ...]) -> Iterator[list[Path]]:
    """Raw copies of these files of the server, all as of one moment; removed at the end.

    The guest stands still meanwhile, unasked: what it has not written yet is missing from them, and what its
    journal has begun is begun.
    """
    inside = machine.layout.host / COPIES
    outside = machine.layout.outside(machine.node) / COPIES
    outside.mkdir(exist_ok=True)
    copies = [outside / f"{name}.raw" for name in names]
    try:
        with _standing_still(machine, server_id):
            for name, copy in zip(names, copies, strict=True):
                source = machine.layout.host / "nova" / "instances" / server_id / name
                argv = ["qemu-img", "convert", "--force-share", "-O", "raw", str(source), str(inside / copy.name)]
                machine.call(argv, timeout_s=TIMEOUT_S)
        yield copies
    finally:
        for copy in copies:
            copy.unlink(missing_ok=True)


@contextmanager
def _standing_still(machine: Machine, server_id: str) -> Iterator[None]:
    """QEMU writes what it holds of the images when it stops the guest.

    It is QEMU that is asked: in the pause of a checkpoint libvirt takes the guest for paused, and does nothing.
    """
    _tell_qemu(machine, server_id, "stop")
    try:
        yield
    finally:
        _tell_qemu(machine, server_id, "cont")


def _tell_qemu(machine: Machine, server_id: str, command: str) -> None:
    machine.call(["virsh", "qemu-monitor-command", server_id, json.dumps({"execute": command})])


def file_system_faults(image: Path) -> str:
    """Replays the ext4 journal on the image, as a mount does; then what e2fsck finds wrong, '' for nothing."""
    replayed = _e2fsck("-p", "-E", "journal_only", str(image))
    if replayed.returncode not in (0, 1):
        return f"the journal: {replayed.stdout.strip()}"
    checked = _e2fsck("-f", "-n", str(image))
    return checked.stdout.strip() if checked.returncode else ""


def _e2fsck(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["e2fsck", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
