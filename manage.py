"""The command line of the users service: python manage.py COMMAND."""

# The commands are declared here; what they do is in project/ops, and in project/api/commands.py.

import logging
import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036  # the check is for older ones
    sys.exit(f"Python 3.11 or newer is needed; this is Python {sys.version.split()[0]}.")

import flask_migrate.cli
from flask import current_app
from flask.cli import ScriptInfo, load_dotenv
from flask.helpers import get_load_dotenv
from flask_script_ng import Command, Option, Shell
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from project import UsersService, create_app, db
from project.api import commands
from project.errors import ConfigurationError
from project.lib import database, logs, metrics
from project.models import User
from project.ops import (
    audit_log,
    checks,
    clients,
    development,
    import_export_commands,
    keys,
    mail,
    purge,
    server,
    testing,
    users,
)
from project.ops.command_line import CommandLine

COMMAND = "".join(sys.argv[1:2])


def application() -> UsersService:
    """Return the service, configured by APP_SETTINGS; the tests always use TestingConfig."""
    if COMMAND == "version":
        return UsersService(__name__)  # without settings
    if COMMAND != "runserver":  # a command does not count in the metrics of a running server
        os.environ.pop(metrics.DIRECTORY, None)
    if not (testing := COMMAND in {"test", "cov"}) and get_load_dotenv():
        load_dotenv()  # as `flask` does
    try:
        app = create_app("project.config.TestingConfig" if testing else None)
    except ConfigurationError as error:
        if COMMAND == "check":
            sys.exit(checks.report(checks.configuration_refused(error)))
        raise
    # A command prints what it did to standard output, so its log has only warnings.
    level = app.config["LOG_LEVEL"] if COMMAND in {"runserver", "send_mail"} else "WARNING"
    logs.configure(readable=app.debug, file=sys.stderr, level=level)
    return app


class Test(Command):
    """Run the tests, all of them or those that are named; every warning is an error."""

    name = "test"
    option_list = (
        Option("names", nargs="*", metavar="NAME", help="a package, module, class or test"),
        Option("-v", "--verbose", action="store_true", help="print a line for each test module"),
    )

    def __call__(self, app: UsersService, names: list[str], verbose: bool) -> int:
        """Run outside any application context: each test makes its own application."""
        return testing.test(names, verbose)


class Cov(Command):
    """Run the tests with branch coverage; print a table and write htmlcov/."""

    name = "cov"

    def __call__(self, app: UsersService) -> int:
        """Run outside any application context, as `test` does."""
        return testing.cov()


class Db(Command):
    """Migrate the database: Flask-Migrate's own commands (db upgrade, db migrate ...)."""

    name = "db"
    capture_all_args = True

    def __call__(self, arguments: list[str]) -> None:
        """Pass the arguments to Flask-Migrate, which ends the process with its exit code.

        `upgrade` alone does as `serve` does: a database that newer code has migrated is kept.
        """
        logging.basicConfig(format="%(message)s")
        logging.getLogger("alembic").setLevel(logging.INFO)
        if arguments == ["upgrade"]:
            with application().app_context():
                database.upgrade()
            return
        flask_migrate.cli.db.main(
            arguments,
            prog_name="manage.py db",
            obj=ScriptInfo(create_app=application, set_debug_flag=False),
            help_option_names=["-h", "--help"],
        )


manager = CommandLine(application, description=__doc__)
shell = Shell(make_context=lambda: {"app": current_app, "db": db, "User": User})
shell.__doc__ = "Start a Python shell with the application."
manager.add_group("Servers", development.Runserver(), server.serve, checks.check, server.version)
manager.add_group("Database", Db(), purge.purge, development.recreate_db, development.seed_db)
manager.add_group(
    "Users",
    users.create_admin,
    users.deactivate,
    users.activate,
    users.end_sessions,
    users.reset_totp,
    audit_log.events,
    import_export_commands.import_users,
    import_export_commands.export_users,
)
manager.add_group("Emails", mail.send_mail, mail.mails)
manager.add_group(
    "Tokens for other services",
    keys.rotate_keys,
    keys.keys,
    keys.reencrypt_keys,
    clients.create_client,
    clients.clients,
    clients.rotate_client_secret,
    clients.disable_client,
)
manager.add_group("Development", Test(), Cov(), shell, commands.openapi)


if __name__ == "__main__":
    try:
        manager.run()
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells report it
    except SQLAlchemyError as error:
        if not (database.is_unavailable(error) or isinstance(error, ProgrammingError)):
            raise
        sys.exit(f"The database cannot be used: {database.describe(error)}")
