"""A TCP proxy in front of PostgreSQL that can hang, cut and restore connections, and lists SQL."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

_CHUNK = 65_536
# ParameterStatus: length, name, value
_PRIMARY = b"S\0\0\0\x17in_hot_standby\0off\0"
_STANDBY = b"S\0\0\0\x16in_hot_standby\0on\0"
_ENCRYPTION_REQUESTS = {80_877_103, 80_877_104}  # SSLRequest, GSSENCRequest


class PostgresProxy:
    """A proxy between clients and the PostgreSQL server at `host`:`port`.

    It listens on a free `port` of 127.0.0.1. It is a context manager: it listens from `__enter__`
    on, and when `__exit__` returns, every socket is closed and every thread has ended. It refuses
    encryption, so that the statements of clients can be read.
    Start it in a different process from a client that calls psycopg2's `connection.cancel`, which
    waits for the server while holding the global interpreter lock.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 5432) -> None:
        self.port = 0
        self.is_standby = False  # whether new connections are told that the server is a standby
        self._upstream = (host, port)
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._links: list[_Link] = []
        self._statements: list[str] = []
        self._gate = threading.Condition()
        self._frozen = False

    def __enter__(self) -> Self:
        self.restore()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    @property
    def statements(self) -> list[str]:
        """The SQL texts that clients have sent since the last `clear`, in order of arrival."""
        with self._gate:
            return self._statements.copy()

    def clear(self) -> None:
        """Forget the statements seen so far."""
        with self._gate:
            self._statements.clear()

    def freeze(self) -> None:
        """Keep connections open and accept new ones, but forward no bytes in either direction."""
        with self._gate:
            self._frozen = True

    def thaw(self) -> None:
        """Forward again, beginning with the bytes held back by `freeze`."""
        with self._gate:
            self._frozen = False
            self._gate.notify_all()

    def cut(self) -> None:
        """Close every connection, drop bytes held back, and refuse new connections."""
        if self._listener is None or self._acceptor is None:
            return
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close() alone does not wake accept()
        self._acceptor.join()
        self._listener.close()
        self._listener = self._acceptor = None
        with self._gate:
            links = self._links.copy()
        for link in links:
            self._end(link)
        for link in links:
            link.thread.join()

    def restore(self) -> None:
        """Listen again after a `cut`, on the same port as before."""
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
            self.port = self._listener.getsockname()[1]
            self._acceptor = threading.Thread(target=self._accept, args=(self._listener,))
            self._acceptor.start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the listener was shut down
            while True:
                link = _Link(listener.accept()[0])
                link.thread = threading.Thread(target=self._serve, args=(link,))
                with self._gate:
                    self._links.append(link)
                link.thread.start()

    def _serve(self, link: "_Link") -> None:
        """Forward one connection in both directions until either side closes it."""
        with link.client, suppress(OSError), socket.create_connection(self._upstream) as server:
            link.server = server
            for end in (link.client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Thread(target=self._pump_answers, args=(link, server))
            answers.start()
            self._pump_requests(link, server)
            answers.join()
        with self._gate:
            self._links.remove(link)

    def _pump_requests(self, link: "_Link", server: socket.socket) -> None:
        frontend = _Frontend()
        with suppress(OSError), self._ending(link):
            while data := link.client.recv(_CHUNK):
                request, refusal, statements = frontend.feed(data)
                with self._gate:
                    self._statements += statements
                if not self._may_pass(link):
                    break
                link.client.sendall(refusal)
                server.sendall(request)

    def _pump_answers(self, link: "_Link", server: socket.socket) -> None:
        with suppress(OSError), self._ending(link):
            while data := server.recv(_CHUNK):
                if not self._may_pass(link):
                    break
                if self.is_standby:
                    data = data.replace(_PRIMARY, _STANDBY)
                link.client.sendall(data)

    def _may_pass(self, link: "_Link") -> bool:
        """Wait while frozen; return whether the link is still open."""
        with self._gate:
            self._gate.wait_for(lambda: link.ended or not self._frozen)
            return not link.ended

    @contextmanager
    def _ending(self, link: "_Link") -> Iterator[None]:
        """End the link when the block ends, also with an exception."""
        try:
            yield
        finally:
            self._end(link)

    def _end(self, link: "_Link") -> None:
        """Shut down both sockets, which wakes the two threads of the link."""
        with self._gate:
            link.ended = True
            self._gate.notify_all()
        for end in (link.client, link.server):
            if end is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


class _Link:
    """One client's connection and its counterpart at the server."""

    thread: threading.Thread

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.server: socket.socket | None = None
        self.ended = False


class _Frontend:
    """A parser of one client's messages (PostgreSQL frontend/backend protocol 3)."""

    def __init__(self) -> None:
        self._buffer = b""
        self._started = False

    def feed(self, data: bytes) -> tuple[bytes, bytes, list[str]]:
        """Take the next bytes of a client and return what its complete messages lead to.

        That is the bytes for the server, the bytes for the client (a refusal of each request for
        encryption), and the SQL texts.
        """
        self._buffer += data
        request, refusal, statements = b"", b"", list[str]()
        while message := self._next_message():
            kind = message[:1]
            if not self._started:
                if int.from_bytes(message[4:8]) in _ENCRYPTION_REQUESTS:
                    refusal += b"N"
                    continue
                self._started = True
            elif kind == b"Q":  # Query: text
                statements.append(_text(message[5:]))
            elif kind == b"P":  # Parse: name, text, parameter types
                statements.append(_text(message[5:].split(b"\0", 1)[1]))
            request += message
        return request, refusal, statements

    def _next_message(self) -> bytes:
        """Remove and return one complete message from the buffer; b"" while it is incomplete."""
        head = 1 if self._started else 0  # a startup packet has no byte for its type
        if len(self._buffer) < head + 4:
            return b""
        size = head + int.from_bytes(self._buffer[head : head + 4])
        if len(self._buffer) < size:
            return b""
        message, self._buffer = self._buffer[:size], self._buffer[size:]
        return message


def _text(field: bytes) -> str:
    """Read the NUL-terminated string at the start of `field`."""
    return field.split(b"\0", 1)[0].decode(errors="replace")
