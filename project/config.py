"""The settings: read from the environment and validated once, when the application is created."""

import os
import re
import secrets
from collections.abc import Mapping
from email.utils import parseaddr
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import unquote, urlsplit

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
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from project.errors import ConfigurationError

INSTANCE = Path(__file__).resolve().parent.parent / "instance"
VERSION = "1.0.0"  # of the service and its API document
SERVICE_NAME = "users-service"  # in pg_stat_activity and in names of temporary directories
DEFAULT_SETTINGS = "project.config.DevelopmentConfig"

DAY = 86_400  # seconds
MIN_SECRET_KEY_BYTES = 32
# Keys from tutorials, documentation and examples, which attackers know.
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
MAX_ISSUER_LENGTH = 255  # it is in every token, twice if it is the audience too
MAX_FALLBACKS = 5  # each key costs another verification of an invalid token
_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]+@[A-Za-z0-9.-]+")
_ORIGIN = re.compile(
    r"(?!http:.*:80$|https:.*:443$)"
    r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?"
)
# PostgreSQL's manual, 34.1.1.2: postgresql://user:password@host1:5432,host2:5432/database
_SEVERAL_HOSTS = re.compile(
    r"(?P<before>[^/]*//([^@]*@)?)(?P<hosts>[^@/?]*,[^@/?]*)(?P<after>[^@]*)"
)
_HOST = re.compile(r"(\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[^:\[\]]+))(:(?P<port>[0-9]+))?")
_NOT_ENCODED = (
    "has a special character in user, password or options: percent-encode it (@ is %40, / is %2F)"
)
_PRINTABLE_ASCII = re.compile(r"[!-~]+")
# The variables whose values are never shown, and can be in a file: see `_with_files`.
SECRETS = (
    "SECRET_KEY",
    "SECRET_KEY_FALLBACKS",
    "ENCRYPTION_KEYS",
    "DATABASE_URL",
    "DATABASE_TEST_URL",
    "SMTP_URL",
)


def database_url(text: str) -> str:
    """Return the URL with an explicit driver, which is psycopg2 for PostgreSQL.

    Hosts that are separated by commas, as in a URL of libpq, become parameters, as SQLAlchemy wants
    them. The message of a ValueError contains no part of the URL.
    """
    if text.startswith("postgres") and text.count("@") > 1:
        raise ValueError(_NOT_ENCODED)
    try:
        url = _with_hosts(text)
        if url.drivername in {"postgres", "postgresql"}:
            url = url.set(drivername="postgresql+psycopg2")
        if url.drivername == "postgresql+psycopg2":
            url.get_dialect()().create_connect_args(url)  # checks hosts and ports
    except (ArgumentError, ValueError):
        raise ValueError("is not a database URL") from None
    if url.drivername not in {"postgresql+psycopg2", "sqlite"}:
        raise ValueError("must start with postgresql:// or sqlite:///")
    if url.drivername == "sqlite" and url.database in {None, "", ":memory:"}:
        raise ValueError("must name a file: each connection has its own in-memory database")
    if url.drivername != "sqlite" and url.username is None and "@" in text:
        raise ValueError(_NOT_ENCODED)
    return url.render_as_string(hide_password=False)


def _with_hosts(text: str) -> URL:
    """Parse the URL of a database, which may name several hosts; raises ValueError."""
    found = _SEVERAL_HOSTS.fullmatch(text)
    if not found:
        return make_url(text)
    hosts = [_HOST.fullmatch(host) for host in found["hosts"].split(",")]
    if not all(hosts):
        raise ValueError("is not a list of hosts")
    return make_url(found["before"] + found["after"]).update_query_dict(
        {
            "host": ",".join(unquote(host["v6"] or host["name"]) for host in hosts if host),
            "port": ",".join(host["port"] or "" for host in hosts if host),
        }
    )


DatabaseUrl = Annotated[str, AfterValidator(database_url)]


def _embedded(filename: str) -> str:
    """Return the URL of an SQLite database in the instance folder; creates the folder."""
    _make_instance_folder()
    return f"sqlite:///{INSTANCE / filename}"


def _make_instance_folder() -> None:
    try:
        INSTANCE.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"Configuration error: the folder {INSTANCE} cannot be created ({error.strerror});"
            " set DATABASE_URL, SECRET_KEY and ENCRYPTION_KEYS to run without it"
        ) from None


def _development_key(name: str) -> str:
    """Return the random key in a file of the instance folder; the first process creates it.

    Creating a hard link is atomic: of several processes that start together exactly one succeeds.
    """
    _make_instance_folder()
    path = INSTANCE / name
    if not path.exists():
        draft = path.with_name(f"{name}.{secrets.token_hex(8)}")
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
        raise ConfigurationError(f"Configuration error: {path} is empty; delete it")
    return key


def strong_key(key: str) -> str:
    """Return `key` if it is hard to guess; raises ValueError, without the key, if it is not."""
    if len(key.encode()) < MIN_SECRET_KEY_BYTES:
        raise ValueError(f"is shorter than {MIN_SECRET_KEY_BYTES} bytes")
    if _WELL_KNOWN_KEYS.search(key) or len(set(key)) < _MIN_DISTINCT_CHARACTERS:
        raise ValueError("is a well-known or trivial key; make a random one")
    return key


def _keys(text: object) -> object:
    """Return the keys of a comma-separated list; the message of a ValueError contains no key."""
    if not isinstance(text, str):
        return text
    keys = text.split(",")
    if re.search(r"\s,|,\s", text):
        raise ValueError("has a blank beside a comma: keys are not trimmed")
    if not all(keys):
        raise ValueError("contains an empty key")
    if len(set(keys)) < len(keys):
        raise ValueError("has a key in it twice")
    if len(keys) > MAX_FALLBACKS:
        raise ValueError(f"has more than {MAX_FALLBACKS} keys")
    return tuple(keys)


def _strong_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return `keys` if all are hard to guess; raises ValueError with the number of a weak one."""
    for number, key in enumerate(keys, 1):
        try:
            strong_key(key)
        except ValueError as error:
            raise ValueError(f"has a weak key: number {number} {error}") from None
    return keys


def _origins(text: object) -> object:
    """Return the origins of a comma-separated list, in the form of RFC 6454, 6.2."""
    if not isinstance(text, str):
        return text
    origins = frozenset(origin.strip() for origin in text.split(","))
    for origin in sorted(origins - {"*"}):
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{origin!r} is not an origin as browsers send it:"
                " scheme://host or scheme://host:port, in lower case, without a default port"
            )
    return origins


def _without_wildcard(origins: frozenset[str]) -> frozenset[str]:
    """Return `origins`; raises ValueError if "*" is one of them."""
    if "*" in origins:
        raise ValueError("allows every origin; name the allowed origins instead")
    return origins


def _smtp_url(text: str) -> str:
    """Return the URL of a mail server; the message of a ValueError contains no part of it."""
    try:
        url = urlsplit(text)
        host, _ = url.hostname, url.port
    except ValueError:
        raise ValueError("is not a URL; percent-encode special characters in it") from None
    if url.scheme not in {"smtp", "smtps"} or not host:
        raise ValueError("must look like smtp://user:password@host:587?starttls or smtps://host")
    if url.path not in {"", "/"} or url.fragment:
        raise ValueError("has a path; percent-encode special characters in user and password")
    if url.query not in ({"", "starttls"} if url.scheme == "smtp" else {""}):
        raise ValueError("has an unknown option; smtp:// takes ?starttls, and smtps:// takes none")
    if bool(url.username) != bool(url.password):
        raise ValueError("has a user without a password, or a password without a user")
    if not unquote(f"{url.username}{url.password}").isascii():
        raise ValueError("has a character in user or password that is not ASCII")
    return text


def _mail_from(text: str) -> str:
    """Return the sender of mails: an address, or a name and an address in angle brackets."""
    _, address = parseaddr(text)
    if not (text.isprintable() and _ADDRESS.fullmatch(address)):
        raise ValueError("must look like users@example.com or Example <users@example.com>")
    return text


def _link_base_url(text: str) -> str:
    """Return the URL of the pages that links lead to, without a slash at the end."""
    url = urlsplit(text)
    if url.scheme not in {"http", "https"} or not url.hostname or url.query or url.fragment:
        raise ValueError("must be an http or https URL without a query and a fragment")
    return text.rstrip("/")


def _issuer(text: str) -> str:
    """Return the URL that identifies the service as an issuer of tokens (RFC 8414, 2)."""
    url = urlsplit(text)
    host, _ = url.hostname, url.port  # a ValueError if they are none
    loopback = host in {"localhost", "127.0.0.1", "::1"}
    if not host or (url.scheme != "https" and not (url.scheme == "http" and loopback)):
        raise ValueError("must be an https URL; http is allowed for this machine only")
    if url.query or url.fragment or "@" in url.netloc or text.endswith(("/", "?", "#")):
        raise ValueError("must have no user, query, fragment or slash at the end")
    if not _PRINTABLE_ASCII.fullmatch(text):
        raise ValueError("must have no blanks, and no characters that are not ASCII")
    if len(text) > MAX_ISSUER_LENGTH:
        raise ValueError(f"must have at most {MAX_ISSUER_LENGTH} characters")
    return text


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError("is not a folder")
    return path


Issuer = Annotated[str, AfterValidator(_issuer)]
SmtpUrl = Annotated[str, AfterValidator(_smtp_url)]
MailFrom = Annotated[str, AfterValidator(_mail_from)]
LinkBaseUrl = Annotated[str, AfterValidator(_link_base_url)]
Keys = Annotated[tuple[str, ...], BeforeValidator(_keys)]
Origins = Annotated[frozenset[str], BeforeValidator(_origins)]
# Types of settings that have another default in some environment, or the same bounds.
Lifetime = Annotated[int, Field(ge=1, le=36_500 * DAY)]  # seconds
TokenDays = Annotated[int, Field(ge=0, le=36_500)]
TokenSeconds = Annotated[int, Field(ge=0, le=366 * DAY)]
BcryptCost = Annotated[int, Field(ge=4, le=31)]
PasswordLength = Annotated[int, Field(ge=1, le=64)]
FailuresPerAccount = Annotated[int, Field(ge=1, le=10_000)]
AttemptsPerAddress = Annotated[int, Field(ge=1, le=1_000_000)]
LinkLifetime = Annotated[int, Field(ge=60, le=366 * DAY)]  # seconds
LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
    BeforeValidator(lambda text: text.upper() if isinstance(text, str) else text),
]


class BaseConfig(BaseModel):
    """The settings of every environment; each field is read from the variable of its name."""

    model_config = ConfigDict(extra="ignore", frozen=True, validate_default=True)

    DEBUG: ClassVar[bool] = False
    TESTING: ClassVar[bool] = False
    SHOW_VERSION: ClassVar[bool] = False  # `runserver` changes DEBUG
    # Every byte of a password counts: see project/lib/hashing.py.
    BCRYPT_HANDLE_LONG_PASSWORDS: ClassVar[bool] = True
    MAX_CONTENT_LENGTH: ClassVar[int] = 64 * 1024
    # Where emails are written without SMTP_URL; None where none can be sent then.
    MAIL_FOLDER: ClassVar[Path | None] = None

    SECRET_KEY: Annotated[str, AfterValidator(strong_key)] = Field(
        description="the key that signs tokens; at least 32 bytes in production"
    )
    SECRET_KEY_FALLBACKS: Annotated[Keys, AfterValidator(_strong_keys)] = Field(
        (), description="further keys that verify tokens, comma-separated"
    )
    ISSUER: Issuer | None = Field(
        None, description="public URL of the service; if set, other services can verify tokens"
    )
    TOKEN_AUDIENCE: str | None = Field(
        None, max_length=MAX_ISSUER_LENGTH, description="`aud` of tokens; by default the ISSUER"
    )
    ENCRYPTION_KEYS: Annotated[Keys, AfterValidator(_strong_keys)] = Field(
        (),
        description="keys that encrypt stored secrets, comma-separated; with ISSUER or TOTP",
    )
    SQLALCHEMY_DATABASE_URI: DatabaseUrl = Field(
        validation_alias="DATABASE_URL", description="by default an SQLite file in instance/"
    )
    TOKEN_EXPIRATION_DAYS: TokenDays = Field(30, description="lifetime of a token, in days")
    TOKEN_EXPIRATION_SECONDS: TokenSeconds = Field(0, description="seconds added to the days")
    REFRESH_EXPIRATION_SECONDS: Lifetime = Field(
        30 * DAY, description="lifetime of a refresh token"
    )
    REFRESH_REUSE_SECONDS: int = Field(
        30, ge=0, le=120, description="seconds in which a used refresh token may be sent again"
    )
    SESSION_EXPIRATION_SECONDS: Lifetime = Field(
        90 * DAY, description="lifetime of a session, however often refreshed"
    )
    BCRYPT_LOG_ROUNDS: BcryptCost = Field(13, description="cost of a password's hash, log2")
    BCRYPT_THREADS: int | None = Field(
        None, ge=1, le=64, description="hashing threads of a process; its share of cores if unset"
    )
    PASSWORD_MIN_LENGTH: PasswordLength = Field(
        12, description="characters of a new password; 1 accepts every password"
    )
    BODY_TIMEOUT: int = Field(
        30, ge=1, le=3_600, description="seconds that a client may stall in the middle of a body"
    )
    TRUSTED_PROXIES: int = Field(
        0, ge=0, le=10, description="number of proxies that each append to X-Forwarded-For"
    )
    FORCE_HTTPS: bool = Field(False, description="whether requests without HTTPS are refused")
    CORS_ORIGINS: Annotated[Origins, AfterValidator(_without_wildcard)] = Field(
        frozenset(), description="origins whose pages may read responses, comma-separated"
    )
    API_DOCS: bool = Field(False, description="whether /docs serves the API document")
    USERS_API_OPEN: bool = Field(False, description="whether /users answers without a token")
    RATE_LIMITS: bool = Field(True, description="whether rate limits apply")
    LOGIN_FAILURES_PER_ACCOUNT: FailuresPerAccount = Field(
        10, description="failed logins before an account is paused"
    )
    LOGIN_PAUSE_SECONDS: int = Field(
        60, ge=1, le=3_600, description="the first pause; each further pause doubles"
    )
    LOGIN_PAUSE_MAX_SECONDS: int = Field(900, ge=1, le=86_400, description="the longest pause")
    LOGIN_FAILURES_PER_ADDRESS: AttemptsPerAddress = Field(
        100, description="failed logins an hour before an address is paused"
    )
    REGISTRATIONS_PER_ADDRESS: AttemptsPerAddress = Field(20, description="registrations an hour")
    KNOWN_ADDRESS_DAYS: int = Field(
        30, ge=0, le=3_650, description="days after a login for which its address is known"
    )
    EVENTS_DAYS: int = Field(90, ge=1, le=36_500, description="days to keep the audit log")
    SMTP_URL: SmtpUrl | None = Field(
        None, description="mail server; smtp://user:password@host:587?starttls or smtps://..."
    )
    MAIL_FROM: MailFrom | None = Field(None, description="sender of emails; needed with SMTP_URL")
    LINK_BASE_URL: LinkBaseUrl | None = Field(
        None, description="URL of the page that links in emails lead to; needed with SMTP_URL"
    )
    MAIL_TEMPLATES: Annotated[Path, AfterValidator(_folder)] | None = Field(
        None, description="folder with templates of emails that replace those of the service"
    )
    MAIL_SENDER: bool = Field(True, description="whether `serve` also sends the emails")
    EMAIL_VERIFICATION: Literal["off", "optional", "required"] = Field(
        "off", description="whether new users are asked to confirm their address, or have to"
    )
    REQUIRE_MFA: Literal["none", "admins", "all"] = Field(
        "none", description="who must have a second factor"
    )
    STEP_UP_SECONDS: int = Field(
        300, ge=0, le=DAY, description="seconds after a code in which a session needs no other one"
    )
    SECURITY_NOTICES: bool = Field(
        True, description="whether users are told of security events by email"
    )
    RESET_LINK_SECONDS: LinkLifetime = Field(1_800, description="lifetime of a link to reset")
    EMAIL_LINK_SECONDS: LinkLifetime = Field(
        7_200, description="lifetime of a link that confirms a new email"
    )
    VERIFICATION_LINK_SECONDS: LinkLifetime = Field(
        DAY, description="lifetime of a link that confirms the email of a new user"
    )
    INVITATION_LINK_SECONDS: LinkLifetime = Field(7 * DAY, description="lifetime of an invitation")
    LOG_LEVEL: LogLevel = Field("INFO", description="the lowest level of the lines in the log")
    LOG_PROBES: bool = Field(False, description="whether probes that succeed are logged")
    METRICS_PORT: int | None = Field(
        None, ge=1, le=65_535, description="port on which `serve` exposes /metrics for Prometheus"
    )
    DRAIN_FILE: Path | None = Field(
        None, description="file during whose existence /health/ready is 503, before a stop"
    )
    GRANIAN_WORKERS: int = Field(2, ge=1, le=256, description="server processes")
    GRANIAN_BLOCKING_THREADS: int = Field(16, ge=2, le=256, description="hash slots of a process")

    @computed_field  # type: ignore[prop-decorator]  # mypy does not support decorated properties
    @property
    def EMBEDDED_DATABASE(self) -> bool:  # noqa: N802  # a setting
        """Whether DATABASE_URL is not set, so that the service creates its own database."""
        return "SQLALCHEMY_DATABASE_URI" not in self.model_fields_set

    @field_validator("SECRET_KEY_FALLBACKS")
    @classmethod
    def _check_fallbacks(cls, keys: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if info.data.get("SECRET_KEY") in keys:
            raise ValueError("contains the SECRET_KEY itself")
        return keys

    @model_validator(mode="after")
    def _check_lifetimes(self) -> Self:
        access = self.TOKEN_EXPIRATION_DAYS * DAY + self.TOKEN_EXPIRATION_SECONDS
        if not access:
            raise ValueError(
                "TOKEN_EXPIRATION_DAYS and TOKEN_EXPIRATION_SECONDS are both 0:"
                " every token would be expired"
            )
        longest = max(access, self.REFRESH_EXPIRATION_SECONDS)
        if longest > self.SESSION_EXPIRATION_SECONDS:
            raise ValueError(
                f"SESSION_EXPIRATION_SECONDS={self.SESSION_EXPIRATION_SECONDS}:"
                f" is shorter than the lifetime of a token ({longest})"
            )
        return self

    @model_validator(mode="after")
    def _check_encryption_keys(self) -> Self:
        if not self.ENCRYPTION_KEYS and self.ISSUER:
            raise ValueError("ISSUER needs ENCRYPTION_KEYS too")
        if not self.ENCRYPTION_KEYS and self.REQUIRE_MFA != "none":
            raise ValueError("REQUIRE_MFA needs ENCRYPTION_KEYS too")
        if {self.SECRET_KEY, *self.SECRET_KEY_FALLBACKS} & set(self.ENCRYPTION_KEYS):
            raise ValueError("ENCRYPTION_KEYS contains a key of SECRET_KEY: make another one")
        return self

    @model_validator(mode="after")
    def _check_mail(self) -> Self:
        missing = [name for name in ("MAIL_FROM", "LINK_BASE_URL") if getattr(self, name) is None]
        if self.SMTP_URL and missing:
            raise ValueError(f"SMTP_URL needs {' and '.join(missing)} too")
        return self

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Return the settings in `environment`; a blank variable counts as not set.

        Raises ConfigurationError with one line that names each missing or invalid variable, and
        its value unless it is a secret.
        """
        given = _with_files({name: value for name, value in environment.items() if value.strip()})
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise _refusal([_complaint(detail) for detail in error.errors()]) from None


def _with_files(given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables, with the secrets that are in files.

    SECRET_KEY_FILE names the file that contains SECRET_KEY, for example; newlines at its end do not
    count. Raises ConfigurationError, with one line that shows neither a secret nor the name of a
    file: the name is the secret itself if a user confuses the two variables.
    """
    found, complaints = dict(given), []
    for name in SECRETS:
        path = given.get(f"{name}_FILE")
        if path and name in given:
            complaints.append(f"{name} and {name}_FILE are both set")
        elif path:
            try:
                found[name] = _contents(path)
            except ValueError as error:
                complaints.append(f"{name}_FILE: {error}")
    if complaints:
        raise _refusal(complaints)
    return found


def _contents(path: str) -> str:
    """Return the secret in a file; the message of a ValueError shows nothing of it."""
    try:
        text = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"the file cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError("the file is not text in UTF-8") from None
    if not text.strip():
        raise ValueError("the file is empty")
    return text


def _refusal(complaints: list[str]) -> ConfigurationError:
    """Return the error with a line that contains each complaint."""
    return ConfigurationError(
        f"Configuration error: {'; '.join(complaints)}", complaints=complaints
    )


def _complaint(detail: ErrorDetails) -> str:
    """Return one clause: the name of a variable, its value, and the reason why it is invalid."""
    reason = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return reason
    name = str(detail["loc"][0])
    if detail["type"] == "missing":
        return f"{name} is missing"
    if name in SECRETS:
        return f"{name} {reason}"
    return f"{name}={detail['input']!r}: {reason}"


class DevelopmentConfig(BaseConfig):
    """Settings for development, all with a default."""

    DEBUG: ClassVar[bool] = True
    SHOW_VERSION: ClassVar[bool] = True
    MAIL_FOLDER: ClassVar[Path | None] = INSTANCE / "mail"

    SECRET_KEY: str = Field(default_factory=lambda: _development_key("secret_key"))
    SECRET_KEY_FALLBACKS: Keys = ()
    ENCRYPTION_KEYS: Keys = Field(default_factory=lambda: (_development_key("encryption_key"),))
    SQLALCHEMY_DATABASE_URI: DatabaseUrl = Field(
        default_factory=lambda: _embedded("users.db"), validation_alias="DATABASE_URL"
    )
    BCRYPT_LOG_ROUNDS: BcryptCost = 4
    PASSWORD_MIN_LENGTH: PasswordLength = 1
    CORS_ORIGINS: Origins = frozenset()
    API_DOCS: bool = True
    USERS_API_OPEN: bool = True
    LOG_PROBES: bool = True
    # Lenient: one developer's programs are not an attack.
    LOGIN_FAILURES_PER_ACCOUNT: FailuresPerAccount = 100
    LOGIN_FAILURES_PER_ADDRESS: AttemptsPerAddress = 1_000
    REGISTRATIONS_PER_ADDRESS: AttemptsPerAddress = 1_000
    MAIL_FROM: MailFrom | None = "users service <users-service@localhost>"
    LINK_BASE_URL: LinkBaseUrl | None = "http://127.0.0.1:8000"


class TestingConfig(BaseConfig):
    """Settings for tests: a separate database, a random key, tokens that expire in 3 seconds."""

    DEBUG: ClassVar[bool] = True
    SHOW_VERSION: ClassVar[bool] = True
    TESTING: ClassVar[bool] = True

    SECRET_KEY: str = Field(default_factory=lambda: secrets.token_hex(32))
    SECRET_KEY_FALLBACKS: Keys = ()
    ENCRYPTION_KEYS: Keys = Field(default_factory=lambda: (secrets.token_hex(32),))
    SQLALCHEMY_DATABASE_URI: DatabaseUrl = Field(
        default_factory=lambda: _embedded("users_test.db"), validation_alias="DATABASE_TEST_URL"
    )
    TOKEN_EXPIRATION_DAYS: TokenDays = 0
    TOKEN_EXPIRATION_SECONDS: TokenSeconds = 3
    BCRYPT_LOG_ROUNDS: BcryptCost = 4
    PASSWORD_MIN_LENGTH: PasswordLength = 1
    CORS_ORIGINS: Origins = frozenset()
    API_DOCS: bool = True
    USERS_API_OPEN: bool = True
    LOG_PROBES: bool = True
    RATE_LIMITS: bool = False

    @model_validator(mode="before")
    @classmethod
    def _check_database(cls, given: Mapping[str, str]) -> Mapping[str, str]:
        url = given.get("DATABASE_TEST_URL")
        if url and url == given.get("DATABASE_URL"):
            raise ValueError(
                "DATABASE_TEST_URL and DATABASE_URL are the same database,"
                " and tests erase the one they run on"
            )
        return given


class ProductionConfig(BaseConfig):
    """Settings for production: SECRET_KEY and the database have no default."""
