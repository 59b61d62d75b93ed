"""Named points where a test makes an engine die, hang or stop. In production nothing is armed.

FTVM_FAULT=<point>:<how>[:<after>] in the engine's environment; how is kill, hang or stop (SIGSTOP);
after: how many times the point is passed unharmed first.
"""

import enum
import os
import signal
import time


class Fault(enum.Enum):
    """Where. Each is between two steps of the protocol."""

    MIRROR_STARTED = "mirror-started"
    DISK_SHIPPED = "disk-shipped"
    BUFFERED = "buffered"
    BEFORE_SAVE = "before-save"
    SAVE_SENT = "save-sent"
    PROTECTED = "protected"
    LOG_CUT = "log-cut"
    CAPTURED = "captured"
    BEFORE_FORWARD = "before-forward"
    FORWARDED = "forwarded"
    GATE_OPEN = "gate-open"
    BEFORE_SHIP = "before-ship"
    SHIPPED_HALF = "shipped-half"
    SHIPPED = "shipped"
    BEFORE_RELEASE = "before-release"
    HANDED_OVER = "handed-over"
    BEFORE_UNBUFFER = "before-unbuffer"
    BEFORE_APPLY = "before-apply"
    APPLIED = "applied"
    ASKED = "asked"
    BEFORE_SETTLE = "before-settle"
    SETTLED = "settled"
    BEFORE_LOAD = "before-load"
    LOADED = "loaded"


#: What the engine's log has when it is done.
TRIPPED = b"the fault is tripped\n"

_HANG_S = 3600.0
_armed, _how, _after = (*os.environ.get("FTVM_FAULT", "").split(":"), "", "", "")[:3]
_left = int(_after or 0)


def trip(point: Fault) -> None:
    """Does the armed fault's harm, if `point` is where it is armed."""
    global _left
    if point.value != _armed:
        return
    if _left:
        _left -= 1
        return
    os.write(2, TRIPPED)
    if _how == "hang":
        time.sleep(_HANG_S)
    else:
        os.kill(os.getpid(), signal.SIGSTOP if _how == "stop" else signal.SIGKILL)
