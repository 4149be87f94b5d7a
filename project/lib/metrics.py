"""Figures for Prometheus: answers, refusals, events, hashes and connections, of a whole server.

Each process of a server counts in files of its own, in a directory that they share, and one of them
answers for all on METRICS_PORT. Without that port nothing is counted at all.
"""

import contextlib
import functools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import structlog
from flask import Flask
from sqlalchemy import Engine, event

P = ParamSpec("P")
T = TypeVar("T")

# The variable by which prometheus_client is told where the files are.
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
ROOM = 1 << 19  # bytes of a file: several times what every route, method and status take
RETRY_AFTER = 5  # seconds until a port that was taken is tried again
_PREFIX = "users-service-metrics-"

log = structlog.get_logger()


class Metrics(Protocol):
    """What is counted and timed."""

    def answer(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count an answer; `route` is the rule, or None where there is none.

        Both are labels, and no client may make up either.
        """

    def refusal(self, route: str | None, code: str) -> None:
        """Count an answer that has this code."""

    def event(self, kind: str, why: str) -> None:
        """Count an event of the audit trail."""

    def hash(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return `function`, that hashes: waiting from now on, and running when it is called."""

    def watch(self, engine: Engine, name: str, size: int) -> None:
        """Count what is taken from the pool of an engine, that has `size` connections."""


class Off:
    """Nothing is measured: what the tests, the commands, and servers without METRICS_PORT have."""

    def answer(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count nothing."""

    def refusal(self, route: str | None, code: str) -> None:
        """Count nothing."""

    def event(self, kind: str, why: str) -> None:
        """Count nothing."""

    def hash(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return `function`."""
        return function

    def watch(self, engine: Engine, name: str, size: int) -> None:
        """Watch nothing."""


class On:
    """Figures in files of `directory`; no other one can be used by this process later.

    Raises OSError when there is no room for them.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # What a process of the same id has counted stays; what it was doing when it ended does not.
        for kind, mode in {"counter": "ab", "histogram": "ab", "gauge_livesum": "wb"}.items():
            # A file that is found to have no room when it is written to ends the process.
            with (directory / f"{kind}_{os.getpid()}.db").open(mode) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, ROOM)
        os.environ[DIRECTORY] = str(directory)
        # It is when it is imported that it looks where the files are to be.
        from prometheus_client import Counter, Gauge, Histogram

        counter = functools.partial(Counter, registry=None)
        histogram = functools.partial(Histogram, buckets=BUCKETS, registry=None)
        gauge = functools.partial(Gauge, multiprocess_mode="livesum", registry=None)
        self._answers = counter(
            "users_http_requests", "Requests that were answered.", ["route", "method", "status"]
        )
        self._seconds = histogram(
            "users_http_request_seconds", "Time until the answer.", ["route", "method"]
        )
        self._refusals = counter(
            "users_refusals", "Answers that have a code, by it.", ["route", "code"]
        )
        self._events = counter(
            "users_events", "Events of the audit trail, by kind.", ["kind", "why"]
        )
        self._waiting = gauge("users_hashes_waiting", "Hashes that wait for a thread.")
        self._running = gauge("users_hashes_running", "Hashes that are being made.")
        self._hashing = histogram("users_hash_seconds", "Time of a hash, without the wait for it.")
        self._taken = gauge("users_pool_in_use", "Connections that are taken.", ["pool"])
        self._size = gauge("users_pool_size", "Connections that may be.", ["pool"])

    def answer(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count and time an answer."""
        self._answers.labels(_label(route), method, status).inc()
        self._seconds.labels(_label(route), method).observe(seconds)

    def refusal(self, route: str | None, code: str) -> None:
        """Count an answer that has this code."""
        self._refusals.labels(_label(route), code).inc()

    def event(self, kind: str, why: str) -> None:
        """Count an event."""
        self._events.labels(kind, why).inc()

    def hash(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return `function`, whose waiting and running is counted, and timed."""

        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            self._waiting.dec()
            with self._running.track_inprogress(), self._hashing.time():
                return function(*args, **kwargs)

        self._waiting.inc()
        return timed

    def watch(self, engine: Engine, name: str, size: int) -> None:
        """Count what is taken from the pool of an engine."""
        taken = self._taken.labels(name)
        self._size.labels(name).set(size)

        # A connection that cannot be made is given back without having been taken.
        def take(_connection: object, record: Any, _fairy: object) -> None:
            if not record.record_info.get("taken"):
                record.record_info["taken"] = True
                taken.inc()

        def give_back(_connection: object, record: Any) -> None:
            if record.record_info.pop("taken", False):
                taken.dec()

        event.listen(engine, "checkout", take)
        event.listen(engine, "checkin", give_back)


def _label(route: str | None) -> str:
    return route or "none"


def init_app(app: Flask) -> None:
    """Have `app` measured, if it has METRICS_PORT and the directory of a server.

    So the commands that run beside a server, with its settings, take no part in it.
    """
    app.extensions["metrics"] = Off()
    port, name = app.config["METRICS_PORT"], os.environ.get(DIRECTORY)
    if not (port and name):
        return
    directory = Path(name)
    try:
        app.extensions["metrics"] = On(directory)
    except OSError as error:
        log.error("metrics_unavailable", directory=name, reason=error.strerror)
        return
    host = os.environ.get("GRANIAN_HOST", "127.0.0.1")
    threading.Thread(
        target=_answer_for_all, args=(directory, host, port), name="metrics", daemon=True
    ).start()


def of(app: Flask) -> Metrics:
    """Return what measures `app`."""
    return cast(Metrics, app.extensions["metrics"])


def new_directory() -> Path:
    """Return a new directory for the processes of a server which this process becomes.

    It is theirs while one of them lives: they hold a lock on it. Those that nobody holds are
    removed, as servers that are no more have left them behind.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            _hold(old)
            shutil.rmtree(old)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    os.set_inheritable(_hold(directory), True)
    return directory


def _hold(path: Path) -> int:
    """Lock a file or directory for this process and its children; raises OSError if others do."""
    import fcntl  # which not every system has

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _answer_for_all(directory: Path, host: str, port: int) -> None:
    """Serve the figures of all processes; wait for as long as another process does."""
    import fcntl  # which not every system has

    from prometheus_client import CollectorRegistry, Metric, start_http_server
    from prometheus_client.multiprocess import MultiProcessCollector
    from prometheus_client.registry import Collector

    class OfTheLiving(Collector):
        def collect(self) -> Iterable[Metric]:
            _forget_the_dead(directory)
            everything: Any = MultiProcessCollector
            figures: Iterable[Metric] = everything(None, str(directory)).collect()
            return figures

    with (directory / "lock").open("w") as lock:
        # Whoever holds it is the one, until their process ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        registry = CollectorRegistry()
        registry.register(OfTheLiving())
        said = False
        while True:
            try:
                _, thread = start_http_server(port, host, registry)
            except OSError as error:
                if not said:
                    fields = {"host": host, "port": port, "reason": error.strerror}
                    log.error("metrics_port_unavailable", **fields)
                    said = True
                time.sleep(RETRY_AFTER)
            else:
                thread.join()


def _forget_the_dead(directory: Path) -> None:
    """Take what processes that are no more were doing for done; what they have counted stays."""
    for path in directory.glob("gauge_live*_*.db"):
        if not _is_alive(int(path.stem.rpartition("_")[2])):
            path.unlink(missing_ok=True)
