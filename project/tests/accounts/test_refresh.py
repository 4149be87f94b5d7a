"""Refresh: rotation, reuse, the two kinds of token, and how long tokens and sessions live."""

from datetime import timedelta
from typing import Any

from sqlalchemy import delete, update
from werkzeug.test import TestResponse

from project import clock, db, errors
from project.models import User
from project.tests.accounts.cases import SessionsTestCase
from project.tests.base import bearer
from project.tests.lib.log_capture import captured_output, entries
from project.tests.rows import stored_sessions
from project.tests.tokens.claims import claims_of, session_of

TOKENS = {"auth_token", "refresh_token"}
ACCESS, REFRESH, SESSION = 60, 600, 1_500  # seconds
MISSING = object()  # a claim that is left out


class RefreshTestCase(SessionsTestCase):
    """A test of a user who has just logged in, at a whole second."""

    settings = {  # noqa: RUF012  # never changed
        "TOKEN_EXPIRATION_SECONDS": ACCESS,
        "REFRESH_EXPIRATION_SECONDS": REFRESH,
        "SESSION_EXPIRATION_SECONDS": SESSION,
    }

    def setUp(self) -> None:
        """Log in, while the clock stands still."""
        super().setUp()
        self.move_clock(-clock.utcnow().microsecond / 1_000_000)
        self.now = int(clock.utcnow().timestamp())
        self.pair: dict[str, Any] = self.login().get_json()

    def post(self, refresh_token: object, **request: Any) -> TestResponse:
        """Return the response to a refresh token."""
        return self.client.post("/auth/refresh", json={"refresh_token": refresh_token}, **request)

    def refresh(self, pair: dict[str, Any], **request: Any) -> dict[str, Any]:
        """Refresh this pair, and return the next one."""
        response = self.post(pair["refresh_token"], **request)
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        following: dict[str, Any] = response.get_json()
        return following

    def assert_works(self, *pairs: dict[str, Any]) -> None:
        """Check that the auth token of each pair is accepted."""
        self.assert_live(*(pair["auth_token"] for pair in pairs))

    def assert_ended(self, *pairs: dict[str, Any]) -> None:
        """Check that both tokens of these pairs are refused because their session has ended."""
        for pair in pairs:
            self.assert_refused(pair["auth_token"], errors.SessionEnded)
            self.assert_error(self.post(pair["refresh_token"]), errors.SessionEnded)


class TestRotation(RefreshTestCase):
    """A refresh token can be used once, and again within thirty seconds."""

    def test_new_pair(self) -> None:
        """A refresh returns the same members as a login, and the pair is of the same session."""
        self.move_clock(1)

        response = self.post(self.pair["refresh_token"])

        data = response.get_json()
        self.assertEqual(200, response.status_code)
        self.assertEqual(set(self.pair), set(data))
        words = ("success", "Successfully refreshed.", ACCESS)
        self.assertEqual(words, (data["status"], data["message"], data["expires_in"]))
        for name in TOKENS:
            self.assertNotEqual(self.pair[name], data[name])
            self.assertEqual(session_of(self.pair[name]), session_of(data[name]))

    def test_both_live(self) -> None:
        """The old auth token stays valid until it expires, beside the new pair."""
        self.move_clock(ACCESS - 1)
        following = self.refresh(self.pair)
        self.assert_works(self.pair, following)

        self.move_clock(1)

        self.assert_works(following)
        self.assert_refused(self.pair["auth_token"], errors.TokenExpired)
        self.assert_works(self.refresh(following))

    def test_again_within_thirty_seconds(self) -> None:
        """Within ten seconds a repeated refresh gets the same pair, and rotates nothing."""
        self.move_clock(0.75)
        first = self.refresh(self.pair, environ_overrides={"REMOTE_ADDR": "192.0.2.1"})
        before = stored_sessions()
        for moved in (0, 0.25, 9.75):
            self.move_clock(moved)
            with self.subTest(moved=moved):
                again = self.refresh(self.pair, environ_overrides={"REMOTE_ADDR": "192.0.2.2"})

                self.assertEqual([first[name] for name in TOKENS], [again[name] for name in TOKENS])
                self.assertEqual(before, stored_sessions())
        self.assert_works(self.pair, first)
        self.assert_works(self.refresh(first))

    def test_later(self) -> None:
        """After ten seconds a repeated refresh token is refused, and its session ends."""
        stolen = self.refresh(self.pair)
        self.move_clock(30.000001)
        self.assert_works(self.pair, stolen)

        response = self.post(self.pair["refresh_token"])

        self.assert_error(response, errors.RefreshReused)
        challenge = response.headers["WWW-Authenticate"]
        self.assertEqual('Bearer realm="users", error="invalid_token"', challenge)
        self.assert_ended(self.pair, stolen)

    def test_two_generations_back(self) -> None:
        """Once the successor has been used, its predecessor is refused at any time."""
        second = self.refresh(self.pair)
        third = self.refresh(second)
        self.assertEqual(third, self.refresh(second))

        self.assert_error(self.post(self.pair["refresh_token"]), errors.RefreshReused)
        self.assert_ended(self.pair, second, third)

    def test_other_sessions(self) -> None:
        """Reuse ends only the session of the reused token."""
        own, others = self.login().get_json(), self.login("other@test.com").get_json()
        self.refresh(self.refresh(self.pair))

        self.assert_error(self.post(self.pair["refresh_token"]), errors.RefreshReused)
        self.assert_works(own, others)
        self.refresh(own)
        self.refresh(others)

    def test_log(self) -> None:
        """Reuse is logged with user, session and origin, but without any token."""
        second = self.refresh(self.pair)
        self.move_clock(31)
        with captured_output() as written:
            self.assert_error(self.post(self.pair["refresh_token"]), errors.RefreshReused)

        (line,) = entries(written.getvalue())
        session_id = session_of(self.pair["auth_token"])
        expected = {"event": "refresh_reused", "user_id": self.user.id, "session_id": session_id}
        self.assertIn("Werkzeug", line.pop("user_agent"))
        self.assertTrue(line.pop("request_id"))
        self.assertEqual(expected | {"ip": "127.0.0.1"}, line)
        for pair in (self.pair, second):
            for part in ".".join(pair[name] for name in TOKENS).split("."):
                self.assertNotIn(part, written.getvalue())

    def test_no_reuse(self) -> None:
        """A repeat within thirty seconds is not logged as reuse, nor one after a logout."""
        with captured_output() as written:
            self.assertEqual(self.refresh(self.pair), self.refresh(self.pair))
            self.get("/auth/logout", self.pair["auth_token"])
            self.assert_error(self.post(self.pair["refresh_token"]), errors.SessionEnded)

        events = [line["event"] for line in entries(written.getvalue())]
        self.assertEqual(["refreshed", "logged_out", "refresh_refused"], events)

    def test_device(self) -> None:
        """A refresh updates the session's address, user agent and last use, not its beginning."""
        self.move_clock(5)
        environ = {"REMOTE_ADDR": "192.0.2.9", "HTTP_USER_AGENT": "moved"}
        before = stored_sessions()[0]

        self.refresh(self.pair, environ_overrides=environ)

        changes = {
            "generation": 1,
            "last_used_at": clock.utcnow(),
            "expires_at": clock.utcnow() + timedelta(seconds=REFRESH),
            "token_expires_at": clock.utcnow() + timedelta(seconds=ACCESS),
            "ip": "192.0.2.9",
            "user_agent": "moved",
        }
        self.assertEqual([before | changes], stored_sessions())


class TestKinds(RefreshTestCase):
    """An auth token and a refresh token are never accepted in place of each other."""

    def setUp(self) -> None:
        """Keep the genuine claims of both kinds."""
        super().setUp()
        self.access, self.claims = (claims_of(self.pair[name]) for name in sorted(TOKENS))

    def forged(self, **changes: object) -> str:
        """Return a refresh token with these changes of its claims."""
        claims = self.claims | changes
        present = {name: value for name, value in claims.items() if value is not MISSING}
        return self.forge(present, "refresh+jwt")

    def assert_no_refresh_token(self, token: object, name: object = None) -> None:
        """Check that this token is refused and ends nothing."""
        before = stored_sessions()
        with self.subTest(name):
            response = self.post(token)

            self.assert_error(response, errors.TokenInvalid)
            self.assertEqual(before, stored_sessions())
            challenge = response.headers["WWW-Authenticate"]
            self.assertEqual('Bearer realm="users", error="invalid_token"', challenge)

    def test_form(self) -> None:
        """A refresh token names its session, its generation, the time of login and its audience."""
        times = {"auth_time": self.now, "iat": self.now, "exp": self.now + REFRESH}
        session = {"sub": str(self.user.id), "sid": stored_sessions()[0]["id"], "gen": 0}

        self.assertEqual(session | times | {"aud": "refresh"}, self.claims)

    def test_genuine(self) -> None:
        """A token made by hand like a genuine one is accepted: forgeries differ in one thing."""
        self.assert_live(self.forge(self.access))
        self.assertEqual(200, self.post(self.forged()).status_code)

    def test_other_kind(self) -> None:
        """Each kind is refused where the other kind belongs."""
        self.assert_no_refresh_token(self.pair["auth_token"])
        self.assert_refused(self.pair["refresh_token"], errors.TokenInvalid)

    def test_types(self) -> None:
        """The typ header says which kind a token is, whatever its claims."""
        for type_ in ("JWT", "jwt", "at+jwt", "Refresh+JWT", "application/refresh+jwt", ""):
            self.assert_no_refresh_token(self.forge(self.claims, type_), type_)
        for type_ in ("refresh+jwt", "jwt", "at+jwt", ""):
            self.assert_refused(self.forge(self.access, type_), errors.TokenInvalid)
        self.assert_refused(self.forge(self.claims, "JWT"), errors.TokenInvalid)
        self.assert_no_refresh_token(self.forge(self.access, "refresh+jwt"))

    def test_audiences(self) -> None:
        """The aud claim has to match the kind as well."""
        lists = [["refresh"], ["refresh", "auth"], []]
        for aud in [MISSING, None, "", "auth", "Refresh", "refresh ", True, *lists]:
            self.assert_no_refresh_token(self.forged(aud=aud), aud)
        for aud in ("refresh", "auth", ["refresh"]):
            self.assert_refused(self.forge(self.access | {"aud": aud}), errors.TokenInvalid)

    def test_generations(self) -> None:
        """A generation is a non-negative integer that fits its column."""
        numbers = [-1, 0.0, 2**31 - 1, 2**31, 2**63, 10**400, -(10**400), float("inf")]
        for gen in [MISSING, None, "0", "", [0], False, True, *numbers]:
            self.assert_no_refresh_token(self.forged(gen=gen), gen)

    def test_future_generation(self) -> None:
        """A generation that was never issued counts as reuse, the largest one too."""
        for gen in (1, 2**31 - 2):
            with self.subTest(gen=gen):
                pair = self.login().get_json()
                claims = claims_of(pair["refresh_token"]) | {"gen": gen}

                self.assert_error(
                    self.post(self.forge(claims, "refresh+jwt")), errors.RefreshReused
                )
                self.assert_ended(pair)

    def test_login_times(self) -> None:
        """The time of login is an integer, and not later than iat."""
        numbers = [-1, self.now + 1, float(self.now), 2**63, 10**400, float("nan")]
        for auth_time in [MISSING, None, str(self.now), [self.now], True, *numbers]:
            self.assert_no_refresh_token(self.forged(auth_time=auth_time), auth_time)

    def test_sessions_and_users(self) -> None:
        """A refresh token needs a session and a user, each in its canonical spelling."""
        sid, sub = self.claims["sid"], self.claims["sub"]
        for value in (MISSING, None, "", sid[:-1], f"{sid}A", f"{sid}\n", [sid], 1, True):
            self.assert_no_refresh_token(self.forged(sid=value), value)
        for value in (MISSING, None, "", f"0{sub}", int(sub), f"{sub} ", "0", str(2**31)):
            self.assert_no_refresh_token(self.forged(sub=value), value)

    def test_session_of_another(self) -> None:
        """A refresh token neither refreshes nor ends another user's session."""
        others = self.login("other@test.com").get_json()
        before = stored_sessions()
        for gen in (0, 1):
            token = self.forged(sid=session_of(others["auth_token"]), gen=gen)
            self.assert_error(self.post(token), errors.SessionEnded)
        self.assertEqual(before, stored_sessions())

    def test_no_token(self) -> None:
        """Other text is refused, and so is a genuine token with characters appended."""
        genuine = self.pair["refresh_token"]
        ends = [genuine + end for end in ("A", "=", ".", ".e30", " ", "\n", "\0")]
        for text in ["", " ", "null", "..", "é", "\0", "x" * 60_000, f"Bearer {genuine}", *ends]:
            self.assert_no_refresh_token(text, text[:10])
        self.assert_no_refresh_token(genuine[:-1])


class TestLifetimes(RefreshTestCase):
    """The lifetimes of tokens and sessions are settings."""

    def assert_ends_at(self, pair: dict[str, Any], *, access: int, refresh: int) -> None:
        """Check when the tokens expire, in seconds after the login."""
        claims = [claims_of(pair[name]) for name in ("auth_token", "refresh_token")]
        self.assertEqual([access, refresh], [claim["exp"] - self.now for claim in claims])
        left = self.now + access - int(clock.utcnow().timestamp())
        self.assertEqual(left, pair["expires_in"])

    def test_expires_in(self) -> None:
        """`expires_in` is the remaining life of the auth token in every response, never below 0."""
        new = {"username": "new", "email": "new@test.com", "password": "test"}
        registered = self.client.post("/auth/register", json=new).get_json()
        for pair in (self.pair, registered):
            self.assert_ends_at(pair, access=ACCESS, refresh=REFRESH)
        self.move_clock(7)
        first = self.refresh(self.pair)
        self.assert_ends_at(first, access=7 + ACCESS, refresh=7 + REFRESH)
        self.move_clock(30)

        again = self.refresh(self.pair)

        self.assertEqual((ACCESS, ACCESS - 30), (first["expires_in"], again["expires_in"]))
        remaining = (first["refresh_expires_in"], again["refresh_expires_in"])
        self.assertEqual((REFRESH, REFRESH - 30), remaining)
        self.app.config["TOKEN_EXPIRATION_SECONDS"] = 3
        self.assertEqual(0, self.refresh(self.pair)["expires_in"])

    def test_sliding(self) -> None:
        """A refresh token that is not used in time expires, and its session with it."""
        self.move_clock(REFRESH - 1)
        following = self.refresh(self.pair)
        self.move_clock(REFRESH - 0.000001)
        last = self.refresh(following)
        self.move_clock(REFRESH)

        self.assert_error(self.post(last["refresh_token"]), errors.TokenExpired)
        self.assertEqual([], self.listed(self.start())[1:])

    def test_absolute(self) -> None:
        """A session expires a fixed time after its login, however often it is refreshed."""
        self.move_clock(590)
        pair = self.refresh(self.pair)
        self.move_clock(590)
        pair = self.refresh(pair)
        self.assert_ends_at(pair, access=1_180 + ACCESS, refresh=SESSION)
        self.move_clock(SESSION - 1_180 - 20)

        pair = self.refresh(pair)

        self.assert_ends_at(pair, access=SESSION, refresh=SESSION)
        self.assertEqual(20, pair["expires_in"])
        self.move_clock(19.999999)
        self.assert_works(pair)
        self.assertEqual(1, self.refresh(pair)["expires_in"])
        self.move_clock(0.000001)
        self.assert_refused(pair["auth_token"], errors.TokenExpired)
        self.assert_error(self.post(pair["refresh_token"]), errors.TokenExpired)

    def test_expired_session(self) -> None:
        """An expired session is not refreshed, even when the token's exp is later."""
        claims = claims_of(self.pair["refresh_token"])
        token = self.forge(claims | {"exp": claims["exp"] + 1}, "refresh+jwt")
        self.move_clock(REFRESH)

        self.assert_error(self.post(token), errors.SessionEnded)

    def test_shorter_session(self) -> None:
        """No token outlives its session."""
        self.app.config["SESSION_EXPIRATION_SECONDS"] = 30

        self.assert_ends_at(self.login().get_json(), access=30, refresh=30)

    def test_longer_access(self) -> None:
        """An auth token with a longer life than its refresh token stays valid to its end."""
        self.app.config["TOKEN_EXPIRATION_SECONDS"] = 1_000
        for pair in (self.login().get_json(), self.refresh(self.pair)):
            self.assert_ends_at(pair, access=1_000, refresh=REFRESH)
        self.move_clock(999.999999)

        self.assert_works(pair)
        self.assert_error(self.post(pair["refresh_token"]), errors.TokenExpired)


class TestRefusals(RefreshTestCase):
    """Requests that get no new pair."""

    def test_header(self) -> None:
        """Only the refresh token in the body counts; an Authorization header is ignored."""
        response = self.client.post("/auth/refresh", headers=bearer(self.pair["refresh_token"]))
        self.assert_error(response, errors.InvalidPayload)

        self.refresh(self.pair, headers=bearer("invalid"))

    def test_users(self) -> None:
        """A deactivated or deleted user can't refresh; after activation they log in anew."""
        token = self.pair["refresh_token"]
        db.session.execute(update(User).values(active=False))
        db.session.commit()
        self.assert_error(self.post(token), errors.AccountInactive)
        self.assertEqual([0], [row["generation"] for row in stored_sessions()])

        self.set_active(True)
        self.assert_error(self.post(token), errors.SessionEnded)

        db.session.execute(delete(User))
        db.session.commit()
        self.assert_error(self.post(token), errors.AccountInactive)
