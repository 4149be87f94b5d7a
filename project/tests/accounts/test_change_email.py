"""POST /auth/email and /auth/email/confirm, and a change of one's own email with PATCH."""

from typing import Any, ClassVar

from werkzeug.test import TestResponse

from project import db, errors
from project.accounts import administration, rate_limits
from project.tests.accounts.cases import at_once
from project.tests.accounts.mail_case import MailTestCase
from project.tests.base import BaseTestCase, bearer
from project.tests.rows import (
    ORIGIN,
    add_user,
    start_session,
    stored_events,
    stored_mails,
    stored_users,
)

CONFIRM = "/auth/email/confirm"
PLEASE = "Please confirm the change with the link we sent to the new address."
DONE = "Email changed."


class ChangeEmailTestCase(MailTestCase):
    """A test of changes of one's own email."""

    def request(self, email: str = "new@test.com", password: str = "test") -> TestResponse:
        """Return the response to the user who asks for another email."""
        return self.post("/auth/email", self.token, email=email, current_password=password)

    def new_link(self, email: str = "new@test.com") -> str:
        """Ask for another email, and return the token of the link."""
        self.assert_done(self.request(email), PLEASE, 202)
        return self.receive("email", email)

    def confirm(self, token: str) -> TestResponse:
        """Return the response to a client that sends the token of a link."""
        return self.post(CONFIRM, token=token)

    def patch(self, user_id: int, caller: str, **body: object) -> TestResponse:
        """Return the response to a caller who changes a user."""
        headers = bearer(caller)
        return self.app.test_client().patch(f"/users/{user_id}", json=body, headers=headers)

    @property
    def email(self) -> str:
        """The stored email of the user."""
        return str(next(user for user in stored_users() if user["id"] == self.user.id)["email"])


class TestChange(ChangeEmailTestCase):
    """POST /auth/email."""

    def test_walk(self) -> None:
        """The email changes when the user confirms it; the session goes on; the old one is told."""
        token = self.new_link()
        self.assertEqual("ada@test.com", self.email)

        self.assert_done(self.confirm(token), DONE)

        self.assertEqual("new@test.com", self.email)
        self.assertTrue(stored_users()[0]["email_verified"])
        self.assertEqual(200, self.get("/auth/status", self.token).status_code)
        self.assertEqual(200, self.log_in_status("test", "new@test.com"))
        self.assertEqual(404, self.log_in_status("test"))
        (notice,) = self.send_mail()
        self.assertEqual("ada@test.com", notice["To"])
        self.assertEqual("Your email address at Example was changed", notice["Subject"])
        kinds = [(event["kind"], event["details"]) for event in stored_events()]
        self.assertIn(("email_change_requested", {}), kinds)
        self.assertIn(("user_changed", {"fields": "email"}), kinds)

    def test_once(self) -> None:
        """A link works once, and of twenty requests at once for one."""
        token = self.new_link()

        answers = at_once(*[lambda: self.confirm(token) for _ in range(20)])

        self.assertEqual(1, [answer.status_code for answer in answers].count(200))
        self.assert_link_invalid(CONFIRM, token)

    def test_wrong_password(self) -> None:
        """A wrong password is refused, and recorded."""
        self.assert_error(self.request(password="wrong"), errors.WrongPassword)

        self.assertEqual([], stored_mails())
        self.assertEqual("user_change_refused", stored_events()[-1]["kind"])

    def test_limit(self) -> None:
        """Three an hour for an email; attempts with a wrong password do not count."""
        self.app.config["RATE_LIMITS"] = True
        rate_limits.init_app(self.app)
        for password in ("wrong", "wrong", "wrong", "wrong", "test", "test", "test"):
            expected = 202 if password == "test" else 400
            self.assertEqual(expected, self.request(password=password).status_code)

        self.assert_error(self.request(), errors.TooManyAttempts)
        self.assertEqual("too_many_attempts", stored_events()[-1]["details"]["why"])
        self.assert_done(self.request("other@test.com"), PLEASE, 202)

    def test_deactivated(self) -> None:
        """A user who is deactivated before the email is sent gets none."""
        self.request()
        administration.set_active("ada@test.com", False, ORIGIN)
        db.session.commit()

        self.assertEqual(["ada@test.com"], [mail["To"] for mail in self.send_mail()])

    def test_own_email(self) -> None:
        """The email that the user has is refused."""
        data = self.assert_error(self.request("ADA@test.com"), errors.InvalidPayload)

        self.assertEqual({"email": "is your email already"}, data["errors"])

    def test_taken(self) -> None:
        """A taken email gets the same answer; it is refused when the change is confirmed."""
        token = self.new_link()
        other = add_user("bob", "new@test.com", "test")
        self.assert_done(self.request(), PLEASE, 202)
        self.receive("email", "new@test.com")

        data = self.assert_error(self.confirm(token), errors.EmailExists)

        self.assertEqual({"email": "is taken"}, data["errors"])
        self.assertEqual("ada@test.com", self.email)
        self.assertIsNotNone(other.id)

    def test_links_from_before(self) -> None:
        """A change of the email invalidates links to reset the password, and other changes."""
        self.post("/auth/password/forgot", email="ada@test.com")
        reset = self.receive("reset")
        other = self.new_link("other@test.com")

        self.confirm(self.new_link())

        self.assert_link_invalid("/auth/password/reset", reset, new_password="another")
        self.assert_link_invalid(CONFIRM, other)

    def test_password_change(self) -> None:
        """A change of the password invalidates the link."""
        token = self.new_link()
        body = {"current_password": "test", "new_password": "another"}
        self.assertEqual(200, self.post("/auth/password", self.token, **body).status_code)

        self.assert_link_invalid(CONFIRM, token)

    def test_password_change_before_sending(self) -> None:
        """No link is sent for a request from before a change of the password.

        The server of an attacker may have refused the email until after the change.
        """
        self.request()
        body = {"current_password": "test", "new_password": "another"}
        self.assertEqual(200, self.post("/auth/password", self.token, **body).status_code)

        self.assertEqual(["ada@test.com"], [message["To"] for message in self.send_mail()])

    def test_other_purpose(self) -> None:
        """A link for a change verifies nothing and resets no password."""
        token = self.new_link()

        self.assert_link_invalid("/auth/verify", token)
        self.assert_link_invalid("/auth/password/reset", token, new_password="another")

    def test_deleted(self) -> None:
        """A user who is deleted before the email is sent gets none."""
        self.request()
        body = {"current_password": "test"}
        self.client.delete("/auth/account", json=body, headers=bearer(self.token))

        self.assertEqual([], self.send_mail())

    def test_expired(self) -> None:
        """A link is valid for EMAIL_LINK_SECONDS."""
        token = self.new_link()

        self.move_clock(7_200)

        self.assert_link_invalid(CONFIRM, token)


class TestPatch(ChangeEmailTestCase):
    """PATCH /users/<id>."""

    def test_own(self) -> None:
        """A user's own new email has to be confirmed; what else they change is changed."""
        body = {"username": "Ada L.", "email": "new@test.com", "current_password": "test"}
        response = self.patch(self.user.id, self.token, **body)

        self.assertEqual(202, response.status_code, response.get_json())
        self.assertEqual(PLEASE, response.get_json()["message"])
        self.assertEqual("ada@test.com", response.get_json()["data"]["email"])
        self.assertEqual("Ada L.", response.get_json()["data"]["username"])
        self.assert_done(self.confirm(self.receive("email", "new@test.com")), DONE)
        self.assertEqual("new@test.com", self.email)

    def test_same(self) -> None:
        """The email that the user has needs no confirmation."""
        body = {"email": "ada@test.com", "current_password": "test"}
        response = self.patch(self.user.id, self.token, **body)

        self.assertEqual(200, response.status_code)
        self.assertEqual([], stored_mails())

    def test_by_an_admin(self) -> None:
        """An admin changes the email at once; the old one is told, without the admin's address."""
        admin = add_user("admin", "admin@test.com", "test", admin=True)
        token = start_session(admin).auth_token

        response = self.patch(self.user.id, token, email="new@test.com")

        self.assertEqual(200, response.status_code)
        self.assertEqual("new@test.com", self.email)
        (notice,) = self.send_mail()
        self.assertEqual("ada@test.com", notice["To"])
        self.assertNotIn("127.0.0.1", notice.as_string())

    def test_not_configured(self) -> None:
        """Where addresses are verified and no email can be sent, the change is refused."""
        self.app.config.update(SMTP_URL=None, EMAIL_VERIFICATION="optional")
        body = {"email": "new@test.com", "current_password": "test"}

        with self.assert_nothing_changes():
            response = self.patch(self.user.id, self.token, **body)
            self.assert_error(response, errors.MailNotConfigured)


class TestWithoutMail(BaseTestCase):
    """PATCH /users/<id> where no email can be sent."""

    settings: ClassVar[dict[str, Any]] = {"TOKEN_EXPIRATION_SECONDS": 3_600}

    def test_own(self) -> None:
        """The email changes at once, and is not verified."""
        user = add_user("ada", "ada@test.com", "test", email_verified=True)
        body = {"email": "new@test.com", "current_password": "test"}

        headers = bearer(start_session(user).auth_token)
        response = self.client.patch(f"/users/{user.id}", json=body, headers=headers)

        self.assertEqual(200, response.status_code)
        stored = stored_users()[0]
        self.assertEqual(("new@test.com", False), (stored["email"], stored["email_verified"]))
