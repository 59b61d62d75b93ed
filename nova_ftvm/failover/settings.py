"""The failover manager's settings and its clock, as values."""

import dataclasses
import time
from typing import Protocol

from oslo_config import cfg

from nova_ftvm.conf import manager as manager_conf


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """[manager], by value. See conf/manager.py for the meaning of each."""

    #: Who this manager is among others: [DEFAULT]host.
    name: str = "manager"
    reconcile_interval_s: float = 5.0
    agent_down_s: float = 10.0
    step_timeout_s: float = 120.0
    retry_s: float = 2.0
    retry_limit_s: float = 60.0
    settle_s: float = 3.0
    poll_s: float = 0.15
    fence_answer_s: float = 0.5
    repair: bool = True
    sync_limit_per_host: int = 2
    refused_retry_s: float = 3600.0

    @classmethod
    def of(cls, conf: cfg.ConfigOpts) -> "Settings":
        group = conf[manager_conf.GROUP]
        return cls(name=conf.host, reconcile_interval_s=group.reconcile_interval_s, agent_down_s=group.agent_down_s,
                   step_timeout_s=group.step_timeout_s, retry_s=group.retry_s, retry_limit_s=group.retry_limit_s,
                   settle_s=group.settle_s, poll_s=group.poll_s, fence_answer_s=group.fence_answer_s,
                   repair=group.repair, sync_limit_per_host=group.sync_limit_per_host,
                   refused_retry_s=group.refused_retry_s)

    def back_off(self, attempts: int) -> float:
        """Seconds until the next try after `attempts` failures in a row: doubling, with a ceiling."""
        return min(self.retry_s * 2 ** min(max(attempts - 1, 0), 10), self.retry_limit_s)


class Clock(Protocol):
    """Wall-clock seconds, and waiting."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's own."""

    def now(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
