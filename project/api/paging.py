"""Cursor pagination: the cursors, and the query parameters of lists."""

import base64
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NamedTuple, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from project import ids
from project.accounts.fields import Username, has_controls, refuse
from project.api.schemas import Query
from project.models import MAX_STORED_USERNAME

MAX_IDS = 100
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Cursor(NamedTuple):
    """The position of a page in a list, newest first: the last row of the previous page."""

    created_at: datetime
    row_id: int

    @classmethod
    def parse(cls, text: str, max_id: int = ids.MAX_ID) -> Self:
        """Return the cursor that `str()` encoded; raises a validation error if it is invalid."""
        microseconds, _, row_id = text.partition("-")
        try:
            if not re.fullmatch(r"[0-9]{1,17}", microseconds):
                raise ValueError(microseconds)
            created_at = _EPOCH + timedelta(microseconds=int(microseconds))
            return cls(created_at, ids.parse(row_id, max_id))
        except (ValueError, OverflowError):
            raise refuse("must be a cursor that a page gave") from None

    def __str__(self) -> str:
        """Return the time in microseconds since 1970, and the row ID."""
        return f"{(self.created_at - _EPOCH) // timedelta(microseconds=1)}-{self.row_id}"


class NameCursor(NamedTuple):
    """The position of a page in a search: the last username or email that was compared."""

    name: str
    is_email: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the cursor that `str()` encoded; raises a validation error if it is invalid."""
        try:
            name = base64.b64decode(text[1:], altchars=b"-_", validate=True).decode()
            cursor = cls(name, text.startswith("e"))
            possible = 1 <= len(name) <= MAX_STORED_USERNAME and not has_controls(name)
            if str(cursor) != text or not possible:
                raise ValueError(text)
        except ValueError:
            raise refuse("must be a cursor that a page gave") from None
        return cursor

    def __str__(self) -> str:
        """Return the kind of name (`u` or `e`), and the name in base64url."""
        kind = "e" if self.is_email else "u"
        return kind + base64.urlsafe_b64encode(self.name.encode()).decode()


def _event_cursor(text: str) -> Cursor:
    return Cursor.parse(text, ids.MAX_EVENT_ID)


def _whole_number(value: Any) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,9}", value):
        raise refuse("must be a whole number")
    return int(value)


def _position(text: str) -> int:
    try:
        return 0 if text == "0" else ids.parse(text, ids.MAX_EVENT_ID)
    except ValueError:
        raise refuse("must be the `next` of a page") from None


def _user_ids(text: str) -> list[int]:
    try:
        user_ids = [ids.parse(each, 9_999_999_999) for each in text.split(",")]
    except ValueError:
        user_ids = []
    if not 1 <= len(user_ids) <= MAX_IDS:
        raise refuse(f"must have 1 to {MAX_IDS} user IDs, separated by commas")
    return [user_id for user_id in user_ids if user_id <= ids.MAX_ID]  # no user has a larger ID


_IDS = WithJsonSchema(
    {
        "type": "string",
        "pattern": "^[1-9][0-9]{0,9}(,[1-9][0-9]{0,9}){0,99}$",
        "description": "User IDs, separated by commas; not together with `query` or `after`.",
    }
)
_CURSOR_SCHEMA: dict[str, Any] = {
    "type": "string",
    "minLength": 1,
    "description": "The `next` of the previous page.",
}
_CURSOR = WithJsonSchema(_CURSOR_SCHEMA)
Limit = Annotated[int, Field(ge=1, le=500), BeforeValidator(_whole_number)]


class UsersPage(Query):
    """A page of at most `limit` users: all users, or those that match `query`; or users by `ids`.

    `after` is a Cursor in a list of all users, and a NameCursor in a search.
    """

    query: Username | None = None
    ids: Annotated[list[int] | None, BeforeValidator(_user_ids), _IDS] = None
    limit: Limit = 50
    after: Any = Field(None, json_schema_extra=_CURSOR_SCHEMA)

    @field_validator("after", mode="plain")
    @classmethod
    def _parse_cursor(cls, text: str, others: ValidationInfo) -> Cursor | NameCursor:
        return NameCursor.parse(text) if others.data.get("query") else Cursor.parse(text)

    @model_validator(mode="after")
    def _ids_stand_alone(self) -> Self:
        if self.ids is not None and (self.query is not None or self.after is not None):
            raise refuse("must have ids, or query and after, not both")
        return self


class Page(Query):
    """A page of at most `limit` rows after a cursor."""

    limit: Limit = 50
    after: Annotated[Cursor | None, BeforeValidator(Cursor.parse), _CURSOR] = None


class EventsPage(Page):
    """A page of events, whose IDs have 64 bits."""

    after: Annotated[Cursor | None, BeforeValidator(_event_cursor), _CURSOR] = None


class RevocationsPage(Query):
    """A page of at most `limit` ended sessions after a position of the feed."""

    limit: Annotated[int, Field(ge=1, le=1_000), BeforeValidator(_whole_number)] = 1_000
    # Not a default, which the API document would have as a number.
    after: Annotated[int, BeforeValidator(_position), _CURSOR] = Field(default_factory=int)
