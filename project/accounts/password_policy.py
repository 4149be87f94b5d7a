"""The password policy (NIST SP 800-63B-4, 3.1.1.2; OWASP ASVS 5.0, 6.2).

A new password has a minimum length, is not one of the common ones, and is not the user's own name.
There are no rules about which characters it contains.
"""

import gzip
import unicodedata
from functools import cache
from pathlib import Path

from flask import current_app

from project.errors import InvalidPayload
from project.lib import hashing

COMMON_PASSWORDS = Path(__file__).resolve().parent / "data" / "common_passwords.txt.gz"
NO_POLICY = 1  # character: the minimum length with which every password is accepted


def check_new(password: str, username: str, email: str, *, field: str = "password") -> None:
    """Raise InvalidPayload for `field` unless this user may choose `password`."""
    check(
        hashing.normalize(password),
        min_length=current_app.config["PASSWORD_MIN_LENGTH"],
        username=username,
        email=email,
        field=field,
    )


def check(password: str, *, min_length: int, username: str, email: str, field: str) -> None:
    """Raise InvalidPayload for `field` unless a user of this name and email may have `password`.

    `password` is in NFC, and each code point counts as one character. A `min_length` of NO_POLICY,
    for development and tests, switches all rules off. Names and common passwords are compared as
    a whole and case is ignored: a long password may contain a name.
    """
    if min_length == NO_POLICY:
        return
    if len(password) < min_length:
        reason = f"must have at least {min_length} characters"
    elif fold(password) in {fold(name) for name in (username, email, email.partition("@")[0])}:
        reason = "must not be the username, the email or its first part"
    elif fold(password) in common():
        reason = "must not be one of the most common passwords"
    else:
        return
    raise InvalidPayload(errors={field: reason})


def fold(text: str) -> str:
    """Return the same text for texts that differ only in case, form or surrounding blanks."""
    return unicodedata.normalize("NFKC", text).strip().casefold()


@cache
def common() -> frozenset[str]:
    """Return the common passwords, folded. They are read once per process, at first use (5 MB)."""
    with gzip.open(COMMON_PASSWORDS, "rt", encoding="utf-8") as lines:
        return frozenset(lines.read().split("\n"))
