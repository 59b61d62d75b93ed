"""engine/freight.py and core/replica.py: what one loads the other unloads, as changes or as it is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_ftvm.core import delta, dirty, wire
from nova_ftvm.core.replica import Apply, Replica
from nova_ftvm.engine.capture import Checkpoint
from nova_ftvm.engine.freight import Freight
from nova_ftvm.exception import ProtocolError
from nova_ftvm.types import PAGE, Buffer, Epoch, RamBlock
from tests.unit.frames import BLOCKS, GENERATION, LIMIT, join, pages

#: The shortest that is allowed: an epoch takes many frames.
SHORT = 1 << 16


class Line:
    """A primary's freight, the wire, and the replica at its end."""

    def __init__(self, limit: int = LIMIT, blocks: list[RamBlock] = BLOCKS) -> None:
        self.freight = Freight(GENERATION, len(blocks), limit, self._carry)
        self.replica = Replica(blocks)
        self.decoder = wire.Decoder(GENERATION, limit)
        self.kinds: list[wire.Kind] = []
        self.ram: dict[tuple[int, int], bytes] = {}

    def ship(self, captured: list[dirty.Pages], state: bytes) -> int:
        self.kinds.clear()
        checkpoint = Checkpoint(pages=captured, state=bytearray(state))
        epoch = Epoch(self.replica.committed + 1)
        for _ in self.freight.ship(epoch, checkpoint):
            pass
        frames, shipped = self.freight.commit(epoch, checkpoint)
        self._carry(frames)
        return shipped

    def _carry(self, buffers: list[Buffer]) -> None:
        for frame in self.decoder.feed(join(buffers)):
            self.kinds.append(frame.kind)
            for action in self.replica.on_frame(frame):
                if isinstance(action, Apply):
                    for piece in self.replica.apply():
                        self._write(piece)

    def _write(self, piece: dirty.Pages) -> None:
        for number, contents in zip(dirty.expand(piece.runs).tolist(), piece.contents.reshape(-1, PAGE), strict=True):
            self.ram[piece.block, number] = bytes(contents)


#: What the guest wrote, its device state, and whether the epoch goes as changes.
Written = tuple[dict[int, int], bytes, bool]
EPOCHS = st.lists(st.tuples(st.dictionaries(st.integers(0, 63), st.integers(0, 3), max_size=40),
                            st.binary(min_size=1, max_size=3 * PAGE), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(EPOCHS, st.sampled_from([SHORT, LIMIT]))
def test_the_replica_is_the_guest_after_each_epoch(epochs: list[Written], limit: int) -> None:
    line = Line(limit)
    guest: dict[tuple[int, int], bytes] = {}
    for number, (written, state, thrifty) in enumerate(epochs, 1):
        line.freight._worth.is_given = lambda thrifty=thrifty: thrifty
        captured = [pages([page], value) for page, value in sorted(written.items())]
        guest |= {(0, page): bytes([value]) * PAGE for page, value in written.items()}
        line.ship(captured, state)
        assert (line.replica.committed, line.replica.device_state) == (number, state)
        assert line.ram == guest


def test_a_state_that_becomes_shorter_and_long_again_is_whole() -> None:
    line = Line()
    for state in (b"a" * 3 * PAGE, b"b", b"a" * 3 * PAGE, b"a" * (3 * PAGE - 1) + b"c", b"d" * PAGE):
        line.ship([], state)
        assert line.replica.device_state == state


def test_what_was_sent_before_takes_next_to_nothing() -> None:
    line = Line()
    state = bytes(np.arange(PAGE, dtype=np.uint8).repeat(4))
    first = line.ship([pages([1, 2, 3])], state)
    assert first > 3 * PAGE + len(state) > 20 * line.ship([pages([1, 2, 3])], state)


def test_an_epoch_of_new_contents_is_followed_by_some_that_go_as_they_are() -> None:
    line = Line(blocks=[RamBlock("pc.ram", 400 * PAGE)])
    random = np.random.default_rng(1)

    def filled() -> list[dirty.Pages]:
        runs = np.array([[0, 400]], np.uint32)
        return [dirty.Pages(0, runs, random.integers(0, 255, 400 * PAGE, np.uint8))]

    modes = []
    for _ in range(20):
        line.ship(filled(), b"state")
        modes.append(wire.Kind.CHANGES in line.kinds)
        assert (wire.Kind.DEVICE_CHANGES in line.kinds) == modes[-1] != (wire.Kind.PAGES in line.kinds)
    assert modes == [True, *[False] * 15, True, *[False] * 3]
    for _ in range(20):
        line.ship([pages([7], 9)], b"other")
    assert wire.Kind.CHANGES not in line.kinds and line.ram[0, 7] == b"\x09" * PAGE, "nothing changed any more"
    assert line.replica.device_state == b"other"


@pytest.mark.parametrize("payload", [
    b"", bytes(7), b"\0\x07" + bytes(6), b"\0\0\0\0\0\0\0\x01" + np.array([[0, 1]], "<u4").tobytes(),
    b"\0\0\0\0\0\0\0\x01" + np.array([[0, 1]], "<u4").tobytes() + bytes(delta.MASK_BYTES) + bytes(8),
    b"\0\0\0\0\0\0\0\x01" + np.array([[64, 1]], "<u4").tobytes() + bytes(delta.MASK_BYTES),
])
@pytest.mark.parametrize("kind", [wire.Kind.CHANGES, wire.Kind.DEVICE_CHANGES])
def test_changes_that_do_not_fit_are_refused(kind: wire.Kind, payload: bytes) -> None:
    replica = Replica(BLOCKS)
    head = (5).to_bytes(4, "big") if kind is wire.Kind.DEVICE_CHANGES else b""
    with pytest.raises(ProtocolError):
        replica.on_frame(wire.Frame(kind, GENERATION, Epoch(1), head + payload))
