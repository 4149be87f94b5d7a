"""How a request is read, before any view or schema sees it."""

from typing import Any

import flask
import orjson
from flask import current_app
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.wsgi import get_input_stream

from project.errors import InvalidPayload


class Request(flask.Request):
    """A request whose body is a JSON object sent as application/json, or nothing.

    A WSGI server hands over a thread as soon as it has the headers, and reading a body that its
    client never finishes blocks that thread for as long as the client likes. So a view with a
    body names a guard that lets only so many in (see `passwords.take_turn`).
    """

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
        body = get_input_stream(self.environ, max_content_length=limit + 1).read()
        if len(body) > limit:
            raise RequestEntityTooLarge
        return body
