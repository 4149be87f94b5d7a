"""Bulkheads: how many requests may be in one part of the service at once, per process.

What floods one part leaves threads for the others.
"""

import threading

from flask import Flask, g

from project.errors import Busy

RETRY_AFTER = 1  # seconds


class Bulkhead:
    """So many places; whoever takes one has it until the request ends, or until they leave."""

    def __init__(self, places: int) -> None:
        self._places = threading.BoundedSemaphore(places)

    def enter(self, patience: float = 0.0) -> None:
        """Take a place for the present request; raises Busy when none is free in `patience` s."""
        if not self._places.acquire(timeout=patience):
            raise Busy(retry_after=RETRY_AFTER)
        g.setdefault("places", []).append(self._places)

    def leave(self) -> None:
        """Give back the place of the present request, if it has one."""
        taken = g.get("places", [])
        if self._places in taken:
            taken.remove(self._places)
            self._places.release()


def init_app(app: Flask) -> None:
    """Give places back when the requests of `app` end."""
    app.teardown_appcontext(_leave)


def _leave(_error: BaseException | None) -> None:
    for places in g.pop("places", ()):
        places.release()
