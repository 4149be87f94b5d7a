"""How a request is read, before any view or schema sees it."""

import threading
from typing import Any, cast

import flask
import orjson
from flask import Flask, current_app
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.wsgi import get_input_stream

from project.errors import Busy, InvalidPayload

PATIENCE = 0.05  # seconds to wait for a place; an honest body takes far less
RETRY_AFTER = 1  # seconds


class Request(flask.Request):
    """A request whose body is a JSON object sent as application/json, or nothing."""

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        """Return the object in the body; raises InvalidPayload for anything else.

        The arguments are Flask's and change nothing: no caller gets round this. A body over
        MAX_CONTENT_LENGTH is Werkzeug's RequestEntityTooLarge, whatever is in it.
        """
        body = cast(BodyReader, current_app.extensions["body_reader"]).read(self)
        if self.mimetype != "application/json":
            raise InvalidPayload(errors={"body": "must be sent as application/json"})
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise InvalidPayload(errors={"body": "must be JSON in UTF-8"}) from None
        if not isinstance(value, dict):
            raise InvalidPayload(errors={"body": "must be a JSON object"})
        return value


class BodyReader:
    """Reads bodies, only so many at once.

    A WSGI server hands over a thread as soon as it has the headers, and reading a body that its
    client never finishes blocks that thread for as long as the client likes. Those who read hold
    at most a quarter of the threads, whatever clients do.
    """

    def __init__(self, *, threads: int) -> None:
        self._places = threading.BoundedSemaphore(max(1, threads // 4))

    def read(self, request: Request) -> bytes:
        """Return the body; raises Busy, or RequestEntityTooLarge over MAX_CONTENT_LENGTH."""
        limit: int = current_app.config["MAX_CONTENT_LENGTH"]
        # One byte more shows that the body goes on; a longer declared length is refused unread.
        stream = get_input_stream(request.environ, max_content_length=limit + 1)
        if not self._places.acquire(timeout=PATIENCE):
            raise Busy(retry_after=RETRY_AFTER)
        try:
            body = stream.read()
        finally:
            self._places.release()
        if len(body) > limit:
            raise RequestEntityTooLarge
        return body


def init_app(app: Flask) -> None:
    """Give `app` the reader of its bodies."""
    app.extensions["body_reader"] = BodyReader(threads=app.config["GRANIAN_BLOCKING_THREADS"])
