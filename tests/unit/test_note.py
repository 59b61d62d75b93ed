"""host/note.py: a guest's note is found by whoever starts later, and nothing else is taken for one."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nova_ftvm.host import note
from nova_ftvm.host.note import NoteFile, NoteLost

SERVER = "server"


@pytest.fixture
def qemu() -> Iterator[subprocess.Popen[bytes]]:
    """A process; no more is known of QEMU here."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / SERVER
    made.mkdir()
    return made


def pen(folder: Path, pid: int, generation: int = 3, instance_id: str = SERVER) -> NoteFile:
    return NoteFile(str(folder), "pair", generation, instance_id, pid)


def test_a_note_is_found_and_says_whose_guest_it_is(folder: Path, qemu: subprocess.Popen[bytes]) -> None:
    assert note.find(str(folder)) is None and note.folders(str(folder.parent)) == []
    pen(folder, qemu.pid).leave()
    found = note.find(str(folder))
    assert found is not None
    assert (found.pair_id, found.generation, found.instance_id) == ("pair", 3, SERVER)
    assert note.folders(str(folder.parent)) == [str(folder)]
    assert [path.name for path in folder.iterdir()] == ["primary.note"]


def test_the_last_word_counts(folder: Path, qemu: subprocess.Popen[bytes]) -> None:
    pen(folder, qemu.pid).leave()
    pen(folder, qemu.pid, generation=4).leave()
    found = note.find(str(folder))
    assert found is not None and found.generation == 4


def test_a_note_that_was_not_finished_is_none_and_in_nobodys_way(folder: Path, qemu: subprocess.Popen[bytes]) -> None:
    (folder / "primary.note.new").write_text('{"pair_id":')
    assert note.find(str(folder)) is None
    pen(folder, qemu.pid).leave()
    assert note.find(str(folder)) is not None


def test_a_note_goes_with_its_guest(folder: Path, qemu: subprocess.Popen[bytes]) -> None:
    pen(folder, qemu.pid).leave()
    os.kill(qemu.pid, signal.SIGKILL)
    os.waitid(os.P_PID, qemu.pid, os.WEXITED | os.WNOWAIT)
    assert note.find(str(folder)) is None, "a zombie is no guest"
    qemu.wait()
    assert note.find(str(folder)) is None


def test_another_process_with_the_guests_number_is_not_the_guest(folder: Path, qemu: subprocess.Popen[bytes],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    pen(folder, qemu.pid).leave()
    real = note.started
    monkeypatch.setattr(note, "started", lambda pid: (real(pid) or 0) + 1)
    assert note.find(str(folder)) is None


def test_a_note_of_another_server_is_none(folder: Path, qemu: subprocess.Popen[bytes]) -> None:
    pen(folder, qemu.pid, instance_id="another").leave()
    assert note.find(str(folder)) is None


def test_what_qemus_user_wrote_is_no_note(folder: Path, qemu: subprocess.Popen[bytes],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    pen(folder, qemu.pid).leave()
    monkeypatch.setattr(note.os, "geteuid", lambda: os.stat(folder / "primary.note").st_uid + 1)
    assert note.find(str(folder)) is None


@pytest.mark.parametrize("what", ["garbage", "other fields", "folder", "fifo", "link"])
def test_what_is_no_note_is_passed_over_and_can_be_removed(folder: Path, what: str) -> None:
    path = folder / "primary.note"
    {"garbage": lambda: path.write_bytes(b"\xff\x00{"), "other fields": lambda: path.write_text('{"pair": 1}'),
     "folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("/etc/passwd")}[what]()
    assert note.find(str(folder)) is None
    note.remove(str(folder))
    assert path.exists() == (what == "folder")


def test_a_note_that_cannot_be_left_is_told_and_the_one_before_it_stays(folder: Path, qemu: subprocess.Popen[bytes],
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    pen(folder, qemu.pid).leave()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(note.os, "rename", fails)
    with pytest.raises(NoteLost, match="No space left"):
        pen(folder, qemu.pid, generation=4).leave()
    found = note.find(str(folder))
    assert found is not None and found.generation == 3


def test_a_link_does_not_lead_the_pen_elsewhere(folder: Path, qemu: subprocess.Popen[bytes], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for name in ("primary.note", "primary.note.new"):
        (folder / name).symlink_to(tmp_path / "precious")
    pen(folder, qemu.pid).leave()
    assert note.find(str(folder)) is not None and (tmp_path / "precious").read_text() == "precious"


def test_a_note_is_removed_as_often_as_one_likes(folder: Path, qemu: subprocess.Popen[bytes]) -> None:
    pen(folder, qemu.pid).leave()
    for _ in range(2):
        note.remove(str(folder))
        assert list(folder.iterdir()) == []
