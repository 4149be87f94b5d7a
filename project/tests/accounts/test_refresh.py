"""Refresh: the next pair, a token that comes twice, the two kinds, and how long it all lives."""

from datetime import timedelta
from typing import Any

from sqlalchemy import delete, update
from werkzeug.test import TestResponse

from project import clock, db
from project.api.models import User
from project.tests.base import bearer
from project.tests.test_contract_answers import everything_written
from project.tests.test_sessions import (
    CONTACT_US,
    ENDED,
    INVALID,
    INVALID_PAYLOAD,
    SessionsTestCase,
    claims_of,
    session_of,
)
from project.tests.utils import logged, stored_sessions

REUSED = (401, "Invalid token. Please log in again.", "refresh_reused")
EXPIRED = (401, "Signature expired. Please log in again.", "token_expired")
TOKENS = {"auth_token", "refresh_token"}
ACCESS, REFRESH, SESSION = 60, 600, 1_500  # seconds
MISSING = object()  # stands for a claim that is not there


class RefreshTestCase(SessionsTestCase):
    """A test of somebody who has just logged in, at a whole second."""

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
        """Return the answer to a refresh token."""
        return self.client.post("/auth/refresh", json={"refresh_token": refresh_token}, **request)

    def refresh(self, pair: dict[str, Any], **request: Any) -> dict[str, Any]:
        """Return the pair that comes after this one."""
        response = self.post(pair["refresh_token"], **request)
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        following: dict[str, Any] = response.get_json()
        return following

    def assert_works(self, *pairs: dict[str, Any]) -> None:
        """Check that the auth token of each pair tells who is calling."""
        self.assert_live(*(pair["auth_token"] for pair in pairs))

    def assert_ended(self, *pairs: dict[str, Any]) -> None:
        """Check that nothing of these pairs is good any more, as their session has ended."""
        for pair in pairs:
            self.assert_refused(pair["auth_token"], ENDED)
            self.assert_error(self.post(pair["refresh_token"]), *ENDED)


class TestRotation(RefreshTestCase):
    """A refresh token is good once, and a moment longer."""

    def test_new_pair(self) -> None:
        """A refresh gives the same members as a login, and the pair is of the same session."""
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
        """The old auth token is good for the rest of its life, and the new pair for its own."""
        self.move_clock(ACCESS - 1)
        following = self.refresh(self.pair)
        self.assert_works(self.pair, following)

        self.move_clock(1)

        self.assert_works(following)
        self.assert_refused(self.pair["auth_token"], EXPIRED)
        self.assert_works(self.refresh(following))

    def test_again_within_ten_seconds(self) -> None:
        """An answer that got lost is given again, to the letter, and nothing is rotated twice."""
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
        """A token that comes again after ten seconds is refused, and its session ends for all."""
        stolen = self.refresh(self.pair)
        self.move_clock(10.000001)
        self.assert_works(self.pair, stolen)

        response = self.post(self.pair["refresh_token"])

        self.assert_error(response, *REUSED)
        challenge = response.headers["WWW-Authenticate"]
        self.assertEqual('Bearer error="invalid_token"', challenge)
        self.assert_ended(self.pair, stolen)

    def test_two_generations_back(self) -> None:
        """Once the successor has been used, its predecessor is refused at any time."""
        second = self.refresh(self.pair)
        third = self.refresh(second)
        self.assertEqual(third, self.refresh(second))

        self.assert_error(self.post(self.pair["refresh_token"]), *REUSED)
        self.assert_ended(self.pair, second, third)

    def test_other_sessions(self) -> None:
        """A theft ends the session that it happened in, and no other."""
        own, others = self.login().get_json(), self.login("other@test.com").get_json()
        self.refresh(self.refresh(self.pair))

        self.assert_error(self.post(self.pair["refresh_token"]), *REUSED)
        self.assert_works(own, others)
        self.refresh(own)
        self.refresh(others)

    def test_log(self) -> None:
        """A theft is logged with user, session and who brought the token, but without any token."""
        second = self.refresh(self.pair)
        self.move_clock(11)
        with everything_written() as written:
            self.assert_error(self.post(self.pair["refresh_token"]), *REUSED)

        (line,) = logged(written.getvalue())
        session_id = session_of(self.pair["auth_token"])
        expected = {"event": "refresh_reused", "user_id": self.user.id, "session_id": session_id}
        self.assertIn("Werkzeug", line.pop("user_agent"))
        self.assertTrue(line.pop("request_id"))
        self.assertEqual(expected | {"ip": "127.0.0.1"}, line)
        for pair in (self.pair, second):
            for part in ".".join(pair[name] for name in TOKENS).split("."):
                self.assertNotIn(part, written.getvalue())

    def test_no_theft(self) -> None:
        """A lost answer is no theft, nor is the token of a session that has ended."""
        with everything_written() as written:
            self.assertEqual(self.refresh(self.pair), self.refresh(self.pair))
            self.get("/auth/logout", self.pair["auth_token"])
            self.assert_error(self.post(self.pair["refresh_token"]), *ENDED)

        events = [line["event"] for line in logged(written.getvalue())]
        self.assertEqual(["refreshed", "logged_out", "refresh_refused"], events)

    def test_device(self) -> None:
        """A refresh says anew where the session is, and when it was used; not when it began."""
        self.move_clock(5)
        environ = {"REMOTE_ADDR": "192.0.2.9", "HTTP_USER_AGENT": "moved"}
        before = stored_sessions()[0]

        self.refresh(self.pair, environ_overrides=environ)

        changes = {
            "generation": 1,
            "last_used_at": clock.utcnow(),
            "expires_at": clock.utcnow() + timedelta(seconds=REFRESH),
            "ip": "192.0.2.9",
            "user_agent": "moved",
        }
        self.assertEqual([before | changes], stored_sessions())


class TestKinds(RefreshTestCase):
    """An auth token and a refresh token are never taken for one another, nor anything for them."""

    def setUp(self) -> None:
        """Take the genuine claims of both kinds."""
        super().setUp()
        self.access, self.claims = (claims_of(self.pair[name]) for name in sorted(TOKENS))

    def forged(self, **changes: object) -> str:
        """Return a refresh token made by hand, with these changes of its claims."""
        claims = self.claims | changes
        present = {name: value for name, value in claims.items() if value is not MISSING}
        return self.forge(present, "refresh+jwt")

    def assert_no_refresh_token(self, token: object, name: object = None) -> None:
        """Check that this refreshes nothing and ends nothing."""
        before = stored_sessions()
        with self.subTest(name):
            response = self.post(token)

            self.assert_error(response, *INVALID)
            self.assertEqual(before, stored_sessions())
            challenge = response.headers["WWW-Authenticate"]
            self.assertEqual('Bearer error="invalid_token"', challenge)

    def test_form(self) -> None:
        """A refresh token names its session, the generation and the login; and its audience."""
        times = {"auth_time": self.now, "iat": self.now, "exp": self.now + REFRESH}
        session = {"sub": str(self.user.id), "sid": stored_sessions()[0]["id"], "gen": 0}

        self.assertEqual(session | times | {"aud": "refresh"}, self.claims)

    def test_genuine(self) -> None:
        """Tokens made by hand as ours are made are taken: forgeries differ in one thing."""
        self.assert_live(self.forge(self.access))
        self.assertEqual(200, self.post(self.forged()).status_code)

    def test_other_kind(self) -> None:
        """Each kind is refused where the other one belongs."""
        self.assert_no_refresh_token(self.pair["auth_token"])
        self.assert_refused(self.pair["refresh_token"], INVALID)

    def test_types(self) -> None:
        """The type says which kind a token is, whatever else is in it."""
        for type_ in ("JWT", "jwt", "at+jwt", "Refresh+JWT", "application/refresh+jwt", ""):
            self.assert_no_refresh_token(self.forge(self.claims, type_), type_)
        for type_ in ("refresh+jwt", "jwt", "at+jwt", ""):
            self.assert_refused(self.forge(self.access, type_), INVALID)
        self.assert_refused(self.forge(self.claims, "JWT"), INVALID)
        self.assert_no_refresh_token(self.forge(self.access, "refresh+jwt"))

    def test_audiences(self) -> None:
        """The audience says it once more."""
        lists = [["refresh"], ["refresh", "auth"], []]
        for aud in [MISSING, None, "", "auth", "Refresh", "refresh ", True, *lists]:
            self.assert_no_refresh_token(self.forged(aud=aud), aud)
        for aud in ("refresh", "auth", ["refresh"]):
            self.assert_refused(self.forge(self.access | {"aud": aud}), INVALID)

    def test_generations(self) -> None:
        """A generation is a whole number that a column holds."""
        numbers = [-1, 0.0, 2**31 - 1, 2**31, 2**63, 10**400, -(10**400), float("inf")]
        for gen in [MISSING, None, "0", "", [0], False, True, *numbers]:
            self.assert_no_refresh_token(self.forged(gen=gen), gen)

    def test_generation_to_come(self) -> None:
        """A generation that there hasn't been is none that is answered, the largest too."""
        for gen in (1, 2**31 - 2):
            with self.subTest(gen=gen):
                pair = self.login().get_json()
                claims = claims_of(pair["refresh_token"]) | {"gen": gen}

                self.assert_error(self.post(self.forge(claims, "refresh+jwt")), *REUSED)
                self.assert_ended(pair)

    def test_login_times(self) -> None:
        """The time of the login is a whole number, and not after the token was made."""
        numbers = [-1, self.now + 1, float(self.now), 2**63, 10**400, float("nan")]
        for auth_time in [MISSING, None, str(self.now), [self.now], True, *numbers]:
            self.assert_no_refresh_token(self.forged(auth_time=auth_time), auth_time)

    def test_sessions_and_users(self) -> None:
        """A refresh token needs a session and a user, each in its one spelling."""
        sid, sub = self.claims["sid"], self.claims["sub"]
        for value in (MISSING, None, "", sid[:-1], f"{sid}A", f"{sid}\n", [sid], 1, True):
            self.assert_no_refresh_token(self.forged(sid=value), value)
        for value in (MISSING, None, "", f"0{sub}", int(sub), f"{sub} ", "0", str(2**31)):
            self.assert_no_refresh_token(self.forged(sub=value), value)

    def test_session_of_another(self) -> None:
        """A refresh token refreshes, and ends, nobody else's session."""
        others = self.login("other@test.com").get_json()
        before = stored_sessions()
        for gen in (0, 1):
            token = self.forged(sid=session_of(others["auth_token"]), gen=gen)
            self.assert_error(self.post(token), *ENDED)
        self.assertEqual(before, stored_sessions())

    def test_no_token(self) -> None:
        """Text that is no token of ours refreshes nothing, a genuine one with more of it too."""
        genuine = self.pair["refresh_token"]
        ends = [genuine + end for end in ("A", "=", ".", ".e30", " ", "\n", "\0")]
        for text in ["", " ", "null", "..", "é", "\0", "x" * 60_000, f"Bearer {genuine}", *ends]:
            self.assert_no_refresh_token(text, text[:10])
        self.assert_no_refresh_token(genuine[:-1])


class TestLifetimes(RefreshTestCase):
    """How long tokens and sessions live is set."""

    def assert_ends_at(self, pair: dict[str, Any], *, access: int, refresh: int) -> None:
        """Check when the tokens expire, in seconds after the login."""
        claims = [claims_of(pair[name]) for name in ("auth_token", "refresh_token")]
        self.assertEqual([access, refresh], [claim["exp"] - self.now for claim in claims])
        left = self.now + access - int(clock.utcnow().timestamp())
        self.assertEqual(left, pair["expires_in"])

    def test_expires_in(self) -> None:
        """`expires_in` is what the auth token has left, at every answer, and never less than 0."""
        new = {"username": "new", "email": "new@test.com", "password": "test"}
        registered = self.client.post("/auth/register", json=new).get_json()
        for pair in (self.pair, registered):
            self.assert_ends_at(pair, access=ACCESS, refresh=REFRESH)
        self.move_clock(7)
        first = self.refresh(self.pair)
        self.assert_ends_at(first, access=7 + ACCESS, refresh=7 + REFRESH)
        self.move_clock(10)

        again = self.refresh(self.pair)

        self.assertEqual((ACCESS, ACCESS - 10), (first["expires_in"], again["expires_in"]))
        self.app.config["TOKEN_EXPIRATION_SECONDS"] = 3
        self.assertEqual(0, self.refresh(self.pair)["expires_in"])

    def test_sliding(self) -> None:
        """A refresh token not used in time is over, and its session with it."""
        self.move_clock(REFRESH - 1)
        following = self.refresh(self.pair)
        self.move_clock(REFRESH - 0.000001)
        last = self.refresh(following)
        self.move_clock(REFRESH)

        self.assert_error(self.post(last["refresh_token"]), *EXPIRED)
        self.assertEqual([], self.listed(self.start())[1:])

    def test_absolute(self) -> None:
        """However often it is refreshed, a session is over so long after its login."""
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
        self.assert_refused(pair["auth_token"], EXPIRED)
        self.assert_error(self.post(pair["refresh_token"]), *EXPIRED)

    def test_expired_session(self) -> None:
        """A session whose time is over is not refreshed, whatever a token says."""
        claims = claims_of(self.pair["refresh_token"])
        token = self.forge(claims | {"exp": claims["exp"] + 1}, "refresh+jwt")
        self.move_clock(REFRESH)

        self.assert_error(self.post(token), *ENDED)

    def test_shorter_session(self) -> None:
        """No token outlives its session from the start."""
        self.app.config["SESSION_EXPIRATION_SECONDS"] = 30

        self.assert_ends_at(self.login().get_json(), access=30, refresh=30)

    def test_longer_access(self) -> None:
        """An auth token that is set to live longer than a refresh token is good to its end."""
        self.app.config["TOKEN_EXPIRATION_SECONDS"] = 1_000
        for pair in (self.login().get_json(), self.refresh(self.pair)):
            self.assert_ends_at(pair, access=1_000, refresh=REFRESH)
        self.move_clock(999.999999)

        self.assert_works(pair)
        self.assert_error(self.post(pair["refresh_token"]), *EXPIRED)


class TestRefusals(RefreshTestCase):
    """Who gets no new pair."""

    def test_header(self) -> None:
        """The refresh token is all that counts; an Authorization header isn't looked at."""
        response = self.client.post("/auth/refresh", headers=bearer(self.pair["refresh_token"]))
        self.assert_error(response, *INVALID_PAYLOAD)

        self.refresh(self.pair, headers=bearer("invalid"))

    def test_users(self) -> None:
        """Nobody who is deactivated or gone refreshes; activated again, they log in anew."""
        token = self.pair["refresh_token"]
        db.session.execute(update(User).values(active=False))
        db.session.commit()
        self.assert_error(self.post(token), *CONTACT_US)
        self.assertEqual([0], [row["generation"] for row in stored_sessions()])

        self.set_active(True)
        self.assert_error(self.post(token), *ENDED)

        db.session.execute(delete(User))
        db.session.commit()
        self.assert_error(self.post(token), *CONTACT_US)
