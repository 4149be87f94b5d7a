"""The keys that sign and verify tokens, and the lifetime of an auth token, as configured."""

from flask import current_app

from project.config import DAY


def signing_key() -> str:
    """Return the key that signs every new token."""
    return str(current_app.config["SECRET_KEY"])


def verification_keys() -> tuple[str, ...]:
    """Return the keys that a token may be signed with: the signing key, then the fallbacks."""
    return signing_key(), *current_app.config["SECRET_KEY_FALLBACKS"]


def auth_token_lifetime() -> int:
    """Return the lifetime of an auth token, in seconds."""
    config = current_app.config
    return int(config["TOKEN_EXPIRATION_DAYS"] * DAY + config["TOKEN_EXPIRATION_SECONDS"])
