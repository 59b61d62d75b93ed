"""Wall clocks of the compute hosts' services: they can jump, each host's alone. clock.c does it inside them.

There is one CLOCK_REALTIME for all namespaces of a machine, so a host's programs are given another one. libvirtd and
QEMU are not: libvirtd waits by the wall clock, and starts QEMU in an environment of its own.
"""

from importlib.resources import as_file, files
from pathlib import Path

from ftvm_lab.command import run
from ftvm_lab.layout import Layout, Node

_LIBRARY = "clock.so"
_OFFSET = "clock-offset"


def install(layout: Layout, node: Node) -> None:
    """Before the host's services start: its clock is right."""
    place = layout.outside(node) / _LIBRARY
    if not place.exists():
        with as_file(files("ftvm_lab").joinpath("clock.c")) as source:
            run(["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(place), str(source)])
    set_offset(layout, node, 0)


def environment(layout: Layout) -> dict[str, str]:
    """For a service inside a host."""
    return {"LD_PRELOAD": str(layout.host / _LIBRARY), "FTVM_LAB_CLOCK": str(layout.host / _OFFSET)}


def set_offset(layout: Layout, node: Node, seconds: int) -> None:
    """Overwrites the number in place: it is mapped."""
    file: Path = layout.outside(node) / _OFFSET
    with file.open("r+b" if file.exists() else "xb") as offset:
        offset.write(seconds.to_bytes(8, "little", signed=True))
