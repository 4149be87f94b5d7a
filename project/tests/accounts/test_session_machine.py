"""Sessions under random sequences of requests, compared with a model of which tokens live."""

import tempfile
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import jwt
from hypothesis import configuration, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete
from werkzeug.test import TestResponse

from project import db, errors
from project.accounts import administration
from project.models import User
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import ORIGIN

MINUTE, DAY = 60, 86_400  # seconds
AUTH_LIFETIMES = st.sampled_from([15 * MINUTE, 30 * DAY, 40 * DAY])
REFRESH_LIFETIME = 30 * DAY
SESSION_LIFETIME = 45 * DAY
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)

NAMES = ["ann", "bob", "cho"]
# A value that is listed twice is drawn twice as often.
PASSWORDS = st.sampled_from(["one", "one", "two"])
SECONDS = st.sampled_from([0, 0, 1, 29, 30, 31, 15 * MINUTE, 20 * DAY])

Refusal = type[errors.ServiceError]


class Account:
    """A user in the model."""

    def __init__(self, password: str) -> None:
        self.password = password
        self.active = True


class Session:
    """A session in the model; times are seconds since EPOCH."""

    def __init__(self, number: int, account: Account, now: int) -> None:
        self.number = number
        self.account = account
        self.began = self.refreshed = now
        self.generation = 0
        self.ended = False


class Token(NamedTuple):
    """A token of either kind."""

    text: str
    session: Session
    generation: int
    expires: int


class Pair(NamedTuple):
    """The token pair of one generation of a session."""

    auth: Token
    refresh: Token

    def __repr__(self) -> str:
        """Name the pair in the report of a failure."""
        return f"<pair {self.auth.generation} of session {self.auth.session.number}>"


class Model:
    """The accounts and sessions, and which error each request should get, or None."""

    def __init__(self, lifetime: int) -> None:
        self.now = 0
        self.auth_lifetime = lifetime
        self.accounts: dict[str, Account] = {}
        self.sessions: list[Session] = []

    def register(self, name: str, password: str) -> None:
        """Add an account with its first session."""
        self.accounts[name] = Account(password)
        self.log_in(name, password)

    def log_in(self, name: str, password: str) -> Refusal | None:
        """Add a session."""
        account = self.accounts.get(name)
        if account is None or account.password != password:
            return errors.InvalidCredentials
        if not account.active:
            return errors.AccountInactive
        self.sessions.append(Session(len(self.sessions), account, self.now))
        return None

    def refuse(self, token: Token) -> Refusal | None:
        """Return why a token of the right kind is refused, or None."""
        if token.expires <= self.now:
            return errors.TokenExpired
        if not token.session.account.active:
            return errors.AccountInactive
        return errors.SessionEnded if token.session.ended else None

    def refresh(self, token: Token) -> Refusal | None:
        """Rotate the session, or end it when the token was used more than 30 seconds ago."""
        session = token.session
        if refused := self.refuse(token):
            return refused
        if token.generation == session.generation:
            session.generation += 1
            session.refreshed = self.now
        elif token.generation < session.generation - 1 or self.now - session.refreshed > 30:
            session.ended = True
            return errors.RefreshReused
        return None

    def expiries(self, session: Session) -> tuple[int, int]:
        """Return when the newest auth token and the newest refresh token expire."""
        last = session.began + SESSION_LIFETIME
        at = session.refreshed
        return min(at + self.auth_lifetime, last), min(at + REFRESH_LIFETIME, last)

    def live(self, account: Account) -> list[Session]:
        """Return the sessions of an account with a token that lives, the newest first."""
        return [
            session
            for session in reversed(self.sessions)
            if session.account is account
            and not session.ended
            and max(self.expiries(session)) > self.now
        ]

    def end(self, account: Account, but: Session | None = None) -> None:
        """End all sessions of an account, or all but one."""
        for session in self.sessions:
            if session.account is account and session is not but:
                session.ended = True


def pairs_of(machine: "SessionMachine") -> st.SearchStrategy[Pair]:
    """Draw from the issued pairs, more often from those of living sessions."""
    given = list(machine.given.values())
    recent = [
        pair
        for pair in given
        if pair.auth.session in machine.model.live(pair.auth.session.account)
        and pair.auth.generation >= pair.auth.session.generation - 1
    ]
    choices = [recent, recent, given] if recent else [given]
    return st.sampled_from(choices).flatmap(st.sampled_from)


PAIRS = st.runner().flatmap(pairs_of)
ACCOUNTS = st.runner().flatmap(lambda machine: st.sampled_from(list(machine.model.accounts)))


class SessionMachine(RuleBasedStateMachine):
    """The service and the model, side by side."""

    def __init__(self, test: BaseTestCase) -> None:
        super().__init__()
        self.test = test
        self.given: dict[tuple[Session, int], Pair] = {}
        self.checks = 0
        db.session.execute(delete(User))
        db.session.commit()
        patcher = mock.patch("project.clock.utcnow", return_value=EPOCH)
        self.clock = patcher.start()
        self.teardown = patcher.stop  # type: ignore[method-assign]  # Hypothesis calls it at the end

    @initialize(lifetime=AUTH_LIFETIMES)
    def begin(self, lifetime: int) -> None:
        """Start with two users, three sessions, and one of the lifetimes of auth tokens."""
        self.model = Model(lifetime)
        self.test.app.config["TOKEN_EXPIRATION_SECONDS"] = lifetime
        self.register("one")
        self.register("one")
        self.log_in(NAMES[0], "one")

    def session_id(self, session: Session) -> str:
        """Return the ID of a session, read from its first token."""
        text = self.given[session, 0].auth.text
        return str(jwt.decode(text, options={"verify_signature": False})["sid"])

    def post(self, path: str, body: object = None, token: Token | None = None) -> TestResponse:
        """Return the response to a POST."""
        headers = bearer(token.text) if token else {}
        return self.test.client.post(path, json=body, headers=headers)

    def check(
        self, response: TestResponse, refused: Refusal | None = None, status: int = 200
    ) -> dict[str, Any]:
        """Compare a response with the model's, and return its body."""
        if refused:
            return self.test.assert_error(response, refused)
        self.test.assertEqual(status, response.status_code, response.get_data(as_text=True))
        answer: dict[str, Any] = response.get_json()
        return answer

    def take(self, answer: dict[str, Any], session: Session) -> None:
        """Check the issued tokens of a session, and that neither serves as the other kind."""
        expires = self.model.expiries(session)
        self.test.assertEqual(expires[0] - self.model.now, answer["expires_in"])
        number = session.generation
        pair = Pair(
            Token(answer["auth_token"], session, number, expires[0]),
            Token(answer["refresh_token"], session, number, expires[1]),
        )
        known = self.given.setdefault((session, number), pair)
        self.test.assertEqual(known, pair)
        if known is pair:
            self.check(self.test.get("/auth/status", pair.refresh.text), errors.TokenInvalid)
            self.check(self.refreshed(pair.auth), errors.TokenInvalid)

    def refreshed(self, token: Token) -> TestResponse:
        """Return the response to a token sent as a refresh token."""
        return self.post("/auth/refresh", {"refresh_token": token.text})

    @precondition(lambda self: len(self.model.accounts) < len(NAMES))
    @rule(password=PASSWORDS)
    def register(self, password: str) -> None:
        """Register a user."""
        name = NAMES[len(self.model.accounts)]
        self.model.register(name, password)
        body = {"username": name, "email": f"{name}@test.com", "password": password}
        self.take(
            self.check(self.post("/auth/register", body), status=201), self.model.sessions[-1]
        )

    @rule(name=ACCOUNTS, password=PASSWORDS)
    def log_in(self, name: str, password: str) -> None:
        """Log a user in with a right or wrong password."""
        refused = self.model.log_in(name, password)
        response = self.post("/auth/login", {"email": f"{name}@test.com", "password": password})
        answer = self.check(response, refused)
        if not refused:
            self.take(answer, self.model.sessions[-1])

    @rule(pair=PAIRS, seconds=SECONDS)
    def refresh(self, pair: Pair, seconds: int) -> None:
        """Send any refresh token, used or not, after some time."""
        self.wait(seconds)
        refused = self.model.refresh(pair.refresh)
        response = self.refreshed(pair.refresh)
        answer = self.check(response, refused)
        if not refused:
            self.take(answer, pair.refresh.session)

    @rule(pair=PAIRS, seconds=st.sampled_from([0, 1, 29, 30, 31]))
    def replay(self, pair: Pair, seconds: int) -> None:
        """Send any refresh token twice within seconds."""
        self.refresh(pair, 0)
        self.refresh(pair, seconds)

    @rule(pair=PAIRS, scope=st.sampled_from(["", "?scope=others", "?scope=all"]))
    def log_out(self, pair: Pair, scope: str) -> None:
        """Log out of this session, the others or all."""
        session = pair.auth.session
        refused = self.model.refuse(pair.auth)
        self.check(self.post(f"/auth/logout{scope}", token=pair.auth), refused)
        if not refused and scope:
            self.model.end(session.account, session if scope == "?scope=others" else None)
        elif not refused:
            session.ended = True

    @rule(pair=PAIRS, other=PAIRS)
    def end_session(self, pair: Pair, other: Pair) -> None:
        """Try to end a session, the caller's own or another user's."""
        session = other.auth.session
        refused = self.model.refuse(pair.auth)
        if not refused and session not in self.model.live(pair.auth.session.account):
            refused = errors.SessionNotFound
        path = f"/auth/sessions/{self.session_id(session)}"
        response = self.test.client.delete(path, headers=bearer(pair.auth.text))
        self.check(response, refused)
        session.ended |= not refused

    @rule(pair=PAIRS, current=PASSWORDS, new=PASSWORDS, keep=st.booleans())
    def change_password(self, pair: Pair, current: str, new: str, keep: bool) -> None:
        """Try to change a password."""
        session = pair.auth.session
        refused = self.model.refuse(pair.auth)
        if not refused and current != session.account.password:
            refused = errors.WrongPassword
        body = {"current_password": current, "new_password": new, "keep_sessions": keep}
        self.check(self.post("/auth/password", body, pair.auth), refused)
        if not refused:
            session.account.password = new
            if not keep:
                self.model.end(session.account, session)

    @rule(name=ACCOUNTS, active=st.booleans())
    def set_active(self, name: str, active: bool) -> None:
        """Deactivate or activate a user, as an operator does."""
        account = self.model.accounts[name]
        administration.set_active(f"{name}@test.com", active, ORIGIN)
        db.session.commit()
        account.active = active
        self.model.end(account)

    @rule(seconds=SECONDS)
    def wait(self, seconds: int) -> None:
        """Let time pass."""
        self.model.now += seconds
        self.clock.return_value = EPOCH + timedelta(seconds=self.model.now)

    @invariant()
    def agree_on_tokens(self) -> None:
        """Check that an issued auth token, another each time, lives or not as in the model."""
        self.checks += 1
        token = list(self.given.values())[self.checks % len(self.given)].auth
        self.check(self.test.get("/auth/status", token.text), self.model.refuse(token))

    @invariant()
    def agree_on_sessions(self) -> None:
        """Check that each user with a valid token sees exactly their living sessions."""
        callers = {
            pair.auth.session.account: pair
            for pair in self.given.values()
            if not self.model.refuse(pair.auth)
        }
        for account, pair in callers.items():
            answer = self.check(self.test.get("/auth/sessions", pair.auth.text))
            expected = {
                self.session_id(session): session is pair.auth.session
                for session in self.model.live(account)
            }
            actual = {each["id"]: each["current"] for each in answer["data"]["sessions"]}
            self.test.assertEqual(expected, actual)


class TestSessionMachine(BaseTestCase):
    """Everything that starts, prolongs or ends a session, in any order."""

    settings: ClassVar[dict[str, Any]] = {
        "REFRESH_EXPIRATION_SECONDS": REFRESH_LIFETIME,
        "SESSION_EXPIRATION_SECONDS": SESSION_LIFETIME,
    }

    def setUp(self) -> None:
        """Keep Hypothesis' files outside of the repository."""
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        configuration.set_hypothesis_home_dir(folder.name)
        self.addCleanup(configuration.set_hypothesis_home_dir, None)

    def test_agrees_with_the_model(self) -> None:
        """At any time the valid tokens are always exactly those of the model."""
        run_state_machine_as_test(
            lambda: SessionMachine(self),  # type: ignore[arg-type]  # what makes one will do
            settings=settings(
                deadline=None,
                database=None,
                derandomize=True,
                print_blob=True,
                max_examples=45,
                stateful_step_count=20,
            ),
        )
