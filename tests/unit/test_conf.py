"""conf/: the lists for oslo-config-generator, and what every option must have."""

import json
import socket
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from oslo_config import cfg

from nova_ftvm.cmd.engine import Order
from nova_ftvm.conf import agent, engine, manager, nova, opts, service

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "setup.cfg"
OURS = {"agent": agent.OPTS, "engine": engine.OPTS, "manager": manager.OPTS, "nova": nova.OPTS, "service": service.OPTS}
ALL = [(group, option) for group, options in OURS.items() for option in options]


@pytest.mark.parametrize(("group", "option"), ALL, ids=lambda value: getattr(value, "name", value))
def test_every_option_says_what_it_is_for_in_a_sentence(group: str, option: cfg.Opt) -> None:
    assert option.help and option.help[0].isupper() and option.help.rstrip().endswith(".")


@pytest.mark.parametrize(("group", "option"), ALL, ids=lambda value: getattr(value, "name", value))
def test_every_number_has_a_limit_and_its_default_keeps_it(group: str, option: cfg.Opt) -> None:
    if isinstance(option, cfg.FloatOpt | cfg.IntOpt):
        assert option.type.min is not None
        if option.default is not None:
            option.type(str(option.default))


def test_a_time_has_its_unit_in_its_name() -> None:
    for _, option in ALL:
        if isinstance(option, cfg.FloatOpt) and "econd" in option.help:
            assert option.name.endswith(("_s", "_ms")), option.name


def test_the_lists_hold_every_option_once() -> None:
    listed = dict(opts.list_opts())
    assert {option.name for option in listed["engine"]} == {option.name for option in engine.OPTS}
    assert set(listed) >= {"DEFAULT", "agent", "engine", "manager"}
    assert dict(opts.list_nova_opts()) == {nova.GROUP: nova.OPTS}
    for options in (*listed.values(), nova.OPTS):
        names = [option.name for option in options]
        assert len(names) == len(set(names))


def test_all_groups_register_in_one_configuration_and_twice_in_none() -> None:
    conf = cfg.ConfigOpts()
    for module in (service, agent, engine, manager):
        module.register(conf)
        module.register(conf)
    conf([], project="nova-ftvm", default_config_files=[])
    assert conf.engine.epoch_ms > 0 and conf.agent.runtime_dir


def test_the_engines_order_carries_every_engine_option() -> None:
    assert {option.name for option in engine.OPTS} <= set(Order.__dataclass_fields__)


def test_an_agent_older_than_its_engines_gives_no_setting_that_it_does_not_know() -> None:
    newest = {"max_pause_percent", "forward_kvmclock"}
    settings = {option.name: option.default for option in engine.OPTS}
    order = {"role": "primary", "pair_id": "p", "generation": 1, "instance_id": "i", "token": "t", "folder": "/f",
             "address": "127.0.0.1", "port": 1, "qemu_owner": [1, 1],
             **{name: default for name, default in settings.items() if name not in newest}}
    parsed = Order.parse(json.dumps(order))
    assert parsed.max_pause_percent == settings["max_pause_percent"] == 50.0
    assert parsed.forward_kvmclock is settings["forward_kvmclock"] is True


def test_setup_names_both_lists_for_the_generator() -> None:
    parser = ConfigParser()
    parser.read(SETUP)
    named = dict(line.split(" = ") for line in parser["entry_points"]["oslo.config.opts"].strip().splitlines())
    assert named == {"nova_ftvm": "nova_ftvm.conf.opts:list_opts",
                     "nova_ftvm.nova": "nova_ftvm.conf.opts:list_nova_opts"}


def test_the_sample_is_the_same_on_every_host() -> None:
    """A default that is this host's own must not get into a sample that is shipped."""
    for _, option in ALL:
        own = isinstance(option.default, str) and option.default == socket.gethostname()
        assert not own or option.sample_default, option.name


@pytest.mark.parametrize(("generator", "sample"), [
    ("config-generator.conf", "nova-ftvm.conf.sample"), ("nova-config-generator.conf", "nova.conf.ftvm.sample")])
def test_the_sample_is_what_the_options_say_today(generator: str, sample: str, tmp_path: Path) -> None:
    folder, made = ROOT / "etc" / "nova-ftvm", tmp_path / sample
    subprocess.run([sys.executable, "-m", "oslo_config.generator", "--config-file", folder / generator,
                    "--output-file", made], cwd=ROOT, check=True, capture_output=True, timeout=60)
    assert made.read_text() == (folder / sample).read_text()
