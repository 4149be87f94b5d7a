"""Encryption of stored secrets: only the right key and context decrypt one, unchanged."""

import unittest

from hypothesis import given, settings
from hypothesis.strategies import binary, text

from project.lib import encryption

SECRET, CONTEXT = b"a private key", "kid"
OLD, NEW = "old key. " * 4, "new key. " * 4


class TestEncryption(unittest.TestCase):
    """Pure functions of bytes and keys."""

    def assert_fails(self, encrypted: bytes, context: str = CONTEXT, *keys: str) -> None:
        """Check that nothing is decrypted."""
        with self.assertRaises(encryption.DecryptionFailed):
            encryption.decrypt(encrypted, context, keys or (OLD,))

    @settings(deadline=None)
    @given(binary(max_size=300), text(max_size=50), text(max_size=50))
    def test_round_trip(self, secret: bytes, context: str, key: str) -> None:
        """A secret is decrypted with the key and context that it was encrypted with."""
        encrypted = encryption.encrypt(secret, context, (key,))

        self.assertEqual(secret, encryption.decrypt(encrypted, context, (key,)))
        self.assertEqual(len(secret) + encryption.NONCE_BYTES + 16, len(encrypted))

    def test_not_in_clear(self) -> None:
        """Neither the secret nor the key is in the encrypted secret, which differs each time."""
        first, second = (encryption.encrypt(SECRET, CONTEXT, (OLD,)) for _ in range(2))

        for clear in (SECRET, OLD.encode(), CONTEXT.encode()):
            self.assertNotIn(clear, first)
        nonce = slice(encryption.NONCE_BYTES)
        self.assertNotEqual(first[nonce], second[nonce])
        self.assertNotEqual(first[encryption.NONCE_BYTES :], second[encryption.NONCE_BYTES :])

    def test_several_keys(self) -> None:
        """The first key encrypts, and every key decrypts."""
        before = encryption.encrypt(SECRET, CONTEXT, (OLD,))
        after = encryption.encrypt(SECRET, CONTEXT, (NEW, OLD))

        for keys in ((NEW, OLD), (OLD, NEW)):
            for encrypted in (before, after):
                self.assertEqual(SECRET, encryption.decrypt(encrypted, CONTEXT, keys))
        self.assertEqual(SECRET, encryption.decrypt(after, CONTEXT, (NEW,)))
        self.assert_fails(after, CONTEXT, OLD)
        self.assert_fails(before, CONTEXT, NEW)

    def test_can_decrypt(self) -> None:
        """Whether a secret can be decrypted depends on all keys, and on the context."""
        encrypted = encryption.encrypt(SECRET, CONTEXT, (OLD,))

        for keys, expected in (((OLD,), True), ((NEW, OLD), True), ((NEW,), False), ((), False)):
            with self.subTest(keys):
                self.assertIs(expected, encryption.can_decrypt(encrypted, CONTEXT, keys))
        self.assertIs(False, encryption.can_decrypt(encrypted, "another", (OLD,)))
        self.assertIs(False, encryption.can_decrypt(encrypted[:-1], CONTEXT, (OLD,)))
        self.assertIs(False, encryption.can_decrypt(b"", CONTEXT, (OLD,)))

    def test_other_keys(self) -> None:
        """A key that resembles the right one decrypts nothing, and neither does no key."""
        encrypted = encryption.encrypt(SECRET, CONTEXT, (OLD,))

        for key in (OLD[:-1], OLD.upper(), f"{OLD}\n", ""):
            with self.subTest(key):
                self.assert_fails(encrypted, CONTEXT, key)
        with self.assertRaises(encryption.DecryptionFailed):
            encryption.decrypt(encrypted, CONTEXT, ())

    def test_other_context(self) -> None:
        """A secret is bound to its context."""
        encrypted = encryption.encrypt(SECRET, CONTEXT, (OLD,))

        for context in ("", "Kid", "kid ", "kidkid"):
            with self.subTest(context):
                self.assert_fails(encrypted, context)

    def test_changed(self) -> None:
        """A secret of which a bit was changed, or that was shortened, is not decrypted."""
        encrypted = encryption.encrypt(SECRET, CONTEXT, (OLD,))

        for position in range(len(encrypted)):
            changed = bytearray(encrypted)
            changed[position] ^= 1
            self.assert_fails(bytes(changed))
            self.assert_fails(encrypted[:position])
        self.assert_fails(encrypted + b"\0")

    def test_format(self) -> None:
        """Secrets that an earlier release has encrypted are decrypted."""
        encrypted = bytes.fromhex(
            "82f1465b086ec55a7465e9da685ac3a6a9b4d6dcfde23a308146d4d52720c57e864c3bf40c3d31b909"
        )

        self.assertEqual(SECRET, encryption.decrypt(encrypted, CONTEXT, (OLD,)))
