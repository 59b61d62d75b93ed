"""The agent of this host and the manager, as the driver calls them: every call has a deadline.

Failure is one exception, PartnerAway, so that each caller decides in one place what the guest's good is.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import oslo_messaging

from nova_ftvm.cloud.settings import CONF
from nova_ftvm.exception import FtvmError
from nova_ftvm.rpc import agent, common, manager
from nova_ftvm.types import Generation, Grant, InstanceId, PairId

Answer = TypeVar("Answer")


class PartnerAway(FtvmError):
    """The agent or the manager did not answer, or failed."""

    def __init__(self, partner: str, call: str, cause: Exception) -> None:
        super().__init__(f"the {partner} did not answer {call}: {type(cause).__name__}: {cause}".rstrip(": "))


class Partners:
    """One object a driver. Connects at the first call, as nova-compute's configuration is complete only then."""

    def __init__(self) -> None:
        self._manager: manager.ManagerClient | None = None
        self._agent: agent.AgentClient | None = None

    def _connect(self) -> tuple[manager.ManagerClient, agent.AgentClient]:
        if self._manager is None or self._agent is None:
            transport = common.transport(CONF)
            self._manager = manager.ManagerClient(transport, CONF.ftvm.rpc_timeout_s)
            self._agent = agent.AgentClient(transport, CONF.ftvm.rpc_timeout_s)
        return self._manager, self._agent

    def _ask_manager(self, name: str, question: Callable[[manager.ManagerClient], Answer]) -> Answer:
        try:
            return question(self._connect()[0])
        except (*common.Failed, oslo_messaging.MessagingException) as error:
            raise PartnerAway("failover manager", name, error) from error

    def _ask_agent(self, name: str, question: Callable[[agent.AgentClient], Answer]) -> Answer:
        try:
            return question(self._connect()[1])
        except (*common.Failed, oslo_messaging.MessagingException) as error:
            raise PartnerAway("agent of this host", name, error) from error

    def standby_plan(self, backup_id: str, host: str) -> manager.StandbyPlan | None:
        return self._ask_manager("standby_plan", lambda client: client.standby_plan(backup_id, host))

    def standby_ready(self, pair_id: PairId, generation: Generation, host: str, failure: str = "",
                      lasting: bool = False) -> Grant:
        return self._ask_manager("standby_ready",
                                 lambda client: client.standby_ready(pair_id, generation, host, failure, lasting))

    def disarm(self, instance_id: InstanceId, reason: str) -> bool:
        return self._ask_manager("disarm", lambda client: client.disarm(instance_id, reason))

    def may_adopt(self, instance_id: InstanceId, host: str) -> bool:
        return self.adoption(instance_id, host)["adopt"]

    def prepare_domain(self, host: str, instance_id: InstanceId) -> dict[str, Any]:
        return self._ask_agent("prepare_domain", lambda client: client.prepare_domain(host, instance_id))

    def switchover(self, instance_id: InstanceId, host: str) -> dict[str, Any]:
        return self._ask_manager("switchover", lambda client: client.switchover(instance_id, host))

    def adoption(self, instance_id: InstanceId, host: str) -> manager.Adoption:
        return self._ask_manager("adoption", lambda client: client.adoption(instance_id, host))

    def hand_over(self, host: str, instance_id: InstanceId) -> bool:
        return self._ask_agent("hand_over", lambda client: client.hand_over(host, instance_id))

    def fence(self, host: str, pair_id: PairId, generation: Generation, instance_id: InstanceId) -> None:
        self._ask_agent("fence", lambda client: client.fence(host, pair_id, generation, instance_id))

    def discard_standby(self, host: str, instance_id: InstanceId) -> bool:
        return self._ask_agent("discard_standby", lambda client: client.discard_standby(host, instance_id))
