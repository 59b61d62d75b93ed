"""core/replica.py: a whole epoch or nothing."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_ftvm.core import delta, wire
from nova_ftvm.core.disk import DiskWrite
from nova_ftvm.core.replica import Acknowledge, Action, Apply, Replica, Write, WriteDisks
from nova_ftvm.exception import ProtocolError
from nova_ftvm.types import Epoch
from tests.unit.frames import (
    BLOCKS,
    DISKS,
    GENERATION,
    LIMIT,
    decode,
    disk_frames,
    epoch_frames,
    page_frames,
    pages,
    write,
)

EPOCH_1 = decode(*epoch_frames(1, [pages([1, 2, 9]), pages([0], 2, block=1)], b"state 1"))
EPOCH_2 = decode(*epoch_frames(2, [pages([2], 3)], b"state 2", writes=[write(0, 0, b"new"), write(1, 8, b"er")]))
PRELOAD = decode(*page_frames(wire.Kind.PRELOAD, 0, pages([5, 6])))[0]


def carried_out(replica: Replica, frame: wire.Frame) -> list[Action]:
    """As the engine does: what is to be applied is what is written."""
    return [Write(tuple(replica.apply())) if action == Apply() else action for action in replica.on_frame(frame)]


def fed(frames: list[wire.Frame]) -> tuple[Replica, list]:
    replica = Replica(BLOCKS, DISKS)
    return replica, [action for frame in frames for action in carried_out(replica, frame)]


def test_an_epoch_is_acknowledged_when_it_is_here_and_written_once_and_whole() -> None:
    replica, actions = fed(EPOCH_1)
    acknowledge, write = actions
    assert isinstance(write, Write) and [(p.block, p.count) for p in write.pages] == [(0, 3), (1, 1)]
    assert acknowledge == Acknowledge(Epoch(1))
    assert (replica.committed, replica.device_state) == (1, b"state 1")


@pytest.mark.parametrize("length", range(len(EPOCH_2)))
def test_no_prefix_of_an_epoch_changes_anything(length: int) -> None:
    replica, actions = fed(EPOCH_1 + EPOCH_2[:length])
    assert len(actions) == 2
    assert (replica.committed, replica.device_state) == (1, b"state 1")


@given(st.data())
def test_a_lost_repeated_or_reordered_frame_never_commits_a_wrong_epoch(data: st.DataObject) -> None:
    """What reaches COMMIT is all of it, or the epoch is refused and the last one stays."""
    frames = data.draw(st.lists(st.sampled_from(EPOCH_2), max_size=6))
    replica, _ = fed(EPOCH_1)
    actions: list = []
    try:
        for frame in frames:
            actions += carried_out(replica, frame)
    except ProtocolError:
        pass
    if not actions:
        assert (replica.committed, replica.device_state) == (1, b"state 1")
        return
    until_commit = frames[:frames.index(EPOCH_2[-1]) + 1]
    assert sorted(f.kind for f in until_commit) == sorted(f.kind for f in EPOCH_2)
    assert (replica.committed, replica.device_state) == (2, b"state 2")


@pytest.mark.parametrize("wrong", [EPOCH_1[0], EPOCH_1[-1], decode(*epoch_frames(3, []))[0]])
def test_a_frame_of_another_epoch_is_refused(wrong: wire.Frame) -> None:
    replica, _ = fed(EPOCH_1)
    with pytest.raises(ProtocolError, match=f"of epoch {wrong.epoch} after epoch 1"):
        replica.on_frame(wrong)
    assert replica.committed == 1


def test_a_commit_with_a_wrong_number_of_frames_is_refused() -> None:
    replica, _ = fed(EPOCH_1 + EPOCH_2[1:-1])
    with pytest.raises(ProtocolError, match="frames, pages and disk writes"):
        replica.on_frame(EPOCH_2[-1])
    assert (replica.committed, replica.device_state) == (1, b"state 1")


def test_an_epoch_without_device_state_is_refused() -> None:
    commit = decode(b"".join(bytes(b) for b in wire.encode_commit(GENERATION, Epoch(1), 0, 0, 0)))[0]
    replica = Replica(BLOCKS)
    with pytest.raises(ProtocolError, match="no device state"):
        replica.on_frame(commit)
    assert replica.committed == 0


def test_changes_whose_words_do_not_fit_their_masks_are_refused_before_anything_is_acknowledged() -> None:
    whole = decode(*(b"".join(map(bytes, frame)) for _, frame in wire.encode_changes(
        GENERATION, Epoch(1), pages([1, 2]), delta.Memory(), LIMIT)))[0]
    replica = Replica(BLOCKS)
    with pytest.raises(ProtocolError, match="words do not fit"):
        replica.on_frame(dataclasses.replace(whole, payload=bytes(whole.payload) + bytes(8)))
    assert replica.on_frame(whole) == () and replica.committed == 0


def test_an_epoch_without_pages_is_an_epoch() -> None:
    replica, actions = fed(decode(*epoch_frames(1, [])))
    assert actions == [Acknowledge(Epoch(1)), Write(())]
    assert replica.committed == 1


def test_a_device_state_in_pieces_is_put_together() -> None:
    pieces = [b"one ", b"two"]
    sent = [wire.Frame(wire.Kind.DEVICE, GENERATION, Epoch(1), piece) for piece in pieces]
    commit = decode(b"".join(bytes(b) for b in wire.encode_commit(GENERATION, Epoch(1), 2, 0, 0)))
    assert fed(sent + commit)[0].device_state == b"one two"


def test_preload_is_written_at_once_and_acknowledged_never() -> None:
    replica, actions = fed([PRELOAD, PRELOAD])
    assert [type(action) for action in actions] == [Write, Write]
    assert replica.committed == 0


@pytest.mark.parametrize("before", [EPOCH_1, EPOCH_1[:1], EPOCH_1[2:3]])
def test_preload_is_refused_once_the_first_epoch_began(before: list[wire.Frame]) -> None:
    replica, _ = fed(before)
    committed = replica.committed
    with pytest.raises(ProtocolError, match="PRELOAD after"):
        replica.on_frame(PRELOAD)
    assert replica.committed == committed


@pytest.mark.parametrize("kind", set(wire.Kind) - {wire.Kind.PRELOAD, wire.Kind.PAGES, wire.Kind.DEVICE,
                                                    wire.Kind.COMMIT})
def test_other_frames_are_no_part_of_an_epoch(kind: wire.Kind) -> None:
    replica = Replica(BLOCKS)
    with pytest.raises(ProtocolError):
        replica.on_frame(wire.Frame(kind, GENERATION, Epoch(1)))
    assert replica.committed == 0


def test_pages_that_leave_a_block_are_refused_and_not_staged() -> None:
    replica = Replica(BLOCKS[1:])
    with pytest.raises(ProtocolError, match="leaves RAM block"):
        replica.on_frame(EPOCH_1[0])
    whole = decode(*epoch_frames(1, [pages([0])]))
    assert [type(action) for frame in whole for action in replica.on_frame(frame)] == [Acknowledge, Apply]


# Disks


def told(writes: tuple[DiskWrite, ...]) -> list[tuple[int, int, bytes]]:
    return [(w.disk, w.offset, bytes(w.contents)) for w in writes]


def test_an_epochs_disk_writes_come_in_their_order_before_the_acknowledgement_that_may_have_to_wait_for_them() -> None:
    _, actions = fed(EPOCH_1 + EPOCH_2)
    disks, acknowledge, write_pages = actions[2:]
    assert isinstance(write_pages, Write) and isinstance(disks, WriteDisks) and acknowledge == Acknowledge(Epoch(2))
    assert told(disks.writes) == [(0, 0, b"new"), (1, 8, b"er")]


def test_disk_writes_of_an_epoch_that_is_not_committed_are_never_seen() -> None:
    _, actions = fed(EPOCH_1 + EPOCH_2[:-1])
    assert not [action for action in actions if isinstance(action, WriteDisks)]


def test_disk_writes_may_come_over_long_before_the_rest_of_their_epoch() -> None:
    first, second = (disk_frames(wire.Kind.DISK, 1, [write(0, n, b"x")]) for n in (0, 512))
    rest = epoch_frames(1, [pages([3])])[:-1]
    commit = [b"".join(bytes(b) for b in wire.encode_commit(GENERATION, Epoch(1), 4, 1, 2))]
    replica, actions = fed(decode(*first, *second, *rest, *commit))
    assert replica.committed == 1 and told(actions[0].writes) == [(0, 0, b"x"), (0, 512, b"x")]


def test_a_disk_write_that_is_missing_keeps_the_epoch_back() -> None:
    frames = [frame for frame in EPOCH_2 if frame.kind is not wire.Kind.DISK]
    replica, _ = fed(EPOCH_1)
    with pytest.raises(ProtocolError, match="disk writes"):
        for frame in frames:
            replica.on_frame(frame)
    assert replica.committed == 1


def test_what_is_copied_first_goes_to_the_disks_at_once_and_never_after_an_epoch_began() -> None:
    preload = decode(*disk_frames(wire.Kind.DISK_PRELOAD, 0, [write(2, 0, b"config")]))
    replica, actions = fed(preload)
    assert told(actions[0].writes) == [(2, 0, b"config")] and replica.committed == 0
    for begun in (EPOCH_1[:1], EPOCH_1, decode(*disk_frames(wire.Kind.DISK, 1, [write(0, 0, b"x")]))):
        replica, _ = fed(begun)
        with pytest.raises(ProtocolError, match="after the first epoch began"):
            replica.on_frame(preload[0])
