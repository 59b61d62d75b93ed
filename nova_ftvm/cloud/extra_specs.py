"""Validators of the flavor's ftvm:* keys, for the API's check of extra specs.

Loaded by the entry point nova.api.extra_spec_validators. To register one key of a namespace makes every other key of it
invalid, so a new key must be added here.
"""

from nova.api.validation.extra_specs import base

from nova_ftvm.core import request


def register() -> list[base.ExtraSpecValidator]:
    return [
        base.ExtraSpecValidator(
            name=request.EXTRA_SPEC_KEY,
            description="Whether servers of this flavor are fault tolerant: whether they survive the death of their "
                        "compute host with memory, disks and connections. The server's property ft must not say "
                        "otherwise.",
            value={"type": bool},
        ),
    ]
