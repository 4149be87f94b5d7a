"""A re-export of the tables in project/models.py, for code that imports them from here."""

from project.models import Event, KnownAddress, Session, Throttle, User

__all__ = ["Event", "KnownAddress", "Session", "Throttle", "User"]
