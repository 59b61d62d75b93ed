"""devstack/plugin.sh, phase by phase: sourced in bash, with stand-ins that record the calls of DevStack's functions."""

import pathlib
import shlex
import subprocess
import sys

import pytest

PLUGIN = pathlib.Path(__file__).parents[2] / "devstack"

#: DevStack's functions that the plugin may call; each call becomes a line of the record.
STAND_INS = """
say() { printf '%s\\n' "$*" >> "$RECORD"; }
for name in define_plugin enable_service echo_summary setup_develop iniset iniset_multiline iniset_rpc_backend \\
        recreate_database run_process stop_process get_or_add_user_project_role openstack sudo; do
    eval "$name() { say $name \\"\\$@\\"; }"
done
is_service_enabled() { [[ " $ENABLED " == *" $1 "* ]]; }
iniget() { echo "$FILTERS"; }
conductor_conf() { echo "$CONF_DIR/nova_cell$1.conf"; }
get_or_create_project() { say get_or_create_project "$@" ; echo project-id; }
get_or_create_user() { echo user-id; }
database_connection_url() { echo "mysql+pymysql://here/$1"; }
get_notification_url() { echo rabbit://here/; }
get_python_exec_prefix() { echo "$BIN_DIR"; }
"""


class Node:
    """A machine under DevStack, as far as the plugin sees it."""

    def __init__(self, folder, enabled):
        self.folder = folder
        self.enabled = enabled
        self.filters = "ComputeFilter,ImagePropertiesFilter"
        self.record = folder / "record"
        self.door = folder / "nova" / "nova" / "virt" / "ftvm"
        self.door.parent.mkdir(parents=True)
        (folder / "nova_cell1.conf").touch()
        for tool in ("nova-ftvm-manage", "glance-manage"):
            path = folder / tool
            path.write_text(f'#!/bin/sh\necho {tool} "$@" >> "$RECORD"\n')
            path.chmod(0o755)

    def run(self, *words):
        """Calls the plugin as DevStack does; returns the calls that it made."""
        self.record.write_text("")
        setting = {
            "RECORD": self.record, "ENABLED": " ".join(self.enabled), "FILTERS": self.filters, "CONF_DIR": self.folder,
            "BIN_DIR": self.folder, "GLANCE_BIN_DIR": self.folder, "GLANCE_API_CONF": "/etc/glance/glance-api.conf",
            "DEST": "/opt/stack", "FTVM_DIR": PLUGIN.parent, "NOVA_DIR": self.folder / "nova",
            "NOVA_CONF": "/etc/nova/nova.conf", "NOVA_NUM_CELLS": 1, "HOST_IP": "192.0.2.7", "STACK_USER": "stack",
            "SERVICE_DOMAIN_NAME": "Default", "SERVICE_PASSWORD": "secret", "REGION_NAME": "RegionOne",
            "KEYSTONE_SERVICE_URI": "http://192.0.2.7/identity", "ENABLE_DEBUG_LOG_LEVEL": "True"}
        exports = "\n".join(f"export {name}={shlex.quote(str(value))}" for name, value in setting.items())
        script = "\n".join(["set -eu", exports, STAND_INS, f"source {PLUGIN}/settings",
                            f"source {PLUGIN}/plugin.sh {' '.join(words)}"])
        subprocess.run(["bash", "-c", script], check=True, timeout=30)
        return self.record.read_text().splitlines()


@pytest.fixture
def all_in_one(tmp_path):
    return Node(tmp_path, ["n-cpu", "n-sch", "g-api", "ftvm-agent", "ftvm-manager"])


@pytest.fixture
def compute_only(tmp_path):
    return Node(tmp_path, ["n-cpu", "ftvm-agent"])


def test_bashate_finds_nothing():
    bashate = pathlib.Path(sys.executable).parent / "bashate"
    checked = subprocess.run([bashate, PLUGIN / "plugin.sh", PLUGIN / "settings"],
                             capture_output=True, text=True, timeout=60, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_settings_define_the_plugin_and_its_services(all_in_one):
    calls = all_in_one.run("source", "")
    assert calls == ["define_plugin nova_ftvm", "enable_service ftvm-agent", "enable_service ftvm-manager"]


def test_install_puts_the_door_where_nova_looks(all_in_one):
    calls = all_in_one.run("stack", "install")
    assert f"setup_develop {PLUGIN.parent}" in calls
    assert all_in_one.door.resolve() == PLUGIN.parent / "nova" / "virt" / "ftvm"
    all_in_one.run("stack", "install")
    assert not (all_in_one.door / "ftvm").exists()


def test_nova_gets_driver_filter_project_and_notifications(all_in_one):
    calls = all_in_one.run("stack", "post-config")
    for conf in ("/etc/nova/nova.conf", str(all_in_one.folder / "nova_cell1.conf")):
        assert f"iniset {conf} ftvm service_project_id project-id" in calls
        assert f"iniset {conf} oslo_messaging_notifications driver messagingv2" in calls
        assert (f"iniset {conf} notifications versioned_notifications_topics "
                "versioned_notifications,ftvm_notifications") in calls
    assert "iniset /etc/nova/nova.conf DEFAULT compute_driver ftvm.FTVMLibvirtDriver" in calls
    assert ("iniset /etc/nova/nova.conf filter_scheduler enabled_filters "
            "ComputeFilter,ImagePropertiesFilter,FaultToleranceFilter") in calls
    assert ("iniset_multiline /etc/nova/nova.conf filter_scheduler available_filters "
            "nova.scheduler.filters.all_filters nova_ftvm.cloud.filters.FaultToleranceFilter") in calls


@pytest.mark.parametrize("filters", ["", "ComputeFilter,FaultToleranceFilter"])
def test_the_filter_is_enabled_once(all_in_one, filters):
    all_in_one.filters = filters
    enabling = [call for call in all_in_one.run("stack", "post-config") if "enabled_filters" in call]
    assert enabling == ([] if filters else
                        ["iniset /etc/nova/nova.conf filter_scheduler enabled_filters FaultToleranceFilter"])


def test_the_manager_gets_database_account_and_project(all_in_one):
    calls = all_in_one.run("stack", "post-config")
    conf = "/etc/nova-ftvm/nova-ftvm.conf"
    created = calls.index("recreate_database nova_ftvm")
    assert calls.index(f"nova-ftvm-manage --config-file {conf} db sync") > created
    assert calls.index(f"iniset {conf} database connection mysql+pymysql://here/nova_ftvm") < created
    assert "get_or_create_project nova-ftvm-backups Default" in calls
    assert "get_or_add_user_project_role admin user-id project-id" in calls
    assert f"iniset {conf} service_auth project_name nova-ftvm-backups" in calls
    assert f"iniset {conf} service_auth auth_type password" in calls


def test_every_option_that_is_set_exists(all_in_one):
    from nova_ftvm.conf import opts
    known = {(group, option.dest) for listing in (opts.list_opts(), opts.list_nova_opts())
             for group, options in listing for option in options}
    for call in all_in_one.run("stack", "post-config"):
        words = call.split()
        if words[0] == "iniset" and words[2] in ("agent", "engine", "manager", "service_auth", "ftvm"):
            assert (words[2], words[3]) in known, call


def test_a_compute_node_gets_no_manager(compute_only):
    calls = compute_only.run("stack", "post-config") + compute_only.run("stack", "extra")
    assert not [call for call in calls if "recreate_database" in call or "service_auth" in call or "metadefs" in call]
    assert [call.split()[1] for call in calls if call.startswith("run_process")] == ["ftvm-agent"]
    assert "iniset_rpc_backend nova-ftvm /etc/nova-ftvm/nova-ftvm.conf DEFAULT nova_cell1" in calls


def test_a_node_without_nova_compute_keeps_its_driver(tmp_path):
    calls = Node(tmp_path, ["n-sch", "ftvm-manager"]).run("stack", "post-config")
    assert not [call for call in calls if "compute_driver" in call]


def test_both_services_start_the_agent_as_root(all_in_one):
    calls = all_in_one.run("stack", "extra")
    folder = all_in_one.folder
    assert f"run_process ftvm-manager {folder}/nova-ftvm-manager --config-file /etc/nova-ftvm/nova-ftvm.conf" in calls
    assert (f"run_process ftvm-agent {folder}/nova-ftvm-agent --config-file /etc/nova-ftvm/nova-ftvm.conf  root"
            in calls)


def test_both_namespaces_are_loaded_into_glance(all_in_one):
    loaded = [call for call in all_in_one.run("stack", "extra") if call.startswith("glance-manage")]
    assert sorted(call.rsplit("/", 1)[1] for call in loaded) == ["ftvm-flavor.json", "ftvm-server.json"]
    assert all("--config-file /etc/glance/glance-api.conf db_load_metadefs" in call for call in loaded)


def test_unstack_stops_both(all_in_one):
    assert [call for call in all_in_one.run("unstack", "") if call.startswith("stop_process")] == [
        "stop_process ftvm-agent", "stop_process ftvm-manager"]


def test_clean_removes_what_install_made(all_in_one):
    all_in_one.run("stack", "install")
    calls = all_in_one.run("clean", "")
    assert not all_in_one.door.is_symlink()
    assert "sudo rm -rf /etc/nova-ftvm /run/nova-ftvm" in calls


def test_clean_leaves_a_folder_that_is_not_ours(all_in_one):
    all_in_one.door.mkdir()
    all_in_one.run("clean", "")
    assert all_in_one.door.is_dir()


def test_an_unknown_phase_does_nothing(all_in_one):
    assert all_in_one.run("stack", "test-config") == all_in_one.run("source", "")
