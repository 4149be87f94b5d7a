"""What other services learn of a token, and how they end a session."""

from datetime import UTC, datetime
from typing import Any

import jwt
import pyotp
from sqlalchemy import update

from project import clock, db, errors
from project.accounts import administration
from project.models import User
from project.tests.api.oauth_case import (
    AUDIENCE,
    ISSUER,
    LIFETIME,
    REVOCATIONS,
    REVOKE,
    OAuthTestCase,
)
from project.tests.base import bearer
from project.tests.rows import ORIGIN, stored_events, stored_sessions
from project.tests.tokens.claims import claims_of, session_of
from project.tokens import codec, keys, signing_keys

INACTIVE = {"active": False}
OTHER_AUDIENCE = "https://other.example"


class IntrospectionTestCase(OAuthTestCase):
    """A test in which the user has logged in."""

    def setUp(self) -> None:
        """Log in."""
        super().setUp()
        self.pair = self.start()
        self.token, self.refresh_token = self.pair["auth_token"], self.pair["refresh_token"]
        self.session_id = session_of(self.token)

    def refresh(self, token: str | None = None) -> dict[str, Any]:
        """Return the response to a refresh, by default of the first token."""
        body = {"refresh_token": token or self.refresh_token}
        answer: dict[str, Any] = self.client.post("/auth/refresh", json=body).get_json()
        return answer

    def tokens(self) -> dict[str, str]:
        """Return a token of each kind that a user has."""
        return {"auth": self.token, "refresh": self.refresh_token, "before": self.from_before()}

    def from_before(self) -> str:
        """Return an auth token of the session as it was made before there was an issuer."""
        now = int(clock.utcnow().timestamp())
        claims = codec.AccessClaims(self.user.id, self.session_id, now, now + LIFETIME)
        return codec.encode_access(claims, key=keys.signing_key())

    def set_roles(self, *roles: str, admin: bool = False) -> None:
        """Give the user these roles only."""
        db.session.execute(update(User).values(roles=list(roles), admin=admin))
        db.session.commit()


class TestActive(IntrospectionTestCase):
    """A token that this service would accept."""

    def common(self) -> dict[str, Any]:
        """Return the members that the answer has for every token of the session."""
        return {
            "active": True,
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": str(self.user.id),
            "client_id": "first-party",
            "username": "ada",
            "iat": int(clock.utcnow().timestamp()),
            "sid": self.session_id,
            "amr": ["pwd"],
        }

    def test_auth_token(self) -> None:
        """The answer has the claims of the token, the name of the user, and the type."""
        now = int(clock.utcnow().timestamp())
        expected = {
            **self.common(),
            "token_type": "Bearer",
            "exp": now + LIFETIME,
            "jti": f"{self.session_id}.0",
            "auth_time": now,
        }

        self.assertEqual(expected, self.introspect(self.token))
        claims = claims_of(self.token)
        self.assertEqual(claims, {name: expected[name] for name in claims})

    def test_refresh_token(self) -> None:
        """A refresh token is described in the same way; it is of no type to send requests with."""
        now = int(clock.utcnow().timestamp())
        expected = {
            **self.common(),
            "exp": now + self.app.config["REFRESH_EXPIRATION_SECONDS"],
            "jti": f"{self.session_id}.0",
            "auth_time": now,
        }

        self.assertEqual(expected, self.introspect(self.refresh_token))

    def test_token_from_before(self) -> None:
        """An auth token from before the switch is active; it has no `jti` and no `auth_time`."""
        now = int(clock.utcnow().timestamp())
        expected = {**self.common(), "token_type": "Bearer", "exp": now + LIFETIME}

        self.assertEqual(expected, self.introspect(self.from_before()))
        self.assertEqual(200, self.get("/auth/status", self.from_before()).status_code)

    def test_client_token(self) -> None:
        """A client's own token names no user and no session."""
        token = self.own_token()
        expected = {"active": True, "token_type": "Bearer", **claims_of(token)}

        self.assertEqual(expected, self.introspect(token))
        self.assertEqual(expected, self.introspect(token, self.add_client("invoices")))

    def test_hint(self) -> None:
        """The hint of the type has no effect."""
        for hint in ("access_token", "refresh_token", "unknown"):
            for token in (self.token, self.refresh_token):
                answer = self.post("/oauth/introspect", token=token, token_type_hint=hint)
                self.assertIs(True, answer.get_json()["active"])

    def test_refreshed(self) -> None:
        """After a refresh both auth tokens are active, and the old refresh token for a while."""
        new = self.refresh()
        for token, number in ((self.token, 0), (new["auth_token"], 1), (new["refresh_token"], 1)):
            answer = self.introspect(token)
            self.assertEqual(
                (True, f"{self.session_id}.{number}"), (answer["active"], answer["jti"])
            )
        self.assertIs(True, self.introspect(self.refresh_token)["active"])
        self.assertIs(True, self.introspect(new["refresh_token"])["active"])

        self.move_clock(31)
        self.assertEqual(INACTIVE, self.introspect(self.refresh_token))
        self.assertIs(True, self.introspect(new["refresh_token"])["active"])
        # To ask did not count as a use of the old token.
        self.assertIn("auth_token", self.refresh(new["refresh_token"]))

    def test_older(self) -> None:
        """A refresh token of two refreshes ago is not active."""
        self.refresh(self.refresh()["refresh_token"])

        self.assertEqual(INACTIVE, self.introspect(self.refresh_token))

    def test_scope(self) -> None:
        """The scope are the roles that the user has now, not those in the token."""
        self.assertNotIn("scope", self.introspect(self.token))
        for roles, admin, scope in (
            (("editor", "stock.read"), False, "editor stock.read"),
            ((), True, "admin"),
            (("editor",), True, "admin editor"),
        ):
            self.set_roles(*roles, admin=admin)
            for name, token in self.tokens().items():
                with self.subTest(scope, token=name):
                    self.assertEqual(scope, self.introspect(token)["scope"])
        self.assertEqual("admin editor", claims_of(self.start()["auth_token"])["scope"])

    def test_methods(self) -> None:
        """`amr` is how the user has proved who they are up to now, not up to the token."""
        before = self.tokens()
        headers, password = bearer(self.token), {"current_password": "test"}
        begun = self.client.post("/auth/totp", json=password, headers=headers).get_json()
        code = pyotp.TOTP(begun["data"]["secret"]).at(clock.utcnow())
        answer = self.client.post("/auth/totp/confirm", json={"code": code}, headers=headers)
        self.assertEqual(200, answer.status_code)

        for name, token in before.items():
            with self.subTest(name):
                self.assertEqual(["pwd", "otp"], self.introspect(token)["amr"])
        self.assertEqual(["pwd"], claims_of(self.token)["amr"])
        self.assertEqual(["pwd", "otp"], claims_of(self.refresh()["auth_token"])["amr"])

    def test_username(self) -> None:
        """The name is the one that the user has now."""
        db.session.execute(update(User).values(username="lovelace"))
        db.session.commit()

        self.assertEqual("lovelace", self.introspect(self.token)["username"])

    def test_rotated_keys(self) -> None:
        """A token outlives the rotation of the key that signed it, but not that of a leaked key."""
        signing_keys.rotate()
        db.session.commit()
        self.move_clock(1_000)
        self.assertIs(True, self.introspect(self.token)["active"])
        signing_keys.rotate(at_once=True)
        db.session.commit()
        self.move_clock(60)
        self.assertEqual(INACTIVE, self.introspect(self.token))


class TestInactive(IntrospectionTestCase):
    """A token that this service would refuse: the answer does not say why."""

    def assert_inactive(self, **tokens: str) -> None:
        """Check that nothing is told of these tokens, by default those of the user."""
        for name, token in (tokens or self.made).items():
            with self.subTest(name):
                self.assertEqual(INACTIVE, self.introspect(token))

    def setUp(self) -> None:
        """Check that the tokens are active at first."""
        super().setUp()
        self.made = self.tokens()
        for token in self.made.values():
            self.assertIs(True, self.introspect(token)["active"])

    def test_expired(self) -> None:
        """An expired token is not active."""
        own = self.own_token()
        self.move_clock(899)
        self.assertIs(True, self.introspect(own)["active"])
        self.move_clock(1)
        self.assert_inactive(own=own)
        self.move_clock(LIFETIME - 901)
        self.assertIs(True, self.introspect(self.token)["active"])
        self.move_clock(1)
        self.assert_inactive(auth=self.token, before=self.made["before"])
        self.assertIs(True, self.introspect(self.refresh_token)["active"])
        self.move_clock(self.app.config["REFRESH_EXPIRATION_SECONDS"])
        self.assert_inactive()

    def test_ended(self) -> None:
        """No token of an ended session is active."""
        self.client.post("/auth/logout", headers=bearer(self.token))
        self.assert_inactive()

    def test_deactivated(self) -> None:
        """No token of a deactivated user is active."""
        administration.set_active("ada@test.com", False, ORIGIN)
        db.session.commit()
        self.assert_inactive()

    def test_deactivated_with_session(self) -> None:
        """Not even one of a session that is still there."""
        db.session.execute(update(User).values(active=False))
        db.session.commit()
        self.assertEqual(1, len(stored_sessions()))
        self.assert_inactive()

    def test_deleted(self) -> None:
        """No token of a deleted user is active."""
        body = {"current_password": "test"}
        answer = self.client.delete("/auth/account", json=body, headers=bearer(self.token))
        self.assertEqual(200, answer.status_code)
        self.assert_inactive()

    def test_has_to_enrol(self) -> None:
        """No token is active while the user must have a second factor and has none."""
        self.app.config["REQUIRE_MFA"] = "all"
        self.assert_inactive()
        self.assert_inactive(new=self.start()["auth_token"])
        self.app.config["REQUIRE_MFA"] = "admins"
        for token in self.made.values():
            self.assertIs(True, self.introspect(token)["active"])
        self.set_roles(admin=True)
        self.assert_inactive()

    def test_other_audience(self) -> None:
        """A client learns nothing of tokens for another audience, its own name included."""
        invoices = self.add_client("invoices", OTHER_AUDIENCE)
        for name, token in {**self.made, "own": self.own_token()}.items():
            with self.subTest(name):
                self.assertEqual(INACTIVE, self.introspect(token, invoices))
        self.assertEqual(INACTIVE, self.introspect(self.own_token(invoices)))
        self.assertIs(True, self.introspect(self.own_token(invoices), invoices)["active"])

    def test_audience_of_before(self) -> None:
        """After a change of the audience, this service accepts no auth token of before."""
        self.app.config["TOKEN_AUDIENCE"] = OTHER_AUDIENCE

        self.assert_error(self.get("/auth/status", self.token), errors.TokenInvalid)
        self.assert_inactive(auth=self.token)
        invoices = self.add_client("invoices", OTHER_AUDIENCE)
        self.assertEqual(INACTIVE, self.introspect(self.token, invoices))
        self.assertIs(True, self.introspect(self.refresh()["auth_token"], invoices)["active"])

    def test_forged(self) -> None:
        """Nothing is told of a token that this service has not signed."""
        head, payload, signature = self.token.split(".")
        kid = jwt.get_unverified_header(self.token)["kid"]
        secret = self.app.config["SECRET_KEY"]
        claims = claims_of(self.token)
        self.assert_inactive(
            payload=f"{head}.{payload[:-2]}AA.{signature}",
            signature=f"{head}.{payload}.{signature[:-4]}AAAA",
            no_signature=f"{head}.{payload}.",
            other_algorithm=jwt.encode(claims, secret, "HS256", {"typ": "at+jwt", "kid": kid}),
            other_key=jwt.encode(claims, "x" * 32, "HS256", {"typ": "JWT"}),
            session=self.session_id,
            jti=f"{self.session_id}.0",
        )

    def test_without_session(self) -> None:
        """A token of `User.encode_auth_token`, which belongs to no session, is not active."""
        self.assert_inactive(lesson=self.user.encode_auth_token(self.user.id))


class TestRevocation(IntrospectionTestCase):
    """A service ends the session of a token."""

    def test_each_kind(self) -> None:
        """Each token of a session ends it; the event names the session, the user and the client."""
        for name in self.tokens():
            with self.subTest(name):
                self.pair = self.start()
                self.token, self.refresh_token = self.pair["auth_token"], self.pair["refresh_token"]
                self.session_id = session_of(self.token)
                token = self.tokens()[name]
                response = self.post(REVOKE, token=token)

                self.assertEqual(200, response.status_code)
                success = {"status": "success", "message": "Revoked."}
                self.assertEqual(success, response.get_json())
                self.assert_error(self.get("/auth/status", self.token), errors.SessionEnded)
                self.assertEqual(INACTIVE, self.introspect(self.refresh_token))
                event = stored_events()[-1]
                expected = {
                    "kind": "session_revoked",
                    "user_id": self.user.id,
                    "actor_id": None,
                    "session_id": self.session_id,
                    "details": {"client": "orders"},
                    "ip": "192.0.2.7",
                }
                self.assertEqual(expected, {key: event[key] for key in expected})

    def test_replaced(self) -> None:
        """A refresh token that has been replaced ends the session too."""
        self.refresh(self.refresh()["refresh_token"])
        self.post(REVOKE, token=self.refresh_token)

        self.assertEqual([], stored_sessions())

    def test_nothing_to_end(self) -> None:
        """The answer to a token without a live session is the same; nothing is recorded."""
        self.post(REVOKE, token=self.token)
        ended = self.token
        kept = self.start()["auth_token"]
        invoices = self.add_client("invoices", OTHER_AUDIENCE)
        before = stored_events(), stored_sessions()
        for name, (token, credentials) in {
            "ended": (ended, self.orders),
            "other audience": (kept, invoices),
            "unknown": ("x", self.orders),
            "forged": (f"{kept[:-4]}AAAA", self.orders),
            "a session": (session_of(kept), self.orders),
        }.items():
            with self.subTest(name):
                response = self.post(REVOKE, credentials, token=token)
                self.assertEqual("Revoked.", response.get_json()["message"])
        self.assertEqual(before, (stored_events(), stored_sessions()))
        self.move_clock(LIFETIME)
        self.assertEqual(200, self.post(REVOKE, token=kept).status_code)
        self.assertEqual(1, len(stored_sessions()))

    def test_client_token(self) -> None:
        """A client's own token cannot be revoked."""
        token = self.own_token()
        response = self.post(REVOKE, token=token)

        self.assert_oauth_error(response, errors.UnsupportedTokenType, "unsupported_token_type")
        self.assertIs(True, self.introspect(token)["active"])


class TestFeed(OAuthTestCase):
    """The feed of ended sessions."""

    def end(self, number: int) -> list[str]:
        """Start this many sessions and end them, one second after the other; return their IDs."""
        ended = []
        for _ in range(number):
            token = self.start()["auth_token"]
            self.client.post("/auth/logout", headers=bearer(token))
            ended.append(session_of(token))
            self.move_clock(1)
        return ended

    def page(self, **query: object) -> tuple[list[str], str]:
        """Return the IDs of a page, and its cursor."""
        response = self.client.get(REVOCATIONS, query_string=query, headers=self.orders)
        self.assertEqual(200, response.status_code, response.get_data(as_text=True))
        self.assertEqual("no-store", response.headers["Cache-Control"])
        answer = response.get_json()
        self.assertEqual("success", answer["status"])
        data = answer["data"]
        return [each["sid"] for each in data["revocations"]], data["next"]

    def test_members(self) -> None:
        """A page says which session ended, when, and until when to remember it."""
        token = self.start()["auth_token"]
        self.move_clock(10)
        self.client.post("/auth/logout", headers=bearer(token))
        answer = self.client.get(REVOCATIONS, headers=self.orders).get_json()

        claims = claims_of(token)
        expected = {
            "sid": claims["sid"],
            "ended_at": text(claims["iat"] + 10),
            "expires_at": text(claims["exp"]),
        }
        self.assertEqual({"revocations", "next"}, set(answer["data"]))
        self.assertEqual([expected], answer["data"]["revocations"])

    def test_pages(self) -> None:
        """Pages of any size have every session once, in the order in which they ended."""
        self.assertEqual([], self.page()[0])
        ended = self.end(5)
        for limit in (1, 2, 4, 5, 1_000):
            with self.subTest(limit):
                found, after = self.page(limit=limit)
                while True:
                    more, after = self.page(limit=limit, after=after)
                    if not more:
                        break
                    found += more
                self.assertEqual(ended, found)
                self.assertEqual(([], after), self.page(after=after))
        later = self.end(1)
        self.assertEqual(later, self.page(after=after)[0])

    def test_expired(self) -> None:
        """A session is in the feed until its last auth token expires; the cursor goes on."""
        (first,) = self.end(1)
        _, after = self.page()
        self.move_clock(LIFETIME - 2)
        self.assertEqual([first], self.page()[0])
        self.move_clock(1)
        self.assertEqual([], self.page()[0])
        self.assertEqual(([], after), self.page(after=after))
        (second,) = self.end(1)
        self.assertEqual([second], self.page(after=after)[0])

    def test_invalid(self) -> None:
        """What is no cursor of the feed, or no limit, is refused by name."""
        _, after = self.page()
        self.end(1)
        for name, value in (
            *(
                ("after", value)
                for value in ("", "-1", "x", "01", "1.0", "9" * 30, f"{10**18}", "%00")
            ),
            *(("limit", value) for value in ("", "0", "1001", "x")),
        ):
            with self.subTest(name, value=value):
                query = {name: value}
                response = self.client.get(REVOCATIONS, query_string=query, headers=self.orders)
                refusal = errors.InvalidPayload
                data = self.assert_oauth_error(response, refusal, "invalid_request")
                self.assertEqual([name], list(data["errors"]))
        self.assertEqual(1, len(self.page(after=after)[0]))


def text(seconds: int) -> str:
    """Return a time since 1970 as responses have it."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
