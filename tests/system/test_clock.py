"""A protected guest's clock under load, on hosts without KVM: what it loses to pauses chrony makes up for, if the
operator bounds them; and it is right again after a failover. Compared from outside with this machine's clock."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from ftvm_lab import timekeeping
from ftvm_lab.failover import Stage
from ftvm_lab.timekeeping import Lost, Watched

pytestmark = [pytest.mark.trial, pytest.mark.timeout(1200)]

PERCENT = 5.0
WITHOUT_S, WITH_S, AFTER_KILL_S = 30.0, 180.0, 75.0
#: Above it counts what each pause takes from the clock before QEMU says that it began.
MOST_LOST = 0.08
#: ms
MEDIAN_OFF, MOST_OFF, MOST_LATE = 30.0, 150.0, 1500.0
BACK_S = 30.0


@dataclass(frozen=True, slots=True)
class Story:
    without: Watched
    kept: Watched
    lost: Lost


@pytest.fixture(scope="module")
def story(stage: Stage) -> Iterator[Story]:
    with timekeeping.timekeeper(stage, PERCENT) as one:
        without = one.watch(WITHOUT_S)
        one.start_chrony()
        one.watch(timekeeping.SETTLE_S)
        kept = one.watch(WITH_S)
        lost = one.lose_host(AFTER_KILL_S)
        for watched in (without, kept, lost.watched):
            print(timekeeping.shown(watched))
        print(f"late by {lost.late_ms} ms, back after {lost.back_s} s, settled after {lost.settled_s} s")
        yield Story(without, kept, lost)


def test_without_a_client_the_clock_loses_the_pauses_and_they_are_bounded(story: Story) -> None:
    assert story.without.paused_percent is not None
    assert PERCENT / 2 < story.without.paused_percent < PERCENT + 0.5
    assert story.without.paused_percent / 100 - 0.005 < 1 - story.without.clock.rate < MOST_LOST


def test_under_load_chrony_keeps_a_clock_whose_pauses_are_bounded(story: Story) -> None:
    clock = story.kept.clock
    assert story.kept.is_followed, story.kept.tracking
    assert 1 - clock.raw_rate > PERCENT / 200, "there was nothing to make up for"
    assert clock.off_ms_p50 < MEDIAN_OFF
    assert clock.off_ms_max < MOST_OFF
    assert abs(clock.rate - 1) < MOST_OFF / 1000 / WITH_S * 2


def test_no_client_sees_the_time_go_back_and_nothing_sets_the_clock(story: Story) -> None:
    for watched in (story.kept, story.lost.watched):
        assert (watched.clock.backwards, watched.clock.steps_ms) == (0, [])


def test_after_its_host_died_the_clock_is_late_by_the_failover_and_chrony_brings_it_back(story: Story) -> None:
    lost = story.lost
    assert -min(MOST_LATE, lost.silence_ms + MOST_OFF) < lost.late_ms < MOST_OFF
    assert lost.back_s is not None and lost.back_s < BACK_S
    assert lost.settled_s is not None
    assert lost.watched.is_followed, lost.watched.tracking
