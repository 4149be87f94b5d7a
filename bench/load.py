"""HTTP/1.1 load on 127.0.0.1 from one thread: raw sockets, keep-alive, epoll.

`closed` keeps a number of clients busy without pause. `paced` sends at a steady rate, however slow
the responses are. Run each in its own process. Times are in seconds unless named _ms.
`running` runs clients that are threads.
"""

import itertools
import math
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

LOST = -1  # a pseudo-status: connection closed or answer_timeout over before the response
BUSY = 503


@dataclass(frozen=True)
class Outcome:
    """The responses of the measured time."""

    statuses: dict[int, int]  # responses by status
    lost: int  # requests without a response
    per_second: float  # responses of 200 to 299
    p50_ms: float  # of responses of 200 to 299
    p99_ms: float

    @property
    def busy(self) -> int:
        """The number of 503 responses."""
        return self.statuses.get(BUSY, 0)

    @property
    def unexpected(self) -> dict[int, int]:
        """The responses, by status, that are neither success nor 503."""
        return {
            status: count
            for status, count in self.statuses.items()
            if status != BUSY and not _succeeded(status)
        }


@contextmanager
def running(clients: Sequence[threading.Thread], over: threading.Event) -> Iterator[None]:
    """Run the clients while the context lasts; they end when `over` is set."""
    for client in clients:
        client.start()
    try:
        yield
    finally:
        over.set()
        for client in clients:
            client.join(60)


def closed(
    port: int,
    requests: Sequence[bytes],
    connections: int,
    seconds: float,
    *,
    settle: float = 1.0,
    once: bool = False,
    answer_timeout: float = 30.0,
) -> Outcome:
    """Send the next request on each connection as soon as the last one has its response.

    `requests` repeat, or with `once` end the run when they are used up. Responses in the first
    `settle` seconds are not counted, nor those that arrive after `seconds` more. The latter are
    awaited, so that the server is idle when this returns.
    """
    supply = iter(requests) if once else itertools.cycle(requests)
    tally = _Tally()
    with _Client(port, connections) as client:
        now = time.monotonic()
        start = now + settle
        end = last = start + seconds
        for connection, request in zip(client.connections, supply, strict=False):
            client.send(connection, request, now)
        while client.waiting:
            for connection, status, since in client.answers(0.5, answer_timeout):
                now = time.monotonic()
                if start <= now < end:
                    tally.add(status, now - since)
                if now < end and (request := next(supply, b"")):
                    client.send(connection, request, now)
                else:
                    last = min(end, now)
    return tally.outcome(last - start if once else seconds)


def paced(
    port: int,
    requests: Sequence[bytes],
    per_second: float,
    connections: int,
    seconds: float,
    *,
    settle: float = 1.0,
    answer_timeout: float = 30.0,
) -> Outcome:
    """Send `per_second` requests a second at equal intervals, in turn on the free connections.

    A request that finds no free connection waits for one. Its latency is measured from the time
    it was due, so a stalled server cannot hide its latency. Every request that was due after the
    first `settle` seconds is counted, however late its response.
    """
    supply = itertools.cycle(requests)
    tally = _Tally()
    with _Client(port, connections) as client:
        begin = time.monotonic()
        schedule = deque(
            begin + number / per_second for number in range(int((settle + seconds) * per_second))
        )
        # In turn: the server would close a connection that is idle for long.
        free = deque(client.connections)
        while schedule or client.waiting:
            now = time.monotonic()
            while free and schedule and schedule[0] <= now:
                client.send(free.popleft(), next(supply), schedule.popleft())
            pause = max(0.0, schedule[0] - now) if free and schedule else 0.5
            for connection, status, since in client.answers(pause, answer_timeout):
                free.append(connection)
                if since >= begin + settle:
                    tally.add(status, time.monotonic() - since)
    return tally.outcome(seconds)


def _succeeded(status: int) -> bool:
    return 200 <= status < 300


class _Tally:
    """The responses of a run: the statuses, and the latencies of successes."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.latencies: list[float] = []

    def add(self, status: int, latency: float) -> None:
        self.statuses[status] += 1
        if _succeeded(status):
            self.latencies.append(latency)

    def outcome(self, seconds: float) -> Outcome:
        lost = self.statuses.pop(LOST, 0)
        self.latencies.sort()
        return Outcome(
            statuses=dict(self.statuses),
            lost=lost,
            per_second=len(self.latencies) / seconds,
            p50_ms=self._quantile_ms(0.50),
            p99_ms=self._quantile_ms(0.99),
        )

    def _quantile_ms(self, share: float) -> float:
        if not self.latencies:
            return math.nan
        return self.latencies[math.ceil(share * len(self.latencies)) - 1] * 1000


class _Connection:
    """One keep-alive connection and its pending request."""

    __slots__ = ("received", "since", "socket")

    def __init__(self, port: int) -> None:
        self.connect(port)

    def connect(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.received = b""
        self.since = math.inf  # when the pending request was sent or due; inf without one


class _Client:
    """Connections to one server, reopened whenever they close."""

    def __init__(self, port: int, connections: int) -> None:
        self.waiting = 0  # pending requests
        self._port = port
        self._epoll = select.epoll()
        self._by_descriptor: dict[int, _Connection] = {}
        self._checked = time.monotonic()
        for _ in range(connections):
            self._register(_Connection(port))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._by_descriptor.values():
            connection.socket.close()
        self._epoll.close()

    @property
    def connections(self) -> list[_Connection]:
        return list(self._by_descriptor.values())

    def send(self, connection: _Connection, request: bytes, since: float) -> None:
        connection.since = since
        self.waiting += 1
        try:
            connection.socket.send(request)  # a few hundred bytes always fit
        except OSError:
            connection.received = b""  # closed: the next recv reports it, and the request is LOST

    def answers(
        self, timeout: float, answer_timeout: float
    ) -> Iterator[tuple[_Connection, int, float]]:
        """Wait up to `timeout` and yield connection, status and `since` of completed requests.

        The connection is free, and reopened if it was closed. A request is LOST if its connection
        closes or `answer_timeout` passes before the response is complete.
        """
        # The resolution of select is a microsecond, that of epoll's timeout a millisecond.
        select.select([self._epoll], [], [], timeout)
        for descriptor, _ in self._epoll.poll(0):
            connection = self._by_descriptor[descriptor]
            status, close = self._receive(connection)
            if not status:
                continue
            since = connection.since
            connection.since = math.inf
            if close:
                self._reopen(connection)
            if since < math.inf:  # otherwise the server closed an idle connection
                self.waiting -= 1
                yield connection, status, since
        now = time.monotonic()
        if now - self._checked > 1.0:
            self._checked = now
            for connection in self.connections:
                if now - connection.since > answer_timeout:
                    self.waiting -= 1
                    since = connection.since
                    self._reopen(connection)
                    yield connection, LOST, since

    def _receive(self, connection: _Connection) -> tuple[int, bool]:
        """Read; return the status (0 while the response is incomplete) and whether to close."""
        try:
            data = connection.socket.recv(262_144)
        except BlockingIOError:
            return 0, False
        except OSError:
            data = b""
        if not data:
            return LOST, True
        if connection.received:
            data = connection.received + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            connection.received = data
            return 0, False
        head = data[:end].lower()
        at = head.find(b"\r\ncontent-length:")
        if at < 0:
            raise ValueError(f"a response without Content-Length: {head!r}")
        length = int(head[at + 17 :].split(b"\r\n", 1)[0])
        if len(data) < end + 4 + length:
            connection.received = data
            return 0, False
        connection.received = b""
        return int(head[9:12]), b"\r\nconnection: close" in head

    def _register(self, connection: _Connection) -> None:
        self._by_descriptor[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket, select.EPOLLIN)

    def _reopen(self, connection: _Connection) -> None:
        del self._by_descriptor[connection.socket.fileno()]
        connection.socket.close()
        connection.connect(self._port)
        self._register(connection)
