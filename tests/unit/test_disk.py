"""core/disk.py: what is on its way, by epoch."""

from hypothesis import given
from hypothesis import strategies as st

from nova_ftvm.core.disk import ENTRY_BYTES, DiskLog, DiskOp, DiskWrite
from nova_ftvm.types import Epoch
from tests.unit.frames import write


@given(st.lists(st.sampled_from(["write", "cut", "ack"]), max_size=60))
def test_what_is_on_its_way_is_what_no_acknowledged_epoch_holds(steps: list[str]) -> None:
    log = DiskLog(1000)
    epochs, acknowledged = [0], 0
    for step in steps:
        if step == "write":
            log.add([write(0, 0, b"x" * 100)])
            epochs[-1] += 100 + ENTRY_BYTES
        elif step == "cut":
            assert log.cut() == epochs[-1]
            epochs.append(0)
        elif acknowledged < len(epochs) - 1:
            acknowledged += 1
            log.acknowledged(Epoch(acknowledged))
        assert log.on_its_way == sum(epochs[acknowledged:]) and log.epoch == len(epochs)
        assert log.full == (log.on_its_way >= 1000)


def test_writes_without_contents_take_room_too() -> None:
    log = DiskLog(ENTRY_BYTES)
    log.add([DiskWrite(0, DiskOp.DISCARD, 0, 1 << 30)])
    assert log.full
