"""Hosts that said that they cannot work with a server as things are, or where it just failed. PURE.

A failure is tried again with back-off. A refusal is not, as each try costs a backup server: it stands until something
has changed that may matter, or for [manager]refused_retry_s. What ends it: a planned end of the pair (the server was
stopped, rebooted, moved, or ft was switched; arbiter.disarm), and another start of the host's agent, another word of
it about its host, or a gap in its reports (db.records.Host.since).

A host where a backup was just lost is as good as any once it has recovered. Its agent may not know what is wrong (its
data link is cut, for one), so another host is tried before it.
"""

from collections.abc import Mapping

from nova_ftvm.db.records import Host, Pair, Refusal
from nova_ftvm.failover.settings import Settings

#: Seconds for which another host is preferred to one where a backup was lost.
_AVOID_S = 60.0


def standing(pair: Pair | None, hosts: Mapping[str, Host], now: float, settings: Settings) -> dict[str, Refusal]:
    """Those that still count, by host."""
    if pair is None:
        return {}
    return {name: refusal for name, refusal in pair.refused.items()
            if refusal.lasting and now - refusal.at < settings.refused_retry_s
            and (name not in hosts or hosts[name].since <= refusal.at)}


def avoided(pair: Pair, now: float) -> frozenset[str]:
    """Hosts where a backup of the pair was lost a moment ago."""
    return frozenset(name for name, refusal in pair.refused.items() if now - refusal.at < _AVOID_S)
