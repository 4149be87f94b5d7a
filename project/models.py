"""The tables."""

import unicodedata
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
    true,
)
from sqlalchemy.orm import Mapped, mapped_column

from project import clock, ids
from project.errors import TokenExpired, TokenInvalid
from project.extensions import db
from project.lib import hashing

# A username of 128 characters in NFKC can have four times as many as the client wrote it.
MAX_STORED_USERNAME = 512
MAX_STORED_USER_AGENT = 512
MAX_STORED_IP = 64
MAX_REQUEST_ID = 64
MAX_STORED_ERROR = 256
MAX_STORED_WORDS = 512
MAX_STORED_AUDIENCE = 255


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC, also on SQLite, which stores no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return `value` in UTC; raise ValueError for a naive datetime, which is ambiguous."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime needs a time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return `value` as an aware datetime in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Words(TypeDecorator[list[str]]):
    """A short list of words, stored as OAuth writes a scope: with a space between two of them."""

    impl = String(MAX_STORED_WORDS)
    cache_ok = True

    def process_bind_param(self, value: list[str] | None, dialect: Dialect) -> str | None:
        """Return the words as one text."""
        return None if value is None else " ".join(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> list[str] | None:
        """Return the words of a text."""
        return None if value is None else value.split()


def _bytewise(length: int) -> String:
    """Return the type of a text that every database orders by its bytes.

    An index on such a column finds a prefix, whatever collation the database was created with.
    """
    return String(length).with_variant(String(length, collation="C"), "postgresql")


def username_key(username: str) -> str:
    """Return the same key for usernames that differ in case or form only (NFKC casefold)."""
    folded = unicodedata.normalize("NFKC", username).strip().casefold()
    return unicodedata.normalize("NFKC", folded)


class User(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """A user, who can log in."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    username: Mapped[str] = mapped_column(String(MAX_STORED_USERNAME))
    username_key: Mapped[str] = mapped_column(_bytewise(MAX_STORED_USERNAME))
    email: Mapped[str] = mapped_column(_bytewise(128))
    password: Mapped[str] = mapped_column(String(255))
    active: Mapped[bool] = mapped_column(default=True, server_default=true())
    admin: Mapped[bool] = mapped_column(default=False, server_default=false())
    # Users from before the column count as verified.
    email_verified: Mapped[bool] = mapped_column(default=False, server_default=true())
    # Other than `admin`: they mean something to other services only.
    roles: Mapped[list[str]] = mapped_column(Words, default=list, server_default="")
    # Whether a login needs a code too. A login locks this row, so it sees each change of it.
    mfa_enabled: Mapped[bool] = mapped_column(default=False, server_default=false())
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
        # SQLite never reuses an id either: tokens of a deleted user may still be in circulation.
        {"sqlite_autoincrement": True},
    )

    def __init__(self, username: str, email: str, password: str, **columns: Any) -> None:
        """Make a user; `password` is in plain text, and only its hash is kept.

        A naive `created_at` is taken as UTC.
        """
        created_at = columns.get("created_at")
        if created_at is not None and created_at.tzinfo is None:
            columns["created_at"] = created_at.replace(tzinfo=UTC)
        super().__init__(
            username=username,
            username_key=username_key(username),
            email=email,
            password=hashing.hash(password),
            **columns,
        )

    def encode_auth_token(self, user_id: int) -> str:
        """Return a token for `user_id`, of the configured lifetime, that belongs to no session.

        The routes refuse it: they accept tokens of a session only.
        """
        from project.tokens import codec, keys

        now = int(clock.utcnow().timestamp())
        claims = codec.AccessClaims(user_id, None, now, now + keys.auth_token_lifetime())
        return codec.encode_access(claims, key=keys.signing_key())

    @staticmethod
    def decode_auth_token(auth_token: str) -> int | str:
        """Return the user id of a valid token, or the message that says why it is refused.

        The session of the token is not looked up.
        """
        from project.tokens import codec, keys

        try:
            return codec.decode_access(
                auth_token, keys=keys.verification_keys(), now=clock.utcnow()
            ).user_id
        except (TokenExpired, TokenInvalid) as error:
            return error.message


class Throttle(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """A count of attempts; `key` names the act and the address or account that is counted."""

    __tablename__ = "throttles"

    key: Mapped[str] = mapped_column(String(128), primary_key=True)
    attempts: Mapped[int]
    resets_at: Mapped[datetime] = mapped_column(UtcDateTime)
    paused_until: Mapped[datetime] = mapped_column(UtcDateTime)

    __table_args__ = (Index(None, "resets_at"),)


class KnownAddress(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """A network from which the user of an account has logged in."""

    __tablename__ = "known_addresses"

    account: Mapped[str] = mapped_column(String(64), primary_key=True)
    network: Mapped[str] = mapped_column(String(64), primary_key=True)
    last_login_at: Mapped[datetime] = mapped_column(UtcDateTime)

    __table_args__ = (Index(None, "last_login_at"),)


class Session(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """A live login on one device; ending a session deletes its row.

    A row holds no token and no part of one: tokens are signed, and only clients keep them.
    """

    __tablename__ = "sessions"

    id: Mapped[str] = mapped_column(String(ids.SESSION_LENGTH), primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    # The number of refreshes so far; the current refresh token names the same number.
    generation: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    # When the current tokens were issued; `ip` and `user_agent` are those of that request.
    last_used_at: Mapped[datetime] = mapped_column(UtcDateTime)
    ip: Mapped[str | None] = mapped_column(String(MAX_STORED_IP))
    user_agent: Mapped[str] = mapped_column(String(MAX_STORED_USER_AGENT))
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    # When the last of its auth tokens expires; None in sessions from before the column.
    token_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # How the user has proved who they are: RFC 8176's "pwd" and "otp", and "rc" for recovery codes.
    amr: Mapped[list[str]] = mapped_column(Words, server_default="pwd")
    code_given_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # the last one

    __table_args__ = (
        Index(None, "user_id", "expires_at"),
        Index(None, "expires_at"),
    )


class TotpFactor(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """The authenticator of a user, or the one that they are setting up."""

    __tablename__ = "totp_factors"

    user_id: Mapped[int] = mapped_column(
        ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    secret: Mapped[bytes] = mapped_column(LargeBinary)  # encrypted under ENCRYPTION_KEYS
    # The time step of the last code that was used; None until the first one confirms the secret.
    last_step: Mapped[int | None] = mapped_column(BigInteger)
    # Whether the user's email was verified when the secret was confirmed.
    email_verified: Mapped[bool] = mapped_column(default=False, server_default=false())


class RecoveryCode(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """A recovery code of a user; using it deletes its row."""

    __tablename__ = "recovery_codes"

    user_id: Mapped[int] = mapped_column(
        ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    # SHA-256, in hexadecimal: a code has 120 random bits, which no attacker can guess.
    code_hash: Mapped[str] = mapped_column(String(64), primary_key=True)


class EndedSession(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """A session that ended while other services may still accept its auth token."""

    __tablename__ = "ended_sessions"

    session_id: Mapped[str] = mapped_column(String(ids.SESSION_LENGTH), primary_key=True)
    ended_at: Mapped[datetime] = mapped_column(UtcDateTime)
    # When its last auth token expires.
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    # In the feed; None until it is read for the first time after the commit.
    position: Mapped[int | None] = mapped_column(BigInteger)

    __table_args__ = (
        UniqueConstraint("position"),
        Index(None, "expires_at"),
    )


class SigningKey(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """A key pair that signs auth tokens; `tokens/signing_keys.py` says when each key is used."""

    __tablename__ = "signing_keys"

    kid: Mapped[str] = mapped_column(String(43), primary_key=True)  # its RFC 7638 thumbprint
    public: Mapped[dict[str, str]] = mapped_column(JSON)  # a JWK (RFC 7517)
    private: Mapped[bytes] = mapped_column(LargeBinary)  # encrypted under ENCRYPTION_KEYS
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    signs_from: Mapped[datetime] = mapped_column(UtcDateTime)
    # None until another key replaces this one.
    verifies_until: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Client(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """Another service, which authenticates as an OAuth client with a secret."""

    __tablename__ = "clients"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    audience: Mapped[str] = mapped_column(String(MAX_STORED_AUDIENCE))
    scope: Mapped[list[str]] = mapped_column(Words)  # what its own tokens may be for
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    # SHA-256, in hexadecimal: a secret has 256 random bits, which no attacker can guess.
    secret_hash: Mapped[str] = mapped_column(String(64))
    previous_hash: Mapped[str | None] = mapped_column(String(64))
    previous_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    disabled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Event(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """An event of the audit log; `accounts/audit.py` lists the kinds.

    An event stays when its user is deleted. `audit.anonymize` then removes what identifies them.
    """

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True
    )
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    kind: Mapped[str] = mapped_column(String(32))
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"))
    # The user who acted, if that is another user.
    actor_id: Mapped[int | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"))
    session_id: Mapped[str | None] = mapped_column(String(ids.SESSION_LENGTH))
    ip: Mapped[str | None] = mapped_column(String(MAX_STORED_IP))
    user_agent: Mapped[str] = mapped_column(String(MAX_STORED_USER_AGENT))
    request_id: Mapped[str | None] = mapped_column(String(MAX_REQUEST_ID))
    trace_id: Mapped[str | None] = mapped_column(String(32))  # as in the header traceparent
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


class Invitation(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """An invitation to register; using it deletes its row, and a later one replaces it."""

    __tablename__ = "invitations"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    email: Mapped[str] = mapped_column(_bytewise(128))
    username: Mapped[str | None] = mapped_column(String(MAX_STORED_USERNAME))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)

    __table_args__ = (
        UniqueConstraint("email"),
        Index(None, "expires_at"),
        {"sqlite_autoincrement": True},
    )


class Mail(db.Model):  # type: ignore[name-defined,misc]  # the base is made at run time
    """An email that is to be sent; sending it deletes its row.

    The row holds no link: links are made when the email is sent.
    """

    __tablename__ = "mails"

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True
    )
    kind: Mapped[str] = mapped_column(String(32))
    address: Mapped[str] = mapped_column(_bytewise(128))
    # The user without whom the email is not sent, if it is about a certain one.
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    parameters: Mapped[dict[str, str | None]] = mapped_column(JSON)
    language: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    next_try_at: Mapped[datetime] = mapped_column(UtcDateTime)
    tries: Mapped[int]
    claimed_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    failed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # when it was given up
    error: Mapped[str] = mapped_column(String(MAX_STORED_ERROR))  # of the last try

    __table_args__ = (
        Index(
            None,
            "next_try_at",
            "id",
            postgresql_where=text("failed_at IS NULL"),
            sqlite_where=text("failed_at IS NULL"),
        ),
        Index(
            None,
            "address",
            postgresql_where=text("failed_at IS NOT NULL"),
            sqlite_where=text("failed_at IS NOT NULL"),
        ),
        Index(
            None,
            "user_id",
            postgresql_where=text("user_id IS NOT NULL"),
            sqlite_where=text("user_id IS NOT NULL"),
        ),
        {"sqlite_autoincrement": True},
    )


# The tables, for statements that read or write columns instead of objects.
users_table = cast(Table, User.__table__)
sessions_table = cast(Table, Session.__table__)
totp_factors_table = cast(Table, TotpFactor.__table__)
recovery_codes_table = cast(Table, RecoveryCode.__table__)
ended_sessions_table = cast(Table, EndedSession.__table__)
signing_keys_table = cast(Table, SigningKey.__table__)
clients_table = cast(Table, Client.__table__)
events_table = cast(Table, Event.__table__)
throttles_table = cast(Table, Throttle.__table__)
known_addresses_table = cast(Table, KnownAddress.__table__)
invitations_table = cast(Table, Invitation.__table__)
mails_table = cast(Table, Mail.__table__)
