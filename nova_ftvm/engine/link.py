"""The synchronisation connection: a TCP socket, a queue of frames to send, a decoder for what comes.

Never blocks the epoch loop: what the socket does not take stays queued. Nothing is retried; a connection that
fails ends (`PeerLost`), and the loop decides what that means.
"""

import dataclasses
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from nova_ftvm.core import wire
from nova_ftvm.core.outbox import Outbox
from nova_ftvm.exception import FtvmError, ProtocolError
from nova_ftvm.types import Buffer, Epoch, Generation

_CHUNK = 1 << 20
GREETING_TIMEOUT_S = 5.0


class PeerLost(FtvmError):
    """The connection ended."""


class Link:
    """One connection of one generation. Buffers handed to `send` must not change until `idle`."""

    def __init__(self, connection: socket.socket, generation: Generation, limit: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self._socket = connection
        self._generation = generation
        self._decoder = wire.Decoder(generation, limit)
        self._queue = Outbox()
        self._early: list[wire.Frame] = []

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def idle(self) -> bool:
        """Everything is with the kernel."""
        return not self._queue

    @property
    def queued(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return self._queue.size

    def widen(self, limit: int) -> None:
        """The peer has proved itself: frames up to `limit` bytes may come."""
        self._decoder.limit = limit

    def queue(self, buffers: list[Buffer]) -> None:
        """Queues one frame; it goes with the next one."""
        for buffer in buffers:
            self._queue.add(buffer)

    def send(self, buffers: list[Buffer]) -> None:
        """Queues one frame and sends what can be sent now."""
        self.queue(buffers)
        self.flush()

    def send_bare(self, kind: wire.Kind, epoch: Epoch = Epoch(0)) -> None:
        """A frame without payload."""
        self.send(wire.encode(kind, self._generation, epoch))

    def flush(self) -> None:
        while self._queue:
            try:
                self._queue.sent(self._socket.sendmsg(self._queue.batch()))
            except BlockingIOError:
                return
            except OSError as error:
                raise PeerLost(f"the connection broke: {error.strerror}") from error

    def receive(self) -> list[wire.Frame]:
        """The frames that are whole now. Raises PeerLost when the connection ended, ProtocolError for a bad frame."""
        try:
            received = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError as error:
            raise PeerLost(f"the connection broke: {error.strerror}") from error
        if not received:
            self._decoder.finish()
            raise PeerLost("the peer closed the connection")
        frames, self._early = [*self._early, *self._decoder.feed(received)], []
        return frames

    def await_frame(self, timeout_s: float = GREETING_TIMEOUT_S) -> wire.Frame:
        """Waits for one frame: the greeting, before the loop runs. What came with it is kept for `receive`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if frames := self.receive():
                first, *self._early = frames
                return first
            time.sleep(0.001)
        raise PeerLost(f"no greeting within {timeout_s:g} s")

    def close(self) -> None:
        self._socket.close()


def dial(address: str, port: int, generation: Generation, hello: wire.Hello, token: str,
         limit: int) -> tuple[Link, frozenset[int]]:
    """The primary's side of the greeting. `hello.proof` is filled in here. Raises PeerLost or ProtocolError.

    Returns the connection, and the numbers of the disks whose replica lies on the same base.
    """
    try:
        connection = socket.create_connection((address, port), GREETING_TIMEOUT_S)
    except OSError as error:
        raise PeerLost(f"the backup's agent at {address}:{port} cannot be reached: {error}") from error
    link = Link(connection, generation, limit)
    try:
        challenge = _expect(link, wire.Kind.CHALLENGE)
        proof = wire.prove(token, bytes(challenge.payload))
        link.send(wire.encode_hello(generation, dataclasses.replace(hello, proof=proof)))
        shallow = wire.decode_welcome(_not_refused(link.await_frame()))
    except FtvmError:
        link.close()
        raise
    return link, shallow


def answer(connection: socket.socket, generation: Generation, token: str, expected: wire.Hello, limit: int) -> Link:
    """The backup's side of the greeting. Raises ProtocolError for a peer that may not speak, or does not fit."""
    link = Link(connection, generation, wire.GREETING_LIMIT)
    try:
        challenge = os.urandom(wire.CHALLENGE_BYTES)
        link.send(wire.encode(wire.Kind.CHALLENGE, generation, payload=(challenge,)))
        hello = wire.decode_hello(link.await_frame(), token, challenge)
        _tell_misfit(link, generation, hello, expected)
        link.widen(limit)
        link.send(wire.encode_welcome(generation, _on_same_base(hello, expected)))
    except FtvmError:
        link.close()
        raise
    return link


def listen(address: str) -> socket.socket:
    """A listening socket on a port of the kernel's choice."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family, backlog=4)
    listener.setblocking(False)
    return listener


def _expect(link: Link, kind: wire.Kind) -> wire.Frame:
    frame = link.await_frame()
    if frame.kind is not kind:
        raise ProtocolError(f"{frame.kind.name} instead of {kind.name}")
    return frame


def _not_refused(frame: wire.Frame) -> wire.Frame:
    if frame.kind is wire.Kind.BYE:
        raise ProtocolError(f"the backup refuses this primary: {wire.decode_failure(frame)}")
    return frame


def _tell_misfit(link: Link, generation: Generation, hello: wire.Hello, expected: wire.Hello) -> None:
    """A peer that has proved itself is told why it is refused: its reason is what the server's owner reads."""
    try:
        _check_fit(hello, expected)
    except ProtocolError as misfit:
        link.send(wire.encode_failure(generation, str(misfit)))
        raise


def _on_same_base(hello: wire.Hello, expected: wire.Hello) -> list[int]:
    return [number for number, (ours, theirs) in enumerate(zip(expected.disks, hello.disks, strict=True))
            if ours.base and ours.base == theirs.base]


def _check_fit(hello: wire.Hello, expected: wire.Hello) -> None:
    if hello.pair_id != expected.pair_id:
        raise ProtocolError(f"the peer belongs to pair {hello.pair_id}")
    if hello.machine != expected.machine:
        raise ProtocolError(f"the primary is a {hello.machine}, the standby a {expected.machine}: "
                            "install the same QEMU on both hosts")
    if hello.accelerator and expected.accelerator and hello.accelerator != expected.accelerator:
        raise ProtocolError(f"the primary runs under {hello.accelerator.upper()[:8]}, the standby under "
                            f"{expected.accelerator.upper()}, and their states are not the same: use hosts of one kind")
    _check_same("RAM blocks", [(block.name, block.size) for block in expected.blocks],
                [(block.name, block.size) for block in hello.blocks])
    _check_same("disks", [(disk.device, disk.size, disk.read_only) for disk in expected.disks],
                [(disk.device, disk.size, disk.read_only) for disk in hello.disks])


def _check_same(what: str, ours: Sequence[tuple[Any, ...]], theirs: Sequence[tuple[Any, ...]]) -> None:
    """A frame names a block or a disk by its place in the table, so the order counts."""
    if ours != theirs:
        differing = sorted({name for name, *_ in set(ours) ^ set(theirs)}) or ["in their order"]
        raise ProtocolError(f"{what} differ between primary and standby: {', '.join(differing)}")
