"""What answers look like, and which of them a view has: what the API document is made from.

A view names its answers with `@answers.has(...)`, a guard its refusals with `@answers.raises(...)`.
Nothing here is looked at while a request is answered.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from project.errors import ServiceError

Function = TypeVar("Function", bound=Callable[..., Any])


class Answers(NamedTuple):
    """What a view answers when it did what it was asked for, and what it refuses by itself."""

    status: int
    model: type[BaseModel]
    errors: tuple[type[ServiceError], ...]


def has(status: int, model: type[BaseModel], *errors: type[ServiceError]) -> Callable[..., Any]:
    """Return a decorator that names the answers of a view.

    Left out is what others refuse: its guards, its schemas, and everything that is everywhere.
    """

    def name(view: Function) -> Function:
        view.answers = Answers(status, model, errors)  # type: ignore[attr-defined]
        return view

    return name


def raises(*errors: type[ServiceError]) -> Callable[[Function], Function]:
    """Return a decorator that names what a guard raises."""

    def name(guard: Function) -> Function:
        guard.raises = errors  # type: ignore[attr-defined]  # a function takes any attribute
        return guard

    return name


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Success(_Object):
    """Every answer to a request that did what it asked for."""

    status: Literal["success"]


class Done(Success):
    """A sentence for people."""

    message: str


class Probe(Done):
    """What a balancer asks for: without a token, in the clear too, and as often as it likes."""


class Tokens(Done):
    """The tokens of a session."""

    auth_token: str
    refresh_token: str
    expires_in: int


class User(_Object):
    """Somebody who can log in."""

    id: int
    username: str
    email: str
    created_at: datetime


class ListedUser(User):
    """A user; an admin is told more."""

    active: bool = True
    admin: bool = False


class FullUser(User):
    """A user, with their rights."""

    active: bool
    admin: bool


class Caller(User):
    """Who is calling."""

    active: bool


class Session(_Object):
    """A login that still holds."""

    id: str
    created_at: datetime
    last_used_at: datetime
    ip: str | None
    user_agent: str
    expires_at: datetime
    current: bool


class Event(_Object):
    """Something that happened to an account."""

    id: int
    created_at: datetime
    kind: str
    actor_id: int | None
    session_id: str | None
    ip: str | None
    user_agent: str
    request_id: str | None
    details: dict[str, str | int | bool]


class _Sessions(_Object):
    sessions: list[Session]


class _Page(_Object):
    next: str | None


class _Users(_Page):
    users: list[ListedUser]


class _Events(_Page):
    events: list[Event]


class OneUser(Success):
    """A user."""

    data: ListedUser


class ChangedUser(Done):
    """A user as they are now."""

    data: FullUser


class TheCaller(Success):
    """Who is calling."""

    data: Caller


class Sessions(Success):
    """The live sessions of the caller."""

    data: _Sessions


class Users(Success):
    """A page of users."""

    data: _Users


class Events(Success):
    """A page of events."""

    data: _Events
