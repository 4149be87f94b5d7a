"""The tables."""

import unicodedata
from datetime import UTC, datetime
from typing import Any

from flask import current_app
from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    String,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
    true,
)
from sqlalchemy.orm import Mapped, mapped_column

from project import clock, identifiers, passwords, tokens
from project.config import DAY
from project.errors import TokenExpired, TokenInvalid
from project.extensions import db

# As it was written: 128 characters after NFKC can be four times as many before it.
MAX_STORED_USERNAME = 512
MAX_STORED_USER_AGENT = 512
MAX_STORED_IP = 64
MAX_REQUEST_ID = 64


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


def _bytewise(length: int) -> String:
    """Return the type of a text that is ordered by its bytes on every database.

    So an index on it finds what begins with a text, and how the database was made to sort words
    has no say in it.
    """
    return String(length).with_variant(String(length, collation="C"), "postgresql")


def username_key(username: str) -> str:
    """Return what two usernames share that differ in case alone (Unicode's NFKC casefold)."""
    folded = unicodedata.normalize("NFKC", username).strip().casefold()
    return unicodedata.normalize("NFKC", folded)


def token_lifetime() -> int:
    """Return the life of an auth token, in seconds."""
    config = current_app.config
    return int(config["TOKEN_EXPIRATION_DAYS"] * DAY + config["TOKEN_EXPIRATION_SECONDS"])


def token_keys() -> tuple[str, ...]:
    """Return the keys that a token may be signed with: first the one that signs, then old ones."""
    config = current_app.config
    return config["SECRET_KEY"], *config["SECRET_KEY_FALLBACKS"]


class User(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """Somebody who can log in."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    username: Mapped[str] = mapped_column(String(MAX_STORED_USERNAME))
    username_key: Mapped[str] = mapped_column(_bytewise(MAX_STORED_USERNAME))
    email: Mapped[str] = mapped_column(_bytewise(128))
    password: Mapped[str] = mapped_column(String(255))
    active: Mapped[bool] = mapped_column(default=True, server_default=true())
    admin: Mapped[bool] = mapped_column(default=False, server_default=false())
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=lambda: clock.utcnow())

    __table_args__ = (
        UniqueConstraint("email"),
        UniqueConstraint("username_key"),
        Index(None, "created_at", "id"),
        Index(
            "users_admins_idx",
            "id",
            postgresql_where=text("active AND admin"),
            sqlite_where=text("active = 1 AND admin = 1"),
        ),
        # SQLite too gives no id a second time: tokens of who had it may still be about.
        {"sqlite_autoincrement": True},
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
        """Return a token for `user_id`, of the configured lifetime, that belongs to no session.

        It says who somebody is; the routes take none but those that a login or a refresh gave.
        """
        now = int(clock.utcnow().timestamp())
        claims = tokens.Access(user_id, None, now, now + token_lifetime())
        return tokens.encode_access(claims, key=current_app.config["SECRET_KEY"])

    @staticmethod
    def decode_auth_token(auth_token: str) -> int | str:
        """Return the user id of a genuine token, or the message that says why it is refused.

        Whether its session lives is not asked.
        """
        try:
            return tokens.decode_access(auth_token, keys=token_keys(), now=clock.utcnow()).user_id
        except (TokenExpired, TokenInvalid) as error:
            return error.message


class Throttle(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """How often something was tried lately; `key` says what, and by or on whom."""

    __tablename__ = "throttles"

    key: Mapped[str] = mapped_column(String(128), primary_key=True)
    attempts: Mapped[int]
    resets_at: Mapped[datetime] = mapped_column(UtcDateTime)
    paused_until: Mapped[datetime] = mapped_column(UtcDateTime)

    __table_args__ = (Index(None, "resets_at"),)


class KnownAddress(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """From where an account was logged in to with success."""

    __tablename__ = "known_addresses"

    account: Mapped[str] = mapped_column(String(64), primary_key=True)
    network: Mapped[str] = mapped_column(String(64), primary_key=True)
    last_login_at: Mapped[datetime] = mapped_column(UtcDateTime)

    __table_args__ = (Index(None, "last_login_at"),)


class Session(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """A login that still holds, on one device; a session that has been ended has no row.

    Nothing in it lets anybody in: tokens are signed, and kept by those they were given to.
    """

    __tablename__ = "sessions"

    id: Mapped[str] = mapped_column(String(identifiers.SESSION_LENGTH), primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    # How often it has been refreshed, which the one refresh token that is good names too.
    generation: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    # When its present tokens were made, and where they were sent.
    last_used_at: Mapped[datetime] = mapped_column(UtcDateTime)
    ip: Mapped[str | None] = mapped_column(String(MAX_STORED_IP))
    user_agent: Mapped[str] = mapped_column(String(MAX_STORED_USER_AGENT))
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)

    __table_args__ = (
        Index(None, "user_id", "expires_at"),
        Index(None, "expires_at"),
    )


class Event(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """Something that happened to an account; `project.audit` says what there is.

    The ids in it are numbers and no foreign keys: it stays when what they name is gone.
    """

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True
    )
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    kind: Mapped[str] = mapped_column(String(32))
    user_id: Mapped[int | None]
    # The user who did it, where that is another one.
    actor_id: Mapped[int | None]
    session_id: Mapped[str | None] = mapped_column(String(identifiers.SESSION_LENGTH))
    ip: Mapped[str | None] = mapped_column(String(MAX_STORED_IP))
    user_agent: Mapped[str] = mapped_column(String(MAX_STORED_USER_AGENT))
    request_id: Mapped[str | None] = mapped_column(String(MAX_REQUEST_ID))
    details: Mapped[dict[str, str | int]] = mapped_column(JSON)

    __table_args__ = (
        Index(None, "user_id", "created_at", "id"),
        Index(
            None,
            "actor_id",
            "created_at",
            "id",
            postgresql_where=text("actor_id IS NOT NULL"),
            sqlite_where=text("actor_id IS NOT NULL"),
        ),
        Index(None, "created_at", "id"),
    )


class Erasure(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """A user who was deleted, and whom some event may still name; `project.audit` sees to that."""

    __tablename__ = "erasures"

    user_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    erased_at: Mapped[datetime] = mapped_column(UtcDateTime)
