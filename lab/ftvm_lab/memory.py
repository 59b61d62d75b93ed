"""Takes the room from processes that want more memory: a control group with a limit, of either version of cgroups."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ftvm_lab.command import LabError

_FIRST, _SECOND = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
#: What they have already is counted elsewhere: they may have no page more than this.
_ROOM_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class FullMemory:
    """Processes that get no memory: who asks for more is killed by the kernel, or a larger one among them."""

    group: Path
    #: Where each process was before.
    homes: dict[int, Path]

    @classmethod
    def of(cls, name: str, pids: Iterable[int]) -> "FullMemory":
        root, limit = (_FIRST, "memory.limit_in_bytes") if _FIRST.is_dir() else (_SECOND, "memory.max")
        group = root / name
        group.mkdir(exist_ok=True)
        if not (group / limit).exists():
            group.rmdir()
            raise LabError(f"there is no control of memory in {root}")
        full = cls(group, {pid: root / _path(pid, root) for pid in pids})
        for pid in full.homes:
            full._move(pid, group)
        (group / limit).write_text(str(_ROOM_BYTES))
        return full

    def end(self) -> None:
        for pid, home in self.homes.items():
            self._move(pid, home)
        with suppress(FileNotFoundError):
            self.group.rmdir()

    @staticmethod
    def _move(pid: int, group: Path) -> None:
        # The process may be gone; so may its group, in which case it is, too.
        with suppress(ProcessLookupError, FileNotFoundError):
            (group / "cgroup.procs").write_text(str(pid))


def _path(pid: int, root: Path) -> str:
    """Its group below `root`: the lines are NUMBER:CONTROLLERS:PATH, with no controllers in the second version."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == ("memory" if root == _FIRST else ""):
            return path.lstrip("/")
    raise LabError(f"process {pid} is in no group of {root}")
