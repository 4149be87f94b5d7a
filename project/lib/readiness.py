"""Readiness: whether a load balancer may send requests to this process.

A process is ready while its database answers, has the tables that this code works with, and is not
a standby. Load does not count: taking a slow server out of rotation makes the others slower. Nor
does a primary that an operator has made read-only: no other server could do more than this one.
Before a server stops, the operator creates DRAIN_FILE: it is then not ready, but serves on.

One thread examines the database, on a connection of its own. So readiness probes take no resources
from requests, are answered in time whatever the database does, and cost the same however many
there are.
"""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import structlog
from flask import Flask, current_app
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from project.errors import DatabaseNotMigrated, DatabaseUnavailable, Draining, ServiceError
from project.extensions import db
from project.lib import database
from project.lib.app_state import AppState

TIMEOUT = 0.8  # seconds to wait for an examination; a probe that waits 1 second gets the answer
FRESH = 0.5  # seconds for which a result is returned without another examination
LATE = 2.0  # seconds for which it is returned while the next examination is running
RETRY_AFTER = 1  # seconds

log = structlog.get_logger()

Obstacle = type[ServiceError] | None  # None: the process is ready


class Readiness:
    """The result of the last examination of a database, and the thread for the next one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._executor = ThreadPoolExecutor(1, "readiness")
        self._lock = threading.Lock()
        self._examination: Future[Obstacle] | None = None
        self._obstacle: Obstacle = None
        self._known_since = float("-inf")
        self._logged: Obstacle = None

    def obstacle(self) -> Obstacle:
        """Return the reason why the process is not ready, or None, after at most TIMEOUT seconds.

        While an examination is running, other probes get the last result if it is not older than
        LATE seconds. So a database that hangs blocks one thread of the server for all probes.
        """
        with self._lock:
            age = time.monotonic() - self._known_since
            running = self._examination is not None and not self._examination.done()
            if age <= (LATE if running else FRESH):
                return self._obstacle
            if self._examination is None or not running:
                self._examination = self._executor.submit(self._examine)
            examination = self._examination
        try:
            obstacle = examination.result(TIMEOUT)
        except TimeoutError:
            obstacle = DatabaseUnavailable
        with self._lock:
            self._obstacle, self._known_since = obstacle, time.monotonic()
        return obstacle

    def _examine(self) -> Obstacle:
        obstacle: Obstacle = None
        reason: dict[str, object] = {}
        try:
            schema = database.schema(self._engine)
            if schema not in database.USABLE:
                obstacle, reason = DatabaseNotMigrated, {"schema": schema.value}
            elif database.is_standby(self._engine):
                obstacle, reason = DatabaseUnavailable, {"standby": True}
        except SQLAlchemyError as error:
            obstacle = DatabaseUnavailable
            reason = {"error": type(error).__name__, "sqlstate": database.sqlstate(error)}
        if obstacle is not self._logged:  # log changes, not every probe
            self._logged = obstacle
            if obstacle:
                log.error("not_ready", code=obstacle.code, **reason)
            else:
                log.info("ready_again")
        return obstacle


_readiness = AppState[Readiness]("readiness")


def init_app(app: Flask) -> None:
    """Prepare the examination of the database of `app`; reads the migrations, once."""
    database.revisions()
    with app.app_context():
        _readiness.set(app, Readiness(db.engines[database.PROBE]))


def check() -> None:
    """Raise Draining, DatabaseUnavailable or DatabaseNotMigrated unless this process is ready."""
    drain_file: Path | None = current_app.config["DRAIN_FILE"]
    if drain_file and drain_file.exists():
        raise Draining(retry_after=RETRY_AFTER)
    if obstacle := _readiness.get().obstacle():
        raise obstacle(retry_after=RETRY_AFTER)
