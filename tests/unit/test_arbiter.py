"""Whatever the order of requests, lost answers and moves in between: at most one side has the voice."""

import dataclasses
import itertools
import threading

import pytest

from nova_ftvm.core.pair import PairEvent
from nova_ftvm.db import connect
from nova_ftvm.db.records import Pair
from nova_ftvm.db.store import Store
from nova_ftvm.exception import LostRace
from nova_ftvm.failover.arbiter import Arbiter
from nova_ftvm.failover.settings import Settings
from nova_ftvm.types import Generation, InstanceId, PairId, PairState
from tests.unit.failover_world import FakeClock

PAIR = PairId("p")
ALL_STATES = list(PairState)


def pair_in(state=PairState.PROTECTED, **changes):
    return dataclasses.replace(Pair(
        id=PAIR, instance_id=InstanceId("i"), project_id="t", primary_host="hx", backup_host="hy", state=state,
        generation=Generation(5), active_host="hx", active_since=Generation(1), token="secret"), **changes)


class Court:
    """An arbiter with one pair."""

    def __init__(self, url, pair=None):
        self.engine = connect.engine_for(url)
        connect.sync(self.engine)
        self.store = Store(self.engine)
        self.arbiter = Arbiter(self.store, FakeClock(), Settings())
        self.store.add(pair or pair_in())

    @property
    def pair(self):
        return self.store.pair(PAIR)

    def promote(self, generation=5, host="hy"):
        return self.arbiter.request_promotion(PAIR, generation, host, "silence")

    def degrade(self, generation=5, host="hx"):
        return self.arbiter.request_degrade(PAIR, generation, host, "no acknowledgement")

    def disarm(self):
        try:
            return self.arbiter.disarm(self.pair, "stop")
        except LostRace:
            return None


@pytest.fixture
def court(tmp_path):
    return Court(f"sqlite:///{tmp_path}/a.sqlite")


def court_in(tmp_path, name, *arguments, **changes):
    return Court(f"sqlite:///{tmp_path}/{name}.sqlite", pair_in(*arguments, **changes))


def test_a_granted_backup_speaks_in_a_new_generation(court):
    grant = court.promote()
    assert grant.granted and grant.generation == 6
    assert (court.pair.state, court.pair.active_host, court.pair.active_since) == (PairState.PROMOTING, "hy", 6)


def test_a_granted_primary_speaks_alone_in_a_new_generation(court):
    grant = court.degrade()
    assert grant.granted and grant.generation == 6
    assert (court.pair.state, court.pair.active_host, court.pair.active_since) == (PairState.DEGRADED, "hx", 1)


REQUESTS = ("promote", "degrade", "disarm")


@pytest.mark.parametrize("order", list(itertools.product(REQUESTS, repeat=4)))
def test_no_order_of_requests_and_repetitions_gives_two_voices(tmp_path, order):
    """Every sequence of four requests; a repetition stands for an answer that was lost."""
    court = court_in(tmp_path, "o")
    granted = {"promote": False, "degrade": False}
    for request in order:
        before = court.pair
        answer = getattr(court, request)()
        if request == "disarm":
            continue
        assert answer.granted or not granted[request], "who won once wins again"
        granted[request] |= answer.granted
        if not answer.granted:
            assert court.pair == before, "a refusal changes nothing"
            assert answer.reason and answer.generation == court.pair.generation
        assert not (granted["promote"] and granted["degrade"])
        assert court.pair.active_host == ("hy" if granted["promote"] else "hx")


def test_the_primary_may_go_on_after_a_disarm_although_its_generation_is_over(court):
    court.disarm()
    grant = court.degrade()
    assert grant.granted and grant.generation == 6 and court.pair.state is PairState.DISABLED


def test_the_backup_may_not_speak_after_a_disarm(court):
    court.disarm()
    assert not court.promote().granted


@pytest.mark.parametrize("state", [state for state in ALL_STATES if state is not PairState.PROTECTED])
def test_only_a_protected_pair_is_promoted(tmp_path, state):
    court = court_in(tmp_path, "s", state)
    before = court.pair
    assert not court.promote().granted
    assert court.pair == before


@pytest.mark.parametrize("state", [state for state in ALL_STATES
                                   if state not in (PairState.PROTECTED, PairState.SYNCING)])
def test_only_a_pair_with_a_backup_loses_it(tmp_path, state):
    court = court_in(tmp_path, "s", state)
    before = court.pair
    court.degrade()
    assert court.pair == before


@pytest.mark.parametrize("generation, host", [(4, "hy"), (6, "hy"), (5, "hx"), (5, "hz"), (0, "")])
def test_a_promotion_asked_for_in_doubt_is_refused(court, generation, host):
    before = court.pair
    grant = court.promote(generation, host)
    assert not grant.granted and grant.generation == 5 and grant.reason
    assert court.pair == before


@pytest.mark.parametrize("generation, host, told", [(4, "hx", 4), (6, "hx", 5), (5, "hy", 5), (5, "hz", 5)])
def test_a_degrade_asked_for_in_doubt_is_refused(court, generation, host, told):
    before = court.pair
    grant = court.degrade(generation, host)
    assert not grant.granted and grant.generation == told
    assert court.pair == before


def test_an_unknown_pair_is_refused(court):
    grant = court.arbiter.request_promotion(PairId("other"), 5, "hy", "silence")
    assert not grant.granted and grant.generation == 0


def test_the_winners_grant_is_given_again_after_its_report(court):
    court.promote()
    court.arbiter.promoted(PAIR, 5, "hy", {"running_at": 2.0})
    assert court.promote().granted


def test_an_old_guest_of_a_host_that_got_the_voice_back_later_is_refused(tmp_path):
    """hx lost the pair in generation 3, and has it again since 7: what it ran before 7 is over."""
    court = court_in(tmp_path, "b", PairState.DEGRADED, generation=Generation(8), active_since=Generation(7))
    assert not court.degrade(generation=2).granted
    assert court.degrade(generation=7).granted


def test_a_report_of_the_promoted_side_is_taken_in_either_generation(tmp_path):
    for generation in (5, 6):
        court = court_in(tmp_path, f"g{generation}")
        court.promote()
        assert court.arbiter.promoted(PAIR, generation, "hy", {"running_at": 2.0}).granted
        assert court.pair.state is PairState.DEGRADED and court.pair.timeline["running_at"] == 2.0
        assert court.arbiter.promoted(PAIR, generation, "hy", {}).granted


def test_a_report_of_promotion_without_a_grant_is_refused(court):
    assert not court.arbiter.promoted(PAIR, 5, "hy", {}).granted
    assert court.pair.state is PairState.PROTECTED


def test_a_first_copy_that_ends_after_a_disarm_stops_the_engine_and_not_the_guest(tmp_path):
    """The agent fences when the answer's generation is newer than its own, and stops the engine when it is not."""
    court = court_in(tmp_path, "d", PairState.SYNCING)
    court.disarm()
    grant = court.arbiter.synced(PAIR, 5, "hx")
    assert not grant.granted and grant.generation == 5


def test_a_first_copy_that_ends_is_known_once(tmp_path):
    court = court_in(tmp_path, "y", PairState.SYNCING)
    assert court.arbiter.synced(PAIR, 5, "hx").granted
    assert court.arbiter.synced(PAIR, 5, "hx").granted
    assert not court.arbiter.synced(PAIR, 5, "hy").granted
    assert court.pair.state is PairState.PROTECTED


def test_a_judgement_that_is_out_of_date_gives_nothing_up(court):
    stale = court.pair
    court.promote()
    with pytest.raises(LostRace):
        court.arbiter.give_up(stale, "no engine is left")
    assert court.pair.state is PairState.PROMOTING


def test_a_pair_that_is_enabled_again_keeps_its_hosts_voice_and_gets_a_new_token(court):
    court.disarm()
    court.store.change(court.pair, step="")
    court.arbiter.begin(court.pair, InstanceId("i"), "t", "hx", PAIR)
    assert (court.pair.state, court.pair.active_since, court.pair.generation) == (PairState.PENDING, 1, 7)
    assert court.pair.token != "secret" and len(court.pair.token) == 64
    assert court.degrade().granted, "the old engine of the same guest may release what it holds"


def test_the_token_is_not_printed(court):
    assert "secret" not in repr(court.pair)
    assert "token" not in court.pair.public()


@pytest.mark.parametrize("round_", range(15))
def test_both_sides_at_once_on_connections_of_their_own(tmp_path, round_):
    """Real threads, real transactions: each asks three times, as with lost answers."""
    url = f"sqlite:///{tmp_path}/t.sqlite"
    court = Court(url)
    start = threading.Barrier(4)
    answers = {"promote": [], "degrade": []}

    def ask(side):
        arbiter = Arbiter(Store(connect.engine_for(url)), FakeClock(), Settings())
        start.wait()
        for _ in range(3):
            answers[side].append(arbiter.request_promotion(PAIR, 5, "hy", "silence") if side == "promote"
                                 else arbiter.request_degrade(PAIR, 5, "hx", "silence"))

    threads = [threading.Thread(target=ask, args=(side,)) for side in ("promote", "degrade") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    outcomes = {side: {answer.granted for answer in answers[side]} for side in answers}
    assert sorted(outcomes.values(), key=str) == [{False}, {True}]
    assert {answer.generation for side in answers.values() for answer in side} == {6}
    assert court.pair.active_host == ("hy" if True in outcomes["promote"] else "hx")


def test_a_lost_compare_and_set_is_judged_again(court):
    """The primary's move comes between the backup's read and its write."""
    read = court.store.pair
    first = []

    def slow_read(pair_id):
        pair = read(pair_id)
        if not first:
            first.append(pair)
            Arbiter(Store(court.engine), FakeClock(), Settings()).request_degrade(PAIR, 5, "hx", "first")
        return pair

    court.store.pair = slow_read
    grant = court.promote()
    assert not grant.granted and grant.generation == 6


def test_every_applied_event_is_one_of_the_table(court):
    moved = court.arbiter.apply(court.pair, PairEvent.PROMOTE, "test")
    assert moved.state is PairState.PROMOTING
    with pytest.raises(LostRace):
        court.arbiter.apply(pair_in(), PairEvent.DISARM, "late")


@pytest.mark.parametrize("request_", ["promote", "degrade"])
def test_a_question_that_took_too_long_moves_nothing_and_may_be_asked_again(court, request_):
    """The database hung; whoever asked may have ended since, and a grant to it would silence the side that lives."""
    read = court.store.pair
    clock = court.arbiter._clock

    def hangs(pair_id):
        clock.time += 4
        return read(pair_id)

    court.store.pair = hangs
    before = read(PAIR)
    grant = getattr(court, request_)()
    assert not grant.granted and grant.generation == before.generation, "so the side asks again"
    assert read(PAIR) == before
    court.store.pair = read
    assert getattr(court, request_)().granted


def test_a_late_report_of_a_promotion_is_known_when_the_pair_has_moved_on(tmp_path):
    """The answer was lost; Nova has followed, and the next backup is being made."""
    court = court_in(tmp_path, "l", PairState.SYNCING, generation=Generation(7), active_host="hy", primary_host="hy",
                     backup_host="hz", active_since=Generation(6))
    before = court.pair
    for generation in (5, 6):
        assert court.arbiter.promoted(PAIR, generation, "hy", {}).granted
    assert court.pair == before


@pytest.mark.parametrize("changes", [
    {"active_host": "hx", "primary_host": "hx", "active_since": Generation(9)},  # started elsewhere since
    {"active_host": "hy", "primary_host": "hx", "active_since": Generation(6)},  # given up, nothing started yet
    {"active_host": "hz", "primary_host": "hz", "active_since": Generation(8)},
])
def test_a_late_report_of_a_promotion_that_was_given_up_is_refused(tmp_path, changes):
    court = court_in(tmp_path, "l", PairState.DISABLED, generation=Generation(9), **changes)
    grant = court.arbiter.promoted(PAIR, 5, "hy", {})
    assert not grant.granted and grant.generation == 9


def test_a_failed_promotion_leaves_the_voice_where_the_grant_put_it(court):
    court.promote()
    moved = court.arbiter.start_anew(court.pair, "the stream was refused")
    assert (moved.state, moved.generation, moved.active_host) == (PairState.DEGRADED, 6, "hy")
    assert not court.degrade().granted
    assert court.promote().granted, "an engine that was slow may still have its answer"


@pytest.mark.parametrize("state", [PairState.SYNCING, PairState.PROTECTED])
@pytest.mark.parametrize("question", ["degrade", "sync"])
def test_an_old_engine_of_the_guest_that_has_the_voice_is_never_told_to_fence_it(tmp_path, state, question):
    """A newer engine protects that guest. A newer generation in the answer would have the guest destroyed."""
    court = court_in(tmp_path, "v", state, generation=Generation(7), active_since=Generation(3))
    before = court.pair
    answer = court.degrade(5) if question == "degrade" else court.arbiter.synced(PAIR, 5, "hx")
    assert not answer.granted and answer.generation == 5
    assert court.pair == before
    over = court.degrade(2) if question == "degrade" else court.arbiter.synced(PAIR, 2, "hx")
    assert not over.granted and over.generation == 7, "what ran before it had the voice is over"
