"""The IDs of rows, as they appear in paths and tokens.

Each row has exactly one valid text, and no other text reaches the database.
"""

import re
import secrets

MAX_ID = 2**31 - 1
SESSION_LENGTH = 22  # characters: 128 random bits in base64url
MAX_EVENT_ID = 2**63 - 1
_CANONICAL = re.compile(r"[1-9][0-9]{0,18}")
_SESSION = re.compile(rf"[A-Za-z0-9_-]{{{SESSION_LENGTH}}}")


def parse(text: object, maximum: int = MAX_ID) -> int:
    """Return the ID in `text`.

    An ID is a positive integer up to `maximum`, in ASCII digits without a leading zero. Raises
    ValueError for everything else.
    """
    if not isinstance(text, str) or not _CANONICAL.fullmatch(text) or int(text) > maximum:
        raise ValueError("not the canonical decimal of an id")
    return int(text)


def new_session() -> str:
    """Return a random ID for a session."""
    return secrets.token_urlsafe(SESSION_LENGTH * 6 // 8)


def parse_session(text: object) -> str:
    """Return `text` if it has the form of a session ID; raises ValueError otherwise."""
    if not isinstance(text, str) or not _SESSION.fullmatch(text):
        raise ValueError("not the id of a session")
    return text
