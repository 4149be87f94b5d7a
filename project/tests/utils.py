"""Rows for tests."""

from typing import Any

from sqlalchemy import select

from project import database, db
from project.api.models import User


def add_user(username: str, email: str, password: str, **columns: Any) -> User:
    """Return a new user, committed; `columns` sets what registration cannot (admin, active)."""
    user = User(username=username, email=email, password=password, **columns)
    db.session.add(user)
    db.session.commit()
    return user


def stored_users() -> list[dict[str, Any]]:
    """Return every column of every user that was committed, in the order of the ids."""
    table = User.__table__
    return [row._asdict() for row in database.fetch_all(select(table).order_by(table.c.id))]
