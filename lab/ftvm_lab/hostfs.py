"""What a machine sees of the file system; called by its init, before anything runs.

A compute host sees its own files at one path that is the same on all hosts, and
nothing of the others': Nova compares paths to find out what is shared.
"""

import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from ftvm_lab.command import run
from ftvm_lab.layout import COMPUTES, MGMT, Layout, Node

#: Bound into the host at these places, each from its own directory.
PRIVATE_DIRECTORIES = {
    "etc-libvirt": Path("/etc/libvirt"),
    "var-lib-libvirt": Path("/var/lib/libvirt"),
    "cache-libvirt": Path("/var/cache/libvirt"),
    "log-libvirt": Path("/var/log/libvirt"),
}
RUNTIME_DIRECTORY = Path("/run/nova-ftvm")
#: No kvm: libvirt would take it for usable, and probe QEMU again at each start.
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "net/tun", "userfaultfd")
DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "fd/0",
    "stdout": "fd/1",
    "stderr": "fd/2",
    "ptmx": "pts/ptmx",
}


def _mount(*arguments: str | Path) -> None:
    run(["mount", *map(str, arguments)])


def forget_namespaces() -> None:
    """Drops this machine's copies of the mounts that keep other namespaces alive."""
    run(["umount", "--recursive", "--lazy", "/run/netns"])


def mount_control() -> None:
    _mount("-t", "tmpfs", "tmpfs", "/run")


def mount_compute(layout: Layout, node: Node) -> None:
    host = layout.host
    host.mkdir(exist_ok=True)
    # With the file system of its guests' disks, which is mounted below it.
    _mount("--rbind", layout.outside(node), host)
    _mount("-t", "tmpfs", "tmpfs", layout.hosts)
    _mount("-t", "tmpfs", "tmpfs", "/run")
    Path("/run/lock").mkdir()
    for name, place in PRIVATE_DIRECTORIES.items():
        _bind_directory(host / name, place)
    # /run is lost with the power, also the part that is kept for those who look from outside.
    shutil.rmtree(host / "run-nova-ftvm", ignore_errors=True)
    _bind_directory(host / "run-nova-ftvm", RUNTIME_DIRECTORY)
    _bind_accounts(host)
    _bind_names(host)
    _mount_devices(host / "dev")


def _bind_directory(source: Path, place: Path) -> None:
    source.mkdir(exist_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    _mount("--bind", source, place)


def _bind_file(source: Path, place: Path, lines: Iterable[str]) -> None:
    """Binds a copy of `place` with some lines more."""
    source.write_text(place.read_text() + "".join(f"{line}\n" for line in lines))
    _mount("--bind", source, place)


def _bind_accounts(host: Path) -> None:
    """libvirtd looks for these names, even if it runs QEMU as root."""
    _bind_missing(
        host / "passwd",
        Path("/etc/passwd"),
        ["libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin"],
    )
    _bind_missing(host / "group", Path("/etc/group"), ["libvirt-qemu:x:64055:", "kvm:x:64056:"])


def _bind_missing(source: Path, place: Path, lines: Iterable[str]) -> None:
    known = {line.split(":")[0] for line in place.read_text().splitlines()}
    _bind_file(source, place, [line for line in lines if line.split(":")[0] not in known])


def _bind_names(host: Path) -> None:
    lines = [f"{node.address(MGMT)} {node.name}" for node in COMPUTES]
    _bind_file(host / "hosts-file", Path("/etc/hosts"), lines)


def _mount_devices(staging: Path) -> None:
    staging.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", staging)
    for directory in ("net", "pts", "shm"):
        (staging / directory).mkdir()
    for name in DEVICES:
        _copy_device(Path("/dev") / name, staging / name)
    for name, target in DEVICE_LINKS.items():
        (staging / name).symlink_to(target)
    _mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666,mode=620", "devpts", staging / "pts")
    _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", staging / "shm")
    _mount("--move", staging, "/dev")


def _copy_device(original: Path, copy: Path) -> None:
    """Makes the same device node; a kernel without the device has none to copy."""
    if original.exists():
        os.mknod(copy, stat.S_IFCHR | 0o666, original.stat().st_rdev)
        copy.chmod(0o666)
