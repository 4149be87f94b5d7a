"""`amr`: what sessions, tokens and introspection say of how a user has logged in."""

from typing import Any, ClassVar

from sqlalchemy import update

from project import db, errors
from project.accounts import clients
from project.models import Session
from project.tests.accounts.second_factor_case import SecondFactorTestCase, Tokens
from project.tests.api.oauth_case import ISSUER, basic
from project.tests.rows import (
    ORIGIN,
)
from project.tests.tokens.claims import claims_of, decode, session_of


class TestAmr(SecondFactorTestCase):
    """What tokens and sessions say of how the user has logged in."""

    def test_without_a_factor(self) -> None:
        """A user without a second factor has given a password, at the registration too."""
        registered = self.ok(
            self.send("POST", "/auth/register", username="c", email="c@t.com", password="test"), 201
        )
        for pair in (self.ok(self.log_in()), registered):
            self.assertEqual(["pwd"], claims_of(pair["auth_token"])["amr"])
            self.assertEqual(["pwd"], self.amr_of(pair["auth_token"]))

    def test_refresh(self) -> None:
        """A refresh carries it over, again and again, also a repeated one."""
        self.enrol()
        for code, amr in (
            (self.code(), ["pwd", "otp"]),
            (self.recovery_codes["ada"][0], ["pwd", "rc"]),
        ):
            pair = self.ok(self.log_in(code=code))
            for _ in range(3):
                following, repeated = self.refresh(pair), self.refresh(pair)
                for each in (following, repeated):
                    self.assertEqual(amr, claims_of(each["auth_token"])["amr"])
                self.assertEqual(amr, self.amr_of(following["auth_token"]))
                pair = following

    def test_step_up(self) -> None:
        """A code that a session gives is added; its tokens say so from the next refresh on."""
        self.enrol()
        pair = self.ok(self.log_in(code=self.recovery_codes["ada"][0]))
        self.tokens["ada"] = pair["auth_token"]
        for code in (self.code(), self.next_code()):
            self.ok(self.replace_recovery_codes(code=code))
            self.assertEqual(["pwd", "rc", "otp"], self.amr_of(pair["auth_token"]))
        self.assertEqual(["pwd", "rc"], claims_of(pair["auth_token"])["amr"])
        refreshed = self.refresh(pair)["auth_token"]
        self.assertEqual(["pwd", "rc", "otp"], claims_of(refreshed)["amr"])

    def test_wrong_code(self) -> None:
        """A wrong code adds nothing."""
        self.enrol()
        pair = self.ok(self.log_in(code=self.recovery_codes["ada"][0]))
        self.tokens["ada"] = pair["auth_token"]
        self.assert_wrong(self.replace_recovery_codes(code=self.wrong_code()))

        self.assertEqual(["pwd", "rc"], self.amr_of(pair["auth_token"]))
        self.assertEqual(["pwd", "rc"], claims_of(self.refresh(pair)["auth_token"])["amr"])

    def test_after_turning_off(self) -> None:
        """A session still says how it began after the authenticator was turned off."""
        self.enrol()
        pair = self.ok(self.log_in(code=self.code()))
        self.ok(self.turn_off(code=self.next_code()))

        self.assertEqual(["pwd", "otp"], claims_of(self.refresh(pair)["auth_token"])["amr"])
        new = self.ok(self.log_in())
        self.assertEqual(["pwd"], claims_of(new["auth_token"])["amr"])

    def test_password_alone(self) -> None:
        """A session that an older server has started with the password alone is refused."""
        self.enrol()
        pair = self.ok(self.log_in(code=self.code()))
        self.ok(self.send("GET", "/auth/status", pair["auth_token"]))
        this_one = Session.id == session_of(pair["auth_token"])
        db.session.execute(update(Session).where(this_one).values(amr=["pwd"]))
        db.session.commit()

        answer = self.send("GET", "/auth/status", pair["auth_token"])
        self.assert_error(answer, errors.SessionEnded)
        answer = self.send("POST", "/auth/refresh", refresh_token=pair["refresh_token"])
        self.assert_error(answer, errors.SessionEnded)


class TestAmrForOtherServices(SecondFactorTestCase):
    """The same in the tokens that other services verify, and in introspection."""

    environment: ClassVar[dict[str, str]] = {"ISSUER": ISSUER}

    def setUp(self) -> None:
        """Add a client, and set the authenticator of `ada` up."""
        super().setUp()
        self.orders = basic("orders", clients.create("orders", ISSUER, [], ORIGIN))
        db.session.commit()
        self.enrol()

    def introspect(self, token: str) -> dict[str, Any]:
        """Return what the service tells another one of a token."""
        answer = self.client.post("/oauth/introspect", data={"token": token}, headers=self.orders)
        return dict(self.ok(answer))

    def assert_amr(self, amr: list[str], pair: Tokens) -> None:
        """Check the `amr` of a token, and what introspection says of both tokens of the pair."""
        self.assertEqual("at+jwt", decode(pair["auth_token"].split(".")[0])["typ"])
        self.assertEqual(amr, claims_of(pair["auth_token"])["amr"])
        for token in (pair["auth_token"], pair["refresh_token"]):
            self.assertEqual(amr, self.introspect(token)["amr"])

    def test_tokens(self) -> None:
        """Tokens of RFC 9068 have it, and so has introspection, also after a refresh."""
        for amr, pair in (
            (["pwd"], self.ok(self.log_in("bob"))),
            (["pwd", "otp"], self.ok(self.log_in(code=self.code()))),
            (["pwd", "rc"], self.ok(self.log_in(code=self.recovery_codes["ada"][0]))),
        ):
            with self.subTest(amr):
                self.assert_amr(amr, pair)
                self.assert_amr(amr, self.refresh(pair))

    def test_step_up(self) -> None:
        """Introspection says at once what a session has given, the token from a refresh on."""
        pair = self.ok(self.log_in(code=self.recovery_codes["ada"][0]))
        self.tokens["ada"] = pair["auth_token"]
        self.ok(self.replace_recovery_codes(code=self.code()))

        self.assertEqual(["pwd", "rc"], claims_of(pair["auth_token"])["amr"])
        self.assertEqual(["pwd", "rc", "otp"], self.introspect(pair["auth_token"])["amr"])
        self.assert_amr(["pwd", "rc", "otp"], self.refresh(pair))
