#!/usr/bin/env bash
#
# DevStack plugin of nova_ftvm: fault tolerance for Nova's servers.
#
# Called by stack.sh, unstack.sh and clean.sh with a mode and a phase; uses
# DevStack's own functions and variables. Nova stays as DevStack installed it,
# but for one symbolic link: Nova looks for drivers below nova.virt only.

_FTVM_XTRACE=$(set +o | grep xtrace)
set +o xtrace

function ftvm_driver_link {
    echo "$NOVA_DIR/nova/virt/ftvm"
}

function install_ftvm {
    setup_develop "$FTVM_DIR"
    ln -sfn "$FTVM_DIR/nova/virt/ftvm" "$(ftvm_driver_link)"
}

# Id of the project that owns the backup servers; made when it is not there.
function ftvm_project_id {
    get_or_create_project "$FTVM_PROJECT" "$SERVICE_DOMAIN_NAME"
}

# The files of Nova's services on this node. nova-compute's own is copied from
# the first when it starts.
function ftvm_nova_confs {
    local cell conf
    echo "$NOVA_CONF"
    for cell in $(seq 1 "$NOVA_NUM_CELLS"); do
        conf=$(conductor_conf "$cell")
        if [[ -f "$conf" ]]; then
            echo "$conf"
        fi
    done
}

function configure_ftvm_nova {
    local conf filters
    for conf in $(ftvm_nova_confs); do
        iniset "$conf" ftvm service_project_id "$1"
        iniset "$conf" notifications notification_format both
        iniset "$conf" notifications notify_on_state_change vm_and_task_state
        iniset "$conf" notifications versioned_notifications_topics \
            "versioned_notifications,$FTVM_NOTIFICATION_TOPIC"
        iniset "$conf" oslo_messaging_notifications driver messagingv2
    done

    filters=$(iniget "$NOVA_CONF" filter_scheduler enabled_filters)
    if [[ ",$filters," != *",FaultToleranceFilter,"* ]]; then
        iniset "$NOVA_CONF" filter_scheduler enabled_filters \
            "${filters:+$filters,}FaultToleranceFilter"
    fi
    iniset_multiline "$NOVA_CONF" filter_scheduler available_filters \
        nova.scheduler.filters.all_filters \
        nova_ftvm.cloud.filters.FaultToleranceFilter

    if is_service_enabled n-cpu; then
        iniset "$NOVA_CONF" DEFAULT compute_driver ftvm.FTVMLibvirtDriver
    fi
}

function configure_ftvm_services {
    sudo install -d -o "$STACK_USER" "$FTVM_CONF_DIR"
    iniset "$FTVM_CONF" DEFAULT debug "$ENABLE_DEBUG_LOG_LEVEL"
    # nova-compute must call the same broker, and knows only its cell's.
    iniset_rpc_backend nova-ftvm "$FTVM_CONF" DEFAULT \
        "nova_cell${NOVA_CPU_CELL:-1}"
    iniset "$FTVM_CONF" oslo_messaging_notifications transport_url \
        "$(get_notification_url)"

    iniset "$FTVM_CONF" agent data_address "$FTVM_DATA_ADDRESS"
    iniset "$FTVM_CONF" agent runtime_dir "$FTVM_RUNTIME_DIR"
    iniset "$FTVM_CONF" agent libvirt_uri qemu:///system
    iniset "$FTVM_CONF" manager notification_topic \
        "$FTVM_NOTIFICATION_TOPIC"
}

function configure_ftvm_manager {
    iniset "$FTVM_CONF" database connection \
        "$(database_connection_url "$FTVM_DATABASE")"
    iniset "$FTVM_CONF" service_auth auth_type password
    iniset "$FTVM_CONF" service_auth auth_url "$KEYSTONE_SERVICE_URI"
    iniset "$FTVM_CONF" service_auth username "$FTVM_USER"
    iniset "$FTVM_CONF" service_auth password "$SERVICE_PASSWORD"
    iniset "$FTVM_CONF" service_auth user_domain_name "$SERVICE_DOMAIN_NAME"
    iniset "$FTVM_CONF" service_auth project_name "$FTVM_PROJECT"
    iniset "$FTVM_CONF" service_auth project_domain_name \
        "$SERVICE_DOMAIN_NAME"
    iniset "$FTVM_CONF" service_auth region_name "$REGION_NAME"
}

# The manager's account: an admin of the backups' project, without an endpoint of its own.
function create_ftvm_accounts {
    local project=$1 user
    user=$(get_or_create_user "$FTVM_USER" "$SERVICE_PASSWORD" \
        "$SERVICE_DOMAIN_NAME")
    get_or_add_user_project_role admin "$user" "$project"
    # Placement counts the backups; a quota would only make protection fail.
    openstack --os-cloud devstack-admin quota set \
        --instances -1 --cores -1 --ram -1 "$project"
}

function init_ftvm_database {
    recreate_database "$FTVM_DATABASE"
    "$(ftvm_bin_dir)/nova-ftvm-manage" --config-file "$FTVM_CONF" db sync
}

function ftvm_bin_dir {
    get_python_exec_prefix
}

function load_ftvm_metadefs {
    local file
    for file in "$FTVM_DIR"/etc/metadefs/*.json; do
        "$GLANCE_BIN_DIR/glance-manage" --config-file "$GLANCE_API_CONF" \
            db_load_metadefs "$file"
    done
}

function configure_ftvm {
    local project
    project=$(ftvm_project_id)
    configure_ftvm_nova "$project"
    configure_ftvm_services
    if is_service_enabled ftvm-manager; then
        configure_ftvm_manager
        create_ftvm_accounts "$project"
        init_ftvm_database
    fi
}

function start_ftvm {
    if is_service_enabled ftvm-manager; then
        run_process ftvm-manager \
            "$(ftvm_bin_dir)/nova-ftvm-manager --config-file $FTVM_CONF"
    fi
    if is_service_enabled ftvm-agent; then
        # It reads QEMU's memory and injects a system call, which takes root.
        run_process ftvm-agent \
            "$(ftvm_bin_dir)/nova-ftvm-agent --config-file $FTVM_CONF" "" root
    fi
}

function stop_ftvm {
    stop_process ftvm-agent
    stop_process ftvm-manager
}

function cleanup_ftvm {
    # Only our own link; anything else of that name is not ours to remove.
    if [[ -L "$(ftvm_driver_link)" ]]; then
        rm -f "$(ftvm_driver_link)"
    fi
    sudo rm -rf "$FTVM_CONF_DIR" "$FTVM_RUNTIME_DIR"
}

case "${1:-} ${2:-}" in
    "stack install")
        echo_summary "Installing nova_ftvm"
        install_ftvm
        ;;
    "stack post-config")
        echo_summary "Configuring nova_ftvm"
        configure_ftvm
        ;;
    "stack extra")
        echo_summary "Starting nova_ftvm"
        if is_service_enabled g-api; then
            load_ftvm_metadefs
        fi
        start_ftvm
        ;;
    "unstack "*)
        stop_ftvm
        ;;
    "clean "*)
        cleanup_ftvm
        ;;
esac

$_FTVM_XTRACE
