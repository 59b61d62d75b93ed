#!/bin/bash
# Prepares this machine: Debian packages, build/venv, the guests. Safe to repeat;
# does only what is missing or whose inputs changed since the last time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly STAMPS=build/stamps PYTHON=build/venv/bin/python
readonly PACKAGES="rabbitmq-server mariadb-server mariadb-client busybox-static cpio kmod
    genisoimage iproute2 iputils-ping git gcc libc6-dev pkg-config python3-dev python3-venv
    mmdebstrap e2fsprogs postgresql-client rsync wrk redis-tools"
# Newer than bookworm's own: Nova's next release needs libvirt 10.0 and QEMU 8.2.
readonly BACKPORTS="libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients libvirt-dev
    qemu-system-x86 qemu-utils"
readonly SUITE=bookworm-backports
# A cache of our own: uWSGI links the Python that it was built with, and a wheel that another
# Python of the same version left in the user's cache does not run under this one.
export PIP_CACHE_DIR=$PWD/build/pip-cache

function say {
    echo "[setup] $*"
}

# stale NAME FILE...: true if the files changed since `fresh NAME` was called
function stale {
    local name=$1
    shift
    DIGEST=$(find "$@" -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
    [ "$DIGEST" != "$(cat "$STAMPS/$name" 2>/dev/null)" ]
}

function fresh {
    echo "$DIGEST" > "$STAMPS/$1"
}

function have_packages {
    local states libvirt
    # shellcheck disable=SC2086
    states=$(dpkg-query -W -f '${db:Status-Status}\n' $PACKAGES $BACKPORTS 2>/dev/null) || return 1
    [ "$(sort -u <<< "$states")" = installed ] || return 1
    libvirt=$(dpkg-query -W -f '${Version}' libvirt-daemon)
    dpkg --compare-versions "$libvirt" ge 10.0
}

# The machine's own Debian mirror, with the suite changed.
function add_backports {
    local mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI)' | head -n 1)
    cat > /etc/apt/sources.list.d/nova-ftvm-backports.sources <<EOF
Types: deb
URIs: $mirror
Suites: $SUITE
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
EOF
}

function install_packages {
    export DEBIAN_FRONTEND=noninteractive
    # On a new machine apt names no mirror before its first update.
    apt-get update -q
    if ! apt-get indextargets --format '$(SUITE)' | grep -qx "$SUITE"; then
        add_backports
        apt-get update -q
    fi
    # The packages' services belong to the lab's machines, not to this one.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        install -m 755 /dev/stdin /usr/sbin/policy-rc.d <<< $'#!/bin/sh\nexit 101'
    fi
    # shellcheck disable=SC2086
    apt-get install -y --no-install-recommends $PACKAGES
    # shellcheck disable=SC2086
    apt-get install -y --no-install-recommends -t "$SUITE" $BACKPORTS
}

# A build in the tree would leave its files there, and ship files that were removed since.
function install_tree {
    local copy
    copy=$(mktemp -d)
    tar -c --exclude=./build -C "$1" . | tar -x -C "$copy"
    "$PYTHON" -m pip install -q --no-deps --no-build-isolation --force-reinstall "$copy"
    rm -rf "$copy"
}

mkdir -p "$STAMPS"
if ! have_packages; then
    say "installing Debian packages"
    install_packages
fi
if [ ! -x "$PYTHON" ]; then
    say "making the virtual environment"
    /usr/bin/python3 -m venv build/venv
fi
if stale requirements constraints.txt requirements.txt test-requirements.txt lab/requirements.txt; then
    say "installing Python packages"
    "$PYTHON" -m pip install -q -c constraints.txt pip setuptools wheel
    "$PYTHON" -m pip install -q -c constraints.txt -r requirements.txt \
        -r test-requirements.txt -r lab/requirements.txt
    fresh requirements
fi
if stale lab lab/pyproject.toml lab/ftvm_lab; then
    say "installing the lab"
    install_tree lab
    fresh lab
fi
if stale guest lab/ftvm_lab/guest.py lab/ftvm_lab/guest_root; then
    say "building the guest"
    "$PYTHON" -m ftvm_lab.guest build/guest
    fresh guest
fi
if stale debian lab/ftvm_lab/debian.py lab/ftvm_lab/debian_root lab/ftvm_lab/guest.py; then
    say "building the database guest"
    "$PYTHON" -m ftvm_lab.debian build/debian
    fresh debian
fi
if stale product pyproject.toml setup.cfg setup.py nova_ftvm nova etc; then
    say "installing nova_ftvm"
    PBR_VERSION=${PBR_VERSION:-0.0.1} install_tree .
    fresh product
fi
say "ready"
