"""The backup's watch over the primary: when to ask for the pair, and what an answer means. PURE.

A doubt never promotes: silence only makes it ask, and no answer only makes it ask again.
"""

import enum

from nova_ftvm.types import Generation, Grant

ASK_AGAIN_S = 0.5


class Watch(enum.Enum):
    SYNCING = "no epoch committed yet: nothing to promote"
    WATCHING = "the primary is alive"
    ASKING = "the primary is silent, the arbiter is asked"
    PROMOTING = "the arbiter granted the pair"
    OVER = "the pair is the primary's, or ended"


#: Epochs are taken and acknowledged in these only. Also while the arbiter is asked: what is acknowledged before the
#: grant is in the promoted guest. After it nothing is: the primary's generation is over, even if the promotion fails.
HOLDS_REPLICA = frozenset({Watch.SYNCING, Watch.WATCHING, Watch.ASKING})


class Verdict(enum.Enum):
    ASK = enum.auto()
    PROMOTE = enum.auto()
    #: End, and let the standby go.
    GIVE_UP = enum.auto()


class Lease:
    """The watch of one backup engine in one generation. Times are monotonic seconds."""

    def __init__(self, generation: Generation, silence_limit_s: float, now: float) -> None:
        self._generation = generation
        self._limit_s = silence_limit_s
        self._heard = now
        self._next_ask = now
        self.watch = Watch.SYNCING
        #: What speaks for the primary's death; one sentence.
        self.evidence = ""

    def on_heard(self, now: float) -> None:
        """Any frame of the primary."""
        self._heard = now

    def on_committed(self) -> None:
        """An epoch is here, whole."""
        if self.watch is Watch.SYNCING:
            self.watch = Watch.WATCHING

    def on_guest_gone(self, now: float) -> Verdict | None:
        """The primary's agent saw QEMU end."""
        return self._suspect("the primary's agent saw QEMU end", now)

    def on_handed_over(self, now: float) -> Verdict | None:
        """The primary wants the guest to go on here, and holds its output."""
        return self._suspect("the server is moved here", now)

    def on_peer_lost(self, now: float) -> Verdict | None:
        """The connection ended. A primary that lives goes on alone or comes back; only its silence counts."""
        return Verdict.GIVE_UP if self._over_if(Watch.SYNCING) else None

    def on_bye(self) -> Verdict | None:
        """A planned end."""
        return Verdict.GIVE_UP if self._over_if(Watch.SYNCING, Watch.WATCHING, Watch.ASKING) else None

    def tick(self, now: float) -> Verdict | None:
        if self.watch is Watch.WATCHING and now - self._heard >= self._limit_s:
            return self._suspect(f"no heartbeat for {(now - self._heard) * 1000:.0f} ms", now)
        if self.watch is Watch.ASKING and now >= self._next_ask:
            return self._ask(now)
        return None

    def next_tick(self) -> float | None:
        if self.watch is Watch.WATCHING:
            return self._heard + self._limit_s
        return self._next_ask if self.watch is Watch.ASKING else None

    def on_grant(self, grant: Grant, now: float) -> Verdict | None:
        """The arbiter's answer to ASK."""
        if self.watch is not Watch.ASKING:
            return None
        if grant.granted:
            self.watch = Watch.PROMOTING
            return Verdict.PROMOTE
        if grant.generation == self._generation:
            # Refused for now, not for good: go on watching, and ask again if the silence lasts.
            self.watch = Watch.WATCHING
            self._heard = now
            return None
        self.watch = Watch.OVER
        return Verdict.GIVE_UP

    def _suspect(self, evidence: str, now: float) -> Verdict | None:
        if self.watch is not Watch.WATCHING:
            return None
        self.watch, self.evidence = Watch.ASKING, evidence
        return self._ask(now)

    def _ask(self, now: float) -> Verdict:
        self._next_ask = now + ASK_AGAIN_S
        return Verdict.ASK

    def _over_if(self, *states: Watch) -> bool:
        if self.watch not in states:
            return False
        self.watch = Watch.OVER
        return True
