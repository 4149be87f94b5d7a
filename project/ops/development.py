"""The commands for development and testing: recreate_db and seed_db. Both refuse production."""

import sys

import flask_migrate
from flask import current_app

from project.accounts import registration
from project.errors import EmailExists, InvalidPayload
from project.extensions import db
from project.ops.command_line import ORIGIN

LESSON_USERS = (
    ("michael", "michael@realpython.com"),
    ("michaelherman", "michael@mherman.org"),
)


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
