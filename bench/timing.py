"""Show that response times do not reveal whether a user exists: python -m bench.timing --help.

One client sends logins that are refused, and then requests for a link to reset the password, for
accounts of each kind and for unknown emails. The median of each kind is compared with that of
unknown emails. The exit code is 1 unless every kind is shown to be equal within MARGIN.

The test is one of equivalence (two one-sided tests): the whole interval of the difference, with
CONFIDENCE, must lie within the margin. A difference that was not found could still exist, so few or
noisy samples show nothing.
"""

import argparse
import http.client
import json
import os
import random
import secrets
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import bcrypt
import psycopg2
from sqlalchemy import URL, make_url

from bench.report import add_database_url, exit_on_sigterm, machine, say
from bench.servers import JSON, PASSWORD, ROOT, database, service, serving, url_text
from project.config import BaseConfig
from project.errors import InvalidCredentials
from project.lib import hashing

MARGIN = 5.0  # ms
CONFIDENCE = 0.99
RESAMPLES = 10_000
WARM = 2  # rounds that are not counted
COST = 12
LOWEST_COST = 4  # of bcrypt
WRONG = "wrong horse battery staple!!"  # as long as PASSWORD
# Nearly as long as a body may be; ASCII, because the cost of normalizing depends only on the text.
OVERLONG = "x" * 60_000

# Nothing sends the emails.
MAIL = {
    "SMTP_URL": "smtp://127.0.0.1:1",
    "MAIL_FROM": "users@example.com",
    "LINK_BASE_URL": "https://app.example",
    "MAIL_SENDER": "false",
}

USER = """
INSERT INTO users (username, username_key, email, password, active, created_at)
VALUES (%(name)s, %(name)s, %(email)s, %(password)s, %(active)s, now())
"""


@dataclass(frozen=True)
class Case:
    """A kind of refused login, or of request for a link."""

    name: str
    password: str = WRONG
    cost: int | None = None  # of the account's hash; None without an account
    active: bool = True
    mark: str = ""  # the prefix of the stored hash
    path: str = "/auth/login"
    outcome: str = f'"code":"{InvalidCredentials.code}"'  # what the response contains

    @property
    def email(self) -> str:
        """The account's email; without an account, a new one each time."""
        return f"{secrets.token_hex(8) if self.cost is None else self.username}@example.com"

    @property
    def username(self) -> str:
        """The account's username."""
        return self.name.replace(" ", "-").replace(":", "")


def cases(cost: int) -> list[Case]:
    """Return the cases; the first is the one that the others are compared with."""
    return [
        Case("unknown email"),
        Case("unknown email, over-long password", OVERLONG),
        Case("wrong password", cost=cost),
        Case("over-long password", OVERLONG, cost),
        Case("deactivated user", cost=cost, active=False),
        Case(f"old hash of cost {cost - 1}", cost=cost - 1),
        Case(f"old hash of cost {LOWEST_COST}", cost=LOWEST_COST),
        Case("imported hash", cost=cost, mark=hashing.FOREIGN),
    ]


def forgotten(cost: int) -> list[Case]:
    """Return the cases of requests for a link, in the same form."""
    sent = {"path": "/auth/password/forgot", "outcome": "an email is on its way"}
    return [
        Case("forgot: unknown email", **sent),
        Case("forgot: known email", cost=cost, **sent),
        Case("forgot: deactivated user", cost=cost, active=False, **sent),
    ]


def add_accounts(database_url: URL, kinds: Sequence[Case]) -> None:
    """Add an account with the password PASSWORD for each case that has one."""
    plain = url_text(database_url.set(drivername="postgresql"))
    with closing(psycopg2.connect(plain)) as connection, connection, connection.cursor() as cursor:
        for case in kinds:
            if case.cost is not None:
                hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(case.cost)).decode()
                row = {"name": case.username, "email": case.email, "active": case.active}
                cursor.execute(USER, {**row, "password": case.mark + hashed})


def attempt(connection: http.client.HTTPConnection, case: Case) -> float:
    """Return the milliseconds of a response; raise RuntimeError for an unexpected one."""
    body = json.dumps({"email": case.email, "password": case.password}).encode()
    start = time.perf_counter()
    connection.request("POST", case.path, body, JSON)
    answer = connection.getresponse()
    content = answer.read()
    taken = time.perf_counter() - start
    if case.outcome not in content.decode():
        raise RuntimeError(f"{case.name}: {content!r}")
    return taken * 1000


def measure(port: int, kinds: Sequence[Case], samples: int) -> list[list[float]]:
    """Return the milliseconds of each case in `samples` rounds with one attempt of each.

    The order is random in each round, so that no case always follows the same one. All attempts use
    one connection and therefore one process, so only the case differs.
    """
    shuffled = list(enumerate(kinds))
    times: list[list[float]] = [[] for _ in kinds]
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        for number in range(WARM + samples):
            random.shuffle(shuffled)
            for place, case in shuffled:
                taken = attempt(connection, case)
                if number >= WARM:
                    times[place].append(taken)
            if number % 25 == 0:
                say(f"{number} of {WARM + samples} rounds")
    return times


def interval(times: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the interval that contains the difference of the medians with CONFIDENCE.

    Percentiles of the bootstrap (Efron and Tibshirani, 1993, 13.3). It draws rounds, with both
    values of each, because they share the load of the machine at that time.
    """
    chance = random.Random(0)  # noqa: S311  # reproducible on purpose
    differences = []
    for _ in range(RESAMPLES):
        drawn = chance.choices(range(len(times)), k=len(times))
        median = statistics.median([times[number] for number in drawn])
        differences.append(median - statistics.median([others[number] for number in drawn]))
    percentiles = statistics.quantiles(differences, n=round(2 / (1 - CONFIDENCE)))
    return percentiles[0], percentiles[-1]


@dataclass(frozen=True)
class Finding:
    """The result of a case, in ms."""

    case: Case
    median: float
    difference: float
    low: float
    high: float

    @property
    def same(self) -> bool:
        """Whether the case is shown to take as long as an unknown email."""
        return self.low > -MARGIN and self.high < MARGIN

    def __str__(self) -> str:
        """Return a line of Markdown."""
        spread = f"{self.difference:+.2f} | {self.low:+.2f} to {self.high:+.2f}"
        return (
            f"| {self.case.name} | {self.median:.1f} | {spread}"
            f" | {'same' if self.same else '**not shown**'} |"
        )


def compare(kinds: Sequence[Case], times: Sequence[Sequence[float]]) -> Iterator[Finding]:
    """Yield the result of each case but the first, which they are compared with."""
    unknown = statistics.median(times[0])
    for case, taken in zip(kinds[1:], times[1:], strict=True):
        median = statistics.median(taken)
        yield Finding(case, median, median - unknown, *interval(taken, times[0]))


def report(where: str, cost: int, unknown: Sequence[float], findings: Sequence[Finding]) -> str:
    """Return the results in Markdown; `unknown` are the times of the unknown emails."""
    heading = (
        f"{where}; bcrypt cost {cost}, {len(unknown)} samples of each kind. A login with an unknown"
        f" email: {statistics.median(unknown):.1f} ms."
    )
    columns = f"response | median ms | difference ms | {CONFIDENCE:.0%} interval"
    table = [f"| {columns} | ±{MARGIN:g} ms |", "|---|---|---|---|---|", *map(str, findings)]
    return "\n".join([heading, "", *table, ""])


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.timing", description=__doc__)
    parser.add_argument("--samples", type=int, default=250, help="samples of each case")
    parser.add_argument(
        "--cost", type=int, default=COST, help="the bcrypt cost; noise grows with it"
    )
    parser.add_argument(
        "--checkout", type=Path, default=ROOT, help="measure the service in this checkout"
    )
    add_database_url(parser)
    parser.add_argument("--output", type=Path, help="the file for the table, in Markdown")
    return parser.parse_args()


def main() -> None:
    """Measure and print; exit with 1 unless every case is shown to be equal."""
    options = parse()
    exit_on_sigterm()
    # The same accounts are tried repeatedly: attempts are counted, and no limit is reached.
    limits = {"LOGIN_FAILURES_PER_ACCOUNT": "10000", "LOGIN_FAILURES_PER_ADDRESS": "1000000"}
    os.environ.update(limits)
    server_url = make_url(options.database_url)
    fields = BaseConfig.model_fields
    workers, threads = (
        fields[name].default for name in ("GRANIAN_WORKERS", "GRANIAN_BLOCKING_THREADS")
    )
    contender = replace(service(workers, threads), root=options.checkout.resolve())
    kinds = cases(options.cost)
    with database(server_url) as url, serving(contender, url, options.cost) as server:
        add_accounts(url, kinds)
        times = measure(server.port, kinds, options.samples)
    findings = list(compare(kinds, times))
    # Emails are limited to a few an hour, by the same statements for every address.
    os.environ.update(RATE_LIMITS="false", **MAIL)
    kinds = forgotten(options.cost)
    with database(server_url) as url, serving(contender, url, options.cost) as server:
        add_accounts(url, kinds)
        findings += compare(kinds, measure(server.port, kinds, options.samples))
    text = report(machine(server_url), options.cost, times[0], findings)
    print(text)
    if options.output:
        options.output.write_text(text)
    sys.exit(not all(finding.same for finding in findings))


if __name__ == "__main__":
    main()
