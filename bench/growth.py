"""Show whether the number of users and sessions makes a difference: python -m bench.growth --help.

Create, migrate and fill databases of several sizes. Run the operations of a request in the
application, record the statements as they are sent to PostgreSQL, time them in turn and explain
them.
"""

import argparse
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import flask_migrate
import psycopg2
from flask import current_app
from sqlalchemy import URL, Connection, Engine, event, make_url

from bench.report import (
    add_database_url,
    exit_on_sigterm,
    machine,
    say,
    spread,
    spread_in_words,
)
from bench.servers import PASSWORD, database, url_text
from project import UsersService, create_app, db
from project.accounts import audit, authentication, directory, sessions
from project.lib import hashing
from project.lib.database import READ
from project.tokens import codec

MANY, ONE = 1, 2  # the IDs of the user with very many sessions and of a user with one
SAMPLE = 1_000  # sessions of each case whose statements are timed
BLOCKS, BLOCK = 20, 250  # the number of ratios, and of executions for each

USERS = """
INSERT INTO users (id, username, username_key, email, password, created_at)
SELECT n, 'user-' || n, 'user-' || n, 'user-' || n || '@example.com',
    %(password)s, now()
FROM generate_series(1, %(users)s) AS n
"""
# One in ten is expired, the others last up to 28 days, and no two expire at the same time. The
# sessions of one user are far apart in the table, as they are in production.
SESSIONS = """
INSERT INTO sessions
    (id, user_id, generation, created_at, last_used_at, ip, user_agent, expires_at)
SELECT left(translate(encode(sha256(n::text::bytea), 'base64'), '+/', '-_'), 22),
    CASE WHEN n <= %(many)s THEN 1 WHEN n = %(many)s + 1 THEN 2 ELSE 3 + n %% (%(users)s - 2) END,
    0, now() - interval '30 days', now() - interval '30 days', '192.0.2.1',
    'Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0',
    now() + (n %% 10 - 0.5) * interval '3 days' + n * interval '0.1 seconds'
FROM generate_series(1, %(sessions)s) AS n ORDER BY md5(n::text)
"""
LIVE = """
SELECT user_id, id FROM sessions
WHERE expires_at > now() + interval '1 day' AND user_id BETWEEN %s AND %s
ORDER BY random() LIMIT %s
"""
EXPLAIN = "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF, BUFFERS OFF) "


@dataclass(frozen=True)
class Size:
    """The number of rows; one user has `many` of the sessions, the others are spread evenly."""

    users: int
    sessions: int
    many: int

    def __str__(self) -> str:
        return f"{self.users:,} users, {self.sessions:,} sessions"

    def __floordiv__(self, divisor: int) -> "Size":
        return Size(self.users // divisor, self.sessions // divisor, max(1, self.many // divisor))


SMALL = Size(1_000, 1_000, 1)
# PostgreSQL plans a prepared statement once for all users, for the average number of sessions:
# ten in LARGE, one in SPARSE.
LARGE, SPARSE = Size(100_000, 1_000_000, 1_000), Size(100_000, 101_000, 1_000)
MILLION = Size(1_000_000, 1_000_000, 1)
PAGE = 50  # users


class Sent(NamedTuple):
    """A statement as it was sent to PostgreSQL, and the engine that sent it."""

    engine: Engine
    text: str

    def execute(self, prefix: str = "") -> Sequence[Any]:
        """Execute the statement again on a connection of the same engine, and roll it back."""
        with closing(self.engine.raw_connection()) as connection:
            cursor = connection.cursor()
            cursor.execute(prefix + self.text)
            rows: Sequence[Any] = cursor.fetchall()
            connection.rollback()
        return rows


@dataclass(frozen=True)
class Filled:
    """A filled database, and the application that uses it."""

    size: Size
    app: UsersService
    connection: Any  # of psycopg2, outside the application

    @property
    def many_sessions(self) -> str:
        """The label of the user with many sessions."""
        return f"the user with {self.size.many:,} sessions"

    def sent(self, function: Callable[..., object], *arguments: Any) -> list[Sent]:
        """Return the statements that the application sends for a call, and roll them back."""
        statements: list[Sent] = []

        def record(connection: Connection, cursor: Any, *_: object) -> None:
            statements.append(Sent(connection.engine, cursor.query.decode()))

        with self.app.app_context():
            engines = db.engine, db.engines[READ]
            for engine in engines:
                event.listen(engine, "after_cursor_execute", record)
            function(*arguments)
            for engine in engines:
                event.remove(engine, "after_cursor_execute", record)
            db.session.rollback()
        return statements

    def some_ids(self) -> range:
        """Return the IDs of SAMPLE users, evenly spread over the table."""
        return range(1, self.size.users + 1, max(1, self.size.users // SAMPLE))

    def pages(self, ids: range) -> list[Sent]:
        """Return the statements of the pages of the list of users that start after these users."""
        with self.connection.cursor() as cursor:
            cursor.execute("SELECT created_at, id FROM users WHERE id = ANY(%s)", (list(ids),))
            cursors = cursor.fetchall()
        return [one for after in cursors for one in self.sent(directory.newest, PAGE + 1, after)]

    def guards(self, first: int, last: int) -> list[Sent]:
        """Return the guard's statements for at most SAMPLE live sessions of these users."""
        with self.connection.cursor() as cursor:
            cursor.execute(LIVE, (first, last, SAMPLE))
            live = cursor.fetchall()
        return [statement for row in live for statement in self.sent(_call, *row)]


def _call(user_id: int, session_id: str) -> None:
    """Run the guard with a token of this session."""
    now = int(time.time())
    access = codec.AccessClaims(user_id, session_id, now, now + 60)
    sessions.identify(codec.encode_access(access, key=current_app.config["SECRET_KEY"]))


@contextmanager
def filled(server_url: URL, size: Size) -> Iterator[Filled]:
    """Create, migrate and fill a database; drop it at the end."""
    say(f"filling: {size}")
    with database(server_url) as url:
        os.environ["DATABASE_URL"] = url_text(url)
        os.environ["SECRET_KEY"] = secrets.token_hex(32)
        os.environ["BCRYPT_LOG_ROUNDS"] = "4"
        app = create_app("project.config.ProductionConfig")
        with app.app_context():
            flask_migrate.upgrade()
            password = hashing.hash(PASSWORD)
        with closing(psycopg2.connect(url_text(url.set(drivername="postgresql")))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(USERS, {**vars(size), "password": password})
                cursor.execute(SESSIONS, vars(size))
                cursor.execute("VACUUM (ANALYZE)")
            yield Filled(size, app, connection)


def time_in_turn(cases: Sequence[Sequence[Sent]]) -> list[list[float]]:
    """Return for each case the median seconds of an execution, block by block.

    The cases take turns after each statement, and the case that goes first changes each time.
    """
    supplies = [cycle(case) for case in cases]
    blocks: list[list[float]] = [[] for _ in cases]
    for _ in range(BLOCKS):
        taken: list[list[float]] = [[] for _ in cases]
        for number in range(BLOCK):
            for turn in range(len(cases)):
                case = (number + turn) % len(cases)
                statement = next(supplies[case])
                start = time.perf_counter()
                statement.execute()
                taken[case].append(time.perf_counter() - start)
        for case, durations in enumerate(taken):
            blocks[case].append(statistics.median(durations))
    return blocks


def times(small: Filled, *others: Filled) -> Iterator[str]:
    """Yield the duration of the guard's statement with few and many sessions, in Markdown."""
    cases = {str(small.size): small.guards(1, small.size.users)}
    for one in others:
        cases[str(one.size)] = one.guards(ONE, one.size.users)
        cases[f"{one.size}; {one.many_sessions}"] = one.guards(MANY, MANY)
    blocks = time_in_turn(list(cases.values()))
    yield "| the guard's statement | median µs | ratio to the first |"
    yield "|---|---|---|"
    for name, medians in zip(cases, blocks, strict=True):
        ratios = [median / first for median, first in zip(medians, blocks[0], strict=True)]
        yield f"| {name} | {statistics.median(medians) * 1e6:.0f} | {spread(ratios)} |"


def users(databases: Sequence[Filled]) -> Iterator[str]:
    """Yield the duration of queries about users with few and many users, in Markdown."""
    queries: dict[str, Callable[[Filled], list[Sent]]] = {
        "find the caller": lambda one: one.guards(1, one.size.users),
        "find a user by email": lambda one: [
            statement
            for number in one.some_ids()
            for statement in one.sent(directory.find_by_email, f"user-{number}@example.com")
        ],
        "the first page of users": lambda one: one.sent(directory.newest, PAGE + 1),
        "a page in the middle": lambda one: one.pages(one.some_ids()[1:]),
    }
    yield f"| median µs | {' | '.join(f'{one.size.users:,} users' for one in databases)} |"
    yield f"|---|{'---|' * len(databases)}"
    for name, collect in queries.items():
        blocks = time_in_turn([collect(one) for one in databases])
        cells = []
        for medians in blocks:
            ratios = [median / first for median, first in zip(medians, blocks[0], strict=True)]
            cells.append(f"{statistics.median(medians) * 1e6:.0f}, {spread(ratios)}")
        yield f"| {name} | {' | '.join(cells)} |"


def plans(large: Filled, sparse: Filled) -> Iterator[str]:
    """Yield the plans of the statements that involve sessions, in Markdown."""
    statements_of = {}
    for one in (large, sparse):
        statements_of[f"The guard, a user with 1 session; {one.size}"] = one.guards(ONE, ONE)
        statements_of[f"The guard, {one.many_sessions}; {one.size}"] = one.guards(MANY, MANY)[:1]
    login = f"user-{MANY}@example.com", PASSWORD, None, audit.Origin("192.0.2.1", "")
    statements_of[f"A login, {large.many_sessions}; {large.size}"] = large.sent(
        authentication.log_in, *login
    )
    statements_of[f"One batch of a purge; {large.size}"] = large.sent(sessions.delete_expired)
    for name, statements in statements_of.items():
        yield from ["", f"{name}:"]
        for statement in statements:
            yield from ["", "```", *(line for (line,) in statement.execute(EXPLAIN)), "```"]


def report(server_url: URL, divisor: int) -> str:
    """Return the times and the plans in Markdown."""
    heading = (
        f"{machine(server_url)}; {BLOCKS * BLOCK:,} executions of each, in turn, in {BLOCKS}"
        f" blocks. Medians; ratios of the blocks' medians with {spread_in_words(BLOCKS)}."
    )
    with (
        filled(server_url, SMALL) as small,
        filled(server_url, LARGE // divisor) as large,
        filled(server_url, SPARSE // divisor) as sparse,
        filled(server_url, MILLION // divisor) as million,
    ):
        say("timing")
        table = [*times(small, large, sparse), "", *users([small, large, million])]
        say("explaining")
        return "\n".join([heading, "", *table, *plans(large, sparse), ""])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    add_database_url(parser)
    parser.add_argument("--output", type=Path, help="the file for the results, in Markdown")
    parser.add_argument(
        "--divide-by", type=int, default=1, help="divide the size of the large databases by this"
    )
    options = parser.parse_args()
    exit_on_sigterm()
    text = report(make_url(options.database_url), options.divide_by)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
