"""Schemas of request bodies, path and query parameters, and responses.

The docstrings of response schemas are descriptions in the API document.
"""

from datetime import datetime
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import TypeAliasType
from werkzeug.datastructures import ETags
from werkzeug.http import parse_etags

from project import ids
from project.accounts.audit import Kind
from project.accounts.fields import (
    Body,
    Code,
    Email,
    NewPassword,
    Password,
    Roles,
    Username,
    refuse,
)
from project.errors import SessionNotFound, UserNotFound


class OptionalCode(Body):
    """A code, for a caller who has a second factor and whose session has given none just now."""

    code: Code = Field(default_factory=str, description="From the authenticator, or for recovery.")


class Credentials(OptionalCode):
    """The email and password of a user; a password longer than allowed is a wrong password.

    `code` is for a user with a second factor, who may send it in a second step instead.
    """

    email: Email
    password: Password


class RequiredCode(Body):
    """A code from the new authenticator."""

    code: Code


class SecondStep(RequiredCode):
    """The token of the first step of a login, and the code of the user."""

    mfa_token: str


class CurrentPassword(Body):
    """The password of the caller."""

    current_password: Password


class UserChange(OptionalCode):
    """The changes to a user: at least one of `username`, `email`, `active`, `admin` and `roles`.

    `current_password` alone changes nothing and is refused. Callers who change their own account
    send it as well, and callers with a second factor `code`.
    """

    # "At least one of five" would need `anyOf`, which client generators turn into an untyped body.
    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    username: Username = Field(default_factory=str)
    email: Email = Field(default_factory=str)
    active: bool = Field(default_factory=bool)
    admin: bool = Field(default_factory=bool)
    roles: Roles = Field(default_factory=list)
    current_password: Password = Field(default_factory=str)

    @property
    def changes(self) -> dict[str, Any]:
        """The members that were sent, except `current_password` and `code`."""
        return self.model_dump(exclude_unset=True, exclude={"current_password", "code"})

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.changes:
            raise refuse("must have a username, email, active, admin or roles")
        return self


class UserVersion(BaseModel):
    """The precondition of a change."""

    if_match: Annotated[
        str | None,
        WithJsonSchema(
            {
                "type": "string",
                "description": "The `ETag` of the user (RFC 9110, 13.1.1); 412 if it has changed.",
            }
        ),
    ] = Field(default_factory=lambda: None, alias="If-Match")

    @property
    def versions(self) -> ETags | None:
        """The versions that the header names, or None without the header."""
        return None if self.if_match is None else parse_etags(self.if_match)


class Confirmation(OptionalCode):
    """The password of the caller, and a code if they have a second factor."""

    current_password: Password


class AccountDeletion(Confirmation):
    """What confirms the deletion of the caller's account."""


class EmailAddress(Body):
    """An email address, which need not belong to a user."""

    email: Email


class LinkToken(Body):
    """The token of a link from an email."""

    token: str


class PasswordReset(LinkToken):
    """The token of a link to reset the password, and the new password."""

    new_password: NewPassword


class EmailChange(Confirmation):
    """The new email of the caller, and what confirms the change."""

    email: Email


class Invitation(Body):
    """The email of a person who is invited to register.

    `username` is what the user is called unless they choose another name.
    """

    email: Email
    username: Username = Field(default_factory=str)


class AcceptedInvitation(LinkToken):
    """The token of an invitation, and the password of the user.

    `username` is required if the invitation has none.
    """

    username: Username = Field(default_factory=str)
    password: NewPassword


class RefreshToken(Body):
    """The refresh token of a session."""

    refresh_token: str


class PasswordChange(Confirmation):
    """The current and the new password of the caller, and a code if they have a second factor."""

    new_password: NewPassword
    # openapi-typescript makes a member with a default required.
    keep_sessions: bool = Field(
        default_factory=bool,
        description="Whether the caller's other sessions continue; if absent, they end.",
    )


class TokenRequest(Body):
    """The parameters of a token request, form-encoded (RFC 6749, 4.4.2)."""

    # A text, so that the refusal of another grant has its own code.
    grant_type: str = Field(min_length=1, json_schema_extra={"enum": ["client_credentials"]})
    scope: str = Field(
        default_factory=str, description="Words separated by spaces; by default, all."
    )

    @property
    def words(self) -> list[str] | None:
        """The words of `scope`, each once, or None if it was not sent."""
        return list(dict.fromkeys(self.scope.split(" "))) if self.scope else None


class PresentedToken(Body):
    """A token that a client has received, form-encoded."""

    token: str = Field(min_length=1)
    token_type_hint: str = Field(default_factory=str, description="Has no effect.")


def _user_id(text: str) -> int:
    try:
        return ids.parse(text)
    except ValueError:
        raise UserNotFound from None


class UserPath(BaseModel):
    """The user ID in a path; an invalid ID is an unknown user (404)."""

    user_id: Annotated[
        int,
        BeforeValidator(_user_id),
        WithJsonSchema({"type": "integer", "minimum": 1, "maximum": ids.MAX_ID}),
    ]


def _session_id(text: str) -> str:
    try:
        return ids.parse_session(text)
    except ValueError:
        raise SessionNotFound from None


class SessionPath(BaseModel):
    """The session ID in a path; an invalid ID is an unknown session (404)."""

    session_id: Annotated[
        str,
        BeforeValidator(_session_id),
        WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9_-]{22}$"}),
    ]


class Query(BaseModel):
    """Query parameters; unknown ones are ignored."""

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the JSON schema, cached because flask-openapi3 uses it in every request."""
        return _query_schema(cls, *args, **kwargs)


@cache
def _query_schema(query: type[Query], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the JSON schema of `query` without null, which no query parameter can be."""
    schema = super(Query, query).model_json_schema(*args, **kwargs)
    for field in schema["properties"].values():
        if field.get("default", ...) is None:
            del field["default"]
        (kind,) = [each for each in field.pop("anyOf", [{}]) if each != {"type": "null"}]
        field |= kind
    return schema


class LogoutScope(Query):
    """Which sessions of the caller to end; by default, the current one."""

    scope: Literal["others", "all"] | None = None


class Success(BaseModel):
    """A successful response."""

    status: Literal["success"]


class Done(Success):
    """A message for people."""

    message: str


class Probe(Done):
    """The response to a probe, which needs no token and is allowed over plain HTTP."""


class Liveness(Probe):
    """The response to a probe, which needs no token and is allowed over plain HTTP.

    `version` is included in development only.
    """

    version: str = Field(default_factory=str)


class Service(Success):
    """What this service is."""

    name: str
    documentation: Annotated[
        str | None,
        Field(description="The path of a page with this document, or null if there is none."),
    ]


class Tokens(Done):
    """The token pair of a session, with the seconds until each token expires."""

    auth_token: str
    refresh_token: str
    expires_in: int
    refresh_expires_in: int


class User(BaseModel):
    """A user."""

    id: int
    username: str
    email: str
    created_at: datetime


_AMR = "How the user has proved who they are: `pwd`, and `otp` or `rc` with a second factor."
_SHOWN_ROLES = "Included if ISSUER is set or the user has roles; `admin` is the first of an admin."


class ListedUser(User):
    """A user; `active`, `admin` and `roles` are included for admins only."""

    # Optional and without a default, which the document would promise.
    active: bool = Field(default_factory=bool)
    admin: bool = Field(default_factory=bool)
    roles: list[str] = Field(default_factory=list, description=_SHOWN_ROLES)


class FullUser(User):
    """A user, including `active` and `admin`.

    `email_verified` is included unless EMAIL_VERIFICATION is off.
    """

    active: bool
    admin: bool
    roles: list[str] = Field(default_factory=list, description=_SHOWN_ROLES)
    email_verified: bool = Field(default_factory=bool)


class Session(BaseModel):
    """An active session."""

    id: str
    created_at: datetime
    last_used_at: datetime
    ip: str | None
    user_agent: str
    expires_at: datetime
    amr: Annotated[list[str], Field(description=_AMR)]
    current: bool


EventKind = TypeAliasType(
    "EventKind", Annotated[str, WithJsonSchema({"type": "string", "enum": list(map(str, Kind))})]
)


class Event(BaseModel):
    """An event in the audit log of an account."""

    id: int
    created_at: datetime
    kind: EventKind
    actor_id: int | None
    session_id: str | None
    ip: str | None
    user_agent: str
    request_id: str | None
    details: dict[str, str | int | bool]


class TotpSecret(BaseModel):
    """A secret for an authenticator."""

    secret: Annotated[str, Field(description="In base32, to type in.")]
    uri: Annotated[str, Field(description="For a QR code: `otpauth://totp/...`.")]


class TotpState(BaseModel):
    """Whether the caller has an authenticator."""

    enabled: bool
    recovery_codes_left: int


class RecoveryCodeList(BaseModel):
    """Recovery codes, which are shown once."""

    recovery_codes: list[str]


class SessionList(BaseModel):
    """The sessions of a user."""

    sessions: list[Session]


class _Page(BaseModel):
    next: Annotated[str | None, Field(description="The `after` of the next page, or null.")]


class UserPage(_Page):
    """The users of a page."""

    users: list[ListedUser]


class EventPage(_Page):
    """The events of a page."""

    events: list[Event]


class OneUser(Success):
    """A user."""

    data: ListedUser


class RegisteredUser(Tokens):
    """The registered user, and the token pair of their first session."""

    data: FullUser


class AddedUser(Done):
    """The added user."""

    data: FullUser


class ChangedUser(Done):
    """The changed user."""

    data: FullUser


class TheCaller(Success):
    """The authenticated user."""

    data: FullUser


class Sessions(Success):
    """The active sessions of the caller."""

    data: SessionList


class NewTotp(Success):
    """The secret of an authenticator that is not on yet."""

    data: TotpSecret


class Totp(Success):
    """The state of the caller's second factor."""

    data: TotpState


class RecoveryCodes(Done):
    """The new recovery codes of the caller."""

    data: RecoveryCodeList


class Users(Success):
    """A page of users."""

    data: UserPage


class Events(Success):
    """A page of events."""

    data: EventPage


class Jwk(BaseModel):
    """A public key (RFC 7517, RFC 7518 6.2)."""

    kty: Literal["EC"]
    crv: Literal["P-256"]
    x: str
    y: str
    kid: str
    alg: Literal["ES256"]
    use: Literal["sig"]


class KeySet(BaseModel):
    """The public keys that auth tokens are signed with."""

    keys: list[Jwk]


class ServerMetadata(BaseModel):
    """The names and addresses that an OAuth client needs (RFC 8414, 2)."""

    issuer: str
    jwks_uri: str
    token_endpoint: str
    token_endpoint_auth_methods_supported: list[str]
    grant_types_supported: list[str]
    introspection_endpoint: str
    introspection_endpoint_auth_methods_supported: list[str]
    revocation_endpoint: str
    revocation_endpoint_auth_methods_supported: list[str]


class ClientToken(BaseModel):
    """A client's own token (RFC 6749, 5.1)."""

    access_token: str
    token_type: Literal["Bearer"]
    expires_in: int
    scope: str = Field(default_factory=str)


class Introspection(BaseModel):
    """Whether a token is active; only then the response has other members (RFC 7662, 2.2)."""

    active: bool
    iss: str = Field(default_factory=str)
    aud: str = Field(default_factory=str)
    sub: str = Field(default_factory=str)
    client_id: str = Field(default_factory=str)
    username: str = Field(default_factory=str)
    scope: str = Field(default_factory=str)
    token_type: str = Field(default_factory=str)
    iat: int = Field(default_factory=int)
    exp: int = Field(default_factory=int)
    jti: str = Field(default_factory=str)
    sid: str = Field(default_factory=str)
    auth_time: int = Field(default_factory=int)
    amr: list[str] = Field(default_factory=list)


class Revocation(BaseModel):
    """A session that has ended."""

    sid: str
    ended_at: datetime
    expires_at: Annotated[datetime, Field(description="When its last auth token expires.")]


class RevocationPage(BaseModel):
    """The sessions of a page."""

    revocations: list[Revocation]
    next: Annotated[str, Field(description="The `after` of the next request.")]


class Revocations(Success):
    """A page of ended sessions."""

    data: RevocationPage
