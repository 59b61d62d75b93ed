"""Whole sections of a QEMU device state, found by their name. PURE.

A section: the byte 4, its number (4 bytes), the length of its name, the name, instance and version, its fields, and a
footer with its number again. Big-endian. Source: QEMU's migration/savevm.c. Callers: kvmclock.py and virtualclock.py.
"""

import re
from collections.abc import Iterator

#: From a section's beginning to its name's length.
_BEFORE_NAME = 5


def named(name: bytes, pattern: "re.Pattern[bytes]", state: bytes | bytearray) -> Iterator["re.Match[bytes]"]:
    """The sections of that name that the pattern, of a whole section, takes for undamaged."""
    mark = bytes([len(name)]) + name + b"\0"
    at = state.find(mark)
    while at >= 0:
        if match := pattern.match(state, max(0, at - _BEFORE_NAME)):
            yield match
        at = state.find(mark, at + 1)
