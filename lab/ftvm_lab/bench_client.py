"""The benchmark's own clients, for what no ready program measures. Run inside the client namespace:

    python -m ftvm_lab.bench_client echo ADDRESS CONNECTIONS BYTES SECONDS    round trips, no think time
    python -m ftvm_lab.bench_client pull|push ADDRESS SECONDS                 one connection, one direction
    python -m ftvm_lab.bench_client order ADDRESS SECONDS WORD...             until the work is done, at most so long

Prints JSON. All times are by this side's clock: the guest's stands still while the guest does.
"""

import json
import os
import select
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ftvm_lab.figures import quantile

#: As in debian_root/bench.c.
ECHO_PORT, WORK_PORT = 7010, 7011
#: What comes before is not counted: connections grow to their speed.
WARM_UP_S = 0.5
SILENCE_S = 30.0
CONNECT_S = 10.0
#: So many points of the distribution are kept.
CURVE = 200
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Echoes:
    """`curve_ms`: the round trips' quantiles at even steps, from the least to the most."""

    seconds: float
    requests: int
    rtt_ms_p50: float
    rtt_ms_p99: float
    curve_ms: list[float]


def summarize(waits_s: Sequence[float], seconds: float) -> Echoes:
    ordered = sorted(waits_s)
    points = [quantile(ordered, place / (CURVE - 1)) for place in range(CURVE)] if ordered else []
    return Echoes(
        seconds=round(seconds, 3),
        requests=len(ordered),
        rtt_ms_p50=_ms(quantile(ordered, 0.5)),
        rtt_ms_p99=_ms(quantile(ordered, 0.99)),
        curve_ms=[_ms(point) for point in points],
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


@dataclass(slots=True)
class _Connection:
    end: socket.socket
    sent_s: float = 0.0
    got: int = 0


def echo(address: tuple[str, int], connections: int, size: int, seconds: float) -> Echoes:
    """Every connection sends its next message as soon as the last one is back, whole."""
    message = os.urandom(size)
    waits_s: list[float] = []
    opened: dict[int, _Connection] = {}
    with select.epoll() as poll:
        for _ in range(connections):
            end = socket.create_connection(address, CONNECT_S)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened[end.fileno()] = _Connection(end)
            poll.register(end, select.EPOLLIN)
        begun = time.monotonic() + WARM_UP_S
        for one in opened.values():
            _send(one, message)
        while (now := time.monotonic()) < begun + seconds:
            ready = poll.poll(SILENCE_S)
            if not ready:
                raise TimeoutError(f"no echo for {SILENCE_S:g} s")
            for number, _ in ready:
                one = opened[number]
                one.got += _received(one.end)
                if one.got == size:
                    now = time.monotonic()
                    if one.sent_s >= begun:
                        waits_s.append(now - one.sent_s)
                    _send(one, message)
    for one in opened.values():
        one.end.close()
    return summarize(waits_s, now - begun)


def _send(one: _Connection, message: bytes) -> None:
    one.got, one.sent_s = 0, time.monotonic()
    one.end.sendall(message)


def _received(end: socket.socket) -> int:
    got = len(end.recv(_CHUNK))
    if not got:
        raise EOFError("the guest closed the connection")
    return got


def stream(address: tuple[str, int], pulls: bool, seconds: float) -> dict[str, float]:
    """Bytes a second in one direction, after the warm-up."""
    chunk = os.urandom(_CHUNK)
    moved = 0
    with socket.create_connection(address, CONNECT_S) as end:
        end.settimeout(SILENCE_S)
        end.sendall(b"send %d\n" % (1 << 50) if pulls else b"take %d\n" % (1 << 50))
        begun = time.monotonic() + WARM_UP_S
        while (now := time.monotonic()) < begun + seconds:
            size = _received(end) if pulls else end.send(chunk)
            if now >= begun:
                moved += size
    return {"bytes_per_s": moved / (now - begun), "seconds": round(now - begun, 3)}


def order(address: tuple[str, int], line: str, limit_s: float) -> dict[str, float]:
    """The seconds that a piece of work takes."""
    with socket.create_connection(address, CONNECT_S) as end:
        end.settimeout(limit_s)
        start = time.monotonic()
        end.sendall(f"{line}\n".encode())
        answer = end.makefile().readline().split()
        seconds = time.monotonic() - start
    if answer[:1] != ["done"]:
        raise ValueError(f"{line!r} was answered {' '.join(answer) or 'nothing'}")
    return {"seconds": round(seconds, 3)}


def main() -> None:
    match sys.argv[1:]:
        case ["echo", address, connections, size, seconds]:
            found = asdict(echo((address, ECHO_PORT), int(connections), int(size), float(seconds)))
        case ["pull" | "push" as way, address, seconds]:
            found = dict(stream((address, WORK_PORT), way == "pull", float(seconds)))
        case ["order", address, limit_s, *words] if words:
            found = dict(order((address, WORK_PORT), " ".join(words), float(limit_s)))
        case _:
            sys.exit(__doc__)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
