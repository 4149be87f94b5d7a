"""Sessions under any order of events, against a model that says which tokens live."""

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

from project import accounts, db
from project.api.models import User
from project.tests.base import BaseTestCase, bearer
from project.tests.utils import ORIGIN

MINUTE, DAY = 60, 86_400  # seconds
AUTH_LIFETIMES = st.sampled_from([15 * MINUTE, 30 * DAY, 40 * DAY])
REFRESH_LIFETIME = 30 * DAY
SESSION_LIFETIME = 45 * DAY
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)

NAMES = ["ann", "bob", "cho"]
# What stands here twice comes twice as often.
PASSWORDS = st.sampled_from(["one", "one", "two"])
SECONDS = st.sampled_from([0, 0, 1, 9, 10, 11, 15 * MINUTE, 20 * DAY])

REFUSALS = {
    "account_inactive": (401, "Something went wrong. Please contact us."),
    "invalid_credentials": (404, "User does not exist."),
    "refresh_reused": (401, "Invalid token. Please log in again."),
    "session_ended": (401, "Invalid token. Please log in again."),
    "session_not_found": (404, "Session does not exist."),
    "token_expired": (401, "Signature expired. Please log in again."),
    "token_invalid": (401, "Invalid token. Please log in again."),
    "wrong_password": (400, "Current password is wrong."),
}


class Account:
    """Somebody, as the model knows them."""

    def __init__(self, password: str) -> None:
        self.password = password
        self.active = True


class Session:
    """A session, as the model knows it; moments are seconds since EPOCH."""

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
    """What a session gave at once."""

    auth: Token
    refresh: Token

    def __repr__(self) -> str:
        """Say which one it is, for the report of a failure."""
        return f"<pair {self.auth.generation} of session {self.auth.session.number}>"


class Model:
    """Who has which sessions, and what is refused: by the code in the answer, or None."""

    def __init__(self, lifetime: int) -> None:
        self.now = 0
        self.auth_lifetime = lifetime
        self.accounts: dict[str, Account] = {}
        self.sessions: list[Session] = []

    def register(self, name: str, password: str) -> None:
        """Add an account, and its first session."""
        self.accounts[name] = Account(password)
        self.log_in(name, password)

    def log_in(self, name: str, password: str) -> str | None:
        """Add a session."""
        account = self.accounts.get(name)
        if account is None or account.password != password:
            return "invalid_credentials"
        if not account.active:
            return "account_inactive"
        self.sessions.append(Session(len(self.sessions), account, self.now))
        return None

    def refuse(self, token: Token) -> str | None:
        """Tell whether a token of the right kind lives."""
        if token.expires <= self.now:
            return "token_expired"
        if not token.session.account.active:
            return "account_inactive"
        return "session_ended" if token.session.ended else None

    def refresh(self, token: Token) -> str | None:
        """Move the session on, or end it when the token was used more than 10 seconds ago."""
        session = token.session
        if refused := self.refuse(token):
            return refused
        if token.generation == session.generation:
            session.generation += 1
            session.refreshed = self.now
        elif token.generation < session.generation - 1 or self.now - session.refreshed > 10:
            session.ended = True
            return "refresh_reused"
        return None

    def expiries(self, session: Session) -> tuple[int, int]:
        """Return until when the newest auth token and the newest refresh token are good."""
        last = session.began + SESSION_LIFETIME
        at = session.refreshed
        return min(at + self.auth_lifetime, last), min(at + REFRESH_LIFETIME, last)

    def live(self, account: Account) -> list[Session]:
        """Return the sessions of an account that have a token which lives, the newest first."""
        return [
            session
            for session in reversed(self.sessions)
            if session.account is account
            and not session.ended
            and max(self.expiries(session)) > self.now
        ]

    def end(self, account: Account, but: Session | None = None) -> None:
        """End the sessions of an account, all or all but one."""
        for session in self.sessions:
            if session.account is account and session is not but:
                session.ended = True


def pairs_of(machine: "SessionMachine") -> st.SearchStrategy[Pair]:
    """Give any pair that was ever given, and more often one of a session that lives."""
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
        self.turn = 0
        db.session.execute(delete(User))
        db.session.commit()
        patcher = mock.patch("project.clock.utcnow", return_value=EPOCH)
        self.clock = patcher.start()
        self.teardown = patcher.stop  # type: ignore[method-assign]  # Hypothesis calls it at the end

    @initialize(lifetime=AUTH_LIFETIMES)
    def begin(self, lifetime: int) -> None:
        """Begin with two users, three sessions, and auth tokens of some lifetime."""
        self.model = Model(lifetime)
        self.test.app.config["TOKEN_EXPIRATION_SECONDS"] = lifetime
        self.register("one")
        self.register("one")
        self.log_in(NAMES[0], "one")

    def session_id(self, session: Session) -> str:
        """Return the id of a session, which its tokens carry."""
        text = self.given[session, 0].auth.text
        return str(jwt.decode(text, options={"verify_signature": False})["sid"])

    def post(self, path: str, body: object = None, token: Token | None = None) -> TestResponse:
        """Return the answer to a POST."""
        headers = bearer(token.text) if token else {}
        return self.test.client.post(path, json=body, headers=headers)

    def check(
        self, response: TestResponse, refused: str | None = None, status: int = 200
    ) -> dict[str, Any]:
        """Check an answer against the model's, and return it."""
        if refused:
            return self.test.assert_error(response, *REFUSALS[refused], refused)
        self.test.assertEqual(status, response.status_code, response.get_data(as_text=True))
        answer: dict[str, Any] = response.get_json()
        return answer

    def take(self, answer: dict[str, Any], session: Session) -> None:
        """Check that these are the present tokens of a session, each of its kind alone."""
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
            self.check(self.test.get("/auth/status", pair.refresh.text), "token_invalid")
            self.check(self.refreshed(pair.auth), "token_invalid")

    def refreshed(self, token: Token) -> TestResponse:
        """Return the answer to a token where a refresh token belongs."""
        return self.post("/auth/refresh", {"refresh_token": token.text})

    @precondition(lambda self: len(self.model.accounts) < len(NAMES))
    @rule(password=PASSWORDS)
    def register(self, password: str) -> None:
        """Somebody registers."""
        name = NAMES[len(self.model.accounts)]
        self.model.register(name, password)
        body = {"username": name, "email": f"{name}@test.com", "password": password}
        self.take(
            self.check(self.post("/auth/register", body), status=201), self.model.sessions[-1]
        )

    @rule(name=ACCOUNTS, password=PASSWORDS)
    def log_in(self, name: str, password: str) -> None:
        """Somebody logs in, with whatever password."""
        refused = self.model.log_in(name, password)
        response = self.post("/auth/login", {"email": f"{name}@test.com", "password": password})
        answer = self.check(response, refused)
        if not refused:
            self.take(answer, self.model.sessions[-1])

    @rule(pair=PAIRS, seconds=SECONDS)
    def refresh(self, pair: Pair, seconds: int) -> None:
        """Any refresh token comes, for the first time or again, at once or later."""
        self.wait(seconds)
        refused = self.model.refresh(pair.refresh)
        response = self.refreshed(pair.refresh)
        answer = self.check(response, refused)
        if not refused:
            self.take(answer, pair.refresh.session)

    @rule(pair=PAIRS, seconds=st.sampled_from([0, 1, 9, 10, 11]))
    def replay(self, pair: Pair, seconds: int) -> None:
        """Any refresh token comes, and soon again."""
        self.refresh(pair, 0)
        self.refresh(pair, seconds)

    @rule(pair=PAIRS, scope=st.sampled_from(["", "?scope=others", "?scope=all"]))
    def log_out(self, pair: Pair, scope: str) -> None:
        """Somebody logs out, here or elsewhere or everywhere."""
        session = pair.auth.session
        refused = self.model.refuse(pair.auth)
        self.check(self.post(f"/auth/logout{scope}", token=pair.auth), refused)
        if not refused and scope:
            self.model.end(session.account, session if scope == "?scope=others" else None)
        elif not refused:
            session.ended = True

    @rule(pair=PAIRS, other=PAIRS)
    def end_session(self, pair: Pair, other: Pair) -> None:
        """Somebody ends one session, their own or another's."""
        session = other.auth.session
        refused = self.model.refuse(pair.auth)
        if not refused and session not in self.model.live(pair.auth.session.account):
            refused = "session_not_found"
        path = f"/auth/sessions/{self.session_id(session)}"
        response = self.test.client.delete(path, headers=bearer(pair.auth.text))
        self.check(response, refused)
        session.ended |= not refused

    @rule(pair=PAIRS, current=PASSWORDS, new=PASSWORDS, keep=st.booleans())
    def change_password(self, pair: Pair, current: str, new: str, keep: bool) -> None:
        """Somebody changes their password, or tries to."""
        session = pair.auth.session
        refused = self.model.refuse(pair.auth)
        if not refused and current != session.account.password:
            refused = "wrong_password"
        body = {"current_password": current, "new_password": new, "keep_sessions": keep}
        self.check(self.post("/auth/password", body, pair.auth), refused)
        if not refused:
            session.account.password = new
            if not keep:
                self.model.end(session.account, session)

    @rule(name=ACCOUNTS, active=st.booleans())
    def set_active(self, name: str, active: bool) -> None:
        """Somebody is deactivated, or activated."""
        account = self.model.accounts[name]
        accounts.set_active(f"{name}@test.com", active, ORIGIN)
        db.session.commit()
        account.active = active
        self.model.end(account)

    @rule(seconds=SECONDS)
    def wait(self, seconds: int) -> None:
        """Time goes by."""
        self.model.now += seconds
        self.clock.return_value = EPOCH + timedelta(seconds=self.model.now)

    @invariant()
    def agree_on_tokens(self) -> None:
        """Of all auth tokens ever given each in its turn lives or not."""
        self.turn += 1
        token = list(self.given.values())[self.turn % len(self.given)].auth
        self.check(self.test.get("/auth/status", token.text), self.model.refuse(token))

    @invariant()
    def agree_on_sessions(self) -> None:
        """Whoever has a token that lives sees all of their sessions that do, and no others."""
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
        """Let Hypothesis keep its files outside the repository."""
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        configuration.set_hypothesis_home_dir(folder.name)
        self.addCleanup(configuration.set_hypothesis_home_dir, None)

    def test_agrees_with_the_model(self) -> None:
        """At every moment those tokens live, and no others, that the model says."""
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
