"""The tables."""

import unicodedata
from datetime import UTC, datetime, timedelta
from typing import Any

from flask import current_app
from sqlalchemy import (
    DateTime,
    Dialect,
    Index,
    String,
    TypeDecorator,
    UniqueConstraint,
    false,
    true,
)
from sqlalchemy.orm import Mapped, mapped_column

from project import clock, passwords, tokens
from project.errors import TokenExpired, TokenInvalid
from project.extensions import db

# As it was written: 128 characters after NFKC can be four times as many before it.
MAX_STORED_USERNAME = 512


class UtcDateTime(TypeDecorator[datetime]):
    """An aware moment in UTC, on databases that keep time zones and on those that do not."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the moment in UTC; a naive one is refused, nobody knows what it means."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a moment needs a time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the moment as an aware one in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def username_key(username: str) -> str:
    """Return what two usernames share that differ in case alone (Unicode's NFKC casefold)."""
    folded = unicodedata.normalize("NFKC", username).strip().casefold()
    return unicodedata.normalize("NFKC", folded)


class User(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """Somebody who can log in."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    username: Mapped[str] = mapped_column(String(MAX_STORED_USERNAME))
    username_key: Mapped[str] = mapped_column(String(MAX_STORED_USERNAME))
    email: Mapped[str] = mapped_column(String(128))
    password: Mapped[str] = mapped_column(String(255))
    active: Mapped[bool] = mapped_column(default=True, server_default=true())
    admin: Mapped[bool] = mapped_column(default=False, server_default=false())
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=lambda: clock.utcnow())

    __table_args__ = (
        UniqueConstraint("email"),
        UniqueConstraint("username_key"),
        Index(None, "created_at", "id"),
    )

    def __init__(self, username: str, email: str, password: str, **columns: Any) -> None:
        """Make a user; `password` is the plain one, and its hash is all that is kept."""
        super().__init__(
            username=username,
            username_key=username_key(username),
            email=email,
            password=passwords.hash(password),
            **columns,
        )

    def encode_auth_token(self, user_id: int) -> str:
        """Return a token for `user_id`, of the configured lifetime."""
        return encode_auth_token(user_id)

    @staticmethod
    def decode_auth_token(auth_token: str) -> int | str:
        """Return the user id of a genuine token, or the message that says why it is refused."""
        try:
            return decode_auth_token(auth_token)
        except (TokenExpired, TokenInvalid) as error:
            return error.message


def encode_auth_token(user_id: int) -> str:
    """Return a token for `user_id`, signed and timed as the application is configured."""
    config = current_app.config
    lifetime = timedelta(
        days=config["TOKEN_EXPIRATION_DAYS"], seconds=config["TOKEN_EXPIRATION_SECONDS"]
    )
    return tokens.encode(user_id, key=config["SECRET_KEY"], now=clock.utcnow(), lifetime=lifetime)


def decode_auth_token(auth_token: str) -> int:
    """Return the user id of a genuine token; raises TokenExpired or TokenInvalid."""
    return tokens.decode(auth_token, key=current_app.config["SECRET_KEY"], now=clock.utcnow())
