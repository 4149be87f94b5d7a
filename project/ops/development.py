"""The commands for development: runserver, and recreate_db and seed_db, which refuse production."""

import sys
from typing import Any

import flask_migrate
from flask import Flask, current_app
from flask_script_ng import Option, Server
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.serving import WSGIRequestHandler, is_running_from_reloader

from project.accounts import mails, registration
from project.errors import EmailExists, InvalidPayload
from project.extensions import db
from project.lib import database
from project.mail import sender
from project.ops.command_line import ORIGIN

LESSON_USERS = (
    ("michael", "michael@realpython.com"),
    ("michaelherman", "michael@mherman.org"),
)


class QuietRequestHandler(WSGIRequestHandler):
    """A request of the development server; its line in the log is the service's access log."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log nothing."""


class Runserver(Server):  # type: ignore[misc]  # Flask-Script-NG has no types
    """Serve with Flask's development server, and send the emails."""

    name = "runserver"

    def __init__(self) -> None:
        """Serve with threads, and without a debugger and a reloader unless they are asked for."""
        super().__init__(
            use_debugger=False,
            use_reloader=False,
            threaded=True,
            request_handler=QuietRequestHandler,
        )

    def get_options(self) -> list[Option]:
        """Return the options of Flask-Script-NG, where -h is help instead of the host."""
        options: list[Option] = super().get_options()
        for option in options:
            option.args = [arg for arg in option.args if arg != "-h"]
        return options

    def __call__(
        self, app: Flask, host: str, port: int, use_reloader: bool, ssl_crt: str | None, **rest: Any
    ) -> None:
        """Print what a developer has to know, then serve.

        With the reloader, this process starts another one, again and again, which serves.
        """
        if not is_running_from_reloader():
            if app.config["API_DOCS"]:
                scheme = "https" if ssl_crt else "http"
                print(f" * The API document: {scheme}://{host}:{port}/docs", flush=True)
            _report_database(app)
        if app.config["MAIL_SENDER"] and (is_running_from_reloader() or not use_reloader):
            sender.start(app, mails.compose)
        super().__call__(app, host, port, use_reloader=use_reloader, ssl_crt=ssl_crt, **rest)


def _report_database(app: Flask) -> None:
    """Print in one line why requests will be refused, if the database cannot be used."""
    with app.app_context():
        try:
            engine = db.engines[database.PROBE]
            schema, standby = database.schema(engine), database.is_standby(engine)
        except SQLAlchemyError as error:
            print(f" * The database cannot be used: {database.describe(error)}", flush=True)
        else:
            if schema not in database.USABLE:
                print(" * Migrations are missing: python manage.py db upgrade", flush=True)
            if standby:
                print(" * The database is a standby, which refuses writes.", flush=True)


def recreate_db() -> None:
    """Empty the database: run every migration down, then up again."""
    _refuse_in_production("recreate_db")
    flask_migrate.downgrade(revision="base")
    flask_migrate.upgrade()


def seed_db() -> None:
    """Add the two users of the lesson, unless they exist."""
    _refuse_in_production("seed_db")
    for username, email in LESSON_USERS:
        try:
            registration.add(username, email, "test", ORIGIN)
            db.session.commit()
        except (EmailExists, InvalidPayload):
            db.session.rollback()


def _refuse_in_production(command: str) -> None:
    """End the command unless the settings are for development or testing."""
    if not current_app.debug:
        sys.exit(f"{command} is for development and testing; these settings are neither.")
