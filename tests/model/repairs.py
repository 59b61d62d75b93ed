"""Repairs of the rules that the search has asked for, and that are not in the tree yet.

The proof is run with them; test_model.py shows for each that the search fails without it. Once a repair is in the tree
its function and its test go.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from tests.model import stage
from tests.model.world import Bounds, Host


@contextmanager
def the_forsaken_are_adopted() -> Iterator[None]:
    """An agent that starts finds a guest whose engine died unseen, and asks in the engine's place."""
    def forsaken(host: Host) -> int:
        return host.guest.of if host.guest and not host.guest.speaks and host.primary is None else 0

    with patch.object(stage, "forsaken", forsaken):
        yield


@contextmanager
def the_frozen_are_thawed() -> Iterator[None]:
    """A guest that a dead engine had frozen runs again when an agent lets it go, or a new engine begins."""
    with patch.object(stage, "thaws", lambda: True):
        yield


#: Repair -> bounds in which the search fails without it.
REPAIRS = {
    the_forsaken_are_adopted: Bounds(epochs=1, pairings=0, faults=2, losses=0, ends=0),
    the_frozen_are_thawed: Bounds(epochs=1, pairings=0, faults=2, losses=0, ends=0),
}


@contextmanager
def repaired(but: Any = None) -> Iterator[None]:
    """All repairs, but one."""
    with ExitStack() as stack:
        for repair in REPAIRS:
            if repair is not but:
                stack.enter_context(repair())
        yield
