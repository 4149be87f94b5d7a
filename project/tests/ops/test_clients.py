"""The commands about other services: create_client, clients, rotate_client_secret ..."""

import hashlib
import re
from typing import Any

from werkzeug.test import TestResponse

from project.errors import InvalidClient
from project.tests.ops.issuer import ISSUER, IssuerTestCase
from project.tests.rows import stored_events


class TestClients(IssuerTestCase):
    """The commands, and what a client can do with the secret that they print."""

    def secret(self, *arguments: str, **environment: str) -> str:
        """Return the secret that a command prints."""
        printed = self.manage(*arguments, **environment)
        client, secret, told, *_ = printed.splitlines()
        self.assertEqual(f"Client ID: {arguments[1]}", client)
        self.assertEqual("The secret is not stored, and is not shown again.", told)
        return secret.removeprefix("Secret:").strip()

    def introspect(self, name: str, secret: str, token: str = "any") -> TestResponse:
        """Return the response to an introspection."""
        return self.client.post("/oauth/introspect", auth=(name, secret), data={"token": token})

    def is_active(self, name: str, secret: str, token: str) -> bool:
        """Return whether a client is told that a token is active."""
        response = self.introspect(name, secret, token)
        self.assertEqual(200, response.status_code)
        return bool(response.get_json()["active"])

    def stored(self) -> list[dict[str, Any]]:
        """Return every column of every client."""
        return [row._asdict() for row in self.execute("SELECT * FROM clients ORDER BY name")]

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Return kind and details of the events of clients."""
        found = [(event["kind"], event["details"]) for event in stored_events()]
        return [(kind, details) for kind, details in found if kind.startswith("client_")]

    def test_create(self) -> None:
        """The client authenticates with its secret, of which only a hash is stored."""
        token = self.register()

        secret = self.secret("create_client", "orders")

        self.assertRegex(secret, r"\A[A-Za-z0-9_-]{43}\Z")
        self.assertTrue(self.is_active("orders", secret, token))
        [stored] = self.stored()
        self.assertEqual(hashlib.sha256(secret.encode()).hexdigest(), stored["secret_hash"])
        self.assertNotIn(secret, str(stored))
        self.assertEqual([("client_added", {"client": "orders"})], self.events())

    def test_audience(self) -> None:
        """By default a client is for TOKEN_AUDIENCE or the ISSUER; --audience names another."""
        token = self.register()
        of_others = self.secret("create_client", "others", "--audience", "https://other.example")
        self.secret("create_client", "shop", TOKEN_AUDIENCE="https://shop.example")
        self.secret("create_client", "users")

        self.assertFalse(self.is_active("others", of_others, token))
        audiences = {client["name"]: client["audience"] for client in self.stored()}
        self.assertEqual(
            {
                "others": "https://other.example",
                "shop": "https://shop.example",
                "users": ISSUER,
            },
            audiences,
        )

    def test_scope(self) -> None:
        """A client gets a token of its own with the scope of --scope, or a part of it."""
        secret = self.secret("create_client", "orders", "--scope", "read  write")
        for asked, granted in ((None, "read write"), ("write", "write")):
            with self.subTest(asked):
                data = {"grant_type": "client_credentials"} | ({"scope": asked} if asked else {})
                response = self.client.post("/oauth/token", auth=("orders", secret), data=data)

                self.assertEqual(200, response.status_code)
                self.assertEqual(granted, response.get_json()["scope"])

    def test_rotation(self) -> None:
        """Both secrets are valid for 24 hours, or as long as --keep says."""
        old = self.secret("create_client", "orders")

        new = self.secret("rotate_client_secret", "orders")

        self.assertNotEqual(old, new)
        for secret in (old, new):
            self.assertEqual(200, self.introspect("orders", secret).status_code)
        self.move_clock(86_400 + 60)
        self.assert_error(self.introspect("orders", old), InvalidClient)
        self.assertEqual(200, self.introspect("orders", new).status_code)
        rotated = ("client_secret_rotated", {"client": "orders"})
        self.assertEqual(rotated, self.events()[1])

        newer = self.secret("rotate_client_secret", "orders", "--keep", "0m")
        self.assert_error(self.introspect("orders", new), InvalidClient)
        self.assertEqual(200, self.introspect("orders", newer).status_code)

    def test_time_of_the_old_secret(self) -> None:
        """The command prints until when the old secret is valid, and so does the table."""
        self.secret("create_client", "orders")

        printed = self.manage("rotate_client_secret", "orders", "--keep", "7d")
        [until] = re.findall(r"previous secret is valid until (\S+Z)\.", printed)
        self.assertIn(until[:-4], self.manage("clients"))
        printed = self.manage("rotate_client_secret", "orders", "--keep", "0h")
        self.assertIn("The previous secret is no longer valid.", printed)

    def test_disable(self) -> None:
        """A disabled client is refused."""
        secret = self.secret("create_client", "orders")

        self.assertIn("orders is disabled.", self.manage("disable_client", "orders"))

        self.assert_error(self.introspect("orders", secret), InvalidClient)
        self.assertIn(("client_disabled", {"client": "orders"}), self.events())

    def test_table(self) -> None:
        """Every client is listed, and no hash of a secret."""
        for arguments in (
            ["shop", "--scope", "read write"],
            ["orders", "--audience", "https://orders.example"],
        ):
            self.secret("create_client", *arguments)
        self.manage("disable_client", "shop")

        printed = self.manage("clients")

        header, orders, shop = (re.split(" {2,}", line) for line in printed.splitlines())
        self.assertEqual(("client", "state", "created"), tuple(header[:3]))
        self.assertEqual(["orders", "enabled"], orders[:2])
        self.assertEqual(["-", "https://orders.example"], orders[3:])
        self.assertEqual(["shop", "disabled"], shop[:2])
        self.assertEqual(["-", ISSUER, "read write"], shop[3:])
        for client in self.stored():
            self.assertNotIn(client["secret_hash"], printed)

    def test_refused(self) -> None:
        """Invalid values and unknown clients are refused in one line, and nothing changes."""
        self.secret("create_client", "orders")
        before = self.stored()
        for reason, *arguments in (
            ("name is taken", "create_client", "orders"),
            ("name must be at most 63 lower-case letters", "create_client", "Orders"),
            ("name must be at most 63 lower-case letters", "create_client", "7"),
            ("name must be", "create_client", "first-party"),
            ("audience must be", "create_client", "shop", "--audience", "x" * 256),
            ("scope must be", "create_client", "shop", "--scope", 'read "all"'),
            ("There is no client shop", "rotate_client_secret", "shop"),
            ("There is no client shop", "disable_client", "shop"),
            ("'a day' is not a duration", "rotate_client_secret", "orders", "--keep", "a day"),
            ("'24' is not a duration", "rotate_client_secret", "orders", "--keep", "24"),
        ):
            with self.subTest(reason):
                self.assert_refused(reason, *arguments)
        self.assertEqual(before, self.stored())

    def test_without_issuer(self) -> None:
        """Without ISSUER each of the commands is refused and changes nothing."""
        for arguments in (
            ["create_client", "orders"],
            ["clients"],
            ["rotate_client_secret", "orders"],
            ["disable_client", "orders"],
        ):
            with self.subTest(arguments):
                self.assert_refused("ISSUER is not set", *arguments, ISSUER="")
        self.assertEqual([], self.stored())
