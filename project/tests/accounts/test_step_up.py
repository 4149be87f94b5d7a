"""Step-up: the code that changes of an account need from a user with a second factor."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from sqlalchemy import delete, insert, update
from werkzeug.test import TestResponse

from project import db, errors
from project.accounts.second_factor import Method
from project.api import openapi
from project.models import Session, User
from project.tests.accounts.mail_case import MAIL_SETTINGS, send_mail
from project.tests.accounts.second_factor_case import (
    NO_RECOVERY_CODE,
    STEP,
    SecondFactorTestCase,
    counted,
    stored,
)
from project.tests.base import bearer
from project.tests.rows import start_session, stored_users
from project.tests.tokens.claims import session_of

LONG = 3_000  # seconds, after which no session needs no code
DATA = ("users", "recovery_codes", "mails")  # tables; each act changes one of them
COUNTS = ("throttles", "known_addresses")  # tables of the rate limits


class Act(NamedTuple):
    """A request that needs a code."""

    method: str
    path: str
    body: dict[str, Any]
    status: int = 200
    refused: str = "user_change_refused"  # the kind of event of a refusal


PASSWORD = {"current_password": "test"}
# `{own}` and `{other}` are the IDs of the caller and of another user.
OWN_ACTS = {
    "password": Act(
        "POST",
        "/auth/password",
        PASSWORD | {"new_password": "another"},
        refused="password_change_refused",
    ),
    "email": Act("POST", "/auth/email", PASSWORD | {"email": "new@test.com"}, 202),
    "email by ID": Act("PATCH", "/users/{own}", PASSWORD | {"email": "new@test.com"}, 202),
    "username": Act("PATCH", "/users/{own}", PASSWORD | {"username": "new"}),
    "account": Act("DELETE", "/auth/account", PASSWORD, refused="deletion_refused"),
    "turn off": Act("DELETE", "/auth/totp", PASSWORD, refused="totp_refused"),
    "recovery codes": Act("POST", "/auth/recovery_codes", PASSWORD, refused="totp_refused"),
}
ADMIN_ACTS = {
    "rename": Act("PATCH", "/users/{other}", {"username": "new"}),
    "give an email": Act("PATCH", "/users/{other}", {"email": "new@test.com"}),
    "deactivate": Act("PATCH", "/users/{other}", {"active": False}),
    "make an admin": Act("PATCH", "/users/{other}", {"admin": True}),
    "give roles": Act("PATCH", "/users/{other}", {"roles": ["buyer"]}),
    "delete": Act("DELETE", "/users/{other}", {}, refused="deletion_refused"),
    "reset": Act("DELETE", "/users/{other}/totp", {}, refused="totp_refused"),
}
OWN_ADMIN_ACTS = {
    "own roles": Act("PATCH", "/users/{own}", PASSWORD | {"roles": ["buyer"]}),
    "own rights": Act("PATCH", "/users/{own}", PASSWORD | {"admin": False}),
    "deactivate themselves": Act("PATCH", "/users/{own}", PASSWORD | {"active": False}),
}


class StepUpTestCase(SecondFactorTestCase):
    """A test with users and admins who have an authenticator, and have given no code for long."""

    settings: ClassVar[dict[str, Any]] = (
        SecondFactorTestCase.settings | MAIL_SETTINGS | {"RATE_LIMITS": True}
    )

    def setUp(self) -> None:
        """Add the admins, and set the authenticators up."""
        super().setUp()
        self.app.config["TOKEN_EXPIRATION_SECONDS"] = 86_400
        self.add("admin", admin=True)
        self.add("second", admin=True)
        for name in ("ada", "bob", "admin"):
            self.tokens[name] = self.new_session(name)
            self.enrol(name)
        self.move_clock(LONG)
        send_mail(self.app)

    def new_session(self, name: str) -> str:
        """Return the token of a new session of a user, which has given no code."""
        user = db.session.get_one(User, self.ids[name])
        token = start_session(user, Method.TOTP if user.mfa_enabled else None).auth_token
        this_one = Session.id == session_of(token)
        db.session.execute(update(Session).where(this_one).values(code_given_at=None))
        db.session.commit()
        return token

    def do(self, act: Act, caller: str = "ada", /, **body: object) -> TestResponse:
        """Return the response to an act, with more members in its body."""
        path = act.path.format(own=self.ids[caller], other=self.ids["bob"])
        return self.send(act.method, path, self.tokens[caller], **act.body | body)

    def assert_nothing_counted(self) -> None:
        """Check that no password and no code is counted now."""
        counts = [key for key in counted() if key.startswith(("code:", "login:"))]
        self.assertEqual([], counts)

    def with_code(self, act: Act, caller: str, **body: object) -> Callable[[str], TestResponse]:
        """Return a function that does an act with a code."""
        return lambda code: self.do(act, caller, code=code, **body)

    def for_each_act(self, check: Callable[[Act, str], None]) -> None:
        """Call `check` with each act and the name of its caller, each on the same database."""
        acts = [(name, act, "ada") for name, act in OWN_ACTS.items()]
        acts += [(name, act, "admin") for name, act in (ADMIN_ACTS | OWN_ADMIN_ACTS).items()]
        before, tokens = stored(), dict(self.tokens)
        for name, act, caller in acts:
            with self.subTest(name):
                check(act, caller)
            restore(before)
            self.tokens = dict(tokens)


def restore(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Give every table the rows that `stored` has returned."""
    db.session.rollback()
    tables = db.metadata.sorted_tables
    for table in reversed(tables):
        db.session.execute(delete(table))
    for table in tables:
        if rows[table.name]:
            db.session.execute(insert(table), rows[table.name])
    db.session.commit()


class TestEachAct(StepUpTestCase):
    """What each of the acts needs."""

    def test_without_a_code(self) -> None:
        """Without a code nothing happens, and nothing is counted, also with a wrong password."""

        def check(act: Act, caller: str) -> None:
            before = stored()
            for password in ("test", "wrong"):
                body = {"current_password": password} if "current_password" in act.body else {}
                data = self.assert_error(self.do(act, caller, **body), errors.StepUpRequired)
                self.assertNotIn("mfa_token", data)
                self.assertEqual(before, stored())

        self.for_each_act(check)

    def test_with_a_wrong_code(self) -> None:
        """With a wrong code nothing happens but the event of the refusal and the counts."""

        def check(act: Act, caller: str) -> None:
            before = stored("events", *COUNTS)
            for code in (self.wrong_code(caller), NO_RECOVERY_CODE):
                self.assert_wrong(self.do(act, caller, code=code))
                about = "bob" if "{other}" in act.path else caller
                refusal = (act.refused, {"why": "wrong_code", "pause": 0})
                self.assertEqual(refusal, self.events(about)[-1])
            self.assertEqual(before, stored("events", *COUNTS))
            self.assert_error(self.do(act, caller), errors.StepUpRequired)

        self.for_each_act(check)

    def test_with_an_ill_formed_code(self) -> None:
        """What has not the form of a code is an invalid payload."""

        def check(act: Act, caller: str) -> None:
            before = stored()
            for code in ("", "12345", 123456, None):
                self.assert_ill_formed(self.do(act, caller, code=code))
            self.assertEqual(before, stored())

        self.for_each_act(check)

    def test_with_the_code(self) -> None:
        """With the right code it is done, and the counts are given back."""

        def check(act: Act, caller: str) -> None:
            code = self.code(caller)
            self.assert_wrong(self.do(act, caller, code=self.wrong_code(caller)))
            before = stored()

            self.ok(self.do(act, caller, code=code), act.status)

            after = stored()
            changed = [name for name in DATA if before[name] != after[name]]
            self.assertNotEqual([], changed)
            self.assert_nothing_counted()

        self.for_each_act(check)

    def test_with_a_recovery_code(self) -> None:
        """A recovery code does as well."""

        def check(act: Act, caller: str) -> None:
            self.ok(self.do(act, caller, code=self.recovery_codes[caller][0]), act.status)

        self.for_each_act(check)

    def test_right_after_a_code(self) -> None:
        """A session that has just given a code needs none, but still the password."""

        def check(act: Act, caller: str) -> None:
            pair = self.ok(self.log_in(caller, code=self.code(caller)))
            self.tokens[caller] = pair["auth_token"]
            if "current_password" in act.body:
                answer = self.do(act, caller, current_password="wrong")
                self.assert_error(answer, errors.WrongPassword)

            self.ok(self.do(act, caller), act.status)

        self.for_each_act(check)

    def test_wrong_code_right_after_a_code(self) -> None:
        """A code that is sent has to be right, also where none is needed."""

        def check(act: Act, caller: str) -> None:
            pair = self.ok(self.log_in(caller, code=self.code(caller)))
            self.tokens[caller] = pair["auth_token"]
            before = stored("events", *COUNTS)

            self.assert_wrong(self.do(act, caller, code=self.code(caller)))

            self.assertEqual(before, stored("events", *COUNTS))

        self.for_each_act(check)

    def test_without_a_second_factor(self) -> None:
        """A user without a second factor needs no code, and one that they send is ignored."""

        def check(act: Act, caller: str) -> None:
            self.ok(self.do(OWN_ACTS["turn off"], caller, code=self.code(caller)))
            self.tokens[caller] = self.new_session(caller)
            if act.path in {"/auth/totp", "/auth/recovery_codes"}:
                self.assert_error(self.do(act, caller), errors.TotpNotFound)
                return
            body = {} if caller == "ada" else {"code": NO_RECOVERY_CODE}

            self.ok(self.do(act, caller, **body), act.status)

        self.for_each_act(check)

    def test_no_act_is_missing(self) -> None:
        """Every route that takes the password takes a code, but for the one that begins."""
        described = openapi.describe(self.app)
        schemas = described["components"]["schemas"]
        with_password, with_code = set(), set()
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                content = operation.get("requestBody", {}).get("content", {})
                reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
                members = schemas.get(reference.rpartition("/")[2], {}).get("properties", {})
                if "current_password" in members:
                    with_password.add((method.upper(), path))
                if "code" in members:
                    with_code.add((method.upper(), path))
        acts = [*OWN_ACTS.values(), *ADMIN_ACTS.values(), *OWN_ADMIN_ACTS.values()]
        tried = {(act.method, act.path.format(own="{user_id}", other="{user_id}")) for act in acts}

        self.assertEqual({("POST", "/auth/totp")}, with_password - with_code)
        others = {"/auth/login", "/auth/login/mfa", "/auth/totp/confirm"}
        self.assertEqual(
            tried, {(method, path) for method, path in with_code if path not in others}
        )


class TestInterval(StepUpTestCase):
    """STEP_UP_SECONDS."""

    def rename(self, caller: str = "ada", /, **body: object) -> TestResponse:
        """Return the response to a user who changes their username."""
        return self.do(OWN_ACTS["username"], caller, **body)

    def deactivate(self, **body: object) -> TestResponse:
        """Return the response to an admin who deactivates a user."""
        return self.do(ADMIN_ACTS["deactivate"], "admin", **body)

    def test_after_a_login(self) -> None:
        """For 300 seconds after a login with a code a session needs no other one."""
        for name, act in (("ada", self.rename), ("admin", self.deactivate)):
            with self.subTest(name):
                pair = self.ok(self.log_in(name, code=self.code(name)))
                self.tokens[name] = pair["auth_token"]
                self.ok(act())
                self.move_clock(299)
                self.ok(act())
                self.move_clock(1)
                self.assert_error(act(), errors.StepUpRequired)

    def test_after_a_code(self) -> None:
        """So it is after a code that is given for an act, and a later code prolongs it."""
        self.ok(self.rename(code=self.code()))
        self.move_clock(299)
        self.ok(self.rename())
        self.ok(self.do(OWN_ACTS["recovery codes"], code=self.code()))
        self.move_clock(299)
        self.ok(self.rename())
        self.move_clock(1)
        self.assert_error(self.rename(), errors.StepUpRequired)

    def test_after_enrolment(self) -> None:
        """And after the code that turns an authenticator on."""
        self.ok(self.do(OWN_ACTS["turn off"], code=self.code()))
        self.move_clock(LONG)
        self.enrol()
        self.ok(self.rename())
        self.move_clock(300 - STEP)
        self.assert_error(self.rename(), errors.StepUpRequired)

    def test_without_use(self) -> None:
        """An act without a code does not prolong it, and neither do a refresh or a wrong code."""
        pair = self.ok(self.log_in(code=self.code()))
        self.move_clock(200)
        self.tokens["ada"] = self.refresh(pair)["auth_token"]
        self.ok(self.rename())
        self.assert_wrong(self.rename(code=self.wrong_code()))
        self.move_clock(100)

        self.assert_error(self.rename(), errors.StepUpRequired)

    def test_other_sessions(self) -> None:
        """Another session of the user, and of another user, still needs a code."""
        first, self.tokens["ada"] = self.tokens["ada"], self.new_session("ada")
        self.ok(self.rename(code=self.code()))
        self.ok(self.rename())

        self.tokens["ada"] = first
        self.assert_error(self.rename(), errors.StepUpRequired)
        self.assert_error(self.rename("bob"), errors.StepUpRequired)

    def test_login_elsewhere(self) -> None:
        """A login with a code does not step the other sessions up."""
        self.ok(self.log_in(code=self.code()))

        self.assert_error(self.rename(), errors.StepUpRequired)

    def test_other_interval(self) -> None:
        """The operator can choose another interval."""
        self.app.config["STEP_UP_SECONDS"] = 10
        self.ok(self.rename(code=self.code()))
        self.move_clock(9)
        self.ok(self.rename())
        self.move_clock(1)
        self.assert_error(self.rename(), errors.StepUpRequired)

    def test_always(self) -> None:
        """With 0 every act needs a code of its own."""
        self.app.config["STEP_UP_SECONDS"] = 0
        pair = self.ok(self.log_in(code=self.code()))
        self.tokens["ada"] = pair["auth_token"]
        self.assert_error(self.rename(), errors.StepUpRequired)
        self.assert_wrong(self.rename(code=self.code()))

        self.ok(self.rename(code=self.next_code()))

        self.assert_error(self.rename(), errors.StepUpRequired)
        self.assert_error(self.deactivate(), errors.StepUpRequired)
        self.ok(self.deactivate(code=self.code("admin")))
        self.assert_error(self.deactivate(), errors.StepUpRequired)

    def test_clock_of_another_server(self) -> None:
        """A code that another server has seen a moment in the future counts."""
        self.ok(self.rename(code=self.code()))
        self.move_clock(-1)

        self.ok(self.rename())


class TestOtherAccounts(StepUpTestCase):
    """Whose code is asked for."""

    def test_code_of_the_other_user(self) -> None:
        """An admin gives a code of their own, not one of the user whom they change."""
        act = ADMIN_ACTS["rename"]
        self.assert_wrong(self.do(act, "admin", code=self.code("bob")))
        self.assert_wrong(self.do(act, "admin", code=self.recovery_codes["bob"][0]))

        self.ok(self.do(act, "admin", code=self.code("admin")))

        self.ok(self.log_in("bob", code=self.code("bob")))

    def test_events(self) -> None:
        """The code is recorded with the admin's account, the act with the other one."""
        before = self.events("bob")
        self.ok(self.do(ADMIN_ACTS["rename"], "admin", code=self.recovery_codes["admin"][0]))

        expected = [("recovery_code_used", {}), ("code_given", {"method": "rc"})]
        self.assertEqual(expected, self.events("admin")[-2:])
        self.assertEqual([*before, ("user_changed", {"fields": "username"})], self.events("bob"))
        self.assertEqual(["recovery_code_used"], self.notices("admin"))

    def test_admin_without_a_second_factor(self) -> None:
        """An admin without a second factor needs no code, even if the other user has one."""
        self.ok(self.do(ADMIN_ACTS["rename"], "second"))
        self.ok(self.do(ADMIN_ACTS["reset"], "second"))

    def test_user_without_a_second_factor(self) -> None:
        """An admin with one needs a code also for a user without one."""
        act = ADMIN_ACTS["rename"]
        self.ok(self.do(ADMIN_ACTS["reset"], "second"))

        self.assert_error(self.do(act, "admin"), errors.StepUpRequired)

    def test_own_account_by_id(self) -> None:
        """An admin cannot turn the own authenticator off by ID, whatever the code."""
        self.tokens["admin"] = self.ok(self.log_in("admin", code=self.code("admin")))["auth_token"]
        before = stored()
        for path, error in (("/totp", errors.OwnTotp), ("", errors.OwnAccount)):
            for body in ({}, {"code": self.next_code("admin")}):
                path_of_own = f"/users/{self.ids['admin']}{path}"
                answer = self.send("DELETE", path_of_own, self.tokens["admin"], **body)

                data = answer.get_json()
                self.assertEqual((400, "fail"), (answer.status_code, data["status"]))
                self.assertEqual((error.message, "own_account"), (data["message"], data["code"]))
        self.assertEqual(before, stored())
        message = "Please turn your own authenticator off with DELETE /auth/totp."
        self.assertEqual(message, errors.OwnTotp.message)

    def test_body_of_a_delete(self) -> None:
        """An admin's DELETE takes a body, an empty object too, and works without one."""
        paths = [f"/users/{self.ids['bob']}/totp", f"/users/{self.ids['bob']}"]
        headers = bearer(self.tokens["second"])
        client = self.app.test_client()
        for path in paths:
            for data in (b"x", b"[]", b"null", b'"x"'):
                with self.subTest(data=data, path=path):
                    answer = client.delete(
                        path, data=data, headers=headers, content_type="application/json"
                    )
                    self.assert_error(answer, errors.InvalidPayload)
        self.ok(client.delete(paths[0], json={}, headers=headers))
        self.ok(client.delete(paths[1], headers=headers))


class TestRefusedActs(StepUpTestCase):
    """Acts that are refused for another reason after the right password and the right code."""

    def assert_refused(
        self, error: type[errors.ServiceError], act: Callable[[str], TestResponse], caller: str
    ) -> None:
        """Check that the act is refused with a right code, which is used up and not counted."""
        with_code = self.code(caller)
        self.assert_wrong(act(self.wrong_code(caller)))
        before = stored("events", "sessions", *COUNTS)
        last_steps = [row["last_step"] for row in before["totp_factors"]]

        self.assert_error(act(with_code), error)

        after = stored("events", "sessions", *COUNTS)
        self.assertNotEqual(last_steps, [row["last_step"] for row in after["totp_factors"]])
        for tables in (before, after):
            del tables["totp_factors"]
        self.assertEqual(before, after)
        self.assert_nothing_counted()
        (session,) = [
            row for row in stored()["sessions"] if row["id"] == session_of(self.tokens[caller])
        ]
        self.assertEqual(["pwd", "otp"], session["amr"])
        self.assertIsNotNone(session["code_given_at"])
        self.assert_wrong(self.log_in(caller, code=with_code))

    def test_last_admin(self) -> None:
        """The last admin cannot go, be deactivated or be demoted."""
        self.ok(self.send("DELETE", f"/users/{self.ids['admin']}", self.tokens["second"]))
        self.enrol("second")
        for act in (
            OWN_ADMIN_ACTS["own rights"],
            OWN_ADMIN_ACTS["deactivate themselves"],
            OWN_ACTS["account"],
        ):
            with self.subTest(act):
                self.move_clock(LONG)
                self.assert_refused(errors.LastAdmin, self.with_code(act, "second"), "second")

    def test_taken_email(self) -> None:
        """An email that is taken."""
        act = self.with_code(ADMIN_ACTS["rename"], "admin", email="ada@test.com")

        self.assert_refused(errors.EmailExists, act, "admin")

    def test_taken_username(self) -> None:
        """A username that is taken."""
        act = self.with_code(OWN_ACTS["username"], "ada", username="BOB")

        self.assert_refused(errors.InvalidPayload, act, "ada")

    def test_precondition(self) -> None:
        """A user who has changed in the meantime."""
        path, headers = f"/users/{self.ids['bob']}", bearer(self.tokens["admin"])

        def rename(code: str) -> TestResponse:
            return self.app.test_client().patch(
                path,
                json={"username": "new", "code": code},
                headers=headers | {"If-Match": '"other"'},
            )

        self.assert_refused(errors.PreconditionFailed, rename, "admin")

    def test_no_authenticator(self) -> None:
        """A reset of a user who has no authenticator."""
        self.ok(self.do(ADMIN_ACTS["reset"], "second"))

        act = self.with_code(ADMIN_ACTS["reset"], "admin")
        self.assert_refused(errors.TotpNotFound, act, "admin")

    def test_unknown_user(self) -> None:
        """A user who has been deleted in the meantime: the code is not counted as a wrong one."""
        self.ok(self.send("DELETE", f"/users/{self.ids['bob']}", self.tokens["second"]))
        for act in ADMIN_ACTS.values():
            answer = self.do(act, "admin", code=self.next_code("admin"))
            self.assert_error(answer, errors.UserNotFound)

        self.ok(self.log_in("admin", code=self.next_code("admin")))

    def test_refused_before(self) -> None:
        """What is refused before the code is looked at does not use it up."""
        config = self.app.config
        config["PASSWORD_MIN_LENGTH"] = 12
        before = stored()
        for act, body, error in (
            (OWN_ACTS["password"], {"new_password": "short"}, errors.InvalidPayload),
            (OWN_ACTS["username"], {"admin": True}, errors.PermissionDenied),
            (OWN_ACTS["email"], {"email": "ada@test.com"}, errors.InvalidPayload),
        ):
            members: dict[str, object] = {**body, "code": self.code()}
            self.assert_error(self.do(act, **members), error)
        self.assertEqual(before, stored())

        answer = self.do(OWN_ACTS["username"], current_password="wrong", code=self.code())
        self.assert_error(answer, errors.WrongPassword)
        self.ok(self.do(OWN_ACTS["username"], code=self.code()))
        self.assertEqual("new", stored_users()[0]["username"])
