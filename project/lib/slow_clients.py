"""Disconnect clients that stall in the middle of a request body.

A WSGI server hands a request to a thread as soon as it has the headers. Reading a body that its
client never finishes then blocks that thread for as long as the client keeps the connection.
A thread of each process looks for such clients once a second.
"""

import contextlib
import math
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_TCP_INFO_LAST_DATA_RECV = slice(52, 56)  # milliseconds; struct tcp_info in linux/tcp.h

_reading_since: dict[int, float] = {}  # by thread ID: when it began to read a body


@contextlib.contextmanager
def reading(port: int, timeout: int) -> Iterator[None]:
    """Mark the calling thread as reading a body for as long as the block lasts.

    If the client, which is connected to `port`, sends nothing for `timeout` seconds, it is
    disconnected within the next second.
    """
    _watch(port, timeout)
    _reading_since[threading.get_ident()] = time.monotonic()
    try:
        yield
    finally:
        del _reading_since[threading.get_ident()]


@cache
def _watch(port: int, timeout: int) -> None:
    """Start the thread that disconnects stalled clients, with the first body of the process."""

    def watch() -> None:
        while True:
            time.sleep(1)
            with contextlib.suppress(OSError):  # no descriptor is free
                disconnect_stalled(port, timeout)

    threading.Thread(target=watch, name="slow_clients", daemon=True).start()


def disconnect_stalled(port: int, timeout: int) -> None:
    """Shut down the connections to `port` that have sent nothing for more than `timeout` seconds.

    Does nothing unless a thread of this process has been reading a body for that long. The server
    does not say which connection a request came on, and has no deadline for bodies, so an idle
    keep-alive connection may be shut down too; its client opens another one. Only Linux shows a
    process when its connections last received data.
    """
    if time.monotonic() - min(_reading_since.copy().values(), default=math.inf) <= timeout:
        return
    # `fromfd` loses the copy of a descriptor that is no socket.
    for path in filter(Path.is_socket, Path("/proc/self/fd").glob("*")):
        with (
            contextlib.suppress(OSError),
            socket.fromfd(int(path.name), socket.AF_INET, socket.SOCK_STREAM) as connection,
        ):
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            idle = int.from_bytes(info[_TCP_INFO_LAST_DATA_RECV], sys.byteorder)
            if connection.getsockname()[1] == port and idle > timeout * 1000:
                connection.shutdown(socket.SHUT_RDWR)
