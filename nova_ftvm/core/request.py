"""Is fault tolerance asked for, and can this server have it? One place, for driver and manager alike.

PURE. A refusal never stops a server from booting: it runs as an ordinary one, and `ft:reason` says why.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence

from nova_ftvm.core.policy import Policy

METADATA_KEY = "ft"
STATE_KEY = "ft:state"
REASON_KEY = "ft:reason"
PROGRESS_KEY = "ft:progress"
POLICY_KEY = "ft:policy"
VIRTIO_KEY = "ft:virtio"
EXTRA_SPEC_KEY = "ftvm:enabled"

ATTACHED_VOLUMES = ("volumes are not replicated: the server is protected again once its volumes are detached "
                    "(openstack server remove volume)")

#: The words that Nova's own check of a boolean extra spec lets through.
_WORDS = {**dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
          **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False)}

#: Extra specs and image properties that put guest state where no checkpoint reaches it, or bind it to one host.
_REFUSED_SPECS = {
    "hw:mem_page_size": "huge pages",
    "pci_passthrough:alias": "a passed-through device",
    "resources:VGPU": "a virtual GPU",
    "hw:vif_multiqueue_enabled": "multiqueue interfaces",
    "hw:mem_encryption": "encrypted memory",
    "hw:ephemeral_encryption": "encrypted disks",
    "hw:boot_from_volume": "a boot volume",
    "hw:cpu_policy": "pinned processors",
    "hw:numa_nodes": "a NUMA topology",
    "hw:tpm_version": "a virtual TPM",
    "hw:pmem": "persistent memory",
}
_REFUSED_IMAGE_PROPERTIES = {
    "hw_mem_page_size": "huge pages",
    "hw_vif_multiqueue_enabled": "multiqueue interfaces",
    "hw_mem_encryption": "encrypted memory",
    "hw_ephemeral_encryption": "encrypted disks",
    "hw_cpu_policy": "pinned processors",
    "hw_numa_nodes": "a NUMA topology",
    "hw_tpm_version": "a virtual TPM",
}
#: End of a key -> values that ask for nothing special.
_HARMLESS = {"mem_page_size": {"any", "small", "4", "4KB", "4096"}, "cpu_policy": {"shared"}}


class Virtio(enum.StrEnum):
    """What a guest's virtio devices speak, where they can speak both."""

    #: Version 0.9: a checkpoint's pause is shorter by some 0.4 ms a device.
    LEGACY = "legacy"
    #: Version 1, for guests that know nothing older.
    MODERN = "modern"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What the server's owner asked for."""

    wanted: bool
    #: Why the wish cannot be read, in one sentence; empty when it can.
    refusal: str = ""
    #: When checkpoints are to be taken (core.policy.Policy); empty: as the primary's host is configured.
    policy: str = ""
    #: What its virtio devices are to speak (Virtio); empty: as its host is configured.
    virtio: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What protection has to know about a server; gathered from Nova by the caller."""

    extra_specs: Mapping[str, str]
    image_properties: Mapping[str, str]
    has_image: bool
    volumes: int
    #: binding:vnic_type of each port.
    vnic_types: Sequence[str]


def read(metadata: Mapping[str, str], extra_specs: Mapping[str, str]) -> Request:
    """Reads the wish from the server's metadata and the flavor's extra specs."""
    choices: dict[str, str] = {}
    for key, known in ((POLICY_KEY, list(Policy)), (VIRTIO_KEY, list(Virtio))):
        choice = choices[key] = metadata.get(key, "").strip().lower()
        if choice and choice not in known:
            return Request(False, f"the property {key} is {choice[:40]!r}: set it to one of {', '.join(known)}")
    answers: dict[str, bool] = {}
    for origin, value in (("the property ft", metadata.get(METADATA_KEY)),
                          (f"the flavor's {EXTRA_SPEC_KEY}", extra_specs.get(EXTRA_SPEC_KEY))):
        if value is None:
            continue
        word = _WORDS.get(value.strip().lower())
        if word is None:
            return Request(False, f"{origin} is {value[:40]!r}: set it to 'true' or 'false'")
        answers[origin] = word
    if len(set(answers.values())) > 1:
        said = " and ".join(f"{origin} says {str(word).lower()}" for origin, word in answers.items())
        return Request(False, f"{said}: make both agree, or unset the property ft")
    return Request(any(answers.values()), policy=choices[POLICY_KEY], virtio=choices[VIRTIO_KEY])


def obstacle(shape: Shape) -> str:
    """Returns why such a server cannot be protected, in one sentence; '' when it can."""
    if not shape.has_image:
        return "the server boots from a volume, and volumes are not replicated: create it from an image"
    if shape.volumes:
        return ATTACHED_VOLUMES
    for found, table, origin in ((shape.extra_specs, _REFUSED_SPECS, "flavor"),
                                 (shape.image_properties, _REFUSED_IMAGE_PROPERTIES, "image")):
        for key, what in table.items():
            value = found.get(key)
            if value is None or value.strip().lower() in ("false", "no", "0"):
                continue
            if any(key.endswith(end) and value in words for end, words in _HARMLESS.items()):
                continue
            return f"{what} ({key} of the {origin}) cannot be checkpointed: use a {origin} without it"
    if shape.image_properties.get("hw_firmware_type", "bios").lower() == "uefi":
        return "UEFI variables are not replicated yet: use an image with hw_firmware_type=bios"
    for vnic_type in shape.vnic_types:
        if vnic_type != "normal":
            return f"a port of type {vnic_type} bypasses QEMU: use ports of type normal"
    return ""
