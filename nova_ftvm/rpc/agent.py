"""What a compute host's agent answers. Callers: the manager, and the driver in nova-compute on the same host."""

from typing import Any, Protocol

import oslo_messaging

from nova_ftvm.rpc import common
from nova_ftvm.types import Generation, InstanceId, PairId

#: Of what may well be asked twice; whether a server can ever be protected hangs on prepare_domain.
_TRIES = 3


class AgentApi(Protocol):
    """The agent's methods, as the RPC server exposes them (each also takes `context` first)."""

    def prepare_domain(self, instance_id: str) -> dict[str, Any]:
        """The driver, before it defines a domain that asks for protection (primary or standby).
        Makes the server's runtime folder. Answer: {"monitor": path for the second QMP monitor, "capable": bool,
        "reason": why not, "abilities": what the host's KVM can (core.kind.Abilities as dict; an older agent leaves it
        out)}."""

    def describe_domain(self, instance_id: str) -> dict[str, Any]:
        """Answer: {"domain_xml": live XML, migratable; "armed": bool, has it our monitor; "reason": why not;
        "disks": bytes of each disk in a file, as the guest sees them, by target}."""

    def start_backup(self, pair_id: str, generation: int, instance_id: str, token: str) -> dict[str, Any]:
        """Starts the backup's engine beside the paused standby. Answer: {"address": str, "port": int}."""

    def start_primary(self, pair_id: str, generation: int, instance_id: str, address: str, port: int,
                      token: str, policy: str = "") -> dict[str, Any]:
        """Starts the primary's engine; it reports by report_protection. Answer: {} once the process is up.
        policy: when to take checkpoints; '' is as the host is configured."""

    def stop_engine(self, pair_id: str, generation: int, reason: str) -> dict[str, Any]:
        """A planned end: the primary's output is released and its buffers removed, a backup's engine ends and its
        standby domain is destroyed. Idempotent. Answer: {"stopped": bool}. Refused (False) for a promoted backup."""

    def fence(self, pair_id: str, generation: int, instance_id: str) -> dict[str, Any]:
        """The generation is over: destroys the primary's domain at once, its output unreleased. Idempotent."""

    def hand_over(self, instance_id: str) -> dict[str, Any]:
        """The driver, moving a protected server to its backup's host: the primary's engine holds the guest's output
        from now on, and its backup asks the arbiter for the pair at once. Answer: {"handed_over": bool, is there such
        an engine}. What became of it is the arbiter's to say (ManagerApi.adoption)."""

    def discard_standby(self, instance_id: str) -> dict[str, Any]:
        """The driver, destroying a backup server: destroys the standby domain if, and only if, it was never
        promoted. Answer: {"discarded": bool}."""


class AgentClient:
    """The callers' side of AgentApi, one host a call."""

    def __init__(self, transport: oslo_messaging.Transport, timeout_s: float = 5.0) -> None:
        self._client = common.Client(transport, common.AGENT_TOPIC, timeout_s)

    def prepare_domain(self, host: str, instance_id: InstanceId) -> dict[str, Any]:
        return self._client.call("prepare_domain", server=host, tries=_TRIES, instance_id=instance_id)

    def describe_domain(self, host: str, instance_id: InstanceId) -> dict[str, Any]:
        return self._client.call("describe_domain", server=host, tries=_TRIES, instance_id=instance_id)

    def start_backup(self, host: str, pair_id: PairId, generation: Generation, instance_id: InstanceId,
                     token: str) -> dict[str, Any]:
        return self._client.call("start_backup", server=host, timeout_s=30.0, pair_id=pair_id, generation=generation,
                                 instance_id=instance_id, token=token)

    def start_primary(self, host: str, pair_id: PairId, generation: Generation, instance_id: InstanceId,
                      address: str, port: int, token: str, policy: str) -> dict[str, Any]:
        return self._client.call("start_primary", server=host, timeout_s=30.0, pair_id=pair_id, generation=generation,
                                 instance_id=instance_id, address=address, port=port, token=token, policy=policy)

    def stop_engine(self, host: str, pair_id: PairId, generation: Generation, reason: str,
                    timeout_s: float | None = None) -> bool:
        return self._client.call("stop_engine", server=host, timeout_s=timeout_s, pair_id=pair_id,
                                 generation=generation, reason=reason)["stopped"]

    def fence(self, host: str, pair_id: PairId, generation: Generation, instance_id: InstanceId,
              timeout_s: float | None = None) -> None:
        self._client.call("fence", server=host, timeout_s=timeout_s, pair_id=pair_id, generation=generation,
                          instance_id=instance_id)

    def hand_over(self, host: str, instance_id: InstanceId) -> bool:
        return self._client.call("hand_over", server=host, tries=_TRIES, instance_id=instance_id)["handed_over"]

    def discard_standby(self, host: str, instance_id: InstanceId) -> bool:
        return self._client.call("discard_standby", server=host, instance_id=instance_id)["discarded"]
