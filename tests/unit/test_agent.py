"""engine/agent.py: carries questions and answers, forgets nothing that matters, destroys nothing that runs."""

import inspect
import threading
from typing import Any

import pytest

from nova_ftvm.core.kind import Abilities
from nova_ftvm.engine.agent import Agent
from nova_ftvm.exception import FtvmError, GuestGone, Unsupported
from nova_ftvm.rpc import common
from nova_ftvm.types import Generation, Grant

PAIR, SERVER, BACKUP_SERVER = "pair", "server", "backup-server"
ABLE = Abilities(kvm=True, tsc_hz=2_100_000_000, tsc_adjust=True)


class Silence(common.Failed[0]):  # type: ignore[misc]
    """The manager does not answer."""


class FakeEngine:
    def __init__(self, role: str, generation: int = 3, pair_id: str = PAIR) -> None:
        self.role, self.generation, self.pair_id = role, generation, pair_id
        self.instance_id = SERVER if role == "primary" else BACKUP_SERVER
        self.orders: list[tuple[str, dict[str, Any]]] = []
        self.killed = False
        #: What it says when it is told to stop; None: it hangs.
        self.last_words: list[str] | None = ["ended", "gone"]
        self._on_report: Any = None

    def listen(self, on_report: Any) -> None:
        self._on_report = on_report

    def say(self, event: str, **facts: Any) -> None:
        self._on_report(self, {"event": event, **facts})

    def order(self, what: str, **facts: Any) -> None:
        self.orders.append((what, facts))
        if what == "stop":
            for word in self.last_words or ():
                self.say(word)

    def wait(self, timeout_s: float) -> bool:
        return self.last_words is not None

    def kill(self) -> None:
        self.killed = True
        self.say("gone")

    @property
    def told(self) -> list[str]:
        return [what for what, _ in self.orders]


class FakeGuests:
    def __init__(self) -> None:
        self.destroyed: list[str] = []
        self.unbuffered: list[str] = []
        self.standbys = {BACKUP_SERVER}
        self.xml = "<domain/>"
        #: How many calls libvirt does not answer.
        self.away = 0
        #: Backup servers that have their checkpoint.
        self.loaded: set[str] = set()
        self.finished: list[str] = []

    def make_folder(self, instance_id: str) -> str:
        return f"/run/{instance_id}"

    def live_xml(self, instance_id: str) -> str:
        if self.away:
            raise GuestGone("libvirt is away")
        return self.xml

    def disk_size(self, instance_id: str, target: str) -> int:
        return {"vda": 1 << 30, "sda": 2048}[target]

    def has_monitor(self, instance_id: str, domain_xml: str) -> bool:
        return instance_id == SERVER

    def destroy(self, instance_id: str) -> bool:
        if self.away:
            self.away -= 1
            raise GuestGone("libvirt is away")
        self.destroyed.append(instance_id)
        return True

    def is_standby(self, instance_id: str) -> bool:
        return instance_id in self.standbys

    def finish_promotion(self, instance_id: str) -> bool:
        self.finished.append(instance_id)
        if self.away:
            self.away -= 1
            raise GuestGone("QEMU's monitor gave no answer")
        return instance_id in self.loaded

    def let_go(self, instance_id: str) -> None:
        if self.away:
            self.away -= 1
            raise GuestGone("QEMU's monitor gave no answer")
        self.unbuffered.append(instance_id)


class FakeManager:
    """Answers what `answer` says, after so many calls without an answer."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.answer = Grant(True, Generation(4))
        self.silent_for = 0
        self.stale: list[str] = []
        self.during_report: Any = None

    def _call(self, name: str, *arguments: Any) -> Grant:
        self.calls.append((name, arguments))
        if self.silent_for:
            self.silent_for -= 1
            raise Silence
        return self.answer

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._call(name, *arguments)

    def agent_report(self, host: str, report: dict[str, Any]) -> dict[str, Any]:
        self._call("agent_report", host, report)
        if self.during_report:
            self.during_report()
        return {"stale": self.stale}

    @property
    def asked(self) -> list[str]:
        return [name for name, _ in self.calls]


class Host:
    """An agent with its fakes. RPC's methods are called as oslo.messaging does, by name."""

    def __init__(self, missing: list[str] | None = None) -> None:
        self.manager, self.guests = FakeManager(), FakeGuests()
        self.engines: list[FakeEngine] = []
        self.next_engine: FakeEngine | None = None
        self.says_at_once: list[dict[str, Any]] = [{"event": "listening", "port": 4000}]
        self.slept = 0.0
        self.agent = Agent("alpha", "10.0.0.1", missing or [], self.manager, self.guests, self._start, self._sleep,
                           abilities=ABLE)

    def _sleep(self, seconds: float) -> None:
        self.slept += seconds
        assert self.slept < 60, "it insists for ever"

    def _start(self, request: dict[str, Any]) -> FakeEngine:
        engine = FakeEngine(request["role"], request["generation"])
        engine.listen_first = engine.listen
        if engine.role == "backup":
            def listen(on_report: Any) -> None:
                engine.listen_first(on_report)
                for report in self.says_at_once:
                    engine.say(**report)
            engine.listen = listen
        self.engines.append(engine)
        return engine

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        handler = getattr(self.agent, method)
        if "context" in inspect.signature(handler).parameters:
            arguments["context"] = {}
        return handler(**arguments)

    def primary(self, generation: int = 3) -> FakeEngine:
        self.call("start_primary", pair_id=PAIR, generation=generation, instance_id=SERVER, address="10.0.0.2",
                  port=4000, token="t")
        return self.engines[-1]

    def backup(self, generation: int = 3) -> FakeEngine:
        answer = self.call("start_backup", pair_id=PAIR, generation=generation, instance_id=BACKUP_SERVER, token="t")
        assert answer == {"address": "10.0.0.1", "port": 4000}
        return self.engines[-1]

    def listed(self) -> list[tuple[str, int]]:
        self.agent.report()
        (_, report) = self.manager.calls[-1][1]
        return [(engine["role"], engine["generation"]) for engine in report["engines"]]


@pytest.fixture
def host() -> Host:
    return Host()


# Questions and answers


@pytest.mark.parametrize(("role", "event", "facts", "question"), [
    ("primary", "ask_degrade", {"reason": "no acknowledgement"}, "request_degrade"),
    ("backup", "ask_promotion", {"evidence": "no heartbeat"}, "request_promotion")])
@pytest.mark.parametrize("granted", [True, False])
def test_a_question_goes_to_the_arbiter_and_its_answer_back(host: Host, role: str, event: str, facts: dict,
                                                            question: str, granted: bool) -> None:
    engine = getattr(host, role)()
    host.manager.answer = Grant(granted, Generation(4), "so it is")
    engine.say(event, **facts)
    assert host.manager.calls == [(question, (PAIR, 3, "alpha", *facts.values()))]
    assert engine.orders == [("grant", {"granted": granted, "generation": 4, "reason": "so it is"})]


def test_no_answer_is_no_order_and_the_engine_asks_again_itself(host: Host) -> None:
    engine = host.primary()
    host.manager.silent_for = 1
    engine.say("ask_degrade", reason="no acknowledgement")
    assert engine.orders == [] and host.slept == 0
    engine.say("ask_degrade", reason="no acknowledgement")
    assert engine.told == ["grant"]


@pytest.mark.parametrize("role", ["primary", "backup"])
def test_an_arbiter_that_does_not_know_the_pair_has_not_answered(host: Host, role: str) -> None:
    engine = getattr(host, role)()
    host.manager.answer = Grant(False, Generation(0), "no such pair")
    engine.say("ask_degrade" if role == "primary" else "ask_promotion", reason="", evidence="")
    assert engine.orders == []


def test_protection_is_told_until_the_manager_answers(host: Host) -> None:
    engine = host.primary()
    host.manager.silent_for = 3
    engine.say("protected")
    assert host.manager.asked == ["report_protection"] * 4 and engine.orders == []


@pytest.mark.parametrize(("generation", "order"), [(4, "fence"), (3, "stop")])
def test_protection_of_a_generation_that_is_over_ends_the_engine(host: Host, generation: int, order: str) -> None:
    engine = host.primary()
    host.manager.answer = Grant(False, Generation(generation), "over")
    engine.say("protected")
    assert engine.told[0] == order


def test_a_promotion_is_told_until_the_manager_answers(host: Host) -> None:
    engine = host.backup()
    host.manager.silent_for = 2
    engine.say("promoted", timeline={"running_at": 1.0})
    assert host.manager.asked == ["report_promoted"] * 3 and engine.told == ["seen"]


# An engine that goes


def test_a_protecting_engine_that_dies_is_spoken_for(host: Host) -> None:
    engine = host.primary()
    engine.say("protected")
    host.manager.silent_for = 2
    engine.say("gone")
    assert host.manager.asked[1:] == ["request_degrade"] * 3
    assert host.guests.unbuffered == [SERVER] and host.guests.destroyed == []
    assert host.listed() == []


def test_a_refused_guest_whose_engine_died_is_destroyed_unheard(host: Host) -> None:
    engine = host.primary()
    engine.say("protected")
    host.manager.answer = Grant(False, Generation(4), "the backup speaks")
    engine.say("gone")
    assert host.guests.destroyed == [SERVER] and host.guests.unbuffered == []


def test_a_refusal_for_now_destroys_nothing_and_asks_again(host: Host) -> None:
    engine = host.primary()
    engine.say("protected")
    answers = [Grant(False, Generation(3), "ask again"), Grant(False, Generation(0), "no such pair"),
               Grant(True, Generation(4))]
    host.manager._call = lambda *_: answers.pop(0)
    engine.say("gone")
    assert host.guests.destroyed == [] and host.guests.unbuffered == [SERVER] and answers == []


def test_an_engine_that_dies_before_it_protected_needs_no_grant(host: Host) -> None:
    engine = host.primary()
    engine.say("failed", reason="the backup cannot be reached")
    assert engine.told == ["seen"]
    engine.say("gone")
    assert host.manager.calls == [("report_protection", (PAIR, 3, "alpha", "failed", "the backup cannot be reached"))]
    assert host.guests.unbuffered == [SERVER] and host.guests.destroyed == []


def test_an_engine_that_ended_is_not_spoken_for(host: Host) -> None:
    engine = host.primary()
    engine.say("protected")
    engine.say("ended", phase="alone")
    engine.say("gone")
    assert host.manager.asked == ["report_protection"] and host.guests.unbuffered == []


def test_a_fenced_guest_is_destroyed_and_its_output_is_not_let_go(host: Host) -> None:
    engine = host.primary()
    engine.say("fenced", reason="generation 4 is in force")
    engine.say("gone")
    assert host.guests.destroyed == [SERVER] and host.guests.unbuffered == []


def test_a_fence_is_tried_until_libvirt_is_back(host: Host) -> None:
    engine = host.primary()
    host.manager.answer = Grant(False, Generation(4), "the backup speaks")
    host.guests.away = 3
    engine.say("fenced", reason="over")
    engine.say("gone")
    assert host.guests.destroyed == [SERVER] and host.guests.unbuffered == []
    assert host.listed() == []


def test_a_libvirt_that_is_away_does_not_deafen_the_agent(host: Host) -> None:
    engine = host.backup()
    host.guests.away = 1
    engine.say("ended", phase="given up")
    engine.say("gone")
    assert host.guests.destroyed == [] and host.listed() == []


def test_a_standby_that_runs_is_never_destroyed_with_its_engine(host: Host) -> None:
    engine = host.backup()
    host.guests.standbys.clear()
    engine.say("ended", phase="given up")
    engine.say("gone")
    assert host.guests.destroyed == []


def test_a_backup_engine_that_dies_takes_its_standby_along_and_no_guest(host: Host) -> None:
    engine = host.backup()
    engine.say("gone")
    assert host.guests.destroyed == [BACKUP_SERVER] and host.manager.calls == []


def test_a_promotion_that_failed_is_told(host: Host) -> None:
    engine = host.backup()
    engine.say("ask_promotion", evidence="no heartbeat")
    engine.say("failed", reason="QEMU refused the last checkpoint")
    host.guests.standbys.clear()
    engine.say("gone")
    assert host.manager.calls[-1] == ("report_promoted", (PAIR, 3, "alpha", {}, "QEMU refused the last checkpoint"))
    assert host.guests.destroyed == []


def promoting(host: Host) -> FakeEngine:
    """A backup's engine that has asked, and may have been granted the pair."""
    engine = host.backup()
    engine.say("ask_promotion", evidence="no heartbeat")
    host.manager.calls.clear()
    return engine


def has_its_checkpoint(host: Host) -> None:
    host.guests.standbys.clear()
    host.guests.loaded.add(BACKUP_SERVER)


@pytest.mark.parametrize("last_words", [(), ("failed",), ("failed", "ended")],
                         ids=["killed", "failed", "failed-and-ended"])
def test_a_guest_that_runs_is_told_as_promoted_though_its_engine_did_not_live_to_say_so(host: Host,
                                                                                       last_words: tuple[str, ...]
                                                                                       ) -> None:
    engine = promoting(host)
    for word in last_words:
        engine.say(word, reason="QEMU did not answer", granted=True)
    has_its_checkpoint(host)
    host.manager.silent_for = 2
    engine.say("gone")
    assert host.manager.calls == [("report_promoted", (PAIR, 3, "alpha", {}, ""))] * 3
    assert host.guests.destroyed == []


def test_a_promotion_that_an_agent_finds_done_is_told_by_it(host: Host) -> None:
    engine = FakeEngine("backup")
    host.agent.adopt_engines([engine])
    has_its_checkpoint(host)
    engine.say("failed", reason="QEMU did not answer", granted=True)
    engine.say("gone")
    assert host.manager.calls == [("report_promoted", (PAIR, 3, "alpha", {}, ""))]


def test_a_guest_that_nobody_wants_any_more_is_destroyed_though_its_engine_died(host: Host) -> None:
    engine = promoting(host)
    has_its_checkpoint(host)
    host.manager.answer = Grant(False, Generation(7), "the server was given up")
    engine.say("gone")
    assert host.guests.destroyed == [BACKUP_SERVER]


def test_a_guest_is_resumed_once_qemu_answers(host: Host) -> None:
    engine = promoting(host)
    has_its_checkpoint(host)
    host.guests.away = 3
    engine.say("gone")
    assert host.manager.calls == [("report_promoted", (PAIR, 3, "alpha", {}, ""))] and host.guests.destroyed == []


def test_a_guest_that_cannot_be_resumed_makes_way_for_the_one_that_nova_boots(host: Host) -> None:
    engine = promoting(host)
    has_its_checkpoint(host)
    host.guests.away = 10
    engine.say("gone")
    assert host.guests.destroyed == [BACKUP_SERVER]
    assert host.manager.calls == [("report_promoted", (PAIR, 3, "alpha", {}, "the backup engine died"))]


def test_a_guest_that_its_engine_never_asked_for_is_looked_at_by_nobody(host: Host) -> None:
    """It was in the way of a standby: whatever it is, it is not ours to start."""
    engine = host.backup()
    has_its_checkpoint(host)
    engine.say("failed", reason="the standby does not wait for its stream, it is paused: it is a guest by now")
    engine.say("gone")
    assert host.guests.finished == [] and host.guests.destroyed == []


# Orders from the manager


def test_a_start_is_done_once(host: Host) -> None:
    first = host.primary()
    assert host.primary() is first and len(host.engines) == 1


def test_a_newer_generation_takes_the_old_ones_place(host: Host) -> None:
    old = host.primary(3)
    new = host.primary(5)
    assert old.told == ["stop", "seen"] and host.listed() == [("primary", 5)] and new.orders == []


def test_a_start_that_comes_late_is_refused_and_ends_nothing(host: Host) -> None:
    engine = host.primary(5)
    with pytest.raises(FtvmError, match="generation 3 is over"):
        host.primary(3)
    assert engine.orders == [] and host.listed() == [("primary", 5)]


def test_a_stop_ends_both_roles_and_the_standby(host: Host) -> None:
    primary, backup = host.primary(), host.backup()
    assert host.call("stop_engine", pair_id=PAIR, generation=4, reason="switched off") == {"stopped": True}
    assert primary.told[0] == backup.told[0] == "stop"
    assert set(host.guests.destroyed) == {BACKUP_SERVER} and host.guests.unbuffered == []
    assert host.call("stop_engine", pair_id=PAIR, generation=4, reason="again") == {"stopped": True}


def test_a_stop_that_comes_late_ends_nothing(host: Host) -> None:
    engine = host.primary(5)
    host.call("stop_engine", pair_id=PAIR, generation=4, reason="long ago")
    assert engine.orders == [] and host.guests.unbuffered == []


@pytest.mark.parametrize("role", ["primary", "backup"])
def test_a_start_that_is_overtaken_by_its_stop_is_refused(host: Host, role: str) -> None:
    host.call("stop_engine", pair_id=PAIR, generation=4, reason="the server is copied to an image")
    host.call("stop_engine", pair_id=PAIR, generation=2, reason="long ago")
    with pytest.raises(FtvmError, match="generation 3 is over, its end was ordered"):
        getattr(host, role)(3)
    assert host.engines == [] and host.listed() == []
    getattr(host, role)(5)
    assert host.listed() == [(role, 5)]


def test_a_stop_waits_for_a_start_that_it_meets_and_ends_it(host: Host) -> None:
    begun, meanwhile = threading.Event(), threading.Event()
    start = host.agent._start_engine

    def slow(request: dict[str, Any]) -> FakeEngine:
        begun.set()
        meanwhile.wait(0.2)
        return start(request)

    host.agent._start_engine = slow
    starting = threading.Thread(target=host.primary)
    starting.start()
    assert begun.wait(5.0)
    host.call("stop_engine", pair_id=PAIR, generation=4, reason="the server is copied to an image")
    starting.join(5.0)
    assert host.engines[0].told[0] == "stop"


@pytest.mark.parametrize("last_words", [None, ["gone"]], ids=["hangs", "dies"])
def test_what_an_engine_held_is_let_go_when_it_cannot_end_by_itself(host: Host, last_words: list[str] | None) -> None:
    engine = host.primary()
    engine.last_words = last_words
    host.call("stop_engine", pair_id=PAIR, generation=4, reason="switched off")
    assert host.guests.unbuffered == [SERVER] and engine.killed == (last_words is None)


def test_a_promoted_backup_is_stopped_by_nobody(host: Host) -> None:
    engine = host.backup()
    engine.say("promoted", timeline={})
    orders = list(engine.orders)
    assert host.call("stop_engine", pair_id=PAIR, generation=4, reason="x") == {"stopped": False}
    assert host.call("discard_standby", instance_id=BACKUP_SERVER) == {"discarded": False}
    engine.say("gone")
    host.guests.standbys.clear()
    assert host.call("discard_standby", instance_id=BACKUP_SERVER) == {"discarded": False}
    assert engine.orders == orders and host.guests.destroyed == []


def test_a_standby_is_discarded_with_its_engine(host: Host) -> None:
    engine = host.backup()
    assert host.call("discard_standby", instance_id=BACKUP_SERVER) == {"discarded": True}
    assert engine.told[0] == "stop" and BACKUP_SERVER in host.guests.destroyed


def test_a_domain_that_waits_for_no_stream_is_never_discarded(host: Host) -> None:
    host.guests.standbys.clear()
    assert host.call("discard_standby", instance_id=SERVER) == {"discarded": False}
    assert host.guests.destroyed == []


def test_a_fence_destroys_at_once_with_or_without_an_engine(host: Host) -> None:
    host.call("fence", pair_id=PAIR, generation=4, instance_id=SERVER)
    assert host.guests.destroyed == [SERVER]
    engine = host.primary()
    host.call("fence", pair_id=PAIR, generation=4, instance_id=SERVER)
    engine.say("gone")
    assert engine.told == ["fence"] and host.guests.destroyed == [SERVER, SERVER]
    assert host.guests.unbuffered == [] and host.manager.calls == []


def test_a_protected_guest_is_handed_over(host: Host) -> None:
    engine = host.primary()
    engine.say("protected")
    assert host.call("hand_over", instance_id=SERVER) == {"handed_over": True}
    assert engine.told[-1] == "hand_over"


def test_a_guest_is_not_handed_over_before_it_is_protected_or_by_its_backup(host: Host) -> None:
    engine, standby = host.primary(), host.backup()
    assert host.call("hand_over", instance_id=SERVER) == {"handed_over": False}
    assert engine.orders == [] and standby.orders == []


@pytest.mark.parametrize("generation", [4, 5])
def test_a_fence_that_comes_late_destroys_nothing(host: Host, generation: int) -> None:
    engine = host.primary(5)
    host.call("fence", pair_id=PAIR, generation=generation, instance_id=SERVER)
    assert engine.orders == [] and host.guests.destroyed == []


def test_a_backup_that_fails_to_start_says_why_and_at_once(host: Host) -> None:
    host.says_at_once = [{"event": "failed", "reason": "QEMU tells no addresses"}, {"event": "gone"}]
    with pytest.raises(FtvmError, match="tells no addresses"):
        host.backup()
    assert host.listed() == []


def test_a_backup_that_will_never_start_here_is_told_apart(host: Host) -> None:
    host.says_at_once = [{"event": "failed", "reason": "QEMU is too old", "lasting": True}, {"event": "gone"}]
    with pytest.raises(Unsupported, match="too old"):
        host.backup()


@pytest.mark.parametrize(("lasting", "state"), [(True, "refused"), (False, "failed")])
def test_a_primary_that_will_never_be_protected_here_is_told_apart(host: Host, lasting: bool, state: str) -> None:
    engine = host.primary()
    engine.say("failed", reason="its disk is on another host", lasting=lasting)
    engine.say("gone")
    assert host.manager.calls[-1] == (
        "report_protection", (PAIR, 3, "alpha", state, "its disk is on another host"))


def test_a_promotion_that_nobody_wants_any_more_ends_the_guest(host: Host) -> None:
    engine = host.backup()
    host.manager.answer = Grant(False, Generation(7), "the server was given up")
    engine.say("promoted", timeline={})
    assert engine.told == ["seen"] and host.guests.destroyed == [engine.instance_id]


def test_a_promotion_that_the_arbiter_knows_nothing_of_stays(host: Host) -> None:
    engine = host.backup()
    host.manager.answer = Grant(False, Generation(0), "there is no such pair")
    engine.say("promoted", timeline={})
    assert host.guests.destroyed == []


# Signs of life


def test_a_stale_primary_is_fenced_and_a_stale_backup_ended(host: Host) -> None:
    primary, backup = host.primary(), host.backup()
    host.manager.stale = [PAIR, "another"]
    host.agent.report()
    assert primary.told == ["fence"] and backup.told[0] == "stop"


def test_an_engine_that_was_started_during_the_report_is_not_stale(host: Host) -> None:
    old = host.primary(3)
    host.manager.stale = [PAIR]
    host.manager.during_report = lambda: host.primary(5)
    host.agent.report()
    new = host.engines[-1]
    assert new is not old and new.generation == 5 and new.orders == []


def test_a_promoted_backup_is_never_stale(host: Host) -> None:
    engine = host.backup()
    engine.say("promoted", timeline={})
    orders = list(engine.orders)
    host.manager.stale = [PAIR]
    host.agent.report()
    assert engine.orders == orders and host.guests.destroyed == []


def test_engines_that_outlived_the_agent_are_listed_and_heard(host: Host) -> None:
    engine = FakeEngine("primary")
    host.agent.adopt_engines([engine])
    assert host.listed() == [("primary", 3)]
    engine.say("ask_degrade", reason="x")
    assert engine.told == ["grant"]


def test_what_an_engine_of_the_last_agent_held_is_let_go_by_grant_only(host: Host) -> None:
    """It was holding and asking when the agent was restarted; nobody told the new agent that it protected."""
    engine = FakeEngine("primary")
    host.agent.adopt_engines([engine])
    host.manager.answer = Grant(False, Generation(4), "the backup speaks")
    engine.say("gone")
    assert host.guests.unbuffered == [] and host.guests.destroyed == [SERVER]


@pytest.mark.parametrize(("away", "let_go"), [(3, [SERVER]), (1000, [])])
def test_a_guest_that_cannot_be_let_go_at_once_is_let_go_later_or_given_up(host: Host, away: int,
                                                                         let_go: list[str]) -> None:
    engine = host.primary()
    engine.last_words = ["gone"]
    host.guests.away = away
    host.call("stop_engine", pair_id=PAIR, generation=4, reason="switched off")
    assert host.guests.unbuffered == let_go
    host.guests.away = 0


class LostEngine(FakeEngine):
    """host.process.LostEngine: it died, and its guest is held."""

    def listen(self, on_report: Any) -> None:
        super().listen(on_report)
        self.say("gone")


def test_a_guest_whose_engine_died_unseen_goes_on_alone_by_grant(host: Host) -> None:
    host.manager.silent_for = 2
    host.agent.adopt_engines([LostEngine("primary")])
    assert host.manager.calls == [("request_degrade", (PAIR, 3, "alpha", "the primary engine died"))] * 3
    assert host.guests.unbuffered == [SERVER] and host.guests.destroyed == [] and host.listed() == []


def test_a_guest_whose_engine_died_unseen_and_whose_backup_speaks_is_destroyed_unheard(host: Host) -> None:
    host.manager.answer = Grant(False, Generation(4), "the backup speaks")
    host.agent.adopt_engines([LostEngine("primary")])
    assert host.guests.destroyed == [SERVER] and host.guests.unbuffered == []


@pytest.mark.parametrize("granted", [True, False])
def test_a_guest_whose_engine_died_unseen_is_left_to_the_engine_that_was_started_since(host: Host,
                                                                                      granted: bool) -> None:
    def answer(*_: Any) -> Grant:
        if not host.engines:
            host.primary(5)
        return Grant(granted, Generation(6), "so it is")

    host.manager._call = answer
    host.agent.adopt_engines([LostEngine("primary")])
    assert host.guests.unbuffered == [] and host.guests.destroyed == [] and len(host.engines) == 1


def test_a_fence_of_the_generation_whose_engine_died_unseen_comes_late(host: Host) -> None:
    host.agent.adopt_engines([LostEngine("primary", generation=3)])
    host.call("fence", pair_id=PAIR, generation=3, instance_id=SERVER)
    assert host.guests.destroyed == []


def test_progress_goes_with_the_sign_of_life(host: Host) -> None:
    engine = host.primary()
    engine.say("syncing", percent=40)
    host.agent.report()
    assert "40" in host.manager.calls[-1][1][1]["engines"][0]["state"]
    assert host.manager.asked == ["agent_report"]


def test_a_host_that_lacks_something_says_so_and_arms_nothing() -> None:
    host = Host(missing=["the kernel is too old"])
    assert host.call("prepare_domain", instance_id=SERVER) == {
        "monitor": "", "capable": False, "reason": "the kernel is too old"}
    assert Host().call("prepare_domain", instance_id=SERVER)["monitor"] == f"/run/{SERVER}/monitor.sock"


def test_what_the_hosts_kvm_can_is_told_to_the_driver_and_to_the_manager(host: Host) -> None:
    assert Abilities.read(host.call("prepare_domain", instance_id=SERVER)["abilities"]) == ABLE
    host.agent.report()
    (_, report) = host.manager.calls[-1][1]
    assert Abilities.read(report["abilities"]) == ABLE


def test_a_domain_is_described_with_the_sizes_of_its_disks(host: Host) -> None:
    assert host.call("describe_domain", instance_id=SERVER)["disks"] == {}
    host.guests.xml = ("<domain><devices><disk type='file'><source file='/d'/><target dev='vda'/></disk>"
                       "<disk type='file' device='cdrom'><source file='/c'/><target dev='sda'/></disk>"
                       "<disk type='file' device='cdrom'><target dev='sdb'/></disk></devices></domain>")
    assert host.call("describe_domain", instance_id=SERVER)["disks"] == {"vda": 1 << 30, "sda": 2048}


def test_a_domain_is_described_with_what_it_lacks(host: Host) -> None:
    assert host.call("describe_domain", instance_id=SERVER)["armed"] is True
    assert "hard-reboot" in host.call("describe_domain", instance_id=BACKUP_SERVER)["reason"]
    host.guests.away = True
    assert host.call("describe_domain", instance_id=SERVER) == {
        "domain_xml": "", "armed": False, "reason": "libvirt is away"}
