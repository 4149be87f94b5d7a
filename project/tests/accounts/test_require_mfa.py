"""REQUIRE_MFA: users who must have a second factor and have none can only set one up."""

from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

import jwt

from project import clock, db, errors
from project.accounts import administration, clients
from project.tests.accounts.second_factor_case import (
    SecondFactorTestCase,
    Tokens,
    stored,
)
from project.tests.api.oauth_case import ISSUER, basic
from project.tests.rows import ORIGIN
from project.tests.tokens.claims import claims_of, decode

ALLOWED = {  # what such a user may do; all other routes with a token are refused
    ("GET", "/auth/totp"),
    ("POST", "/auth/totp"),
    ("POST", "/auth/totp/confirm"),
    ("GET", "/auth/logout"),
    ("POST", "/auth/logout"),
}


class RequiredTestCase(SecondFactorTestCase):
    """A test with two users and an admin, who have no second factor."""

    def setUp(self) -> None:
        """Add the admin; let no route answer without a token that need not."""
        super().setUp()
        self.add("admin", admin=True)
        self.app.config["USERS_API_OPEN"] = False

    def require(self, whom: str) -> None:
        """Change REQUIRE_MFA."""
        self.app.config["REQUIRE_MFA"] = whom

    def routes_with_a_token(self) -> Iterator[tuple[str, str]]:
        """Yield each method and path of the application that is refused without a token."""
        adapter = self.app.url_map.bind("localhost")
        for rule in self.app.url_map.iter_rules():
            values = dict.fromkeys(rule.arguments, str(self.ids["bob"]))
            path = adapter.build(rule.endpoint, values)
            for method in (rule.methods or set()) - {"OPTIONS", "HEAD"}:
                answer = self.client.open(path, method=method)
                needs_one = "Bearer" in answer.headers.get("WWW-Authenticate", "")
                if needs_one or rule.endpoint == "auth.logout_user":
                    yield method, path

    def refused(self, name: str) -> set[tuple[str, str]]:
        """Return the routes with a token that refuse a user until they have set one up."""
        refused = set()
        for method, path in self.routes_with_a_token():
            if (method, path) not in ALLOWED:
                answer = self.send(method, path, self.tokens[name])
                if answer.get_json().get("code") == "mfa_enrolment_required":
                    self.assert_error(answer, errors.MfaEnrolmentRequired)
                    refused.add((method, path))
        return refused

    def assert_in(self, name: str) -> None:
        """Check that a user is let in."""
        self.ok(self.get("/auth/status", self.tokens[name]))

    def assert_must_enrol(self, name: str) -> None:
        """Check that a user has to set an authenticator up first."""
        answer = self.get("/auth/status", self.tokens[name])
        self.assert_error(answer, errors.MfaEnrolmentRequired)


class TestWho(RequiredTestCase):
    """Of whom it is required."""

    def test_none(self) -> None:
        """Of no user by default."""
        self.assertEqual("none", self.app.config["REQUIRE_MFA"])
        for name in ("ada", "admin"):
            self.assert_in(name)

    def test_admins(self) -> None:
        """Of admins only."""
        self.require("admins")

        self.assert_must_enrol("admin")
        for name in ("ada", "bob"):
            self.assert_in(name)

    def test_all(self) -> None:
        """Of every user."""
        self.require("all")

        for name in ("ada", "bob", "admin"):
            self.assert_must_enrol(name)

    def test_roles_do_not_count(self) -> None:
        """Roles for other services make no admin."""
        self.require("admins")
        self.store("ada", roles=["buyer"])

        self.assert_in("ada")

    def test_new_admin(self) -> None:
        """A user who becomes an admin has to at the next request, and not when demoted."""
        self.require("admins")
        self.enrol("admin")
        path = f"/users/{self.ids['ada']}"

        self.ok(self.send("PATCH", path, self.tokens["admin"], admin=True))
        self.assert_must_enrol("ada")
        self.ok(self.send("PATCH", path, self.tokens["admin"], admin=False))
        self.assert_in("ada")

    def test_new_admin_with_an_authenticator(self) -> None:
        """A user who has one becomes an admin without delay."""
        self.require("admins")
        self.enrol("admin")
        self.enrol("ada")
        self.ok(self.send("PATCH", f"/users/{self.ids['ada']}", self.tokens["admin"], admin=True))

        self.ok(self.get("/users", self.tokens["ada"]))

    def test_reset_by_an_admin(self) -> None:
        """A user whose authenticator is reset logs in, and has to set another one up."""
        self.require("all")
        self.enrol("admin")
        self.enrol("ada")
        self.ok(self.send("DELETE", f"/users/{self.ids['ada']}/totp", self.tokens["admin"]))

        self.tokens["ada"] = self.ok(self.log_in())["auth_token"]

        self.assert_must_enrol("ada")
        self.enrol()
        self.assert_in("ada")


class TestRoutes(RequiredTestCase):
    """What a user may do who has to set an authenticator up."""

    def test_every_other_route(self) -> None:
        """Every route that needs a token, but for a few, refuses them, and changes nothing."""
        self.require("all")
        routes = set(self.routes_with_a_token())
        self.assertLess(ALLOWED, routes)
        self.assertLess(20, len(routes))  # so that the search for them finds them
        before = stored()
        for name in ("ada", "bob", "admin"):
            with self.subTest(name):
                self.assertEqual(routes - ALLOWED, self.refused(name))
                for method, path in routes - ALLOWED:
                    if method == "GET":
                        answer = self.send("HEAD", path, self.tokens[name])
                        self.assertEqual(403, answer.status_code)
        self.assertEqual(before, stored())

    def test_no_route_otherwise(self) -> None:
        """No route refuses those who need none, or have one."""
        self.enrol()
        self.assertEqual(set(), self.refused("bob"))
        self.require("all")
        self.assertEqual(set(), self.refused("ada"))

    def test_open_users_api(self) -> None:
        """Where the users API is open it answers them as it answers a client without a token."""
        self.require("all")
        self.app.config["USERS_API_OPEN"] = True
        for path in ("/users", f"/users/{self.ids['bob']}"):
            anonymous = self.ok(self.get(path))
            self.assertEqual(anonymous, self.ok(self.get(path, self.tokens["admin"])))

    def test_way_in(self) -> None:
        """They log in, set an authenticator up, and are let in everywhere, with the same token."""
        self.require("all")
        pair = self.ok(self.log_in())
        self.assertEqual(["pwd"], claims_of(pair["auth_token"])["amr"])
        self.tokens["ada"] = pair["auth_token"]
        self.assertEqual((False, 0), self.state())

        self.enrol()

        self.assertEqual((True, 10), self.state())
        self.assert_in("ada")
        following = self.refresh(pair)
        self.assertEqual(["pwd", "otp"], claims_of(following["auth_token"])["amr"])
        self.assert_error(self.log_in(), errors.MfaRequired)
        self.tokens["ada"] = self.ok(self.log_in(code=self.code()))["auth_token"]
        self.assert_in("ada")

    def test_registration(self) -> None:
        """A new user gets tokens, with which they can set an authenticator up."""
        self.require("all")
        body = {"username": "new", "email": "new@test.com", "password": "test"}
        pair = self.ok(self.send("POST", "/auth/register", **body), 201)
        self.tokens["new"] = pair["auth_token"]

        self.assert_must_enrol("new")
        self.enrol("new")
        self.assert_in("new")

    def test_refresh(self) -> None:
        """A refresh works before, and the new token opens nothing more."""
        self.require("all")
        pair = self.ok(self.log_in())
        self.tokens["ada"] = self.refresh(pair)["auth_token"]

        self.assert_must_enrol("ada")
        self.enrol()
        self.assert_in("ada")

    def test_logout(self) -> None:
        """They can log out, of all sessions too."""
        self.require("all")
        self.ok(self.send("POST", "/auth/logout?scope=all", self.tokens["ada"]))

        self.assert_error(self.get("/auth/totp", self.tokens["ada"]), errors.SessionEnded)

    def test_begun_only(self) -> None:
        """An authenticator that is not confirmed does not suffice."""
        self.require("all")
        self.begin()
        self.assert_must_enrol("ada")
        self.assert_wrong(self.confirm(self.wrong_code()))
        self.assert_must_enrol("ada")

    def test_turning_off(self) -> None:
        """A user who turns it off can only set up another one."""
        self.require("all")
        self.enrol()
        self.ok(self.turn_off())

        self.assert_must_enrol("ada")
        self.enrol()
        self.assert_in("ada")

    def test_changes_of_the_setting(self) -> None:
        """The setting applies to sessions from before."""
        self.require("all")
        self.assert_must_enrol("ada")
        self.require("admins")
        self.assert_in("ada")

    def test_invalid_tokens(self) -> None:
        """A token that is no longer valid is refused as such, and so is none."""
        self.require("all")
        self.assert_error(self.get("/auth/status"), errors.TokenMissing)
        self.assert_error(self.get("/auth/status", "x"), errors.TokenInvalid)
        administration.set_active("ada@test.com", False, ORIGIN)
        db.session.commit()
        self.assert_error(self.get("/auth/status", self.tokens["ada"]), errors.TokenOfInactive)


class TestOtherServices(RequiredTestCase):
    """What other services see of such a user."""

    environment: ClassVar[dict[str, str]] = {"ISSUER": ISSUER}

    def setUp(self) -> None:
        """Add a client, and require a second factor of all users."""
        super().setUp()
        self.orders = basic("orders", clients.create("orders", ISSUER, [], ORIGIN))
        db.session.commit()
        self.require("all")

    def introspect(self, token: str) -> dict[str, Any]:
        """Return what the service tells another one of a token."""
        answer = self.client.post("/oauth/introspect", data={"token": token}, headers=self.orders)
        return dict(self.ok(answer))

    def verify(self, token: str) -> dict[str, Any]:
        """Return the claims of a token, verified as another service does."""
        keys = jwt.PyJWKSet.from_dict(self.ok(self.client.get("/.well-known/jwks.json")))
        key = keys[jwt.get_unverified_header(token)["kid"]]
        with mock.patch("jwt.api_jwt.datetime") as moment:
            moment.now.return_value = clock.utcnow()
            claims = jwt.decode(token, key, algorithms=["ES256"], audience=ISSUER, issuer=ISSUER)
        return dict(claims)

    def assert_for_this_service_alone(self, pair: Tokens) -> None:
        """Check that other services accept no token of a pair, and learn that none is active."""
        header = decode(pair["auth_token"].split(".")[0])
        self.assertEqual({"alg": "HS256", "typ": "JWT"}, header)
        with self.assertRaises(KeyError):  # it names no key
            self.verify(pair["auth_token"])
        keys = self.ok(self.client.get("/.well-known/jwks.json"))["keys"]
        for key in keys:
            with self.assertRaises(jwt.InvalidTokenError):
                jwt.decode(
                    pair["auth_token"], jwt.PyJWK(key), algorithms=["ES256"], audience=ISSUER
                )
        for token in (pair["auth_token"], pair["refresh_token"]):
            self.assertEqual({"active": False}, self.introspect(token))

    def assert_for_others(self, pair: Tokens, amr: list[str]) -> None:
        """Check that other services accept the token, with this `amr`."""
        self.assertEqual("at+jwt", decode(pair["auth_token"].split(".")[0])["typ"])
        self.assertEqual(amr, self.verify(pair["auth_token"])["amr"])
        for token in (pair["auth_token"], pair["refresh_token"]):
            answer = self.introspect(token)
            self.assertEqual((True, amr), (answer["active"], answer["amr"]))

    def test_before_and_after(self) -> None:
        """A token is for other services once the authenticator is on, from a refresh on."""
        pair = self.ok(self.log_in())
        self.assert_for_this_service_alone(pair)
        pair = self.refresh(pair)
        self.assert_for_this_service_alone(pair)

        self.tokens["ada"] = pair["auth_token"]
        self.enrol()

        self.assertEqual("JWT", decode(pair["auth_token"].split(".")[0])["typ"])
        self.assert_in("ada")
        self.assert_for_others(self.refresh(pair), ["pwd", "otp"])
        self.assert_for_others(self.ok(self.log_in(code=self.code())), ["pwd", "otp"])

    def test_registration(self) -> None:
        """The token of a registration is for this service alone."""
        body = {"username": "new", "email": "new@test.com", "password": "test"}

        self.assert_for_this_service_alone(
            self.ok(self.send("POST", "/auth/register", **body), 201)
        )

    def test_none_required(self) -> None:
        """Without the requirement tokens are for other services."""
        for whom in ("none", "admins"):
            self.require(whom)
            self.assert_for_others(self.ok(self.log_in()), ["pwd"])
        self.assert_for_this_service_alone(self.ok(self.log_in("admin")))

    def test_turning_off(self) -> None:
        """Once it is turned off introspection says inactive, and a refresh has the other kind."""
        self.enrol()
        pair = self.ok(self.log_in(code=self.code()))
        self.assert_for_others(pair, ["pwd", "otp"])
        self.ok(self.turn_off())

        for token in (pair["auth_token"], pair["refresh_token"]):
            self.assertEqual({"active": False}, self.introspect(token))
        self.assert_for_this_service_alone(self.refresh(pair))

    def test_new_admin(self) -> None:
        """A new admin who has to set one up gets no scope before."""
        self.require("admins")
        pair = self.ok(self.log_in())
        self.assert_for_others(pair, ["pwd"])
        self.store("ada", admin=True)

        for token in (pair["auth_token"], pair["refresh_token"]):
            self.assertEqual({"active": False}, self.introspect(token))
        pair = self.refresh(pair)
        self.assert_for_this_service_alone(pair)
        self.tokens["ada"] = pair["auth_token"]
        self.enrol()
        self.assertEqual("admin", self.verify(self.refresh(pair)["auth_token"])["scope"])

    def test_revocation(self) -> None:
        """Another service can still end such a session."""
        pair = self.ok(self.log_in())
        form = {"token": pair["auth_token"]}
        self.client.post("/oauth/revoke", data=form, headers=self.orders)

        self.assert_error(self.get("/auth/totp", pair["auth_token"]), errors.SessionEnded)
