"""Disks of the test guests: images on a real file system, and QEMU's arguments for them as libvirt writes them."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

MIB = 1 << 20
SECTOR = 512
_WORDS = SECTOR // 8


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A disk. `form`: raw, qcow2, or backed (a qcow2 on a raw base). `bus`: blk, iothread (a virtio-blk with a thread
    of its own), scsi, or cdrom (read-only, on virtio-scsi). The size is no multiple of a cluster, nor of 4 KiB."""

    form: str = "qcow2"
    bus: str = "blk"
    size: int = 40 * MIB + 3 * SECTOR
    aio: str = "threads"
    cache: str = "none"
    #: Without it a device's requests are waited for after the STOP event, not before, as with SATA and USB disks.
    ioeventfd: bool = True


def sectors(tag: str, first: int, count: int, version: int) -> np.ndarray:
    """What guest/storage.c writes into sectors of the disk whose name ends with `tag`: shape (count, 64), uint64."""
    number = np.uint64(ord(tag) << 48) | np.arange(first, first + count, dtype=np.uint64)
    rows = np.empty((count, _WORDS), np.uint64)
    rows[:] = (number * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(version << 20))[:, None]
    rows ^= np.arange(_WORDS, dtype=np.uint64)
    rows[:, 0], rows[:, 1] = number, version
    return rows


def fill(path: Path, tag: str, size: int, version: int = 1, hole_each: int = 4) -> None:
    """A raw image whose sectors all name themselves, but for each `hole_each`th MiB, which is a hole."""
    with path.open("wb") as file:
        file.truncate(size)
        for start in range(0, size, MIB):
            if not hole_each or (start // MIB + 1) % hole_each:
                file.seek(start)
                file.write(sectors(tag, start // SECTOR, min(MIB, size - start) // SECTOR, version).tobytes())


class Image:
    """One disk of one side: its files, and QEMU's words for it. The first disk of its bus is vda or sda."""

    def __init__(self, folder: Path, number: int, shape: Shape, contents: Path | None = None) -> None:
        """contents: a raw image that the guest finds on it; the base of a `backed` one."""
        self.shape = shape
        self.number = number
        self.path = folder / f"disk{number}"
        self._base = folder / f"base{number}"
        qcow2 = ["qemu-img", "create", "-q", "-f", "qcow2"]
        if shape.form == "backed":
            assert contents is not None
            shutil.copy(contents, self._base)
            subprocess.run([*qcow2, "-b", self._base, "-F", "raw", self.path, str(shape.size)], check=True)
        elif contents is not None:
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", shape.form, contents, self.path], check=True)
        elif shape.form == "qcow2":
            subprocess.run([*qcow2, self.path, str(shape.size)], check=True)
        else:
            with self.path.open("wb") as file:
                file.truncate(shape.size)

    def move_to(self, folder: Path) -> None:
        """To another file system; the base stays where it is."""
        self.path = Path(shutil.move(self.path, folder / self.path.name))

    def arguments(self) -> list[str]:
        """As libvirt writes them: for a raw image no format node."""
        prefix = f"libvirt-{self.number}"
        if self.shape.form == "raw":
            node, words = f"{prefix}-storage", []
        else:
            node = f"{prefix}-format"
            backing = f"{prefix}-base" if self.shape.form == "backed" else None
            words = self._file_node(f"{prefix}-base", self._base, read_only=True) if backing else []
        words += self._file_node(f"{prefix}-storage", self.path, read_only=self.shape.bus == "cdrom")
        if self.shape.form != "raw":
            words += _option("blockdev", driver="qcow2", node_name=node, file=f"{prefix}-storage", backing=backing,
                             discard="unmap", cache=self._cache)
        return words + self._device(node)

    def _file_node(self, name: str, path: Path, *, read_only: bool) -> list[str]:
        return _option("blockdev", driver="file", node_name=name, filename=str(path), aio=self.shape.aio,
                       discard="unmap", cache=self._cache, read_only=read_only)

    @property
    def _cache(self) -> dict[str, bool]:
        return {"direct": self.shape.cache == "none", "no-flush": False}

    def _device(self, node: str) -> list[str]:
        end = {"drive": node, "id": f"disk{self.number}"}
        if self.shape.bus in ("scsi", "cdrom"):
            return [*_option("device", driver="virtio-scsi-pci", id=f"scsi{self.number}",
                             ioeventfd=self.shape.ioeventfd),
                    *_option("device", driver="scsi-cd" if self.shape.bus == "cdrom" else "scsi-hd",
                             bus=f"scsi{self.number}.0", **end)]
        thread = f"iothread{self.number}"
        own = ["-object", f"iothread,id={thread}"] if self.shape.bus == "iothread" else []
        return [*own, *_option("device", driver="virtio-blk-pci", ioeventfd=self.shape.ioeventfd, write_cache="on",
                               **({"iothread": thread} if own else {}), **end)]


def contents(folder: Path, tag: str, shape: Shape, version: int = 1) -> Path:
    """A raw image for the disk whose name ends with `tag`."""
    path = folder / f"contents-{tag}-{version}"
    if not path.exists():
        fill(path, tag, shape.size, version)
    return path


def primarys(folder: Path, shapes: Sequence[Shape], tags: str) -> list[Image]:
    """A disk of each shape; `tags` are the ends of their names."""
    side = _side(folder, "p")
    return [Image(side, number, shape, contents(folder, tag, shape))
            for number, (shape, tag) in enumerate(zip(shapes, tags, strict=True))]


def standbys(folder: Path, shapes: Sequence[Shape], tags: str, side: str = "b") -> list[Image]:
    """Disks for the same guest: on a copy of the same base, or with something else in them that must go."""
    own = _side(folder, side)
    return [Image(own, number, shape, contents(folder, tag, shape, 1 if shape.form == "backed" else 999))
            for number, (shape, tag) in enumerate(zip(shapes, tags, strict=True))]


def _side(folder: Path, name: str) -> Path:
    side = folder / name
    side.mkdir(exist_ok=True)
    return side


def arguments(images: Iterable[Image]) -> list[str]:
    return [word for image in images for word in image.arguments()]


def _option(kind: str, **options: object) -> list[str]:
    return [f"-{kind}", json.dumps({key.replace("_", "-"): value for key, value in options.items()})]


#: Limits of a process on a disk, by their names in control groups of version 2, and in version 1.
_LIMITS = {"rbps": "read_bps", "wbps": "write_bps", "wiops": "write_iops"}


def can_be_slowed(path: Path) -> bool:
    """The kernel can hold back reads and writes of this file."""
    return _hierarchy() is not None and _device_under(path) is not None


@contextlib.contextmanager
def slow_disk(path: Path, pid: int, **limits: int) -> Iterator[None]:
    """Process `pid` reads and writes the disk that holds `path` so slowly: block requests wait in the kernel, their
    memory pinned. limits: rbps, wbps (bytes a second), wiops (writes a second)."""
    root = _hierarchy()
    device = _device_under(path)
    assert root is not None and device is not None
    group = root / f"ftvmt-{os.getpid()}-{pid}"
    home = root / _group_of(pid, root).lstrip("/")
    group.mkdir()
    try:
        for name, limit in limits.items():
            if root.name == "blkio":
                (group / f"blkio.throttle.{_LIMITS[name]}_device").write_text(f"{device} {limit}")
            else:
                (group / "io.max").write_text(f"{device} {name}={limit}")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            (home / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def _hierarchy() -> Path | None:
    """The control groups that can limit block devices: of version 1, or the root's own of version 2."""
    old, new = Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup")
    if (old / "blkio.throttle.read_bps_device").exists():
        return old
    offered = new / "cgroup.controllers"
    if not offered.exists() or "io" not in offered.read_text().split():
        return None
    (new / "cgroup.subtree_control").write_text("+io")
    return new


def _group_of(pid: int, root: Path) -> str:
    """The process's group in that hierarchy."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == ("blkio" if root.name == "blkio" else ""):
            return group
    return "/"


def _device_under(path: Path) -> str | None:
    """major:minor of the whole disk that holds a file; None when there is none."""
    number = path.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not place.exists():
        return None
    whole = place.resolve().parent if (place / "partition").exists() else place
    return (whole / "dev").read_text().strip()
