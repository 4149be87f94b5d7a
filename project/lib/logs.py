"""The format of the log: JSON in production, readable lines elsewhere.

Log calls are never given a secret. What a client sent may be in a value, never in a key, and both
formats escape it: a client cannot forge a line, a key or a color.
"""

import contextlib
import json
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache
from typing import Any, TextIO, cast

import flask
import orjson
import structlog
from structlog.typing import EventDict

from project import clock

DEFERRED_FOR = 0.05  # seconds between two writes of the waiting lines
MAX_WAITING = 5_000  # lines of at most AT_ONCE bytes
END_TIMEOUT = 1.0  # seconds for the waiting lines when the process ends
# Several processes share the output: a pipe does not interleave writes of up to this size.
AT_ONCE = getattr(select, "PIPE_BUF", 4_096)  # bytes

log = structlog.get_logger()
_write_json: Callable[[str], None] | None = None  # None where `info` leaves the line to structlog
_count_lost: Callable[[int], None] | None = None


class Output:
    """A file for log lines; an error in writing them is ignored, so that requests are answered."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file  # None where the process has no such stream

    def write(self, text: str) -> None:
        """Write `text`, if possible."""
        with contextlib.suppress(OSError, ValueError):  # the other end, or the file, is closed
            if self._file:
                self._file.write(text)

    def flush(self) -> None:
        """Flush the file, if possible."""
        with contextlib.suppress(OSError, ValueError):
            if self._file:
                self._file.flush()


class DeferredOutput(Output):
    """A file whose lines a thread writes, many at once, every DEFERRED_FOR seconds.

    A write releases the interpreter lock, and getting the lock back costs a short request more
    than everything else. logging's QueueListener wakes its thread for each line and costs several
    times as much.

    A write blocks for as long as the output is a pipe that is full and that no process reads. When
    lines come faster than they can be written, the newest are dropped, and their number is logged
    when the output takes lines again. After the main thread has ended, the waiting lines have
    END_TIMEOUT seconds to be written; then the process ends without them.
    """

    def __init__(self, file: TextIO | None) -> None:
        super().__init__(file)
        self._lines: deque[str] = deque()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)
        self._reset()

    def write(self, text: str) -> None:
        """Hand `text` to the thread."""
        if len(self._lines) >= MAX_WAITING:
            self._lose(1)
            return
        self._lines.append(text)
        if self._writer is None:
            self._start()
        elif self._ended:  # a thread that outlives the main thread has logged
            self._write_waiting_lines()

    def flush(self) -> None:
        """Do nothing: the thread flushes."""

    def _reset(self) -> None:
        """Start anew in a forked process, which has neither the thread nor its lines to write."""
        self._lines.clear()
        self._lost = 0
        self._ended = False  # whether the thread has written its last line
        self._ending = threading.Event()  # the main thread has ended
        self._starting = threading.Lock()
        self._writer: threading.Thread | None = None

    def _start(self) -> None:
        with self._starting:
            if self._writer is None:
                # The interpreter does not wait for a daemon thread, which may block for ever.
                self._writer = threading.Thread(target=self._run, name="log", daemon=True)
                self._writer.start()
                threading.Thread(target=self._end, name="log-end", daemon=False).start()

    def _end(self) -> None:
        threading.main_thread().join()
        self._ending.set()
        cast(threading.Thread, self._writer).join(END_TIMEOUT)

    def _run(self) -> None:
        while not self._ending.wait(DEFERRED_FOR):
            self._write_waiting_lines()
        self._write_waiting_lines()
        self._ended = True

    def _write_waiting_lines(self) -> None:
        with contextlib.suppress(IndexError):  # two threads may write after the end
            while self._lines:
                chunk = self._lines.popleft()
                while self._lines and len(chunk) + len(self._lines[0]) <= AT_ONCE:
                    chunk += self._lines.popleft()
                if not self._write(chunk):
                    self._lose(chunk.count("\n"))
        if lost := self._lost:
            fields = {"event": "lines_lost", "level": "error", "lines": lost}
            if self._write(_to_json(_add_timestamp(None, "", fields)) + "\n"):
                self._lost -= lost

    def _write(self, chunk: str) -> bool:
        """Write whole lines, and return whether that was possible.

        They go to the descriptor: a write that blocks would lock the file, which the end of a
        process flushes.
        """
        try:
            return bool(self._file and os.write(self._file.fileno(), chunk.encode()))
        except (OSError, ValueError):  # the other end, or the file, is closed, or the disk is full
            return False

    def _lose(self, lines: int) -> None:
        self._lost += lines
        if _count_lost:
            _count_lost(lines)


@cache
def _deferred(file: TextIO | None) -> DeferredOutput:
    """Return the output for `file`: one, and so one thread, for all applications of the process."""
    return DeferredOutput(file)


def configure(
    *,
    readable: bool,
    file: TextIO | None = None,
    level: str = "INFO",
    deferred: bool = False,
) -> None:
    """Configure structlog for this process; lines go to `file`, by default to standard output.

    `level` is the name of the lowest level that is logged. A server has its lines `deferred`: see
    `DeferredOutput`.
    """
    global _write_json
    file = file or sys.stdout
    output = cast(TextIO, (_deferred if deferred else Output)(file))
    lowest = logging.getLevelNamesMapping()[level]
    direct = not readable and lowest <= logging.INFO
    _write_json = structlog.WriteLogger(output).msg if direct else None
    structlog.configure(
        processors=[
            _add_request,
            structlog.processors.add_log_level,
            _add_timestamp,
            # Without repr_native_str, escape sequences and text directions would be printed raw.
            structlog.dev.ConsoleRenderer(
                colors=bool(file and file.isatty()), sort_keys=False, repr_native_str=True
            )
            if readable
            else structlog.processors.JSONRenderer(_to_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(lowest),
        # WriteLogger writes a line in one call: the server's processes share the output.
        logger_factory=structlog.WriteLoggerFactory(output),
        cache_logger_on_first_use=True,
    )
    # SQLAlchemy logs statements and rows with its errors; it raises what matters as well.
    logging.getLogger("sqlalchemy").setLevel(logging.CRITICAL)
    logging.getLogger("granian.access").addFilter(_escape)


def count_lost(function: Callable[[int], None]) -> None:
    """Have `function` called with the number of lines of a server whenever some are lost."""
    global _count_lost
    _count_lost = function


def info(event: str, fields: EventDict) -> None:
    """Log `fields` under the name `event`, as `structlog.get_logger().info(event, **fields)` does.

    It is for the line of each request: JSON lines skip structlog's loggers and processors, which
    cost more than the rest of the line. `fields` has a `request_id`, and is changed.
    """
    if _write_json is None:
        log.info(event, **fields)
    else:
        now = clock.utcnow()
        # orjson would leave the microseconds out if they were 0.
        now = now if now.microsecond else now.replace(microsecond=1)
        fields["event"], fields["level"], fields["timestamp"] = event, "info", now
        _write_json(_to_json(fields))


def _add_timestamp(_logger: object, _method: str, fields: EventDict) -> EventDict:
    fields["timestamp"] = clock.utcnow().isoformat(timespec="microseconds")[:-6] + "Z"
    return fields


def _add_request(_logger: object, _method: str, fields: EventDict) -> EventDict:
    if "request_id" not in fields and flask.has_request_context():
        request = cast(Any, flask.request)
        fields["request_id"] = request.id
        if request.trace_id:
            fields["trace_id"] = request.trace_id
    return fields


def _to_json(fields: EventDict, **_: object) -> str:
    """Return `fields` as JSON in printable ASCII, shorter than AT_ONCE bytes.

    As long as the line is too long, the longest value loses its middle.
    """
    line = _dump(fields)
    while len(line) >= AT_ONCE:
        name, text = max(fields.items(), key=lambda field: len(str(field[1])))
        kept = len(str(text)) // 3
        fields[name] = f"{str(text)[:kept]} ... {str(text)[-kept:]}" if kept > 9 else ""
        line = _dump(fields)
    return line


def _dump(fields: EventDict) -> str:
    with contextlib.suppress(orjson.JSONEncodeError):
        line = orjson.dumps(fields, default=repr, option=orjson.OPT_UTC_Z).decode()
        if line.isascii() and "\x7f" not in line:  # orjson escapes the other control characters
            return line
    return json.dumps(fields, default=_to_text)


def _to_text(value: object) -> str:
    """Return a time as orjson writes it, and any other value as `repr` does."""
    return value.isoformat()[:-6] + "Z" if isinstance(value, datetime) else repr(value)


class GranianHandler(logging.StreamHandler[Any]):
    """Where Granian's own messages go (project/granian.json): to where all other lines go."""

    def __init__(self) -> None:
        """Write to the deferred standard output: a full pipe does not hold Granian either."""
        super().__init__(_deferred(sys.stdout))


class GranianFormatter(logging.Formatter):
    """The format of Granian's own messages (project/granian.json) and of migrations: JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message as JSON, without a stack trace."""
        fields = {"event": record.getMessage(), "level": record.levelname.lower()}
        return _to_json(_add_timestamp(None, "", fields | {"logger": record.name.strip("_")}))


class GranianFilter(logging.Filter):
    """Drop Granian's warnings that there are more threads or processes than cores.

    The defaults of GRANIAN_BLOCKING_THREADS and GRANIAN_WORKERS are meant so: most threads wait for
    the database, and of two processes one answers while the other is replaced.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a message."""
        return not record.getMessage().startswith(
            ("Configuration allows spawning up to ", "Configured number of workers ")
        )


def _escape(record: logging.LogRecord) -> bool:
    """Escape the values of Granian's access log (off by default), which it writes as they came."""
    if isinstance(record.args, Mapping):
        record.args = {
            name: json.dumps(value)[1:-1] if isinstance(value, str) else value
            for name, value in record.args.items()
        }
    return True
