"""host/qmp.py: lines in pieces, answers among events, and a QEMU that does not answer."""

import json
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nova_ftvm.exception import GuestGone, QemuError
from nova_ftvm.host import qmp

GREETING = {"QMP": {"version": {}, "capabilities": []}}


class Server:
    """A monitor's socket; `script(connection)` plays QEMU after the capabilities."""

    def __init__(self, path: str, script: Callable[["Server"], None], greeting: dict[str, Any] = GREETING) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        self._script, self._greeting = script, greeting
        self._thread = threading.Thread(target=self._play, daemon=True)
        self._thread.start()

    def say(self, *messages: dict[str, Any], pieces: int = 1) -> None:
        data = b"".join(json.dumps(message).encode() + b"\r\n" for message in messages)
        size = -(-len(data) // pieces)
        for start in range(0, len(data), size):
            self.connection.sendall(data[start:start + size])

    def hear(self) -> dict[str, Any]:
        return json.loads(self._lines.readline())

    def close(self) -> None:
        self._listener.close()
        self._thread.join(2.0)

    def _play(self) -> None:
        self.connection, _ = self._listener.accept()
        self._lines = self.connection.makefile("r")
        self.say(self._greeting)
        if "QMP" in self._greeting:
            assert self.hear()["execute"] == "qmp_capabilities"
            self.say({"return": {}, "id": "command"})
            self._script(self)
        self._lines.close()
        self.connection.close()


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., qmp.Monitor]]:
    open_things: list[Any] = []

    def make(script: Callable[[Server], None], timeout_s: float = 2.0, **settings: Any) -> qmp.Monitor:
        path = str(tmp_path / "monitor.sock")
        open_things.append(Server(path, script, **settings))
        monitor = qmp.Monitor(path, timeout_s)
        open_things.append(monitor)
        return monitor

    yield make
    for thing in reversed(open_things):
        thing.close()


def answer(server: Server, *before: dict[str, Any], pieces: int = 1, **reply: Any) -> dict[str, Any]:
    heard = server.hear()
    server.say(*before, {"id": heard["id"], **(reply or {"return": {}})}, pieces=pieces)
    return heard


def test_a_command_brings_its_answer_and_its_names_are_qmps(connect: Callable[..., qmp.Monitor]) -> None:
    heard: list[dict[str, Any]] = []
    def script(server: Server) -> None:
        heard.append(server.hear())
        server.say({"id": "command", "return": {"status": "running"}})

    monitor = connect(script)
    assert monitor.command("query-thing", node_name="x") == {"status": "running"}
    assert heard == [{"execute": "query-thing", "arguments": {"node-name": "x"}, "id": "command"}]
    assert monitor.pid == os.getpid()


def test_events_before_an_answer_are_kept_in_their_order(connect: Callable[..., qmp.Monitor]) -> None:
    first, second = {"event": "STOP"}, {"event": "RESUME"}
    monitor = connect(lambda server: answer(server, first, second, pieces=7))
    monitor.command("query-status")
    assert monitor.receive() == [first, second]


def test_lines_in_single_bytes_are_lines(connect: Callable[..., qmp.Monitor]) -> None:
    monitor = connect(lambda server: answer(server, pieces=10_000, **{"return": "ü" * 50}))
    assert monitor.command("x") == "ü" * 50


def test_an_error_names_the_command_and_qemus_words(connect: Callable[..., qmp.Monitor]) -> None:
    monitor = connect(lambda server: answer(server, error={"class": "GenericError", "desc": "no such netdev"}))
    with pytest.raises(QemuError, match="QEMU refused object-add: no such netdev"):
        monitor.command("object-add")


def test_an_answer_that_does_not_come_is_not_waited_for_long(connect: Callable[..., qmp.Monitor]) -> None:
    over = threading.Event()
    monitor = connect(lambda server: over.wait(5.0), timeout_s=0.05)
    with pytest.raises(GuestGone, match=r"no answer within 0\.05 s"):
        monitor.command("query-status")
    over.set()


def test_an_end_is_told_apart_from_silence(connect: Callable[..., qmp.Monitor]) -> None:
    monitor = connect(lambda server: None)
    with pytest.raises(GuestGone, match="closed its monitor"):
        monitor.command("query-status")


def test_what_came_before_the_end_is_not_lost_to_a_waiting_command(connect: Callable[..., qmp.Monitor]) -> None:
    monitor = connect(lambda server: answer(server))
    assert monitor.command("quit") == {}


def test_what_is_no_monitor_is_refused(connect: Callable[..., qmp.Monitor]) -> None:
    with pytest.raises(GuestGone, match="not a QMP monitor"):
        connect(lambda server: None, greeting={"hello": "agent"})


def test_no_socket_is_a_guest_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(GuestGone, match="no monitor at"):
        qmp.Monitor(str(tmp_path / "nothing.sock"))


def test_a_prepared_command_comes_when_it_is_completed(connect: Callable[..., qmp.Monitor]) -> None:
    def script(server: Server) -> None:
        server.say({"event": "READY"})
        heard.append(server.hear())
        server.say({"return": {}, "id": "save"})

    heard: list[Any] = []
    monitor = connect(script)
    monitor.prepare("xen-save-devices-state", "save", filename="gate", live=False)
    select.select([monitor], [], [], 2.0)
    assert monitor.receive() == [{"event": "READY"}] and not heard
    monitor.complete()
    assert wait_for_messages(monitor) == [{"return": {}, "id": "save"}]
    assert heard == [{"execute": "xen-save-devices-state", "arguments": {"filename": "gate", "live": False},
                      "id": "save"}]


def test_another_command_takes_a_prepared_one_back_and_its_refusal_is_no_answer(
        connect: Callable[..., qmp.Monitor]) -> None:
    def script(server: Server) -> None:
        for answer in ({"error": {"desc": "QMP input member 'taken-back' is unexpected"}}, {"return": "paused"},
                       {"return": {}}):
            heard.append(server.hear())
            server.say({**answer, "id": heard[-1]["id"]})

    heard: list[Any] = []
    monitor = connect(script)
    monitor.prepare("save", "save")
    assert monitor.command("query-status") == "paused"
    monitor.complete()
    assert wait_for_messages(monitor) == [{"return": {}, "id": "save"}]
    assert [command["execute"] for command in heard] == ["save", "query-status", "save"]
    assert heard[0]["taken-back"] and "taken-back" not in heard[2]


def wait_for_messages(monitor: qmp.Monitor) -> list[dict[str, Any]]:
    assert select.select([monitor], [], [], 2.0)[0]
    return monitor.receive()


def test_a_batch_is_lines() -> None:
    assert qmp.encode("qom-set", {"value": "off"}, "barrier") == (
        b'{"execute":"qom-set","arguments":{"value":"off"},"id":"barrier"}\n')
    assert qmp.encode("stop") == b'{"execute":"stop"}\n'
