"""Capture what is logged; texts with which a client would forge log lines."""

import contextlib
import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import structlog

from project.lib import logs

# Each would start a line, key, color or writing direction in a log that does not escape it.
INJECTIONS = [
    '\n{"event": "FORGED", "level": "info"}',
    "\r\n[INFO] FORGED",
    " event=FORGED user_id=1",
    "' event='FORGED",
    '", "event": "FORGED',
    "\x1b[2K\x1b[1GFORGED",
    "\x9b31mFORGED",
    "\x7f\x08\x08FORGED",
    "\x85FORGED\x0b\x0c\x1c\x1d\x1e",
    "\u2028FORGED\u2029",
    "\u202eDEGROF\u2066\u200f\ufeff",
    "%s%n${jndi:ldap:FORGED}{0}",
    "\\nFORGED\\u000a",
    "FORGED\0",
]


@contextlib.contextmanager
def captured_log(*, readable: bool) -> Iterator[io.StringIO]:
    """Capture what is logged: one readable line per entry, or JSON."""
    lines = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.callback(logs.configure, readable=True)
        stack.enter_context(contextlib.redirect_stdout(lines))
        stack.enter_context(contextlib.redirect_stderr(lines))
        logs.configure(readable=readable)
        # structlog caches a used logger with its format, so each module's logger is replaced.
        for name, module in list(sys.modules.items()):
            if name.startswith("project.") and hasattr(module, "log"):
                stack.enter_context(mock.patch.object(module, "log", structlog.get_logger()))
        yield lines


@contextlib.contextmanager
def captured_output() -> Iterator[io.StringIO]:
    """Capture, as JSON and text, all that structlog, logging, stdout and stderr receive."""
    written = io.StringIO()
    logger = structlog.wrap_logger(
        structlog.PrintLogger(written), processors=[structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(written)
    with contextlib.ExitStack() as stack:
        # structlog caches a used logger with its output, so each module's logger is replaced.
        for name, module in list(sys.modules.items()):
            if name.startswith("project."):
                for attribute, value in list(vars(module).items()):
                    if isinstance(value, type(structlog.get_logger())):
                        stack.enter_context(mock.patch.object(module, attribute, logger))
        stack.enter_context(contextlib.redirect_stdout(written))
        stack.enter_context(contextlib.redirect_stderr(written))
        logging.getLogger().addHandler(handler)
        stack.callback(logging.getLogger().removeHandler, handler)
        yield written


def entries(written: str) -> list[dict[str, Any]]:
    """Return the entries of a JSON log, without those of the access log."""
    lines = [json.loads(line) for line in written.splitlines()]
    return [line for line in lines if line["event"] != "request"]
