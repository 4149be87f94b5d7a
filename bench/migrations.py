"""Measure how long requests wait during migrations: python -m bench.migrations --help.

Fill a database with users, and run one migration after the other while clients send the statements
of a login, a status request and a registration. Each migration begins beside a transaction that has
read every table, as pg_dump has, and that stays open for a while: a migration that waited for its
locks would make all requests wait.

The clients send SQL and not HTTP, because the code serves only the newest schema. They use the
columns of the first schema, and the tables that there are before the migration.
"""

import argparse
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import flask_migrate
import psycopg2
from alembic.script import ScriptDirectory
from sqlalchemy import URL, make_url

from bench.load import running
from bench.report import add_database_url, exit_on_sigterm, machine, say
from bench.servers import database, url_text
from project import create_app
from project.extensions import MIGRATIONS

CLIENTS = 4
PAUSE = 0.005  # seconds between two requests of a client
READING = 2.0  # seconds that the long transaction stays open
LIMIT = 1.0  # seconds that a request may take

USERS = """
INSERT INTO users (username, username_key, email, password, created_at)
SELECT 'user-' || n, 'user-' || n, 'user-' || n || '@example.com', repeat('x', 60), now()
FROM generate_series(1, %(users)s) AS n
"""
# By the table that they fill, which some migration creates.
ROWS = {
    "sessions": """
INSERT INTO sessions
    (id, user_id, generation, created_at, last_used_at, ip, user_agent, expires_at)
SELECT left(md5(id::text), 22), id, 0, now(), now(), '192.0.2.1', 'curl', now() + interval '1 day'
FROM users
""",
    "events": """
INSERT INTO events (created_at, kind, user_id, actor_id, user_agent, details)
SELECT now(), 'logged_in', id, CASE WHEN n = 2 AND mod(id, 10) = 0 THEN 1 END, 'curl', '{}'
FROM users, generate_series(1, 2) AS n
""",
}
BY_EMAIL = "SELECT id, password, active FROM users WHERE email = %(email)s"
STATUS = """
SELECT users.id, active FROM users JOIN sessions ON user_id = users.id
WHERE users.id = %(id)s AND expires_at > now()
"""
REGISTER = """
INSERT INTO users (username, username_key, email, password, created_at)
VALUES (%(name)s, %(name)s, %(name)s || '@example.com', 'x', now()) RETURNING id
"""
SESSION = """
INSERT INTO sessions (id, user_id, generation, created_at, last_used_at, user_agent, expires_at)
SELECT left(%(name)s, 22), id, 0, now(), now(), '', now() FROM users WHERE id = %(id)s FOR SHARE
"""
EVENT = """
INSERT INTO events (created_at, kind, user_id, user_agent, details)
SELECT now(), 'logged_in', id, '', '{}' FROM users WHERE id = %(id)s FOR KEY SHARE
"""


@dataclass(eq=False)
class Client(threading.Thread):
    """A client that sends requests until `over` is set."""

    url: str
    tables: set[str]
    users: int
    over: threading.Event
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Prepare the thread."""
        super().__init__(daemon=True)

    def run(self) -> None:
        """Send a login, a status request and a registration in turn, and time each."""
        with closing(psycopg2.connect(self.url)) as connection:
            number = 0
            while not self.over.wait(PAUSE):
                number += 1
                started = time.monotonic()
                try:
                    self._send(connection, number)
                except psycopg2.Error as error:
                    connection.rollback()
                    self.errors.append(str(error).splitlines()[0])
                self.seconds.append(time.monotonic() - started)

    def _send(self, connection: Any, number: int) -> None:
        user_id = number * 7919 % self.users + 1
        values = {
            "id": user_id,
            "email": f"user-{user_id}@example.com",
            "name": secrets.token_hex(16),
        }
        with connection, connection.cursor() as cursor:
            if number % 3 == 0 and "sessions" in self.tables:
                cursor.execute(STATUS, values)
                return
            if number % 3 == 1:
                cursor.execute(REGISTER, values)
                (values["id"],) = cursor.fetchone()
            else:
                cursor.execute(BY_EMAIL, values)
            if "sessions" in self.tables:
                cursor.execute(SESSION, values)
            if "events" in self.tables:
                cursor.execute(EVENT, values)


@contextmanager
def load(url: str, tables: set[str], users: int) -> Iterator[list[Client]]:
    """Run the clients while the context lasts."""
    over = threading.Event()
    clients = [Client(url, tables, users, over) for _ in range(CLIENTS)]
    with running(clients, over):
        yield clients


@contextmanager
def reader(url: str, tables: set[str]) -> Iterator[None]:
    """Begin a transaction that has read every table; it ends after READING seconds."""
    with closing(psycopg2.connect(url)) as connection:
        connection.set_session(isolation_level="REPEATABLE READ")
        for table in tables:
            connection.cursor().execute(f"SELECT 1 FROM {table} LIMIT 1")  # noqa: S608
        timer = threading.Timer(READING, connection.rollback)
        timer.start()
        try:
            yield
        finally:
            timer.join()


def report(server_url: URL, users: int) -> tuple[str, bool]:
    """Return the table in Markdown, and whether each request took at most LIMIT."""
    scripts = ScriptDirectory(str(MIGRATIONS))
    first, *others = reversed(list(scripts.walk_revisions()))
    lines = ["| migration | seconds | requests | slowest, ms | errors |", "|---|---|---|---|---|"]
    good = True
    with database(server_url) as database_url:
        url = url_text(database_url.set(drivername="postgresql"))
        os.environ["DATABASE_URL"] = url
        os.environ["SECRET_KEY"] = secrets.token_hex(32)
        with create_app("project.config.ProductionConfig").app_context():
            flask_migrate.upgrade(revision=first.revision)
            tables = {"users"}
            execute(url, USERS, users=users)
            for script in others:
                with load(url, tables, users) as clients, reader(url, tables):
                    started = time.monotonic()
                    flask_migrate.upgrade(revision=script.revision)
                    seconds = time.monotonic() - started
                times = [one for client in clients for one in client.seconds]
                errors = [error for client in clients for error in client.errors]
                lines.append(
                    f"| {script.revision} | {seconds:.1f} | {len(times):,} |"
                    f" {max(times) * 1000:,.0f} | {len(errors)} |"
                )
                say(lines[-1])
                good = good and not errors and max(times) <= LIMIT
                for table, rows in ROWS.items():
                    if table not in tables and table in names(url):
                        execute(url, rows)
                        tables.add(table)
    heading = f"{machine(server_url)}; {users:,} users, {CLIENTS} clients."
    return "\n".join([heading, "", *lines, ""]), good


def execute(url: str, statement: str, **parameters: object) -> None:
    """Execute a statement in a transaction, and renew the statistics."""
    with closing(psycopg2.connect(url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        cursor.execute("ANALYZE")


def names(url: str) -> set[str]:
    """Return the names of the tables."""
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        return {name for (name,) in cursor.fetchall()}


def main() -> int:
    """Print the table; return 1 if a request took longer than LIMIT or failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.migrations", description=__doc__)
    add_database_url(parser)
    parser.add_argument("--users", type=int, default=100_000)
    options = parser.parse_args()
    exit_on_sigterm()
    table, good = report(make_url(options.database_url), options.users)
    print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
