"""What the log looks like: JSON for machines in production, one readable line elsewhere.

Nothing secret is ever handed to a log call: no password, no hash, no token. What a client sent may
be in a value, never in a key: both forms escape it, so that no line, key or color is forged.
"""

import contextlib
import json
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Mapping
from functools import cache
from typing import Any, TextIO, cast

import flask
import orjson
import structlog
from structlog.typing import EventDict

from project import clock

DEFERRED_FOR = 0.05  # seconds that a line may wait
MAX_WAITING = 5_000  # lines, of AT_ONCE bytes at most
# Pipes keep apart what several processes write at once when it is no longer than this.
AT_ONCE = getattr(select, "PIPE_BUF", 4_096)  # bytes


class Output:
    """A file for lines; where nobody takes them requests are answered still."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file  # None where the process has no such stream

    def write(self, text: str) -> None:
        """Write `text`, if that can be done."""
        with contextlib.suppress(OSError, ValueError):  # gone, or closed
            if self._file:
                self._file.write(text)

    def flush(self) -> None:
        """Pass on what was written, if that can be done."""
        with contextlib.suppress(OSError, ValueError):
            if self._file:
                self._file.flush()


class DeferredOutput(Output):
    """A file whose lines are written by a thread, many at once and soon after.

    To write gives the interpreter to another thread, and getting it back costs a short request more
    than all else. The thread outlives the main one for as long as it takes to write the rest. When
    lines come faster than somebody takes them the newest are lost, and it is said how many.
    """

    def __init__(self, file: TextIO | None) -> None:
        super().__init__(file)
        self._lines: deque[str] = deque()
        self._lost = 0
        self._starting = threading.Lock()
        self._writer: threading.Thread | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._be_new)

    def write(self, text: str) -> None:
        """Have `text` written."""
        if len(self._lines) >= MAX_WAITING:
            self._lost += 1
            return
        self._lines.append(text)
        if self._writer is None:
            self._start()

    def flush(self) -> None:
        """Leave it to the thread."""

    def _start(self) -> None:
        with self._starting:
            if self._writer is None:
                self._writer = threading.Thread(target=self._run, name="log", daemon=False)
                self._writer.start()

    def _be_new(self) -> None:
        self._writer = None
        self._starting = threading.Lock()
        self._lines.clear()

    def _run(self) -> None:
        main = threading.main_thread()
        is_over = False
        while not is_over:
            main.join(DEFERRED_FOR)
            is_over = not main.is_alive()
            self._drain()

    def _drain(self) -> None:
        while self._lines:
            chunk = self._lines.popleft()
            while self._lines and len(chunk) + len(self._lines[0]) <= AT_ONCE:
                chunk += self._lines.popleft()
            super().write(chunk)
            super().flush()
        if self._lost:
            lost, self._lost = self._lost, 0
            super().write(
                json.dumps({"event": "lines_lost", "level": "error", "lines": lost}) + "\n"
            )
            super().flush()


@cache
def _deferred(file: TextIO | None) -> DeferredOutput:
    """Return the one there is for a file, and so one thread, however many applications."""
    return DeferredOutput(file)


def configure(
    *,
    readable: bool,
    file: TextIO | None = None,
    level: int = logging.INFO,
    deferred: bool = False,
) -> None:
    """Set up structlog for this process; lines go to `file`, or to standard output.

    `deferred` is for a server: `DeferredOutput`.
    """
    file = file or sys.stdout
    output = (_deferred if deferred else Output)(file)
    structlog.configure(
        processors=[
            _name_request,
            structlog.processors.add_log_level,
            _say_when,
            # By itself the readable one lets escape sequences and directions through.
            structlog.dev.ConsoleRenderer(
                colors=bool(file and file.isatty()), sort_keys=False, repr_native_str=True
            )
            if readable
            else structlog.processors.JSONRenderer(_to_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # One write a line: the server's processes share the output.
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, output)),
        cache_logger_on_first_use=True,
    )
    # SQLAlchemy's own complaints quote statements and rows; what matters of them is raised too.
    logging.getLogger("sqlalchemy").setLevel(logging.CRITICAL)
    logging.getLogger("granian.access").addFilter(_escape)


def _say_when(_logger: object, _method: str, fields: EventDict) -> EventDict:
    fields["timestamp"] = clock.utcnow().isoformat(timespec="microseconds")[:-6] + "Z"
    return fields


def _to_json(fields: EventDict, **_: object) -> str:
    """Return `fields` as JSON in printable ASCII, in less than AT_ONCE bytes.

    Where they are more the longest text loses its middle, again and again.
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
        line = orjson.dumps(fields, default=repr).decode()
        if line.isascii() and line.isprintable():  # as most are
            return line
    return json.dumps(fields, default=repr)


class ServersFormatter(logging.Formatter):
    """What the server itself says, for project/granian.json: a line like every other."""

    def format(self, record: logging.LogRecord) -> str:
        """Return what was said as JSON, without a stack."""
        fields = {"event": record.getMessage(), "level": record.levelname.lower()}
        return _to_json(_say_when(None, "", fields | {"logger": record.name.strip("_")}))


def _name_request(_logger: object, _method: str, fields: EventDict) -> EventDict:
    """Say in which request it happens, if it is in one."""
    if "request_id" not in fields and flask.has_request_context():
        fields["request_id"] = cast(Any, flask.request).id
    return fields


def _escape(record: logging.LogRecord) -> bool:
    """Escape what the server's access log (which is off unless it is asked for) writes raw."""
    if isinstance(record.args, Mapping):
        record.args = {
            name: json.dumps(value)[1:-1] if isinstance(value, str) else value
            for name, value in record.args.items()
        }
    return True
