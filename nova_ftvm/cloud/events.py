"""Which of libvirt's events the compute manager gets to see.

A checkpoint pauses and resumes the guest many times a second, each time with two events, and Nova reads the database
for each. And a standby has the uuid of a server that lives on another host, whose events are no business of this one.
"""

from collections.abc import Callable

from nova.virt import event as virt_event

from nova_ftvm.cloud import claims

_OF_CHECKPOINTS = (virt_event.EVENT_LIFECYCLE_PAUSED, virt_event.EVENT_LIFECYCLE_RESUMED)


class EventFilter:
    """Called from libvirt's event thread. Remembers who is armed, so that a checkpoint costs one look into a dict."""

    def __init__(self, is_armed: Callable[[str], bool], host: Callable[[], str]) -> None:
        self._is_armed = is_armed
        self._host = host
        self._armed: dict[str, bool] = {}

    def passes(self, event: virt_event.InstanceEvent) -> bool:
        if not isinstance(event, virt_event.LifecycleEvent):
            return True
        uuid = event.get_instance_uuid()
        if event.get_transition() in _OF_CHECKPOINTS:
            if uuid not in self._armed:
                self._armed[uuid] = self._is_armed(uuid)
            return not (self._armed[uuid] or claims.of(uuid, self._host()))
        # Started or ended: its XML may be another one now.
        self._armed.pop(uuid, None)
        return claims.of(uuid, self._host()) is None
