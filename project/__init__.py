"""A service for user accounts and token authentication."""

import os
from importlib import import_module

from project.accounts import mails, rate_limits
from project.api import cors, docs, error_handlers, guards, https, rate_limit_headers, requests
from project.api.application import UsersService
from project.api.auth import auth_blueprint
from project.api.health import health_blueprint
from project.api.oauth import oauth_blueprint
from project.api.users import users_blueprint
from project.config import DEFAULT_SETTINGS, SERVICE_NAME, VERSION, BaseConfig
from project.errors import ConfigurationError
from project.extensions import bcrypt, db, migrate
from project.lib import bulkhead, database, forwarded, hashing, logs, metrics, readiness
from project.mail import outbox, rendering, sender
from project.tokens import signing_keys

__all__ = ["UsersService", "bcrypt", "create_app", "create_server", "db", "migrate"]


def create_app(settings: str | None = None) -> UsersService:
    """Return the application, configured by the settings class at the dotted path `settings`.

    Without an argument, APP_SETTINGS names the class. Raises ConfigurationError, with a message of
    one line, if a setting is missing or invalid.
    """
    config = _config_class(settings or os.environ.get("APP_SETTINGS") or DEFAULT_SETTINGS)
    app = UsersService(__name__)
    app.config.from_object(config.from_environment())
    if hops := app.config["TRUSTED_PROXIES"]:
        # Flask documents wsgi_app as replaceable; mypy sees a method.
        app.wsgi_app = forwarded.trust_proxies(app.wsgi_app, hops)  # type: ignore[assignment,method-assign]
    readable = app.debug or app.testing
    logs.configure(readable=readable, level=app.config["LOG_LEVEL"], deferred=not readable)
    metrics.init_app(app, namespace="users", version=VERSION)
    logs.count_lost(metrics.of(app).lost_lines)
    database.init_app(app, application_name=SERVICE_NAME)
    readiness.init_app(app)
    bulkhead.init_app(app)
    hashing.init_app(app)
    rate_limits.init_app(app)
    rendering.init_app(app)
    outbox.init_app(app)
    signing_keys.init_app(app)
    requests.init_app(app)
    error_handlers.init_app(app)
    https.init_app(app)
    cors.init_app(app)
    rate_limit_headers.init_app(app)
    app.before_request(guards.run_guards)
    app.register_api(auth_blueprint)
    app.register_api(health_blueprint)
    app.register_api(users_blueprint)
    if app.config["ISSUER"]:
        app.register_api(oauth_blueprint)
    docs.init_app(app)
    return app


def create_server() -> UsersService:
    """Return the application for a server, which also sends the emails unless MAIL_SENDER is off.

    They are sent by a thread of the process that calls this.
    """
    app = create_app()
    if app.config["MAIL_SENDER"]:
        sender.start(app, mails.compose)
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
