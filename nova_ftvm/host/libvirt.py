"""libvirt's view of a guest, by the server's UUID. Translates libvirt's errors once. The only importer of libvirt."""

import libvirt

from nova_ftvm.core.domain import with_processor
from nova_ftvm.exception import GuestGone

# Errors come back as exceptions; libvirt's own printing of them to stderr says nothing more.
libvirt.registerErrorHandler(lambda _context, _error: None, None)


class Host:
    """A connection to the host's libvirt."""

    def __init__(self, uri: str) -> None:
        try:
            self._connection = libvirt.open(uri)
        except libvirt.libvirtError as error:
            raise GuestGone(f"libvirt at {uri} cannot be reached: {error}") from error

    def live_xml(self, instance_id: str) -> str:
        """The running domain's XML in the form that migration uses: all addresses, nothing of this host's run-time, and
        the processor that the guest has."""
        domain = self._find(instance_id)
        if not domain.isActive():
            raise GuestGone(f"server {instance_id} is not running here")
        secrets = libvirt.VIR_DOMAIN_XML_SECURE
        return with_processor(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE | secrets), domain.XMLDesc(secrets))

    def disk_size(self, instance_id: str, target: str) -> int:
        """Bytes that the guest sees of its disk."""
        try:
            capacity: int = self._find(instance_id).blockInfo(target)[0]
        except libvirt.libvirtError as error:
            raise GuestGone(f"libvirt does not tell how large disk {target} of server {instance_id} is: {error}"
                            ) from error
        return capacity

    def destroy(self, instance_id: str) -> bool:
        """Ends the guest at once. False when there is none."""
        try:
            self._find(instance_id).destroy()
        except GuestGone:
            return False
        except libvirt.libvirtError as error:
            if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                return False
            raise GuestGone(f"server {instance_id} could not be destroyed: {error}") from error
        return True

    def close(self) -> None:
        self._connection.close()

    def _find(self, instance_id: str) -> libvirt.virDomain:
        try:
            return self._connection.lookupByUUIDString(instance_id)
        except libvirt.libvirtError as error:
            raise GuestGone(f"libvirt knows no server {instance_id}: {error}") from error
