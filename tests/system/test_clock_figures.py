"""What is said of a guest's clock from samples of it, and what of chrony; no lab."""

import socket
import threading
import time

import pytest
from ftvm_lab import clock_client, clock_figures
from ftvm_lab.clock_figures import Sample, keeping
from ftvm_lab.command import LabError
from ftvm_lab.ntp import read_tracking

SECOND, MS = 1_000_000_000, 1_000_000
TRACKING = "0A580002,10.88.0.2,2,1796083200.5,0.001234,0.002,0.003,-52000.5,0.1,12.5,0.004,0.005,4.0,Normal\n"


def sample(at_ms: int, off_ms: float = 0.0, set_ms: float = 0.0, way_ms: float = 0.0, lost: float = 0.0) -> Sample:
    """A guest whose clock is off, and was set by `set_ms` since it booted. lost: the share that its hardware loses."""
    at = at_ms * MS
    real = int(at + (off_ms + way_ms) * MS)
    return Sample(at, at, 5 * MS, real, int(real - set_ms * MS), int(at * (1 - lost)), 1000)


def test_the_offset_is_that_of_the_shortest_way_in_each_second() -> None:
    samples = [sample(0, 7, way_ms=90), sample(300, 7, way_ms=1), sample(900, 7, way_ms=30), sample(1100, -4)]
    assert clock_figures.offsets_ms(samples) == [(0.3, 8.0), (1.1, -4.0)]


def test_a_clock_that_is_behind_and_one_that_is_ahead_are_both_off() -> None:
    found = keeping([sample(1000 * second, off) for second, off in enumerate((-40, 10, 10, 10))])
    assert (found.offset_ms_p50, found.off_ms_p50, found.off_ms_max) == (10.0, 10.0, 40.0)


def test_slewing_is_no_step_and_being_set_is_one_forwards_or_backwards() -> None:
    assert keeping([sample(0, 0), sample(100, 30), sample(200, -30)]).steps_ms == []
    found = keeping([sample(0), sample(1000, 300, set_ms=300), sample(2000, 100, set_ms=100)])
    assert found.steps_ms == [300.0, -200.0]
    assert found.backwards == 0


def test_an_answer_that_tells_an_earlier_time_than_the_one_before_it_is_counted() -> None:
    assert keeping([sample(0, 200), sample(100, 0), sample(200, 0)]).backwards == 1


def test_the_rate_without_a_client_is_what_the_hardware_counts() -> None:
    found = keeping([sample(second * 1000, lost=0.05) for second in range(11)])
    assert (found.rate, found.raw_rate, found.seconds) == (1.0, 0.95, 10.0)


@pytest.mark.parametrize(
    ("offsets", "back_s", "settled_s"),
    [
        ((-400, -200, -30, -60, -20, 10), 2.0, 4.0),
        ((10, 20), 0.0, 0.0),
        ((-400, -20, -80), 1.0, None),
        ((90,), None, None),
    ],
    ids=["late", "never away", "away again", "never back"],
)
def test_a_clock_is_back_within_the_bound_and_settled_when_it_stays_there(
    offsets: tuple[float, ...], back_s: float | None, settled_s: float | None
) -> None:
    samples = [sample(1000 * second, off) for second, off in enumerate(offsets)]
    assert clock_figures.back_after_s(samples, 50.0) == back_s
    assert clock_figures.settled_after_s(samples, 50.0) == settled_s


def test_what_chrony_says_is_read_and_a_lost_server_is_no_synchronisation() -> None:
    found = read_tracking(TRACKING)
    assert (found.is_synchronised, found.left_s) == (True, 0.001234)
    assert (found.frequency_ppm, found.skew_ppm) == (-52000.5, 12.5)
    assert not read_tracking(TRACKING.replace("Normal", "Not synchronised")).is_synchronised
    assert not read_tracking(TRACKING.replace("0A580002", "00000000")).is_synchronised
    with pytest.raises(LabError, match="nothing of use"):
        read_tracking("506 Cannot talk to daemon\n")


def test_the_asker_takes_no_late_answer_for_that_of_its_question() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as guest, socket.socket(
        socket.AF_INET, socket.SOCK_DGRAM
    ) as end:
        guest.bind(("127.0.0.1", 0))
        end.connect(guest.getsockname())

        def answer() -> None:
            word, where = guest.recvfrom(64)
            guest.sendto(b"6 1 1 1 1", where)
            guest.sendto(word + b" 11 12 13 14", where)

        thread = threading.Thread(target=answer)
        thread.start()
        before = time.time_ns()
        found = clock_client.question(end, 7)
        thread.join()
        assert found is not None
        sent, _, took, *told = found
        assert told == [11, 12, 13, 14]
        assert before <= sent <= sent + took <= time.time_ns() + MS


def test_a_question_that_nobody_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_client, "SILENCE_S", 0.01)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as guest, socket.socket(
        socket.AF_INET, socket.SOCK_DGRAM
    ) as end:
        guest.bind(("127.0.0.1", 0))
        end.connect(guest.getsockname())
        assert clock_client.question(end, 7) is None
