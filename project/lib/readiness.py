"""Readiness: whether requests may be sent to this process, for those who ask it all the time.

It is ready while its database answers and has the tables that this code works with. How busy it is
has no part in that: a server that is taken out for being slow makes the others slower.

One thread asks the database, on a connection that no request needs. So the answer takes nothing
from requests, comes in time whatever the database does, and costs the same for any number who ask.
"""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import structlog
from flask import Flask, current_app
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from project import database
from project.errors import DatabaseNotMigrated, DatabaseUnavailable, ServiceError
from project.extensions import db

TIMEOUT = 0.8  # seconds for an examination: who waits for one second still gets the answer
FRESH = 0.5  # seconds for which all are told what one examination found
LATE = 2.0  # seconds for which they are, while the next one is under way
RETRY_AFTER = 1  # seconds

log = structlog.get_logger()

Obstacle = type[ServiceError] | None  # what is in the way


class Readiness:
    """What the last examination of a database found, and the thread that makes the next."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._executor = ThreadPoolExecutor(1, "readiness")
        self._lock = threading.Lock()
        self._examination: Future[Obstacle] | None = None
        self._obstacle: Obstacle = None
        self._known_since = float("-inf")
        self._logged: Obstacle = None

    def obstacle(self) -> Obstacle:
        """Return what is in the way, after at most TIMEOUT seconds.

        Where it has been known a moment ago nobody waits but the one who has it examined anew:
        while the database hangs, who asks for readiness holds one thread of the server.
        """
        with self._lock:
            age = time.monotonic() - self._known_since
            under_way = self._examination is not None and not self._examination.done()
            if age <= (LATE if under_way else FRESH):
                return self._obstacle
            if self._examination is None or not under_way:
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
        except SQLAlchemyError as error:
            state = getattr(getattr(error, "orig", None), "pgcode", None)
            obstacle = DatabaseUnavailable
            reason = {"error": type(error).__name__, "sqlstate": state}
        if obstacle is not self._logged:  # once, not at every probe
            self._logged = obstacle
            if obstacle:
                log.error("not_ready", code=obstacle.code, **reason)
            else:
                log.info("ready_again")
        return obstacle


def init_app(app: Flask) -> None:
    """Give `app` somebody who examines its database; the migrations are read here, once."""
    database.revisions()
    with app.app_context():
        app.extensions["readiness"] = Readiness(db.engines[database.PROBE])


def check() -> None:
    """Raise DatabaseUnavailable or DatabaseNotMigrated unless this process is ready."""
    readiness = cast(Readiness, current_app.extensions["readiness"])
    if obstacle := readiness.obstacle():
        raise obstacle(retry_after=RETRY_AFTER)
