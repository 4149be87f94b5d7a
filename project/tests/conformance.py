"""Whether an answer is one that the document of the API has."""

import re
from functools import cache
from typing import Any

import jsonschema_rs
from werkzeug.test import TestResponse

from project import create_app, db
from project.api import document

# What no path of the document is: the document itself, and its page.
TESTING = "project.config.TestingConfig"
_OUTSIDE = re.compile(r"/docs(/.*)?")
_ENVELOPE = {"status", "message", "code"}


class Conformance:
    """The document, ready to be asked."""

    def __init__(self, described: dict[str, Any]) -> None:
        self._components = described["components"]
        self._paths = {
            re.compile(re.sub(r"\\?\{\w+\\?\}", "[^/]+", re.escape(path))): operations
            for path, operations in described["paths"].items()
        }
        self._validators: dict[int, Any] = {}

    def complaint(self, method: str, path: str, response: TestResponse) -> str | None:
        """Say what the document lacks of this answer, or None."""
        if "X-Request-ID" not in response.headers:
            return f"{method} {path} without X-Request-ID"
        if _OUTSIDE.fullmatch(path):
            return None
        if response.content_type != "application/json" and response.status_code != 204:
            return f"{method} {path} answers in {response.content_type}"
        method = "GET" if method == "HEAD" else method
        operations = self._operations(path)
        if method == "OPTIONS" and (operations or response.status_code == 204):
            return None if response.status_code in {200, 204, 403} else "no answer to OPTIONS"
        operation = operations.get(method.lower())
        if operation is None:
            # 400: what is no HTTP, 403: what came in the clear, 500: a mistake before any view.
            expected = {405 if operations else 404, 400, 403, 500}
            if response.status_code not in expected:
                return f"{method} {path} is no route, and the answer {response.status_code}"
            if response.request.method != "HEAD" and not set(response.get_json()) >= _ENVELOPE:
                return f"{method} {path} is no route, and the answer {response.get_json()}"
            return None
        documented = operation["responses"].get(str(response.status_code))
        if documented is None:
            return f"{method} {path}: the document has no {response.status_code}"
        return self._misshapen(documented, response)

    def _operations(self, path: str) -> dict[str, Any]:
        fitting = [ones for pattern, ones in self._paths.items() if pattern.fullmatch(path)]
        return {method: one for ones in fitting for method, one in ones.items()}

    def _misshapen(self, documented: dict[str, Any], response: TestResponse) -> str | None:
        lacking = set(documented.get("headers", ())) - set(response.headers.keys()) - {"Link"}
        if lacking:
            return f"{response.status_code} without {lacking}"
        if response.request.method == "HEAD":
            return None
        schema = documented["content"]["application/json"]["schema"]
        validator = self._validators.get(id(schema))
        if validator is None:
            whole = {**schema, "components": self._components}
            validator = jsonschema_rs.Draft202012Validator(whole)
            self._validators[id(schema)] = validator
        for error in validator.iter_errors(response.get_json()):
            return f"{response.status_code}: {error.message[:300]} at {error.instance_path}"
        return None


@cache
def conformance() -> Conformance:
    """Return the conformance to the document, which is the same in every application."""
    app = create_app(TESTING)
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()
    return Conformance(document.describe(app))
