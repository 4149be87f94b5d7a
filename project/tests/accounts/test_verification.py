"""Registration with EMAIL_VERIFICATION, POST /auth/verification and /auth/verify."""

from typing import Any, ClassVar
from unittest import mock

from werkzeug.test import TestResponse

from project import errors
from project.accounts import rate_limits
from project.tests.accounts.cases import at_once
from project.tests.accounts.mail_case import ON_ITS_WAY, MailTestCase
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import add_user, stored_events, stored_mails, stored_sessions, stored_users

VERIFY = "/auth/verify"
PLEASE = "Please confirm your email address."
DONE = "Email confirmed."
BOB = {"username": "bob", "email": "bob@test.com", "password": "test"}


class VerificationTestCase(MailTestCase):
    """A test of registrations."""

    def register_bob(self, **changes: str) -> TestResponse:
        """Return the response to a registration."""
        return self.post("/auth/register", **BOB | changes)

    def verify(self, token: str) -> TestResponse:
        """Return the response to a client that sends the token of a link."""
        return self.post(VERIFY, token=token)

    def bob(self) -> dict[str, Any]:
        """Return the row of the user who has registered."""
        return next(user for user in stored_users() if user["email"] == "bob@test.com")


class TestRequired(VerificationTestCase):
    """EMAIL_VERIFICATION=required."""

    settings: ClassVar[dict[str, Any]] = MailTestCase.settings | {"EMAIL_VERIFICATION": "required"}

    def test_walk(self) -> None:
        """The user registers, confirms the email with the link, and logs in."""
        self.assert_done(self.register_bob(), PLEASE, 202)
        self.assert_error(self.login("bob@test.com"), errors.EmailUnverified)

        self.assert_done(self.verify(self.receive("verify", "bob@test.com")), DONE)

        response = self.login("bob@test.com")
        self.assertEqual(200, response.status_code)
        status = self.get("/auth/status", response.get_json()["auth_token"]).get_json()["data"]
        self.assertIs(True, status["email_verified"])
        kinds = [event["kind"] for event in stored_events()]
        expected = ["logged_in", "registered", "login_refused", "email_verified", "logged_in"]
        self.assertEqual(expected, kinds)
        self.assertEqual("email_unverified", stored_events()[2]["details"]["why"])

    def test_no_session(self) -> None:
        """A registration starts no session."""
        before = stored_sessions()

        self.register_bob()

        self.assertEqual(before, stored_sessions())

    def test_wrong_password(self) -> None:
        """A wrong password of an unverified user is refused as for any other user."""
        self.register_bob()

        refused = self.login("bob@test.com", "wrong")

        self.assert_error(refused, errors.InvalidCredentials)

    def test_once(self) -> None:
        """A link works once, and of twenty requests at once for one."""
        self.register_bob()
        token = self.receive("verify", "bob@test.com")

        answers = at_once(*[lambda: self.verify(token) for _ in range(20)])

        self.assertEqual(1, [answer.status_code for answer in answers].count(200))
        self.assert_link_invalid(VERIFY, token)
        self.assertEqual(1, [each["kind"] for each in stored_events()].count("email_verified"))

    def test_taken_email(self) -> None:
        """A registration with a taken email gets the same answer; the owner is told by email."""
        before = stored_users()

        self.assert_done(self.register_bob(email="ada@test.com"), PLEASE, 202)

        self.assertEqual(before, stored_users())
        (message,) = self.send_mail()
        self.assertEqual("ada@test.com", message["To"])
        self.assertEqual("You already have an account at Example", message["Subject"])
        self.link_in(message, "reset")
        self.assertEqual("registration_refused", stored_events()[-1]["kind"])

    def test_taken_over(self) -> None:
        """The owner of an address that another client has registered gets the account."""
        self.register_bob(password="an attacker's")
        self.send_mail()
        self.assert_done(self.register_bob(username="robert"), PLEASE, 202)

        token = self.receive("reset", "bob@test.com")
        response = self.post("/auth/password/reset", token=token, new_password="bob's own")

        self.assertEqual(200, response.status_code)
        self.assertEqual(404, self.log_in_status("an attacker's", "bob@test.com"))
        self.assertEqual(200, self.log_in_status("bob's own", "bob@test.com"))

    def test_taken_username(self) -> None:
        """A taken username is refused, and the answer does not tell whether the email is taken."""
        for email in ("bob@test.com", "ada@test.com"):
            with self.subTest(email):
                response = self.register_bob(username="Ada", email=email)
                data = self.assert_error(response, errors.UserExists)
                self.assertEqual({"username": "is taken"}, data["errors"])
        self.assertEqual([], self.send_mail())

    def test_again(self) -> None:
        """POST /auth/verification sends another link, to users who have not confirmed theirs."""
        self.register_bob()
        first = self.receive("verify", "bob@test.com")

        for email in ("bob@test.com", "unknown@test.com"):
            self.assert_done(self.post("/auth/verification", email=email), ON_ITS_WAY, 202)
        second = self.receive("verify", "bob@test.com")
        self.assert_done(self.verify(second), DONE)

        self.assert_link_invalid(VERIFY, first)
        self.post("/auth/verification", email="bob@test.com")
        self.assertEqual([], self.send_mail())

    def test_reset_verifies(self) -> None:
        """A user who has an unverified account with their email takes it over with a reset."""
        self.register_bob(password="an attacker's")
        verification = self.receive("verify", "bob@test.com")

        self.post("/auth/password/forgot", email="bob@test.com")
        token = self.receive("reset", "bob@test.com")
        response = self.post("/auth/password/reset", token=token, new_password="bob's own")

        self.assertEqual(200, response.status_code)
        self.assert_link_invalid(VERIFY, verification)
        self.assertEqual(404, self.log_in_status("an attacker's", "bob@test.com"))
        self.assertEqual(200, self.log_in_status("bob's own", "bob@test.com"))

    def test_expired(self) -> None:
        """A link is valid for VERIFICATION_LINK_SECONDS."""
        self.register_bob()
        token = self.receive("verify", "bob@test.com")

        self.move_clock(86_400)

        self.assert_link_invalid(VERIFY, token)
        self.assertFalse(self.bob()["email_verified"])

    def test_rollback(self) -> None:
        """If a registration fails before its commit, no email is sent."""
        with mock.patch("project.accounts.audit.record", side_effect=ValueError):
            self.assertEqual(500, self.register_bob().status_code)

        self.assertEqual([], stored_mails())

    def test_limit(self) -> None:
        """Three registrations an hour for an email, whether it is taken or not."""
        self.app.config["RATE_LIMITS"] = True
        rate_limits.init_app(self.app)
        for email in ("ada@test.com", "new@test.com"):
            for number in range(3):
                name = f"{email[:3]}{number}"
                response = self.register_bob(username=name, email=email)
                self.assert_done(response, PLEASE, 202)
            response = self.register_bob(username="another", email=email)
            self.assert_error(response, errors.TooManyAttempts)

    def test_added_by_an_admin(self) -> None:
        """The email of a user whom an admin adds counts as confirmed."""
        self.app.config["USERS_API_OPEN"] = False
        admin = add_user("admin", "admin@test.com", "test", admin=True, email_verified=True)
        token = self.login("admin@test.com").get_json()["auth_token"]
        self.assertTrue(admin.admin)

        response = self.post("/users", token, **BOB)

        self.assertIs(True, response.get_json()["data"]["email_verified"])
        self.assertEqual(200, self.log_in_status("test", "bob@test.com"))

    def test_not_configured(self) -> None:
        """Without a mail server a registration is refused, and nothing is stored."""
        self.app.config["SMTP_URL"] = None

        with self.assert_nothing_changes():
            self.assert_error(self.register_bob(), errors.MailNotConfigured)


class TestOptional(VerificationTestCase):
    """EMAIL_VERIFICATION=optional."""

    settings: ClassVar[dict[str, Any]] = MailTestCase.settings | {"EMAIL_VERIFICATION": "optional"}

    def test_walk(self) -> None:
        """The user has a session at once; `email_verified` says whether they have confirmed."""
        response = self.register_bob()
        self.assertEqual(201, response.status_code)
        self.assertIs(False, response.get_json()["data"]["email_verified"])
        token = response.get_json()["auth_token"]
        self.assertIs(False, self.get("/auth/status", token).get_json()["data"]["email_verified"])
        self.assertEqual(200, self.log_in_status("test", "bob@test.com"))

        self.assert_done(self.verify(self.receive("verify", "bob@test.com")), DONE)

        self.assertIs(True, self.get("/auth/status", token).get_json()["data"]["email_verified"])
        self.assertEqual(200, self.log_in_status("test", "bob@test.com"))

    def test_limit(self) -> None:
        """A client that registers and deletes an account causes three emails an hour at most."""
        self.app.config["RATE_LIMITS"] = True
        rate_limits.init_app(self.app)
        for _ in range(3):
            token = self.register_bob().get_json()["auth_token"]
            body = {"current_password": "test"}
            deleted = self.client.delete("/auth/account", json=body, headers=bearer(token))
            self.assertEqual(200, deleted.status_code)

        self.assert_error(self.register_bob(), errors.TooManyAttempts)

    def test_taken_email(self) -> None:
        """A taken email is refused as ever."""
        response = self.register_bob(email="ada@test.com")

        self.assert_error(response, errors.UserExists)
        self.assertEqual([], stored_mails())

    def test_not_configured(self) -> None:
        """Without a mail server users register as ever, and no email waits."""
        self.app.config["SMTP_URL"] = None

        self.assertEqual(201, self.register_bob().status_code)
        self.assertEqual([], stored_mails())


class TestOff(BaseTestCase):
    """EMAIL_VERIFICATION=off, without a mail server."""

    def test_answers(self) -> None:
        """No answer has `email_verified`, and nothing is sent."""
        response = self.client.post("/auth/register", json=BOB)
        status = self.get("/auth/status", response.get_json()["auth_token"])

        self.assertNotIn("email_verified", response.get_json()["data"])
        self.assertNotIn("email_verified", status.get_json()["data"])
        self.assertEqual([], stored_mails())
        self.assertFalse(stored_users()[0]["email_verified"])
