"""The queue of pairs: a key waits once, is with one taker, and comes again when it was asked for meanwhile."""

import threading

from nova_ftvm.failover.loops import Loop, Queue


class Time:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_key_waits_only_once():
    queue = Queue(Time())
    queue.put("a")
    queue.put("a")
    assert queue.take(0) == "a"
    queue.done("a")
    assert queue.take(0) is None


def test_a_key_that_is_asked_for_while_it_is_taken_comes_again_and_not_before():
    queue = Queue(Time())
    queue.put("a")
    assert queue.take(0) == "a"
    queue.put("a")
    assert queue.take(0) is None
    queue.done("a")
    assert queue.take(0) == "a"


def test_a_taken_key_holds_no_other_up():
    queue = Queue(Time())
    queue.put("a")
    assert queue.take(0) == "a"
    queue.put("a")
    queue.put("b")
    assert queue.take(0) == "b"


def test_a_delayed_key_comes_when_it_is_due():
    time = Time()
    queue = Queue(time)
    queue.put("a", 5.0)
    assert queue.take(0) is None
    time.now = 5.0
    assert queue.take(0) == "a"


def test_an_earlier_time_wins():
    time = Time()
    queue = Queue(time)
    queue.put("a", 5.0)
    queue.put("a", 1.0)
    queue.put("a", 9.0)
    time.now = 1.0
    assert queue.take(0) == "a"
    queue.done("a")
    time.now = 10.0
    assert queue.take(0) is None


def test_a_waiting_taker_is_woken():
    queue = Queue()
    taken = []
    thread = threading.Thread(target=lambda: taken.append(queue.take(10)))
    thread.start()
    queue.put("a")
    thread.join(5)
    assert taken == ["a"]


def test_a_loop_outlives_its_bodys_failure(monkeypatch):
    monkeypatch.setattr("nova_ftvm.failover.loops._BACK_OFF_S", 0.0)
    went_on = threading.Event()
    rounds = []

    def body():
        rounds.append(1)
        if len(rounds) == 1:
            raise ValueError("nobody expected this")
        went_on.set()

    loop = Loop("test", body)
    loop.start()
    assert went_on.wait(5)
    loop.stop()
    loop.join(5)
