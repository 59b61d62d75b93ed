"""The note by which a guest is found whose engine and agent died together: its output is held, and nobody knows of it.

    <runtime folder of the server>/primary.note    one JSON object, the fields of `Note`

Written by the primary's engine before any output can be held. Removed by it at a planned end, and by whoever lets the
guest go or destroys it in its place (host/guests.py). Read by an agent that starts (cmd/agent.py). Decides nothing:
what becomes of the guest is the arbiter's to say.

A note is there whole or not at all. It is not flushed to a disk: a host that loses its power loses the guest as well,
and a note without its guest is none.
"""

import contextlib
import dataclasses
import json
import logging
import os
import stat

from nova_ftvm.exception import FtvmError

LOG = logging.getLogger(__name__)

_NAME = "primary.note"
_MOST_BYTES = 1 << 12
#: Of /proc/PID/stat, behind the name of the program: the state, and when the process started, in ticks since boot.
_STATE, _STARTED = 0, 19


class NoteLost(FtvmError):
    """The note could not be written. The one before it, if any, is as it was."""


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """Who holds the output of which QEMU. A pid may be used again; with the time of its start it is one process's."""

    pair_id: str
    generation: int
    instance_id: str
    qemu_pid: int
    qemu_started: int


class NoteFile:
    """ports.Note: the engine's pen."""

    def __init__(self, folder: str, pair_id: str, generation: int, instance_id: str, qemu_pid: int) -> None:
        self._folder = folder
        self._note = Note(pair_id, generation, instance_id, qemu_pid, started(qemu_pid) or 0)

    def leave(self) -> None:
        """Raises NoteLost."""
        path = _path(self._folder)
        partial = f"{path}.new"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            # Exclusive: the folder is QEMU's user's, who must not lead our pen elsewhere.
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(self._note), file)
            os.rename(partial, path)
        except OSError as error:
            raise NoteLost(f"no note can be left in {self._folder}: {error}") from error

    def remove(self) -> None:
        remove(self._folder)


def find(folder: str) -> Note | None:
    """The note of the guest that runs here. Whatever else lies there is none: a dead QEMU's, another server's, or what
    somebody else wrote, as QEMU's user might."""
    try:
        descriptor = os.open(_path(folder), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        whose = os.fstat(descriptor)
        if not stat.S_ISREG(whose.st_mode) or whose.st_uid != os.geteuid():
            LOG.warning("the note in %s is not ours", folder)
            return None
        note = Note(**json.loads(os.read(descriptor, _MOST_BYTES)))
    except (ValueError, TypeError) as error:
        LOG.warning("the note in %s cannot be read: %s", folder, error)
        return None
    finally:
        os.close(descriptor)
    if note.instance_id != os.path.basename(folder) or started(note.qemu_pid) != note.qemu_started:
        return None
    return note


def remove(folder: str) -> None:
    """Idempotent."""
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        os.unlink(_path(folder))


def folders(runtime_dir: str) -> list[str]:
    """The servers' folders in which a note lies, of whatever worth."""
    return [entry.path for entry in os.scandir(runtime_dir)
            if entry.is_dir(follow_symlinks=False) and os.path.lexists(_path(entry.path))]


def started(pid: int) -> int | None:
    """When the process was started, in clock ticks since boot. None: there is none, or it has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[_STATE] in "ZX" else int(fields[_STARTED])


def _path(folder: str) -> str:
    return os.path.join(folder, _NAME)
