"""Security notices: which events users are told of by email."""

from typing import Any, ClassVar
from unittest import mock

import pyotp
from sqlalchemy import update

from project import clock, db
from project.accounts import administration, audit, rate_limits
from project.models import Mail, User
from project.tests.accounts.mail_case import MailTestCase, body_of
from project.tests.base import bearer
from project.tests.rows import ORIGIN, add_user, start_session, stored_events, stored_mails


class NoticesTestCase(MailTestCase):
    """A test with an admin."""

    settings: ClassVar[dict[str, Any]] = MailTestCase.settings | {
        "RATE_LIMITS": True,
        "REFRESH_REUSE_SECONDS": 0,
    }

    def setUp(self) -> None:
        """Add the admin, and set the rate limits up."""
        super().setUp()
        rate_limits.init_app(self.app)
        self.admin = start_session(add_user("admin", "admin@test.com", "test", admin=True))

    def assert_notice(self, kind: str, subject: str, ip: str | None = "127.0.0.1") -> None:
        """Check that one email is sent, to the user, and says from where."""
        (mail,) = stored_mails()
        self.assertEqual((kind, "ada@test.com"), (mail["kind"], mail["address"]))
        (message,) = self.send_mail()
        self.assertEqual("ada@test.com", message["To"])
        self.assertEqual(subject, message["Subject"])
        for part in ("plain", "html"):
            named = f"from the address {ip or '127.0.0.1'}" in body_of(message, part)
            self.assertEqual(bool(ip), named)

    def log_in_from(self, ip: str) -> int:
        """Return the status of the response to a login from an address."""
        body = {"email": "ada@test.com", "password": "test"}
        environ = {"REMOTE_ADDR": ip}
        return self.client.post("/auth/login", json=body, environ_overrides=environ).status_code


class TestNotices(NoticesTestCase):
    """The events."""

    def test_password_changed(self) -> None:
        """A change of the password."""
        body = {"current_password": "test", "new_password": "another"}
        self.assertEqual(200, self.post("/auth/password", self.token, **body).status_code)

        self.assert_notice("password_changed", "Your password at Example was changed")

    def test_new_login(self) -> None:
        """A login from a network where the account is not known, and none from a known one."""
        self.assertEqual(200, self.log_in_from("192.0.2.7"))
        self.assert_notice("new_login", "New login to your account at Example", "192.0.2.7")

        self.assertEqual(200, self.log_in_from("192.0.2.7"))
        self.assertEqual([], self.send_mail())

    def test_network_of_a_registration(self) -> None:
        """The network from which a user registers is known."""
        body = {"username": "bob", "email": "bob@test.com", "password": "test"}
        self.post("/auth/register", **body)
        self.login("bob@test.com")

        self.assertEqual([], self.send_mail())

    def test_network_of_a_link(self) -> None:
        """The network from which a user confirms their email or resets the password is known."""
        self.app.config["EMAIL_VERIFICATION"] = "required"
        body = {"username": "bob", "email": "bob@test.com", "password": "test"}
        self.post("/auth/register", **body)
        self.post("/auth/verify", token=self.receive("verify", "bob@test.com"))
        self.assertEqual(200, self.log_in_status("test", "bob@test.com"))
        self.post("/auth/password/forgot", email="ada@test.com")
        token = self.receive("reset")
        self.post("/auth/password/reset", token=token, new_password="another")
        self.send_mail()  # that the password was changed
        self.assertEqual(200, self.log_in_status("another"))

        self.assertEqual([], self.send_mail())

    def test_changed_email(self) -> None:
        """A user who changes their email stays known at their addresses."""
        self.log_in_from("192.0.2.7")
        body = {"email": "new@test.com", "current_password": "test"}
        self.post("/auth/email", self.token, **body)
        (message,) = (mail for mail in self.send_mail() if mail["To"] == "new@test.com")
        self.post("/auth/email/confirm", token=self.link_in(message, "email"))
        self.send_mail()  # that the email was changed

        login = {"email": "new@test.com", "password": "test"}
        environ = {"REMOTE_ADDR": "192.0.2.7"}
        response = self.client.post("/auth/login", json=login, environ_overrides=environ)

        self.assertEqual(200, response.status_code)
        self.assertEqual([], self.send_mail())

    def test_limit(self) -> None:
        """An address gets five notices of a kind in an hour, and the acts succeed all the same."""
        for number in range(8):
            self.assertEqual(200, self.log_in_from(f"192.0.{number}.7"))
        self.assertEqual(5, len(self.send_mail()))

        self.move_clock(3_600)
        self.assertEqual(200, self.log_in_from("198.51.100.7"))
        self.assertEqual(1, len(self.send_mail()))

    def test_nothing_is_known(self) -> None:
        """With KNOWN_ADDRESS_DAYS=0 no network is ever known, and users are not told of logins."""
        self.app.config["KNOWN_ADDRESS_DAYS"] = 0
        rate_limits.init_app(self.app)

        self.assertEqual(200, self.log_in_from("192.0.2.7"))

        self.assertEqual([], self.send_mail())

    def test_refresh_reused(self) -> None:
        """A refresh token that is used again; only once, because the session is over."""
        pair = self.login("ada@test.com", "test").get_json()
        self.send_mail()
        self.move_clock(1)
        refresh = {"refresh_token": pair["refresh_token"]}
        self.post("/auth/refresh", **refresh)
        self.move_clock(1)

        for _ in range(3):
            self.assertEqual(401, self.post("/auth/refresh", **refresh).status_code)

        self.assert_notice("refresh_reused", "A session of your account at Example was ended")

    def test_deactivated(self) -> None:
        """A deactivation by an admin or by the operator."""
        subject = "Your account at Example was deactivated"
        path, headers = f"/users/{self.user.id}", bearer(self.admin.auth_token)
        self.client.patch(path, json={"active": False}, headers=headers)
        self.assert_notice("account_deactivated", subject, None)

        self.client.patch(path, json={"active": True}, headers=headers)
        self.assertEqual([], self.send_mail())

        administration.set_active("ada@test.com", False, ORIGIN)
        db.session.commit()
        (message,) = self.send_mail()
        self.assertEqual(subject, message["Subject"])

    def test_deleted(self) -> None:
        """A deletion by an admin; a user who deletes their own account is not told."""
        bob = add_user("bob", "bob@test.com", "test")
        headers = bearer(self.admin.auth_token)
        self.client.delete(f"/users/{self.user.id}", headers=headers)
        self.assert_notice("account_deleted", "Your account at Example was deleted", None)

        body = {"current_password": "test"}
        own = bearer(start_session(bob).auth_token)
        response = self.client.delete("/auth/account", json=body, headers=own)
        self.assertEqual(200, response.status_code)
        self.assertEqual([], self.send_mail())

    def test_deleted_with_emails(self) -> None:
        """A deletion removes the emails to the user that were given up, and no others."""
        for address in ("ada@test.com", "bob@test.com"):
            self.post("/auth/password/forgot", email=address)
        db.session.execute(update(Mail).values(failed_at=clock.utcnow()))
        db.session.commit()

        headers = bearer(self.admin.auth_token)
        self.client.delete(f"/users/{self.user.id}", headers=headers)

        left = [(mail["kind"], mail["address"]) for mail in stored_mails()]
        self.assertEqual([("reset", "bob@test.com"), ("account_deleted", "ada@test.com")], left)

    def test_same_transaction(self) -> None:
        """An act that is rolled back causes neither an event nor an email."""
        before = stored_events()
        body = {"current_password": "test", "new_password": "another"}
        with mock.patch("project.accounts.mails.outbox.add", side_effect=ValueError):
            self.assertEqual(500, self.post("/auth/password", self.token, **body).status_code)

        self.assertEqual(before, stored_events())
        self.assertEqual([], stored_mails())

    def test_address_of_the_time(self) -> None:
        """A notice goes to the email of the time of the event, not to a later one."""
        body = {"current_password": "test", "new_password": "another"}
        self.post("/auth/password", self.token, **body)
        db.session.query(User).filter_by(id=self.user.id).update({"email": "eve@test.com"})
        db.session.commit()

        self.assert_notice("password_changed", "Your password at Example was changed")

    def test_off(self) -> None:
        """With SECURITY_NOTICES=false there are none."""
        self.app.config["SECURITY_NOTICES"] = False
        body = {"current_password": "test", "new_password": "another"}
        self.post("/auth/password", self.token, **body)
        self.log_in_from("192.0.2.7")

        self.assertEqual([], stored_mails())

    def test_not_configured(self) -> None:
        """Without a mail server no email waits."""
        self.app.config["SMTP_URL"] = None
        self.log_in_from("192.0.2.7")

        self.assertEqual([], stored_mails())

    def test_no_text_of_clients(self) -> None:
        """No email contains the username or the user agent."""
        advertisement = "Win at http://attacker.example"
        add_user(advertisement, "bob@test.com", "test")
        agent = {"User-Agent": advertisement}
        body = {"email": "bob@test.com", "password": "test"}
        self.client.post("/auth/login", json=body, headers=agent)
        self.client.post("/auth/password/forgot", json={"email": "bob@test.com"}, headers=agent)

        messages = self.send_mail()

        self.assertEqual(2, len(messages))
        for message in messages:
            self.assertNotIn("attacker", message.as_string())


class TestSecondFactor(NoticesTestCase):
    """Events of the second factor."""

    OFF = "Codes are no longer needed to log in at Example"

    def setUp(self) -> None:
        """Begin to set an authenticator up, which causes no notice."""
        super().setUp()
        begun = self.post("/auth/totp", self.token, current_password="test").get_json()
        self.authenticator = pyotp.TOTP(begun["data"]["secret"])
        self.assertEqual([], stored_mails())

    def enrol(self) -> list[str]:
        """Turn the authenticator on, and return the recovery codes; send the notice of it."""
        answer = self.post("/auth/totp/confirm", self.token, code=self.next_code())
        self.send_mail()
        codes: list[str] = answer.get_json()["data"]["recovery_codes"]
        return codes

    def next_code(self) -> str:
        """Move the clock to the next code of the authenticator, and return it."""
        self.move_clock(30)
        return self.authenticator.at(clock.utcnow())

    def log_in(self, code: str, password: str = "test") -> int:
        """Return the status of the response to a login with a code."""
        body = {"email": "ada@test.com", "password": password, "code": code}
        return self.post("/auth/login", **body).status_code

    def test_enabled(self) -> None:
        """An authenticator that is turned on, and not one that a wrong code should turn on."""
        answer = self.post("/auth/totp/confirm", self.token, code="A" * 24)
        self.assertEqual((400, []), (answer.status_code, stored_mails()))
        answer = self.post("/auth/totp/confirm", self.token, code=self.next_code())
        self.assertEqual(200, answer.status_code)

        self.assert_notice("totp_enabled", "Codes are now needed to log in at Example")

    def test_disabled(self) -> None:
        """An authenticator that the user turns off, and not one that a wrong code should."""
        self.enrol()
        body, headers = {"current_password": "test", "code": "A" * 24}, bearer(self.token)
        answer = self.client.delete("/auth/totp", json=body, headers=headers)
        self.assertEqual((400, []), (answer.status_code, stored_mails()))
        body["code"] = self.next_code()
        answer = self.client.delete("/auth/totp", json=body, headers=headers)
        self.assertEqual(200, answer.status_code)

        self.assert_notice("totp_disabled", self.OFF)

    def test_reset(self) -> None:
        """An authenticator that an admin or the operator removes."""
        self.enrol()
        path, headers = f"/users/{self.user.id}/totp", bearer(self.admin.auth_token)
        self.assertEqual(200, self.client.delete(path, headers=headers).status_code)
        self.assert_notice("totp_disabled", self.OFF, None)
        self.assertEqual(404, self.client.delete(path, headers=headers).status_code)
        self.assertEqual([], stored_mails())

        db.session.execute(update(User).values(mfa_enabled=True))
        db.session.commit()
        administration.reset_totp_of("ada@test.com", audit.Origin(None, "manage.py"))
        db.session.commit()
        self.assert_notice("totp_disabled", self.OFF, None)

    def test_recovery_codes_replaced(self) -> None:
        """New recovery codes, and none after a wrong password."""
        self.enrol()
        for password, status in (("wrong", 400), ("test", 200)):
            body = {"current_password": password, "code": self.next_code()}
            self.assertEqual([], stored_mails())
            answer = self.post("/auth/recovery_codes", self.token, **body)
            self.assertEqual(status, answer.status_code)

        subject = "New recovery codes for your account at Example"
        self.assert_notice("recovery_codes_replaced", subject)

    def test_recovery_code_used(self) -> None:
        """A recovery code that is used; it is not told of a second use, which is refused."""
        code, *_ = self.enrol()
        path, body = f"/users/{self.user.id}", {"username": "lovelace"}
        body |= {"current_password": "test", "code": code}
        answer = self.client.patch(path, json=body, headers=bearer(self.token))
        self.assertEqual(200, answer.status_code)

        subject = "A recovery code of your account at Example was used"
        self.assert_notice("recovery_code_used", subject)
        answer = self.client.patch(path, json=body, headers=bearer(self.token))
        self.assertEqual((400, []), (answer.status_code, stored_mails()))

    def test_wrong_codes(self) -> None:
        """Wrong codes after the right password, when they begin a pause; not wrong passwords."""
        self.enrol()
        for _ in range(4):
            self.assertEqual(400, self.log_in("A" * 24))
        self.assertEqual(404, self.log_in("A" * 24, "wrong"))
        self.assertEqual([], stored_mails())
        self.assertEqual(400, self.log_in("A" * 24))

        self.assert_notice("wrong_codes", "Wrong codes for your account at Example")
        self.assertEqual(429, self.log_in(self.next_code()))
        self.assertEqual([], stored_mails())
