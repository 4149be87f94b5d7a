"""What requests, and users from a file, look like: every rule for what is valid stands here.

But for one that takes more than the field itself: `password_rules` says what is a good password.
"""

import base64
import re
import unicodedata
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from project import clock, identifiers, passwords
from project.api.models import MAX_STORED_USERNAME
from project.errors import InvalidPayload, SessionNotFound, UserNotFound

MAX_NAME_LENGTH = 128  # characters, of a username and of an email

# https://html.spec.whatwg.org/multipage/input.html#valid-e-mail-address
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_EMAIL = re.compile(rf"[a-zA-Z0-9.!#$%&'*+/=?^_`{{|}}~-]+@{_LABEL}(?:\.{_LABEL})*")
_UNFIT = {"Cc", "Cs"}  # control characters; surrogates, which no UTF-8 can hold
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# https://www.rfc-editor.org/rfc/rfc3339#section-5.6
_MOMENT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})",
    re.IGNORECASE,
)


def _refuse(text: str) -> PydanticCustomError:
    # pydantic would take the text for a template: ours have no braces.
    return PydanticCustomError("refused", text)


def _has_controls(text: str) -> bool:
    # A printable text, as most are, has none.
    return not text.isprintable() and not _UNFIT.isdisjoint(map(unicodedata.category, text))


def _username(text: str) -> str:
    if _has_controls(text):
        raise _refuse("must not contain control characters")
    trimmed = text.strip()
    # Normalizing takes the square of the length, so the column's length comes first.
    if len(trimmed) <= MAX_STORED_USERNAME:
        normalized = unicodedata.normalize("NFKC", trimmed).strip()
        if 1 <= len(normalized) <= MAX_NAME_LENGTH:
            return trimmed
    raise _refuse(f"must have 1 to {MAX_NAME_LENGTH} characters")


def _email(text: str) -> str:
    if len(text) > MAX_NAME_LENGTH:
        raise _refuse(f"must have at most {MAX_NAME_LENGTH} characters")
    if not _EMAIL.fullmatch(text):
        raise _refuse("must be an email address")
    return text.lower()


def _password(text: str) -> str:
    if not text:
        raise _refuse("must not be empty")
    return text


def _new_password(text: str) -> str:
    if len(passwords.normalize(text).encode()) > passwords.MAX_BYTES:
        raise _refuse(f"must have at most {passwords.MAX_BYTES} bytes")
    return text


def _password_hash(text: str) -> str:
    try:
        return passwords.import_hash(text)
    except ValueError as error:
        raise _refuse(str(error)) from None


def _past(value: Any) -> datetime:
    try:
        if not isinstance(value, str) or not _MOMENT.fullmatch(value):
            raise ValueError
        moment = datetime.fromisoformat(value.upper())
    except ValueError:
        raise _refuse("must be a moment like 2026-11-22T09:00:00Z") from None
    if not _EPOCH <= moment <= clock.utcnow():
        raise _refuse("must lie between 1970 and now")
    return moment.astimezone(UTC)


Username = Annotated[
    str,
    AfterValidator(_username),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_STORED_USERNAME}),
]
Email = Annotated[
    str,
    AfterValidator(_email),
    WithJsonSchema({"type": "string", "format": "email", "maxLength": MAX_NAME_LENGTH}),
]
Password = Annotated[
    str, AfterValidator(_password), WithJsonSchema({"type": "string", "minLength": 1})
]
NewPassword = Annotated[
    Password,
    AfterValidator(_new_password),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": passwords.MAX_BYTES}),
]


class Body(BaseModel):
    """A JSON object; a number is no string, and keys that are not asked for are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class NewUser(Body):
    """Somebody who registers, or is added."""

    username: Username
    email: Email
    password: NewPassword


class ImportedUser(Body):
    """A user from a file; `password_hash` comes out as it is stored.

    The moment has to be one that a `Cursor` can name.
    """

    username: Username
    email: Email
    password_hash: Annotated[str, AfterValidator(_password_hash)]
    active: bool = True
    admin: bool = False
    created_at: Annotated[datetime | None, BeforeValidator(_past)] = None


class Credentials(Body):
    """Somebody who logs in; a password too long to be anybody's is simply a wrong one."""

    email: Email
    password: Password


class UserChange(Body):
    """What is to be different about a user: at least one of the four.

    Whose own account it is gives `current_password` too.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [{"required": [name]} for name in ("username", "email", "active", "admin")]
        }
    )

    username: Username = Field(default_factory=str)
    email: Email = Field(default_factory=str)
    active: bool = Field(default_factory=bool)
    admin: bool = Field(default_factory=bool)
    current_password: Password = Field(default_factory=str)

    @property
    def changes(self) -> dict[str, str | bool]:
        """What was sent, but for the password."""
        return self.model_dump(exclude_unset=True, exclude={"current_password"})

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.changes:
            raise _refuse("must have a username, email, active or admin")
        return self


class AccountDeletion(Body):
    """Somebody who wants to be forgotten."""

    current_password: Password


class RefreshToken(Body):
    """Somebody who wants the next pair of tokens."""

    refresh_token: str


class PasswordChange(Body):
    """Somebody who is logged in and wants another password."""

    current_password: Password
    new_password: NewPassword
    keep_sessions: bool = False


def _user_id(text: str) -> int:
    try:
        return identifiers.parse(text)
    except ValueError:
        raise UserNotFound from None


class UserPath(BaseModel):
    """The id in /users/<id>; a word that is none is a user who does not exist."""

    user_id: Annotated[
        int,
        BeforeValidator(_user_id),
        WithJsonSchema({"type": "integer", "minimum": 1, "maximum": identifiers.MAX_ID}),
    ]


def _session_id(text: str) -> str:
    try:
        return identifiers.parse_session(text)
    except ValueError:
        raise SessionNotFound from None


class SessionPath(BaseModel):
    """The id in /auth/sessions/<id>; a word that is none is a session that does not exist."""

    session_id: Annotated[
        str,
        BeforeValidator(_session_id),
        WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9_-]{22}$"}),
    ]


class Cursor(NamedTuple):
    """The place in a list after which a page begins: the last row of the one before."""

    created_at: datetime
    row_id: int

    @classmethod
    def parse(cls, text: str, max_id: int = identifiers.MAX_ID) -> Self:
        """Return the cursor that `str()` wrote; raises a validation error for all else."""
        moment, _, row_id = text.partition("-")
        try:
            if not re.fullmatch(r"[0-9]{1,17}", moment):
                raise ValueError(moment)
            created_at = _EPOCH + timedelta(microseconds=int(moment))
            return cls(created_at, identifiers.parse(row_id, max_id))
        except (ValueError, OverflowError):
            raise _refuse("must be a cursor that a page gave") from None

    def __str__(self) -> str:
        """Return the moment in microseconds since 1970 and the id."""
        return f"{(self.created_at - _EPOCH) // timedelta(microseconds=1)}-{self.row_id}"


class NameCursor(NamedTuple):
    """The place in a search after which a page begins: a name that matched, or just did not."""

    name: str
    is_email: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the cursor that `str()` wrote; raises a validation error for all else."""
        try:
            name = base64.b64decode(text[1:], altchars=b"-_", validate=True).decode()
            cursor = cls(name, text.startswith("e"))
            possible = 1 <= len(name) <= MAX_STORED_USERNAME and not _has_controls(name)
            if str(cursor) != text or not possible:
                raise ValueError(text)
        except ValueError:
            raise _refuse("must be a cursor that a page gave") from None
        return cursor

    def __str__(self) -> str:
        """Return the kind of name, and the name in base64url."""
        kind = "e" if self.is_email else "u"
        return kind + base64.urlsafe_b64encode(self.name.encode()).decode()


def _event_cursor(text: str) -> Cursor:
    return Cursor.parse(text, identifiers.MAX_EVENT_ID)


def _digits(value: Any) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,9}", value):
        raise _refuse("must be a whole number")
    return int(value)


class Query(BaseModel):
    """What stands behind the question mark; keys that are not asked for are ignored."""

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the JSON schema, made once: flask-openapi3 asks for it at every request."""
        return _query_schema(cls, *args, **kwargs)


@cache
def _query_schema(query: type[Query], *args: Any, **kwargs: Any) -> dict[str, Any]:
    return super(Query, query).model_json_schema(*args, **kwargs)


_CURSOR = WithJsonSchema({"type": "string", "description": "`next` of the page before"})
Limit = Annotated[int, BeforeValidator(_digits), Field(ge=1, le=500)]


class UsersPage(Query):
    """Which users to list: all, or those one of whose names begins with `query`.

    At most `limit`, those that come after the cursor, which is one of the same list.
    """

    query: Username | None = None
    limit: Limit = 50
    after: Any = Field(None, json_schema_extra={"type": "string"})  # a Cursor or a NameCursor

    @field_validator("after", mode="plain")
    @classmethod
    def _parse_cursor(cls, text: str, others: ValidationInfo) -> Cursor | NameCursor:
        return NameCursor.parse(text) if others.data.get("query") else Cursor.parse(text)


class Page(Query):
    """Which rows to list: at most `limit`, those that come after the cursor."""

    limit: Limit = 50
    after: Annotated[Cursor | None, BeforeValidator(Cursor.parse), _CURSOR] = None


class EventsPage(Page):
    """Which events to list; their ids are of 64 bits."""

    after: Annotated[Cursor | None, BeforeValidator(_event_cursor), _CURSOR] = None


class LogoutScope(Query):
    """Which sessions of the caller to end: this one unless told."""

    scope: Literal["others", "all"] | None = None


def refuse(error: ValidationError) -> InvalidPayload:
    """Return the refusal that says per field what is wrong, and never with which value."""
    return InvalidPayload(errors={_field(detail): _reason(detail) for detail in error.errors()})


def _field(detail: Any) -> str:
    return str(detail["loc"][0]) if detail["loc"] else "body"


def _reason(detail: Any) -> str:
    match detail["type"]:
        case "missing":
            return "is required"
        case "string_type":
            return "must be a string"
        case "refused":
            return str(detail["msg"])
        case _:
            return str(detail["msg"]).removeprefix("Input ")
