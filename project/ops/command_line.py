"""What the commands share: how they are called, their origin in the audit log, times, errors."""

import contextlib
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from flask_script_ng import Command, Manager

from project.accounts import audit
from project.errors import ServiceError, UserNotFound
from project.tokens import keys

# The origin of a command's events in the audit log.
ORIGIN = audit.Origin(None, "manage.py")
UNITS = {"m": "minutes", "h": "hours", "d": "days"}


class CommandLine(Manager):  # type: ignore[misc]  # Flask-Script-NG has no types
    """The commands, in groups: `python manage.py COMMAND`, and -h for help everywhere."""

    help_args = ("-h", "--help")

    def __init__(self, app: Callable[[], object], description: str) -> None:
        """Make a command line; `app` makes the application, once the arguments are parsed."""
        super().__init__(app, with_default_commands=False, description=description)
        self._groups: dict[str, list[str]] = {}

    def add_group(self, title: str, *commands: Command | Callable[..., object]) -> None:
        """Add commands under a title.

        The parameters of a function are its arguments and options. Its docstring is its help.
        """
        before = set(self._commands)
        for each in commands:
            if isinstance(each, Command):
                self.add_command(each)
                continue
            command = Command(each)
            for option in command.option_list:  # --with-factors instead of --with_factors
                option.args = [
                    arg.replace("_", "-") if arg[0] == "-" else arg for arg in option.args
                ]
            self.add_command(each.__name__, command)
        self._groups[title] = [name for name in self._commands if name not in before]

    def handle(self, prog: str, args: Sequence[str] = ()) -> object:
        """Run the command that `args` begin with; return its exit code, and 2 if there is none."""
        if not args or args[0] in self.help_args:
            print(self._overview())
            return 0 if args else 2
        prog, (name, *rest) = Path(prog).name, args
        if name not in self._commands:
            near = difflib.get_close_matches(name, self._commands, 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            message = f"{prog}: there is no command {name!r}.{meant} python {prog} -h lists them."
            print(message, file=sys.stderr)
            return 2
        command = self._commands[name]
        if getattr(command, "capture_all_args", False):
            return command(rest)
        description = inspect.getdoc(command)
        parser = command.create_parser(f"{prog} {name}", description=description, parent=self)
        options = vars(parser.parse_args(rest))
        del options["func_stack"]  # of Flask-Script-NG
        return command(self(), **options)

    def _overview(self) -> str:
        """Return the commands, in groups, with the first line of the help of each."""
        lines = [self.description]
        for title, names in self._groups.items():
            lines += ["", f"{title}:"]
            for name in names:
                summary, *_ = (inspect.getdoc(self._commands[name]) or "").splitlines()
                lines.append(f"  {name:<21} {summary}")
        return "\n".join([*lines, "", "python manage.py COMMAND -h describes a command."])


class OneEvent:
    """An act that takes several transactions and is one event of the audit log."""

    def __init__(self, kind: audit.Kind) -> None:
        self._kind = kind
        self._id: int | None = None

    def record(self, **details: int) -> None:
        """Record, in this transaction, what the act has done up to now."""
        if self._id is None:
            self._id = audit.record(self._kind, ORIGIN, user_id=None, session_id=None, **details)
        else:
            audit.amend(self._id, **details)


@contextlib.contextmanager
def exit_if_not_found(email: str) -> Iterator[None]:
    """End the command when the block raises UserNotFound for the user with this email."""
    try:
        yield
    except UserNotFound:
        sys.exit(f"There is no user with the email {email}.")


def exit_without_issuer() -> None:
    """End the command unless other services can verify tokens."""
    if not keys.issuer():
        sys.exit("ISSUER is not set: the service has no signing keys and no clients.")


def as_duration(text: str) -> timedelta | None:
    """Return the duration that a text such as 90m, 24h or 7d names, or None."""
    duration = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    return timedelta(**{UNITS[duration[2]]: int(duration[1])}) if duration else None


def as_time(time: datetime | None) -> str:
    """Return a time in UTC to the second, or a hyphen for none."""
    return f"{time:%Y-%m-%dT%H:%M:%SZ}" if time else "-"


def describe(error: ServiceError) -> str:
    """Return the message of an error and its reasons, in one line."""
    return f"{error.message} {describe_fields(error.errors or {})}".strip()


def describe_fields(errors: Mapping[str, str]) -> str:
    """Return the reasons by field, in one line."""
    return "; ".join(f"{field} {reason}" for field, reason in errors.items())
