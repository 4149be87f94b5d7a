"""Roles: admins set them with PATCH /users/<id>; other services find them in tokens."""

import hashlib
from typing import Any, ClassVar
from urllib.parse import urlencode

import orjson
from werkzeug.test import TestResponse

from project import db, errors
from project.accounts import clients
from project.tests.accounts.cases import AdministrationTestCase
from project.tests.api.oauth_case import FORM, INTROSPECT, ISSUER, basic
from project.tests.base import bearer
from project.tests.rows import ORIGIN, stored_events, stored_sessions
from project.tests.tokens.claims import claims_of

ROLES = ["orders.read", "orders.write"]
A_LIST = "should be a valid list"
A_STRING = "must be a string"
WORDS = (
    "must be different words of at most 31 characters of a-z, 0-9 and _.:- that begin with a letter"
)


class RolesTestCase(AdministrationTestCase):
    """A test with two users and an admin, of whom none has roles; the users API is closed."""

    settings: ClassVar[dict[str, Any]] = {
        "TOKEN_EXPIRATION_SECONDS": 3_600,
        "USERS_API_OPEN": False,
    }

    def shown(self, name: str) -> list[dict[str, Any]]:
        """Return a user as everything that shows all of them does, to an admin or to them."""
        path, admin = f"/users/{self.ids[name]}", self.tokens["admin"]
        lists = [f"/users?{query}" for query in ("", f"query={name}@", f"ids={self.ids[name]}")]
        users = [
            self.get(path, admin).get_json()["data"],
            self.get("/auth/status", self.tokens[name]).get_json()["data"],
        ]
        for listed in lists:
            page = self.get(listed, admin).get_json()["data"]["users"]
            users += [user for user in page if user["id"] == self.ids[name]]
        self.assertEqual([self.ids[name]] * 5, [user["id"] for user in users])
        return users

    def added(self) -> list[dict[str, Any]]:
        """Register a user and add another one; return both as the responses show them."""
        users = []
        for name, path in (("new", "/auth/register"), ("more", "/users")):
            body = {"username": name, "email": f"{name}@test.com", "password": "test"}
            headers = bearer(self.tokens["admin"])
            response = self.client.post(path, json=body, headers=headers)
            self.assertEqual(201, response.status_code)
            users.append(response.get_json()["data"])
        return users

    def assert_shown(self, name: str, roles: list[str] | None) -> None:
        """Check that everything that shows a user has these roles, or none does if it is None."""
        self.assertEqual([roles] * 5, [user.get("roles") for user in self.shown(name)])
        self.assertEqual([roles is not None] * 5, ["roles" in user for user in self.shown(name)])


class TestRoles(RolesTestCase):
    """An admin sets all roles of a user at once."""

    def test_set(self) -> None:
        """Roles are shown in alphabetical order, and at the next request."""
        for roles in (
            ROLES,
            ["x"],
            [f"{letter * 31}" for letter in "abcdefghijklmnop"],
        ):
            with self.subTest(roles):
                response = self.patch("ada", roles=roles)

                self.assertEqual(200, response.status_code, response.get_data(as_text=True))
                self.assertEqual(roles, response.get_json()["data"]["roles"])
                self.assert_shown("ada", roles)
                self.assertEqual(roles, self.stored(self.ids["ada"])["roles"])
                self.assert_shown("bob", None)

    def test_order(self) -> None:
        """The same roles in another order are no change."""
        self.patch("ada", roles=ROLES)
        with self.assert_nothing_changes():
            response = self.patch("ada", roles=ROLES[::-1])

        self.assertEqual(ROLES, response.get_json()["data"]["roles"])
        kinds = [event["kind"] for event in stored_events()]
        self.assertEqual(1, kinds.count("roles_changed"))

    def test_kept(self) -> None:
        """Other changes keep the roles; an empty list removes them."""
        self.patch("ada", roles=ROLES)
        self.assertEqual(ROLES, self.patch("ada", username="ADA").get_json()["data"]["roles"])
        self.assert_shown("ada", ROLES)

        self.assertNotIn("roles", self.patch("ada", roles=[]).get_json()["data"])
        self.assert_shown("ada", None)

    def test_admin(self) -> None:
        """An admin has the role `admin` before all others, and as long as they are an admin."""
        response = self.patch("ada", roles=ROLES, admin=True)

        self.assertEqual(["admin", *ROLES], response.get_json()["data"]["roles"])
        self.assert_shown("ada", ["admin", *ROLES])
        self.assertEqual(ROLES, self.stored(self.ids["ada"])["roles"])
        self.assertEqual(ROLES, self.patch("ada", admin=False).get_json()["data"]["roles"])
        self.assert_shown("ada", ROLES)

    def test_others(self) -> None:
        """Who is no admin sees nobody's roles under /users, and their own in /auth/status."""
        self.patch("ada", roles=ROLES)
        path, token = f"/users/{self.ids['ada']}", self.tokens["ada"]
        public = [self.get(path, token).get_json()["data"]]
        self.app.config["USERS_API_OPEN"] = True
        for query in ("", "?query=ada", f"?ids={self.ids['ada']}"):
            public += self.get(f"/users{query}", token).get_json()["data"]["users"]
        for user in public:
            self.assertEqual({"id", "username", "email", "created_at"}, set(user))

    def test_refused(self) -> None:
        """Invalid roles are refused, with a reason for the field `roles`, and change nothing."""
        for roles, reason in (
            (None, A_LIST),
            ("orders", A_LIST),
            ({"orders": True}, A_LIST),
            (1, A_LIST),
            ([1], A_STRING),
            (["orders", None, ["x"]], A_STRING),
            (["admin"], "must not have admin, which is set with the member admin"),
            (["orders", "admin"], "must not have admin, which is set with the member admin"),
            ([f"role{number}" for number in range(17)], "must have at most 16 words"),
            (["orders", "orders"], WORDS),
            (["x" * 32], WORDS),
            *(
                ([word], WORDS)
                for word in (
                    "", " ", "Orders", "1st", "_x", "a b", "a,b", "a/b", "a\n", "\na", "a\0",
                    "a\t", 'a"', "a\\", "\u00e9", "a\u00e9", "\uff41", "ADMIN",
                )
            ),
        ):  # fmt: skip
            with self.subTest(roles), self.assert_nothing_changes():
                response = self.patch("ada", roles=roles)

                data = self.assert_error(response, errors.InvalidPayload)
                self.assertEqual({"roles": reason}, data["errors"])

    def test_permission(self) -> None:
        """Who is no admin can set no roles, neither another user's nor their own."""
        for name, body in (
            ("bob", {"roles": ROLES}),
            ("ada", {"roles": ROLES, "current_password": "test"}),
            ("ada", {"roles": [], "username": "new", "current_password": "test"}),
        ):
            with self.subTest(name, body=body), self.assert_nothing_changes():
                self.assert_error(self.patch(name, "ada", **body), errors.PermissionDenied)

    def test_own_account(self) -> None:
        """An admin needs the password for their own roles, the only admin too."""
        with self.assert_nothing_changes():
            data = self.assert_error(self.patch("admin", roles=ROLES), errors.InvalidPayload)
            self.assertEqual({"current_password": "is required"}, data["errors"])
            wrong = self.patch("admin", roles=ROLES, current_password="wrong")
            self.assert_error(wrong, errors.WrongPassword)

        response = self.change_self("admin", roles=ROLES)

        self.assertEqual(["admin", *ROLES], response.get_json()["data"]["roles"])
        self.assert_shown("admin", ["admin", *ROLES])
        with self.assert_nothing_changes():
            refused = self.change_self("admin", roles=[], admin=False)
            self.assert_error(refused, errors.LastAdmin)

    def test_sessions_live_on(self) -> None:
        """A change of roles ends no session."""
        before = stored_sessions()

        self.patch("ada", roles=ROLES)
        self.patch("ada", roles=[])

        self.assertEqual(before, stored_sessions())
        self.assertEqual(200, self.get("/auth/status", self.tokens["ada"]).status_code)

    def test_events(self) -> None:
        """Each change is an event with the roles that the user has now; no change is none."""
        for roles in (ROLES, ROLES[:1], []):
            self.patch("ada", roles=roles)
            self.assertEqual(("roles_changed", {"roles": " ".join(roles)}), *self.events())
            newest, before = stored_events()[-1], stored_events()
            self.assertEqual(self.ids["ada"], newest["user_id"])
            self.assertEqual(self.ids["admin"], newest["actor_id"])

            self.assertEqual(200, self.patch("ada", roles=roles).status_code)
            self.assertEqual(before, stored_events())

    def test_events_of_several_changes(self) -> None:
        """Roles that change with other privileges are an event of their own, without `admin`."""
        body: dict[str, Any] = {"username": "x", "admin": True, "roles": ["orders"]}
        self.patch("ada", **body)

        kinds = ["user_changed", "admin_granted", "roles_changed"]
        details: list[Any] = [{"fields": "username"}, {}, {"roles": "orders"}]
        self.assertEqual(list(zip(kinds, details, strict=True)), self.events(3))


class TestVersions(RolesTestCase):
    """The ETag that admins see is a version of the roles too."""

    def version(self, caller: str = "admin") -> str:
        """Return the ETag of Ada, as a user sees her."""
        response = self.get(f"/users/{self.ids['ada']}", self.tokens[caller])
        return str(response.headers["ETag"])

    def patch_if(self, version: str, **body: Any) -> TestResponse:
        """Return the response to a change of Ada by the admin, with this If-Match."""
        headers = bearer(self.tokens["admin"]) | {"If-Match": version}
        return self.client.patch(f"/users/{self.ids['ada']}", json=body, headers=headers)

    def test_changed_roles(self) -> None:
        """A change of roles changes the ETag, and If-Match refuses the one from before."""
        versions = [self.version()]
        for roles in (ROLES, ROLES[:1], ["orders.read.orders.write"]):
            changed = self.patch_if(versions[-1], roles=roles)

            self.assertEqual(200, changed.status_code)
            self.assertEqual(self.version(), changed.headers["ETag"])
            refused = self.patch_if(versions[-1], username="x")
            self.assert_error(refused, errors.PreconditionFailed)
            versions.append(self.version())
        self.assertEqual(4, len(set(versions)))

        self.patch("ada", roles=[])
        self.assertEqual(versions[0], self.version())

    def test_not_seen(self) -> None:
        """The ETag of a user who sees no roles does not change with them."""
        before = self.version("ada")
        self.patch("ada", roles=ROLES)

        self.assertEqual(before, self.version("ada"))

    def test_without_roles(self) -> None:
        """The ETag of a user without roles is that of versions of the service without roles."""
        row = self.stored(self.ids["ada"])
        names = "id", "username", "email", "created_at", "active", "admin"
        values = orjson.dumps([str(row[name]) for name in names])

        self.assertEqual(f'"{hashlib.sha256(values).hexdigest()[:32]}"', self.version())


class TestVersionsWithIssuer(TestVersions):
    """ISSUER changes no ETag."""

    environment: ClassVar[dict[str, str]] = {"ISSUER": ISSUER}


class TestWithoutIssuer(RolesTestCase):
    """Without ISSUER and roles, clients get what they got before there were roles."""

    def test_nothing_shown(self) -> None:
        """No response has the member `roles`, also of an admin."""
        self.assert_shown("ada", None)
        self.assert_shown("admin", None)
        self.assertNotIn("roles", self.patch("ada", username="ADA", roles=[]).get_json()["data"])
        for added in self.added():
            self.assertNotIn("roles", added)

    def test_bytes(self) -> None:
        """The responses about a user have the same bytes as before there were roles."""
        row = self.stored(self.ids["ada"])
        moment = row["created_at"].strftime("%Y-%m-%dT%H:%M:%SZ")
        start = f'"id":{row["id"]},"username":"ada","email":"ada@test.com",'
        flags = '"active":true,"admin":false'
        in_directory = f'{{{start}"created_at":"{moment}",{flags}}}'
        of_caller = f'{{{start}{flags},"created_at":"{moment}"}}'
        one = '{{"status":"success","data":{}}}'
        page = one.format(f'{{"users":[{in_directory}],"next":null}}')
        user_id, admin = self.ids["ada"], self.tokens["admin"]
        for response, expected in (
            (self.get(f"/users/{user_id}", admin), one.format(in_directory)),
            (self.get("/users?query=ada", admin), page),
            (self.get(f"/users?ids={user_id}", admin), page),
            (self.get("/auth/status", self.tokens["ada"]), one.format(of_caller)),
            (
                self.patch("ada", admin=False),
                f'{{"status":"success","message":"User changed.","data":{of_caller}}}',
            ),
        ):
            self.assertEqual(expected, response.get_data(as_text=True).strip())

    def test_tokens(self) -> None:
        """A token has no roles, also of a user who has some."""
        self.patch("ada", roles=ROLES)

        token = self.login("ada@test.com").get_json()["auth_token"]

        self.assertEqual({"exp", "iat", "sub", "sid", "amr"}, set(claims_of(token)))


class TestIssuer(RolesTestCase):
    """With ISSUER, roles are the `scope` of tokens for other services."""

    environment: ClassVar[dict[str, str]] = {"ISSUER": ISSUER}

    def log_in(self) -> dict[str, Any]:
        """Log Ada in, and return the token pair."""
        pair: dict[str, Any] = self.login("ada@test.com").get_json()
        return pair

    def refresh(self, pair: dict[str, Any]) -> dict[str, Any]:
        """Return the next token pair."""
        body = {"refresh_token": pair["refresh_token"]}
        response = self.client.post("/auth/refresh", json=body)
        self.assertEqual(200, response.status_code)
        following: dict[str, Any] = response.get_json()
        return following

    def assert_scope(self, pair: dict[str, Any], scope: str | None) -> None:
        """Check the scope of an auth token; None is no such claim."""
        claims = claims_of(pair["auth_token"])
        self.assertEqual((scope, scope is not None), (claims.get("scope"), "scope" in claims))

    def introspected(self, credentials: dict[str, str], token: str) -> dict[str, Any]:
        """Return what the service tells a client of a token."""
        form = urlencode({"token": token})
        response = self.client.post(INTROSPECT, data=form, content_type=FORM, headers=credentials)
        answer: dict[str, Any] = response.get_json()
        self.assertTrue(answer["active"])
        return answer

    def test_shown(self) -> None:
        """Every response with a full user has roles, also of a user who has none."""
        self.assert_shown("ada", [])
        self.assert_shown("admin", ["admin"])
        self.assertEqual([], self.patch("ada", username="ADA").get_json()["data"]["roles"])
        for added in self.added():
            self.assertEqual([], added["roles"])

    def test_not_shown(self) -> None:
        """Who is no admin sees no roles under /users."""
        path = f"/users/{self.ids['ada']}"
        self.assertNotIn("roles", self.get(path, self.tokens["ada"]).get_json()["data"])
        self.app.config["USERS_API_OPEN"] = True
        for user in self.get("/users").get_json()["data"]["users"]:
            self.assertNotIn("roles", user)

    def test_scope(self) -> None:
        """The scope of a token has the roles with spaces between, and `admin` first."""
        self.assert_scope(self.log_in(), None)
        self.patch("ada", roles=ROLES)
        self.assert_scope(self.log_in(), "orders.read orders.write")
        self.patch("ada", admin=True)
        self.assert_scope(self.log_in(), "admin orders.read orders.write")
        self.patch("ada", roles=[])
        self.assert_scope(self.log_in(), "admin")
        self.patch("ada", admin=False)
        self.assert_scope(self.log_in(), None)

    def test_refresh(self) -> None:
        """Changed roles are in the token of the next refresh; the response to a repeat has them."""
        self.patch("ada", roles=ROLES)
        first = self.log_in()
        self.patch("ada", roles=["orders.read"])
        self.assert_scope(first, "orders.read orders.write")

        second = self.refresh(first)
        self.assert_scope(second, "orders.read")

        self.patch("ada", roles=[])
        self.assert_scope(self.refresh(first), None)
        third = self.refresh(second)
        self.assert_scope(third, None)
        self.patch("ada", admin=True)
        self.assert_scope(self.refresh(third), "admin")

    def test_at_once(self) -> None:
        """/auth/status and introspection have changed roles at once, whatever the token says."""
        credentials = basic("orders", clients.create("orders", ISSUER, [], ORIGIN))
        db.session.commit()
        pair = self.log_in()
        self.tokens["ada"] = pair["auth_token"]
        for roles in (ROLES, ["orders.read"], []):
            with self.subTest(roles):
                self.patch("ada", roles=roles)

                self.assert_shown("ada", roles)
                for name in ("auth_token", "refresh_token"):
                    answer = self.introspected(credentials, pair[name])
                    self.assertEqual(roles, answer.get("scope", "").split())
                    self.assertEqual(bool(roles), "scope" in answer)
        self.assert_scope(pair, None)
