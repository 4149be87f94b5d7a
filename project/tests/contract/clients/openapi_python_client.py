"""The life cycle of an account with the client that openapi-python-client generates.

Usage: python openapi_python_client.py BASE_URL ADMIN_EMAIL ADMIN_PASSWORD
"""

import sys
from typing import Any, TypeVar

import pyotp
from users_service_client import AuthenticatedClient, Client
from users_service_client.api.auth import (
    begin_totp,
    change_password,
    confirm_totp,
    delete_account,
    end_session,
    get_totp,
    get_user_status,
    list_sessions,
    login_user,
    login_with_code,
    logout_user_post,
    refresh_tokens,
    register_user,
    turn_off_totp,
)
from users_service_client.api.health import get_readiness
from users_service_client.api.users import (
    add_user,
    change_user,
    delete_user,
    get_single_user,
    list_events,
    list_users,
    reset_totp,
)
from users_service_client.models import (
    AccountDeletion,
    AddedUser,
    ChangedUser,
    Confirmation,
    Credentials,
    CurrentPassword,
    Done,
    Error,
    ErrorCode,
    Events,
    FieldError,
    FieldErrorCode,
    NewTotp,
    NewUser,
    OneUser,
    OptionalCode,
    PasswordChange,
    Probe,
    RecoveryCodes,
    RefreshToken,
    RegisteredUser,
    RequiredCode,
    SecondStep,
    Sessions,
    TheCaller,
    Tokens,
    Totp,
    UserChange,
    Users,
)
from users_service_client.types import Response

Model = TypeVar("Model")
PASSWORD, NEW_PASSWORD = "correct horse battery", "another horse battery"
BASE_URL, ADMIN_EMAIL, ADMIN_PASSWORD = sys.argv[1:]
ANONYMOUS = Client(base_url=BASE_URL)


def parsed(step: str, kind: type[Model], response: Response[Any]) -> Model:
    """Return the parsed response to a step, which must be of this kind."""
    print(f"{step:<28} {response.status_code} {type(response.parsed).__name__}")
    if not isinstance(response.parsed, kind):
        sys.exit(f"{step}: {response.content!r} is parsed as {response.parsed!r}, not {kind}")
    return response.parsed


def authenticated(pair: Tokens) -> AuthenticatedClient:
    """Return a client that sends the access token of a pair."""
    return AuthenticatedClient(base_url=BASE_URL, token=pair.auth_token)


def expect(name: str, actual: object, expected: object) -> None:
    """End the program if a value differs from the expected one."""
    if actual != expected:
        sys.exit(f"{name}: {actual!r} is not {expected!r}")


def log_in(email: str, password: str) -> Tokens:
    """Return a token pair."""
    body = Credentials(email=email, password=password)
    return parsed("log in", Tokens, login_user.sync_detailed(client=ANONYMOUS, body=body))


def own_account() -> None:
    """Go through the life of an account, as its user."""
    user = NewUser(username="python", email="python@example.com", password=PASSWORD)
    parsed("ready", Probe, get_readiness.sync_detailed(client=ANONYMOUS))
    registered = register_user.sync_detailed(client=ANONYMOUS, body=user)
    first = parsed("register", RegisteredUser, registered)
    expect("email", first.data.email, user.email)
    taken = register_user.sync_detailed(client=ANONYMOUS, body=user)
    refusal = parsed("register again", FieldError, taken)
    expect("code", refusal.code, FieldErrorCode.USER_EXISTS)
    expect("errors", bool(refusal.errors.additional_properties), True)

    body = RefreshToken(refresh_token=first.refresh_token)
    pair = parsed("refresh", Tokens, refresh_tokens.sync_detailed(client=ANONYMOUS, body=body))
    client = authenticated(pair)
    caller = parsed("status", TheCaller, get_user_status.sync_detailed(client=client)).data
    expect("username", caller.username, "python")

    other = log_in(user.email, PASSWORD)
    found = parsed("sessions", Sessions, list_sessions.sync_detailed(client=client)).data.sessions
    expect("sessions", [each.current for each in found], [False, True])
    parsed("end a session", Done, end_session.sync_detailed(found[0].id, client=client))
    ended = get_user_status.sync_detailed(client=authenticated(other))
    expect("code", parsed("its status", Error, ended).code, ErrorCode.SESSION_ENDED)

    one = parsed("user", OneUser, get_single_user.sync_detailed(caller.id, client=client)).data
    expect("created_at", one.created_at, caller.created_at)
    change = UserChange(username="snake", current_password=PASSWORD)
    changed = change_user.sync_detailed(caller.id, client=client, body=change)
    expect("username", parsed("change the user", ChangedUser, changed).data.username, "snake")
    events = parsed("events", Events, list_events.sync_detailed(caller.id, client=client)).data
    expect("newest", str(events.events[0].kind), "user_changed")

    wrong = PasswordChange(current_password="wrong", new_password=NEW_PASSWORD)
    refused = change_password.sync_detailed(client=client, body=wrong)
    expect("code", parsed("wrong password", Error, refused).code, ErrorCode.WRONG_PASSWORD)
    right = PasswordChange(current_password=PASSWORD, new_password=NEW_PASSWORD)
    parsed("password", Done, change_password.sync_detailed(client=client, body=right))
    parsed("log out", Done, logout_user_post.sync_detailed(client=client))
    parsed("status", Error, get_user_status.sync_detailed(client=client))

    client = authenticated(log_in(user.email, NEW_PASSWORD))
    second_factor(client, user.email)
    deletion = AccountDeletion(current_password=NEW_PASSWORD)
    parsed("delete the account", Done, delete_account.sync_detailed(client=client, body=deletion))


def second_factor(client: AuthenticatedClient, email: str) -> None:
    """Set an authenticator up, log in with a code, and turn it off."""
    password = CurrentPassword(current_password=NEW_PASSWORD)
    begun = parsed("begin", NewTotp, begin_totp.sync_detailed(client=client, body=password)).data
    first = RequiredCode(code=pyotp.TOTP(begun.secret).now())
    confirmed = confirm_totp.sync_detailed(client=client, body=first)
    one, two, *_ = parsed("confirm", RecoveryCodes, confirmed).data.recovery_codes

    body = Credentials(email=email, password=NEW_PASSWORD)
    refused = login_user.sync_detailed(client=ANONYMOUS, body=body)
    failure = parsed("log in", Error, refused)
    expect("code", failure.code, ErrorCode.MFA_REQUIRED)
    step = SecondStep(mfa_token=failure.mfa_token or "", code=one)
    parsed("second step", Tokens, login_with_code.sync_detailed(client=ANONYMOUS, body=step))
    state = parsed("state", Totp, get_totp.sync_detailed(client=client)).data
    expect("state", (state.enabled, state.recovery_codes_left), (True, 9))
    body = Credentials(email=email, password=NEW_PASSWORD, code=one)
    used = parsed("used code", Error, login_user.sync_detailed(client=ANONYMOUS, body=body))
    expect("code", used.code, ErrorCode.WRONG_CODE)
    off = Confirmation(current_password=NEW_PASSWORD, code=two)
    parsed("turn off", Done, turn_off_totp.sync_detailed(client=client, body=off))


def other_accounts() -> None:
    """Add, find, change and delete users, as an admin."""
    client = authenticated(log_in(ADMIN_EMAIL, ADMIN_PASSWORD))
    for name in ("python-1", "python-2"):
        user = NewUser(username=name, email=f"{name}@example.com", password=PASSWORD)
        added = add_user.sync_detailed(client=client, body=user)
        expect("username", parsed("add", AddedUser, added).data.username, name)
    page = parsed("users", Users, list_users.sync_detailed(client=client, limit=1)).data
    expect("page", [user.username for user in page.users], ["python-2"])
    page = parsed(
        "next page", Users, list_users.sync_detailed(client=client, limit=1, after=page.next_ or "")
    ).data
    expect("page", [user.username for user in page.users], ["python-1"])
    found = list_users.sync_detailed(client=client, query="python-")
    users = parsed("search", Users, found).data.users
    expect(
        "found",
        [(user.username, user.admin) for user in users],
        [("python-1", False), ("python-2", False)],
    )
    refused = list_users.sync_detailed(client=client, limit=0)
    expect("code", parsed("no page", FieldError, refused).code, FieldErrorCode.INVALID_PAYLOAD)
    for one in users:
        change = UserChange(active=False)
        changed = change_user.sync_detailed(one.id, client=client, body=change)
        expect("active", parsed("deactivate", ChangedUser, changed).data.active, False)
        # The admin has no authenticator, so the code is ignored.
        reset = reset_totp.sync_detailed(one.id, client=client, body=OptionalCode(code="123456"))
        expect("code", parsed("none", Error, reset).code, ErrorCode.TOTP_NOT_FOUND)
        parsed("delete", Done, delete_user.sync_detailed(one.id, client=client))
    gone = parsed("user", Error, get_single_user.sync_detailed(users[0].id, client=client))
    expect("code", gone.code, ErrorCode.USER_NOT_FOUND)
    parsed("log out", Done, logout_user_post.sync_detailed(client=client))


own_account()
other_accounts()
