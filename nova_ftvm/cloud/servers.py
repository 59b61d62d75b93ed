"""What a Nova server is to us: an ordinary one, one that asks for protection, or a backup's reservation.

Reads Nova's objects, never saves them. Used by the driver and the filter.
"""

# Nova registers its objects when its services start, which may be after this import.
from __future__ import annotations

from collections.abc import Sequence

from nova import objects
from nova.network import model as network_model

from nova_ftvm.cloud.settings import CONF
from nova_ftvm.core import request
from nova_ftvm.types import InstanceId

#: Metadata of a backup server: the uuid of the server that it backs up. Anyone can write it; see is_backup().
PRIMARY_KEY = "ftvm:primary"
#: Metadata of a backup server; the manager sets it to PROMOTED before it evacuates the primary to the backup's host.
ROLE_KEY = "ftvm:role"
PROMOTED = "promoted"


def in_service_project(project_id: str | None) -> bool:
    """Is it the project whose servers may be backups? Without [ftvm]service_project_id none is."""
    return bool(CONF.ftvm.service_project_id) and project_id == CONF.ftvm.service_project_id


def primary_of(instance: objects.Instance) -> InstanceId | None:
    """The server that this one backs up; None for all that are not backups.

    The project decides: in any other project the metadata is somebody's own word and means nothing.
    """
    if not in_service_project(instance.project_id):
        return None
    primary = instance.metadata.get(PRIMARY_KEY)
    return InstanceId(primary) if primary else None


def is_backup(instance: objects.Instance) -> bool:
    return primary_of(instance) is not None


def asks(instance: objects.Instance) -> bool:
    """Does its owner want it protected? A wish that cannot be read counts as none; the manager says so."""
    return not is_backup(instance) and request.read(instance.metadata, instance.flavor.extra_specs).wanted


def speaks_legacy_virtio(instance: objects.Instance) -> bool:
    """Should its virtio devices speak virtio 0.9 only, for the sake of short pauses?"""
    asked = request.read(instance.metadata, instance.flavor.extra_specs).virtio
    return (asked or CONF.ftvm.virtio) == request.Virtio.LEGACY


def known_to_manager(instance: objects.Instance) -> bool:
    """Has the manager ever taken it up? Then a backup of it may exist, and may run."""
    return request.STATE_KEY in instance.metadata


def obstacle(instance: objects.Instance, network_info: Sequence[network_model.VIF], volumes: int) -> str:
    """Why the server cannot be protected, in one sentence; '' when it can."""
    prefix = "image_"
    properties = {key.removeprefix(prefix): value for key, value in instance.system_metadata.items()
                  if key.startswith(prefix) and value is not None}
    return request.obstacle(request.Shape(
        extra_specs=instance.flavor.extra_specs, image_properties=properties, has_image=bool(instance.image_ref),
        volumes=volumes, vnic_types=[vif["vnic_type"] for vif in network_info]))
