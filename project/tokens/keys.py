"""What tokens are signed and verified with, from the settings."""

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


def issuer() -> str | None:
    """Return the name of the service as an issuer, or None if only it verifies its tokens."""
    name: str | None = current_app.config["ISSUER"]
    return name


def audience() -> str:
    """Return the `aud` of auth tokens that other services verify."""
    return str(current_app.config["TOKEN_AUDIENCE"] or current_app.config["ISSUER"])
