"""What the notification of a pair's move says: ftvm.pair.STATE, in the form of Nova's versioned notifications.

Called by the arbiter after the move is written. doc/source/admin/notifications.rst is its reader's side; a field that
goes or changes its meaning changes VERSION's first number, a new one the second.
"""

import datetime
from collections.abc import Callable
from typing import Any

from nova_ftvm.db.records import Pair
from nova_ftvm.types import PairState

VERSION = "1.0"

Post = Callable[[str, str, dict[str, Any]], None]


def announcer(post: Post) -> Callable[[Pair | None, Pair], None]:
    """post: priority, event type, payload; returns at once and never raises (Bulletin.post)."""
    def announce(before: Pair | None, after: Pair) -> None:
        post("error" if after.state is PairState.ERROR else "info", f"ftvm.pair.{after.state}", payload(before, after))
    return announce


def payload(before: Pair | None, after: Pair) -> dict[str, Any]:
    at = datetime.datetime.fromtimestamp(after.moved_at, datetime.UTC).isoformat(timespec="milliseconds")
    return {
        "nova_ftvm_object.name": "PairPayload", "nova_ftvm_object.namespace": "nova_ftvm",
        "nova_ftvm_object.version": VERSION, "nova_ftvm_object.data": {
            "pair": after.id, "instance": after.instance_id, "project": after.project_id,
            "generation": after.generation, "old_state": None if before is None else before.state.value,
            "state": after.state.value, "reason": after.reason, "primary_host": after.primary_host,
            "backup_host": after.backup_host, "active_host": after.active_host,
            "at": at.replace("+00:00", "Z")}}
