"""What the server's owner sees: ft:state and ft:reason. Written only when they change: each write is a notification."""

from nova_ftvm.core import request
from nova_ftvm.db.records import Pair
from nova_ftvm.failover.cloud import Cloud, Server
from nova_ftvm.types import PairState

PROTECTED = "protected; memory only: what is written to its disks is not replicated yet"
#: Nova's limit for a value of metadata.
_LIMIT = 255
#: The first copy's progress is shown in such steps (percent).
_PROGRESS_STEP = 25


def sentence(pair: Pair) -> str:
    """The reason that goes with the pair's state."""
    if pair.state is PairState.PROTECTED:
        return PROTECTED
    if pair.state is PairState.SYNCING:
        return f"first copy of the memory: {pair.progress // _PROGRESS_STEP * _PROGRESS_STEP}%"
    return pair.reason or ("the backup is being made" if pair.state is PairState.PENDING else str(pair.state))


def show(cloud: Cloud, server: Server, state: PairState, reason: str) -> None:
    """Writes what differs from what the server shows; raises as Cloud does."""
    wanted = {request.STATE_KEY: state.value, request.REASON_KEY: reason[:_LIMIT]}
    if any(server.metadata.get(key) != value for key, value in wanted.items()):
        cloud.set_metadata(server.id, wanted)
