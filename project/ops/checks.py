"""What is wrong with a configuration, for who runs the service and has never read its code.

All of it is judged as in front of real people, under whichever settings it is asked.
"""

import ipaddress
import math
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from flask import Config, Flask
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from project import clock, database, passwords
from project.config import DAY, strong_key
from project.errors import ConfigurationError
from project.extensions import db

# OWASP's Password Storage Cheat Sheet: a cost of 10 at least, and less than a second.
MIN_ROUNDS = 10
SLOWEST_HASH = 1.0  # seconds
# Each cost takes twice as long as the one below: on any machine one is between half of this and it.
GOOD_HASH = 0.5  # seconds
# NIST SP 800-63B-4, 3.1.1.2: beside another factor, and where a password is all there is.
SHORTEST_PASSWORD, GOOD_PASSWORD = 8, 15
MAX_SKEW = 1.0  # seconds


class Verdict(Enum):
    """What a finding means for who wants to go live."""

    OK = "ok"
    NOTE = "note"  # to be known; whether it does harm is for the operator to say
    WRONG = "wrong"


class Finding(NamedTuple):
    """Something that was looked at, in a sentence or two."""

    verdict: Verdict
    text: str

    def __str__(self) -> str:
        """Return the finding as one line."""
        return f"{self.verdict.value:<6} {self.text}"


def ok(text: str) -> Finding:
    """Return what is as it should be."""
    return Finding(Verdict.OK, text)


def note(text: str) -> Finding:
    """Return what the operator should know."""
    return Finding(Verdict.NOTE, text)


def wrong(text: str) -> Finding:
    """Return what should not go live."""
    return Finding(Verdict.WRONG, text)


def examine(app: Flask) -> Iterator[Finding]:
    """Look at the settings of `app` and at its database, in its context."""
    yield _purpose(app)
    yield from _keys(app.config)
    yield from _doors(app.config)
    yield _transport(app.config)
    yield _passwords(app.config)
    rounds = app.config["BCRYPT_LOG_ROUNDS"]
    yield hashing(rounds, passwords.seconds(rounds))
    yield from _database(app.config)


def refused(error: ConfigurationError) -> Iterator[Finding]:
    """Say why there is no `app` to look at."""
    yield from map(wrong, error.complaints)
    yield note("The rest is looked at once the service can start with these settings.")


def _purpose(app: Flask) -> Finding:
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
        try:
            strong_key(key)
        except ValueError as error:
            yield wrong(f"{name} {error}: who guesses it can be anybody.")
        else:
            yield ok(f"{name} is long, and not one that everybody knows.")
    if "," in config["SECRET_KEY"]:
        yield note(
            "SECRET_KEY has a comma in it, so it can never be one of SECRET_KEY_FALLBACKS:"
            " when it is replaced, everybody has to log in again."
        )
    if fallbacks:
        access = config["TOKEN_EXPIRATION_DAYS"] * DAY + config["TOKEN_EXPIRATION_SECONDS"]
        longest = max(access, config["REFRESH_EXPIRATION_SECONDS"]) / DAY
        yield note(
            f"Keys in SECRET_KEY_FALLBACKS: {len(fallbacks)}. Take an old one out when its last"
            f" token is over, {longest:.3g} days after no server signs with it any more."
        )


def _doors(config: Config) -> Iterator[Finding]:
    """Look at who may do what."""
    if config["USERS_API_OPEN"]:
        yield wrong(
            "USERS_API_OPEN is on: anybody may list all users with their email addresses, and add"
            " some. Set USERS_API_OPEN=false."
        )
    else:
        yield ok("Users are listed and added by admins alone.")
    if "*" in config["CORS_ORIGINS"]:
        yield wrong(
            "CORS_ORIGINS has a * in it: the pages of any site may read the answers."
            " Name the sites that may."
        )
    else:
        named = ", ".join(sorted(config["CORS_ORIGINS"]))
        yield ok(f"Pages of other sites that may read the answers: {named or 'none'}.")
    if config.get("API_DOCS"):
        yield wrong(
            "API_DOCS is on: anybody may read the documentation of the API. Set API_DOCS=false."
        )
    else:
        yield ok("The documentation of the API is not public.")
    if port := config["METRICS_PORT"]:
        host = os.environ.get("GRANIAN_HOST", "127.0.0.1")
        if str(port) == os.environ.get("GRANIAN_PORT", "5000"):
            yield wrong(f"METRICS_PORT={port} is the port of the service itself. Choose another.")
        yield note(
            f"METRICS_PORT={port}: whoever reaches {host} at that port reads how many log in, and"
            " how busy the service is. Let in nobody but Prometheus."
        )
    if config["RATE_LIMITS"]:
        yield ok("Attempts to guess a password are counted and limited.")
    else:
        yield wrong(
            "RATE_LIMITS is off: passwords may be guessed without end. Set RATE_LIMITS=true."
        )


def _transport(config: Config) -> Finding:
    """Look at whether tokens and passwords travel unread."""
    believed = config["TRUSTED_PROXIES"]
    if config["FORCE_HTTPS"] and not believed and "GRANIAN_SSL_CERTIFICATE" not in os.environ:
        return wrong(
            "FORCE_HTTPS is on and TRUSTED_PROXIES is 0: every request will be refused, as no proxy"
            " is believed that says it came by https. Set TRUSTED_PROXIES to the number of them."
        )
    if config["FORCE_HTTPS"]:
        return ok("What does not come by https is refused.")
    return note(
        "FORCE_HTTPS is off: a token or password that is sent in the clear is taken. Behind"
        " proxies that speak https, set FORCE_HTTPS=true and TRUSTED_PROXIES to their number"
        f" (it is {believed})."
    )


def _passwords(config: Config) -> Finding:
    shortest = config["PASSWORD_MIN_LENGTH"]
    said = f"PASSWORD_MIN_LENGTH={shortest}: new passwords"
    if shortest < SHORTEST_PASSWORD:
        return wrong(f"{said} may be too short. NIST asks for {SHORTEST_PASSWORD} characters.")
    if shortest < GOOD_PASSWORD:
        return note(
            f"{said} are long enough beside a second factor. NIST asks for {GOOD_PASSWORD}"
            " characters where a password is all that somebody logs in with."
        )
    return ok(f"{said} are long enough.")


def hashing(rounds: int, seconds: float) -> Finding:
    """Look at a cost of hashes, and how long one takes here."""
    best = max(MIN_ROUNDS, rounds + math.floor(math.log2(GOOD_HASH / seconds)))
    said = f"To check a password takes {_ms(seconds)} on this machine (BCRYPT_LOG_ROUNDS={rounds})"
    better = f"BCRYPT_LOG_ROUNDS={best} would take {_ms(seconds * 2.0 ** (best - rounds))}"
    if rounds < MIN_ROUNDS:
        return wrong(f"{said}: too little for who steals the database. {better}.")
    if seconds > SLOWEST_HASH:
        return wrong(f"{said}: everybody waits, and few can log in at once. {better}.")
    if best != rounds:
        return note(f"{said}. {better}.")
    return ok(f"{said}.")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


class Server(NamedTuple):
    """A PostgreSQL server, as a connection to it shows it."""

    skew: float  # seconds that its clock is ahead of ours, as far as can be said
    superuser: bool
    connections: int  # that it takes from roles like this one
    pooled: bool  # whether a pooler stands before it, which shares them
    address: str | None  # None where it is this machine
    encrypted: bool


def _database(config: Config) -> Iterator[Finding]:
    engine = db.engines[database.PROBE]
    if config["EMBEDDED_DATABASE"]:
        yield wrong(
            "DATABASE_URL is not set: the data is in a file of the service's own. Name a database."
        )
    elif engine.dialect.name == "sqlite":
        yield note("The data is in an SQLite file: no service on another machine can share it.")
    if (missing := _missing_file(engine)) is not None:
        yield wrong(f"There is no file {missing}: {_MIGRATE}.")
        return
    try:
        yield _schema(database.schema(engine))
        if engine.dialect.name == "sqlite":
            yield ok("There is one clock: SQLite has none of its own that could differ.")
        else:
            yield from serving(database.ask(engine, _look), config, engine.url.query)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        yield wrong(f"The database cannot be used: {reason}")


_MIGRATE = "python manage.py db upgrade makes the tables, and serve does so by itself"


def _missing_file(engine: Engine) -> Path | None:
    """Return the file of an SQLite database where there is none: to look would make it."""
    name = engine.url.database or ""
    if engine.dialect.name != "sqlite" or name.startswith("file:") or Path(name).exists():
        return None
    return Path(name)


def _schema(schema: database.Schema) -> Finding:
    match schema:
        case database.Schema.CURRENT:
            return ok("The database can be reached, and every migration has run.")
        case database.Schema.AHEAD:
            return note("A newer version of the service has migrated the database; this one works.")
        case database.Schema.BEHIND:
            return wrong(f"Migrations are missing: {_MIGRATE}.")
        case database.Schema.FOREIGN:
            return wrong(
                "The database is at a migration that this version does not know, and tables that"
                " it needs are missing. Is DATABASE_URL another program's?"
            )


_SERVER = text(
    """
    SELECT clock_timestamp() AS moment,
        pg_backend_pid() AS pid,
        current_setting('is_superuser') = 'on' AS superuser,
        least(
            current_setting('max_connections')::integer
            - current_setting('superuser_reserved_connections')::integer
            - coalesce(current_setting('reserved_connections', true), '0')::integer,
            (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user),
            (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database())
        ) AS connections
    """
)


def _look(connection: Connection) -> Server:
    asked_at = clock.utcnow()
    row = connection.execute(_SERVER).one()
    answered_at = clock.utcnow()
    raw: Any = connection.connection.dbapi_connection
    return Server(
        skew=_outside(row.moment, asked_at, answered_at),
        superuser=row.superuser,
        connections=row.connections,
        # A pooler tells clients of processes that are none of the server's.
        pooled=raw.info.backend_pid != row.pid,
        address=far_end(raw.fileno()),
        encrypted=raw.info.ssl_in_use,
    )


def far_end(descriptor: int) -> str | None:
    """Return the address that a socket is connected to, or None where that is this machine."""
    with socket.socket(fileno=os.dup(descriptor)) as line:
        if line.family == socket.AF_UNIX:
            return None
        here, there = line.getsockname()[0], line.getpeername()[0]
    return None if here == there else str(there)


def _outside(moment: datetime, begin: datetime, end: datetime) -> float:
    """Return by how many seconds a moment misses an interval; negative where it comes before."""
    return max(0.0, (moment - end).total_seconds()) + min(0.0, (moment - begin).total_seconds())


def serving(server: Server, config: Config, options: Mapping[str, Any]) -> Iterator[Finding]:
    """Look at a PostgreSQL server; `options` are those of DATABASE_URL."""
    if abs(server.skew) > MAX_SKEW:
        word = "behind" if server.skew > 0 else "ahead of"
        yield wrong(
            f"The clock of this machine is {abs(server.skew):.1f} s {word} the database's: have"
            " both set by NTP. Tokens and sessions end by the clock of whichever machine is asked."
        )
    else:
        yield ok("The clocks of this machine and of the database agree to the second.")
    yield _connections(server, config)
    if server.superuser:
        yield note(
            "The service is a superuser of the database. A role that owns this one database will"
            " do, and whoever gets hold of DATABASE_URL gets less."
        )
    else:
        yield ok("The service is no superuser of the database.")
    yield _line(server, str(options.get("sslmode", "prefer")))


def _connections(server: Server, config: Config) -> Finding:
    workers, threads = config["GRANIAN_WORKERS"], config["GRANIAN_BLOCKING_THREADS"]
    wanted = workers * (2 * threads + 1)
    if server.pooled:
        return ok("A pooler shares out the connections to the database.")
    if wanted > server.connections:
        return wrong(
            f"PostgreSQL takes {server.connections} connections from this role, and this server may"
            f" want {wanted}: {workers} processes with {threads} threads, two for each thread and"
            " one for each process. Raise max_connections, or lower GRANIAN_WORKERS or"
            " GRANIAN_BLOCKING_THREADS."
        )
    return ok(
        f"PostgreSQL takes {server.connections} connections from this role, and this server wants"
        f" {wanted} at most."
    )


def _line(server: Server, mode: str) -> Finding:
    """Look at who might read what is said to the database, or say it in its place."""
    if server.address is None:
        return ok("What is said to the database stays on this machine.")
    if not server.encrypted:
        said = f"What is said to the database at {server.address} is not encrypted"
        if ipaddress.ip_address(server.address).is_global:
            return wrong(
                f"{said}, hashes of passwords included. Add ?sslmode=verify-full to DATABASE_URL."
            )
        return note(
            f"{said}: be sure of everybody in that network, or add ?sslmode=verify-full to"
            " DATABASE_URL."
        )
    if mode not in {"verify-ca", "verify-full"}:
        return note(
            f"What is said to the database is encrypted, but whoever answers in its place is taken"
            f" for it (sslmode={mode}). Add ?sslmode=verify-full to DATABASE_URL."
        )
    return ok("What is said to the database is encrypted, and it shows that it is the one.")
