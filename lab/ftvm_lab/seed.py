"""Fills a new cloud: accounts and catalogue, then images, flavors and network."""

from pathlib import Path

from openstack.connection import Connection
from openstack.identity.v3._proxy import Proxy

from ftvm_lab.endpoints import GLANCE, NEUTRON, NOVA, PLACEMENT
from ftvm_lab.layout import PASSWORD, PROVIDER, REGION, Layout

IMAGE = "ftvm-demo"
DATABASE_IMAGE = "ftvm-debian"
NETWORK = "provider"
#: name -> MB of memory
FLAVORS = {"ftvm.demo": 192, "ftvm.nano": 128}
DATABASE_FLAVOR = "ftvm.database"
KERNEL_OPTIONS = "console=ttyS0 quiet tsc=unstable nokaslr mitigations=off"


def seed_identity(connection: Connection) -> str:
    """The service accounts, the catalogue and the plain user; the service project's id."""
    identity = connection.identity
    assert isinstance(identity, Proxy)
    project = identity.create_project(name="service", domain_id="default")
    roles = {role.name: role for role in identity.roles()}
    for name in ("placement", "glance", "nova", "neutron", "ftvm"):
        user = identity.create_user(name=name, password=PASSWORD, domain_id="default")
        for role in ("admin", "service"):
            identity.assign_project_role_to_user(project, user, roles[role])
    for api in (PLACEMENT, GLANCE, NOVA, NEUTRON):
        service = identity.create_service(name=api.name, type=api.type)
        for interface in ("public", "internal", "admin"):
            identity.create_endpoint(service_id=service.id, interface=interface, url=api.url, region_id=REGION)
    demo = identity.create_project(name="demo", domain_id="default")
    user = identity.create_user(name="demo", password=PASSWORD, domain_id="default")
    identity.assign_project_role_to_user(demo, user, roles["member"])
    return str(project.id)


def seed_resources(connection: Connection, layout: Layout) -> None:
    _create_image(connection, IMAGE, layout.guest, KERNEL_OPTIONS)
    _create_image(connection, DATABASE_IMAGE, layout.debian, f"{KERNEL_OPTIONS} root=/dev/vda")
    for name, ram in FLAVORS.items():
        connection.compute.create_flavor(name=name, ram=ram, vcpus=1, disk=1)
    # Three disks to write to: the root in GB, an ephemeral one in GB, and swap in MB.
    connection.compute.create_flavor(name=DATABASE_FLAVOR, ram=512, vcpus=1, disk=2, ephemeral=1, swap=64)
    _create_network(connection)


def _create_image(connection: Connection, name: str, parts_of: Path, kernel_options: str) -> None:
    parts = {
        part: connection.image.create_image(
            name=f"{name}-{part}",
            filename=str(parts_of / part),
            container_format=image_format,
            disk_format=image_format,
            visibility="public",
            wait=True,
        )
        for part, image_format in (("kernel", "aki"), ("ramdisk", "ari"))
    }
    connection.image.create_image(
        name=name,
        filename=str(parts_of / "disk.qcow2"),
        container_format="bare",
        disk_format="qcow2",
        visibility="public",
        wait=True,
        kernel_id=parts["kernel"].id,
        ramdisk_id=parts["ramdisk"].id,
        hw_machine_type="pc",
        hw_rng_model="virtio",
        # Without it, Nova makes ephemeral disks VFAT.
        os_type="linux",
        # The config drive: not on the IDE bus, where a server cannot be protected.
        hw_cdrom_bus="scsi",
        hw_scsi_model="virtio-scsi",
        os_command_line=kernel_options,
    )


def _create_network(connection: Connection) -> None:
    network = connection.network.create_network(
        name=NETWORK,
        shared=True,
        provider_network_type="flat",
        provider_physical_network=NETWORK,
        port_security_enabled=False,
    )
    connection.network.create_subnet(
        name=NETWORK,
        network_id=network.id,
        ip_version=4,
        cidr=f"{PROVIDER.prefix}.0/24",
        gateway_ip=None,
        enable_dhcp=False,
        allocation_pools=[{"start": f"{PROVIDER.prefix}.100", "end": f"{PROVIDER.prefix}.200"}],
    )
