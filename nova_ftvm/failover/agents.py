"""The agents as the control path calls them. rpc.agent.AgentClient is the real one."""

from typing import Any, Protocol

from nova_ftvm.exception import Unsupported
from nova_ftvm.rpc import common
from nova_ftvm.types import Generation, InstanceId, PairId

#: What a call of these may raise: nobody answered, or the agent refused.
AgentFailed = common.Failed
#: Of these: nobody answered.
Unreachable = common.Unreachable


class Agents(Protocol):
    """See rpc.agent.AgentApi. Each call names the agent's host first."""

    def describe_domain(self, host: str, instance_id: InstanceId) -> dict[str, Any]: ...

    def start_backup(self, host: str, pair_id: PairId, generation: Generation, instance_id: InstanceId,
                     token: str) -> dict[str, Any]: ...

    def start_primary(self, host: str, pair_id: PairId, generation: Generation, instance_id: InstanceId,
                      address: str, port: int, token: str, policy: str) -> dict[str, Any]: ...

    def stop_engine(self, host: str, pair_id: PairId, generation: Generation, reason: str,
                    timeout_s: float | None = None) -> bool: ...

    def fence(self, host: str, pair_id: PairId, generation: Generation, instance_id: InstanceId,
              timeout_s: float | None = None) -> None: ...

    def discard_standby(self, host: str, instance_id: InstanceId) -> bool: ...


def lasting(error: Exception) -> bool:
    """Did the agent say that it will refuse again, as something is missing that protection needs?"""
    return getattr(error, "exc_type", None) == Unsupported.__name__


def said(error: Exception) -> str:
    """An agent's failure in one short sentence, without the remote traceback."""
    value = getattr(error, "value", None)
    text = str(value or error).strip().splitlines()
    return text[0] if text else f"no answer ({type(error).__name__})"
