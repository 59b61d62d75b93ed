"""How the driver says no to Nova: the server stays as it was, and its user can read why.

Nova's compute manager takes what a driver raises in different ways. Where it rolls back by itself, Refused is enough:
the sentence becomes the server's fault and the detail of the instance action. The others are told apart here.
Called by operations.py, standby.py and driver.py.
"""

# Nova registers its objects when its services start, which may be after this import.
from __future__ import annotations

import threading
import time
from typing import Any

from keystoneauth1 import exceptions as ks_exceptions
from nova import context as nova_context
from nova import exception, objects
from nova.compute import task_states, vm_states
from nova.scheduler.client import report
from oslo_log import log

LOG = log.getLogger(__name__)

#: Nova ends the task within a moment of the refusal; how often, and how many times that is looked for.
_LOOK_S = 0.25
_LOOKS = 80


class Refused(exception.InstanceFaultRollback):
    """An operation that did not begin: Nova leaves the server's state as it was, and shows the sentence as fault."""

    def __init__(self, sentence: str) -> None:
        super().__init__(inner_exception=exception.NovaException(sentence))
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence

    def format_message(self) -> str:
        """What Nova shows to the user."""
        return self.sentence


class RefusedPlainly(Exception):
    """Of Nova's own exceptions, this operation shows nothing but that it failed. Of others Nova asks for the words."""

    def format_message(self) -> str:
        return str(self)


def as_nova_shows_it(refused: Refused, name: str, instance: objects.Instance,
                     placement: report.SchedulerReportClient) -> Exception:
    """What the driver's method `name` has to raise, so that the refusal changes nothing and its sentence is seen."""
    if name == "detach_interface":
        return RefusedPlainly(refused.sentence)
    if name == "attach_interface":
        return exception.InterfaceAttachFailed(refused.sentence)
    if instance.task_state in (task_states.RESCUING, task_states.REBUILDING):
        _keep_as_it_is(instance, placement)
    return refused


def _keep_as_it_is(instance: objects.Instance, placement: report.SchedulerReportClient) -> None:
    """Nova takes whatever stops a rescue for a broken guest, and frees the reservation of a server that it could not
    rebuild: both after the driver has spoken its last word."""
    try:
        held = placement.get_allocs_for_consumer(nova_context.get_admin_context(), instance.uuid)
    except (ks_exceptions.ClientException, exception.NovaException) as error:
        LOG.warning("Its reservation cannot be read and may be lost: %s", error, instance=instance)
        held = {}
    threading.Thread(target=_put_right, args=(instance.uuid, instance.vm_state, held, placement), daemon=True,
                     name=f"refused-{instance.uuid}").start()


def _put_right(instance_id: str, vm_state: str, held: dict[str, Any], placement: report.SchedulerReportClient) -> None:
    context = nova_context.get_admin_context()
    for _ in range(_LOOKS):
        time.sleep(_LOOK_S)
        try:
            record = objects.Instance.get_by_uuid(context, instance_id)
            if record.task_state is None:
                _lift_error(record, vm_state)
                _reserve_again(context, record, held, placement)
                return
        except (ks_exceptions.ClientException, exception.NovaException) as error:
            LOG.warning("Server %s may not be what it was before an operation was refused: %s", instance_id, error)
            return
    LOG.warning("Server %s: the refused operation does not end", instance_id)


def _lift_error(record: objects.Instance, vm_state: str) -> None:
    if record.vm_state == vm_states.ERROR:
        record.vm_state = vm_state
        record.save(expected_vm_state=[vm_states.ERROR], expected_task_state=[None])
        LOG.info("Back from ERROR to %s: the guest was not touched", vm_state, instance=record)


def _reserve_again(context: nova_context.RequestContext, record: objects.Instance, held: dict[str, Any],
                   placement: report.SchedulerReportClient) -> None:
    now = placement.get_allocs_for_consumer(context, record.uuid)
    if not held.get("allocations") or now["allocations"]:
        return
    placement.put_allocations(context, record.uuid, {
        "allocations": {provider: {"resources": found["resources"]} for provider, found in held["allocations"].items()},
        "project_id": held["project_id"], "user_id": held["user_id"],
        "consumer_generation": now.get("consumer_generation")})
    LOG.info("Reserved again what a refused rebuild had freed", instance=record)
