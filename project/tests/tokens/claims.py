"""The parts of a token, read without verifying the signature."""

import base64
import json
from typing import Any


def encode(part: object) -> str:
    """Return JSON (or a text as it is) in base64url without padding."""
    text = part if isinstance(part, str) else json.dumps(part, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode(part: str) -> Any:
    """Return the JSON value in one part of a token."""
    return json.loads(base64.urlsafe_b64decode(part + "=="))


def claims_of(token: str) -> dict[str, Any]:
    """Return the claims of a token."""
    claims: dict[str, Any] = decode(token.split(".")[1])
    return claims


def session_of(token: str) -> str:
    """Return the ID of the session that a token names."""
    return str(claims_of(token)["sid"])
