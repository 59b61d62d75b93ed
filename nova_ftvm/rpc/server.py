"""The servers' side: methods of a Protocol, answered in native threads. Each also takes the RPC context, unused."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import oslo_messaging
from oslo_config import cfg

from nova_ftvm.exception import FtvmError
from nova_ftvm.rpc import common


def methods_of(protocol: type) -> frozenset[str]:
    """The names that a Protocol declares."""
    return frozenset(name for name, value in vars(protocol).items() if not name.startswith("_") and callable(value))


class Endpoint:
    """Exposes `methods` of `service`, and nothing else of it."""

    target = oslo_messaging.Target(version=common.VERSION)

    def __init__(self, service: Any, methods: Iterable[str]) -> None:
        self._methods = {name: _exposed(getattr(service, name)) for name in methods}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            return self.__dict__["_methods"][name]
        except KeyError:
            raise AttributeError(name) from None


def _exposed(method: Callable[..., Any]) -> Callable[..., Any]:
    def answer(context: Any, **arguments: Any) -> Any:
        try:
            return method(**arguments)
        except FtvmError:
            # The caller gets it as RemoteError; it is no fault of ours, so it is not logged as one.
            raise oslo_messaging.ExpectedException() from None
    return answer


def leave_with_broker(conf: cfg.ConfigOpts) -> None:
    """Before the server starts: what it has no thread for stays with the broker, which forgets a call when its caller
    does. Taken at once, all would be worked through in turn, and answered too late, for as long as callers ask again.
    """
    with contextlib.suppress(cfg.NoSuchOptError, cfg.NoSuchGroupError):
        conf.set_default("rabbit_qos_prefetch_count", 1, group="oslo_messaging_rabbit")


def serve(transport: oslo_messaging.Transport, topic: str, host: str, endpoint: Endpoint) -> Any:
    """An RPC server for calls to the topic and to the topic on this host. The caller starts, stops and waits."""
    target = oslo_messaging.Target(exchange=common.EXCHANGE, topic=topic, server=host)
    return oslo_messaging.get_rpc_server(transport, target, [endpoint],
                                         access_policy=oslo_messaging.DefaultRPCAccessPolicy)
