"""The request class, the limits on concurrent requests with a body, and the origin of a request.

The first guard of a view with a body is `reserve_hash_slot` or `reserve_body_slot`. They limit how
many threads read bodies at once.
"""

import random
import re
import time
from typing import Any, cast
from urllib.parse import parse_qsl

import flask
import orjson
from flask import Flask, current_app
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.utils import cached_property
from werkzeug.wsgi import get_input_stream

from project.accounts import audit
from project.api import responses
from project.errors import Busy, InvalidPayload
from project.lib import addresses, hashing, slow_clients
from project.lib.app_state import AppState
from project.lib.bulkhead import Bulkhead
from project.mail import rendering
from project.models import MAX_REQUEST_ID, MAX_STORED_USER_AGENT

PROBES = {"/ping", "/health/live", "/health/ready"}  # what load balancers and orchestrators ask
BODY_SLOT_TIMEOUT = 0.1  # seconds to wait for a slot to read a body
# JWTs, complete or truncated, with plain or percent-encoded dots; and bcrypt hashes.
_SECRET = re.compile(
    r"eyJ[\w-]+(\.|%2e)[\w-]+((\.|%2e)[\w-]*)?|\$2[abxy]\$[\w./$-]*", re.ASCII | re.IGNORECASE
)
FORM = "application/x-www-form-urlencoded"
_MAX_LOGGED_PATH = 256  # characters
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._=+/:-]{{1,{MAX_REQUEST_ID}}}")
# W3C Trace Context, 3.2: version, trace ID, parent ID, flags. A later version may add fields.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}((?<!^00.{53})-.*)?"
)

_body_bulkhead = AppState[Bulkhead]("body_bulkhead")


class Request(flask.Request):
    """A request whose body, if any, is a JSON object sent as application/json.

    On the routes of `reserve_form_slot` it is a form instead, and on those of
    `reserve_optional_body_slot` no body is an empty object. On those of `reserve_hash_slot` the
    request gets a slot to hash once the body is read.
    """

    hashes = False
    takes_form = False
    body_is_optional = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Record when the request began, for the access log and the metrics."""
        self.began_at = time.perf_counter()
        super().__init__(*args, **kwargs)

    @cached_property
    def id(self) -> str:
        """Return the request ID: the X-Request-ID header if it is valid, or a random one."""
        # Faster than self.headers, and every request gets here.
        given: str = self.environ.get("HTTP_X_REQUEST_ID", "")
        if _REQUEST_ID.fullmatch(given) and not _SECRET.search(given):
            return given
        # The ID is no secret; reading the kernel's randomness would release the GIL.
        return f"{random.getrandbits(128):032x}"  # nosec B311

    @cached_property
    def trace_id(self) -> str | None:
        """Return the ID of the trace in the header traceparent, or None if it is not valid."""
        parent = _TRACEPARENT.fullmatch(self.environ.get("HTTP_TRACEPARENT", ""))
        return parent[1] if parent else None

    @property
    def redacted_path(self) -> str:
        """Return the path for the log, truncated and with secrets redacted."""
        return redact(self.path)[:_MAX_LOGGED_PATH]

    @cached_property
    def args(self) -> MultiDict[str, str]:
        """Return the query parameters; raises InvalidPayload if they are not UTF-8."""
        try:
            return super().args
        except UnicodeDecodeError:
            raise InvalidPayload(errors={"query": "must be UTF-8"}) from None

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        """Return the object in the body, or the form; raises InvalidPayload for anything else.

        The arguments are Flask's and have no effect, so no caller can bypass the checks. Raises
        Werkzeug's RequestEntityTooLarge for a body over MAX_CONTENT_LENGTH, whatever it contains,
        and Busy if there is no slot to hash.
        """
        body = self._body
        if self.takes_form:
            return self._form(body)
        if self.body_is_optional and not body:
            return {}
        if self.mimetype != "application/json":
            raise InvalidPayload(errors={"body": "must be sent as application/json"})
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise InvalidPayload(errors={"body": "must be JSON in UTF-8"}) from None
        if not isinstance(value, dict):
            raise InvalidPayload(errors={"body": "must be a JSON object"})
        return value

    def _form(self, body: bytes) -> dict[str, str]:
        """Return the parameters of a form (RFC 6749, appendix B), without those that are empty."""
        if self.mimetype != FORM:
            raise InvalidPayload(errors={"body": f"must be sent as {FORM}"})
        try:
            pairs = parse_qsl(body.decode("ascii"), errors="strict")
        except ValueError:
            raise InvalidPayload(errors={"body": "must be form-encoded UTF-8"}) from None
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise InvalidPayload(errors={"body": "has a parameter more than once"})
        return fields

    @cached_property
    def _body(self) -> bytes:
        limit: int = current_app.config["MAX_CONTENT_LENGTH"]
        # One byte over the limit shows that a body of undeclared length is too long; a declared
        # length over the limit is refused without reading.
        stream = get_input_stream(self.environ, max_content_length=limit + 1)
        port, timeout = int(self.environ["SERVER_PORT"]), current_app.config["BODY_TIMEOUT"]
        try:
            with slow_clients.reading(port, timeout):
                body = stream.read()
        finally:
            _body_bulkhead.get().leave()
        if len(body) > limit:
            raise RequestEntityTooLarge
        if self.hashes:
            hashing.reserve_slot()
        return body


def init_app(app: Flask) -> None:
    """Limit the threads that read bodies to twice the number of requests in work."""
    _body_bulkhead.set(app, Bulkhead(2 * app.config["GRANIAN_BLOCKING_THREADS"]))


@responses.raises(Busy)
def reserve_hash_slot() -> None:
    """Reserve a slot like `reserve_body_slot`, for a view that hashes a password.

    Reading the body exchanges it for a slot to hash (`hashing.reserve_slot`): a client that stalls
    in the middle of its body keeps no other client from hashing. Also raises Busy if there is no
    slot to hash at present.
    """
    hashing.check_slot()
    cast(Request, flask.request).hashes = True
    reserve_body_slot()


@responses.raises(Busy)
def reserve_body_slot() -> None:
    """Reserve a slot to read a body, which is released as soon as the body is read.

    Raises Busy if none becomes free within BODY_SLOT_TIMEOUT.
    """
    _body_bulkhead.get().enter(BODY_SLOT_TIMEOUT)


@responses.raises(Busy)
def reserve_form_slot() -> None:
    """Reserve a slot like `reserve_body_slot`, for a view whose body is a form."""
    cast(Request, flask.request).takes_form = True
    reserve_body_slot()


@responses.raises(Busy)
def reserve_optional_body_slot() -> None:
    """Reserve a slot like `reserve_body_slot`, for a view that may be called without a body."""
    cast(Request, flask.request).body_is_optional = True
    reserve_body_slot()


def redact(text: str) -> str:
    """Return `text` with everything that looks like a token or a hash replaced."""
    return _SECRET.sub("[secret]", text)


def origin() -> audit.Origin:
    """Return the origin of the current request, for the audit log, sessions and emails.

    The user agent is truncated, with secrets redacted and unprintable characters replaced. The
    language is one of those that there are templates of emails in.
    """
    user_agent = flask.request.user_agent.string[:MAX_STORED_USER_AGENT]
    printable = "".join(char if char.isprintable() else "?" for char in user_agent)
    caller = flask.g.get("user")
    languages = rendering.languages()
    accepted = flask.request.accept_languages.best_match(languages) if languages[1:] else None
    return audit.Origin(
        addresses.parse(flask.request.remote_addr or ""),
        redact(printable),
        cast(Request, flask.request).id,
        caller.id if caller else None,
        accepted or languages[0],
        cast(Request, flask.request).trace_id,
    )
