"""A libvirtd of the tests' own: its files in one folder, its processes and mounts in namespaces, ended with the tests.

The folder must be short: sockets are made in it.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.host.machine import die_with_the_tests, wait_for

_QEMU_CONF = """user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = [ ]
namespaces = [ ]
stdio_handler = "file"
remember_owner = 0
"""
_LIBVIRTD_CONF = """auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_group = "root"
host_uuid = "00000000-0000-4000-8000-0000000000ff"
"""
#: Where libvirtd keeps what it has; each is bound to a folder of the test's.
_PLACES = ("/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")
#: The processes end with process 1 of their namespace, and that with `unshare`.
_UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


@contextlib.contextmanager
def libvirtd(folder: Path) -> Iterator[str]:
    """The URI of a libvirtd that runs QEMU as root and knows no domain."""
    for place in _PLACES:
        (folder / place[1:]).mkdir(parents=True)
    (folder / "etc/libvirt/qemu.conf").write_text(_QEMU_CONF)
    (folder / "etc/libvirt/libvirtd.conf").write_text(f'{_LIBVIRTD_CONF}unix_sock_dir = "{folder}"\n')
    binds = [f"mount --bind {folder}{place} {place}" for place in _PLACES]
    # The shell stays, as process 1: it buries the QEMUs that libvirtd made daemons, and libvirtd waits for that.
    steps = ["mount -t tmpfs tmpfs /run", "mkdir -p /run/libvirt", *binds, "/usr/sbin/libvirtd"]
    script = " && ".join(steps) + "; exit 1"
    with (folder / "libvirtd.log").open("wb") as log:
        daemon = subprocess.Popen([*_UNSHARE, "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                  preexec_fn=die_with_the_tests)
    try:
        wait_for("libvirtd listens", (folder / "libvirt-sock").exists)
        yield f"qemu+unix:///system?socket={folder}/libvirt-sock"
    finally:
        daemon.kill()
        daemon.wait()
