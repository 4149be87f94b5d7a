"""The client's address and scheme, with and without trusted proxies."""

import os
from typing import Any
from unittest import mock

from werkzeug.datastructures import Headers

from project.tests.base import BaseTestCase, bearer

PEER = "10.0.0.1"  # of the connection: the last proxy, or a client
CREDENTIALS = {"email": "test@test.com", "password": "test"}


class ProxyTestCase(BaseTestCase):
    """A test of an application behind `hops` trusted proxies."""

    hops = ""

    def setUp(self) -> None:
        """Create the application with TRUSTED_PROXIES, and register a user."""
        with mock.patch.dict(os.environ, TRUSTED_PROXIES=self.hops):
            super().setUp()
        self.register()

    def address(self, *forwarded: str, peer: str = PEER, **headers: str) -> str | None:
        """Log in with these X-Forwarded-For headers, and return the `ip` of the session."""
        environ: dict[str, Any] = {"environ_overrides": {"REMOTE_ADDR": peer}}
        lines = Headers(headers)
        for line in forwarded:
            lines.add("X-Forwarded-For", line)
        login = self.client.post("/auth/login", json=CREDENTIALS, headers=lines, **environ)
        token = login.get_json()["auth_token"]
        answer = self.client.get("/auth/sessions", headers=bearer(token))
        ip: str | None = next(
            session["ip"] for session in answer.get_json()["data"]["sessions"] if session["current"]
        )
        return ip

    def assert_addresses(self, expected: dict[str, str]) -> None:
        """Check the address that each X-Forwarded-For leads to."""
        for forwarded, ip in expected.items():
            with self.subTest(forwarded):
                self.assertEqual(ip, self.address(forwarded))


class TestNoProxy(ProxyTestCase):
    """No trusted proxy, which is the default."""

    def test_headers_are_not_trusted(self) -> None:
        """The address is the peer's, whatever the headers say."""
        self.assertEqual(PEER, self.address("192.0.2.1"))
        for name in ("Forwarded", "X-Real-IP", "Client-IP", "X-Client-IP", "True-Client-IP"):
            with self.subTest(name):
                value = "for=192.0.2.1" if name == "Forwarded" else "192.0.2.1"
                self.assertEqual(PEER, self.address(**{name: value}))

    def test_peer(self) -> None:
        """The peer's address is stored in one spelling; a socket without an address stores none."""
        self.assertEqual("192.0.2.7", self.address(peer="::ffff:192.0.2.7"))
        self.assertIsNone(self.address("192.0.2.1", peer=""))


class TestOneProxy(ProxyTestCase):
    """One trusted proxy, which appends the address of its client."""

    hops = "1"

    def test_address(self) -> None:
        """The rightmost entry is the client's address."""
        self.assert_addresses(
            {
                "192.0.2.1": "192.0.2.1",
                "  192.0.2.1\t": "192.0.2.1",
                "192.0.2.1:5000": "192.0.2.1",
                "2001:DB8::1": "2001:db8::1",
                "[2001:db8::1]": "2001:db8::1",
                "[2001:db8::1]:5000": "2001:db8::1",
                "::ffff:192.0.2.1": "192.0.2.1",
            }
        )

    def test_spoofed_entries(self) -> None:
        """Entries left of the trusted one have no effect, whatever their content or length."""
        for spoofed in (
            "203.0.113.9",
            "203.0.113.9, 203.0.113.8",
            "203.0.113.9,,,",
            '"',
            '203.0.113.9, "x',
            '"203.0.113.9\\',
            "for=203.0.113.9;",
            "[203.0.113.9",
            "é",
            "," * 5_000,
        ):
            with self.subTest(spoofed[:20]):
                self.assertEqual("192.0.2.1", self.address(f"{spoofed}, 192.0.2.1"))

    def test_several_headers(self) -> None:
        """The last of several headers has the trusted entry."""
        self.assertEqual("192.0.2.1", self.address("203.0.113.9", "192.0.2.1"))

    def test_garbage_in_the_trusted_entry(self) -> None:
        """When the trusted entry is no address, the peer's address is used."""
        for garbage in ("", "unknown", "203.0.113.9,", "203.0.113.9, unix:", "1.2.3", "fe80::1%x"):
            with self.subTest(garbage):
                self.assertEqual(PEER, self.address(garbage))
        self.assertIsNone(self.address("unknown", peer=""))

    def test_no_header(self) -> None:
        """Without X-Forwarded-For the peer's address is used, and no other header is read."""
        self.assertEqual(PEER, self.address())
        self.assertEqual(PEER, self.address(**{"X-Real-IP": "192.0.2.1", "Forwarded": "for=::1"}))

    def test_only_address_and_scheme(self) -> None:
        """Host, port and prefix are not taken from headers."""
        lines = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Prefix": "/auth"}
        answer = self.client.get("/status", headers=lines | {"X-Forwarded-Port": "1"})

        self.assertEqual(404, answer.status_code)


class TestTwoProxies(ProxyTestCase):
    """Two trusted proxies in a row."""

    hops = "2"

    def test_address(self) -> None:
        """The second entry from the right is the client's, across all headers."""
        self.assert_addresses(
            {
                "192.0.2.1, 10.0.0.2": "192.0.2.1",
                "203.0.113.9, 192.0.2.1, 10.0.0.2": "192.0.2.1",
                '203.0.113.9, 203.0.113.8, ", 192.0.2.1, 10.0.0.2': "192.0.2.1",
                "192.0.2.1, ": "192.0.2.1",
                "192.0.2.1, garbage": "192.0.2.1",
            }
        )
        self.assertEqual("192.0.2.1", self.address("203.0.113.9", "192.0.2.1", "10.0.0.2"))
        self.assertEqual("192.0.2.1", self.address("203.0.113.9", "192.0.2.1, 10.0.0.2"))

    def test_fewer_entries_than_proxies(self) -> None:
        """With fewer entries than proxies the peer's address is used."""
        self.assert_addresses({"192.0.2.1": PEER, "": PEER, ", 192.0.2.1": PEER})
