"""A compute host's disk: a file system of its own for its guests' disks, so that it can be full.

Mounted outside the host, which sees it at its place: what a dead host's guests wrote can be looked at.
"""

import errno
import os
from contextlib import suppress

from ftvm_lab.command import run
from ftvm_lab.layout import COMPUTES, Layout, Node

SIZE_GIB = 12
_BALLAST = "ballast"
_BLOCK = 4096


def attach(layout: Layout, node: Node) -> None:
    """Makes the disk at first, and mounts it if it is not."""
    place = layout.instances(node)
    if place.is_mount():
        return
    place.mkdir(parents=True, exist_ok=True)
    image = layout.outside(node) / "disk.img"
    if not image.exists():
        # Sparse. Without a journal, which would make every flush of a guest cost several of the machine's.
        run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", str(image), f"{SIZE_GIB}G"])
    run(["mount", "-o", "loop,discard", str(image), str(place)])
    with suppress(OSError):
        (place / "lost+found").rmdir()


def detach_all(layout: Layout) -> None:
    for node in COMPUTES:
        if layout.instances(node).is_mount():
            run(["umount", "--lazy", str(layout.instances(node))])


def fill(layout: Layout, node: Node) -> None:
    """Leaves no room on the host's disk."""
    with (layout.instances(node) / _BALLAST).open("wb") as ballast:
        end, piece = 0, SIZE_GIB << 30
        while piece >= _BLOCK:
            try:
                os.posix_fallocate(ballast.fileno(), end, piece)
                end += piece
            except OSError as full:
                if full.errno != errno.ENOSPC:
                    raise
                piece //= 2


def free(layout: Layout, node: Node) -> None:
    (layout.instances(node) / _BALLAST).unlink(missing_ok=True)
