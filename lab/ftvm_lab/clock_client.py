"""Asks the Debian guest for its clocks, some times a second, and notes this machine's own before and after.

Run as `python -m ftvm_lab.clock_client ADDRESS`, inside the client namespace; it ends when standard input closes, and
prints a list of lists, each a Sample. One question is under way at a time, so the guest read each answer after all
answers before it had arrived.
"""

import json
import select
import socket
import sys
import time

PORT = 7012
EVERY_S = 0.1
#: A question that was not answered by then was lost, with the host that it was sent to.
SILENCE_S = 0.5


def question(end: socket.socket, number: int) -> list[int] | None:
    """Asks once; None if no answer came in time. The numbers are Sample's."""
    word = str(number)
    before_real, before_mono = time.time_ns(), time.monotonic_ns()
    end.send(word.encode())
    until = time.monotonic() + SILENCE_S
    while (left_s := until - time.monotonic()) > 0 and select.select([end], [], [], left_s)[0]:
        answer = end.recv(256).decode().split()
        # One that is late belongs to a question that was given up.
        if answer[0] == word:
            took = time.monotonic_ns() - before_mono
            return [before_real, before_mono, took, *map(int, answer[1:])]
    return None


def ask(address: tuple[str, int]) -> list[list[int]]:
    """Until standard input closes."""
    samples: list[list[int]] = []
    number = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.connect(address)
        while not select.select([sys.stdin], [], [], EVERY_S)[0]:
            number += 1
            if (found := question(end, number)) is not None:
                samples.append(found)
    return samples


def main() -> None:
    print(json.dumps(ask((sys.argv[1], PORT))))


if __name__ == "__main__":
    main()
