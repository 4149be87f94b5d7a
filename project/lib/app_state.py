"""Objects that belong to one application, kept in `app.extensions` with their type."""

from typing import Generic, TypeVar

from flask import Flask, current_app

T = TypeVar("T")


class AppState(Generic[T]):
    """A typed key of `app.extensions`, as aiohttp's AppKey is one of its application.

    A module declares one at import, as in `_pool = AppState[HashingPool]("hashing_pool")`, and its
    `init_app` sets the object of each application.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def set(self, app: Flask, value: T) -> None:
        """Make `value` the object of `app`."""
        app.extensions[self._name] = value

    def get(self, app: Flask | None = None) -> T:
        """Return the object of `app`, or of the current application."""
        value: T = (app or current_app).extensions[self._name]
        return value
