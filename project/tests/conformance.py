"""Check responses against the API document, more strictly than a client may.

The document lets responses gain members and change messages. Here a response must have exactly
the documented members, and an error exactly the status, message and code of an example.
"""

import os
import re
from functools import cache
from typing import Any
from unittest import mock

import jsonschema_rs
from werkzeug.test import TestResponse

from project import create_app, db
from project.api import openapi

TESTING = "project.config.TestingConfig"
_UNDOCUMENTED = re.compile(r"/docs(/.*)?")  # the document itself, and its page
_ENVELOPE = {"status", "message", "code"}


class Conformance:
    """The API document, compiled for checks of responses."""

    def __init__(self, described: dict[str, Any]) -> None:
        self._components = _closed(described["components"])
        self._paths = {
            re.compile(re.sub(r"\\?\{\w+\\?\}", "[^/]+", re.escape(path))): operations
            for path, operations in described["paths"].items()
        }
        self._validators: dict[int, Any] = {}

    def complaint(self, method: str, path: str, response: TestResponse) -> str | None:
        """Return how a response differs from the document, or None."""
        if "X-Request-ID" not in response.headers:
            return f"{method} {path} without X-Request-ID"
        if _UNDOCUMENTED.fullmatch(path):
            return None
        if response.content_type != "application/json" and response.status_code not in {204, 304}:
            return f"{method} {path} answers in {response.content_type}"
        if (method, response.status_code) == ("HEAD", 405):
            return None if "Allow" in response.headers else "405 without Allow"
        method = "GET" if method == "HEAD" else method
        operations = self._operations(path)
        if method == "OPTIONS" and (operations or response.status_code == 204):
            return None if response.status_code in {200, 204, 403} else "no answer to OPTIONS"
        operation = operations.get(method.lower())
        if operation is None:
            # 400: invalid HTTP; 403: plain HTTP; 500: an error before any view.
            expected = {405 if operations else 404, 400, 403, 500}
            if response.status_code not in expected:
                return f"{method} {path} is no route, and the answer {response.status_code}"
            if response.request.method != "HEAD" and not set(response.get_json()) >= _ENVELOPE:
                return f"{method} {path} is no route, and the answer {response.get_json()}"
            return None
        documented = operation["responses"].get(str(response.status_code))
        if documented is None:
            return f"{method} {path}: the document has no {response.status_code}"
        return self._mismatch(documented, response)

    def _operations(self, path: str) -> dict[str, Any]:
        matching = [item for pattern, item in self._paths.items() if pattern.fullmatch(path)]
        return {method: operation for item in matching for method, operation in item.items()}

    def _mismatch(self, documented: dict[str, Any], response: TestResponse) -> str | None:
        missing = set(documented.get("headers", ())) - set(response.headers.keys()) - {"Link"}
        if missing:
            return f"{response.status_code} without {missing}"
        if response.request.method == "HEAD" or "content" not in documented:
            return "a body" if response.data else None
        content = documented["content"]["application/json"]
        if unlike_examples := self._wrong_error(content.get("examples"), response.get_json()):
            return unlike_examples
        schema = content["schema"]
        validator = self._validators.get(id(schema))
        if validator is None:
            schema_with_components = {**schema, "components": self._components}
            validator = jsonschema_rs.Draft202012Validator(schema_with_components)
            self._validators[id(schema)] = validator
        for error in validator.iter_errors(response.get_json()):
            return f"{response.status_code}: {error.message[:300]} at {error.instance_path}"
        return None

    def _wrong_error(self, examples: dict[str, Any] | None, answer: Any) -> str | None:
        """Return how an error differs from all examples, which only errors have, or None."""
        if examples is None:
            return None
        exact = [{name: each["value"][name] for name in _ENVELOPE} for each in examples.values()]
        envelope = {name: answer.get(name) for name in _ENVELOPE}
        return None if envelope in exact else f"{envelope} is none of {exact}"


def _closed(part: Any) -> Any:
    """Return a part of the document whose objects have no other members than the documented."""
    if isinstance(part, list):
        return [_closed(each) for each in part]
    if not isinstance(part, dict):
        return part
    closed = {key: _closed(value) for key, value in part.items()}
    if part.get("type") == "object" and "properties" in part:
        closed.setdefault("additionalProperties", False)
    return closed


@cache
def conformance() -> Conformance:
    """Return the check against the document for settings with which every response can occur."""
    with mock.patch.dict(os.environ, ISSUER="https://users.example"):
        app = create_app(TESTING)
    app.config["EMAIL_VERIFICATION"] = "required"
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()
    return Conformance(openapi.describe(app))
