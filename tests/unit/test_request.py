"""core/request.py: the wish and what stands against it."""

import dataclasses

import pytest

from nova_ftvm.core import request

FIT = request.Shape(extra_specs={}, image_properties={}, has_image=True, volumes=0, vnic_types=("normal",))


@pytest.mark.parametrize(("metadata", "specs", "wanted"), [
    ({}, {}, False),
    ({"ft": "true"}, {}, True),
    ({"ft": " YES "}, {}, True),
    ({"ft": "false"}, {}, False),
    ({}, {"ftvm:enabled": "true"}, True),
    ({}, {"ftvm:enabled": "off"}, False),
    ({"ft": "1"}, {"ftvm:enabled": "True"}, True),
    ({"ftvm:enabled": "true"}, {"ft": "true"}, False),
])
def test_the_wish_is_read_from_server_and_flavor(metadata, specs, wanted):
    assert request.read(metadata, specs) == request.Request(wanted)


def test_a_server_may_say_what_its_devices_speak():
    assert request.read({"ft": "true", "ft:virtio": " Modern "}, {}) == request.Request(True, virtio="modern")
    refused = request.read({"ft": "true", "ft:virtio": "ancient"}, {})
    assert refused == request.Request(
        False, "the property ft:virtio is 'ancient': set it to one of legacy, modern")


@pytest.mark.parametrize(("metadata", "specs"), [
    ({"ft": "maybe"}, {}), ({"ft": ""}, {}), ({"ft": "true"}, {"ftvm:enabled": "perhaps"}),
    ({"ft": "false"}, {"ftvm:enabled": "true"}), ({"ft": "true"}, {"ftvm:enabled": "false"}),
])
def test_a_wish_that_cannot_be_read_is_none_and_says_what_to_do(metadata, specs):
    answer = request.read(metadata, specs)
    assert not answer.wanted
    assert ":" in answer.refusal


def test_a_long_word_does_not_fill_the_reason():
    assert len(request.read({"ft": "x" * 255}, {}).refusal) < 120


def test_an_ordinary_server_can_be_protected():
    assert request.obstacle(FIT) == ""


@pytest.mark.parametrize("change", [
    {"has_image": False}, {"volumes": 1}, {"vnic_types": ("normal", "direct")},
    {"extra_specs": {"hw:mem_page_size": "large"}}, {"extra_specs": {"pci_passthrough:alias": "gpu:1"}},
    {"extra_specs": {"hw:cpu_policy": "dedicated"}}, {"extra_specs": {"hw:numa_nodes": "2"}},
    {"image_properties": {"hw_mem_page_size": "2048"}}, {"image_properties": {"hw_firmware_type": "uefi"}},
    {"image_properties": {"hw_cpu_policy": "dedicated"}}, {"extra_specs": {"hw:tpm_version": "2.0"}},
    {"extra_specs": {"hw:ephemeral_encryption": "true"}}, {"image_properties": {"hw_ephemeral_encryption": "True"}},
])
def test_an_obstacle_is_one_sentence(change):
    assert request.obstacle(dataclasses.replace(FIT, **change))


def test_volumes_are_refused_with_what_to_do():
    assert "create it from an image" in request.obstacle(dataclasses.replace(FIT, has_image=False, volumes=1))
    assert "detached" in request.obstacle(dataclasses.replace(FIT, volumes=2))


@pytest.mark.parametrize("change", [
    {"extra_specs": {"hw:mem_page_size": "small"}}, {"extra_specs": {"hw:vif_multiqueue_enabled": "false"}},
    {"extra_specs": {"hw:cpu_policy": "shared"}}, {"image_properties": {"hw_firmware_type": "bios"}},
    {"vnic_types": ()},
])
def test_what_only_looks_like_one_is_none(change):
    assert request.obstacle(dataclasses.replace(FIT, **change)) == ""
