"""The client's half of the guest's session protocol: pure.

A request is `<seq> <nonce>`. Its reply is `<seq> <count> <chain>`: `count` is the
number of requests that the session has seen, `chain` a running checksum of their
nonces. A request that the guest lost, saw twice or in another order shows in the
reply to it or in the next one.
"""

from enum import Enum

_FACTOR = 31
_MODULUS = 2**31 - 1


class Verdict(Enum):
    """What a reply line says about the session."""

    RIGHT = "right"
    #: Answers the outstanding request, with another state than it must have.
    WRONG_STATE = "wrong state"
    #: Answers some other request: a repetition, or not the order of the requests.
    WRONG_REQUEST = "wrong request"


class Session:
    """One connection's numbering, and the state that the guest must have."""

    def __init__(self) -> None:
        self._count = 0
        self._chain = 0

    def ask(self, nonce: int) -> bytes:
        """The next request's line; 0 <= nonce < 2**31."""
        self._count += 1
        self._chain = (self._chain * _FACTOR + nonce) % _MODULUS
        return b"%d %d\n" % (self._count, nonce)

    def judge(self, line: bytes) -> Verdict:
        """Compares a reply with what the outstanding request must be answered."""
        words = line.split()
        if words == [b"%d" % number for number in (self._count, self._count, self._chain)]:
            return Verdict.RIGHT
        if words[:1] == [b"%d" % self._count]:
            return Verdict.WRONG_STATE
        return Verdict.WRONG_REQUEST
