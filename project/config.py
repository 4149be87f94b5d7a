"""The settings: the environment, cast and checked once, when the application is made."""

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    computed_field,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from project.errors import ConfigurationError

INSTANCE = Path(__file__).resolve().parent.parent / "instance"
DEFAULT_SETTINGS = "project.config.DevelopmentConfig"

DAY = 86_400  # seconds
MIN_SECRET_KEY_BYTES = 32
# Keys that stand in tutorials, documentation and examples: everybody knows them.
_WELL_KNOWN_KEYS = re.compile(
    r"""(change|replace)[-_ ]?(me|this|it)|my[-_ ]?(precious|secret)|your[-_ ]?(secret|key|256)|
        (super|top|very)[-_ ]?secret|secret[-_ ]?key|a-string-secret|django-insecure|
        example|password|development|
        192b9bdd22ab9ed4d12e236c78afcb9a393ec15f71bbf5dc987d54727823bcbf|
        5f352379324c22463451387a0aec5d2f|
        09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7""",
    re.IGNORECASE | re.VERBOSE,
)
_MIN_DISTINCT_CHARACTERS = 8
MAX_FALLBACKS = 5  # keys that a forgery is tried with, one after the other
_ORIGIN = re.compile(
    r"(?!http:.*:80$|https:.*:443$)"
    r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?"
)
_NEVER_SHOWN = {"SECRET_KEY", "SECRET_KEY_FALLBACKS", "DATABASE_URL", "DATABASE_TEST_URL"}


def database_url(text: str) -> str:
    """Return the URL with its driver spelled out: plain PostgreSQL means psycopg2."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError("is not a database URL") from None
    if url.drivername in {"postgres", "postgresql"}:
        url = url.set(drivername="postgresql+psycopg2")
    if url.drivername not in {"postgresql+psycopg2", "sqlite"}:
        raise ValueError("must start with postgresql:// or sqlite:///")
    if url.drivername == "sqlite" and url.database in {None, "", ":memory:"}:
        raise ValueError("must name a file: a database in memory is another one per connection")
    return url.render_as_string(hide_password=False)


DatabaseUrl = Annotated[str, AfterValidator(database_url)]


def _embedded(filename: str) -> str:
    """Return the URL of an SQLite database in the instance folder, which is made."""
    _make_instance_folder()
    return f"sqlite:///{INSTANCE / filename}"


def _make_instance_folder() -> None:
    try:
        INSTANCE.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"Configuration error: the folder {INSTANCE} cannot be made ({error.strerror});"
            " set DATABASE_URL and SECRET_KEY to do without it"
        ) from None


def _development_key() -> str:
    """Return the random key in the instance folder; the first to ask makes it.

    The link is what decides between processes that start together: it appears whole or not at all.
    """
    _make_instance_folder()
    path = INSTANCE / "secret_key"
    if not path.exists():
        draft = path.with_name(f"secret_key.{secrets.token_hex(8)}")
        draft.touch(mode=0o600, exist_ok=False)
        draft.write_text(secrets.token_hex(32), encoding="ascii")
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    key = path.read_text(encoding="ascii").strip()
    if not key:
        raise ConfigurationError(f"Configuration error: {path} is empty; remove it")
    return key


def strong_key(key: str) -> str:
    """Return `key` if nobody could guess it; the complaint never shows it."""
    if len(key.encode()) < MIN_SECRET_KEY_BYTES:
        raise ValueError(f"is shorter than {MIN_SECRET_KEY_BYTES} bytes")
    if _WELL_KNOWN_KEYS.search(key) or len(set(key)) < _MIN_DISTINCT_CHARACTERS:
        raise ValueError("is a well-known or trivial key; make a random one")
    return key


def _keys(text: object) -> object:
    """Return the keys of a comma-separated list, each to the letter; complaints show none."""
    if not isinstance(text, str):
        return text
    keys = text.split(",")
    if re.search(r"\s,|,\s", text):
        raise ValueError("has a blank beside a comma: keys are taken to the letter")
    if not all(keys):
        raise ValueError("has an empty key in it")
    if len(set(keys)) < len(keys):
        raise ValueError("has a key in it twice")
    if len(keys) > MAX_FALLBACKS:
        raise ValueError(f"has more than {MAX_FALLBACKS} keys in it")
    return tuple(keys)


def _strong_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return `keys` if nobody could guess any of them; the complaint says which is weak."""
    for number, key in enumerate(keys, 1):
        try:
            strong_key(key)
        except ValueError as error:
            raise ValueError(f"has a weak key in it: number {number} {error}") from None
    return keys


def _origins(text: object) -> object:
    """Return the origins of a comma-separated list, each as a browser sends it (RFC 6454, 6.2)."""
    if not isinstance(text, str):
        return text
    origins = frozenset(origin.strip() for origin in text.split(","))
    for origin in sorted(origins - {"*"}):
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{origin!r} is no origin as browsers send it:"
                " scheme://host or scheme://host:port, in lower case, without a default port"
            )
    return origins


def _named(origins: frozenset[str]) -> frozenset[str]:
    """Return `origins` if each is named."""
    if "*" in origins:
        raise ValueError("lets the pages of every origin in; name those that may")
    return origins


Keys = Annotated[tuple[str, ...], BeforeValidator(_keys)]
Origins = Annotated[frozenset[str], BeforeValidator(_origins)]


class BaseConfig(BaseModel):
    """What every environment has in common; a field is read from the variable of its name."""

    model_config = ConfigDict(extra="ignore", frozen=True, validate_default=True)

    DEBUG: ClassVar[bool] = False
    TESTING: ClassVar[bool] = False
    # Every byte of a password counts: see project/passwords.py.
    BCRYPT_HANDLE_LONG_PASSWORDS: ClassVar[bool] = True
    MAX_CONTENT_LENGTH: ClassVar[int] = 64 * 1024

    SECRET_KEY: Annotated[str, AfterValidator(strong_key)] = Field(
        description="signs the tokens; at least 32 bytes in production"
    )
    SECRET_KEY_FALLBACKS: Annotated[Keys, AfterValidator(_strong_keys)] = Field(
        (), description="keys that tokens may be signed with too, comma-separated"
    )
    SQLALCHEMY_DATABASE_URI: DatabaseUrl = Field(
        validation_alias="DATABASE_URL",
        description="where the data is; an SQLite file in instance/ when none is given",
    )
    TOKEN_EXPIRATION_DAYS: int = Field(30, ge=0, le=36_500, description="a token's life, days")
    TOKEN_EXPIRATION_SECONDS: int = Field(
        0, ge=0, le=86_400 * 366, description="and these seconds on top"
    )
    REFRESH_EXPIRATION_SECONDS: int = Field(
        30 * DAY, ge=1, le=36_500 * DAY, description="a refresh token's life"
    )
    SESSION_EXPIRATION_SECONDS: int = Field(
        90 * DAY, ge=1, le=36_500 * DAY, description="a session's life, however often refreshed"
    )
    BCRYPT_LOG_ROUNDS: int = Field(13, ge=4, le=31, description="cost of a password's hash, log2")
    BCRYPT_THREADS: int | None = Field(
        None, ge=1, le=64, description="hashes at once per process; its share of the cores if unset"
    )
    PASSWORD_MIN_LENGTH: int = Field(
        12, ge=1, le=64, description="characters of a new password; with 1, every password will do"
    )
    BODY_TIMEOUT: int = Field(
        30, ge=1, le=3_600, description="seconds of silence in the middle of a body"
    )
    TRUSTED_PROXIES: int = Field(
        0, ge=0, le=10, description="proxies in front that each add to X-Forwarded-For"
    )
    FORCE_HTTPS: bool = Field(False, description="whether a request in the clear is refused")
    CORS_ORIGINS: Annotated[Origins, AfterValidator(_named)] = Field(
        frozenset(), description="origins whose pages may read the answers, comma-separated"
    )
    API_DOCS: bool = Field(False, description="whether /docs shows the document of the API")
    USERS_API_OPEN: bool = Field(False, description="whether /users answers without a token")
    RATE_LIMITS: bool = Field(True, description="whether attempts are counted and limited")
    LOGIN_FAILURES_PER_ACCOUNT: int = Field(
        10, ge=1, le=10_000, description="wrong passwords before an account is paused"
    )
    LOGIN_PAUSE_SECONDS: int = Field(
        60, ge=1, le=3_600, description="the first pause; each doubles"
    )
    LOGIN_PAUSE_MAX_SECONDS: int = Field(900, ge=1, le=86_400, description="the longest pause")
    LOGIN_FAILURES_PER_ADDRESS: int = Field(
        100, ge=1, le=1_000_000, description="failures an hour before an address is paused"
    )
    REGISTRATIONS_PER_ADDRESS: int = Field(20, ge=1, le=1_000_000, description="an hour")
    KNOWN_ADDRESS_DAYS: int = Field(
        30, ge=0, le=3_650, description="since a login, in which an address is its user's own"
    )
    EVENTS_DAYS: int = Field(90, ge=1, le=36_500, description="for which the audit trail is kept")
    METRICS_PORT: int | None = Field(
        None, ge=1, le=65_535, description="where `serve` shows figures for Prometheus, /metrics"
    )
    GRANIAN_WORKERS: int = Field(2, ge=1, le=256, description="server processes")
    GRANIAN_BLOCKING_THREADS: int = Field(16, ge=2, le=256, description="threads in each of them")

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def EMBEDDED_DATABASE(self) -> bool:  # noqa: N802  # a setting
        """Whether nobody named a database, so that the service keeps its own."""
        return "SQLALCHEMY_DATABASE_URI" not in self.model_fields_set

    @field_validator("SECRET_KEY_FALLBACKS")
    @classmethod
    def _check_fallbacks(cls, keys: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if info.data.get("SECRET_KEY") in keys:
            raise ValueError("has the SECRET_KEY itself in it")
        return keys

    @model_validator(mode="after")
    def _check_lifetimes(self) -> Self:
        access = self.TOKEN_EXPIRATION_DAYS * DAY + self.TOKEN_EXPIRATION_SECONDS
        if not access:
            raise ValueError(
                "TOKEN_EXPIRATION_DAYS and TOKEN_EXPIRATION_SECONDS are both 0:"
                " no token would ever be valid"
            )
        longest = max(access, self.REFRESH_EXPIRATION_SECONDS)
        if longest > self.SESSION_EXPIRATION_SECONDS:
            raise ValueError(
                f"SESSION_EXPIRATION_SECONDS={self.SESSION_EXPIRATION_SECONDS}:"
                f" is shorter than the life of a token ({longest})"
            )
        return self

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Return the settings that `environment` holds; a blank variable counts as not set.

        Raises ConfigurationError, one line that names each variable that is missing or wrong
        (and its value, unless that is a secret).
        """
        given = {name: value for name, value in environment.items() if value.strip()}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            complaints = [_complaint(detail) for detail in error.errors()]
            raise ConfigurationError(
                f"Configuration error: {'; '.join(complaints)}", complaints=complaints
            ) from None


def _complaint(detail: ErrorDetails) -> str:
    """Say in one clause which variable is wrong, with which value, and why."""
    reason = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return reason
    name = str(detail["loc"][0])
    if detail["type"] == "missing":
        return f"{name} is missing"
    if name in _NEVER_SHOWN:
        return f"{name} {reason}"
    return f"{name}={detail['input']!r}: {reason}"


class DevelopmentConfig(BaseConfig):
    """On a developer's machine: nothing has to be set."""

    DEBUG: ClassVar[bool] = True

    SECRET_KEY: str = Field(default_factory=_development_key)
    SECRET_KEY_FALLBACKS: Keys = ()
    SQLALCHEMY_DATABASE_URI: DatabaseUrl = Field(
        default_factory=lambda: _embedded("users.db"), validation_alias="DATABASE_URL"
    )
    BCRYPT_LOG_ROUNDS: int = Field(4, ge=4, le=31)
    PASSWORD_MIN_LENGTH: int = Field(1, ge=1, le=64)
    CORS_ORIGINS: Origins = frozenset()
    API_DOCS: bool = True
    USERS_API_OPEN: bool = True
    # Mild: what one developer's programs do is no attack.
    LOGIN_FAILURES_PER_ACCOUNT: int = Field(100, ge=1, le=10_000)
    LOGIN_FAILURES_PER_ADDRESS: int = Field(1_000, ge=1, le=1_000_000)
    REGISTRATIONS_PER_ADDRESS: int = Field(1_000, ge=1, le=1_000_000)


class TestingConfig(BaseConfig):
    """Under test: a database of its own, any key, tokens of three seconds."""

    DEBUG: ClassVar[bool] = True
    TESTING: ClassVar[bool] = True

    SECRET_KEY: str = Field(default_factory=lambda: secrets.token_hex(32))
    SECRET_KEY_FALLBACKS: Keys = ()
    SQLALCHEMY_DATABASE_URI: DatabaseUrl = Field(
        default_factory=lambda: _embedded("users_test.db"), validation_alias="DATABASE_TEST_URL"
    )
    TOKEN_EXPIRATION_DAYS: int = Field(0, ge=0, le=36_500)
    TOKEN_EXPIRATION_SECONDS: int = Field(3, ge=0, le=86_400 * 366)
    BCRYPT_LOG_ROUNDS: int = Field(4, ge=4, le=31)
    PASSWORD_MIN_LENGTH: int = Field(1, ge=1, le=64)
    CORS_ORIGINS: Origins = frozenset()
    API_DOCS: bool = True
    USERS_API_OPEN: bool = True
    RATE_LIMITS: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """As everywhere; and never on the database that DATABASE_URL names: tests erase theirs."""
        url = environment.get("DATABASE_TEST_URL", "").strip()
        if url and url == environment.get("DATABASE_URL", "").strip():
            raise ConfigurationError(
                "Configuration error: DATABASE_TEST_URL and DATABASE_URL are the same database,"
                " and tests erase the one they run on"
            )
        return super().from_environment(environment)


class ProductionConfig(BaseConfig):
    """In front of real people: no secret and no database is ever assumed."""
