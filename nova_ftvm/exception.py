"""One error type for each decision that a caller can take. Each carries its facts."""


class FtvmError(Exception):
    """Base of all. `str()` is one sentence that says what to do."""


class Unsupported(FtvmError):
    """The host, QEMU or the server lacks something that protection needs. Not a fault: say so and go on."""


class InTheWay(FtvmError):
    """Something stands where a standby is to be, or a mirror. It may be gone at the next try."""


class ProtocolError(FtvmError):
    """The peer sent what no correct peer sends. The connection ends; nothing of it was applied."""


class StaleGeneration(ProtocolError):
    """A message from a generation that is over."""

    def __init__(self, got: int, current: int) -> None:
        super().__init__(f"generation {got} is over, the pair is at {current}")
        self.got = got
        self.current = current


class IllegalMove(FtvmError):
    """An event that the pair's state does not allow. The state is unchanged."""

    def __init__(self, state: str, event: str) -> None:
        super().__init__(f"a pair that is {state} cannot {event}")
        self.state = state
        self.event = event


class GuestGone(FtvmError):
    """QEMU ended, or its monitor closed."""


class QemuError(FtvmError):
    """QEMU refused a command."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command = command
        self.description = description


class MirrorLost(FtvmError):
    """QEMU tells a disk's writes no more: no later epoch can be whole."""


class OutputLost(FtvmError):
    """The guest's output is not under our control any more, or what was held of it is gone."""


class ReplicaFailed(FtvmError):
    """The standby's disks could not take a write."""


class LostRace(FtvmError):
    """A compare-and-set found another generation or state: somebody else decided first."""


class PairNotFound(FtvmError):
    """No such pair."""
