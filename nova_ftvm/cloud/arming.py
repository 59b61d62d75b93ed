"""Gives a server that asks for protection the domain that can be protected.

Never keeps a server from booting: whatever fails here, it boots as an ordinary one and the manager tells its owner why.
"""

# Nova registers its objects when its services start, which may be after this import.
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nova import objects
from nova.network import model as network_model
from nova.virt.libvirt import vif as libvirt_vif
from oslo_log import log

from nova_ftvm.cloud import servers
from nova_ftvm.cloud.partners import PartnerAway, Partners
from nova_ftvm.core import domain
from nova_ftvm.core.kind import Abilities
from nova_ftvm.exception import Unsupported
from nova_ftvm.types import InstanceId

LOG = log.getLogger(__name__)


class InterfaceDriver(libvirt_vif.LibvirtGenericVIFDriver):
    """An armed guest keeps its interfaces on QEMU's backend when Nova writes them anew: on the way to another host, and
    when one is attached. Were they moved to vhost, the guest could not be protected again before its next start."""

    def __init__(self, host: Any, is_armed: Callable[[str], bool]) -> None:
        super().__init__(host)
        self._is_armed = is_armed

    def get_config(self, instance: objects.Instance, *args: Any, **kwargs: Any) -> Any:
        config = super().get_config(instance, *args, **kwargs)
        if config.model == network_model.VIF_MODEL_VIRTIO and self._is_armed(instance.uuid):
            config.driver_name = "qemu"
        return config


def expect(instance: objects.Instance, host: str, partners: Partners) -> None:
    """An armed guest is on its live migration to this host: its monitor's folder must be here before it is."""
    if servers.asks(instance):
        try:
            partners.prepare_domain(host, InstanceId(instance.uuid))
        except PartnerAway as error:
            LOG.warning("The migration of an armed guest will fail, unharmed: %s", error, instance=instance)


def armed(domain_xml: str, instance: objects.Instance, network_info: Sequence[network_model.VIF], volumes: int,
          host: str, partners: Partners) -> str:
    """Returns the XML armed, or as it came."""
    if not servers.asks(instance):
        return domain_xml
    why = servers.obstacle(instance, network_info, volumes)
    if not why:
        try:
            prepared = partners.prepare_domain(host, InstanceId(instance.uuid))
            if prepared["capable"]:
                return domain.arm(domain_xml, prepared["monitor"],
                                  legacy_virtio=servers.speaks_legacy_virtio(instance),
                                  abilities=Abilities.read(prepared.get("abilities")))
            why = prepared["reason"]
        except (PartnerAway, Unsupported) as error:
            why = str(error)
    LOG.warning("The server boots without fault tolerance: %s", why, instance=instance)
    return domain_xml
