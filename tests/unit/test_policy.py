"""core/policy.py: when the next checkpoint is due, on a clock of the test's own."""

import dataclasses
import math
import random
from collections.abc import Iterator

import pytest

from nova_ftvm.conf import engine as engine_conf
from nova_ftvm.core import virtualclock
from nova_ftvm.core.policy import (
    AHEAD_S,
    MOST_OWED_S,
    Measured,
    Policy,
    due,
    earliest,
    learns,
    look,
    on_checkpoint,
    on_cut,
    on_released,
    on_resumed,
    watches,
)
from tests.unit import test_virtualclock

EPOCH_S = 0.05
#: A step of the simulated time, shorter than anything that the policies tell apart.
STEP_S = 50e-6


class Guest:
    """Sends at given times, and its processors are busy at others; a checkpoint stops it for `pause_s`."""

    def __init__(self, policy: Policy, pause_s: float = 0.004, gather_s: float = math.inf, busy_s: float = 0.005,
                 in_vain: int = 0) -> None:
        self.policy = policy
        self.pause_s = pause_s
        self.now = 0.0
        self.busy_until = 0.0
        self.seen = Measured(0.0, pause_s, busy_s=busy_s, commit_s=pause_s, gather_s=gather_s, in_vain=in_vain)
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
        self.seen = dataclasses.replace(self.seen, resumed=self.now, output_since=None, asleep_since=None)


def test_fixed_keeps_to_its_clock_whatever_is_sent() -> None:
    guest = Guest(Policy.FIXED)
    for number in range(100):
        guest.send()
        guest.run(0.01 * (number + 1))
    gaps = {round(later - earlier, 3) for earlier, later in zip(guest.checkpoints, guest.checkpoints[1:], strict=False)}
    assert gaps == {round(EPOCH_S + guest.pause_s, 3)}


def test_event_stops_the_guest_for_each_output() -> None:
    guest = Guest(Policy.EVENT)
    guest.run(0.01)
    for number in range(20):
        guest.send(busy_s=0.02)
        guest.run(0.01 * (number + 2))
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
    """Serves connections that ask again as soon as they are answered. The times are of a small guest under TCG.

    share: how fast the guest is while a checkpoint begins or is on its way, when others need the processors too.
    """

    PAUSE_S, TO_STOP_S, TO_ACK_S, TURNAROUND_S = 2.2e-3, 0.9e-3, 1.6e-3, 0.5e-3

    def __init__(self, connections: int, policy: Policy, epoch_s: float = EPOCH_S, share: float = 1.0,
                 service_s: float = 256e-6) -> None:
        self.policy, self.epoch_s, self.share, self.service_s = policy, epoch_s, share, service_s
        self.now = 0.0
        self.seen = Measured(0.0, self.PAUSE_S)
        self.answered = 0
        self._queue = connections
        self._arrivals: list[float] = []
        self._served_at = 0.0
        self._held = 0

    def _run_until(self, end: float, speed: float = 1.0) -> None:
        """The guest runs."""
        while self.now < end:
            self.now += STEP_S
            while self._arrivals and self._arrivals[0] <= self.now:
                self._arrivals.pop(0)
                self._queue += 1
            if self._queue and self.now >= self._served_at:
                self._queue -= 1
                self._served_at = self.now + self.service_s / speed
                self._held += 1
                self.seen.output_last = self._served_at
                self.seen.output_since = self.seen.output_since or self._served_at

    def is_asleep(self) -> bool:
        return not self._queue and self.now >= self._served_at

    def due(self) -> float:
        return due(self.policy, self.epoch_s, self.seen)

    def _epoch(self) -> None:
        while self.now < self.due():
            self._run_until(self.now + STEP_S)
            if watches(self.policy, self.seen) and self.now >= look(self.seen):
                self.seen.looked = self.now
                self.seen.asleep_since = (self.seen.asleep_since or self.now) if self.is_asleep() else None
        began = self.now
        on_checkpoint(self.seen, began)
        self._run_until(self.now + self.TO_STOP_S, self.share)
        covered, self._held = self._held, 0
        if self.seen.output_since is not None:
            on_cut(self.seen, covered > 1)
        self.now += self.PAUSE_S
        self._served_at += self.PAUSE_S
        self.seen = dataclasses.replace(self.seen, resumed=self.now, output_since=None, asleep_since=None)
        self._run_until(self.now + self.TO_ACK_S, self.share)
        self.seen.commit_s = self.now - began
        on_released(self.seen, not self.is_asleep())
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


class Eager(Service):
    """A checkpoint for each output, as soon as it waits."""

    def due(self) -> float:
        return math.inf if self.seen.output_since is None else self.seen.output_since


#: Processors enough for all, or hardly; requests that take long, or not.
WORLDS = pytest.mark.parametrize(("share", "service_s"), [(1.0, 256e-6), (0.4, 256e-6), (1.0, 80e-6), (0.4, 80e-6)])


@WORLDS
@pytest.mark.parametrize("connections", [1, 8, 32, 64, 128])
def test_adaptive_comes_near_to_the_best_that_a_chosen_length_could_do_whatever_the_load(
        connections: int, share: float, service_s: float) -> None:
    best = max(Service(connections, Policy.FIXED, epoch_s, share, service_s).rate()
               for epoch_s in (0.002, 0.004, 0.006, 0.012, 0.024))
    adaptive = Service(connections, Policy.ADAPTIVE, share=share, service_s=service_s).rate()
    assert adaptive > (0.85 if share < 1 else 0.8) * best


@WORLDS
@pytest.mark.parametrize("connections", [1, 2, 3, 4, 8, 16, 32, 64, 128])
def test_adaptive_serves_no_number_of_connections_worse_than_a_checkpoint_for_each_output(
        connections: int, share: float, service_s: float) -> None:
    eager = Eager(connections, Policy.EVENT, share=share, service_s=service_s).rate()
    adaptive = Service(connections, Policy.ADAPTIVE, share=share, service_s=service_s).rate()
    # What the guest could do while an epoch is on its way is more than nothing only where processors are idle.
    assert adaptive > (0.99 if share < 1 else 0.85) * eager


def test_a_guest_with_much_to_do_need_not_run_dry_and_one_that_does_anyway_says_all_at_once() -> None:
    seen = Measured(0.0, pause_s=0.002, busy_s=0.009, commit_s=0.005)
    on_released(seen, is_busy=False)
    assert seen.gather_s == math.inf, "it would run dry"
    seen.busy_s = 0.011
    on_released(seen, is_busy=False)
    first = seen.gather_s
    assert 0 < first < seen.busy_s
    on_released(seen, is_busy=True)
    assert first < seen.gather_s
    for _ in range(1000):
        on_released(seen, is_busy=True)
    assert 0.02 < seen.gather_s < 0.1
    for _ in range(1000):
        on_released(seen, is_busy=False)
        if seen.gather_s == math.inf:
            break
        on_checkpoint(seen, 1.0)
        assert seen.busy_s == 0.011, "nobody has seen for how long it would have been busy"
    assert seen.gather_s == math.inf


def test_who_has_little_to_say_is_not_waited_for_until_there_is_more() -> None:
    guest = Guest(Policy.ADAPTIVE)

    def waits(until: float) -> bool:
        guest.send(busy_s=0.002)
        guest.run(until)
        return guest.waits[-1] > 0.002

    for number in range(4):
        assert waits(0.1 * (number + 1))
        on_cut(guest.seen, more=False)
    assert not waits(0.5) and guest.waits[-1] <= 2 * STEP_S
    on_released(guest.seen, is_busy=True)
    assert not waits(0.6), "what it does beside that is not said"
    guest.seen.output_since = guest.now
    on_released(guest.seen, is_busy=False)
    assert waits(0.7), "it had more to say"


def test_one_reply_that_found_company_is_enough_to_be_waited_for() -> None:
    seen = Measured(0.0, busy_s=0.001, in_vain=3)
    on_cut(seen, more=True)
    on_cut(seen, more=False)
    seen.output_since = 1.0
    assert watches(Policy.ADAPTIVE, seen)


def test_what_a_brief_guest_still_says_until_it_stands_is_no_reason_to_wait_for_it() -> None:
    seen = Measured(0.0, busy_s=0.001, in_vain=4)
    on_cut(seen, more=True)
    seen.output_since = 1.0
    assert not watches(Policy.ADAPTIVE, seen), "the checkpoint that it did not have to wait for covers it"


def test_nobody_looks_while_the_guest_is_surely_busy() -> None:
    seen, looks, now = Measured(0.0, pause_s=0.002, busy_s=0.003, commit_s=0.005), [], 0.0
    for epoch in range(100):
        seen = dataclasses.replace(seen, resumed=now, output_since=now, asleep_since=None)
        looks.append(0)
        while seen.asleep_since is None:
            now = max(now, look(seen))
            looks[-1] += 1
            seen.looked = now
            # So long it is busy: much less, after half of the epochs.
            if now >= seen.output_since + (0.003 if epoch < 50 else 0.0001):
                seen.asleep_since = now
        on_checkpoint(seen, now)
    assert looks[0] > 20 and max(looks[25:50]) < 10
    assert seen.blind_s < 0.0001, "a guest that is less busy is looked at sooner"


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
                assert 4.0 <= when <= max(6.0 + EPOCH_S, 5.0 + min(pause_s, MOST_OWED_S))


def test_an_operator_can_choose_each_policy_and_no_other() -> None:
    (option,) = (option for option in engine_conf.OPTS if option.name == "policy")
    assert list(option.type.choices) == [str(policy) for policy in reversed(Policy)]


def test_nobody_looks_at_processors_that_do_not_matter() -> None:
    talking, silent = Measured(0.0, 0.0, output_since=1.0, busy_s=0.001), Measured(0.0)
    assert [watches(policy, talking) for policy in Policy] == [False, False, True]
    assert not any(watches(policy, silent) for policy in Policy)
    assert not watches(Policy.ADAPTIVE, dataclasses.replace(talking, in_vain=4)), "nobody waits for it"
    assert not any(learns(policy, silent) for policy in Policy), "all is gathered"
    assert not watches(Policy.ADAPTIVE, dataclasses.replace(talking, busy_s=0.0)), "nor for this one"
    assert [policy for policy in Policy if learns(policy, Measured(0.0, gather_s=0.004))] == [Policy.ADAPTIVE]


# The guest's share of the time


class Loaded:
    """Sends without an end, its processors busy or asleep by chance; its pauses are as long as they are drawn."""

    WINDOW_S = 5.0

    def __init__(self, policy: Policy, most_paused: float, pauses: Iterator[float], epoch_s: float = 1e-3,
                 send_s: float = STEP_S) -> None:
        self.policy, self.most_paused, self.epoch_s, self.send_s = policy, most_paused, epoch_s, send_s
        self._pauses = pauses
        self._source = random.Random(7)
        self.now = 0.0
        self.seen = Measured(0.0)
        #: When each began, and how long it was.
        self.pauses: list[tuple[float, float]] = []

    def run(self, until: float) -> "Loaded":
        while self.now < until:
            self._send()
            self.now = max(self.now, earliest(self.seen))
            wanted = due(self.policy, self.epoch_s, self.seen)
            if self.now >= wanted:
                self._checkpoint()
            else:
                self.now = max(self.now + STEP_S, min(wanted, self.now + self.send_s))
        return self

    def _send(self) -> None:
        self.seen.output_last = self.now
        if self.seen.output_since is None:
            self.seen.output_since = self.now
        if watches(self.policy, self.seen) and self.now >= look(self.seen):
            self.seen.looked = self.now
            self.seen.asleep_since = self.now if self._source.random() < 0.1 else None

    def _checkpoint(self) -> None:
        pause_s = next(self._pauses)
        self.pauses.append((self.now, pause_s))
        on_checkpoint(self.seen, self.now)
        self.now += pause_s
        self.seen.output_since = self.seen.asleep_since = None
        on_resumed(self.seen, self.most_paused, self.now, pause_s)

    @property
    def share(self) -> float:
        return sum(pause_s for _, pause_s in self.pauses) / self.now

    def worst_share(self) -> float:
        """Of any window that begins with a pause: no other has more."""
        worst, end, paused_s = 0.0, 0, 0.0
        for began, pause_s in self.pauses:
            while end < len(self.pauses) and sum(self.pauses[end]) <= began + self.WINDOW_S:
                paused_s += self.pauses[end][1]
                end += 1
            worst = max(worst, paused_s / self.WINDOW_S)
            paused_s -= pause_s
        return worst


#: Seconds: as under KVM, as of a guest under TCG, and now and then one that writes much.
DRAWN = {"short": (0.8e-3,), "long": (4e-3,), "mixed": (0.4e-3, 0.8e-3, 2e-3, 8e-3, 0.4e-3, 0.8e-3, 60e-3)}


def drawn(kind: str, seed: int = 1) -> Iterator[float]:
    source = random.Random(seed)
    while True:
        yield source.choice(DRAWN[kind]) * source.uniform(0.8, 1.2)


@pytest.mark.parametrize("kind", list(DRAWN))
@pytest.mark.parametrize("percent", [5, 10, 50])
@pytest.mark.parametrize("policy", list(Policy))
def test_no_policy_lets_a_guest_stand_for_more_of_its_time_than_it_may(policy: Policy, percent: int,
                                                                       kind: str) -> None:
    share, longest = percent / 100, 1.2 * max(DRAWN[kind])
    loaded = Loaded(policy, share, drawn(kind)).run(11.0)
    tolerance = (share * AHEAD_S + (1 - share) * longest) / loaded.WINDOW_S
    assert loaded.worst_share() <= share + tolerance
    assert tolerance < 0.04, "most of it is what it may run ahead, or one pause of 72 ms"


class EarlyStop(Loaded):
    """Its clock stops `early_s` before its processors do; STOP and RESUME are told, and what the state has."""

    def __init__(self, policy: Policy, most_paused: float, pauses: Iterator[float], early_s: float) -> None:
        super().__init__(policy, most_paused, pauses)
        self._early_s = early_s
        self._excess = virtualclock.ClockExcess()
        self._lost_s = 0.0

    def _checkpoint(self) -> None:
        pause_s, began = next(self._pauses), self.now
        clock_ns = round(1e9 * (began - self._lost_s))
        on_checkpoint(self.seen, began)
        stopped = began + self._early_s
        self.now = stopped + pause_s
        # What is judged is what the clock stood, not what is told.
        self.pauses.append((began, self.now - began))
        self._lost_s += self.now - began
        self.seen.output_since = self.seen.asleep_since = None
        excess_s = self._excess.on_checkpoint(round(1e6 * stopped), round(1e6 * self.now),
                                              test_virtualclock.state(clock_ns))
        on_resumed(self.seen, self.most_paused, self.now, pause_s, excess_s)


@pytest.mark.parametrize("early_s", [0.2e-3, 0.5e-3, 2e-3])
@pytest.mark.parametrize("percent", [5, 8, 50])
@pytest.mark.parametrize("policy", list(Policy))
def test_the_bound_holds_for_a_clock_that_loses_more_than_the_pauses(policy: Policy, percent: int,
                                                                     early_s: float) -> None:
    share, longest = percent / 100, 1.2 * max(DRAWN["short"]) + early_s
    loaded = EarlyStop(policy, share, drawn("short"), early_s).run(11.0)
    assert loaded.worst_share() <= share + (share * AHEAD_S + (1 - share) * longest) / loaded.WINDOW_S
    if percent < 50:
        assert loaded.share > 0.95 * share, "and what it may lose is used"


@pytest.mark.parametrize("percent", [5, 10, 50])
@pytest.mark.parametrize("policy", [Policy.FIXED, Policy.EVENT])
def test_what_a_guest_may_stand_is_used_where_the_policy_asks_for_it(policy: Policy, percent: int) -> None:
    loaded = Loaded(policy, percent / 100, drawn("long")).run(11.0)
    assert 0.95 * percent < 100 * loaded.share < 1.03 * percent


def test_without_the_bound_they_would_stand_for_more() -> None:
    loaded = Loaded(Policy.FIXED, 0.5, drawn("long")).run(5.0)
    assert loaded.share > 0.45, "so a bound of 5 % and of 10 % is one"


@pytest.mark.parametrize("policy", list(Policy))
def test_with_half_of_the_time_a_guest_only_runs_as_long_as_it_stood(policy: Policy) -> None:
    loaded, seen = Loaded(policy, 0.5, drawn("mixed")), Measured(0.0)
    for number in range(200):
        loaded.run(0.05 * (number + 1))
        seen = loaded.seen
        assert earliest(seen) - seen.resumed == pytest.approx(seen.pause_s, abs=1e-9)


def test_a_guest_that_ran_without_pauses_has_some_replies_that_do_not_wait() -> None:
    for percent, least in ((5, 10), (10, 25)):
        seen, now, waited = Measured(0.0), 1.0, []
        for _ in range(200):
            # It sends 1 ms after each restart: longer than the pause, shorter than its share of the time.
            seen.output_since = now
            wait_s = max(0.0, due(Policy.EVENT, 0.0, seen) - now)
            waited.append(wait_s > 0)
            now += wait_s + 0.8e-3
            on_resumed(seen, percent / 100, now, 0.8e-3)
            now += 1e-3
        assert waited.index(True) >= least and waited[-50:] == [True] * 50


@pytest.mark.parametrize("percent", [1, 5, 50])
def test_one_pause_of_seconds_keeps_checkpoints_back_for_a_bounded_time_and_once(percent: int) -> None:
    seen = Measured(0.0)
    on_resumed(seen, percent / 100, 10.0, 5.0)
    assert earliest(seen) == 10.0 + MOST_OWED_S
    on_resumed(seen, percent / 100, 10.0 + MOST_OWED_S + 0.001, 0.001)
    assert earliest(seen) - seen.resumed == pytest.approx(0.001 * (100 / percent - 1)), "the rest of it is forgotten"


def test_a_clock_that_steps_back_is_no_pause_and_gives_no_time() -> None:
    seen = Measured(0.0)
    on_resumed(seen, 0.05, 10.0, -3.0)
    assert (seen.pause_s, seen.owed_s) == (0.0, -AHEAD_S) and earliest(seen) == 10.0


def test_what_the_clock_lost_beyond_the_pause_is_owed_and_makes_the_pause_no_longer() -> None:
    seen = Measured(0.0)
    on_resumed(seen, 0.05, 10.0, 0.02)
    owed_s = seen.owed_s
    on_resumed(seen, 0.05, 10.1, 0.001, 0.0005)
    assert seen.pause_s == 0.001
    assert seen.owed_s == pytest.approx(owed_s - 0.0985 + 0.0015 * 19), "it did not run in that time, either"


def test_a_guest_that_sleeps_is_looked_at_again_only_when_its_checkpoint_may_be_taken() -> None:
    seen = Measured(10.0, pause_s=0.001, output_since=10.001, looked=10.002, busy_s=0.001, owed_s=0.02)
    assert look(seen) < 10.003, "it is busy"
    seen.asleep_since = 10.002
    assert 10.0195 < look(seen) < 10.02
