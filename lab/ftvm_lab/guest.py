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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from ftvm_lab.command import LabError, run

META_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX = Path("/usr/bin/busybox")
MODULES = (
    *("virtio_pci", "virtio_net", "virtio_blk", "virtio-rng", "virtio_balloon"),
    *("virtio_scsi", "sd_mod", "sr_mod", "isofs", "button", "evdev"),
)
#: file of guest_root -> its place in the ramdisk
FILES = {
    "inittab": "etc/inittab",
    "start": "etc/start",
    "session": "bin/session",
    "blocks": "bin/blocks",
    "control": "bin/control",
    "register": "bin/register",
    "power": "etc/acpi/PWRF/00000080",
}
DISK_SIZE = "32M"


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel package."""

    tree: Path
    version: str

    @property
    def image(self) -> Path:
        return self.tree / "boot" / f"vmlinuz-{self.version}"


def main() -> None:
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name:
        work = Path(name)
        kernel = fetch_kernel(work)
        shutil.copy(kernel.image, target / "kernel")
        root = work / "root"
        for directory in ("sys", "www", "var/run"):
            (root / directory).mkdir(parents=True)
        install_busybox(root)
        install_modules(root, kernel, MODULES)
        install_files(root, "guest_root", FILES)
        pack(root, target / "ramdisk")
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(target / "disk.qcow2"), DISK_SIZE])


def fetch_kernel(work: Path) -> Kernel:
    """Downloads the kernel as Debian names it today, and unpacks it below `work`."""
    depends = run(["apt-cache", "depends", META_PACKAGE])
    match = re.search(r"Depends: (linux-image-\S+)", depends)
    if match is None:
        raise LabError(f"{META_PACKAGE} names no kernel: {depends}")
    package = match[1]
    subprocess.run(["apt-get", "download", "-q", package], cwd=work, check=True, timeout=300)
    archive = next(work.glob(f"{package}_*.deb"))
    tree = work / "kernel"
    run(["dpkg", "-x", str(archive), str(tree)], timeout_s=120)
    return Kernel(tree, package.removeprefix("linux-image-"))


def install_busybox(root: Path) -> None:
    """busybox and all its names, and the directories that every ramdisk needs."""
    for directory in ("bin", "proc", "dev", "mnt"):
        (root / directory).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for applet in run([str(BUSYBOX), "--list"]).split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "init").symlink_to("bin/busybox")


def install_modules(root: Path, kernel: Kernel, names: Iterable[str]) -> None:
    """The modules, and in lib/modules/order their order: each after those that it needs."""
    target = root / "lib/modules"
    target.mkdir(parents=True)
    modules = _in_order(kernel, names)
    for module in modules:
        shutil.copy(module, target)
    (target / "order").write_text("".join(f"{module.name}\n" for module in modules))


def _in_order(kernel: Kernel, names: Iterable[str]) -> list[Path]:
    run(["depmod", "-b", str(kernel.tree), kernel.version])
    found: dict[Path, None] = {}
    for name in names:
        lines = run(["modprobe", "-d", str(kernel.tree), "-S", kernel.version, "--show-depends", name])
        for line in lines.splitlines():
            if line.startswith("insmod "):
                found[Path(line.split()[1])] = None
    return list(found)


def install_files(root: Path, source: str, places: Mapping[str, str]) -> None:
    """Puts files of this package's directory `source` to their places, executable."""
    for name, place in places.items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(files("ftvm_lab").joinpath(source, name).read_text())
        path.chmod(0o755)


def pack(root: Path, ramdisk: Path) -> None:
    """The directory as a compressed archive that the kernel unpacks."""
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
