"""core/lease.py: a doubt only asks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_ftvm.core.lease import ASK_AGAIN_S, Lease, Verdict, Watch
from nova_ftvm.types import Generation, Grant

MINE = Generation(3)
GRANTED = Grant(True, Generation(4))
NOT_NOW = Grant(False, MINE, "the pair is synchronising")
NEVER = Grant(False, Generation(4), "the primary goes on alone")


def lease(watch: Watch = Watch.WATCHING) -> Lease:
    made = Lease(MINE, 0.3, 0.0)
    if watch is not Watch.SYNCING:
        made.on_committed()
    if watch in (Watch.ASKING, Watch.PROMOTING):
        assert made.tick(0.3) is Verdict.ASK
    if watch is Watch.PROMOTING:
        assert made.on_grant(GRANTED, 0.3) is Verdict.PROMOTE
    if watch is Watch.OVER:
        made.on_bye()
    assert made.watch is watch
    return made


def test_silence_only_asks() -> None:
    watched = lease()
    assert watched.tick(0.29) is None and watched.watch is Watch.WATCHING
    assert watched.tick(0.31) is Verdict.ASK and watched.watch is Watch.ASKING
    assert watched.evidence == "no heartbeat for 310 ms"


def test_a_sign_of_life_puts_the_question_off() -> None:
    watched = lease()
    watched.on_heard(0.25)
    assert watched.tick(0.5) is None
    assert watched.next_tick() == pytest.approx(0.55)


def test_no_answer_asks_again_and_promotes_never() -> None:
    watched = lease(Watch.ASKING)
    asked = [watched.tick(0.3 + ms / 1000) for ms in range(0, 5000, 10)]
    assert asked.count(Verdict.ASK) == 9 and Verdict.PROMOTE not in asked
    assert watched.watch is Watch.ASKING
    assert ASK_AGAIN_S == 0.5


def test_a_grant_promotes_once() -> None:
    watched = lease(Watch.ASKING)
    assert watched.on_grant(GRANTED, 0.4) is Verdict.PROMOTE
    assert watched.on_grant(GRANTED, 0.4) is None


@pytest.mark.parametrize("watch", [Watch.SYNCING, Watch.WATCHING, Watch.PROMOTING, Watch.OVER])
@pytest.mark.parametrize("grant", [GRANTED, NOT_NOW, NEVER])
def test_an_answer_to_no_question_changes_nothing(watch: Watch, grant: Grant) -> None:
    watched = lease(watch)
    assert watched.on_grant(grant, 0.5) is None and watched.watch is watch


def test_a_refusal_for_now_goes_on_watching_and_asks_again_later() -> None:
    watched = lease(Watch.ASKING)
    assert watched.on_grant(NOT_NOW, 0.4) is None and watched.watch is Watch.WATCHING
    assert watched.tick(0.69) is None
    assert watched.tick(0.71) is Verdict.ASK


def test_a_refusal_for_good_gives_up() -> None:
    watched = lease(Watch.ASKING)
    assert watched.on_grant(NEVER, 0.4) is Verdict.GIVE_UP and watched.watch is Watch.OVER
    assert watched.tick(99.0) is None and watched.next_tick() is None


@pytest.mark.parametrize("watch", [Watch.SYNCING, Watch.WATCHING, Watch.ASKING])
def test_a_planned_end_never_promotes(watch: Watch) -> None:
    watched = lease(watch)
    assert watched.on_bye() is Verdict.GIVE_UP and watched.watch is Watch.OVER
    assert watched.on_grant(GRANTED, 1.0) is None
    assert watched.tick(9.0) is None and watched.on_guest_gone(9.0) is None and watched.on_bye() is None


def test_a_planned_end_that_comes_after_the_grant_does_not_take_it_back() -> None:
    assert lease(Watch.PROMOTING).on_bye() is None


def test_before_the_first_epoch_nothing_is_asked_and_a_lost_peer_ends_it() -> None:
    watched = lease(Watch.SYNCING)
    assert watched.tick(99.0) is None and watched.on_guest_gone(99.0) is None
    assert watched.on_peer_lost(99.0) is Verdict.GIVE_UP and watched.watch is Watch.OVER


def test_a_lost_connection_alone_asks_nothing() -> None:
    watched = lease()
    assert watched.on_peer_lost(0.1) is None and watched.watch is Watch.WATCHING
    assert watched.tick(0.3) is Verdict.ASK


def test_the_primarys_word_that_qemu_ended_asks_at_once() -> None:
    watched = lease()
    assert watched.on_guest_gone(0.01) is Verdict.ASK
    assert watched.evidence == "the primary's agent saw QEMU end"
    assert watched.on_guest_gone(0.02) is None


def test_a_guest_that_is_handed_over_is_asked_for_at_once() -> None:
    watched = lease()
    assert watched.on_handed_over(0.01) is Verdict.ASK
    assert watched.evidence == "the server is moved here"
    assert watched.on_grant(GRANTED, 0.02) is Verdict.PROMOTE


def test_a_guest_that_is_handed_over_before_the_first_epoch_is_not_taken() -> None:
    watched = lease(Watch.SYNCING)
    assert watched.on_handed_over(0.01) is None and watched.watch is Watch.SYNCING


def happen(watched: Lease, event: str, now: float) -> Verdict | None:
    match event:
        case "tick":
            return watched.tick(now)
        case "heard":
            watched.on_heard(now)
        case "committed":
            watched.on_committed()
        case "gone":
            return watched.on_guest_gone(now)
        case "lost":
            return watched.on_peer_lost(now)
        case "bye":
            return watched.on_bye()
        case _:
            return watched.on_grant({"granted": GRANTED, "not now": NOT_NOW, "never": NEVER}[event], now)
    return None


events = st.sampled_from(["tick", "heard", "committed", "gone", "lost", "bye", "granted", "not now", "never"])


@given(st.lists(events, max_size=40))
def test_only_an_answer_to_a_question_after_a_commit_promotes(sequence: list[str]) -> None:
    watched, now, asked, committed, over = Lease(MINE, 0.3, 0.0), 0.0, False, False, False
    for event in sequence:
        now += 0.2
        verdict = happen(watched, event, now)
        committed |= event == "committed"
        if verdict is Verdict.PROMOTE:
            assert event == "granted" and asked and committed and not over
        asked |= verdict is Verdict.ASK
        over |= verdict is Verdict.GIVE_UP
        assert not (over and verdict in (Verdict.ASK, Verdict.PROMOTE))
