"""The disconnection of clients that stall in the middle of a body."""

import contextlib
import os
import socket
import unittest
from pathlib import Path
from unittest import mock

from project.lib import slow_clients


class TestDisconnection(unittest.TestCase):
    """Connections of this process, one of which is silent."""

    def setUp(self) -> None:
        """Connect to a port of this process."""
        listener = self.enterContext(socket.create_server(("127.0.0.1", 0)))
        self.port = listener.getsockname()[1]
        self.client = self.enterContext(socket.create_connection(listener.getsockname()))
        self.client.setblocking(False)
        self.accepted = self.enterContext(listener.accept()[0])
        self.enterContext(mock.patch.object(slow_clients, "_watch"))

    def is_disconnected(self) -> bool:
        """Return whether the client has been disconnected."""
        with contextlib.suppress(BlockingIOError):
            return self.client.recv(1) == b""
        return False

    def test_silent(self) -> None:
        """Only a client of the port that is silent for longer than the timeout is disconnected."""
        longest = -1  # seconds: any silence is longer
        slow_clients.disconnect_stalled(self.port, longest)
        self.assertFalse(self.is_disconnected(), "no thread is reading a body")
        with slow_clients.reading(self.port, longest):
            slow_clients.disconnect_stalled(self.port, 50)
            self.assertFalse(self.is_disconnected(), "it has sent something just now")
            slow_clients.disconnect_stalled(self.port + 1, longest)
            self.assertFalse(self.is_disconnected(), "it is connected to another port")
            slow_clients.disconnect_stalled(self.port, longest)
            self.assertTrue(self.is_disconnected())

    def test_descriptors(self) -> None:
        """Looking for such clients leaves no descriptor open, of a socket or of another kind."""
        for descriptor in os.pipe():
            self.addCleanup(os.close, descriptor)
        before = sorted(Path("/proc/self/fd").iterdir())
        with slow_clients.reading(self.port, -1):
            for _ in range(3):
                slow_clients.disconnect_stalled(self.port + 1, -1)

        self.assertEqual(before, sorted(Path("/proc/self/fd").iterdir()))
