"""POST /users/invitations and /auth/invitation: an admin invites, the invited registers."""

from typing import Any
from unittest import mock

from werkzeug.test import TestResponse

from project import db, errors
from project.accounts import invitations
from project.tests.accounts.cases import at_once
from project.tests.accounts.mail_case import MailTestCase
from project.tests.rows import (
    ORIGIN,
    add_user,
    start_session,
    stored_events,
    stored_mails,
    stored_users,
)

ACCEPT = "/auth/invitation"


class InvitationsTestCase(MailTestCase):
    """A test with an admin."""

    def setUp(self) -> None:
        """Add the admin."""
        super().setUp()
        self.admin = add_user("admin", "admin@test.com", "test", admin=True)
        self.admin_token = start_session(self.admin).auth_token

    def invite(self, email: str = "bob@test.com", **body: str) -> TestResponse:
        """Return the response to the admin who invites."""
        return self.post("/users/invitations", self.admin_token, email=email, **body)

    def new_link(self, email: str = "bob@test.com", **body: str) -> str:
        """Invite, and return the token of the link."""
        self.assert_done(self.invite(email, **body), "An invitation is on its way.", 202)
        return self.receive("invitation", email)

    def accept(self, token: str, **body: str) -> TestResponse:
        """Return the response to the invited."""
        return self.post(ACCEPT, **{"token": token, "password": "test", "username": "bob"} | body)


class TestInvitations(InvitationsTestCase):
    """What an invitation does."""

    def test_walk(self) -> None:
        """The invited registers with the invitation's email, which is verified, and is no admin."""
        response = self.accept(self.new_link())

        self.assertEqual(201, response.status_code, response.get_json())
        answer: dict[str, Any] = response.get_json()
        self.assertEqual("Successfully registered.", answer["message"])
        self.assertEqual(200, self.get("/auth/status", answer["auth_token"]).status_code)
        stored = stored_users()[-1]
        expected = {"username": "bob", "email": "bob@test.com", "email_verified": True}
        self.assertEqual(expected | {"admin": False}, {k: stored[k] for k in (*expected, "admin")})
        kinds = [event["kind"] for event in stored_events()]
        self.assertEqual(["user_invited", "registered"], kinds[-2:])
        self.assertEqual([], self.send_mail())

    def test_once(self) -> None:
        """A link works once, also when its user has been deleted since."""
        token = self.new_link()

        answers = at_once(*[lambda n=n: self.accept(token, username=f"b{n}") for n in range(20)])

        self.assertEqual(1, [answer.status_code for answer in answers].count(201))
        created = stored_users()[-1]["id"]
        headers = {"Authorization": f"Bearer {self.admin_token}"}
        self.assertEqual(200, self.client.delete(f"/users/{created}", headers=headers).status_code)
        self.assert_error(self.accept(token), errors.LinkInvalid)

    def test_username(self) -> None:
        """The username of the invitation is used unless the invited chooses one."""
        first, second = self.new_link(username="robert"), self.new_link("eve@test.com")

        self.assertEqual(201, self.post(ACCEPT, token=first, password="test").status_code)
        missing = self.post(ACCEPT, token=second, password="test")

        self.assertEqual("robert", stored_users()[-1]["username"])
        data = self.assert_error(missing, errors.InvalidPayload)
        self.assertEqual({"username": "is required"}, data["errors"])
        self.assertEqual(201, self.accept(second, username="eve").status_code)

    def test_refused_names(self) -> None:
        """A taken username and a weak password are refused, and do not use the link up."""
        self.app.config["PASSWORD_MIN_LENGTH"] = 12
        token = self.new_link()

        weak = self.accept(token)
        taken = self.accept(token, username="ADA", password="correct-horse-battery")

        self.assertEqual(
            ["password"], list(self.assert_error(weak, errors.InvalidPayload)["errors"])
        )
        data = self.assert_error(taken, errors.UserExists)
        self.assertEqual({"username": "is taken"}, data["errors"])
        self.assertEqual(201, self.accept(token, password="correct-horse-battery").status_code)

    def test_taken(self) -> None:
        """An email or a username that a user has is refused."""
        for body, error, field in (
            ({"email": "ada@test.com"}, errors.EmailExists, "email"),
            ({"username": "ADA"}, errors.UsernameExists, "username"),
        ):
            with self.subTest(body):
                data = self.assert_error(self.invite(**body), error)
                self.assertEqual({field: "is taken"}, data["errors"])
        self.assertEqual([], stored_mails())

    def test_registered_meanwhile(self) -> None:
        """If the invited has registered otherwise, the link is refused with the reason."""
        token = self.new_link()
        add_user("robert", "bob@test.com", "test")

        data = self.assert_error(self.accept(token), errors.UserExists)

        self.assertEqual({"email": "is taken"}, data["errors"])

    def test_replaced(self) -> None:
        """A later invitation of the same email replaces the first."""
        first = self.new_link()
        self.move_clock(1)
        second = self.new_link()

        self.assert_error(self.accept(first), errors.LinkInvalid)
        self.assertEqual(201, self.accept(second).status_code)

    def test_replaced_meanwhile(self) -> None:
        """If the email is invited again while the password is hashed, the first link is refused."""
        token = self.new_link()
        self.move_clock(1)

        def invite_again(password: str) -> str:
            invitations.invite("bob@test.com", None, ORIGIN)
            db.session.commit()
            return password

        with mock.patch("project.lib.hashing.hash", invite_again):
            self.assert_error(self.accept(token), errors.LinkInvalid)
        self.assertEqual(201, self.accept(self.receive("invitation", "bob@test.com")).status_code)

    def test_verified(self) -> None:
        """The invited need not confirm the email, whatever EMAIL_VERIFICATION is."""
        for mode in ("optional", "required"):
            with self.subTest(mode):
                self.app.config["EMAIL_VERIFICATION"] = mode
                email = f"{mode}@test.com"
                response = self.accept(self.new_link(email), username=mode)
                self.assertIs(True, response.get_json()["data"]["email_verified"])
                self.assertEqual([], stored_mails())
                self.assertEqual(200, self.log_in_status("test", email))

    def test_deleted(self) -> None:
        """The deletion of a user deletes the invitation of their email."""
        token = self.new_link()
        user = add_user("bob", "bob@test.com", "test")
        headers = {"Authorization": f"Bearer {self.admin_token}"}
        self.assertEqual(200, self.client.delete(f"/users/{user.id}", headers=headers).status_code)

        self.assert_error(self.accept(token), errors.LinkInvalid)

    def test_expired(self) -> None:
        """A link is valid for INVITATION_LINK_SECONDS from the invitation; the row is purged."""
        token = self.new_link()
        self.assertEqual(0, invitations.delete_expired())

        self.move_clock(7 * 86_400)

        self.assert_error(self.accept(token), errors.LinkInvalid)
        self.assertEqual(1, invitations.delete_expired())
        db.session.commit()

    def test_callers(self) -> None:
        """Only admins invite, even where the users API is open."""
        self.assertTrue(self.app.config["USERS_API_OPEN"])

        anonymous = self.post("/users/invitations", email="bob@test.com")
        user = self.post("/users/invitations", self.token, email="bob@test.com")

        self.assert_error(anonymous, errors.TokenMissing)
        self.assert_error(user, errors.PermissionDenied)
        self.assertEqual([], stored_mails())

    def test_other_links(self) -> None:
        """An invitation is no link for a user with the same ID, nor the other way round."""
        token = self.new_link()
        self.post("/auth/password/forgot", email="ada@test.com")
        reset = self.receive("reset")

        self.assert_link_invalid("/auth/password/reset", token, new_password="another")
        self.assert_link_invalid("/auth/verify", token)
        self.assert_error(self.accept(reset), errors.LinkInvalid)

    def test_not_configured(self) -> None:
        """Without a mail server an admin cannot invite."""
        self.app.config["SMTP_URL"] = None

        self.assert_error(self.invite(), errors.MailNotConfigured)
