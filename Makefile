# setup       prepares the machine: Debian packages, build/venv, the guests
# lab         brings the lab up; ftvm-lab in build/venv/bin talks to it
# demo        kills a protected server's host under traffic, RUNS times
# survival    kills the hosts of a protected database in turn under load, KILLS times
# torture     does everything to a protected register that can go wrong, for MINUTES, and checks what its clients saw
# bench       measures one guest in the lab, unprotected and under each policy; a table and pictures
# bench-quick the essential part of it, in under five minutes
# bench-pause measures what a checkpoint's pause is made of, without an OpenStack
# bench-idle  measures what protection costs while nothing happens, for one guest and for eight on one host
# bench-kvm   measures what tracking costs a guest under KVM, and its clocks; needs /dev/kvm, no vmx or svm
# bench-disk  measures what the replication of disks costs, without an OpenStack; prints a table
# bench-manager  measures what 2,000 pairs cost the failover manager, and a failover of 200; simulated agents
# test        lint, then all tests; takes the lab down before and after
# trials      the longest tests, each operation and each fault on a whole OpenStack; not among 'test'
# clean       takes the lab down and removes what was built

SHELL := /bin/bash
BIN := $(CURDIR)/build/venv/bin
PYTEST := $(BIN)/python -m pytest
RUNS ?= 1
KILLS ?= 50
MINUTES ?= 30
TEST_LAB_DIR ?= /var/tmp/ftvm-lab-test

export PATH := $(BIN):$(PATH)

.PHONY: setup lab demo survival torture bench bench-quick bench-pause bench-idle bench-kvm bench-disk bench-manager test trials lint clean

setup:
	@lab/setup.sh

lab: setup
	@ftvm-lab status >/dev/null 2>&1 || { ftvm-lab down; ftvm-lab up; }

demo: setup
	@python -m ftvm_lab.demo --runs $(RUNS) --output build/demo.json

survival: setup
	@python -m ftvm_lab.survival --kills $(KILLS) --output build/survival.json

torture: setup
	@python -m ftvm_lab.torture --minutes $(MINUTES) --output build/torture.json

bench: bench-pause
	@python -m ftvm_lab.bench --pause build/bench-pause.json --output build/bench.json

bench-quick: setup
	@python -m ftvm_lab.bench --quick --output build/bench.json

bench-manager: setup
	@python -m tests.scale.bench_manager --output build/bench-manager.json

bench-pause: setup
	@python -m tests.host.bench_pause --output build/bench-pause.json

bench-idle: setup
	@python -m tests.host.bench_idle --output build/bench-idle.json

bench-kvm: setup
	@python -m tests.kvm.bench --output build/bench-kvm.json

bench-disk: setup
	@python -m tests.host.bench_disk --output build/bench-disk.json

lint: setup
	ruff check .
	bashate --max-line-length 110 lab/setup.sh devstack/plugin.sh devstack/settings
	mypy
	mypy --config-file lab/pyproject.toml lab/ftvm_lab tests/system
	sphinx-build -q -W -b html doc/source build/doc

# One recipe, so that the lab is down at its end, however it ends.
test: export FTVM_LAB_DIR := $(TEST_LAB_DIR)
test: lint
	@set -e; ftvm-lab down --wipe; trap 'ftvm-lab down --wipe' EXIT; \
	timeout 600 $(PYTEST) tests/unit; \
	timeout 900 $(PYTEST) tests/model; \
	timeout 1200 $(PYTEST) tests/host; \
	timeout 600 $(PYTEST) tests/kvm; \
	timeout 1200 $(PYTEST) tests/functional; \
	timeout 1800 $(PYTEST) tests/system -m "not trial"

trials: export FTVM_LAB_DIR := $(TEST_LAB_DIR)
trials: setup
	@set -e; ftvm-lab down --wipe; trap 'ftvm-lab down --wipe' EXIT; $(PYTEST) tests/system -m trial

clean:
	@if [ -x $(BIN)/ftvm-lab ]; then ftvm-lab down --wipe; fi
	rm -rf build
