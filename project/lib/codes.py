"""One-time codes: those of an authenticator (TOTP, RFC 6238), and recovery codes.

The functions are pure, except that they make random secrets. A code of an authenticator has six
digits and belongs to a time step of 30 seconds; the HMAC is that of SHA-1, the only one that all
authenticators support. A recovery code has 120 random bits in base32.
"""

import base64
import hashlib
import hmac
import os
import re
from datetime import datetime

import pyotp

TOTP_DIGITS = 6
_STEP = 30  # seconds
RECOVERY_BYTES = 15
_RECOVERY_LENGTH = RECOVERY_BYTES * 8 // 5  # characters of base32
_GROUP = 4  # characters of a recovery code between two hyphens
_CODE = re.compile(rf"[0-9]{{{TOTP_DIGITS}}}|[A-Z2-7]{{{_RECOVERY_LENGTH}}}")
_SEPARATORS = str.maketrans("", "", " -")


def parse(text: str) -> str:
    """Return a code in the form that the other functions take; raise ValueError if it is none.

    Blanks and hyphens in it are ignored, and so is the case of a recovery code.
    """
    code = text.translate(_SEPARATORS).upper()
    if not text.isascii() or not _CODE.fullmatch(code):
        raise ValueError("not a code")
    return code


def is_totp(code: str) -> bool:
    """Return whether a code is one of an authenticator; otherwise it is a recovery code."""
    return len(code) == TOTP_DIGITS


def new_secret() -> str:
    """Return a random secret of 160 bits in base32 (RFC 4648), as authenticators take it."""
    return pyotp.random_base32()


def uri(secret: str, account: str, service: str) -> str:
    """Return the URI of a secret that authenticators read from a QR code.

    https://github.com/google/google-authenticator/wiki/Key-Uri-Format
    """
    return pyotp.TOTP(secret).provisioning_uri(name=account, issuer_name=service)


def present_step(now: datetime) -> int:
    """Return the number of the time step at `now`."""
    return int(now.timestamp()) // _STEP


def step_of(code: str, secret: str, now: datetime) -> int | None:
    """Return the time step of a code, which is the present one or the one before, or None.

    The step before is for clocks that are late, and people who type slowly (RFC 6238, 5.2).
    """
    totp = pyotp.TOTP(secret)
    present = present_step(now)
    for step in (present, present - 1):
        if hmac.compare_digest(totp.generate_otp(step), code):
            return step
    return None


def new_recovery_code() -> str:
    """Return a random recovery code, as `parse` returns it."""
    return base64.b32encode(os.urandom(RECOVERY_BYTES)).decode()


def grouped(code: str) -> str:
    """Return a recovery code as people read it, with hyphens."""
    starts = range(0, len(code), _GROUP)
    return "-".join(code[start : start + _GROUP] for start in starts)


def hash_of(code: str) -> str:
    """Return the SHA-256 of a recovery code, in hexadecimal."""
    return hashlib.sha256(code.encode()).hexdigest()
