"""Builds the guest from Debian's packages: kernel, busybox ramdisk, an empty disk.

Run by setup as `python -m ftvm_lab.guest DIRECTORY`. The kernel is the one that
linux-image-cloud-amd64 depends on; the modules are those of the devices that the
lab's servers have.
"""

import gzip
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from ftvm_lab.command import LabError, run

META_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX = Path("/usr/bin/busybox")
MODULES = (
    *("virtio_pci", "virtio_net", "virtio_blk", "virtio-rng", "virtio_balloon"),
    *("virtio_scsi", "sr_mod", "isofs", "button", "evdev"),
)
#: file of guest_root -> its place in the ramdisk
FILES = {
    "inittab": "etc/inittab",
    "start": "etc/start",
    "session": "bin/session",
    "power": "etc/acpi/PWRF/00000080",
}
DISK_SIZE = "32M"


def main() -> None:
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name:
        work = Path(name)
        package = kernel_package()
        version = package.removeprefix("linux-image-")
        tree = _unpack(package, work)
        shutil.copy(tree / "boot" / f"vmlinuz-{version}", target / "kernel")
        root = work / "root"
        _fill(root, _modules(tree, version))
        _pack(root, target / "ramdisk")
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(target / "disk.qcow2"), DISK_SIZE])


def kernel_package() -> str:
    """The package with the kernel itself, as Debian names it today."""
    depends = run(["apt-cache", "depends", META_PACKAGE])
    match = re.search(r"Depends: (linux-image-\S+)", depends)
    if match is None:
        raise LabError(f"{META_PACKAGE} names no kernel: {depends}")
    return match[1]


def _unpack(package: str, work: Path) -> Path:
    tree = work / "kernel"
    subprocess.run(["apt-get", "download", "-q", package], cwd=work, check=True, timeout=300)
    archive = next(work.glob(f"{package}_*.deb"))
    run(["dpkg", "-x", str(archive), str(tree)], timeout_s=120)
    return tree


def _modules(tree: Path, version: str) -> list[Path]:
    """The module files, each after those that it needs."""
    run(["depmod", "-b", str(tree), version])
    found: dict[Path, None] = {}
    for module in MODULES:
        lines = run(["modprobe", "-d", str(tree), "-S", version, "--show-depends", module])
        for line in lines.splitlines():
            if line.startswith("insmod "):
                found[Path(line.split()[1])] = None
    return list(found)


def _fill(root: Path, modules: Iterable[Path]) -> None:
    for directory in ("bin", "proc", "sys", "dev", "mnt", "www", "lib/modules", "var/run"):
        (root / directory).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for applet in run([str(BUSYBOX), "--list"]).split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "init").symlink_to("bin/busybox")
    for module in modules:
        shutil.copy(module, root / "lib/modules")
    order = "".join(f"{module.name}\n" for module in modules)
    (root / "lib/modules/order").write_text(order)
    for name, place in FILES.items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files("ftvm_lab").joinpath("guest_root", name).read_text())
        path.chmod(0o755)


def _pack(root: Path, ramdisk: Path) -> None:
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = subprocess.run(
        ["cpio", "--create", "--format=newc", "--quiet"],
        cwd=root,
        input=names.encode(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    ramdisk.write_bytes(gzip.compress(archive.stdout, mtime=0))


if __name__ == "__main__":
    main()
