"""What the server's owner sees: ft:state, ft:reason and, during a first copy, ft:progress.

Written only when they change: each write is a notification.
"""

from nova_ftvm.core import request
from nova_ftvm.db.records import Pair
from nova_ftvm.failover.cloud import Cloud, Server
from nova_ftvm.types import PairState

PROTECTED = "protected: the backup holds the guest's memory, devices and disks"
SYNCING = "the first copy of memory and disks is under way; ft:progress tells how much of it is done, in percent"
#: Nova's limit for a value of metadata.
_LIMIT = 255
#: Nova refuses to change the metadata of a server in any other state: what it shows there is from before.
_WRITABLE = ("active", "paused", "suspended", "stopped")


def sentence(pair: Pair) -> str:
    """The reason that goes with the pair's state."""
    if pair.state is PairState.PROTECTED:
        return PROTECTED
    if pair.state is PairState.SYNCING:
        return pair.reason or SYNCING
    return pair.reason or ("the backup is being made" if pair.state is PairState.PENDING else str(pair.state))


def show_pair(cloud: Cloud, server: Server, pair: Pair, note: str = "") -> None:
    """What the pair says, and what stands in its way just now; raises as Cloud does."""
    reason = f"{sentence(pair)}; {note}" if note else sentence(pair)
    show(cloud, server, pair.state, reason, pair.progress if pair.state is PairState.SYNCING else None)


def show(cloud: Cloud, server: Server, state: PairState, reason: str, progress: float | None = None) -> None:
    """Writes what differs from what the server shows; raises as Cloud does. progress: percent; None takes it away."""
    if server.vm_state not in _WRITABLE:
        return
    wanted = {request.STATE_KEY: state.value, request.REASON_KEY: reason[:_LIMIT]}
    if progress is not None:
        wanted[request.PROGRESS_KEY] = str(int(progress))
    elif request.PROGRESS_KEY in server.metadata:
        cloud.delete_metadata(server.id, request.PROGRESS_KEY)
    if any(server.metadata.get(key) != value for key, value in wanted.items()):
        cloud.set_metadata(server.id, wanted)
