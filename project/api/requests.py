"""How a request is read, before any view or schema sees it."""

from typing import Any

import flask
import orjson

from project.errors import InvalidPayload


class Request(flask.Request):
    """A request whose body is a JSON object sent as application/json, or nothing."""

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        """Return the object in the body; raises InvalidPayload for anything else.

        The arguments are Flask's and change nothing: no caller gets round this. A body over
        MAX_CONTENT_LENGTH is Werkzeug's RequestEntityTooLarge, whatever is in it.
        """
        data = self.get_data()
        if self.mimetype != "application/json":
            raise InvalidPayload(errors={"body": "must be sent as application/json"})
        try:
            body = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise InvalidPayload(errors={"body": "must be JSON in UTF-8"}) from None
        if not isinstance(body, dict):
            raise InvalidPayload(errors={"body": "must be a JSON object"})
        return body
