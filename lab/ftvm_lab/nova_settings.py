"""Configuration of Nova, on the control plane and on the compute hosts.

Written when Keystone is seeded: [ftvm] carries the service project's id.
"""

from dataclasses import dataclass

from nova.conf import scheduler

from ftvm_lab import ini
from ftvm_lab.endpoints import TRANSPORT_URL, credentials, database_url, token_check
from ftvm_lab.layout import COMPUTES, CONTROL, MGMT, REGION, Layout, Node

FILTER = "nova_ftvm.cloud.filters.FaultToleranceFilter"
PLAIN_DRIVER = "libvirt.LibvirtDriver"
DRIVER = "ftvm.FTVMLibvirtDriver"
#: Seconds. Nova then sees a dead host after 15 s; with its defaults it takes a minute.
LIVENESS = {"report_interval": 3, "service_down_time": 15}


@dataclass(frozen=True, slots=True)
class Product:
    """How Nova uses nova_ftvm; with `plain`, not at all."""

    plain: bool
    service_project_id: str

    @property
    def driver(self) -> str:
        return PLAIN_DRIVER if self.plain else DRIVER


def write(layout: Layout, product: Product) -> None:
    ini.write(layout.conf / "nova" / "nova.conf", _control_sections(layout, product))
    for node in COMPUTES:
        ini.write(layout.outside(node) / "nova.conf", _compute_sections(layout, node, product))
        _write_libvirt(layout, node)


def _common(layout: Layout, product: Product) -> ini.Sections:
    privsep = {"helper_command": layout.venv / "bin/privsep-helper"}
    sections: ini.Sections = {
        "api": {"auth_strategy": "keystone"},
        "placement": credentials("placement"),
        "neutron": credentials("neutron"),
        "glance": credentials("glance"),
        "service_user": {"send_service_user_token": "true", **credentials("nova")},
        "cinder": {"os_region_name": REGION},
        "oslo_messaging_notifications": {"driver": "messagingv2"},
        "notifications": {
            "notification_format": "versioned",
            "notify_on_state_change": "vm_and_task_state",
            "versioned_notifications_topics": "versioned_notifications,ftvm_notifications",
        },
        "privsep_osbrick": privsep,
        "nova_sys_admin": privsep,
        "vif_plug_ovs_privileged": privsep,
    }
    if product.plain:
        return sections
    return {**sections, "ftvm": {"service_project_id": product.service_project_id}}


def _control_sections(layout: Layout, product: Product) -> ini.Sections:
    return {
        "DEFAULT": {
            **LIVENESS,
            "my_ip": CONTROL.address(MGMT),
            "state_path": layout.state / "nova",
            "transport_url": TRANSPORT_URL,
        },
        "api_database": {"connection": database_url(layout, "nova_api")},
        "database": {"connection": database_url(layout, "nova")},
        "conductor": {"workers": 1},
        "quota": {"instances": -1, "cores": -1, "ram": -1},
        "scheduler": {"workers": 1},
        "filter_scheduler": {} if product.plain else _filters(),
        "wsgi": {"api_paste_config": layout.venv / "etc/nova/api-paste.ini"},
        "keystone_authtoken": token_check("nova"),
        "oslo_concurrency": {"lock_path": layout.sockets / "nova"},
        **_common(layout, product),
    }


def _filters() -> ini.Section:
    """Nova's default filters, and ours behind them."""
    defaults = next(option.default for option in scheduler.filter_scheduler_opts if option.name == "enabled_filters")
    return {
        "available_filters": ["nova.scheduler.filters.all_filters", FILTER],
        "enabled_filters": ",".join([*defaults, FILTER.rpartition(".")[2]]),
    }


def _compute_sections(layout: Layout, node: Node, product: Product) -> ini.Sections:
    """As the host sees it: paths are the inside ones."""
    off = {"enabled": "false"}
    return {
        "DEFAULT": {
            **LIVENESS,
            "my_ip": node.address(MGMT),
            "state_path": layout.host / "nova",
            "instances_path": layout.host / "nova/instances",
            "transport_url": TRANSPORT_URL,
            "compute_driver": product.driver,
            "force_config_drive": "true",
            "mkisofs_cmd": "genisoimage",
            "vif_plugging_timeout": 15,
            "vif_plugging_is_fatal": "false",
            "reserved_host_memory_mb": 512,
            "ram_allocation_ratio": "1.0",
            "cpu_allocation_ratio": "16.0",
            "disk_allocation_ratio": "4.0",
            "resume_guests_state_on_host_boot": "false",
            # At this pace nova-compute finds what failovers left on a host that lived; by default it is a minute's.
            "update_resources_interval": 10,
            "shutdown_timeout": 20,
        },
        "libvirt": {
            "virt_type": "qemu",
            "live_migration_scheme": "tcp",
            "live_migration_inbound_addr": node.address(MGMT),
            "cpu_mode": "custom",
            "cpu_models": "qemu64",
            "hw_machine_type": "x86_64=pc",
            "num_pcie_ports": 0,
            "images_type": "qcow2",
            "wait_soft_reboot_seconds": 20,
            "remote_filesystem_transport": "rsync",
        },
        "workarounds": {"disable_deep_image_inspection": "true"},
        "vnc": off,
        "spice": off,
        "serial_console": off,
        "oslo_concurrency": {"lock_path": layout.host / "locks"},
        **_common(layout, product),
    }


def _write_libvirt(layout: Layout, node: Node) -> None:
    directory = layout.outside(node) / "etc-libvirt"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "libvirtd.conf").write_text(
        f'host_uuid = "00000000-0000-4000-8000-{node.number:012d}"\n'
        'auth_unix_rw = "none"\n'
        'auth_unix_ro = "none"\n'
        'unix_sock_group = "root"\n'
        f'log_outputs = "3:file:{layout.host}/log/libvirtd.log"\n'
        "listen_tls = 0\n"
        "listen_tcp = 1\n"
        'auth_tcp = "none"\n'
    )
    (directory / "qemu.conf").write_text(
        'user = "root"\n'
        'group = "root"\n'
        'security_driver = "none"\n'
        "cgroup_controllers = [ ]\n"
        "namespaces = [ ]\n"
        'stdio_handler = "file"\n'
        "remember_owner = 0\n"
    )
