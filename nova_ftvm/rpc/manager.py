"""What the manager answers. Callers: agents, and the driver in nova-compute."""

from typing import Any, Protocol, TypedDict

import oslo_messaging

from nova_ftvm.rpc import common
from nova_ftvm.types import Generation, Grant, InstanceId, PairId

#: Of the two questions that a guest's clients wait for, and whose answer is the same when they are asked again: a
#: controller that lost its power must not cost them a whole deadline.
_TRIES = 3


class StandbyPlan(TypedDict):
    """All that a backup's host needs to make the standby domain."""

    pair_id: str
    instance_id: str
    generation: int
    primary_host: str
    #: The primary's live domain XML (VIR_DOMAIN_XML_MIGRATABLE).
    domain_xml: str
    #: Bytes of the primary's disks, as the guest sees them, by target (vda).
    disks: dict[str, int]
    #: Neutron's answer to the inactive binding on the backup's host, one a port:
    #: {"port_id", "vif_type", "vif_details", "vnic_type", "profile"}.
    bindings: list[dict[str, Any]]


class Adoption(TypedDict):
    """May this host take the running domain of the server for its own?"""

    adopt: bool
    pair_id: str | None
    generation: int


class ManagerApi(Protocol):
    """The manager's methods, as the RPC server exposes them (each also takes `context` first)."""

    def agent_report(self, host: str, report: dict[str, Any]) -> dict[str, Any]:
        """A compute host's sign of life, every [agent]report_interval_s.

        report: {"capable": bool, "reason": str, "data_address": str, "incarnation": which start of the agent this is,
        "abilities": what the host's KVM can (core.kind.Abilities as dict; an older agent leaves it out),
        "engines": [{"pair_id", "instance_id", "role", "generation", "state", "figures": core.losttime.Figures as dict,
        left out where there are none}]}. Answer: {"stale": [pair ids whose engine must be fenced]}.
        """

    def request_promotion(self, pair_id: str, generation: int, host: str, evidence: str) -> dict[str, Any]:
        """The backup asks for the pair. Answer: a Grant as dict. The backup may resume only when granted.
        evidence: one sentence, e.g. 'no heartbeat for 320 ms'."""

    def request_degrade(self, pair_id: str, generation: int, host: str, reason: str) -> dict[str, Any]:
        """The primary asks to go on alone. Answer: a Grant as dict. It may release its output only when granted."""

    def report_protection(self, pair_id: str, generation: int, host: str, state: str, detail: str) -> dict[str, Any]:
        """The primary's engine tells: state is 'protected', 'failed' or 'refused' (detail: why; 'refused': another try
        on this host will fail likewise). How far the first copy is comes
        with agent_report, in the engine's state: 'syncing 40 %'.
        Answer: a Grant. Not granted, with a newer generation: the voice is another host's, fence. Not granted, with
        the generation that was asked with: the pair was disarmed, the engine stops and the guest goes on."""

    def report_promoted(self, pair_id: str, generation: int, host: str, timeline: dict[str, float],
                        failure: str) -> dict[str, Any]:
        """The backup's engine tells that the guest runs here (failure == ''), or that it could not be resumed.
        timeline: wall-clock seconds: {"detected_at", "granted_at", "running_at"}.
        generation: the one that it asked with, or the one that it was granted."""

    def standby_plan(self, backup_id: str, host: str) -> "StandbyPlan | None":
        """The driver, spawning a server of the service project: is it a backup, and of what? None: it is not."""

    def standby_ready(self, pair_id: str, generation: int, host: str, failure: str,
                      lasting: bool = False) -> dict[str, Any]:
        """The driver: the standby domain is there, paused (failure == ''); or why it could not be made.
        lasting: another try on this host will fail likewise."""

    def disarm(self, instance_id: str, reason: str) -> dict[str, Any]:
        """A planned end (stop, delete, reboot, detach...). After the answer {"disarmed": True} no backup can be
        promoted, and the primary's engine was told to stop. {"disarmed": False, "reason": why}: a failover is under
        way."""

    def switchover(self, instance_id: str, host: str) -> dict[str, Any]:
        """The driver on the backup's host, where the server is to be live-migrated: makes way for Nova, which binds the
        ports to this host by itself. Answer: {"ready": bool, "reason": why not}. Nothing moves by this alone."""

    def adoption(self, instance_id: str, host: str) -> Adoption:
        """The driver, rebuilding an evacuated server: was it promoted on this host?"""


class ManagerClient:
    """The callers' side of ManagerApi."""

    def __init__(self, transport: oslo_messaging.Transport, timeout_s: float = 5.0) -> None:
        self._client = common.Client(transport, common.MANAGER_TOPIC, timeout_s)

    def agent_report(self, host: str, report: dict[str, Any]) -> dict[str, Any]:
        return self._client.call("agent_report", host=host, report=report)

    def request_promotion(self, pair_id: PairId, generation: Generation, host: str, evidence: str) -> Grant:
        return self._grant("request_promotion", tries=_TRIES, pair_id=pair_id, generation=generation, host=host,
                           evidence=evidence)

    def request_degrade(self, pair_id: PairId, generation: Generation, host: str, reason: str) -> Grant:
        return self._grant("request_degrade", tries=_TRIES, pair_id=pair_id, generation=generation, host=host,
                           reason=reason)

    def report_protection(self, pair_id: PairId, generation: Generation, host: str, state: str, detail: str) -> Grant:
        return self._grant("report_protection", pair_id=pair_id, generation=generation, host=host,
                           state=state, detail=detail)

    def report_promoted(self, pair_id: PairId, generation: Generation, host: str, timeline: dict[str, float],
                        failure: str = "") -> Grant:
        return self._grant("report_promoted", pair_id=pair_id, generation=generation, host=host,
                           timeline=timeline, failure=failure)

    def standby_plan(self, backup_id: str, host: str) -> StandbyPlan | None:
        return self._client.call("standby_plan", backup_id=backup_id, host=host)

    def standby_ready(self, pair_id: PairId, generation: Generation, host: str, failure: str = "",
                      lasting: bool = False) -> Grant:
        return self._grant("standby_ready", pair_id=pair_id, generation=generation, host=host, failure=failure,
                           lasting=lasting)

    def disarm(self, instance_id: InstanceId, reason: str) -> bool:
        return self._client.call("disarm", instance_id=instance_id, reason=reason)["disarmed"]

    def switchover(self, instance_id: InstanceId, host: str) -> dict[str, Any]:
        return self._client.call("switchover", instance_id=instance_id, host=host)

    def adoption(self, instance_id: InstanceId, host: str) -> Adoption:
        return self._client.call("adoption", instance_id=instance_id, host=host)

    def _grant(self, method: str, tries: int = 1, **arguments: Any) -> Grant:
        return Grant(**self._client.call(method, tries=tries, **arguments))
