"""core/outbox.py: everything leaves once, in order, however little the socket takes."""

from hypothesis import given
from hypothesis import strategies as st

from nova_ftvm.core.outbox import Outbox


@given(st.lists(st.binary(max_size=50), max_size=40), st.data())
def test_all_leaves_in_order_and_the_size_is_what_waits(buffers: list[bytes], data: st.DataObject) -> None:
    outbox, left = Outbox(), b""
    for buffer in buffers:
        outbox.add(buffer)
    whole = b"".join(buffers)
    while outbox:
        batch = b"".join(bytes(part) for part in outbox.batch())
        taken = data.draw(st.integers(1, len(batch)))
        outbox.sent(taken)
        left += batch[:taken]
        assert outbox.size == len(whole) - len(left)
    assert left == whole


def test_a_batch_is_no_more_than_the_kernel_takes_at_once() -> None:
    outbox = Outbox()
    for _ in range(3000):
        outbox.add(b"x")
    assert len(outbox.batch()) == 1024
