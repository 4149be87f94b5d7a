"""How a request is read, before any view or schema sees it.

A WSGI server hands over a thread as soon as it has the headers, and reading a body that its client
never finishes blocks that thread for as long as the client likes. So a view with a body names
`take_turn` or `take_place` as its first guard: only so many are let in, and silent ones are hung up
on.
"""

import contextlib
import math
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import flask
import orjson
from flask import Flask, current_app
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.utils import cached_property
from werkzeug.wsgi import get_input_stream

from project import addresses, audit, passwords
from project.api import answers
from project.api.models import MAX_REQUEST_ID, MAX_STORED_USER_AGENT
from project.bulkhead import Bulkhead
from project.errors import Busy, InvalidPayload

BODY_PATIENCE = 0.1  # seconds to wait for a place to read a body
_TCP_INFO_LAST_DATA_RECV = slice(52, 56)  # milliseconds; struct tcp_info in linux/tcp.h
# A JWT, or the most of one, also where its dots were encoded; and bcrypt's hashes.
_SECRET = re.compile(
    r"eyJ[\w-]+(\.|%2e)[\w-]+((\.|%2e)[\w-]*)?|\$2[abxy]\$[\w./$-]*", re.ASCII | re.IGNORECASE
)
_SHOWN_PATH = 256  # characters of a path that are logged
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._=+/:-]{{1,{MAX_REQUEST_ID}}}")

_reading_since: dict[int, float] = {}  # by thread: when it began to read a body


class Request(flask.Request):
    """A request whose body is a JSON object sent as application/json, or nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the time, and what Flask gives."""
        self.began_at = time.perf_counter()
        super().__init__(*args, **kwargs)

    @cached_property
    def id(self) -> str:
        """Return what this request is called: by X-Request-ID if that is sane, or by chance."""
        given = self.headers.get("X-Request-ID", "")
        if _REQUEST_ID.fullmatch(given) and not _SECRET.search(given):
            return given
        # It is no secret. To ask the kernel would give the interpreter to another thread.
        return f"{random.getrandbits(128):032x}"  # nosec B311

    @property
    def shown_path(self) -> str:
        """Return the path as it may be logged: its start, and no secret that stands in it."""
        return without_secrets(self.path)[:_SHOWN_PATH]

    @cached_property
    def args(self) -> MultiDict[str, str]:
        """Return the query; raises InvalidPayload where its bytes are not even text."""
        try:
            return super().args
        except UnicodeDecodeError:
            raise InvalidPayload(errors={"query": "must be UTF-8"}) from None

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        """Return the object in the body; raises InvalidPayload for anything else.

        The arguments are Flask's and change nothing: no caller gets round this. A body over
        MAX_CONTENT_LENGTH is Werkzeug's RequestEntityTooLarge, whatever is in it.
        """
        body = self._read()
        if self.mimetype != "application/json":
            raise InvalidPayload(errors={"body": "must be sent as application/json"})
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise InvalidPayload(errors={"body": "must be JSON in UTF-8"}) from None
        if not isinstance(value, dict):
            raise InvalidPayload(errors={"body": "must be a JSON object"})
        return value

    def _read(self) -> bytes:
        limit: int = current_app.config["MAX_CONTENT_LENGTH"]
        # One byte more shows that the body goes on; a longer declared length is refused unread.
        stream = get_input_stream(self.environ, max_content_length=limit + 1)
        _reading_since[threading.get_ident()] = time.monotonic()
        try:
            body = stream.read()
        finally:
            del _reading_since[threading.get_ident()]
            _body_bulkhead().leave()
        if len(body) > limit:
            raise RequestEntityTooLarge
        return body


def init_app(app: Flask) -> None:
    """Let only a quarter of the server's threads read bodies that lead to no hash."""
    app.extensions["body_bulkhead"] = Bulkhead(max(1, app.config["GRANIAN_BLOCKING_THREADS"] // 4))


def _body_bulkhead() -> Bulkhead:
    return cast(Bulkhead, current_app.extensions["body_bulkhead"])


@answers.raises(Busy)
def take_turn() -> None:
    """Take a place at the gate in front of bcrypt (`passwords.take_turn`) before the body is read.

    Raises Busy when there is none; the places may then be held by clients that fell silent in the
    middle of a body, and those are hung up on.
    """
    _enter(passwords.take_turn)


@answers.raises(Busy)
def take_place() -> None:
    """As `take_turn`, for a view that hashes nothing: the place is for the reading alone.

    Most bodies have come by the time they are asked for, so a place is free again in no time.
    """
    _enter(partial(_body_bulkhead().enter, BODY_PATIENCE))


def _enter(enter: Callable[[], None]) -> None:
    try:
        enter()
    except Busy:
        silence: int = current_app.config["BODY_TIMEOUT"]
        if time.monotonic() - min(_reading_since.copy().values(), default=math.inf) > silence:
            _hang_up_on_the_silent(int(flask.request.environ["SERVER_PORT"]), silence)
        raise


def _hang_up_on_the_silent(port: int, silence: int) -> None:
    """Shut down this process's connections to `port` that have sent nothing for so many seconds.

    The server tells nobody which connection a request came on, and has no deadline for bodies; an
    idle keep-alive connection that goes too is opened again by its client. Only Linux lets a
    process look.
    """
    for path in Path("/proc/self/fd").glob("*"):
        with (
            contextlib.suppress(OSError),
            socket.fromfd(int(path.name), socket.AF_INET, socket.SOCK_STREAM) as line,
        ):
            info = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            silent_for = int.from_bytes(info[_TCP_INFO_LAST_DATA_RECV], sys.byteorder)
            if line.getsockname()[1] == port and silent_for > silence * 1000:
                line.shutdown(socket.SHUT_RDWR)


def without_secrets(text: str) -> str:
    """Return `text` without what looks like a token, the start of one, or a hash."""
    return _SECRET.sub("[secret]", text)


def origin() -> audit.Origin:
    """Return where this request comes from: what we know, and the start of what the client says."""
    user_agent = "".join(
        character if character.isprintable() else "?"
        for character in flask.request.user_agent.string[:MAX_STORED_USER_AGENT]
    )
    user_agent = without_secrets(user_agent)
    caller = flask.g.get("user")
    return audit.Origin(
        addresses.parse(flask.request.remote_addr or ""),
        user_agent,
        cast(Request, flask.request).id,
        caller.id if caller else None,
    )
