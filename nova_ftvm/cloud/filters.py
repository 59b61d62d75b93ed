"""FaultToleranceFilter: keeps a server and its backup on different hosts.

Lives in nova-scheduler; asks Nova's database once a request, and calls nobody. Two rules:

    backup      never on its primary's host, and only on hosts whose agents the manager found healthy
    protected   on later moves never on its backup's host, unless that backup was promoted, or the move is a live
                migration to that very host: then the backup takes over (switchover.py)

The hints of a backup are believed only in the service project: a user can write any hint.
"""

# Nova registers its objects when its services start, which may be after this import.
from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from nova import context as nova_context
from nova import exception, objects
from nova.scheduler import filters
from nova.scheduler import utils as scheduler_utils
from nova.scheduler.host_manager import HostState
from oslo_log import log

from nova_ftvm.cloud import servers
from nova_ftvm.cloud.settings import CONF

LOG = log.getLogger(__name__)

PRIMARY_HINT = "ftvm:primary"
HOSTS_HINT = "ftvm:hosts"

Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """Where a request may go."""

    barred: frozenset[str] = frozenset()
    #: None: anywhere else.
    only: frozenset[str] | None = None
    reason: str = ""

    def allows(self, host: str) -> bool:
        return host not in self.barred and (self.only is None or host in self.only)


ANYWHERE = Rule()


class FaultToleranceFilter(filters.BaseHostFilter):
    """Works without configuration of its own, beyond [ftvm]service_project_id."""

    RUN_ON_REBUILD = False
    #: Several servers of one request are not each other's backups.
    run_filter_once_per_request = True

    def filter_all(self, hosts: Iterable[HostState], spec_obj: objects.RequestSpec) -> Iterator[HostState]:
        rule = ANYWHERE if scheduler_utils.request_is_rebuild(spec_obj) else rule_for(spec_obj)
        for host in hosts:
            if rule.allows(host.host):
                yield host
            else:
                LOG.debug("%s is not for %s: %s", host.host, spec_obj.instance_uuid, rule.reason)


def rule_for(spec: objects.RequestSpec) -> Rule:
    """The rule of one scheduling request."""
    if not CONF.ftvm.service_project_id:
        return ANYWHERE
    if servers.in_service_project(spec.project_id):
        hints = _hints(spec)
        return _backup_rule(hints) if PRIMARY_HINT in hints else ANYWHERE
    return _protected_rule(spec)


def _hints(spec: objects.RequestSpec) -> dict[str, list[str]]:
    found = spec.scheduler_hints if "scheduler_hints" in spec and spec.scheduler_hints else {}
    return {key: _flat(found[key]) for key in (PRIMARY_HINT, HOSTS_HINT) if found.get(key)}


def _flat(values: list[str]) -> list[str]:
    """A hint's values. A list may come as such, or as JSON in its only value, as the command line sends it."""
    if len(values) == 1 and values[0].startswith("["):
        try:
            return [str(value) for value in json.loads(values[0])]
        except ValueError:
            LOG.warning("A scheduler hint looks like JSON and is not: %.80s", values[0])
    return list(values)


def _backup_rule(hints: dict[str, list[str]]) -> Rule:
    primary = hints[PRIMARY_HINT][0]
    try:
        host = _in_its_cell(primary, lambda context: objects.Instance.get_by_uuid(context, primary).host)
    except exception.InstanceNotFound:
        return Rule(only=frozenset(), reason=f"there is no server {primary} to back up")
    if host is None:
        return Rule(only=frozenset(), reason=f"server {primary} is on no host yet")
    only = frozenset(hints[HOSTS_HINT]) if HOSTS_HINT in hints else None
    return Rule(barred=frozenset({host}), only=only,
                reason=f"it hosts server {primary} itself, or has no healthy agent")


def _protected_rule(spec: objects.RequestSpec) -> Rule:
    """A server being created has no cell yet, and so no backup."""
    server = spec.instance_uuid
    try:
        barred = _in_its_cell(
            server, lambda context: _backup_hosts(context, server) - _switchover_hosts(context, spec))
    except exception.InstanceNotFound:
        return ANYWHERE
    return Rule(barred=barred, reason="it hosts the server's backup") if barred else ANYWHERE


def _backup_hosts(context: nova_context.RequestContext, server: str) -> frozenset[str]:
    backups = objects.InstanceList.get_by_filters(
        context, {"project_id": CONF.ftvm.service_project_id, "deleted": False,
                  "metadata": {servers.PRIMARY_KEY: server}}, expected_attrs=["metadata"])
    return frozenset(backup.host for backup in backups
                     if backup.host and backup.metadata.get(servers.ROLE_KEY) != servers.PROMOTED)


def _switchover_hosts(context: nova_context.RequestContext, spec: objects.RequestSpec) -> frozenset[str]:
    """Where somebody asks to live-migrate the server to, by name. Nova notes a move before it asks for a host."""
    wanted = spec.requested_destination if "requested_destination" in spec else None
    if wanted is None or "host" not in wanted or not wanted.host:
        return frozenset()
    moves = objects.MigrationList.get_by_filters(
        context, {"instance_uuid": spec.instance_uuid, "migration_type": "live-migration", "status": "accepted"})
    return frozenset({wanted.host}) if moves else frozenset()


def _in_its_cell(server: str, question: Callable[[nova_context.RequestContext], Answer]) -> Answer:
    """Answers the question with a context of the server's cell; raises InstanceNotFound for a server without one."""
    context = nova_context.get_admin_context()
    try:
        mapping = objects.InstanceMapping.get_by_instance_uuid(context, server)
    except exception.InstanceMappingNotFound as error:
        raise exception.InstanceNotFound(instance_id=server) from error
    if mapping.cell_mapping is None:
        raise exception.InstanceNotFound(instance_id=server)
    with nova_context.target_cell(context, mapping.cell_mapping) as cell_context:
        return question(cell_context)
