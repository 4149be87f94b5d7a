"""Helpers that add rows for a test and read back what was committed."""

from datetime import datetime
from typing import Any

from sqlalchemy import insert, select

from project import db
from project.accounts import audit, sessions
from project.accounts.second_factor import Method
from project.lib import database
from project.models import Event, Mail, Session, User

ORIGIN = audit.Origin("192.0.2.1", "tests")


def add_user(username: str, email: str, password: str, **columns: Any) -> User:
    """Add and commit a user; `columns` sets what registration cannot (admin, active)."""
    user = User(username=username, email=email, password=password, **columns)
    db.session.add(user)
    db.session.commit()
    return user


def start_session(user: User, method: Method | None = None) -> sessions.TokenPair:
    """Start a session of a user as a login does, and return its token pair.

    `method` is the kind of the code with which a user with a second factor has logged in.
    """
    kind = audit.Kind.LOGGED_IN
    pair = sessions.start(user.id, user.email, user.password, ORIGIN, kind, method)
    db.session.commit()
    return pair


def stored_sessions() -> list[dict[str, Any]]:
    """Return every column of every committed session, the oldest first."""
    table = Session.__table__
    order = table.c.created_at, table.c.id
    return [row._asdict() for row in database.fetch_all(select(table).order_by(*order))]


def stored_users() -> list[dict[str, Any]]:
    """Return every column of every committed user, ordered by id."""
    table = User.__table__
    return [row._asdict() for row in database.fetch_all(select(table).order_by(table.c.id))]


def stored_events() -> list[dict[str, Any]]:
    """Return every column of every committed event, ordered by id."""
    table = Event.__table__
    return [row._asdict() for row in database.fetch_all(select(table).order_by(table.c.id))]


def stored_mails() -> list[dict[str, Any]]:
    """Return every column of every committed email in the outbox, ordered by id."""
    table = Mail.__table__
    return [row._asdict() for row in database.fetch_all(select(table).order_by(table.c.id))]


def add_events(user_id: int | None, moments: list[datetime], **columns: Any) -> list[int]:
    """Add an event of a user at each of these moments, and return the ids."""
    common: dict[str, Any] = {
        "kind": "logged_in",
        "user_id": user_id,
        "user_agent": "tests",
        "details": {},
    }
    rows = [common | {"created_at": moment} | columns for moment in moments]
    for row in rows:
        db.session.execute(insert(Event), row)
    db.session.commit()
    return [event["id"] for event in stored_events()[-len(rows) :]]
