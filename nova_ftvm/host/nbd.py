"""NBD over UNIX sockets, without waiting: a server for this host's QEMU, and a client of it. Bytes are core/nbd.py's.

Owns the sockets, and what is half sent or half received. Called by host/disks.py only.
"""

import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence

from nova_ftvm.core import nbd
from nova_ftvm.core.disk import DiskWrite, weight
from nova_ftvm.core.outbox import Outbox
from nova_ftvm.exception import FtvmError, MirrorLost, ProtocolError, ReplicaFailed
from nova_ftvm.types import Disk

_UCRED = struct.Struct("3i")
#: What is taken of one connection before the next one's turn, and the caller's.
_SHARE_BYTES = 2 << 20
_CHUNK = 1 << 16


class _Peer:
    """QEMU's connection to one export."""

    def __init__(self, connection: socket.socket, session: nbd.Server) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.session = session

    def read(self, writes: list[DiskWrite]) -> bool:
        """Takes what is there, up to a share. False when the client ended. Raises OSError and ProtocolError."""
        session, left = self.session, _SHARE_BYTES
        self._speak()
        while left > 0:
            room = session.room()
            space = sum(map(len, room))
            try:
                count = self.socket.recvmsg_into(room)[0]
            except BlockingIOError:
                return True
            writes += session.received(count)
            self._speak()
            if not count or session.ended:
                return False
            if count < space:
                return True
            left -= count
        return True

    def _speak(self) -> None:
        """Sends what the session has to say, the greeting too."""
        self.send(self.session.unsent)
        self.session.unsent = bytearray()

    def send(self, answers: bytearray) -> None:
        """A client has few requests under way, so that their answers always fit into the socket's buffer."""
        if answers and self.socket.send(answers) < len(answers):
            raise ProtocolError("it does not read its answers")


class NbdServer:
    """Exports the writable disks to one QEMU process, one connection each, and gives what it writes.

    `fileno` is an epoll over all of it, readable when there is something to `receive`.
    """

    def __init__(self, path: str, owner: tuple[int, int], pid: int, disks: Sequence[Disk], max_payload: int) -> None:
        """Listens at `path`, which only `owner` (uid, gid) can open, and only process `pid` is let in."""
        self._path = path
        self._pid = pid
        self._disks = disks
        self._max_payload = max_payload
        self._exports = {number: disk.size for number, disk in enumerate(disks) if not disk.read_only}
        self._peers: dict[int, _Peer] = {}
        self._lost: MirrorLost | None = None
        self._attended: list[DiskWrite] = []
        #: Wakes the caller up for what came in `attend`.
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._listener = _listen(path, owner)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def receive(self) -> list[DiskWrite]:
        """Whole writes, in order for each disk. Raises MirrorLost, for good, when QEMU left an export.

        QEMU is not told before `confirm`. It has at most 16 requests to a disk under way.
        """
        if self._lost:
            raise self._lost
        writes, self._attended = self._attended, []
        for fd, _ in self._epoll.poll(0):
            if fd in self._peers:
                self._read(self._peers[fd], writes)
            elif fd == self._wake:
                os.eventfd_read(self._wake)
            else:
                self._accept()
        if self._lost and not writes:
            raise self._lost
        return writes

    def confirm(self) -> None:
        """Answers all that `receive` gave."""
        for peer in self._peers.values():
            try:
                peer.send(peer.session.answers())
            except (OSError, ProtocolError) as error:
                self._lose(peer, str(error))

    def attend(self) -> None:
        """Receives and confirms; the writes are kept for `receive`. For when QEMU must not wait for the log."""
        self._attended = self.receive()
        self.confirm()
        if self._attended:
            os.eventfd_write(self._wake, 1)

    def close_door(self) -> None:
        """Nobody else may come."""
        if self._listener.fileno() >= 0:
            self._epoll.unregister(self._listener)
            self._listener.close()
            os.unlink(self._path)

    def close(self) -> None:
        """Hangs up; QEMU notices at once. Idempotent."""
        if self._epoll.closed:
            return
        self.close_door()
        self._epoll.close()
        os.close(self._wake)
        for peer in self._peers.values():
            peer.socket.close()
        self._peers.clear()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        pid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
        if pid != self._pid:
            connection.close()
            return
        peer = _Peer(connection, nbd.Server(self._exports, self._max_payload))
        self._peers[connection.fileno()] = peer
        self._epoll.register(connection, select.EPOLLIN)
        self._read(peer, [])

    def _read(self, peer: _Peer, writes: list[DiskWrite]) -> None:
        try:
            if not peer.read(writes):
                self._lose(peer, "QEMU closed the connection")
        except (OSError, ProtocolError) as error:
            self._lose(peer, str(error))

    def _lose(self, peer: _Peer, why: str) -> None:
        """Without the mirror of one disk the others are of no use. A connection without a disk is no loss."""
        disk = peer.session.disk
        if disk is not None:
            self._lost = self._lost or MirrorLost(f"the mirror of disk {self._disks[disk].device} ended: {why}")
            return
        self._epoll.unregister(peer.socket)
        del self._peers[peer.socket.fileno()]
        peer.socket.close()


class NbdClient:
    """Writes one disk of this host's QEMU, in the background; what overlaps is done in order.

    Every method raises ReplicaFailed when a write could not be done.
    """

    def __init__(self, path: str, number: int, disk: Disk, timeout_s: float = 5.0) -> None:
        """Connects to the export of disk `number`. The greeting is waited for."""
        self._disk = disk
        self._session = nbd.Client(str(number))
        self._queue: deque[DiskWrite] = deque()
        self._sending = Outbox()
        #: Bytes handed in and not yet written.
        self.backlog = 0
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout_s)
            self._greet(path, time.monotonic() + timeout_s)
            self._socket.setblocking(False)
        except (OSError, FtvmError) as error:
            self._socket.close()
            raise ReplicaFailed(f"QEMU does not let disk {disk.device} be written: {error}") from error

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def wants_room(self) -> bool:
        """Is there something that waits for room in the socket?"""
        return bool(self._sending)

    def submit(self, write: DiskWrite) -> None:
        for piece in self._session.pieces(write):
            self._queue.append(piece)
            self.backlog += weight(piece)

    def advance(self) -> None:
        """Takes the answers that came, and sends what may be sent now."""
        try:
            self._take_answers()
            self._fill()
            self._send()
        except (OSError, ProtocolError) as error:
            raise ReplicaFailed(f"QEMU ended the writing of disk {self._disk.device}: {error}") from error

    def close(self) -> None:
        """Without a last word: QEMU takes a closed connection for one."""
        self._socket.close()

    def _greet(self, path: str, deadline: float) -> None:
        self._socket.connect(path)
        while not self._session.ready:
            if time.monotonic() > deadline:
                raise ProtocolError("no greeting in time")
            came = self._socket.recv(_CHUNK)
            if not came:
                raise ProtocolError("it closed the connection")
            self._session.received(came)
            self._socket.sendall(self._session.unsent)
            self._session.unsent.clear()
        if self._session.size != self._disk.size:
            raise ProtocolError(f"it has {self._session.size} bytes in place of {self._disk.size}")

    def _take_answers(self) -> None:
        while True:
            try:
                came = self._socket.recv(_CHUNK)
            except BlockingIOError:
                return
            if not came:
                raise ProtocolError("it closed the connection")
            for write, error in self._session.received(came):
                if error:
                    raise ReplicaFailed(f"disk {self._disk.device} could not be written: {os.strerror(error)} "
                                        f"({self._disk.path}): make room there, or see QEMU's log")
                self.backlog -= weight(write)

    def _fill(self) -> None:
        queue, session = self._queue, self._session
        while queue and session.may_send(queue[0]):
            write = queue.popleft()
            self._sending.add(session.request(write))
            self._sending.add(write.contents)

    def _send(self) -> None:
        while self._sending:
            try:
                self._sending.sent(self._socket.sendmsg(self._sending.batch()))
            except BlockingIOError:
                return


def _listen(path: str, owner: tuple[int, int]) -> socket.socket:
    if os.path.lexists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        os.chown(path, *owner)
        listener.listen(16)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener
