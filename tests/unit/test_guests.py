"""host/guests.py: what is done to a guest in its engine's place."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nova_ftvm.exception import GuestGone, QemuError
from nova_ftvm.host import note
from nova_ftvm.host.guests import Guests
from nova_ftvm.host.note import NoteFile
from tests.unit.engine_fakes import FakeQemu

SERVER = "server"


class Here(Guests):
    """With a QEMU of the test's, and no libvirt."""

    def __init__(self, folder: Path, status: str) -> None:
        super().__init__(str(folder), (os.geteuid(), os.getegid()), "test:///")
        self.make_folder(SERVER)
        self.qemu = FakeQemu()
        self.qemu.answers["query-status"] = [{"status": status}]
        for query in ("qom-list", "query-chardev", "query-jobs", "query-named-block-nodes"):
            self.qemu.answers[query] = [[]]

    @contextlib.contextmanager
    def _monitor(self, instance_id: str) -> Iterator[Any]:
        if self.qemu.gone:
            raise GuestGone("no monitor")
        yield self.qemu

    def _libvirt(self, call: Callable[[Any], Any]) -> Any:
        raise GuestGone("libvirt cannot be reached")

    def note(self) -> None:
        NoteFile(self.folder(SERVER), "pair", 3, SERVER, os.getpid()).leave()

    @property
    def noted(self) -> bool:
        return note.find(self.folder(SERVER)) is not None


@pytest.mark.parametrize("status", ["paused", "running", "guest-panicked", "io-error"])
def test_a_guest_that_is_let_go_stays_as_it_is_and_has_no_note(tmp_path: Path, status: str) -> None:
    here = Here(tmp_path, status)
    here.note()
    here.let_go(SERVER)
    assert not {"cont", "stop"} & set(here.qemu.sent) and not here.noted


def test_a_guest_that_cannot_be_let_go_keeps_its_note(tmp_path: Path) -> None:
    here = Here(tmp_path, "running")
    here.note()
    here.qemu.gone = True
    with pytest.raises(GuestGone):
        here.let_go(SERVER)
    assert here.noted


def test_a_guest_that_is_destroyed_takes_its_note_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Here(tmp_path, "running")
    here.note()
    with pytest.raises(GuestGone):
        here.destroy(SERVER)
    assert here.noted
    monkeypatch.setattr(Here, "_libvirt", lambda self, call: True)
    assert here.destroy(SERVER) and not here.noted


# A promotion in a dead engine's place


def test_a_guest_that_runs_is_promoted_and_announced(tmp_path: Path) -> None:
    here = Here(tmp_path, "running")
    assert here.finish_promotion(SERVER)
    assert "cont" not in here.qemu.sent and here.qemu.sent[-1] == "announce-self"


def test_a_guest_that_has_its_checkpoint_is_resumed_though_libvirt_is_away(tmp_path: Path) -> None:
    here = Here(tmp_path, "paused")
    assert here.finish_promotion(SERVER) and here.qemu.sent[-2:] == ["cont", "announce-self"]


@pytest.mark.parametrize("status", ["inmigrate", "guest-panicked", "shutdown"])
def test_what_waits_for_its_checkpoint_or_has_ended_is_not_promoted(tmp_path: Path, status: str) -> None:
    here = Here(tmp_path, status)
    assert not here.finish_promotion(SERVER)
    assert not {"cont", "announce-self"} & set(here.qemu.sent)


def test_a_guest_that_is_gone_is_not_promoted(tmp_path: Path) -> None:
    here = Here(tmp_path, "running")
    here.qemu.gone = True
    assert not here.finish_promotion(SERVER)


def test_a_guest_that_qemu_does_not_resume_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Here(tmp_path, "paused")
    answer = here.qemu.command

    def refuses(command: str, **arguments: Any) -> Any:
        if command == "cont":
            raise QemuError(command, "no")
        return answer(command, **arguments)

    monkeypatch.setattr(here.qemu, "command", refuses)
    with pytest.raises(QemuError):
        here.finish_promotion(SERVER)
