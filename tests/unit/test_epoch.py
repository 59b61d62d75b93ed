"""core/epoch.py: its promises under any events, the same promises broken on purpose, and scripted lives."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_ftvm.core.epoch import (
    ACK_ALLOWANCE_S,
    ASK_AGAIN_S,
    COPY_SILENCE_S,
    DISK_ALLOWANCE_S,
    HAND_OVER_LIMIT_S,
    OVER,
    Act,
    Acts,
    EpochLoop,
    Phase,
)
from nova_ftvm.core.policy import Policy
from nova_ftvm.types import Epoch, Generation, Grant
from tests.unit.epoch_world import EVENTS, PACE, Broken, Checker, random_life

GRANTED = Grant(True, Generation(2))
REFUSED = Grant(False, Generation(2), "the backup speaks")


# Any events


@settings(max_examples=300)
@given(st.lists(st.sampled_from(EVENTS), max_size=60))
def test_the_promises_hold_under_any_events(events: list[str]) -> None:
    Checker(EpochLoop(PACE, 0.0)).drive(events)


@settings(max_examples=300)
@given(st.sampled_from(Policy), st.lists(st.sampled_from(EVENTS), max_size=60))
def test_the_promises_hold_under_any_policy(policy: Policy, events: list[str]) -> None:
    Checker(EpochLoop(dataclasses.replace(PACE, policy=policy), 0.0)).drive(events)


def test_the_promises_hold_through_long_lives_and_all_phases_are_seen() -> None:
    lives = [random_life(EpochLoop(PACE, 0.0), seed).loop for seed in range(600)]
    assert {loop.phase for loop in lives} >= OVER
    assert max(loop.epoch for loop in lives) >= 3


# Broken on purpose: the checker bites


class ReleasesBeforeTheAck(EpochLoop):
    def on_resumed(self, now: float, pages: int, disk_bytes: int, pause_s: float = 0.0, excess_s: float = 0.0) -> Acts:
        acts = super().on_resumed(now, pages, disk_bytes, pause_s, excess_s)
        return (*acts, Act.RELEASE) if Act.COMMIT in acts else acts


class ReleasesForAnyAck(EpochLoop):
    def on_ack(self, epoch: Epoch) -> Acts:
        return super().on_ack(self.epoch)


class LetsGoInSilence(EpochLoop):
    def tick(self, now: float) -> Acts:
        acts = super().tick(now)
        return (*acts, Act.UNBUFFER) if Act.ASK in acts else acts


class DoesNotWaitForTheAck(EpochLoop):
    def tick(self, now: float) -> Acts:
        if self.phase is Phase.UNACKNOWLEDGED:
            self.phase = Phase.RUNNING
        return super().tick(now)


class ForgetsToCapture(EpochLoop):
    def on_state_begins(self) -> Acts:
        return tuple(act for act in super().on_state_begins() if act is not Act.CAPTURE)


class CapturesAtTheStop(EpochLoop):
    """QEMU still ends the guest's disk requests: what they bring comes without a sign."""

    def on_stopped(self) -> Acts:
        stopped = self.phase is Phase.STOPPING
        return (*super().on_stopped(), Act.CAPTURE) if stopped else ()


class LetsTheDisksGoEarly(EpochLoop):
    def on_peer_lost(self, why: str, now: float) -> Acts:
        return (Act.UNMIRROR, *super().on_peer_lost(why, now))


class SpeaksAfterTheFence(EpochLoop):
    def on_grant(self, grant: Grant) -> Acts:
        if self.phase is Phase.FENCED:
            self.phase = Phase.HOLDING
        return super().on_grant(grant)


class LeavesACheckpointInTheMiddle(EpochLoop):
    def on_peer_lost(self, why: str, now: float) -> Acts:
        if self.phase not in OVER:
            self.phase = Phase.HOLDING
        return ()


class StopsInTheMiddle(EpochLoop):
    def on_stop(self, why: str) -> Acts:
        if self.phase in OVER:
            return ()
        self.phase = Phase.ENDED
        return (Act.SAY_BYE, Act.UNBUFFER)


class ForgetsTheBuffers(EpochLoop):
    def on_live_pass(self, pages: int) -> Acts:
        return tuple(act for act in super().on_live_pass(pages) if act is not Act.BUFFER)


class ProtectsBeforeTheStop(EpochLoop):
    def on_live_pass(self, pages: int) -> Acts:
        return (*super().on_live_pass(pages), Act.PROTECT)


class ComesBackAfterTheEnd(EpochLoop):
    def on_checkpoint_failed(self, why: str, now: float) -> Acts:
        self.phase = Phase.HOLDING
        return self._ask(now)


@pytest.mark.parametrize("broken", [
    ReleasesBeforeTheAck, ReleasesForAnyAck, LetsGoInSilence, DoesNotWaitForTheAck, ForgetsToCapture, CapturesAtTheStop,
    LetsTheDisksGoEarly, SpeaksAfterTheFence, LeavesACheckpointInTheMiddle, StopsInTheMiddle, ForgetsTheBuffers,
    ProtectsBeforeTheStop, ComesBackAfterTheEnd])
def test_a_broken_loop_is_caught(broken: type[EpochLoop]) -> None:
    with pytest.raises(Broken):
        for seed in range(600):
            random_life(broken(PACE, 0.0), seed)


# Scripts


def running(epochs: int = 1) -> EpochLoop:
    """A loop between checkpoints, after so many of them."""
    loop = EpochLoop(PACE, 0.0)
    loop.on_live_pass(1)
    for number in range(1, epochs + 1):
        if number > 1:
            loop.tick(1.0 * number)
        loop.on_stopped()
        loop.on_state_begins()
        loop.on_resumed(1.0 * number, 10, 0)
        loop.on_ack(Epoch(number))
    assert (loop.phase, loop.epoch) == (Phase.RUNNING, epochs)
    return loop


def in_phase(phase: Phase) -> EpochLoop:
    """A loop in its first checkpoint, as far as asked."""
    loop = EpochLoop(PACE, 0.0)
    if phase is Phase.COPYING:
        return loop
    loop.on_live_pass(1)
    for step in (loop.on_stopped, loop.on_state_begins, lambda: loop.on_resumed(0.0, 10, 0),
                 lambda: loop.on_ack(Epoch(1))):
        if loop.phase is phase:
            break
        step()
    if phase is Phase.HOLDING:
        loop.on_peer_lost("lost", 0.0)
    assert loop.phase is phase
    return loop


def test_one_epoch_from_the_batch_to_the_release() -> None:
    loop = EpochLoop(PACE, 0.0)
    trace = [
        loop.on_live_pass(5000), loop.on_live_pass(50), loop.on_stopped(), loop.on_state_begins(),
        loop.on_resumed(1.0, 10, 0),
        loop.on_ack(Epoch(1)), loop.tick(1.019), loop.tick(1.021), loop.on_stopped(), loop.on_state_begins(),
        loop.on_resumed(1.03, 10, 0), loop.on_ack(Epoch(1)), loop.on_ack(Epoch(2))]
    assert [[act.name for act in acts] for acts in trace] == [
        [], ["BUFFER", "CHECKPOINT"], ["PROTECT"], ["CAPTURE", "OPEN_GATE", "SHIP"], ["COMMIT"],
        ["RELEASE", "REPORT_PROTECTED"], ["BEAT"], ["CHECKPOINT"], ["PROTECT"], ["CAPTURE", "OPEN_GATE", "SHIP"],
        ["COMMIT"], [], ["RELEASE"]]


def test_the_live_copy_ends_after_its_most_passes() -> None:
    loop = EpochLoop(PACE, 0.0)
    assert [loop.on_live_pass(5000) for _ in range(3)] == [(), (), (Act.BUFFER, Act.CHECKPOINT)]


def test_output_stays_held_when_the_ack_is_lost() -> None:
    loop = in_phase(Phase.UNACKNOWLEDGED)
    limit_s = PACE.ack_limit_s + 10 * ACK_ALLOWANCE_S
    assert Act.ASK not in loop.tick(limit_s - 0.001)
    assert loop.tick(limit_s + 0.001) == (Act.ASK, Act.UNMIRROR)
    assert loop.phase is Phase.HOLDING and "no acknowledgement within 501 ms" in loop.reason
    assert loop.on_ack(Epoch(1)) == ()
    assert loop.tick(limit_s + ASK_AGAIN_S) == ()
    assert loop.tick(limit_s + ASK_AGAIN_S + 0.002) == (Act.ASK,)
    assert loop.phase is Phase.HOLDING


def test_a_large_epoch_may_take_longer_to_be_acknowledged() -> None:
    loop = in_phase(Phase.DRAINING)
    loop.on_resumed(0.0, 100_000, 0)
    assert Act.ASK not in loop.tick(5.4)
    assert Act.ASK in loop.tick(5.6) and "no acknowledgement within 5600 ms" in loop.reason


def test_a_long_epoch_of_disk_writes_has_time_while_the_backup_is_heard_of() -> None:
    whole = 64 << 20
    for heard in (True, False):
        loop = in_phase(Phase.DRAINING)
        loop.on_resumed(0.0, 0, whole)
        moments = [0.1 * n for n in range(1, 100)]
        for now in moments:
            if heard:
                loop.on_heard(now)
            if Act.ASK in loop.tick(now):
                break
        limit_s = PACE.ack_limit_s + (whole * DISK_ALLOWANCE_S if heard else 0)
        assert now == pytest.approx(limit_s, abs=0.11) and loop.phase is Phase.HOLDING


def test_a_full_log_brings_the_next_checkpoint_at_once() -> None:
    loop = running()
    assert Act.CHECKPOINT not in loop.tick(1.001)
    loop.on_filling()
    assert loop.next_tick() <= 1.001 and Act.CHECKPOINT in loop.tick(1.001)


def test_a_full_log_waits_too_until_the_guest_had_its_share_of_the_time() -> None:
    for most_paused, owed_s in ((0.5, 0.1), (0.05, 1.65)):
        loop = EpochLoop(dataclasses.replace(PACE, most_paused=most_paused), 0.0)
        loop.on_live_pass(1)
        loop.on_stopped()
        loop.on_state_begins()
        loop.on_resumed(1.0, 10, 0, pause_s=0.1)
        loop.on_ack(Epoch(1))
        loop.on_filling()
        assert Act.CHECKPOINT not in loop.tick(1.0 + owed_s - 0.001) and loop.phase is Phase.RUNNING
        assert Act.CHECKPOINT in loop.tick(1.0 + owed_s + 0.001)


def test_what_its_clock_lost_beyond_the_pause_is_waited_for_as_well() -> None:
    loop = EpochLoop(dataclasses.replace(PACE, most_paused=0.05), 0.0)
    loop.on_live_pass(1)
    loop.on_stopped()
    loop.on_state_begins()
    loop.on_resumed(1.0, 10, 0, pause_s=0.05, excess_s=0.05)
    loop.on_ack(Epoch(1))
    loop.on_filling()
    assert Act.CHECKPOINT not in loop.tick(2.649) and Act.CHECKPOINT in loop.tick(2.651)


@pytest.mark.parametrize("policy", list(Policy))
def test_every_policy_waits_until_the_guest_had_its_share_of_the_time(policy: Policy) -> None:
    loop = EpochLoop(dataclasses.replace(PACE, policy=policy, most_paused=0.05), 0.0)
    loop.on_live_pass(1)
    loop.on_stopped()
    loop.on_state_begins()
    loop.on_resumed(1.0, 10, 0, pause_s=0.1)
    loop.on_ack(Epoch(1))
    loop.on_output(1.01)
    loop.tick(1.2)
    loop.tick(2.64)
    assert loop.next_tick() <= 2.651 and loop.phase is Phase.RUNNING
    assert Act.CHECKPOINT in loop.tick(2.651)


def test_output_is_held_for_as_long_as_nobody_grants_anything() -> None:
    loop = in_phase(Phase.HOLDING)
    acts = [act for second in range(1, 5000) for act in loop.tick(float(second))]
    assert set(acts) == {Act.ASK} and len(acts) > 4000
    assert loop.on_grant(GRANTED) == (Act.UNBUFFER,)


def test_what_is_sent_before_the_guest_stands_is_of_this_epoch_and_what_comes_after_of_the_next() -> None:
    loop = EpochLoop(dataclasses.replace(PACE, policy=Policy.EVENT), 0.0)
    loop.on_live_pass(1)
    loop.on_output(0.1)
    loop.on_stopped()
    loop.on_state_begins()
    loop.on_resumed(0.2, 10, 0)
    loop.on_ack(Epoch(1))
    assert Act.CHECKPOINT not in loop.tick(0.21)
    loop.on_output(0.22)
    assert Act.CHECKPOINT in loop.tick(0.22)
    loop.on_stopped()
    loop.on_state_begins()
    loop.on_output(0.3)
    loop.on_resumed(0.31, 10, 0)
    loop.on_ack(Epoch(2))
    assert Act.CHECKPOINT in loop.tick(0.32)


def test_a_grant_that_nobody_asked_for_releases_nothing() -> None:
    for phase in (Phase.COPYING, Phase.STOPPING, Phase.STOPPED, Phase.DRAINING, Phase.UNACKNOWLEDGED, Phase.RUNNING):
        loop = in_phase(phase)
        assert loop.on_grant(GRANTED) == () and loop.phase is phase
        assert loop.on_grant(REFUSED) == () and loop.phase is phase


def test_a_grant_lets_go_and_a_refusal_fences() -> None:
    loop = in_phase(Phase.HOLDING)
    assert loop.on_grant(GRANTED) == (Act.UNBUFFER,) and loop.phase is Phase.ALONE
    loop = in_phase(Phase.HOLDING)
    assert loop.on_grant(REFUSED) == (Act.FENCE,) and loop.phase is Phase.FENCED
    assert loop.reason == "the backup speaks"


@pytest.mark.parametrize("phase", [Phase.STOPPING, Phase.STOPPED, Phase.DRAINING])
def test_a_peer_that_is_lost_in_a_checkpoint_waits_for_its_end(phase: Phase) -> None:
    loop = in_phase(phase)
    assert loop.on_peer_lost("the connection broke", 0.1) == () and loop.phase is phase
    rest: list[Act] = []
    for step in (loop.on_stopped, loop.on_state_begins, lambda: loop.on_resumed(0.2, 10, 0)):
        rest += step()
    whole = [Act.PROTECT, Act.CAPTURE, Act.OPEN_GATE, Act.ASK, Act.UNMIRROR]
    assert rest == whole[len(whole) - len(rest):] and rest[-2:] == [Act.ASK, Act.UNMIRROR]
    assert loop.phase is Phase.HOLDING and loop.reason == "the connection broke"


@pytest.mark.parametrize("phase", [Phase.STOPPING, Phase.STOPPED, Phase.DRAINING])
def test_a_planned_end_in_a_checkpoint_waits_for_its_end(phase: Phase) -> None:
    loop = in_phase(phase)
    assert loop.on_stop("switched off") == () and loop.phase is phase
    acts: Acts = ()
    for step in (loop.on_stopped, loop.on_state_begins, lambda: loop.on_resumed(0.2, 10, 0)):
        acts = step()
    assert acts == (Act.SAY_BYE, Act.UNBUFFER) and loop.phase is Phase.ENDED


def test_a_save_that_fails_after_a_planned_end_was_asked_ends() -> None:
    loop = in_phase(Phase.STOPPED)
    loop.on_stop("switched off")
    assert loop.on_checkpoint_failed("disk", 0.1) == (Act.SAY_BYE, Act.UNBUFFER)


def test_a_save_that_fails_holds_and_asks() -> None:
    for phase in (Phase.STOPPING, Phase.STOPPED, Phase.DRAINING):
        loop = in_phase(phase)
        assert loop.on_checkpoint_failed("QEMU's save failed", 0.1) == (Act.ASK, Act.UNMIRROR)
        assert loop.phase is Phase.HOLDING and loop.reason == "QEMU's save failed"


@pytest.mark.parametrize("end", ["fence", "grant", "stop", "shutdown", "gone"])
def test_nothing_follows_an_end(end: str) -> None:
    loop = in_phase(Phase.HOLDING)
    {"fence": lambda: loop.on_fence("over"), "grant": lambda: loop.on_grant(GRANTED), "stop": lambda: loop.on_stop("x"),
     "shutdown": loop.on_guest_shutdown, "gone": loop.on_guest_gone}[end]()
    phase, reason = loop.phase, loop.reason
    assert phase in OVER
    for acts in (loop.tick(99.0), loop.on_ack(loop.epoch), loop.on_grant(GRANTED), loop.on_grant(REFUSED),
                 loop.on_fence("again"), loop.on_stop("again"), loop.on_peer_lost("again", 99.0), loop.on_guest_gone(),
                 loop.on_guest_shutdown(), loop.on_checkpoint_failed("late", 99.0), loop.on_resumed(99.0, 10, 0),
                 loop.on_stopped(), loop.on_state_begins(), loop.on_live_pass(1)):
        assert acts == ()
    assert (loop.phase, loop.reason) == (phase, reason)


def test_a_guest_that_somebody_paused_needs_no_checkpoint_until_it_runs() -> None:
    loop = running()
    loop.on_paused(True)
    assert Act.CHECKPOINT not in loop.tick(50.0)
    loop.on_paused(False)
    assert Act.CHECKPOINT in loop.tick(50.0)


def test_silence_ends_the_first_copy_late_and_a_sign_of_life_puts_it_off() -> None:
    loop = EpochLoop(PACE, 0.0)
    loop.on_heard(1.0)
    assert Act.ASK not in loop.tick(COPY_SILENCE_S + 0.9)
    assert Act.ASK in loop.tick(COPY_SILENCE_S + 1.0) and loop.phase is Phase.HOLDING


def test_the_first_reason_is_kept() -> None:
    loop = in_phase(Phase.STOPPED)
    loop.on_peer_lost("the connection broke", 0.1)
    loop.on_checkpoint_failed("QEMU's save failed", 0.2)
    assert loop.reason == "the connection broke"


def test_beats_come_at_their_pace_until_output_is_held() -> None:
    loop = EpochLoop(PACE, 0.0)
    beats = [Act.BEAT in loop.tick(ms / 1000) for ms in range(0, 1000, 10)]
    assert beats.count(True) == 10
    held = in_phase(Phase.HOLDING)
    assert Act.BEAT not in held.tick(9.0)


@pytest.mark.parametrize("phase", [Phase.COPYING, Phase.UNACKNOWLEDGED, Phase.RUNNING, Phase.HOLDING])
def test_the_next_tick_is_not_after_something_is_due(phase: Phase) -> None:
    loop = in_phase(phase)
    loop.tick(0.0)
    for _ in range(40):
        due = loop.next_tick()
        before = loop.phase
        assert loop.tick(due - 1e-6) == () and loop.phase is before
        assert loop.tick(due)
        if loop.phase is not before:
            break


def test_a_guest_that_ends_itself_says_bye_and_releases_nothing() -> None:
    assert running().on_guest_shutdown() == (Act.SAY_BYE,)
    assert running().on_guest_gone() == (Act.SAY_GUEST_GONE,)


# A planned failover


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.UNACKNOWLEDGED])
def test_a_guest_that_is_handed_over_is_unheard_until_the_arbiter_has_spoken(phase: Phase) -> None:
    loop = in_phase(phase)
    assert loop.on_hand_over(1.0) == (Act.SAY_HAND_OVER, Act.UNMIRROR)
    assert loop.phase is Phase.HOLDING
    assert loop.on_ack(loop.epoch) == () and loop.on_hand_over(1.1) == ()
    assert loop.on_grant(Grant(False, Generation(9), "the backup speaks")) == (Act.FENCE,)


@pytest.mark.parametrize("phase", [Phase.STOPPING, Phase.STOPPED, Phase.DRAINING])
def test_a_guest_is_handed_over_after_its_checkpoint_which_is_not_shipped(phase: Phase) -> None:
    loop = in_phase(phase)
    assert loop.on_hand_over(1.0) == ()
    for step in (loop.on_stopped, loop.on_state_begins):
        step()
    assert loop.on_resumed(1.1, 1, 0) == (Act.SAY_HAND_OVER, Act.UNMIRROR)


@pytest.mark.parametrize("phase", [Phase.COPYING, Phase.HOLDING])
def test_what_is_not_protected_is_not_handed_over(phase: Phase) -> None:
    loop = in_phase(phase)
    assert loop.on_hand_over(1.0) == () and loop.phase is phase


def test_a_backup_that_does_not_take_the_guest_costs_a_bounded_wait() -> None:
    loop = running()
    loop.on_hand_over(1.0)
    assert loop.tick(1.0 + HAND_OVER_LIMIT_S - 0.01) == ()
    assert loop.tick(1.0 + HAND_OVER_LIMIT_S) == (Act.ASK,)
    assert loop.on_grant(Grant(True, Generation(2), "")) == (Act.UNBUFFER,)
