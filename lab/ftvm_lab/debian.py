"""Builds the Debian guest: systemd on an ext4 disk of its own, PostgreSQL, chrony, and what the benchmark works with.

Run by setup as `python -m ftvm_lab.debian DIRECTORY`, as root. Needs the Debian mirror that apt uses and
nothing else: no loop device, no boot loader (kernel and ramdisk are files of their own, as the busybox
guest's are). There is no udev in it: the ramdisk brings the modules, the kernel makes the device nodes.
"""

import shutil
import sys
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory

from ftvm_lab import guest
from ftvm_lab.command import run

SUITE = "bookworm"
PACKAGES = ("systemd-sysv", "postgresql", "acpid", "iproute2", "nginx-light", "redis-server", "chrony")
#: The benchmark and the trial of clocks start them; in other guests they stay away.
ON_DEMAND = ("nginx.service", "redis-server.service", "chrony.service")
#: The guest's programs that this machine runs too, as they are: installed here, chrony would take the place of what
#: keeps this machine's own clock.
BORROWED = ("usr/sbin/chronyd", "usr/bin/chronyc")
#: Not needed on the disk of a server, or only to compile queries.
EXCLUDED = (
    *("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/i18n/*"),
    *("/usr/lib/*/libLLVM*", "/usr/lib/*/libz3.*", "/usr/lib/postgresql/*/lib/bitcode/*"),
)
#: Waits of the boot, and writes that no database makes. D-Bus, which logind needs, is not installed.
MASKED = (
    *("getty.target", "timers.target", "systemd-logind.service", "systemd-pstore.service"),
    *("systemd-update-utmp.service", "systemd-journal-flush.service", "systemd-random-seed.service"),
)
MODULES = (*guest.MODULES, "ext4")
#: file of debian_root -> its place on the disk
FILES = {
    "seed": "usr/local/sbin/ftvm-seed",
    "seed.service": "etc/systemd/system/ftvm-seed.service",
    "needs-seed.conf": "etc/systemd/system/postgresql@.service.d/needs-seed.conf",
    "power-button": "etc/acpi/events/power-button",
    "bench.service": "etc/systemd/system/ftvm-bench.service",
    "clocks.service": "etc/systemd/system/ftvm-clocks.service",
    "chrony.conf": "etc/chrony/chrony.conf",
}
DISK_SIZE = "2G"
BUILD_TIMEOUT_S = 600


def main() -> None:
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target) as name:
        work = Path(name)
        kernel = guest.fetch_kernel(work)
        shutil.copy(kernel.image, target / "kernel")
        _make_ramdisk(work / "ramdisk", kernel, target / "ramdisk")
        root = work / "root"
        _install_debian(root)
        _configure_system(root)
        _configure_database(root)
        _add_benchmark(root)
        for program in BORROWED:
            shutil.copy(root / program, target)
        _make_disk(root, work / "disk.raw", target / "disk.qcow2")


def _make_ramdisk(root: Path, kernel: guest.Kernel, ramdisk: Path) -> None:
    guest.install_busybox(root)
    guest.install_modules(root, kernel, MODULES)
    guest.install_files(root, "debian_root", {"init": "init"})
    guest.pack(root, ramdisk)


def _install_debian(root: Path) -> None:
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    command = [
        *("mmdebstrap", "--quiet", "--variant=essential", f"--include={','.join(PACKAGES)}"),
        *("--aptopt=APT::Install-Recommends false", *options, SUITE, str(root), _mirror()),
    ]
    run(command, timeout_s=BUILD_TIMEOUT_S)


def _mirror() -> str:
    """The machine's own."""
    return run(["apt-get", "indextargets", "--format", "$(REPO_URI)"]).split()[0]


def _configure_system(root: Path) -> None:
    guest.install_files(root, "debian_root", FILES)
    run(["systemctl", f"--root={root}", "enable", "ftvm-seed.service"])
    run(["systemctl", f"--root={root}", "mask", *MASKED])
    run(["systemctl", f"--root={root}", "set-default", "multi-user.target"])
    # Without one, systemd takes each server's first boot for an installation.
    (root / "etc/machine-id").unlink()
    run(["systemd-machine-id-setup", f"--root={root}"])


def _configure_database(root: Path) -> None:
    """The cluster that the package made: settings, checksums, amcheck."""
    (configuration,) = root.glob("etc/postgresql/*/main")
    version = configuration.parent.name
    inside = {"postgresql.conf": "conf.d/lab.conf", "pg_hba.conf": "pg_hba.conf"}
    guest.install_files(configuration, "debian_root", inside)
    for place in inside.values():
        (configuration / place).chmod(0o644)
    programs, cluster = f"/usr/lib/postgresql/{version}/bin", f"/var/lib/postgresql/{version}/main"
    as_owner = ["chroot", "--userspec=postgres:postgres", str(root)]
    run([*as_owner, f"{programs}/pg_checksums", "--enable", "-D", cluster])
    # The chroot has no /dev/shm that this user could write to.
    single = [f"{programs}/postgres", "--single", "-D", cluster, "-c", "dynamic_shared_memory_type=mmap"]
    single += ["-c", f"config_file=/etc/postgresql/{version}/main/postgresql.conf", "postgres"]
    run([*as_owner, *single], standard_input="create extension amcheck\n")


def _add_benchmark(root: Path) -> None:
    for name in ("bench", "clocks"):
        with as_file(files("ftvm_lab").joinpath("debian_root", f"{name}.c")) as source:
            program = root / f"usr/local/sbin/ftvm-{name}"
            run(["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)])
        run(["systemctl", f"--root={root}", "enable", f"ftvm-{name}.service"])
    run(["systemctl", f"--root={root}", "disable", *ON_DEMAND])
    with (root / "etc/redis/redis.conf").open("a") as settings:
        # The last word counts.
        settings.write(files("ftvm_lab").joinpath("debian_root", "redis.conf").read_text())


def _make_disk(root: Path, raw: Path, disk: Path) -> None:
    # Nothing is left to be initialised by the guest's kernel, in its own time.
    options = "lazy_itable_init=0,lazy_journal_init=0"
    command = ["mke2fs", "-q", "-t", "ext4", "-E", options, "-L", "debian", "-d", str(root), str(raw), DISK_SIZE]
    run(command, timeout_s=BUILD_TIMEOUT_S)
    run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(disk)], timeout_s=BUILD_TIMEOUT_S)


if __name__ == "__main__":
    main()
