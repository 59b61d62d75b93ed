"""What is to be done for one server. PURE: all that is known comes in, one verdict goes out.

Called by reconcile.py, which carries the verdict out. A verdict never hands the voice over: only the two sides'
own requests to the arbiter do. What the manager sees of the world is old when it sees it, so an armed pair is
given up only for a reason that has held for a while; its backup may be about to ask for it.
"""

import dataclasses
import enum
from collections.abc import Mapping

from nova_ftvm.core.request import ATTACHED_VOLUMES, STATE_KEY, Request
from nova_ftvm.db.records import Host, Pair
from nova_ftvm.failover import hosts as agents
from nova_ftvm.failover import refusals
from nova_ftvm.failover.arbiter import CATCH_UP, CLEANUP, NOTHING
from nova_ftvm.failover.cloud import Server
from nova_ftvm.failover.pairing import candidates
from nova_ftvm.failover.settings import Settings
from nova_ftvm.types import PairState, Role


class Act(enum.Enum):
    """What the reconciler does."""

    WAIT = "nothing, this time"
    SHOW = "the server shows what its pair says, and the reason beside it"
    REFUSE = "the server shows that it is unprotected, and why"
    TRY = "look closer at the server, and make a pair if nothing stands against it"
    FOLLOW = "the pair's worker has something to do"
    DISARM = "the pair is given up"
    GIVE_UP = "the pair is given up, and tried again later"
    FAIL = "the pair is lost until somebody or something comes back"
    START_ANEW = "a promotion ends without a guest: Nova boots the server from the backup's disks"
    FORGET = "the row goes"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    act: Act
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """All that is known about one server. server None: Nova says that it does not exist."""

    server: Server | None
    request: Request
    pair: Pair | None
    #: The server that pair.backup_id names; None: Nova says that it does not exist.
    backup: Server | None
    hosts: Mapping[str, Host]
    now: float
    settings: Settings
    #: Since when somebody is heard at all: a manager that was deaf, or has just started, takes nobody for dead yet.
    hearing_since: float = 0.0

    def alive(self, host: str | None) -> bool:
        found = self.hosts.get(host or "")
        return found is not None and found.alive(self.now, self.settings.agent_down_s)

    def lost(self, host: str | None) -> bool:
        return not self.alive(host) and self.older(self.hearing_since, self.settings.agent_down_s)

    def older(self, moment: float, age_s: float) -> bool:
        return self.now - moment > age_s

    def waits(self, pair: Pair) -> bool:
        """Is its next try still to come? A time that is further off than any pause was told by another clock."""
        longest_s = max(self.settings.retry_limit_s, self.settings.settle_s)
        return 0 < pair.retry_at - self.now <= longest_s or 0 <= self.now - pair.moved_at <= self.settings.settle_s


_SHOW, _WAIT, _FOLLOW = Verdict(Act.SHOW), Verdict(Act.WAIT), Verdict(Act.FOLLOW)
_SWITCHED_OFF = "fault tolerance is switched off: set the property ft to 'true' to protect the server"


def judge(view: View) -> Verdict:
    """The whole judgement; each part below answers, or passes on with None."""
    pair = view.pair
    if pair is not None and pair.state is PairState.PROMOTING:
        return _promoting(view, pair)
    if view.server is None:
        return _without_server(pair)
    if pair is not None:
        if pair.step in CATCH_UP:
            return _FOLLOW if view.now >= pair.retry_at else _SHOW
        if pair.step == CLEANUP and pair.state in (PairState.DISABLED, PairState.ERROR):
            return _FOLLOW
    if not view.request.wanted:
        return _unwanted(view, view.server)
    if pair is not None and pair.state is not PairState.DISABLED:
        return _armed(view, pair, view.server)
    return _refused(view, view.server) or _due(view, pair)


def _without_server(pair: Pair | None) -> Verdict:
    gone = "the server was deleted"
    if pair is None:
        return _WAIT
    if pair.step in CATCH_UP and pair.state is PairState.DEGRADED:
        return _FOLLOW
    if pair.state is PairState.DISABLED:
        return Verdict(Act.FORGET) if pair.step == NOTHING else _FOLLOW
    return Verdict(Act.DISARM, gone)


def _promoting(view: View, pair: Pair) -> Verdict:
    """The voice is with active_host for good. Its silence is no evidence: the guest may run there, or is about to."""
    granted, slow = pair.active_host, view.older(pair.moved_at, view.settings.step_timeout_s)
    if view.alive(granted):
        reported_at = view.hosts[granted].reported_at
        idle = (reported_at - pair.moved_at > view.settings.agent_down_s
                and not agents.lists(view.hosts[granted], pair))
        if idle or slow:
            return Verdict(Act.START_ANEW, f"{granted} did not say that the guest runs")
        return _FOLLOW
    if not slow or not view.lost(granted):
        return _FOLLOW
    if view.server is None or not view.request.wanted:
        # The owner's word ends it; that the host is off, and stays off, is theirs to see to.
        return Verdict(Act.FAIL, f"given up while {granted}, which was to resume the guest, was silent")
    return Verdict(Act.SHOW, f"{granted} is silent since: bring it back. If it is gone for good, and off, switch ft "
                             "off, start or evacuate the server, and switch ft on")


def _unwanted(view: View, server: Server) -> Verdict:
    reason = view.request.refusal or _SWITCHED_OFF
    if view.pair is not None and view.pair.state is not PairState.DISABLED:
        return Verdict(Act.DISARM, reason)
    if server.vm_state == "building" or (
            view.pair is None and not view.request.refusal and STATE_KEY not in server.metadata):
        return _WAIT
    return Verdict(Act.REFUSE, reason)


def _armed(view: View, pair: Pair, server: Server) -> Verdict:
    """A pair that is not DISABLED and has no failover under way."""
    if server.task_state is None and server.host is not None and server.host != pair.primary_host:
        return Verdict(Act.DISARM, f"the server moved from {pair.primary_host} to {server.host}")
    if server.volumes:
        # The driver disarms before it attaches one; this one came while the pair was being made.
        return Verdict(Act.DISARM, ATTACHED_VOLUMES)
    if (server.task_state is None and server.vm_state != "active" and pair.state is not PairState.ERROR
            and view.older(server.updated_at, view.settings.agent_down_s)):
        return Verdict(Act.DISARM, f"the server is {server.vm_state}")
    return {PairState.PENDING: _pending, PairState.SYNCING: _syncing, PairState.PROTECTED: _protected,
            PairState.DEGRADED: _alone, PairState.ERROR: _alone}[pair.state](view, pair)


def _pending(view: View, pair: Pair) -> Verdict:
    if view.backup is not None and view.backup.vm_state == "error":
        return Verdict(Act.GIVE_UP, f"no host can take the backup: {view.backup.fault or 'its server is in error'}")
    if view.older(pair.moved_at, view.settings.step_timeout_s):
        return Verdict(Act.GIVE_UP, f"the backup was not ready after {view.settings.step_timeout_s:g} s")
    place = pair.backup_host or (None if view.backup is None else view.backup.host)
    for host in filter(None, (pair.primary_host, place)):
        if view.lost(host):
            return Verdict(Act.GIVE_UP, f"the agent of {host} was lost while the backup was made")
    return _backup_lost(view, pair) or _FOLLOW


def _syncing(view: View, pair: Pair) -> Verdict:
    if view.lost(pair.primary_host):
        return Verdict(Act.FAIL, f"the agent of {pair.primary_host} was lost before the first copy was whole: "
                                 "if the host is dead, evacuate the server; if not, start nova-ftvm-agent there")
    if view.lost(pair.backup_host):
        return Verdict(Act.GIVE_UP, f"the agent of {pair.backup_host} was lost during the first copy")
    if view.backup is not None and view.backup.vm_state == "error":
        return Verdict(Act.GIVE_UP, f"the backup server failed: {view.backup.fault or 'it is in error'}")
    if pair.step != NOTHING:
        return _FOLLOW
    if view.older(pair.updated_at, view.settings.step_timeout_s):
        return Verdict(Act.GIVE_UP, f"the first copy has not moved for {view.settings.step_timeout_s:g} s")
    if _unheard_of(view, pair, pair.primary_host):
        return Verdict(Act.GIVE_UP, f"the engine on {pair.primary_host} ended during the first copy")
    return _backup_lost(view, pair) or _SHOW


def _protected(view: View, pair: Pair) -> Verdict:
    """An engine that is left asks the arbiter itself. Only when none is left must somebody else act."""
    none_left = _unheard_of(view, pair, pair.primary_host) and (
        view.lost(pair.backup_host) or _unheard_of(view, pair, pair.backup_host))
    if none_left:
        return Verdict(Act.GIVE_UP, f"no engine is left on {pair.primary_host} and {pair.backup_host}")
    silent = [host for host in (pair.primary_host, pair.backup_host) if view.lost(host)]
    note = f"but no agent reports from {' and '.join(map(str, silent))}: see to it" if silent else ""
    return _backup_lost(view, pair) or Verdict(Act.SHOW, note)


def _alone(view: View, pair: Pair) -> Verdict:
    """DEGRADED or ERROR: a new backup is made as soon as nothing stands against it; until then the server shows what
    does. An ERROR ends so without [manager]repair too: there its owner has been promised protection, and had none."""
    if pair.step != NOTHING:
        return _FOLLOW
    if view.waits(pair) or (pair.state is PairState.DEGRADED and not view.settings.repair):
        return _SHOW
    refused = _refused(view, view.server)
    return Verdict(Act.TRY) if refused is None else Verdict(Act.SHOW, refused.reason)


def _backup_lost(view: View, pair: Pair) -> Verdict | None:
    if pair.backup_id is None or view.backup is not None:
        return None
    return Verdict(Act.GIVE_UP, "its backup server was deleted")


def _unheard_of(view: View, pair: Pair, host: str | None) -> bool:
    """The host's agent lives, has reported since the pair's last move, and lists no engine of the pair."""
    found = view.hosts.get(host or "")
    return (view.alive(host) and found is not None and not agents.present(found, pair)
            and found.reported_at - pair.moved_at > view.settings.agent_down_s)


def _refused(view: View, server: Server | None) -> Verdict | None:
    """Why a server that wants protection and has none cannot get it now; what needs no further question."""
    if server is None or server.task_state is not None or server.vm_state == "building" or server.host is None:
        return _WAIT
    if server.vm_state != "active":
        return Verdict(Act.REFUSE, f"the server is {server.vm_state}: it is protected once it is active")
    if view.request.refusal:
        return Verdict(Act.REFUSE, view.request.refusal)
    host = view.hosts.get(server.host)
    if host is None or not host.alive(view.now, view.settings.agent_down_s):
        return Verdict(Act.REFUSE, f"the agent of {server.host} does not report: start nova-ftvm-agent on that host")
    if not host.capable:
        return Verdict(Act.REFUSE, f"host {server.host} cannot protect servers: {host.reason or 'no reason given'}")
    if view.pair is not None and server.host != view.pair.active_host and agents.lists(host, view.pair, Role.PRIMARY):
        return Verdict(Act.REFUSE, f"the guest on {server.host} is over and is being destroyed: the server was given "
                                   f"to {view.pair.active_host}")
    refused = refusals.standing(view.pair, view.hosts, view.now, view.settings)
    if server.host in refused:
        return Verdict(Act.REFUSE, refused[server.host].reason)
    if not candidates(view.hosts, server.host, view.now, view.settings.agent_down_s, refused):
        why = "; ".join(refusal.reason for name, refusal in sorted(refused.items()) if view.alive(name))
        return Verdict(Act.REFUSE, why or "no other host can hold the backup: start nova-ftvm-agent on another compute "
                                          "host, and see its log if it runs")
    return None


def _due(view: View, pair: Pair | None) -> Verdict:
    """A pair that was given up is tried again after a while."""
    if pair is not None and view.waits(pair):
        return _SHOW
    return Verdict(Act.TRY)
