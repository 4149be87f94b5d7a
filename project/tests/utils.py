"""Rows for tests."""

from typing import Any

from project import db
from project.api.models import User


def add_user(username: str, email: str, password: str, **columns: Any) -> User:
    """Return a new user, committed; `columns` sets what registration cannot (admin, active)."""
    user = User(username=username, email=email, password=password, **columns)
    db.session.add(user)
    db.session.commit()
    return user
