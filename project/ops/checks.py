"""The command that checks a configuration before it goes live: check.

Its findings are written for operators who do not know the code. Every configuration is judged as
one for production, whichever class of settings APP_SETTINGS names.
"""

import difflib
import ipaddress
import itertools
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from flask import Config, Flask, current_app
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from project import clock
from project.accounts import clients, second_factor
from project.accounts.mails import Kind
from project.config import DAY, SECRETS, BaseConfig, strong_key
from project.errors import ConfigurationError
from project.extensions import db
from project.lib import database, hashing
from project.mail import outbox, rendering
from project.mail.transport import SmtpTransport, describe
from project.tokens import signing_keys
from project.tokens.keys import auth_token_lifetime

# OWASP's Password Storage Cheat Sheet: a cost of at least 10, and less than a second.
MIN_ROUNDS = 10
MAX_HASH_SECONDS = 1.0
# Each cost takes twice as long as the one below, so on any machine one of them takes between half
# of this and all of it.
GOOD_HASH_SECONDS = 0.5
# NIST SP 800-63B-4, 3.1.1.2: with a second factor, and for passwords as the only factor.
MIN_PASSWORD_WITH_SECOND_FACTOR, MIN_PASSWORD_ALONE = 8, 15
MAX_CLOCK_SKEW = 1.0  # seconds
MAX_LIFETIME_ELSEWHERE = 3_600  # seconds for which another service may accept an ended session
MAX_KEY_DAYS = 365  # for which a key signs
MIN_LIKENESS = 0.8  # of the name of a variable to that of a setting, by difflib


class Verdict(Enum):
    """How serious a finding is."""

    OK = "ok"
    NOTE = "note"  # the operator decides whether it is acceptable
    WRONG = "wrong"


class Finding(NamedTuple):
    """The result of one check, in a sentence or two."""

    verdict: Verdict
    text: str

    def __str__(self) -> str:
        """Return the finding as one line."""
        return f"{self.verdict.value:<6} {self.text}"


def ok(text: str) -> Finding:
    """Return a finding that something is right."""
    return Finding(Verdict.OK, text)


def note(text: str) -> Finding:
    """Return a finding for the operator to decide on."""
    return Finding(Verdict.NOTE, text)


def wrong(text: str) -> Finding:
    """Return a finding that should not go live."""
    return Finding(Verdict.WRONG, text)


def check() -> int:
    """Check the settings, the database and the clock before the service goes live."""
    return report(examine(current_app))


def report(findings: Iterable[Finding]) -> int:
    """Print findings as they come; return the exit code, 1 if something is wrong."""
    wrong = 0
    for finding in findings:
        print(finding, flush=True)
        wrong += finding.verdict is Verdict.WRONG
    print(f"\nWrong: {wrong}." if wrong else "\nNothing is wrong.")
    return 1 if wrong else 0


def examine(app: Flask) -> Iterator[Finding]:
    """Check the settings of `app` and its database, in the context of `app`."""
    yield _settings_class(app)
    yield from misspelled(os.environ)
    yield from _keys(app.config)
    yield from _issuer(app.config)
    yield from _encryption_keys(app.config)
    yield from _second_factor(app.config)
    yield from _access(app.config)
    yield _https(app.config)
    yield _password_length(app.config)
    rounds = app.config["BCRYPT_LOG_ROUNDS"]
    yield hash_cost(rounds, hashing.seconds(rounds))
    yield from _mail(app.config)
    yield from _database(app.config)


def configuration_refused(error: ConfigurationError) -> Iterator[Finding]:
    """Yield the reasons why the application cannot be created."""
    yield from map(wrong, error.complaints)
    yield from misspelled(os.environ)
    yield note("The other checks run once the service can start with these settings.")


def misspelled(names: Iterable[str]) -> Iterator[Finding]:
    """Report the variables that are named almost like a setting; their values are not shown.

    Other programs have variables too, so only a name that is close to a setting's is reported. At
    0.8, FORCE_HTTP and DATABASE_URI are; of 190 variables of shells, PostgreSQL, Python, systemd,
    Kubernetes, clouds and CI services, only LOGGING_LEVEL is.
    """
    from granian.cli import cli  # slow to import

    settings = {
        str(field.validation_alias or name) for name, field in BaseConfig.model_fields.items()
    }
    settings |= {"APP_SETTINGS", *SECRETS, *(f"{name}_FILE" for name in SECRETS)}
    settings |= {f"GRANIAN_{option.name}".upper() for option in cli.params}
    for name in sorted(set(names) - settings):
        for near in difflib.get_close_matches(name.upper(), sorted(settings), 1, MIN_LIKENESS):
            yield note(f"The variable {name} is not a setting, and changes nothing. {near} is one.")


def _settings_class(app: Flask) -> Finding:
    if app.testing or app.debug:
        purpose = "tests" if app.testing else "development"
        return wrong(
            f"These settings are for {purpose}."
            " Set APP_SETTINGS=project.config.ProductionConfig to go live."
        )
    return ok("The settings are for production.")


def _keys(config: Config) -> Iterator[Finding]:
    fallbacks = config["SECRET_KEY_FALLBACKS"]
    keys = {"SECRET_KEY": config["SECRET_KEY"]} | {
        f"Key number {number} of SECRET_KEY_FALLBACKS": key
        for number, key in enumerate(fallbacks, 1)
    }
    for name, key in keys.items():
        yield _strength(name, key, "an attacker who guesses it can forge tokens of any user")
    if "," in config["SECRET_KEY"]:
        yield note(
            "SECRET_KEY contains a comma, so it can never be one of SECRET_KEY_FALLBACKS: when it"
            " is replaced, all users have to log in again."
        )
    if fallbacks:
        longest = max(auth_token_lifetime(), config["REFRESH_EXPIRATION_SECONDS"]) / DAY
        yield note(
            f"Keys in SECRET_KEY_FALLBACKS: {len(fallbacks)}. Remove an old key when its last"
            f" token has expired, {longest:.3g} days after the last server stopped signing with it."
        )


def _strength(name: str, key: str, harm: str) -> Finding:
    try:
        strong_key(key)
    except ValueError as error:
        return wrong(f"{name} {error}: {harm}.")
    return ok(f"{name} is long enough, and not a well-known key.")


def _issuer(config: Config) -> Iterator[Finding]:
    """Check the settings of tokens that other services verify."""
    issuer = config["ISSUER"]
    if not issuer:
        return
    if issuer.startswith("http:"):
        yield wrong(
            "ISSUER starts with http://, which is for development: other services have to fetch"
            " the public keys over HTTPS."
        )
    else:
        yield ok(f"Other services can verify tokens: ISSUER={issuer}.")
    lifetime = auth_token_lifetime()
    if lifetime > MAX_LIFETIME_ELSEWHERE:
        yield note(
            f"An auth token is valid for {lifetime:,} seconds: a service that verifies tokens"
            " without the feed and without introspection learns only then that a session has"
            " ended. Lower TOKEN_EXPIRATION_DAYS and TOKEN_EXPIRATION_SECONDS, to 900 seconds"
            " for example."
        )


def _encryption_keys(config: Config) -> Iterator[Finding]:
    """Check the keys that encrypt stored secrets."""
    keys = config["ENCRYPTION_KEYS"]
    for number, key in enumerate(keys, 1):
        harm = (
            "an attacker with it and a copy of the database can forge tokens of any user, and"
            " knows the codes of every authenticator"
        )
        yield _strength(f"Key number {number} of ENCRYPTION_KEYS", key, harm)
    if len(keys) > 1:
        yield note(
            f"Keys in ENCRYPTION_KEYS: {len(keys)}. The first one encrypts. After python manage.py"
            " reencrypt_keys, the others are needed only for backups from before."
        )


def _second_factor(config: Config) -> Iterator[Finding]:
    """Check who needs a second factor, and whether a reset by email removes it."""
    required = config["REQUIRE_MFA"]
    if not config["ENCRYPTION_KEYS"]:
        yield note(
            "ENCRYPTION_KEYS is not set: users cannot set up an authenticator as a second factor."
        )
        return
    if config["SMTP_URL"] and config["EMAIL_VERIFICATION"] == "off":
        yield note(
            "EMAIL_VERIFICATION=off: new users cannot confirm their address, and a reset of the"
            " password by email removes an authenticator that was set up before the address was"
            " confirmed. Set EMAIL_VERIFICATION=optional."
        )
    if required == "none":
        yield note(
            "REQUIRE_MFA=none: an attacker who has the password of an admin needs nothing else,"
            " unless the admin has set up an authenticator. Set REQUIRE_MFA=admins."
        )
    else:
        yield ok(f"A second factor is required (REQUIRE_MFA={required}).")


def _access(config: Config) -> Iterator[Finding]:
    """Check who can reach which part of the service."""
    if config["USERS_API_OPEN"]:
        yield wrong(
            "USERS_API_OPEN is on: clients without a token can list all users with their email"
            " addresses, and add users. Set USERS_API_OPEN=false."
        )
    else:
        yield ok("Only admins can list and add users.")
    if "*" in config["CORS_ORIGINS"]:
        yield wrong(
            "CORS_ORIGINS contains *: the pages of any site can read the responses. List the"
            " origins of your own pages instead."
        )
    else:
        origins = ", ".join(sorted(config["CORS_ORIGINS"]))
        yield ok(f"Origins whose pages can read the responses: {origins or 'none'}.")
    if config.get("API_DOCS"):
        yield wrong("API_DOCS is on: the documentation of the API is public. Set API_DOCS=false.")
    else:
        yield ok("The documentation of the API is not public.")
    if port := config["METRICS_PORT"]:
        host = os.environ.get("GRANIAN_HOST", "127.0.0.1")
        if str(port) == os.environ.get("GRANIAN_PORT", "5000"):
            yield wrong(f"METRICS_PORT={port} is the port of the service itself. Choose another.")
        yield note(
            f"METRICS_PORT={port}: metrics, such as the number of logins, are readable without a"
            f" token on {host} at this port. Let only Prometheus connect to it."
        )
    if config["RATE_LIMITS"]:
        yield ok("Attempts to log in and to register are limited.")
    else:
        yield wrong(
            "RATE_LIMITS is off: an attacker can guess passwords without a limit."
            " Set RATE_LIMITS=true."
        )


def _https(config: Config) -> Finding:
    """Check whether tokens and passwords are accepted over plain HTTP."""
    proxies = config["TRUSTED_PROXIES"]
    if config["FORCE_HTTPS"] and not proxies and "GRANIAN_SSL_CERTIFICATE" not in os.environ:
        return wrong(
            "FORCE_HTTPS is on and TRUSTED_PROXIES is 0: every request will be refused, because"
            " the X-Forwarded-Proto header of the proxy is ignored. Set TRUSTED_PROXIES to the"
            " number of proxies."
        )
    if config["FORCE_HTTPS"]:
        return ok("Requests that did not arrive over HTTPS are refused.")
    return note(
        "FORCE_HTTPS is off: tokens and passwords are accepted over plain HTTP. Behind proxies"
        " that terminate TLS, set FORCE_HTTPS=true and TRUSTED_PROXIES to the number of proxies"
        f" (now {proxies})."
    )


def _password_length(config: Config) -> Finding:
    length = config["PASSWORD_MIN_LENGTH"]
    setting = f"PASSWORD_MIN_LENGTH={length}:"
    if length < MIN_PASSWORD_WITH_SECOND_FACTOR:
        return wrong(
            f"{setting} new passwords can be too short. NIST requires at least"
            f" {MIN_PASSWORD_WITH_SECOND_FACTOR} characters."
        )
    if length < MIN_PASSWORD_ALONE:
        return note(
            f"{setting} new passwords are long enough together with a second factor. NIST requires"
            f" at least {MIN_PASSWORD_ALONE} characters where the password is the only factor."
        )
    return ok(f"{setting} new passwords are long enough.")


def _mail(config: Config) -> Iterator[Finding]:
    """Check the settings of email, and log in to the mail server."""
    url = config["SMTP_URL"]
    if not url:
        missing = "SMTP_URL is not set, so no emails can be sent"
        if config["EMAIL_VERIFICATION"] == "required":
            yield wrong(
                f"{missing}, and EMAIL_VERIFICATION=required: new users can never confirm their"
                " address, nor log in. Set SMTP_URL, MAIL_FROM and LINK_BASE_URL."
            )
        else:
            yield note(
                f"{missing}: users cannot reset a forgotten password or confirm an address, admins"
                " cannot invite, and users are not told of security events."
            )
        return
    server = urlsplit(url)
    base = urlsplit(config["LINK_BASE_URL"])
    if base.scheme == "http" and not _is_loopback(str(base.hostname)):
        yield wrong(
            "LINK_BASE_URL starts with http://: an attacker in the network can replace the page"
            " that users of links enter new passwords on. Use https://."
        )
    if server.scheme == "smtp" and not server.query and not _is_loopback(str(server.hostname)):
        sent = "the user, the password and every link" if server.username else "every link"
        plain = f"SMTP_URL starts with smtp:// without ?starttls: {sent} can be read in the network"
        secure = "Add ?starttls, or use smtps://."
        yield (wrong if server.username else note)(f"{plain}. {secure}")
    yield from _templates()
    try:
        SmtpTransport(url).check()
    except Exception as error:  # noqa: BLE001  # whatever it is, no email can be sent
        yield wrong(f"The mail server of SMTP_URL cannot be used: {describe(error)}")
    else:
        yield ok("The mail server of SMTP_URL can be reached, and accepts the user and password.")


def _templates() -> Iterator[Finding]:
    """Render every email in every language, as an operator's templates may have errors."""
    values = {"id": 0, "address": "user@example.com", "created_at": clock.utcnow()}
    for kind, language in itertools.product(Kind, rendering.languages()):
        parameters = {"ip": "192.0.2.1"}
        mail: Any = SimpleNamespace(kind=kind, language=language, parameters=parameters, **values)
        try:
            rendering.render(mail, link="https://app.example/", minutes=30)
        except Exception as error:  # noqa: BLE001  # whatever it is, the email cannot be sent
            reason = f"{type(error).__name__}: {error}"
            yield wrong(f"The templates of {kind} in {language!r} cannot be rendered: {reason}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hash_cost(rounds: int, seconds: float) -> Finding:
    """Check the cost of hashes, given the seconds that one takes on this machine."""
    best = max(MIN_ROUNDS, rounds + math.floor(math.log2(GOOD_HASH_SECONDS / seconds)))
    measured = (
        f"Hashing a password takes {_ms(seconds)} on this machine (BCRYPT_LOG_ROUNDS={rounds})"
    )
    better = f"BCRYPT_LOG_ROUNDS={best} would take {_ms(seconds * 2.0 ** (best - rounds))}"
    if rounds < MIN_ROUNDS:
        return wrong(
            f"{measured}. That is too little: an attacker with a copy of the database can guess"
            f" passwords too fast. {better}."
        )
    if seconds > MAX_HASH_SECONDS:
        return wrong(
            f"{measured}. That is too long: users wait, and few can log in at the same time."
            f" {better}."
        )
    if best != rounds:
        return note(f"{measured}. {better}.")
    return ok(f"{measured}.")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


class Server(NamedTuple):
    """A PostgreSQL server, as seen over a connection to it."""

    skew: float  # seconds by which its clock is ahead of this machine's, at least
    superuser: bool  # whether the role of the connection is one
    connections: int  # the number that it allows the role
    pooled: bool  # whether a connection pooler is in front of it
    address: str | None  # None for a server on this machine
    encrypted: bool
    standby: bool
    read_only: bool  # whether a setting makes transactions read-only
    encoding: str  # of the database


def _database(config: Config) -> Iterator[Finding]:
    engine = db.engines[database.PROBE]
    if config["EMBEDDED_DATABASE"]:
        yield wrong(
            "DATABASE_URL is not set: the data is in an SQLite file in instance/."
            " Set DATABASE_URL to a database."
        )
    elif engine.dialect.name == "sqlite":
        yield note("The data is in an SQLite file: servers on other machines cannot share it.")
    if (missing := _missing_file(engine)) is not None:
        yield wrong(f"There is no file {missing}: {_MIGRATE}.")
        return
    try:
        schema = database.schema(engine)
        yield _schema(schema)
        if schema in database.USABLE:
            yield from _outbox()
            yield from _signing_keys(config)
            yield from _authenticators(config)
        if engine.dialect.name == "sqlite":
            yield ok("There is one clock: SQLite uses that of this machine.")
        else:
            server = database.run(engine, _inspect_server)
            yield from server_findings(server, config, engine.url.query)
    except SQLAlchemyError as error:
        yield wrong(f"The database cannot be used: {database.describe(error)}")


def _outbox() -> Iterator[Finding]:
    """Report the emails that wait or were given up."""
    counts = outbox.counts()
    if counts.dead:
        yield note(
            f"Emails that were given up: {counts.dead}. python manage.py mails lists them with the"
            " error, and with --retry lets them be tried again."
        )
    if counts.waiting:
        yield note(f"Emails that wait to be sent: {counts.waiting}.")


def _signing_keys(config: Config) -> Iterator[Finding]:
    """Check the keys that sign tokens for other services."""
    rows, now = signing_keys.all_keys(), clock.utcnow()
    if not config["ISSUER"]:
        others = clients.listed()
        if rows or others:
            yield note(
                f"ISSUER is not set, and there are signing keys ({len(rows)}) and clients"
                f" ({len(others)}): other services cannot verify tokens any more."
            )
        return
    signing = signing_keys.signing(rows, now)
    if signing is None:
        yield ok("There is no signing key yet: the service makes it when it starts.")
        return
    days = max(0, (now - signing.signs_from).days)
    age = f"Key {signing.kid} has signed auth tokens for {days} days"
    if days > MAX_KEY_DAYS:
        yield note(f"{age}. python manage.py rotate_keys replaces it.")
    else:
        yield ok(f"{age}.")
    keys = config["ENCRYPTION_KEYS"]
    for row in signing_keys.verifying(rows, now):
        if row.signs_from < signing.signs_from:
            continue  # only its public key is still used
        used = "signs" if row == signing else "will sign"
        if not signing_keys.is_readable(row, keys):
            yield wrong(
                f"No key of ENCRYPTION_KEYS decrypts the private key {row.kid}, which {used} auth"
                " tokens: users cannot log in without it. Add the key that encrypted it, or replace"
                " it with python manage.py rotate_keys --now."
            )
        elif not signing_keys.is_readable(row, keys[:1]):
            yield note(
                f"The private key {row.kid}, which {used} auth tokens, is not encrypted with the"
                " first of ENCRYPTION_KEYS. Run python manage.py reencrypt_keys before you remove"
                " the other keys."
            )


def _authenticators(config: Config) -> Iterator[Finding]:
    """Check whether the secrets of authenticators can be decrypted."""
    keys = config["ENCRYPTION_KEYS"]
    outdated = unreadable = 0
    for factor in second_factor.all_factors():
        if not second_factor.is_readable(factor, keys):
            unreadable += 1
        elif not second_factor.is_readable(factor, keys[:1]):
            outdated += 1
    if unreadable:
        yield wrong(
            f"Authenticators that no key of ENCRYPTION_KEYS decrypts: {unreadable}. Their users"
            " can log in with a recovery code only. Add the key that encrypted them."
        )
    if admins := second_factor.admins_without():
        yield note(f"Active admins without a second factor: {admins}.")
    if outdated:
        yield note(
            f"Authenticators that are not encrypted with the first of ENCRYPTION_KEYS: {outdated}."
            " Run python manage.py reencrypt_keys before you remove the other keys."
        )


_MIGRATE = "python manage.py db upgrade creates the tables, and serve runs it at its start"


def _missing_file(engine: Engine) -> Path | None:
    """Return the file of an SQLite database if it does not exist; connecting would create it."""
    name = engine.url.database or ""
    if engine.dialect.name != "sqlite" or name.startswith("file:") or Path(name).exists():
        return None
    return Path(name)


def _schema(schema: database.Schema) -> Finding:
    match schema:
        case database.Schema.CURRENT:
            return ok("The database can be reached, and every migration has run.")
        case database.Schema.AHEAD:
            return note(
                "A newer version of the service has migrated the database; this version can use it."
            )
        case database.Schema.BEHIND:
            return wrong(f"Migrations are missing: {_MIGRATE}.")
        case database.Schema.FOREIGN:
            return wrong(database.FOREIGN_SCHEMA)


_SERVER = text(
    """
    SELECT clock_timestamp() AS time,
        pg_backend_pid() AS pid,
        current_setting('is_superuser') = 'on' AS superuser,
        pg_is_in_recovery() AS standby,
        current_setting('default_transaction_read_only') = 'on' AS read_only,
        current_setting('server_encoding') AS encoding,
        least(
            current_setting('max_connections')::integer
            - current_setting('superuser_reserved_connections')::integer
            - coalesce(current_setting('reserved_connections', true), '0')::integer,
            (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user),
            (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database())
        ) AS connections
    """
)


def _inspect_server(connection: Connection) -> Server:
    asked_at = clock.utcnow()
    row = connection.execute(_SERVER).one()
    answered_at = clock.utcnow()
    raw: Any = connection.connection.dbapi_connection
    return Server(
        skew=_seconds_outside(row.time, asked_at, answered_at),
        superuser=row.superuser,
        connections=row.connections,
        # A pooler gives its clients process ids that the server does not have.
        pooled=raw.info.backend_pid != row.pid,
        address=peer_address(raw.fileno()),
        encrypted=raw.info.ssl_in_use,
        standby=row.standby,
        read_only=row.read_only,
        encoding=row.encoding,
    )


def peer_address(descriptor: int) -> str | None:
    """Return the address that a socket is connected to, or None if that is this machine."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family == socket.AF_UNIX:
            return None
        local, peer = connection.getsockname()[0], connection.getpeername()[0]
    return None if local == peer else str(peer)


def _seconds_outside(time: datetime, begin: datetime, end: datetime) -> float:
    """Return the seconds by which a time is after an interval; negative if it is before it."""
    return max(0.0, (time - end).total_seconds()) + min(0.0, (time - begin).total_seconds())


def server_findings(
    server: Server, config: Config, options: Mapping[str, Any]
) -> Iterator[Finding]:
    """Check a PostgreSQL server; `options` are those of DATABASE_URL."""
    if abs(server.skew) > MAX_CLOCK_SKEW:
        relation = "behind" if server.skew > 0 else "ahead of"
        yield wrong(
            f"The clock of this machine is {abs(server.skew):.1f} s {relation} the database's:"
            " synchronize both with NTP. Tokens and sessions expire by the clock of the machine"
            " that handles the request."
        )
    else:
        yield ok("The clocks of this machine and of the database agree to the second.")
    yield _writes(server)
    yield _encoding(server)
    yield _connections(server, config)
    if server.superuser:
        yield note(
            "The service connects to the database as a superuser. Use a role that owns only this"
            " database: an attacker who gets DATABASE_URL then gets less."
        )
    else:
        yield ok("The service does not connect to the database as a superuser.")
    yield _encryption(server, str(options.get("sslmode", "prefer")))


def _writes(server: Server) -> Finding:
    if server.standby:
        return wrong(
            "The database is a standby, which refuses writes: no user can register or log in. Let"
            " DATABASE_URL name the primary, or all hosts:"
            " postgresql://user:password@host1,host2/name?target_session_attrs=read-write"
        )
    if server.read_only:
        return wrong(
            "default_transaction_read_only is on: the database refuses writes, and no user can"
            " register or log in."
        )
    return ok("The database accepts writes.")


def _encoding(server: Server) -> Finding:
    if server.encoding != "UTF8":
        return wrong(
            f"The encoding of the database is {server.encoding}: requests with other characters,"
            " such as those of a username, are answered with 500. Make the database again, with"
            " createdb --encoding UTF8 --template template0"
        )
    return ok("The encoding of the database is UTF8.")


def _connections(server: Server, config: Config) -> Finding:
    workers, threads = config["GRANIAN_WORKERS"], config["GRANIAN_BLOCKING_THREADS"]
    needed = workers * (2 * threads + 1)
    if server.pooled:
        return ok("A pooler shares the connections to the database.")
    allowed = f"PostgreSQL allows this role {server.connections} connections"
    servers = server.connections // needed
    if not servers:
        return wrong(
            f"{allowed}, and a server may open {needed}: {workers} processes that work"
            f" on {threads} requests each, two connections for each request and one more. Raise"
            " max_connections, or lower GRANIAN_WORKERS or GRANIAN_BLOCKING_THREADS."
        )
    number = "1 server" if servers == 1 else f"{servers} servers"
    return ok(f"{allowed}, and a server opens at most {needed}: enough for {number}.")


def _encryption(server: Server, mode: str) -> Finding:
    """Check whether an attacker in the network can read the traffic or impersonate the server."""
    if server.address is None:
        return ok("The connection to the database stays on this machine.")
    if not server.encrypted:
        unencrypted = f"The connection to the database at {server.address} is not encrypted"
        if ipaddress.ip_address(server.address).is_global:
            return wrong(
                f"{unencrypted}, and carries password hashes over a public network."
                " Add ?sslmode=verify-full to DATABASE_URL."
            )
        return note(
            f"{unencrypted}. Make sure that the network is trusted, or add ?sslmode=verify-full to"
            " DATABASE_URL."
        )
    if mode not in {"verify-ca", "verify-full"}:
        return note(
            "The connection to the database is encrypted, but the server's certificate is not"
            f" verified (sslmode={mode}): an attacker can impersonate it."
            " Add ?sslmode=verify-full to DATABASE_URL."
        )
    return ok("The connection to the database is encrypted, and its certificate is verified.")
