"""The commands that change single users.

create_admin, deactivate, activate, end_sessions, reset_totp.
"""

import getpass
import sys

from pydantic import ValidationError

from project.accounts import administration, fields, registration
from project.errors import ServiceError, TotpNotFound
from project.extensions import db
from project.ops.command_line import ORIGIN, describe, exit_if_not_found


class _NewAdmin(fields.NewUser):
    roles: fields.Roles


def create_admin(username: str, email: str, roles: str = "") -> None:
    """Add an admin. Prompt for the password, or read it from a line of standard input.

    --roles are further roles for other services, separated by commas.
    """
    if sys.stdin.isatty():
        password = getpass.getpass("Password: ")
    else:
        password = sys.stdin.readline().rstrip("\n")
    try:
        new = _NewAdmin(
            username=username,
            email=email,
            password=password,
            roles=roles.split(",") if roles else [],
        )
        registration.add(
            new.username,
            new.email,
            new.password,
            ORIGIN,
            admin=True,
            roles=new.roles,
            email_verified=True,
        )
    except ValidationError as error:
        sys.exit(describe(fields.invalid_payload(error)))
    except ServiceError as error:
        sys.exit(describe(error))
    db.session.commit()
    print(f"{new.email} is an admin.")


def deactivate(email: str) -> None:
    """Deactivate a user and end their sessions."""
    _set_active(email, False)
    print(f"{email} is deactivated.")


def activate(email: str) -> None:
    """Activate a deactivated user, who then has to log in again."""
    _set_active(email, True)
    print(f"{email} is active.")


def _set_active(email: str, active: bool) -> None:
    with exit_if_not_found(email):
        administration.set_active(email.lower(), active, ORIGIN)
    db.session.commit()


def end_sessions(email: str) -> None:
    """End all sessions of a user."""
    with exit_if_not_found(email):
        ended = administration.end_sessions(email.lower(), ORIGIN)
    db.session.commit()
    print(f"Sessions of {email} ended: {ended}.")


def reset_totp(email: str) -> None:
    """Turn off the authenticator of a user who has lost it, and end their sessions.

    Make sure that it is this user who asks for it.
    """
    try:
        with exit_if_not_found(email):
            ended = administration.reset_totp_of(email.lower(), ORIGIN)
    except TotpNotFound:
        sys.exit(f"{email} has no authenticator.")
    db.session.commit()
    print(f"The authenticator of {email} is turned off. Sessions ended: {ended}.")
