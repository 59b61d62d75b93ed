"""core/policy.py: when the next checkpoint is due, on a clock of the test's own."""

import math

import pytest

from nova_ftvm.conf import engine as engine_conf
from nova_ftvm.core.policy import Measured, Policy, due, gathers, learns, watches

EPOCH_S = 0.05
#: A step of the simulated time, shorter than anything that the policies tell apart.
STEP_S = 50e-6


class Guest:
    """Sends at given times, and its processors are busy at others; a checkpoint stops it for `pause_s`."""

    def __init__(self, policy: Policy, pause_s: float = 0.004, gather_s: float = math.inf) -> None:
        self.policy = policy
        self.gather_s = gather_s
        self.pause_s = pause_s
        self.now = 0.0
        self.busy_until = 0.0
        self.seen = Measured(0.0, pause_s, gather_s=gather_s)
        self.checkpoints: list[float] = []
        #: How long each output waited for a checkpoint.
        self.waits: list[float] = []
        self._sent: list[float] = []

    def send(self, busy_s: float = 0.0) -> None:
        self._sent.append(self.now)
        self.busy_until = max(self.busy_until, self.now + busy_s)
        self.seen.output_last = self.now
        if self.seen.output_since is None:
            self.seen.output_since = self.now

    def run(self, until: float) -> None:
        while self.now < until:
            self.now += STEP_S
            if watches(self.policy, self.seen):
                asleep = self.now >= self.busy_until
                self.seen.asleep_since = (self.seen.asleep_since or self.now) if asleep else None
            if self.now >= due(self.policy, EPOCH_S, self.seen):
                self._checkpoint()

    def _checkpoint(self) -> None:
        self.checkpoints.append(self.now)
        self.waits += [self.now - sent for sent in self._sent]
        self._sent = []
        self.now += self.pause_s
        self.busy_until += self.pause_s
        self.seen = Measured(self.now, self.pause_s, gather_s=self.gather_s)


def test_fixed_keeps_to_its_clock_whatever_is_sent() -> None:
    guest = Guest(Policy.FIXED)
    for number in range(100):
        guest.send()
        guest.run(0.01 * (number + 1))
    gaps = {round(later - earlier, 3) for earlier, later in zip(guest.checkpoints, guest.checkpoints[1:], strict=False)}
    assert gaps == {round(EPOCH_S + guest.pause_s, 3)}


def test_event_stops_the_guest_for_each_output() -> None:
    guest = Guest(Policy.EVENT)
    for number in range(20):
        guest.send(busy_s=0.02)
        guest.run(0.01 * (number + 1))
    assert len(guest.checkpoints) == 20 and max(guest.waits) <= 2 * STEP_S


def test_adaptive_takes_a_reply_at_once_when_the_guest_has_gone_to_sleep() -> None:
    guest = Guest(Policy.ADAPTIVE)
    guest.run(0.05)
    guest.send(busy_s=0.001)
    guest.run(0.06)
    assert len(guest.checkpoints) == 1 and 0.001 < max(guest.waits) < 0.0015


def test_adaptive_gathers_what_a_busy_guest_sends() -> None:
    guest = Guest(Policy.ADAPTIVE)
    guest.run(0.05)
    for number in range(16):
        guest.send(busy_s=0.001)
        guest.run(0.05 + 0.0005 * (number + 1))
    guest.run(0.08)
    assert len(guest.checkpoints) == 1 and len(guest.waits) == 16


def test_adaptive_does_not_let_one_reply_wait_for_company_when_the_guest_works_at_something_else() -> None:
    guest = Guest(Policy.ADAPTIVE)
    guest.busy_until = 1e9
    for number in range(20):
        guest.run(0.1 * (number + 1))
        guest.send()
    guest.run(2.1)
    assert len(guest.waits) == 20 and max(guest.waits) < 2 * guest.pause_s


def test_adaptive_gathers_slow_replies_too_so_that_pauses_are_a_small_part_of_the_time() -> None:
    guest = Guest(Policy.ADAPTIVE)
    guest.busy_until = 1e9
    for _ in range(400):
        guest.send()
        guest.run(guest.now + 0.006)
    assert sum(guest.pause_s for _ in guest.checkpoints) < 0.15 * guest.now


def test_adaptive_lets_no_output_of_a_busy_guest_wait_for_long() -> None:
    guest = Guest(Policy.ADAPTIVE)
    guest.busy_until = 1e9
    for number in range(1000):
        guest.send()
        guest.run(0.001 * (number + 1))
    assert max(guest.waits) < 0.05
    assert sum(guest.pause_s for _ in guest.checkpoints) < 0.2 * guest.now, "the pause is a small part of the time"


@pytest.mark.parametrize("gather_s", [0.0, math.inf])
@pytest.mark.parametrize("pause_s", [0.002, 0.02, 0.2])
def test_adaptive_leaves_the_guest_half_of_the_time_whatever_it_sends_and_it_has_learned(pause_s: float,
                                                                                         gather_s: float) -> None:
    guest = Guest(Policy.ADAPTIVE, pause_s, gather_s)
    for _ in range(200):
        guest.send()
        guest.run(guest.now + pause_s / 4)
    paused = sum(guest.pause_s for _ in guest.checkpoints)
    assert 0.2 * guest.now < paused <= 0.5 * guest.now + pause_s


class Service:
    """Serves connections that ask again as soon as they are answered. The times are of a small guest under TCG."""

    SERVICE_S, PAUSE_S, TO_STOP_S, TO_ACK_S, TURNAROUND_S = 256e-6, 2.2e-3, 0.9e-3, 1.6e-3, 0.5e-3

    def __init__(self, connections: int, policy: Policy, epoch_s: float = EPOCH_S) -> None:
        self.policy, self.epoch_s = policy, epoch_s
        self.now = 0.0
        self.seen = Measured(0.0, self.PAUSE_S)
        self.answered = 0
        self._queue = connections
        self._arrivals: list[float] = []
        self._served_at = 0.0
        self._held = 0

    def _run_until(self, end: float) -> None:
        """The guest runs."""
        while self.now < end:
            self.now += STEP_S
            while self._arrivals and self._arrivals[0] <= self.now:
                self._arrivals.pop(0)
                self._queue += 1
            if self._queue and self.now >= self._served_at:
                self._queue -= 1
                self._served_at = self.now + self.SERVICE_S
                self._held += 1
                self.seen.output_last = self._served_at
                self.seen.output_since = self.seen.output_since or self._served_at

    def is_asleep(self) -> bool:
        return not self._queue and self.now >= self._served_at

    def _epoch(self) -> None:
        while self.now < due(self.policy, self.epoch_s, self.seen):
            self._run_until(self.now + STEP_S)
            if watches(self.policy, self.seen):
                self.seen.asleep_since = (self.seen.asleep_since or self.now) if self.is_asleep() else None
        self._run_until(self.now + self.TO_STOP_S)
        covered, self._held = self._held, 0
        self.now += self.PAUSE_S
        self._served_at += self.PAUSE_S
        self.seen = Measured(self.now, self.PAUSE_S, gather_s=self.seen.gather_s)
        self._run_until(self.now + self.TO_ACK_S)
        self.seen.gather_s = gathers(self.seen, not self.is_asleep())
        self._arrivals += [self.now + self.TURNAROUND_S] * covered
        self.answered += covered

    def rate(self, seconds: float = 0.6) -> float:
        """Answers a second, once the policy has learned."""
        while self.now < seconds:
            self._epoch()
        before, since = self.answered, self.now
        while self.now < since + seconds:
            self._epoch()
        return (self.answered - before) / (self.now - since)


@pytest.mark.parametrize("connections", [1, 8, 32, 64, 128])
def test_adaptive_comes_near_to_the_best_that_a_chosen_length_could_do_whatever_the_load(connections: int) -> None:
    best = max(Service(connections, Policy.FIXED, epoch_s).rate() for epoch_s in (0.002, 0.004, 0.006, 0.012, 0.024))
    assert Service(connections, Policy.ADAPTIVE).rate() > 0.85 * best


@pytest.mark.parametrize("connections", [1, 2, 3, 4, 8, 16, 32, 64, 128])
def test_adaptive_serves_no_number_of_connections_worse_than_a_checkpoint_for_each_output(connections: int) -> None:
    assert Service(connections, Policy.ADAPTIVE).rate() > 0.99 * Service(connections, Policy.EVENT).rate()


def test_a_guest_that_runs_dry_while_an_epoch_is_on_its_way_was_let_run_for_too_long() -> None:
    seen = Measured(0.0, pause_s=0.002, gather_s=0.01)
    assert gathers(seen, busy=False) < 0.01 < gathers(seen, busy=True)
    for _ in range(1000):
        seen.gather_s = gathers(seen, busy=False)
    assert seen.gather_s == 0.0
    for _ in range(1000):
        seen.gather_s = gathers(seen, busy=True)
    assert 0.02 < seen.gather_s < 0.1


@pytest.mark.parametrize("policy", [Policy.EVENT, Policy.ADAPTIVE])
def test_a_guest_that_says_nothing_is_stopped_seldom_and_never_forgotten(policy: Policy) -> None:
    guest = Guest(policy)
    guest.run(20.0)
    gaps = [later - earlier for earlier, later in zip(guest.checkpoints, guest.checkpoints[1:], strict=False)]
    assert max(gaps) < 1.1 and guest.pause_s * len(gaps) < 0.03 * guest.now


@pytest.mark.parametrize("policy", list(Policy))
def test_something_is_always_due(policy: Policy) -> None:
    for pause_s in (0.0, 1e-6, 0.004, 1.0, 100.0):
        for output_since in (None, 4.0, 5.5):
            for asleep_since in (None, 5.5):
                when = due(policy, EPOCH_S, Measured(5.0, pause_s, output_since, output_since or 0.0, asleep_since))
                assert 4.0 <= when <= 6.0 + EPOCH_S


def test_an_operator_can_choose_each_policy_and_no_other() -> None:
    (option,) = (option for option in engine_conf.OPTS if option.name == "policy")
    assert list(option.type.choices) == [str(policy) for policy in reversed(Policy)]


def test_nobody_looks_at_processors_that_do_not_matter() -> None:
    talking, silent = Measured(0.0, 0.0, output_since=1.0), Measured(0.0)
    assert [watches(policy, talking) for policy in Policy] == [False, False, True]
    assert not any(watches(policy, silent) for policy in Policy)
    assert [policy for policy in Policy if learns(policy)] == [Policy.ADAPTIVE]
