"""Sessions under random sequences of requests, compared with a model of which tokens live.

The model also knows the second factor: which code works when, and what a session has proved.
"""

import tempfile
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import pyotp
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
from sqlalchemy import delete, select
from werkzeug.test import TestResponse

from project import db, errors
from project.accounts import administration
from project.models import User
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import ORIGIN, add_user, start_session
from project.tests.tokens.claims import claims_of, session_of

MINUTE, DAY = 60, 86_400  # seconds
AUTH_LIFETIMES = st.sampled_from([15 * MINUTE, 30 * DAY, 40 * DAY])
REFRESH_LIFETIME = 30 * DAY
SESSION_LIFETIME = 45 * DAY
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)

NAMES = ["ann", "bob", "cho"]
# A value that is listed twice is drawn twice as often.
PASSWORDS = st.sampled_from(["one", "one", "two"])
SCOPES = st.sampled_from(["", "?scope=others", "?scope=all"])
SECONDS = st.sampled_from([0, 0, 1, 29, 30, 31, 15 * MINUTE, 20 * DAY])
STEP = 30  # seconds for which an authenticator shows a code
STEP_UP = 5 * MINUTE  # for which a session that has given a code needs none
MFA_LIFETIME = 5 * MINUTE  # of the token for the second step of a login
NO_SECRET, NO_RECOVERY_CODE = "A" * 32, "ABCD-EFGH-IJKL-MNOP-QRST-2347"
# Codes: that of the next time step, as soon as it is there; that of a step relative to the present
# one; a recovery code; one that was used before; one that no authenticator shows; none.
CODES = st.sampled_from(
    ["new", "recovery", None, "replayed", 0, "new", None, -1, "used", "new", 1, -2, "wrong"]
)
ACTS = st.sampled_from(["recovery codes", "password", "turn off", "recovery codes", "password"])
ACT_CODES = st.sampled_from([None, "new", "recovery", "replayed", None, 0, "wrong"])
STEP_UP_SECONDS = st.sampled_from([0, STEP_UP, STEP_UP - 1])
MFA_SECONDS = st.sampled_from([0, 0, 1, MFA_LIFETIME - 1])

Refusal = type[errors.ServiceError]
CodeKind = int | str | None


class Account:
    """A user in the model."""

    def __init__(self, password: str) -> None:
        self.user_id = 0
        self.password = password
        self.changes = 0  # of the password, to the same one too
        self.active = True
        self.remove_factor()

    def remove_factor(self) -> None:
        """Forget the authenticator, the one that is being set up, and the recovery codes."""
        self.secret: str | None = None
        self.pending: str | None = None
        self.last_step = 0
        self.recovery_codes: list[str] = []
        self.used: list[str] = []  # codes that worked


class Session:
    """A session in the model; times are seconds since EPOCH."""

    def __init__(self, number: int, account: Account, now: int) -> None:
        self.number = number
        self.account = account
        self.began = self.refreshed = now
        self.generation = 0
        self.ended = False
        self.amr = ["pwd"]
        self.code_given: int | None = None

    def step_up(self, method: str, now: int) -> None:
        """Note that the user has given a code."""
        self.amr += [method] if method not in self.amr else []
        self.code_given = now


class MfaToken(NamedTuple):
    """The token of a login whose password was right."""

    text: str
    account: Account
    changes: int
    expires: int


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
        self.log_in(name, password, None)

    def log_in(self, name: str, password: str, code: str | None) -> Refusal | None:
        """Add a session."""
        account = self.accounts.get(name)
        if account is None or account.password != password:
            return errors.InvalidCredentials
        if not account.active:
            return errors.AccountInactive
        if account.secret and code is None:
            return errors.MfaRequired
        return self.start(account, code if account.secret else None)

    def log_in_with_code(self, token: MfaToken, code: str) -> Refusal | None:
        """Add a session in the second step of a login."""
        if token.expires <= self.now:
            return errors.TokenExpired
        if token.changes != token.account.changes or not token.account.active:
            return errors.TokenInvalid
        return self.start(token.account, code)

    def start(self, account: Account, code: str | None) -> Refusal | None:
        """Add a session, if the code is right or none is needed."""
        method = None if code is None else self.use(account, code)
        if code is not None and method is None:
            return errors.WrongCode
        session = Session(len(self.sessions), account, self.now)
        if method:
            session.step_up(method, self.now)
        self.sessions.append(session)
        return None

    def step(self) -> int:
        """Return the number of the present time step."""
        return (int(EPOCH.timestamp()) + self.now) // STEP

    def step_of(self, secret: str | None, code: str) -> int | None:
        """Return the time step of a code, of the present one and the one before."""
        if secret is None:
            return None
        recent = (self.step(), self.step() - 1)
        return next((step for step in recent if shown(secret, step) == code), None)

    def use(self, account: Account, code: str) -> str | None:
        """Use a code up; return what it proves, or None if it is wrong."""
        step = self.step_of(account.secret, code)
        if step is not None and step > account.last_step:
            account.last_step = step
            account.used.append(code)
            return "otp"
        if code in account.recovery_codes:
            account.recovery_codes.remove(code)
            account.used.append(code)
            return "rc"
        return None

    def confirm(self, session: Session, password: str, code: str | None) -> Refusal | None:
        """Confirm an act of a user: return why it is refused, or None."""
        account = session.account
        if account.secret and code is None:
            given = session.code_given
            if given is None or self.now - given >= STEP_UP:
                return errors.StepUpRequired
        if password != account.password:
            return errors.WrongPassword
        if account.secret and code is not None:
            method = self.use(account, code)
            if method is None:
                return errors.WrongCode
            session.step_up(method, self.now)
        return None

    def turn_on(self, session: Session, code: str) -> Refusal | None:
        """Turn the authenticator on that a user is setting up, and end the other sessions."""
        account = session.account
        if account.secret:
            return errors.TotpExists
        if account.pending is None:
            return errors.TotpNotFound
        step = self.step_of(account.pending, code)
        if step is None:
            return errors.WrongCode
        account.secret, account.pending, account.last_step = account.pending, None, step
        account.used.append(code)
        session.step_up("otp", self.now)
        self.end(account, session)
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


def shown(secret: str, step: int) -> str:
    """Return the code that an authenticator shows in a time step."""
    return pyotp.TOTP(secret).at(step * STEP)


def pairs_of(machine: "Machine") -> st.SearchStrategy[Pair]:
    """Draw from the issued pairs, more often from those of living sessions, and with a factor."""
    given = list(machine.given.values())
    recent = [
        pair
        for pair in given
        if pair.auth.session in machine.model.live(pair.auth.session.account)
        and pair.auth.generation >= pair.auth.session.generation - 1
    ]
    enrolled = [pair for pair in recent if pair.auth.session.account.secret] or recent
    choices = [enrolled, recent, given] if recent else [given]
    return st.sampled_from(choices).flatmap(st.sampled_from)


def names_in(machine: "Machine") -> st.SearchStrategy[str]:
    """Draw from the names of the accounts, more often from those with a second factor."""
    accounts = machine.model.accounts
    return st.sampled_from([name for name in accounts if accounts[name].secret] + list(accounts))


def with_code(code: str | None) -> dict[str, str]:
    """Return the members of a body for a code, or for none."""
    return {} if code is None else {"code": code}


PAIRS = st.runner().flatmap(pairs_of)
ACCOUNTS = st.runner().flatmap(names_in)


class Machine(RuleBasedStateMachine):
    """The service and the model, side by side, and what the rules do."""

    def __init__(self, test: BaseTestCase) -> None:
        super().__init__()
        self.test = test
        # By session and generation, and by how much the session had proved.
        self.given: dict[tuple[Session, int, int], Pair] = {}
        self.first: dict[Session, str] = {}  # auth token
        self.mfa_tokens: list[MfaToken] = []
        self.checks = 0
        db.session.execute(delete(User))
        db.session.commit()
        patcher = mock.patch("project.clock.utcnow", return_value=EPOCH)
        self.clock = patcher.start()
        self.teardown = patcher.stop  # type: ignore[method-assign]  # Hypothesis calls it at the end

    def begin(self, lifetime: int) -> None:
        """Start with two users, three sessions, and a lifetime of auth tokens."""
        self.model = Model(lifetime)
        self.test.app.config["TOKEN_EXPIRATION_SECONDS"] = lifetime
        self.register("one")
        self.register("one")
        self.log_in(NAMES[0], "one")

    def session_id(self, session: Session) -> str:
        """Return the ID of a session, read from its first token."""
        return session_of(self.first[session])

    def code(self, account: Account, kind: CodeKind) -> str | None:
        """Return a code of a kind for an account, or None for no code."""
        secret = account.secret or account.pending or NO_SECRET
        if kind == "new":
            self.wait(STEP)
        match kind:
            case "new":
                return shown(secret, self.model.step())
            case int():
                return shown(secret, self.model.step() + kind)
            case "recovery":
                return (account.recovery_codes or [NO_RECOVERY_CODE])[0]
            case "replayed":
                return (account.used or ["000000"])[-1]
            case "used":
                return next((code for code in account.used if "-" in code), NO_RECOVERY_CODE)
            case "wrong":
                return "000000"
        return None

    def send(
        self, method: str, path: str, body: object = None, token: Token | None = None
    ) -> TestResponse:
        """Return the response to a request."""
        headers = bearer(token.text) if token else {}
        return self.test.client.open(path, method=method, json=body, headers=headers)

    def post(self, path: str, body: object = None, token: Token | None = None) -> TestResponse:
        """Return the response to a POST."""
        return self.send("POST", path, body, token)

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
        self.test.assertEqual(session.amr, claims_of(answer["auth_token"])["amr"])
        self.first.setdefault(session, answer["auth_token"])
        number = session.generation
        pair = Pair(
            Token(answer["auth_token"], session, number, expires[0]),
            Token(answer["refresh_token"], session, number, expires[1]),
        )
        known = self.given.setdefault((session, number, len(session.amr)), pair)
        self.test.assertEqual(known, pair)
        if known is pair and self.checks % 2:
            self.check(self.test.get("/auth/status", pair.refresh.text), errors.TokenInvalid)
        elif known is pair:
            self.check(self.refreshed(pair.auth), errors.TokenInvalid)

    def refreshed(self, token: Token) -> TestResponse:
        """Return the response to a token sent as a refresh token."""
        return self.post("/auth/refresh", {"refresh_token": token.text})

    def wait(self, seconds: int) -> None:
        """Let time pass."""
        self.model.now += seconds
        self.clock.return_value = EPOCH + timedelta(seconds=self.model.now)

    def register(self, password: str) -> None:
        """Register a user."""
        name = NAMES[len(self.model.accounts)]
        self.model.register(name, password)
        body = {"username": name, "email": f"{name}@test.com", "password": password}
        answer = self.check(self.post("/auth/register", body), status=201)
        self.model.accounts[name].user_id = answer["data"]["id"]
        self.take(answer, self.model.sessions[-1])

    def log_in(self, name: str, password: str, kind: CodeKind = None) -> None:
        """Log a user in with a right or wrong password, with a code or without one."""
        account = self.model.accounts[name]
        code = self.code(account, kind)
        refused = self.model.log_in(name, password, code)
        body = {"email": f"{name}@test.com", "password": password}
        answer = self.check(self.post("/auth/login", body | with_code(code)), refused)
        if not refused:
            self.take(answer, self.model.sessions[-1])
        elif refused is errors.MfaRequired:
            text, expires = str(answer["mfa_token"]), self.model.now + MFA_LIFETIME
            self.mfa_tokens.append(MfaToken(text, account, account.changes, expires))

    def refresh(self, pair: Pair, seconds: int) -> None:
        """Send any refresh token, used or not, after some time."""
        self.wait(seconds)
        refused = self.model.refresh(pair.refresh)
        response = self.refreshed(pair.refresh)
        answer = self.check(response, refused)
        if not refused:
            self.take(answer, pair.refresh.session)

    def log_out(self, pair: Pair, scope: str) -> None:
        """Log out of this session, the others or all."""
        session = pair.auth.session
        refused = self.model.refuse(pair.auth)
        self.check(self.post(f"/auth/logout{scope}", token=pair.auth), refused)
        if not refused and scope:
            self.model.end(session.account, session if scope == "?scope=others" else None)
        elif not refused:
            session.ended = True
        self.check(self.test.get("/auth/status", pair.auth.text), self.model.refuse(pair.auth))

    def change_password(
        self, pair: Pair, current: str, new: str, keep: bool, kind: CodeKind = None
    ) -> None:
        """Try to change a password."""
        session = pair.auth.session
        code = self.code(session.account, kind)
        refused = self.model.refuse(pair.auth) or self.model.confirm(session, current, code)
        body = {"current_password": current, "new_password": new, "keep_sessions": keep}
        self.check(self.post("/auth/password", body | with_code(code), pair.auth), refused)
        if not refused:
            session.account.password = new
            session.account.pending = None
            session.account.changes += 1
            if not keep:
                self.model.end(session.account, session)

    def set_active(self, name: str, active: bool) -> None:
        """Deactivate or activate a user, as an operator does."""
        account = self.model.accounts[name]
        administration.set_active(f"{name}@test.com", active, ORIGIN)
        db.session.commit()
        account.active = active
        self.model.end(account)

    @invariant()
    def agree_on_tokens(self) -> None:
        """Check that an issued auth token, another each time, lives or not as in the model.

        A live one tells the state of the second factor.
        """
        self.checks += 1
        token = list(self.given.values())[self.checks % len(self.given)].auth
        refused = self.model.refuse(token)
        answer = self.check(self.test.get("/auth/totp", token.text), refused)
        if not refused:
            account = token.session.account
            expected = {
                "enabled": account.secret is not None,
                "recovery_codes_left": len(account.recovery_codes),
            }
            self.test.assertEqual(expected, answer["data"])

    @invariant()
    def agree_on_sessions(self) -> None:
        """Check that users with a valid token, in turn, see exactly their living sessions."""
        callers = {
            pair.auth.session.account: pair
            for pair in self.given.values()
            if not self.model.refuse(pair.auth)
        }
        for account, pair in list(callers.items())[self.checks % 2 :: 2]:
            answer = self.check(self.test.get("/auth/sessions", pair.auth.text))
            expected = {
                self.session_id(session): (session is pair.auth.session, session.amr)
                for session in self.model.live(account)
            }
            actual = {
                each["id"]: (each["current"], each["amr"]) for each in answer["data"]["sessions"]
            }
            self.test.assertEqual(expected, actual)


class SessionMachine(Machine):
    """Everything that starts, prolongs or ends a session, without a second factor."""

    begin = initialize(lifetime=AUTH_LIFETIMES)(Machine.begin)
    register = precondition(lambda self: len(self.model.accounts) < len(NAMES))(
        rule(password=PASSWORDS)(Machine.register)
    )
    log_in = rule(name=ACCOUNTS, password=PASSWORDS)(Machine.log_in)
    refresh = rule(pair=PAIRS, seconds=SECONDS)(Machine.refresh)
    log_out = rule(pair=PAIRS, scope=SCOPES)(Machine.log_out)
    change_password = rule(pair=PAIRS, current=PASSWORDS, new=PASSWORDS, keep=st.booleans())(
        Machine.change_password
    )
    set_active = rule(name=ACCOUNTS, active=st.booleans())(Machine.set_active)
    wait = rule(seconds=SECONDS)(Machine.wait)

    @rule(pair=PAIRS, seconds=st.sampled_from([0, 1, 29, 30, 31]))
    def replay(self, pair: Pair, seconds: int) -> None:
        """Send any refresh token twice within seconds."""
        self.refresh(pair, 0)
        self.refresh(pair, seconds)

    @rule(pair=PAIRS, other=PAIRS)
    def end_session(self, pair: Pair, other: Pair) -> None:
        """Try to end a session, the caller's own or another user's."""
        session = other.auth.session
        refused = self.model.refuse(pair.auth)
        if not refused and session not in self.model.live(pair.auth.session.account):
            refused = errors.SessionNotFound
        path = f"/auth/sessions/{self.session_id(session)}"
        self.check(self.send("DELETE", path, token=pair.auth), refused)
        session.ended |= not refused


class SecondFactorMachine(Machine):
    """Everything that needs a code, or turns the second factor on or off."""

    @initialize()
    def begin(self) -> None:
        """Start with one user who has a second factor, and one who has none."""
        super().begin(SESSION_LIFETIME)
        pair = next(iter(self.given.values()))
        self.begin_totp(pair, "one")
        self.confirm_totp(pair, 0)

    log_in = rule(name=ACCOUNTS, password=PASSWORDS, kind=CODES)(Machine.log_in)
    refresh = rule(pair=PAIRS, seconds=SECONDS)(Machine.refresh)

    @rule(name=ACCOUNTS, kinds=st.tuples(CODES, CODES), seconds=MFA_SECONDS)
    def log_in_in_two_steps(
        self, name: str, kinds: tuple[CodeKind, CodeKind], seconds: int
    ) -> None:
        """Log a user in without a code, and send two codes after some time."""
        self.log_in(name, self.model.accounts[name].password)
        self.send_code(kinds[0], seconds)
        self.send_code(kinds[1], 0)

    def send_code(self, kind: CodeKind, seconds: int) -> None:
        """Send the newest token of a login, if there is one, used or not, with a code."""
        self.wait(seconds)
        if not self.mfa_tokens:
            return
        token = self.mfa_tokens[-1]
        code = self.code(token.account, kind) or "000000"
        refused = self.model.log_in_with_code(token, code)
        body = {"mfa_token": token.text, "code": code}
        answer = self.check(self.post("/auth/login/mfa", body), refused)
        if not refused:
            self.take(answer, self.model.sessions[-1])

    @rule(pair=PAIRS, other=PAIRS, password=PASSWORDS, kind=CODES)
    def enrol(self, pair: Pair, other: Pair, password: str, kind: CodeKind) -> None:
        """Try to set an authenticator up, in one session or in two."""
        self.begin_totp(pair, password)
        own = other.auth.session.account is pair.auth.session.account
        self.confirm_totp(other if own else pair, kind)

    def begin_totp(self, pair: Pair, password: str) -> None:
        """Try to get a secret, which replaces one that was not confirmed."""
        account = pair.auth.session.account
        refused = self.model.refuse(pair.auth)
        if not refused and account.secret:
            refused = errors.TotpExists
        elif not refused and password != account.password:
            refused = errors.WrongPassword
        body = {"current_password": password}
        answer = self.check(self.post("/auth/totp", body, pair.auth), refused)
        if not refused:
            account.pending = answer["data"]["secret"]

    def confirm_totp(self, pair: Pair, kind: CodeKind) -> None:
        """Try to turn an authenticator on."""
        session = pair.auth.session
        code = self.code(session.account, kind) or "000000"
        refused = self.model.refuse(pair.auth) or self.model.turn_on(session, code)
        answer = self.check(self.post("/auth/totp/confirm", {"code": code}, pair.auth), refused)
        if not refused:
            session.account.recovery_codes = answer["data"]["recovery_codes"]

    @rule(act=ACTS, pair=PAIRS, password=PASSWORDS, kind=ACT_CODES, seconds=STEP_UP_SECONDS)
    def act(self, act: str, pair: Pair, password: str, kind: CodeKind, seconds: int) -> None:
        """Try to do what needs a code, unless the session has given one just now."""
        self.wait(seconds)
        match act:
            case "password":
                self.change_password(pair, password, "two", keep=seconds > 0, kind=kind)
            case "recovery codes":
                if answer := self.change_factor(
                    "POST", "/auth/recovery_codes", pair, password, kind
                ):
                    pair.auth.session.account.recovery_codes = answer["data"]["recovery_codes"]
            case "turn off":
                if self.change_factor("DELETE", "/auth/totp", pair, password, kind):
                    pair.auth.session.account.remove_factor()

    def change_factor(
        self, method: str, path: str, pair: Pair, password: str, kind: CodeKind
    ) -> dict[str, Any] | None:
        """Send a request about an authenticator; return its body, or None if it is refused."""
        session = pair.auth.session
        code = self.code(session.account, kind)
        refused = self.model.refuse(pair.auth)
        if not refused and session.account.secret is None:
            refused = errors.TotpNotFound
        refused = refused or self.model.confirm(session, password, code)
        body = {"current_password": password} | with_code(code)
        answer = self.check(self.send(method, path, body, pair.auth), refused)
        return None if refused else answer

    @precondition(lambda self: self.checks % 3 == 0)
    @rule(name=ACCOUNTS, by_admin=st.booleans())
    def reset_totp(self, name: str, by_admin: bool) -> None:
        """Turn the authenticator of a user off, as an operator or an admin does."""
        account = self.model.accounts[name]
        refused = None if account.secret else errors.TotpNotFound
        if by_admin:
            path = f"/users/{account.user_id}/totp"
            response = self.test.client.delete(path, headers=bearer(self.admin()))
            self.check(response, refused)
        elif refused:
            with self.test.assertRaises(refused):
                administration.reset_totp_of(f"{name}@test.com", ORIGIN)
            db.session.rollback()
        else:
            administration.reset_totp_of(f"{name}@test.com", ORIGIN)
            db.session.commit()
        if not refused:
            account.remove_factor()
            self.model.end(account)

    def admin(self) -> str:
        """Return an auth token of an admin, who is not part of the model."""
        admin = db.session.scalars(select(User).where(User.username == "admin")).one_or_none()
        admin = admin or add_user("admin", "admin@test.com", "test", admin=True)
        return start_session(admin).auth_token


class TestSessionMachine(BaseTestCase):
    """The machines, with steps in any order."""

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

    def run_machine(self, machine: type[Machine], examples: int) -> None:
        """Take random steps, of which a report of a failure names the shortest that fail."""
        run_state_machine_as_test(
            lambda: machine(self),  # type: ignore[arg-type]  # what makes one will do
            settings=settings(
                deadline=None,
                database=None,
                derandomize=True,
                print_blob=True,
                max_examples=examples,
                stateful_step_count=20,
            ),
        )

    def test_sessions(self) -> None:
        """At any time the valid tokens are exactly those of the model."""
        self.run_machine(SessionMachine, 55)

    def test_second_factor(self) -> None:
        """At any time the codes and tokens that are valid are exactly those of the model."""
        self.run_machine(SecondFactorMachine, 35)
