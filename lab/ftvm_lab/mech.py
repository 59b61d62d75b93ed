"""ML2 mechanism driver of the lab: binds every port as a plain tap, without an agent.

nova-compute makes the tap; ftvm_lab.taps puts it into the host's bridge. Neutron
loads this class through the entry point `ftvm_lab_tap`.
"""

from typing import Any

from neutron_lib import constants
from neutron_lib.api.definitions import portbindings
from neutron_lib.plugins.ml2 import api
from sqlalchemy import orm

BOUND_TYPES = (constants.TYPE_FLAT, constants.TYPE_LOCAL)


class TapMechanismDriver(api.MechanismDriver):
    def initialize(self) -> None:
        """Makes the relations between Neutron's tables that SQLAlchemy makes at the first query.

        Neutron names one of them before it has made a query; a Neutron whose first
        request lists ports would fail for ever.
        """
        orm.configure_mappers()

    @property
    def connectivity(self) -> str:
        return str(portbindings.CONNECTIVITY_L2)

    def bind_port(self, context: Any) -> None:
        if context.current[portbindings.VNIC_TYPE] != portbindings.VNIC_NORMAL:
            return
        for segment in context.segments_to_bind:
            if segment[api.NETWORK_TYPE] in BOUND_TYPES:
                context.set_binding(
                    segment[api.ID],
                    portbindings.VIF_TYPE_TAP,
                    {portbindings.CAP_PORT_FILTER: False},
                    status=constants.PORT_STATUS_ACTIVE,
                )
                return

    def filter_hosts_with_segment_access(
        self, context: Any, segments: Any, candidate_hosts: Any, agent_getter: Any
    ) -> set[str]:
        return set(candidate_hosts)
