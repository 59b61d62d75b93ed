"""What PostgreSQL makes of the disks that a power failure left, without booting them.

The files are taken out of the images, and the guest's own PostgreSQL recovers them in a chroot on this machine:
what it then finds is what the disks hold, and not what a running guest still has in its memory.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ftvm_lab.command import CommandFailed, LabError, run
from ftvm_lab.rows import DAMAGED, SECOND_DISK, Contents

TIMEOUT_S = 180
_HOME = "var/lib/postgresql"
#: name -> what is written to the file of that name
_QUERIES = {
    "ids": "select id from rows",
    "damaged": DAMAGED,
    "index": "select bt_index_parent_check('rows_id', true)",
}


def recover(root_disk: Path, second_disk: Path) -> Contents:
    """The table on these copies, as it is after PostgreSQL's crash recovery; LabError says what is broken.

    The copies are file systems whose journal has been replayed. Checksums and the index are checked as well.
    """
    with TemporaryDirectory(dir=root_disk.parent) as name:
        root = Path(name)
        _extract(root_disk, "/", root)
        second = root / SECOND_DISK.lstrip("/")
        second.parent.mkdir(parents=True, exist_ok=True)
        _extract(second_disk, f"/{second.name}", second.parent)
        return _query(root)


def _extract(image: Path, source: str, target: Path) -> None:
    run(["debugfs", "-R", f"rdump {source} {target}", str(image)], timeout_s=TIMEOUT_S)


def _query(root: Path) -> Contents:
    try:
        (configuration,) = root.glob("etc/postgresql/*/main/postgresql.conf")
    except ValueError:
        raise LabError("there is no PostgreSQL on the disk") from None
    version = configuration.parent.parent.name
    programs, cluster = f"/usr/lib/postgresql/{version}/bin", f"/{_HOME}/{version}/main"
    # The guest's own, which may be the number of a process of this machine.
    (root / cluster.lstrip("/") / "postmaster.pid").unlink(missing_ok=True)
    # The chroot has no /dev/shm that this user could write to.
    settings = ["dynamic_shared_memory_type=mmap", f"config_file=/{configuration.relative_to(root)}"]
    options = [word for setting in settings for word in ("-c", setting)]
    log = _as_owner(
        root,
        [f"{programs}/postgres", "--single", "-D", cluster, *options, "postgres"],
        "".join(f"copy ({query}) to '/{_HOME}/{name}'\n" for name, query in _QUERIES.items()),
    )
    # A statement that fails does not end the program; it leaves no file.
    missing = [name for name in _QUERIES if not (root / _HOME / name).exists()]
    if missing:
        raise LabError(f"the recovered database has no answer for {', '.join(missing)}: {log[-2000:]}")
    _as_owner(root, [f"{programs}/pg_checksums", "--check", "-D", cluster])
    ids = (root / _HOME / "ids").read_text().split()
    return Contents([int(number) for number in ids], int((root / _HOME / "damaged").read_text()))


def _as_owner(root: Path, argv: Sequence[str], standard_input: str = "") -> str:
    """All that the program says; it runs as the cluster's owner, inside `root`."""
    done = subprocess.run(
        ["chroot", "--userspec=postgres:postgres", str(root), *argv],
        input=standard_input,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        raise CommandFailed(argv, done.returncode, done.stdout)
    return done.stdout
