"""The command line of the users service: python manage.py COMMAND."""

import getpass
import logging
import os
import subprocess
import sys
import unittest
import warnings
from collections.abc import Iterable
from pathlib import Path

import flask_migrate
import flask_migrate.cli
from flask import current_app
from flask_script_ng import Command, Manager, Server, Shell
from jwt.warnings import InsecureKeyLengthWarning
from pydantic import ValidationError
from sqlalchemy.exc import OperationalError, ProgrammingError

from project import UsersService, accounts, create_app, db, diagnosis, ratelimit, sessions
from project.api import schemas
from project.api.models import User
from project.errors import (
    ConfigurationError,
    EmailExists,
    InvalidPayload,
    ServiceError,
    UserNotFound,
)

ROOT = Path(__file__).resolve().parent
TESTS = ROOT / "project" / "tests"
TEST_COMMANDS = {"test", "cov"}


def application() -> UsersService:
    """Return the service that APP_SETTINGS names; tests are always the testing one."""
    testing = sys.argv[1:2] and sys.argv[1] in TEST_COMMANDS
    try:
        return create_app("project.config.TestingConfig" if testing else None)
    except ConfigurationError as error:
        if sys.argv[1:2] == ["check"]:
            sys.exit(report(diagnosis.refused(error)))
        raise


manager = Manager(application, description=__doc__)
manager.add_command("runserver", Server(use_debugger=False, use_reloader=False, threaded=True))
manager.add_command(
    "shell", Shell(make_context=lambda: {"app": current_app, "db": db, "User": User})
)


class Test(Command):
    """Run the tests; every warning is an error."""

    name = "test"

    def __call__(self, app: UsersService) -> int:
        """Return the exit code: 0 when tests ran and all of them passed."""
        warnings.simplefilter("error")
        # Under test any key will do, the lesson's short one too.
        warnings.simplefilter("ignore", InsecureKeyLengthWarning)
        tests = unittest.defaultTestLoader.discover(str(TESTS), top_level_dir=str(ROOT))
        result = unittest.TextTestRunner(buffer=True).run(tests)
        return 0 if result.testsRun and result.wasSuccessful() else 1


class Cov(Command):
    """Run the tests with branch coverage: a table, and htmlcov/."""

    name = "cov"

    def __call__(self, app: UsersService) -> int:
        """Return the exit code: 0 when all passed and enough of the code was reached."""
        coverage = [sys.executable, "-m", "coverage"]
        failed = subprocess.call([*coverage, "run", str(ROOT / "manage.py"), "test"], cwd=ROOT)
        subprocess.check_call([*coverage, "combine", "--quiet"], cwd=ROOT)
        subprocess.check_call([*coverage, "html", "--quiet", "--fail-under=0"], cwd=ROOT)
        return subprocess.call([*coverage, "report"], cwd=ROOT) or failed


class Db(Command):
    """Migrate the database: Flask-Migrate's own commands (db upgrade, db migrate ...)."""

    name = "db"
    capture_all_args = True
    help_args = ()

    def run(self, arguments: list[str]) -> None:
        """Hand the arguments on; ends with Flask-Migrate's exit code."""
        logging.basicConfig(format="%(message)s")
        logging.getLogger("alembic").setLevel(logging.INFO)
        flask_migrate.cli.db.main(arguments, prog_name="manage.py db")


for command in (Test, Cov, Db):
    manager.add_command(command)


@manager.command
def serve() -> None:
    """Migrate the database, then serve with Granian, as in production.

    Granian's own variables (GRANIAN_HOST, GRANIAN_PORT ...) say the rest.
    """
    flask_migrate.upgrade()
    db.engine.dispose()
    settings = {
        "GRANIAN_PORT": "5000",
        "GRANIAN_HTTP": "1",
        "GRANIAN_WORKERS": str(current_app.config["GRANIAN_WORKERS"]),
        "GRANIAN_BLOCKING_THREADS": str(current_app.config["GRANIAN_BLOCKING_THREADS"]),
        "GRANIAN_RESPAWN_FAILED_WORKERS": "true",
        "GRANIAN_WORKERS_KILL_TIMEOUT": "20",  # seconds for requests in flight to finish
    }
    command = [sys.executable, "-m", "granian", "--interface", "wsgi", "--factory"]
    os.execve(sys.executable, [*command, "project:create_app"], settings | os.environ)


def refuse_in_production(what: str) -> None:
    """End the command unless the settings are for development or testing."""
    if not current_app.debug:
        sys.exit(f"{what} is for development and testing; these settings are neither.")


@manager.command
def recreate_db() -> None:
    """Empty the database: every migration down, and up again."""
    refuse_in_production("recreate_db")
    flask_migrate.downgrade(revision="base")
    flask_migrate.upgrade()


@manager.command
def seed_db() -> None:
    """Add the two users of the lesson, where they are not there yet."""
    refuse_in_production("seed_db")
    for username, email in (
        ("michael", "michael@realpython.com"),
        ("michaelherman", "michael@mherman.org"),
    ):
        try:
            accounts.add(username, email, "test")
            db.session.commit()
        except (EmailExists, InvalidPayload):
            db.session.rollback()


@manager.command
def check() -> int:
    """Say what is wrong with the settings, the database and the clock, before they go live."""
    return report(diagnosis.examine(current_app))


def report(findings: Iterable[diagnosis.Finding]) -> int:
    """Print findings as they come; return the exit code, 1 when something is wrong."""
    wrong = 0
    for finding in findings:
        print(finding, flush=True)
        wrong += finding.verdict is diagnosis.Verdict.WRONG
    print(f"\nWrong: {wrong}." if wrong else "\nNothing is wrong.")
    return 1 if wrong else 0


@manager.command
def create_admin(username: str, email: str) -> None:
    """Add an admin; ask for the password, or read a line of standard input."""
    if sys.stdin.isatty():
        password = getpass.getpass("Password: ")
    else:
        password = sys.stdin.readline().rstrip("\n")
    try:
        new = schemas.NewUser(username=username, email=email, password=password)
        accounts.add(new.username, new.email, new.password, admin=True)
    except ValidationError as error:
        sys.exit(describe(schemas.refuse(error)))
    except ServiceError as error:
        sys.exit(describe(error))
    db.session.commit()
    print(f"{new.email} is an admin.")


@manager.command
def deactivate(email: str) -> None:
    """Take a user's access away, and end their sessions."""
    _set_active(email, False)
    print(f"{email} is deactivated.")


@manager.command
def activate(email: str) -> None:
    """Give a deactivated user their access back; they log in anew."""
    _set_active(email, True)
    print(f"{email} is active.")


def _set_active(email: str, active: bool) -> None:
    try:
        accounts.set_active(email.lower(), active)
    except UserNotFound:
        sys.exit(f"There is no user with the email {email}.")
    db.session.commit()


@manager.command
def end_sessions(email: str) -> None:
    """End all sessions of a user."""
    try:
        ended = sessions.end_all(accounts.find_by_email(email.lower()))
    except UserNotFound:
        sys.exit(f"There is no user with the email {email}.")
    db.session.commit()
    print(f"Sessions of {email} ended: {ended}.")


@manager.command
def purge() -> None:
    """Delete the sessions whose time is over, a few at a time, and counts that are out of date."""
    purged = 0
    while deleted := sessions.delete_expired():
        db.session.commit()
        purged += deleted
    counts = ratelimit.delete_expired()
    db.session.commit()
    print(f"Expired sessions deleted: {purged}; counts of attempts: {counts}.")


def describe(error: ServiceError) -> str:
    """Return a refusal as one line."""
    reasons = "; ".join(f"{field} {reason}" for field, reason in (error.errors or {}).items())
    return f"{error.message} {reasons}".strip()


if __name__ == "__main__":
    try:
        manager.run()
    except (OperationalError, ProgrammingError) as error:
        sys.exit(f"The database cannot be used: {str(error.orig).strip().splitlines()[0]}")
