"""The time that a guest stood still in its checkpoints' pauses: in all, and its share of the last minute. PURE.

For a guest whose clock stands a pause counts as what that clock lost: more than from STOP to RESUME, see
core/virtualclock.py. For one whose clock goes on it is that, and no more.

What is lost of it is lost for a clock that stands in pauses, too; which of them do is the guest's affair, and known in
part (`GuestClock`). The primary's engine counts (engine/stats.py), once a second; its agent and the manager pass the
figures on (`Figures`), and `nova-ftvm-manage pair show` shows them.
"""

import dataclasses
import enum
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW_S = 60.0
#: Lost beyond this share of the last minute is worth a word to a guest's operator, once; and again when it has doubled.
#: A clock that is wrong by less an NTP client corrects with ease.
NOTABLE = 0.01
_AGAIN = 2.0


class GuestClock(enum.StrEnum):
    """The clock that a Linux guest takes for its own, in a pause."""

    UNKNOWN = "unknown"
    #: Its TSC is a real one that goes on, and the guest is told so.
    GOES_ON = "goes on"
    STANDS = "stands in pauses"


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """What a pair's engine has counted since its protection began."""

    checkpoints: int
    #: In all.
    paused_s: float
    #: Over the last minute, or since the first pause.
    paused_percent: float
    clock: str = GuestClock.UNKNOWN.value

    @classmethod
    def parse(cls, said: Mapping[str, Any] | None) -> "Figures | None":
        """From what an agent, or a row, says; None: nothing, as an agent of an older release does, or no figures."""
        try:
            return None if not said else cls(int(said["checkpoints"]), float(said["paused_s"]),
                                             float(said["paused_percent"]), str(said["clock"]))
        except (KeyError, TypeError, ValueError):
            return None


class LostTime:
    """Of one guest. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.paused_s = 0.0
        #: When, and `paused_s` then. The first one is as old as the window, or the beginning of the first pause.
        self._marks: deque[tuple[float, float]] = deque()
        self._told = 0.0

    def on_pause(self, now: float, pause_s: float) -> None:
        """A pause is over."""
        if not self._marks:
            self._marks.append((now - pause_s, 0.0))
        self.paused_s += pause_s

    def share(self, now: float) -> float:
        """Of the last minute. Asked once a second: what was asked in between is forgotten only after the minute."""
        if not self._marks:
            return 0.0
        self._marks.append((now, self.paused_s))
        while len(self._marks) > 2 and self._marks[1][0] <= now - WINDOW_S:
            self._marks.popleft()
        since, before = self._marks[0]
        return min(1.0, (self.paused_s - before) / (now - since)) if now > since else 0.0

    def is_news(self, now: float, share: float) -> bool:
        """Is a share to be told, after a whole minute: notable, and twice what was told last?"""
        if not self._marks or self._marks[0][0] > now - WINDOW_S:
            return False
        if share <= NOTABLE or share < _AGAIN * self._told:
            return False
        self._told = share
        return True
