"""Configuration of the control plane, except Nova's: written before it starts."""

from ftvm_lab import ini
from ftvm_lab.endpoints import (
    APIS,
    AUTH_URL,
    CONTROL_ADDRESS,
    RABBIT_PORT,
    TRANSPORT_URL,
    Api,
    credentials,
    database_url,
    token_check,
)
from ftvm_lab.layout import PASSWORD, REGION, Layout

#: Two where a request may cause another one to the same service.
PROCESSES = {"keystone": 2, "placement": 1, "glance": 1, "nova": 2, "neutron": 2}


def write(layout: Layout) -> None:
    _write_keystone(layout)
    _write_placement(layout)
    _write_glance(layout)
    _write_neutron(layout)
    _write_rabbit(layout)
    _write_clouds(layout)
    for api in APIS:
        _write_uwsgi(layout, api)


def _write_keystone(layout: Layout) -> None:
    directory = layout.conf / "keystone"
    keys = layout.state / "keystone"
    ini.write(
        directory / "keystone.conf",
        {
            "DEFAULT": {"log_file": layout.log / "keystone.log"},
            "database": {"connection": database_url(layout, "keystone")},
            "token": {"provider": "fernet"},
            "fernet_tokens": {"key_repository": keys / "fernet"},
            "credential": {"key_repository": keys / "credential"},
            "cache": {"enabled": "true", "backend": "dogpile.cache.memory"},
        },
    )


def _write_placement(layout: Layout) -> None:
    ini.write(
        layout.conf / "placement" / "placement.conf",
        {
            "DEFAULT": {"log_file": layout.log / "placement.log"},
            "api": {"auth_strategy": "keystone"},
            "placement_database": {"connection": database_url(layout, "placement")},
            "keystone_authtoken": token_check("placement"),
        },
    )


def _write_glance(layout: Layout) -> None:
    state = layout.state / "glance"
    ini.write(
        layout.conf / "glance" / "glance-api.conf",
        {
            "DEFAULT": {
                "log_file": layout.log / "glance.log",
                "enabled_backends": "file:file",
                "enabled_import_methods": "[glance-direct]",
            },
            "glance_store": {"default_backend": "file"},
            "file": {"filesystem_store_datadir": state / "images"},
            "os_glance_tasks_store": {"filesystem_store_datadir": state / "tasks"},
            "os_glance_staging_store": {"filesystem_store_datadir": state / "staging"},
            "database": {"connection": database_url(layout, "glance")},
            "paste_deploy": {
                "flavor": "keystone",
                "config_file": layout.venv / "etc/glance/glance-api-paste.ini",
            },
            "oslo_concurrency": {"lock_path": layout.sockets / "glance"},
            "keystone_authtoken": token_check("glance"),
        },
    )


def _write_neutron(layout: Layout) -> None:
    directory = layout.conf / "neutron"
    ini.write(
        directory / "neutron.conf",
        {
            "DEFAULT": {
                "log_file": layout.log / "neutron.log",
                "state_path": layout.state / "neutron",
                "core_plugin": "ml2",
                "service_plugins": "",
                "auth_strategy": "keystone",
                "transport_url": TRANSPORT_URL,
                "notify_nova_on_port_status_changes": "true",
                "notify_nova_on_port_data_changes": "true",
                "api_paste_config": layout.venv / "etc/neutron/api-paste.ini",
                "dhcp_agent_notification": "false",
                "rpc_workers": 1,
            },
            "database": {"connection": database_url(layout, "neutron")},
            "oslo_concurrency": {"lock_path": layout.sockets / "neutron"},
            "nova": credentials("nova"),
            "placement": credentials("placement"),
            "keystone_authtoken": token_check("neutron"),
        },
    )
    ini.write(
        directory / "ml2.ini",
        {
            "ml2": {
                "type_drivers": "flat,local",
                "tenant_network_types": "local",
                "mechanism_drivers": "ftvm_lab_tap",
                "extension_drivers": "port_security",
            },
            "ml2_type_flat": {"flat_networks": "*"},
            "securitygroup": {"enable_security_group": "false"},
        },
    )


def _write_rabbit(layout: Layout) -> None:
    directory = layout.conf / "rabbit"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "enabled_plugins").write_text("[].\n")
    (directory / "rabbitmq.conf").write_text(
        f"listeners.tcp.1 = {CONTROL_ADDRESS}:{RABBIT_PORT}\nloopback_users = none\nlog.file.level = warning\n"
    )
    (directory / "env.conf").write_text(
        "NODENAME=rabbit@localhost\n"
        f"MNESIA_BASE={layout.state / 'rabbit' / 'mnesia'}\n"
        f"LOG_BASE={layout.log}\n"
        f"CONFIG_FILE={directory / 'rabbitmq'}\n"
        f"ENABLED_PLUGINS_FILE={directory / 'enabled_plugins'}\n"
        f"PID_FILE={layout.sockets / 'rabbit.pid'}\n"
        'SERVER_ADDITIONAL_ERL_ARGS="+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none"\n'
    )


def _write_clouds(layout: Layout) -> None:
    """clouds.yaml with the administrator and the plain user."""
    entries = "".join(
        f"  {name}:\n"
        f"    region_name: {REGION}\n"
        f"    identity_api_version: 3\n"
        f"    auth:\n"
        f"      auth_url: {AUTH_URL}\n"
        f"      username: {name}\n"
        f"      password: {PASSWORD}\n"
        f"      project_name: {name}\n"
        f"      user_domain_id: default\n"
        f"      project_domain_id: default\n"
        for name in ("admin", "demo")
    )
    layout.clouds.write_text("clouds:\n" + entries)


def _write_uwsgi(layout: Layout, api: Api) -> None:
    ini.write(
        layout.conf / "uwsgi" / f"{api.name}.ini",
        {
            "uwsgi": {
                "http-socket": f"{CONTROL_ADDRESS}:{api.port}",
                "module": f"{api.module}:application",
                "virtualenv": layout.venv,
                "master": "true",
                "processes": PROCESSES[api.name],
                "threads": 1,
                "enable-threads": "true",
                "lazy-apps": "true",
                "thunder-lock": "true",
                "need-app": "true",
                "die-on-term": "true",
                "buffer-size": 65535,
                "http-chunked-input": "true",
                # Nova uploads a snapshot in chunks of just the default limit, their frame not counted.
                "chunked-input-limit": 16 << 20,
                "add-header": "Connection: close",
                "start-time": "%t",
            }
        },
    )
