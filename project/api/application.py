"""The Flask application class of the service."""

import time
from collections.abc import Callable
from typing import Any

import flask
from flask import Flask, Request
from flask.sessions import NullSession, SessionInterface
from flask.typing import ResponseReturnValue
from flask_openapi3 import OpenAPI
from sqlalchemy.exc import DBAPIError
from werkzeug.routing import MapAdapter

from project.api import access_log, error_handlers, openapi, requests
from project.api.responses import OrjsonProvider, Response
from project.extensions import db
from project.lib import database, postgresql

REPEATED_WITHIN = 1.0  # seconds from the call of a view


class NoSession(SessionInterface):
    """Disable Flask's session cookie; authentication uses tokens."""

    def open_session(self, app: Flask, request: Request) -> NullSession:
        """Return an empty session that is never saved."""
        return self.make_null_session(app)


class UsersService(OpenAPI):
    """A Flask application whose requests and responses are JSON."""

    request_class = requests.Request
    response_class = Response
    json_provider_class = OrjsonProvider
    session_interface = NoSession()

    def __init__(self, import_name: str) -> None:
        """Create an application without routes, configuration or static files."""
        super().__init__(
            import_name,
            info=openapi.INFO,
            security_schemes=openapi.SECURITY_SCHEMES,
            static_folder=None,
            doc_ui=False,
            validation_error_callback=error_handlers.raise_invalid_payload,
        )
        self.url_map.merge_slashes = False

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Return the adapter that matches the path of `request`, whatever its Host header says."""
        if request is None:
            return None
        return MapAdapter(
            self.url_map,
            server_name="",
            script_name=request.root_path,
            subdomain="",
            url_scheme=request.scheme,
            path_info=request.path,
            default_method=request.method,
        )

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Return `func`; no view is async, and Flask's check would cost time in every request."""
        return func

    def preprocess_request(self) -> ResponseReturnValue | None:
        """Call the guards, within the time that a request may wait for PostgreSQL."""
        postgresql.begin_request()
        return super().preprocess_request()

    def dispatch_request(self) -> ResponseReturnValue:
        """Return the response of the requested view, which is called again where that is safe.

        `database.is_repeatable` says where. The guards are not called again, and the body is kept.
        A request that has taken longer than REPEATED_WITHIN is repeated only if prepared statements
        were lost, which costs no time: otherwise its 503 would come too late.
        """
        began_at = time.monotonic()
        try:
            return super().dispatch_request()
        except DBAPIError as error:
            in_time = time.monotonic() - began_at < REPEATED_WITHIN or database.is_unprepared(error)
            if not (in_time and database.is_repeatable(error)):
                raise
        db.session.rollback()
        return super().dispatch_request()

    def finalize_request(self, rv: Any, from_error_handler: bool = False) -> flask.Response:
        """Return the return value of a view or an error handler as a response, and log it.

        Differs from Flask's method in two ways: the response is recorded in the access log, and an
        error raised here after another error is logged without its text.
        """
        response = self.make_response(rv)
        try:
            response = self.process_response(response)
        except Exception as error:
            if not from_error_handler:
                raise
            error_handlers.log_unhandled(error)
        access_log.record(self, flask.request._get_current_object(), response)  # type: ignore[attr-defined]
        return response

    def log_exception(self, exc_info: tuple[Any, ...]) -> None:
        """Log an error raised outside of a view; Flask would log the path and text unredacted."""
        error_handlers.log_unhandled(exc_info[1])
