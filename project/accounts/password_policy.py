"""Which passwords are worth having (NIST SP 800-63B-4, 3.1.1.2; OWASP ASVS 5.0, 6.2).

Long enough, not one that everybody tries, not the user's own name. Which characters a password is
made of is nobody's business.
"""

import gzip
import unicodedata
from functools import cache
from pathlib import Path

from project.errors import InvalidPayload

COMMON_PASSWORDS = Path(__file__).resolve().parent / "data" / "common_passwords.txt.gz"
ANY = 1  # character: the minimum with which every password will do


def check(password: str, *, min_length: int, username: str, email: str, field: str) -> None:
    """Raise InvalidPayload for `field` unless a user of this name and email may have `password`.

    It comes in NFC, and each code point is a character. With a `min_length` of ANY, which is for
    development and tests, nothing else is asked either. Names and common passwords are compared as
    a whole and without regard to case: a long password may well have a name in it.
    """
    if min_length == ANY:
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
    """Return what two texts share that differ in case, form or blanks around them alone."""
    return unicodedata.normalize("NFKC", text).strip().casefold()


@cache
def common() -> frozenset[str]:
    """Return the common passwords, folded; read once in a process, when first asked for (5 MB)."""
    with gzip.open(COMMON_PASSWORDS, "rt", encoding="utf-8") as lines:
        return frozenset(lines.read().split("\n"))
