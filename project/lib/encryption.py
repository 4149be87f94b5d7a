"""Encryption of secrets that are stored: AES-256-GCM (NIST SP 800-38D).

Keys are texts that the operator makes. The first of several encrypts, and all decrypt, so that a
key can be replaced while the service runs. The context is authenticated, not encrypted: a secret
that is copied to another row cannot be decrypted there.
"""

import os
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

NONCE_BYTES = 12


class DecryptionFailed(Exception):
    """No key decrypts the secret: it was encrypted with another key, or for another context."""


def encrypt(secret: bytes, context: str, keys: tuple[str, ...]) -> bytes:
    """Return the encrypted secret: a random nonce, the ciphertext and its tag."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + _cipher(keys[0]).encrypt(nonce, secret, context.encode())


def decrypt(encrypted: bytes, context: str, keys: tuple[str, ...]) -> bytes:
    """Return the secret that one of `keys` has encrypted; raise DecryptionFailed."""
    nonce, ciphertext = encrypted[:NONCE_BYTES], encrypted[NONCE_BYTES:]
    for key in keys:
        try:
            return _cipher(key).decrypt(nonce, ciphertext, context.encode())
        except (InvalidTag, ValueError):  # ValueError: too short for a nonce
            continue
    raise DecryptionFailed


def can_decrypt(encrypted: bytes, context: str, keys: tuple[str, ...]) -> bool:
    """Return whether one of `keys` decrypts the secret."""
    try:
        decrypt(encrypted, context, keys)
    except DecryptionFailed:
        return False
    return True


@lru_cache
def _cipher(key: str) -> AESGCM:
    """Return the cipher for a key, from which HKDF (RFC 5869) derives the 256 bits of AES."""
    derived = HKDF(SHA256(), length=32, salt=None, info=b"encryption of stored secrets")
    return AESGCM(derived.derive(key.encode()))
