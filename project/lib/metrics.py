"""Prometheus metrics of a whole server: requests, errors, audit events, hashes, connections.

Each server process counts in its own files, in a directory that the processes share
(prometheus_client's multiprocess mode). One of them serves the metrics of all on METRICS_PORT.
Without that setting nothing is counted.
"""

import contextlib
import functools
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import structlog
from flask import Flask
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from sqlalchemy import Engine, event

from project.lib.app_state import AppState

P = ParamSpec("P")
T = TypeVar("T")

# The variable that switches prometheus_client to multiprocess mode; it is read at import.
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
# Several times what all routes, methods and statuses need.
FILE_SIZE = 1 << 19  # bytes
RETRY_AFTER = 5  # seconds before the next attempt to listen on a port that is in use

log = structlog.get_logger()


class NullMetrics:
    """The metrics of tests, commands, and servers without METRICS_PORT: nothing is counted."""

    def answer(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count and time a response; `route` is the URL rule, or None if none matched.

        Both `method` and `route` become labels, so neither may be a text that a client made up.
        """

    def refusal(self, route: str | None, code: str) -> None:
        """Count a response with an error code."""

    def event(self, kind: str, why: str) -> None:
        """Count an event of the audit log."""

    def lost_lines(self, lines: int) -> None:
        """Count lines of the log that could not be written."""

    def hash(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return `function`, counted as waiting from now on, and as running while it is called."""
        return function

    def watch(self, engine: Engine, name: str, size: int) -> None:
        """Count the connections in use of the pool of `engine`, which has `size` connections."""

    def read_at_scrape(
        self, read: Callable[[], Mapping[str, float]], documentation: Mapping[str, str]
    ) -> None:
        """Show gauges whose values `read` returns by name; those that it leaves out are not known.

        They are values of the whole service and not of one process. `read` is called at each
        scrape, by the process that answers it, and must not raise. `documentation` is by name too.
        """


class PrometheusMetrics(NullMetrics):
    """Metrics in files of `directory`, each name beginning with `namespace`.

    Raises OSError when there is no room for the files.
    """

    def __init__(self, directory: Path, namespace: str) -> None:
        self.read_gauges = ReadGaugesCollector(namespace)
        directory.mkdir(parents=True, exist_ok=True)
        _lock(directory)
        # An earlier process may have had the same ID. Its counters stay, its gauges go.
        mark_process_dead(os.getpid(), directory)
        for kind in ("counter", "histogram", "gauge_livesum"):
            # prometheus_client makes sparse files: writing to one on a full disk is a SIGBUS.
            with (directory / f"{kind}_{os.getpid()}.db").open("ab") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, FILE_SIZE)

        counter = functools.partial(Counter, namespace=namespace, registry=None)
        histogram = functools.partial(
            Histogram, namespace=namespace, buckets=BUCKETS, registry=None
        )
        gauge = functools.partial(
            Gauge, namespace=namespace, multiprocess_mode="livesum", registry=None
        )
        self._requests = counter(
            "http_requests", "Requests that were answered.", ["route", "method", "status"]
        )
        self._request_seconds = histogram(
            "http_request_seconds", "Time until the answer.", ["route", "method"]
        )
        self._refusals = counter("refusals", "Answers with an error code.", ["route", "code"])
        self._events = counter("events", "Events of the audit log.", ["kind", "why"])
        self._lost_lines = counter("log_lines_lost", "Lines of the log that were not written.")
        self._hashes_waiting = gauge("hashes_waiting", "Hashes that wait for a thread.")
        self._hashes_running = gauge("hashes_running", "Hashes that are being computed.")
        self._hash_seconds = histogram("hash_seconds", "Time of a hash, without the wait for it.")
        self._pool_in_use = gauge("pool_in_use", "Database connections in use.", ["pool"])
        self._pool_size = gauge("pool_size", "Limit of database connections.", ["pool"])

    def answer(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count and time a response."""
        self._requests.labels(_label(route), method, status).inc()
        self._request_seconds.labels(_label(route), method).observe(seconds)

    def refusal(self, route: str | None, code: str) -> None:
        """Count a response with an error code."""
        self._refusals.labels(_label(route), code).inc()

    def event(self, kind: str, why: str) -> None:
        """Count an event."""
        self._events.labels(kind, why).inc()

    def lost_lines(self, lines: int) -> None:
        """Count lines of the log."""
        self._lost_lines.inc(lines)

    def hash(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return `function`, counted while it waits and runs, and timed."""

        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            self._hashes_waiting.dec()
            with self._hashes_running.track_inprogress(), self._hash_seconds.time():
                return function(*args, **kwargs)

        self._hashes_waiting.inc()
        return timed

    def watch(self, engine: Engine, name: str, size: int) -> None:
        """Count the connections in use of a pool; multiprocess mode has no Gauge.set_function."""
        in_use = self._pool_in_use.labels(name)
        self._pool_size.labels(name).set(size)

        # A connection that could not be opened is checked in without a checkout.
        def count_checkout(_connection: object, record: Any, _fairy: object) -> None:
            if not record.record_info.get("in_use"):
                record.record_info["in_use"] = True
                in_use.inc()

        def count_checkin(_connection: object, record: Any) -> None:
            if record.record_info.pop("in_use", False):
                in_use.dec()

        event.listen(engine, "checkout", count_checkout)
        event.listen(engine, "checkin", count_checkin)

    def read_at_scrape(
        self, read: Callable[[], Mapping[str, float]], documentation: Mapping[str, str]
    ) -> None:
        """Show gauges that `read` returns."""
        self.read_gauges.add(read, documentation)


_metrics = AppState[NullMetrics]("metrics")


def _label(route: str | None) -> str:
    return route or "none"


def init_app(app: Flask, *, namespace: str, version: str) -> None:
    """Measure `app` if METRICS_PORT is set and its process has the directory of a server.

    A command that runs beside a server, with the same settings, has no such directory. The name
    of each metric begins with `namespace`, except those of processes. `version` is that of the
    service.
    """
    _metrics.set(app, NullMetrics())
    port, name = app.config["METRICS_PORT"], os.environ.get(DIRECTORY)
    if not (port and name):
        return
    directory = Path(name)
    try:
        made = PrometheusMetrics(directory, namespace)
    except OSError as error:
        log.error("metrics_unavailable", directory=name, reason=error.strerror)
        return
    _metrics.set(app, made)
    build = InfoMetricFamily(
        f"{namespace}_build",
        "The version of the service, and of Python.",
        {"version": version, "python": platform.python_version()},
    )
    running = RunningCollector(directory, build)
    collectors = LiveProcessCollector(directory), running, made.read_gauges
    host = os.environ.get("GRANIAN_HOST", "127.0.0.1")
    threading.Thread(
        target=_serve, args=(directory, host, port, collectors), name="metrics", daemon=True
    ).start()


def of(app: Flask) -> NullMetrics:
    """Return the metrics of `app`."""
    return _metrics.get(app)


def new_directory(prefix: str) -> Path:
    """Return a new directory for the processes of the server that this process becomes.

    Its name begins with `prefix`. Each process holds a lock on it for as long as it lives.
    Directories with the same prefix that are not locked are left over and are removed.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            _lock(old, exclusive=True)
            shutil.rmtree(old)
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    os.set_inheritable(_lock(directory), True)
    return directory


def _lock(path: Path, *, exclusive: bool = False) -> int:
    """Lock a directory for this process and its children; return the descriptor with the lock.

    Raises OSError if another process holds a lock that excludes this one.
    """
    import fcntl  # missing on Windows

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class LiveProcessCollector(Collector):
    """prometheus_client's MultiProcessCollector, without the gauges of processes that have ended.

    prometheus_client wants the parent process to remove them, and Granian's has no hook for that.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of all processes together."""
        for path in self._directory.glob("gauge_live*_*.db"):
            pid = int(path.stem.rpartition("_")[2])
            # The process runs under another account, or another scrape has removed the file.
            with contextlib.suppress(PermissionError, FileNotFoundError):
                try:
                    os.kill(pid, 0)  # sends nothing
                except ProcessLookupError:
                    mark_process_dead(pid, self._directory)
        metrics: Iterable[Metric] = MultiProcessCollector(None, self._directory).collect()
        return metrics


class RunningCollector(Collector):
    """What runs: the build, and prometheus_client's process_* of each process, by `pid`.

    Metrics of single processes cannot be added up: processes share memory, and a sum of their CPU
    times falls when one ends.
    """

    def __init__(self, directory: Path, build: Metric) -> None:
        self._directory = directory
        self._build = build

    def collect(self) -> Iterable[Metric]:
        """Return the build, and the metrics of each process that counts in the directory."""
        metrics = {self._build.name: self._build}
        for path in self._directory.glob("gauge_livesum_*.db"):
            pid = path.stem.rpartition("_")[2]
            for one in ProcessCollector(pid=functools.partial(str, pid), registry=None).collect():
                every = metrics.setdefault(one.name, Metric(one.name, one.documentation, one.type))
                for sample in one.samples:
                    every.add_sample(sample.name, {"pid": pid}, sample.value)
        return metrics.values()


class ReadGaugesCollector(Collector):
    """Gauges that are read when Prometheus asks for them."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._sources: list[tuple[Callable[[], Mapping[str, float]], Mapping[str, str]]] = []

    def add(
        self, read: Callable[[], Mapping[str, float]], documentation: Mapping[str, str]
    ) -> None:
        """Add gauges; see `NullMetrics.read_at_scrape`."""
        self._sources.append((read, documentation))

    def collect(self) -> Iterable[Metric]:
        """Return the gauges with their present values."""
        for read, documentation in self._sources:
            for name, value in read().items():
                yield GaugeMetricFamily(f"{self._namespace}_{name}", documentation[name], value)


def _serve(directory: Path, host: str, port: int, collectors: Iterable[Collector]) -> None:
    """Serve the metrics of all processes, as soon as no other process does."""
    import fcntl  # missing on Windows

    with (directory / "lock").open("w") as lock:
        # The kernel releases the lock when the process that holds it ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        registry = CollectorRegistry()
        for collector in collectors:
            registry.register(collector)
        logged = False
        while True:
            try:
                _, thread = start_http_server(port, host, registry)
            except OSError as error:
                if not logged:
                    fields = {"host": host, "port": port, "reason": error.strerror}
                    log.error("metrics_port_unavailable", **fields)
                    logged = True
                time.sleep(RETRY_AFTER)
            else:
                thread.join()
