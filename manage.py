"""The command line of the users service: python manage.py COMMAND."""

import contextlib
import getpass
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import unittest
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import flask_migrate
import flask_migrate.cli
import orjson
from flask import current_app
from flask_script_ng import Command, Manager, Server, Shell
from jwt.warnings import InsecureKeyLengthWarning
from pydantic import ValidationError
from sqlalchemy import Row
from sqlalchemy.exc import OperationalError, ProgrammingError
from tqdm import tqdm
from werkzeug.serving import WSGIRequestHandler

from project import (
    UsersService,
    accounts,
    audit,
    clock,
    create_app,
    database,
    db,
    diagnosis,
    logs,
    metrics,
    ratelimit,
    records,
    sessions,
    transfer,
)
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
# What the audit trail says of a command.
ORIGIN = audit.Origin(None, "manage.py")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EVENT = "{:20}  {:24}  {:>7}  {:39}  {}"
EVENT_COLUMNS = "time", "event", "user", "address", "details"
TRANSFER_TIMEOUT = 60.0  # seconds for the database to take or give one batch


def application() -> UsersService:
    """Return the service that APP_SETTINGS names; tests are always the testing one."""
    testing = sys.argv[1:2] and sys.argv[1] in TEST_COMMANDS
    if sys.argv[1:2] != ["runserver"]:  # a command has no part in the figures of a server
        os.environ.pop(metrics.DIRECTORY, None)
    try:
        app = create_app("project.config.TestingConfig" if testing else None)
    except ConfigurationError as error:
        if sys.argv[1:2] == ["check"]:
            sys.exit(report(diagnosis.refused(error)))
        raise
    # A command says itself what it did, on standard output.
    level = logging.INFO if "runserver" in sys.argv[1:2] else logging.WARNING
    logs.configure(readable=app.debug, file=sys.stderr, level=level)
    return app


manager = Manager(application, description=__doc__)


class QuietHandler(WSGIRequestHandler):
    """A request in the development server, which the service logs by itself."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log nothing more."""


manager.add_command(
    "runserver",
    Server(use_debugger=False, use_reloader=False, threaded=True, request_handler=QuietHandler),
)
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
    if not current_app.debug:
        settings["GRANIAN_LOG_CONFIG"] = str(ROOT / "project" / "granian.json")
    environment = settings | os.environ
    if port := current_app.config["METRICS_PORT"]:
        if str(port) == environment["GRANIAN_PORT"]:
            sys.exit(f"METRICS_PORT and GRANIAN_PORT are both {port}.")
        environment[metrics.DIRECTORY] = str(metrics.new_directory())
    command = [sys.executable, "-m", "granian", "--interface", "wsgi", "--factory"]
    os.execve(sys.executable, [*command, "project:create_app"], environment)


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
            accounts.add(username, email, "test", ORIGIN)
            db.session.commit()
        except (EmailExists, InvalidPayload):
            db.session.rollback()


@contextlib.contextmanager
def user_has_to_exist(email: str) -> Iterator[None]:
    """End the command where it finds no user with this email."""
    try:
        yield
    except UserNotFound:
        sys.exit(f"There is no user with the email {email}.")


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
        accounts.add(new.username, new.email, new.password, ORIGIN, admin=True)
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
    with user_has_to_exist(email):
        accounts.set_active(email.lower(), active, ORIGIN)
    db.session.commit()


@manager.command
def end_sessions(email: str) -> None:
    """End all sessions of a user."""
    with user_has_to_exist(email):
        ended = accounts.end_sessions(email.lower(), ORIGIN)
    db.session.commit()
    print(f"Sessions of {email} ended: {ended}.")


@manager.command
def purge() -> None:
    """Delete what is over: sessions, events, and those deleted from events; counts of attempts."""
    ended = _delete_all(sessions.delete_expired)
    events = _delete_all(audit.delete_expired)
    erased = _delete_all(audit.erase_rest)
    counts = _delete_all(ratelimit.delete_expired)
    print(f"Expired sessions deleted: {ended}; events: {events}; counts of attempts: {counts}.")
    print(f"Events that no more name whoever was deleted: {erased}.")


def _delete_all(delete_some: Callable[[], int]) -> int:
    """Delete until nothing is left, each time in a transaction; return how many."""
    total = 0
    while deleted := delete_some():
        db.session.commit()
        total += deleted
    return total


@manager.command
def events(
    user: str | None = None, since: str | None = None, follow: bool = False, json: bool = False
) -> None:
    """Print the audit trail, the oldest first: a table, or JSON Lines.

    Of one user (an email) or of all; since a moment (2026-11-22T09:00:00Z) or for some time (90m,
    24h, 7d); with --follow it goes on with what happens, from now unless told.
    """
    user_id = None
    if user:
        with user_has_to_exist(user):
            user_id = accounts.find_by_email(user.lower())
    start = _moment(since) if since else clock.utcnow() if follow else EPOCH
    # Who reads only the beginning (head, less) ends this, and no traceback tells of it.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if not json:
        print(EVENT.format(*EVENT_COLUMNS))
    with contextlib.suppress(KeyboardInterrupt):
        for event in (audit.follow if follow else audit.since)(start, user_id):
            print(_as_json(event) if json else _as_row(event), flush=follow)


def _moment(text: str) -> datetime:
    """Return the moment that is written in ISO 8601, in UTC unless it says so, or so long ago."""
    try:
        if span := re.fullmatch(r"([0-9]{1,6})([mhd])", text):
            unit = {"m": "minutes", "h": "hours", "d": "days"}[span[2]]
            return clock.utcnow() - timedelta(**{unit: int(span[1])})
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        sys.exit(f"{text!r} is no time: write 2026-11-22T09:00:00Z, or 90m, 24h, 7d.")


def _as_json(event: Row[Any]) -> str:
    return orjson.dumps(event._asdict(), option=orjson.OPT_UTC_Z).decode()


def _as_row(event: Row[Any]) -> str:
    details = " ".join(f"{name}={value}" for name, value in event.details.items())
    if event.actor_id:
        details = f"by={event.actor_id} {details}"
    user, ip = event.user_id or "-", event.ip or "-"
    at = f"{event.created_at:%Y-%m-%dT%H:%M:%SZ}"
    # Quoted: what a client calls itself is not to be taken for details.
    client = orjson.dumps(event.user_agent).decode()
    return EVENT.format(at, event.kind, user, ip, f"{details} {client}".strip())


@manager.command
def import_users(file: str, csv: bool = False) -> int:
    """Add the users of a file, in JSON Lines or, where it is named so or --csv is given, in CSV.

    - is standard input. Says on stderr which lines it refused; exit code 1 if there are any.
    """
    database.wait_longer(TRANSFER_TIMEOUT)
    added = there = refused = 0
    with _source(file) as source, _progress(source) as bar:
        try:
            for batch in transfer.take_in(source, as_csv=_is_csv(file, csv)):
                if batch.added:
                    imported = audit.Kind.USERS_IMPORTED
                    audit.record(imported, ORIGIN, user_id=None, users=batch.added)
                db.session.commit()
                added += batch.added
                there += batch.there
                refused += len(batch.refused)
                for line, errors in batch.refused:
                    bar.write(f"line {line}: {_reasons(errors)}", file=sys.stderr)
                bar.update(batch.end - bar.n)
        finally:
            bar.close()
            print(f"Users added: {added}; there already: {there}; lines refused: {refused}.")
    return 1 if refused else 0


@contextlib.contextmanager
def _source(file: str) -> Iterator[BinaryIO]:
    """Open a file, or standard input; end the command when it cannot be read."""
    try:
        if file == "-" and sys.stdin:
            yield sys.stdin.buffer
        else:
            with Path(file).open("rb") as source:
                yield source
    except OSError as error:
        sys.exit(f"{file} cannot be read: {error.strerror}")


def _progress(source: BinaryIO) -> tqdm:
    """Return a bar on stderr, if that is a terminal; it has an end if that of the file is known."""
    status = os.fstat(source.fileno())
    total = status.st_size if stat.S_ISREG(status.st_mode) else None
    return tqdm(total=total, unit="B", unit_scale=True, disable=None)


@manager.command
def export_users(file: str, csv: bool = False) -> None:
    """Write all users, with the hashes of their passwords, to a new file, as import_users reads it.

    - is standard output.
    """
    database.wait_longer(TRANSFER_TIMEOUT)
    try:
        with _target(file) as target:
            audit.record(audit.Kind.USERS_EXPORTED, ORIGIN, user_id=None)
            db.session.commit()
            count = records.write(transfer.give_out(), target, as_csv=_is_csv(file, csv))
    except FileExistsError:
        sys.exit(f"{file} is there already; nothing was written.")
    except OSError as error:
        sys.exit(f"{file} cannot be written: {error.strerror}")
    print(f"Users written: {count}.", file=sys.stderr)


@contextlib.contextmanager
def _target(file: str) -> Iterator[BinaryIO]:
    """Make a file that nobody else can read, or take standard output; no half of a file is left."""
    if file == "-":
        with os.fdopen(os.dup(1), "wb") as target:
            yield target
        return
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as target:
            yield target
    except BaseException:
        Path(file).unlink()
        raise


def _is_csv(file: str, csv: bool) -> bool:
    return csv or file.lower().endswith(".csv")


def describe(error: ServiceError) -> str:
    """Return a refusal as one line."""
    return f"{error.message} {_reasons(error.errors or {})}".strip()


def _reasons(errors: dict[str, str]) -> str:
    return "; ".join(f"{field} {reason}" for field, reason in errors.items())


if __name__ == "__main__":
    try:
        manager.run()
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell has it
    except (OperationalError, ProgrammingError) as error:
        sys.exit(f"The database cannot be used: {str(error.orig).strip().splitlines()[0]}")
