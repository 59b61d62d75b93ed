"""A call whose broker is away: what every caller is ready for is all that it gets."""

import oslo_messaging
import pytest
from kombu import exceptions as broker
from oslo_config import cfg
from oslo_messaging import transport

from nova_ftvm.rpc import common
from nova_ftvm.rpc.agent import AgentClient
from nova_ftvm.rpc.manager import ManagerClient


class _Unreachable:
    """oslo.messaging's client, where its connection is to be made anew: nothing is translated there."""

    def prepare(self, **target: object) -> "_Unreachable":
        return self

    def call(self, context: object, method: str, **arguments: object) -> None:
        raise broker.OperationalError("[Errno 113] No route to host")


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> oslo_messaging.Transport:
    monkeypatch.setattr(oslo_messaging, "get_rpc_client", lambda *_, **__: _Unreachable())
    conf = cfg.ConfigOpts()
    conf([], project="test", default_config_files=[])
    conf.register_opts(transport._transport_opts)
    conf.set_override("transport_url", "fake:/")
    return common.transport(conf)


def test_a_broker_without_a_route_is_a_failure_that_the_agent_expects(wire: oslo_messaging.Transport) -> None:
    with pytest.raises(common.Failed, match=r"broker cannot be reached.*No route to host"):
        ManagerClient(wire).agent_report("hx", {})


def test_a_question_that_may_be_asked_again_fails_in_the_same_way(wire: oslo_messaging.Transport) -> None:
    with pytest.raises(common.Unreachable):
        AgentClient(wire).prepare_domain("hx", "vm")


def test_each_try_waits_twice_as_long_as_the_one_before_and_all_have_one_deadline(
        wire: oslo_messaging.Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    class Deaf:
        def prepare(self, server: str | None, timeout: float) -> "Deaf":
            waited.append(timeout)
            return self

        def call(self, context: object, method: str, **arguments: object) -> None:
            raise oslo_messaging.MessagingTimeout("nobody")

    monkeypatch.setattr(oslo_messaging, "get_rpc_client", lambda *_, **__: Deaf())
    with pytest.raises(common.Unreachable):
        AgentClient(wire, 7.0).prepare_domain("hx", "vm")
    assert waited == [1.0, 2.0, 4.0]
