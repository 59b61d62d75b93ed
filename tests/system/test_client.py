"""The demo's client must see every fault; a guest that misbehaves on purpose proves it."""

import asyncio
from collections.abc import Callable

import pytest
from ftvm_lab.client import Exchange, Pace, Record, run_client, summarize
from ftvm_lab.session import Session, Verdict

from tests.system.serving import Answer, serving

FAST = Pace(think_s=0.0, silence_s=0.3, grace_s=0.2)
FAULTY_REQUEST = 5


class Guest:
    """The guest's half of the protocol. `answer` may be replaced by a faulty one."""

    def __init__(self) -> None:
        self.count = 0
        self.chain = 0

    def step(self, nonce: int) -> None:
        self.count += 1
        self.chain = (self.chain * 31 + nonce) % (2**31 - 1)

    def answer(self, seq: int, nonce: int) -> list[bytes]:
        self.step(nonce)
        return [self.reply(seq)]

    def reply(self, seq: int) -> bytes:
        return b"%d %d %d\n" % (seq, self.count, self.chain)


class LosesAReply(Guest):
    def answer(self, seq: int, nonce: int) -> list[bytes]:
        return super().answer(seq, nonce) if seq != FAULTY_REQUEST else []


class LosesState(Guest):
    """Answers, but without the effect of one request: a state that was rolled back."""

    def step(self, nonce: int) -> None:
        if self.count != FAULTY_REQUEST:
            super().step(nonce)


class RepeatsARequest(Guest):
    """Applies one request twice."""

    def answer(self, seq: int, nonce: int) -> list[bytes]:
        if seq == FAULTY_REQUEST:
            self.step(nonce)
        return super().answer(seq, nonce)


class RepeatsAReply(Guest):
    def answer(self, seq: int, nonce: int) -> list[bytes]:
        lines = super().answer(seq, nonce)
        return lines * 2 if seq == FAULTY_REQUEST else lines


class ReordersRequests(Guest):
    """Applies another nonce in one request's place, as if two had changed places."""

    def step(self, nonce: int) -> None:
        super().step(nonce + 1 if self.count == FAULTY_REQUEST else nonce)


class HangsUp(Guest):
    def answer(self, seq: int, nonce: int) -> list[bytes]:
        if seq == FAULTY_REQUEST:
            raise ConnectionAbortedError
        return super().answer(seq, nonce)


def connected(make: Callable[[], Guest]) -> Answer:
    guest = make()
    return lambda line: guest.answer(*map(int, line.split()))


def records_of(make: Callable[[], Guest], seconds: float = 0.2) -> list[Record]:
    async def run() -> list[Record]:
        stop = asyncio.Event()
        async with serving(lambda: connected(make)) as address:
            asyncio.get_running_loop().call_later(seconds, stop.set)
            return await run_client(address, 3, FAST, stop)

    return asyncio.run(run())


def test_a_faithful_guest_has_no_faults() -> None:
    report = summarize(records_of(Guest))
    assert (report.lost, report.wrong, report.reconnects) == (0, 0, 0)
    assert report.connections == 3
    assert report.requests > 3 * FAULTY_REQUEST


def test_a_request_without_a_reply_is_lost_even_when_the_client_ends_first() -> None:
    report = summarize(records_of(LosesAReply))
    assert report.lost == 3
    assert report.wrong == 0


def test_a_silent_connection_is_given_up_and_its_reopening_is_counted() -> None:
    report = summarize(records_of(LosesAReply, seconds=0.5))
    assert report.lost >= 3
    assert report.reconnects >= 3
    assert report.longest_gap_ms >= FAST.silence_s * 1000


@pytest.mark.parametrize("guest", [LosesState, RepeatsARequest, ReordersRequests])
def test_a_state_that_went_wrong_once_is_wrong_for_ever(guest: type[Guest]) -> None:
    records = records_of(guest)
    for record in records:
        assert record.wrong > len(record.exchanges) - FAULTY_REQUEST - 2 > 0


def test_a_repeated_reply_is_wrong_and_the_session_goes_on() -> None:
    records = records_of(RepeatsAReply)
    assert [record.wrong for record in records] == [1, 1, 1]
    assert all(len(record.exchanges) > FAULTY_REQUEST for record in records)


def test_a_closed_connection_is_a_lost_request_and_a_reconnect() -> None:
    for record in records_of(HangsUp):
        assert record.lost == record.reconnects >= 1


def test_the_first_reply_after_a_mark_ends_the_longest_silence_of_all_connections() -> None:
    # One reply was on its way when the power failed; then nobody hears anything for 0.4 s.
    first = Record(exchanges=[Exchange(9.9, 10.01), Exchange(10.02, 10.45)])
    second = Record(exchanges=[Exchange(9.95, 10.41), Exchange(10.42, 10.43)])
    assert summarize([first, second], mark_s=10.0).first_reply_ms == 410.0


def test_replies_are_judged_by_their_request_first() -> None:
    session = Session()
    session.ask(7)
    assert session.judge(b"1 1 7\n") is Verdict.RIGHT
    session.ask(3)
    assert session.judge(b"1 1 7\n") is Verdict.WRONG_REQUEST
    assert session.judge(b"2 1 7\n") is Verdict.WRONG_STATE
    assert session.judge(b"\n") is Verdict.WRONG_REQUEST
    assert session.judge(b"2 2 220\n") is Verdict.RIGHT
