"""host/disks.py: what needs no QEMU."""

import os
from pathlib import Path

import pytest

from nova_ftvm.host.disks import _samples, ended_mirror, fingerprint

MIB = 1 << 20
OURS = f"ftvm-disk-{os.getpid()}-0"


def base(folder: Path, contents: bytes = b"", size: int = 40 * MIB, name: str = "base") -> str:
    folder.mkdir(exist_ok=True)
    path = folder / name
    with path.open("wb") as image:
        image.truncate(size)
        image.write(contents)
    return str(path)


def test_a_base_is_the_same_wherever_it_lies_and_however_sparse_it_is(tmp_path: Path) -> None:
    contents = b"boot" + bytes(8 * MIB) + b"x" * 9 * MIB
    here, there = base(tmp_path / "a", contents), base(tmp_path / "b", contents.ljust(40 * MIB, b"\0"))
    assert fingerprint(here) == fingerprint(there)


@pytest.mark.parametrize("other", [{"name": "another"}, {"size": 41 * MIB}, {"contents": b"y"},
                                   {"contents": b"x" + bytes(MIB - 2) + b"y"},
                                   {"contents": b"x".ljust(40 * MIB - 1, b"\0") + b"y"},
                                   {"contents": b"x".ljust(20 * MIB, b"\0") + b"y" * MIB}])
def test_a_base_of_another_name_size_or_contents_is_another(tmp_path: Path, other: dict) -> None:
    assert fingerprint(base(tmp_path / "a", b"x")) != fingerprint(base(tmp_path / "b", **{"contents": b"x", **other}))


@pytest.mark.parametrize("size", [0, 1, 512, 3 * MIB + 512, 50 << 30, 5 << 40])
def test_a_fingerprint_reads_a_bounded_part_of_any_image(size: int) -> None:
    offsets = _samples(size)
    assert len(offsets) * (1 << 16) <= 32 * MIB
    assert all(0 <= offset < size for offset in offsets) and offsets == sorted(set(offsets))
    assert not size or (offsets[0] == 0 and offsets[-1] + (1 << 16) >= size)


@pytest.mark.parametrize(("event", "facts", "why"), [
    ("BLOCK_JOB_CANCELLED", {}, "somebody cancelled the mirror of a disk"),
    ("BLOCK_JOB_COMPLETED", {"error": "Input/output error"}, "the mirror of a disk ended: Input/output error"),
    ("BLOCK_JOB_COMPLETED", {}, "the mirror of a disk ended: somebody completed it"),
    ("BLOCK_JOB_ERROR", {"operation": "write"}, "the mirror of a disk failed to write"),
    ("BLOCK_JOB_READY", {}, "")])
def test_the_end_of_one_of_our_mirrors_is_told_and_no_other_jobs(event: str, facts: dict, why: str) -> None:
    assert ended_mirror({"event": event, "data": {"device": OURS, "type": "mirror", **facts}}) == why
    for device in ("drive-virtio-disk0", "ftvm-disk-0-0", ""):
        assert ended_mirror({"event": event, "data": {"device": device, **facts}}) == ""


@pytest.mark.parametrize("message", [{"event": "STOP"}, {"return": {}, "id": "save"},
                                     {"event": "JOB_STATUS_CHANGE", "data": {"id": OURS, "status": "aborting"}},
                                     {"id": "save", "error": {"class": "GenericError", "desc": "no"}}])
def test_other_messages_end_no_mirror(message: dict) -> None:
    assert ended_mirror(message) == ""
