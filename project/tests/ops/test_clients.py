"""manage.py create_client, clients, rotate_client_secret and disable_client."""

from werkzeug.test import TestResponse

from project.models import MAX_STORED_WORDS
from project.tests.api.oauth_case import AUDIENCE, ISSUER, TOKEN, basic
from project.tests.ops.issuer_case import IssuerTestCase
from project.tests.rows import stored_events
from project.tests.tokens.claims import claims_of


class TestClients(IssuerTestCase):
    """The commands about other services."""

    def create(self, *arguments: str, **environment: str) -> str:
        """Add the client `orders`, and return its secret."""
        return self.secret(self.manage("create_client", "orders", *arguments, **environment))

    def secret(self, lines: list[str]) -> str:
        """Return the secret that a command has printed."""
        self.assertEqual(["Client ID: orders", "The secret is not shown again."], lines[0:3:2])
        secret = lines[1].removeprefix("Client secret: ")
        self.assertRegex(secret, r"\A[\w-]{43}\Z")
        return secret

    def token(self, secret: str, **form: str) -> TestResponse:
        """Return the response when `orders` asks for a token of its own."""
        form["grant_type"] = "client_credentials"
        return self.client.post(TOKEN, data=form, headers=basic("orders", secret))

    def test_create(self) -> None:
        """A client gets tokens for its audience, with its scope, for the secret printed once."""
        secret = self.create("--audience", AUDIENCE, "--scope", "stock.read  stock.write")

        answer = self.token(secret).get_json()
        self.assertEqual("stock.read stock.write", answer["scope"])
        self.assertEqual(AUDIENCE, claims_of(answer["access_token"])["aud"])
        head, line = self.manage("clients")
        self.assertEqual("name", head.split()[0])
        name, audience, _created, *rest = line.split()
        self.assertEqual(["orders", AUDIENCE], [name, audience])
        self.assertEqual(["-", "-", "stock.read", "stock.write"], rest)
        self.assertNotIn(secret, line)

    def test_audience(self) -> None:
        """By default the audience is that of the users' tokens; without --scope there is none."""
        for environment, audience in (
            ({}, ISSUER),
            ({"TOKEN_AUDIENCE": AUDIENCE}, AUDIENCE),
        ):
            with self.subTest(audience):
                name = "a" if environment else "b"
                self.manage("create_client", name, **environment)
                lines = [line.split() for line in self.manage("clients")]
                self.assertIn([name, audience], [line[:2] for line in lines])
                self.assertEqual({"-"}, {line[-1] for line in lines[1:]})

    def test_refusals(self) -> None:
        """A taken or invalid name, audience or scope is refused in one line."""
        self.create()
        for arguments, words in (
            (("orders",), "Invalid payload. name is taken"),
            (("7",), "name must be lower-case letters"),
            (("first-party",), "name must be lower-case letters"),
            (("a" * 64,), "name must be lower-case letters"),
            (("shop", "--audience", "a" * 256), "audience must have 1 to 255 characters"),
            (("shop", "--scope", 'a"b'), "scope must be words of ASCII"),
            (("shop", "--scope", "a" * (MAX_STORED_WORDS + 1)), "scope must be"),
        ):
            with self.subTest(arguments):
                self.assert_refused(words, "create_client", *arguments)
        for command in ("rotate_client_secret", "disable_client"):
            with self.subTest(command):
                self.assert_refused("There is no client shop.", command, "shop")
        for hours in ("-1", "721", "1.5", "a", "1" * 30):
            with self.subTest(hours):
                self.assert_refused(
                    "is a number from 0 to 720",
                    *("rotate_client_secret", "orders", f"--keep-hours={hours}"),
                )
        self.assertEqual(["client_added"], [event["kind"] for event in stored_events()])

    def test_rotation(self) -> None:
        """Both secrets are good for a day or --keep-hours; with 0, the old one no longer is."""
        first = self.create()
        *lines, kept = self.manage("rotate_client_secret", "orders")
        second = self.secret(lines)
        self.assertEqual("The old secret is valid for 24 hours more.", kept)
        self.assertEqual([200, 200], [self.token(one).status_code for one in (first, second)])
        self.assertRegex(self.manage("clients")[1], r" 2\S+Z  2\S+Z  -")

        lines = self.manage("rotate_client_secret", "orders", "--keep-hours", "720")
        third = self.secret(lines)
        codes = [self.token(one).status_code for one in (first, second, third)]
        self.assertEqual([401, 200, 200], codes)
        self.move_clock(720 * 3_600)
        self.assertEqual([401, 200], [self.token(one).status_code for one in (second, third)])

        fourth = self.secret(self.manage("rotate_client_secret", "orders", "--keep-hours", "0"))
        self.assertEqual([401, 200], [self.token(one).status_code for one in (third, fourth)])

    def test_disabled(self) -> None:
        """A disabled client is refused, and the table says since when."""
        secret = self.create()
        self.assertEqual(["orders is disabled."], self.manage("disable_client", "orders"))

        self.assertEqual(401, self.token(secret).status_code)
        self.assertRegex(self.manage("clients")[1], r"-  +2\S+Z")
