"""Hosts that said that they cannot work with a server as things are. PURE.

A failure is tried again with back-off. A refusal is not, as each try costs a backup server: it stands until something
has changed that may matter, or for [manager]refused_retry_s. What ends it: a planned end of the pair (the server was
stopped, rebooted, moved, or ft was switched; arbiter.disarm), and another start of the host's agent, another word of
it about its host, or a gap in its reports (db.records.Host.since).
"""

from collections.abc import Mapping

from nova_ftvm.db.records import Host, Pair, Refusal
from nova_ftvm.failover.settings import Settings


def standing(pair: Pair | None, hosts: Mapping[str, Host], now: float, settings: Settings) -> dict[str, Refusal]:
    """Those that still count, by host."""
    if pair is None:
        return {}
    return {name: refusal for name, refusal in pair.refused.items()
            if now - refusal.at < settings.refused_retry_s and (name not in hosts or hosts[name].since <= refusal.at)}
