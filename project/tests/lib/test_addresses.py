"""Addresses: parsing, canonical spelling, and the network that they count as."""

import unittest

from hypothesis import given
from hypothesis.strategies import ip_addresses, text

from project.lib import addresses

NO_ADDRESS = [
    "",
    " ",
    "unknown",
    "_hidden",
    "unix:",
    "localhost",
    "192.0.2",
    "192.0.2.256",
    "192.0.2.01",
    "192.0.2.1.",
    "192.0.2.1:",
    "192.0.2.1:http",
    "192.0.2.1/24",
    "192.0.2.1 192.0.2.2",
    "3221225985",
    "0xc0000201",
    "١٩٢.0.2.1",
    "[192.0.2.1]",
    "[192.0.2.1:80]",
    "[2001:db8::1",
    "2001:db8::1]",
    "[[2001:db8::1]]",
    "2001:db8::1::2",
    "2001:db8::g",
    "fe80::1%eth0",
    "fe80::1%\nforged log line",
    "::1%",
    '"192.0.2.1"',
    "192.0.2.1\n",
    "192.0.2.1\0",
]


class TestAddresses(unittest.TestCase):
    """Pure functions of text."""

    def test_parse(self) -> None:
        """An address has one spelling, with or without a port, brackets or blanks."""
        for given_, expected in {
            "192.0.2.1": "192.0.2.1",
            "\t 192.0.2.1 ": "192.0.2.1",
            "192.0.2.1:5000": "192.0.2.1",
            "2001:DB8:0:0::0001": "2001:db8::1",
            "[2001:db8::1]": "2001:db8::1",
            "[2001:db8::1]:5000": "2001:db8::1",
            "::ffff:192.0.2.1": "192.0.2.1",
            "::FFFF:c000:201": "192.0.2.1",
            "[::ffff:192.0.2.1]:5000": "192.0.2.1",
            "::1": "::1",
        }.items():
            with self.subTest(given_):
                self.assertEqual(expected, addresses.parse(given_))

    def test_no_address(self) -> None:
        """Other text is no address, and all such text counts together."""
        for garbage in NO_ADDRESS:
            with self.subTest(garbage):
                self.assertIsNone(addresses.parse(garbage))
                self.assertEqual("", addresses.network(garbage))

    def test_network(self) -> None:
        """IPv4 counts per address, IPv6 per /64, and IPv4 mapped into IPv6 as IPv4."""
        for ip, expected in {
            "192.0.2.1": "192.0.2.1",
            "192.0.2.2": "192.0.2.2",
            "::ffff:192.0.2.1": "192.0.2.1",
            "2001:db8:1:2::1": "2001:db8:1:2::/64",
            "2001:db8:1:2:ffff:ffff:ffff:ffff": "2001:db8:1:2::/64",
            "2001:db8:1:3::1": "2001:db8:1:3::/64",
            "::1": "::/64",
        }.items():
            with self.subTest(ip):
                self.assertEqual(expected, addresses.network(ip))

    @given(ip_addresses())
    def test_every_address(self, ip: object) -> None:
        """A parsed address parses to itself and counts as the same network."""
        parsed = addresses.parse(str(ip))

        self.assertIsNotNone(parsed)
        self.assertEqual(parsed, addresses.parse(parsed or ""))
        self.assertEqual(addresses.network(str(ip)), addresses.network(parsed or ""))

    @given(text())
    def test_any_text(self, garbage: str) -> None:
        """No text raises an error or gives a longer result than an address."""
        self.assertLessEqual(len(addresses.parse(garbage) or ""), 39)
        self.assertLessEqual(len(addresses.network(garbage)), 43)
