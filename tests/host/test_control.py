"""host/control.py and host/process.py: an engine and its agents, of which any may die."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nova_ftvm.host import process
from nova_ftvm.host.control import ControlServer
from nova_ftvm.host.process import EngineLost, EngineProcess
from tests.host.machine import die_with_the_tests

IDENTITY = {"role": "primary", "pair_id": "pair", "generation": 3, "instance_id": "server"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ControlServer]:
    made = ControlServer(str(tmp_path / "primary.ctl"), IDENTITY)
    yield made
    made.close()


class AgentEnd:
    def __init__(self, server: ControlServer) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(server._path)
        self.socket.settimeout(2.0)
        self.lines = self.socket.makefile("r")
        server.orders()

    def hear(self) -> dict[str, Any]:
        return json.loads(self.lines.readline())

    def order(self, what: str) -> None:
        self.socket.sendall(json.dumps({"do": what}).encode() + b"\n")


def test_an_agent_is_told_who_it_is_and_where_things_stand(server: ControlServer) -> None:
    server.report("syncing", percent=5)
    server.report("protected")
    for _ in range(2):
        agent = AgentEnd(server)
        assert agent.hear() == {"event": "hello", **IDENTITY}
        assert agent.hear() == {"event": "protected"}


def test_the_newest_agent_is_heard(server: ControlServer) -> None:
    old = AgentEnd(server)
    new = AgentEnd(server)
    new.order("stop")
    assert server.orders() == [{"do": "stop"}]
    assert [old.hear()["event"], old.lines.readline()] == ["hello", ""]


def test_an_order_in_pieces_is_an_order_and_a_torn_one_is_none(server: ControlServer) -> None:
    agent = AgentEnd(server)
    agent.socket.sendall(b'{"do": "st')
    assert server.orders() == []
    agent.socket.sendall(b'op"}\n{"do":')
    assert server.orders() == [{"do": "stop"}]
    agent.socket.close()
    agent.lines.close()
    assert server.orders() == []
    next_one = AgentEnd(server)
    next_one.order("fence")
    assert server.orders() == [{"do": "fence"}]


def test_an_agent_that_does_not_read_costs_the_engine_nothing(server: ControlServer) -> None:
    AgentEnd(server)
    start = time.monotonic()
    for number in range(20000):
        server.report("syncing", percent=number)
    assert time.monotonic() - start < 2.0
    server.report("protected")
    assert [AgentEnd(server).hear()["event"]] == ["hello"]


def test_the_farewell_ends_when_the_last_word_was_seen_and_not_before_its_time(server: ControlServer) -> None:
    server.report("promoted")
    agent = AgentEnd(server)
    start = time.monotonic()
    server.farewell(0.2)
    assert time.monotonic() - start >= 0.2
    agent.order("seen")
    server.farewell(60.0)
    assert time.monotonic() - start < 5.0


def test_the_socket_is_the_engines_users_alone(server: ControlServer) -> None:
    assert os.stat(server._path).st_mode & 0o777 == 0o600


_LISTENS = "import socket, time; s = socket.socket(1); s.bind({path!r}); s.listen(1); print(flush=True); time.sleep(60)"


def test_an_engine_that_hangs_does_not_hang_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found again by a restarted agent, it accepts and says nothing: it is killed."""
    monkeypatch.setattr(process, "_GREETING_S", 0.2)
    path = str(tmp_path / "primary.ctl")
    engine = subprocess.Popen([sys.executable, "-c", _LISTENS.format(path=path)], stdout=subprocess.PIPE,
                              preexec_fn=die_with_the_tests)
    try:
        engine.stdout.readline()
        with pytest.raises(EngineLost, match="hung"):
            EngineProcess(path, 0.0)
        assert engine.wait(5.0) == -9
    finally:
        engine.kill()
        engine.wait()


def test_a_socket_that_nobody_listens_at_is_an_engine_that_is_lost(tmp_path: Path) -> None:
    with pytest.raises(EngineLost, match="no engine listens"):
        EngineProcess(str(tmp_path / "primary.ctl"), 0.0)
