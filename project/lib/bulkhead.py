"""Bulkheads: limits on the number of requests in one part of the service at once, per process.

A flood of requests to one part leaves threads for the others.
"""

import threading

from flask import Flask, g

from project.errors import Busy

RETRY_AFTER = 1  # seconds


class Bulkhead:
    """A number of slots; a request keeps the one it takes until it leaves or ends."""

    def __init__(self, slots: int) -> None:
        self._slots = threading.BoundedSemaphore(slots)

    def enter(self, timeout: float = 0.0) -> None:
        """Take a slot for the current request.

        Raises Busy when none becomes free within `timeout` seconds.
        """
        if not self._slots.acquire(timeout=timeout):
            raise Busy(retry_after=RETRY_AFTER)
        g.setdefault("slots", []).append(self._slots)

    def leave(self) -> None:
        """Give back the slot of the current request, if it has one."""
        taken = g.get("slots", [])
        if self._slots in taken:
            taken.remove(self._slots)
            self._slots.release()


def init_app(app: Flask) -> None:
    """Give back the slots of a request of `app` when it ends."""
    app.teardown_appcontext(_leave)


def _leave(_error: BaseException | None) -> None:
    for slots in g.pop("slots", ()):
        slots.release()
