"""The compute hosts' remote shell: Nova's cold migrations copy files with rsync, and no host has accounts or keys.

    python -m ftvm_lab.remote                    on each host: runs what it is told, with the connection for its pipes
    python -m ftvm_lab.remote HOST COMMAND...    what rsync calls in ssh's place
"""

import json
import os
import socket
import subprocess
import sys
import threading

PORT = 7722
CONNECT_S = 10
_CHUNK = 1 << 16


def main() -> None:
    if len(sys.argv) > 1:
        _call(sys.argv[1], sys.argv[2:])
    else:
        _serve()


def _serve() -> None:
    with socket.create_server(("", PORT)) as server:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_run, args=(connection,), daemon=True).start()


def _run(connection: socket.socket) -> None:
    with connection:
        line = b""
        # One by one: what follows the line is the command's.
        while not line.endswith(b"\n"):
            if not (byte := connection.recv(1)):
                return
            line += byte
        subprocess.run(json.loads(line), stdin=connection.fileno(), stdout=connection.fileno(), check=False)


def _call(host: str, command: list[str]) -> None:
    with socket.create_connection((host, PORT), CONNECT_S) as connection:
        connection.settimeout(None)
        connection.sendall(json.dumps(command).encode() + b"\n")
        threading.Thread(target=_send, args=(connection,), daemon=True).start()
        while chunk := connection.recv(_CHUNK):
            _write(chunk)


def _send(connection: socket.socket) -> None:
    while chunk := os.read(sys.stdin.fileno(), _CHUNK):
        connection.sendall(chunk)
    connection.shutdown(socket.SHUT_WR)


def _write(chunk: bytes) -> None:
    while chunk:
        chunk = chunk[os.write(sys.stdout.fileno(), chunk):]


if __name__ == "__main__":
    main()
