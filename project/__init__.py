"""The users service: who somebody is, and the token that says so."""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import flask
from flask import Flask, Request
from flask.sessions import NullSession, SessionInterface
from flask_openapi3 import Info, OpenAPI
from werkzeug.routing import MapAdapter

from project import bulkhead, database, logs, metrics, passwords, proxies, ratelimit, readiness
from project.api import access, browsers, document, error_handlers, guards, requests
from project.api.auth import auth_blueprint
from project.api.health import health_blueprint
from project.api.responses import OrjsonProvider, Response
from project.api.users import users_blueprint
from project.config import DEFAULT_SETTINGS, BaseConfig
from project.errors import ConfigurationError
from project.extensions import bcrypt, db, migrate

__all__ = ["bcrypt", "create_app", "db", "migrate"]


class NoSession(SessionInterface):
    """Flask's session cookie, which this service has no use for."""

    def open_session(self, app: Flask, request: Request) -> NullSession:
        """Return a session that holds nothing and is never written."""
        return self.make_null_session(app)


class UsersService(OpenAPI):
    """Flask, with requests and answers that are JSON and nothing else."""

    request_class = requests.Request
    response_class = Response
    json_provider_class = OrjsonProvider
    session_interface = NoSession()

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Return what finds the route for `request`: by its path, under whatever host it came."""
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
        """Return `func` itself: nothing here is async, and asking costs every request."""
        return func

    def finalize_request(self, rv: Any, from_error_handler: bool = False) -> flask.Response:
        """Return what a view or an error handler answered, as a response that is recorded.

        As Flask's own, which writes what fails here after another failure raw into the log.
        """
        response = self.make_response(rv)
        try:
            response = self.process_response(response)
        except Exception as error:
            if not from_error_handler:
                raise
            error_handlers.log_unforeseen(error)
        access.record(self, flask.request._get_current_object(), response)  # type: ignore[attr-defined]
        return response

    def log_exception(self, exc_info: tuple[Any, ...]) -> None:
        """Log what was raised outside of any view as all else: Flask writes path and text raw."""
        error_handlers.log_unforeseen(exc_info[1])


def create_app(settings: str | None = None) -> UsersService:
    """Return the service, configured by the class that `settings` names.

    Without an argument the variable APP_SETTINGS names it. Raises ConfigurationError, in one
    line, when a setting is missing or wrong.
    """
    config = _config_class(settings or os.environ.get("APP_SETTINGS") or DEFAULT_SETTINGS)
    app = UsersService(
        __name__,
        info=Info(title=document.TITLE, version=document.VERSION),
        static_folder=None,
        doc_ui=False,
        validation_error_callback=error_handlers.refuse_invalid,
    )
    app.config.from_object(config.from_environment())
    app.url_map.merge_slashes = False
    if hops := app.config["TRUSTED_PROXIES"]:
        # Flask means it to be replaced; mypy takes it for a method like any other.
        app.wsgi_app = proxies.believe(app.wsgi_app, hops)  # type: ignore[assignment,method-assign]
    human = app.debug or app.testing
    logs.configure(readable=human, deferred=not human)
    metrics.init_app(app)
    database.init_app(app)
    readiness.init_app(app)
    bulkhead.init_app(app)
    passwords.init_app(app)
    ratelimit.init_app(app)
    requests.init_app(app)
    error_handlers.init_app(app)
    browsers.init_app(app)
    app.before_request(guards.speak_first)
    app.register_api(health_blueprint)
    app.register_api(users_blueprint)
    app.register_api(auth_blueprint)
    document.init_app(app)
    return app


def _config_class(path: str) -> type[BaseConfig]:
    """Return the settings class at a dotted path; raises ConfigurationError."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError):
        found = None
    if not (isinstance(found, type) and issubclass(found, BaseConfig)):
        raise ConfigurationError(
            f"Configuration error: APP_SETTINGS={path!r}: there is no such settings class"
        )
    return found
