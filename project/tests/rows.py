"""Rows for tests."""

import json
from typing import Any

from sqlalchemy import select

from project import audit, database, db, sessions
from project.api.models import Event, Session, User

ORIGIN = audit.Origin("192.0.2.1", "tests")


def add_user(username: str, email: str, password: str, **columns: Any) -> User:
    """Return a new user, committed; `columns` sets what registration cannot (admin, active)."""
    user = User(username=username, email=email, password=password, **columns)
    db.session.add(user)
    db.session.commit()
    return user


def start_session(user: User) -> sessions.Pair:
    """Return the tokens of a new session of a user, as a login would have given them."""
    pair = sessions.start(user.id, user.email, user.password, ORIGIN, audit.Kind.LOGGED_IN)
    db.session.commit()
    return pair


def stored_sessions() -> list[dict[str, Any]]:
    """Return every column of every session that was committed, the oldest first."""
    table = Session.__table__
    order = table.c.created_at, table.c.id
    return [row._asdict() for row in database.fetch_all(select(table).order_by(*order))]


def stored_users() -> list[dict[str, Any]]:
    """Return every column of every user that was committed, in the order of the ids."""
    table = User.__table__
    return [row._asdict() for row in database.fetch_all(select(table).order_by(table.c.id))]


def logged(written: str) -> list[dict[str, Any]]:
    """Return the lines of a log in JSON, but for those that each request leaves."""
    lines = [json.loads(line) for line in written.splitlines()]
    return [line for line in lines if line["event"] != "request"]


def stored_events() -> list[dict[str, Any]]:
    """Return every column of every event that was committed, in the order of the ids."""
    table = Event.__table__
    return [row._asdict() for row in database.fetch_all(select(table).order_by(table.c.id))]
