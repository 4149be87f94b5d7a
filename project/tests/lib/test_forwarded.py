"""The client's address and scheme, behind proxies and without."""

import os
from typing import Any
from unittest import mock

from werkzeug.datastructures import Headers

from project.tests.base import BaseTestCase, bearer

PEER = "10.0.0.1"  # the proxy that is next to the service, or nobody's
CREDENTIALS = {"email": "test@test.com", "password": "test"}


class ProxyTestCase(BaseTestCase):
    """A test of a service behind as many proxies as `hops` says."""

    hops = ""

    def setUp(self) -> None:
        """Make the application with TRUSTED_PROXIES set, and register a user."""
        with mock.patch.dict(os.environ, TRUSTED_PROXIES=self.hops):
            super().setUp()
        self.register()

    def address(self, *forwarded: str, peer: str = PEER, **headers: str) -> str | None:
        """Return the `ip` of the session that a login with these X-Forwarded-For headers starts."""
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
        """Check which address each X-Forwarded-For comes to."""
        for forwarded, ip in expected.items():
            with self.subTest(forwarded):
                self.assertEqual(ip, self.address(forwarded))


class TestNoProxy(ProxyTestCase):
    """Nobody in front: the default."""

    def test_nothing_is_believed(self) -> None:
        """The address is the peer's, whatever a header of the request says."""
        self.assertEqual(PEER, self.address("192.0.2.1"))
        for name in ("Forwarded", "X-Real-IP", "Client-IP", "X-Client-IP", "True-Client-IP"):
            with self.subTest(name):
                value = "for=192.0.2.1" if name == "Forwarded" else "192.0.2.1"
                self.assertEqual(PEER, self.address(**{name: value}))

    def test_peer(self) -> None:
        """The peer's own address is kept in one spelling; a socket that has none keeps none."""
        self.assertEqual("192.0.2.7", self.address(peer="::ffff:192.0.2.7"))
        self.assertIsNone(self.address("192.0.2.1", peer=""))


class TestOneProxy(ProxyTestCase):
    """One proxy, which adds the address it was called from on the right."""

    hops = "1"

    def test_address(self) -> None:
        """The rightmost entry is the client's."""
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

    def test_what_the_client_wrote(self) -> None:
        """Nothing left of the trusted entry changes it: no address, comma, quotation or length."""
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
        """A proxy that adds a header line of its own has the last word too."""
        self.assertEqual("192.0.2.1", self.address("203.0.113.9", "192.0.2.1"))

    def test_garbage_in_the_trusted_place(self) -> None:
        """What is no address is not taken for one: the address is the peer's, which is known."""
        for garbage in ("", "unknown", "203.0.113.9,", "203.0.113.9, unix:", "1.2.3", "fe80::1%x"):
            with self.subTest(garbage):
                self.assertEqual(PEER, self.address(garbage))
        self.assertIsNone(self.address("unknown", peer=""))

    def test_no_header(self) -> None:
        """A request that came past the proxy has its own address, and no other header gives it."""
        self.assertEqual(PEER, self.address())
        self.assertEqual(PEER, self.address(**{"X-Real-IP": "192.0.2.1", "Forwarded": "for=::1"}))

    def test_only_address_and_scheme(self) -> None:
        """Neither host, port nor prefix is taken from a header."""
        lines = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Prefix": "/auth"}
        answer = self.client.get("/status", headers=lines | {"X-Forwarded-Port": "1"})

        self.assertEqual(404, answer.status_code)


class TestTwoProxies(ProxyTestCase):
    """Two proxies, one behind the other."""

    hops = "2"

    def test_address(self) -> None:
        """The entry is the second from the right, over however many headers."""
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
        """Who came past a proxy is believed nothing: the address is the peer's."""
        self.assert_addresses({"192.0.2.1": PEER, "": PEER, ", 192.0.2.1": PEER})
