"""cloud/extra_specs.py, as Nova's API loads it."""

import configparser
import pathlib

import pytest
from nova import exception
from nova.api.validation.extra_specs import validators
from stevedore import extension

from nova_ftvm.cloud import extra_specs
from nova_ftvm.core import request


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """Nova's own loader, over Nova's namespaces and ours, whether or not this tree is installed."""
    monkeypatch.setattr(validators, "VALIDATORS", {})
    monkeypatch.setattr(validators, "NAMESPACES", set())
    manager = extension.ExtensionManager.make_test_instance([extension.Extension("ftvm", None, extra_specs, None)])
    monkeypatch.setattr(validators.extension, "ExtensionManager", lambda *args, **kwargs: manager)
    validators.load_validators()


def test_the_entry_point_names_this_module():
    setup = configparser.ConfigParser()
    setup.read(pathlib.Path(__file__).parents[2] / "setup.cfg")
    assert setup["entry_points"]["nova.api.extra_spec_validators"].strip() == "ftvm = nova_ftvm.cloud.extra_specs"


@pytest.mark.parametrize("word", ["true", "True", "false", "yes", "no", "1", "0", "on", "off", "t", "F"])
def test_a_word_that_the_driver_understands_is_valid(word):
    validators.validate(request.EXTRA_SPEC_KEY, word)
    assert request.read({}, {request.EXTRA_SPEC_KEY: word}).refusal == ""


@pytest.mark.parametrize("word", ["maybe", "", "2"])
def test_a_word_that_it_does_not_is_not(word):
    with pytest.raises(exception.ValidationError):
        validators.validate(request.EXTRA_SPEC_KEY, word)


def test_another_key_of_the_namespace_is_a_mistake():
    with pytest.raises(exception.ValidationError):
        validators.validate("ftvm:enable", "true")


def test_other_namespaces_are_left_alone():
    validators.validate("someone:elses", "anything")
