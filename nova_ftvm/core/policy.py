"""When to take the next checkpoint: the epoch policies. PURE functions of what the loop has measured.

    fixed      every so often, whatever happens          Remus (NSDI 2008), QEMU Micro-Checkpointing (2013)
    event      as soon as the guest has sent something   Kemari (VTDC 2008)
    adaptive   when what the guest had to say is said    ours, the default

A reply waits until the epoch that holds it is committed, so a checkpoint is late as soon as output waits, and is work
for nothing before. `adaptive` gathers: while a processor of the guest is busy, more output may come that the same
checkpoint carries; when all sleep, the guest has said what it had to say, and to stop it costs nothing. But a guest
that is let run until it has nothing more to do waits for the commit, its clients with it. If it has work for much
longer than that takes, how long to gather is learned (`on_released`): less if it slept when its epoch was acknowledged,
more if it still had work. Output never waits for company for long. A busy guest that sends no more for a while works
at something else: one reply beside it does not wait for company.

Whether they sleep must be looked at, and each look takes time from a processor that the guest may need. So how long it
is busy with its output is learned too, and nobody looks in the first part of that time (`on_checkpoint`). And for a
guest whose first output was all that it had to say, several times in a row, nobody waits (`on_cut`); nor for one that
needs no longer for all of it than it takes to be stopped.

One bound goes before all of them (`earliest`): the share of the time that the guest may stand in pauses. Each pause is
owed a time of running, (1 - share) / share times as long as it was, and no checkpoint is taken before that is paid
(`on_resumed`). What the guest's virtual clock lost beyond the pause (core/virtualclock.py) is owed like the pause. A
guest that ran without pauses has up to AHEAD_S of it paid ahead, so that a few replies in a row need not wait; but
after each pause it runs at least as long as it stood. Over any time of W seconds, with losses of p seconds at most by
that clock, the share is exceeded by less than share * AHEAD_S / W + (1 - share) * p / W. What is owed beyond
MOST_OWED_S is forgotten: one pause of 5 s does not keep output back for minutes. So the bound does not hold for a guest
whose pauses are all longer than MOST_OWED_S * share / (1 - share): 20 ms at 1 %, 105 ms at 5 %.
"""

import dataclasses
import enum
import math

#: The processors' sleep is believed when it has lasted for so long: between two requests they nod off for a moment.
_ASLEEP_S = 150e-6
#: Who was waited for in vain so often in a row has said all when it has said something.
_IN_VAIN = 4
#: So has who has never more to do than this takes: what it says until it stands still is covered too.
_BRIEF_S = 300e-6
_NO_LONGER_BRIEF = 1.25
#: The least time between two looks at them; after the first one none in this part of the time that the guest is busy.
_LOOK_S = 100e-6
_BLIND = 0.75
#: By this part each epoch changes what is known of that time; and so much of it is left if it was too long.
_LEARN, _LEAVE = 0.25, 0.7
#: Running that may be paid before it is owed, and the most that is owed, in seconds: see above.
AHEAD_S, MOST_OWED_S = 0.25, 2.0
#: Output of a busy guest is gathered for so many pauses, within the bounds: then the pause is a small part of the time.
_GATHER_PAUSES = 10.0
_GATHER_S = (2e-3, 40e-3)
#: Who has work for so many times what it takes to commit an epoch need not run dry: its output leaves in parts.
_PARTS = 2.0
#: So many pauses longer, or shorter, when the guest was busy, or asleep, at the acknowledgement.
_MORE_PAUSES, _LESS_PAUSES = 0.1, 0.3
#: Output waits no longer if nothing more comes for so many pauses, within the bounds; but only when the last pause is
#: long ago: so many pauses.
_LULL_PAUSES = 1.0
_LULL_S = (1.5e-3, 5e-3)
_LULL_SHARE = 6.0
#: Nothing to say: a checkpoint only bounds what the next one has to carry. So many pauses apart, within the bounds.
_QUIET_PAUSES = 50.0
_QUIET_S = (0.2, 1.0)


class Policy(enum.StrEnum):
    FIXED = "fixed"
    EVENT = "event"
    ADAPTIVE = "adaptive"


@dataclasses.dataclass(slots=True)
class Measured:
    """What the loop knows between two checkpoints. Times are of its clock, durations in seconds."""

    #: The guest runs since.
    resumed: float
    #: How long it stood still at the last checkpoint.
    pause_s: float = 0.0
    #: Since when output waits that no checkpoint covers.
    output_since: float | None = None
    #: When the last of it came.
    output_last: float = 0.0
    #: Since when all processors of the guest have slept, as far as was looked; and when that was.
    asleep_since: float | None = None
    looked: float = -math.inf
    #: How long it is busy after its first output, if it is let; and how long nobody looks: learned, see
    #: `on_checkpoint`.
    busy_s: float = 0.0
    blind_s: float = 0.0
    #: Epochs in a row whose first output was all: learned, see `on_cut`.
    in_vain: int = 0
    #: How long the last epoch took from its checkpoint's beginning to its acknowledgement.
    commit_s: float = 0.0
    #: How long the guest runs, from its restart, before its output is due: learned, see `on_released`.
    gather_s: float = math.inf
    #: For how long it is to run, from `resumed` on, for the pauses so far; less than 0: it ran ahead. See `on_resumed`.
    owed_s: float = 0.0


def due(policy: Policy, epoch_s: float, seen: Measured) -> float:
    """The time of the next checkpoint, if nothing more is seen until then. epoch_s: what `fixed` keeps to."""
    return max(_wanted(policy, epoch_s, seen), earliest(seen))


def earliest(seen: Measured) -> float:
    """No checkpoint is taken before this, whatever waits for one: the guest has its share of the time."""
    return seen.resumed + min(max(seen.pause_s, seen.owed_s), MOST_OWED_S)


def on_resumed(seen: Measured, most_paused: float, now: float, pause_s: float, excess_s: float = 0.0) -> None:
    """Accounts for a pause; told when the guest runs again. most_paused: the share of the time that it may stand in
    pauses, 0.5 at most. excess_s: what its virtual clock lost beyond the pause."""
    pause_s = max(0.0, pause_s)
    lost_s = pause_s + max(0.0, excess_s)
    ran_s = max(0.0, now - lost_s - seen.resumed)
    owed_s = max(seen.owed_s - ran_s, -AHEAD_S) + lost_s * (1 / most_paused - 1)
    seen.resumed, seen.pause_s, seen.owed_s = now, pause_s, min(owed_s, MOST_OWED_S)


def _wanted(policy: Policy, epoch_s: float, seen: Measured) -> float:
    if policy is Policy.FIXED:
        return seen.resumed + epoch_s
    quiet = seen.resumed + _within(_QUIET_PAUSES * seen.pause_s, _QUIET_S)
    if seen.output_since is None:
        return quiet
    if policy is Policy.EVENT:
        return seen.output_since
    lull = max(seen.output_last + _within(_LULL_PAUSES * seen.pause_s, _LULL_S),
               seen.resumed + _LULL_SHARE * seen.pause_s)
    gathered = min(max(seen.output_since, seen.resumed + seen.gather_s),
                   seen.output_since + _within(_GATHER_PAUSES * seen.pause_s, _GATHER_S), lull)
    if seen.asleep_since is not None:
        gathered = min(gathered, seen.asleep_since + _ASLEEP_S)
    if _is_brief(seen):
        gathered = seen.output_since
    return min(gathered, quiet)


def on_released(seen: Measured, is_busy: bool) -> None:
    """Learns how long to gather; told when an epoch's output leaves. Infinite: until all is said."""
    if _is_brief(seen):
        if seen.output_since is not None:
            # It had more to say: next time it is let, and looked at.
            seen.in_vain = 0
            seen.busy_s = max(seen.busy_s, _NO_LONGER_BRIEF * _BRIEF_S)
    elif seen.gather_s == math.inf:
        if seen.busy_s > _PARTS * seen.commit_s:
            seen.gather_s = seen.busy_s / 2
    else:
        gather_s = seen.gather_s + (_MORE_PAUSES if is_busy else -_LESS_PAUSES) * seen.pause_s
        # If it runs dry whatever is done, then once with all of it.
        seen.gather_s = min(gather_s, _GATHER_S[1]) if gather_s > 0 else math.inf


def on_checkpoint(seen: Measured, now: float) -> None:
    """Learns how long the guest is busy; told when a checkpoint begins."""
    if seen.output_since is None or seen.gather_s < math.inf or _is_brief(seen):
        return
    busy_s = max(0.0, (now if seen.asleep_since is None else seen.asleep_since) - seen.output_since)
    seen.busy_s += _LEARN * (busy_s - seen.busy_s)
    if busy_s < seen.blind_s + 2 * _LOOK_S:
        # It slept when it was looked at again, who knows since when.
        seen.blind_s *= _LEAVE
    else:
        seen.blind_s += _LEARN * (_BLIND * busy_s - seen.blind_s)


def on_cut(seen: Measured, more: bool) -> None:
    """Learns whether there is anything to gather; told of each epoch with output, when the guest stands still.
    more: some came after the first."""
    if not _is_brief(seen):
        seen.in_vain = 0 if more else seen.in_vain + 1


def look(seen: Measured) -> float:
    """When to look at the processors, if that matters (`watches`)."""
    if seen.output_since is None or seen.looked < seen.output_since:
        return seen.looked
    again = max(seen.looked + _LOOK_S, seen.output_since + seen.blind_s)
    # One that sleeps with nothing due yet: what counts is whether it still does then.
    return again if seen.asleep_since is None else max(again, earliest(seen) - _LOOK_S)


def _is_brief(seen: Measured) -> bool:
    return seen.gather_s == math.inf and (seen.in_vain >= _IN_VAIN or seen.busy_s <= _BRIEF_S)


def learns(policy: Policy, seen: Measured) -> bool:
    """Does it matter whether they sleep when an epoch is released?"""
    return policy is Policy.ADAPTIVE and seen.gather_s < math.inf


def watches(policy: Policy, seen: Measured) -> bool:
    """Does it matter now whether the guest's processors sleep?"""
    return policy is Policy.ADAPTIVE and seen.output_since is not None and not _is_brief(seen)


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
