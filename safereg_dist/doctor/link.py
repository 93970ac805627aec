"""Bytes from one host to another over TCP.

`link serve` prints its port, `link HOST PORT` the bytes per second that came from there.
"""

import socket
import sys
import time

SECONDS = 2.0
BLOCK = 1 << 20
TIMEOUT_S = 30.0


def serve() -> None:
    """Sends for `SECONDS` to the first who connects."""
    with socket.create_server(("", 0)) as server:
        server.settimeout(TIMEOUT_S)
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(TIMEOUT_S)
            block, end = bytes(BLOCK), time.monotonic() + SECONDS
            while time.monotonic() < end:
                connection.sendall(block)


def receive(host: str, port: int) -> float:
    """Bytes per second received."""
    with socket.create_connection((host, port), timeout=TIMEOUT_S) as connection:
        buffer, count, began = bytearray(BLOCK), 0, time.perf_counter()
        while got := connection.recv_into(buffer):
            count += got
        return count / (time.perf_counter() - began)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        print(receive(sys.argv[1], int(sys.argv[2])))
