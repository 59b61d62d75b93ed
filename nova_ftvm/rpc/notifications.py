"""Nova's notifications, to learn early which server to look at; and our own, for whoever listens.

Both are lossy, and nothing relies on them.
"""

from collections.abc import Callable
from typing import Any

import oslo_messaging
from oslo_config import cfg

_EVENTS = (r"^instance\.(update|(create|delete|soft_delete|power_on|power_off|reboot|rebuild|unpause|resume|unrescue|"
           r"unshelve|resize_confirm|resize_revert|live_migration_post|live_migration_post_dest|evacuate)(\.end)?|"
           r"(create|rebuild)\.error)$")


class Wake:
    """An endpoint that hands the server's id on."""

    filter_rule = oslo_messaging.NotificationFilter(event_type=_EVENTS)

    def __init__(self, wake: Callable[[str], None]) -> None:
        self._wake = wake

    def info(self, context: Any, publisher_id: str, event_type: str, payload: dict[str, Any],
             metadata: dict[str, Any]) -> None:
        server_id = payload.get("nova_object.data", {}).get("uuid")
        if server_id:
            self._wake(server_id)

    error = info


def listener(conf: cfg.ConfigOpts, exchange: str, topic: str, wake: Callable[[str], None]) -> Any:
    """A listener of Nova's versioned notifications. The caller starts, stops and waits."""
    return oslo_messaging.get_notification_listener(
        oslo_messaging.get_notification_transport(conf), [oslo_messaging.Target(exchange=exchange, topic=topic)],
        [Wake(wake)])


def sender(conf: cfg.ConfigOpts, publisher_id: str) -> Callable[[str, str, dict[str, Any]], None]:
    """Sends one notification of our own: priority, event type, payload. As [oslo_messaging_notifications] says: without
    a driver there, nothing is sent. Waits for a broker that is away, for ever."""
    notifier = oslo_messaging.Notifier(oslo_messaging.get_notification_transport(conf), publisher_id)
    return lambda priority, event_type, payload: getattr(notifier, priority)({}, event_type, payload)
