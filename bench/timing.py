"""Show that the time of a refused login does not tell who exists: python -m bench.timing --help.

One client tries to log in, again and again: to accounts of each kind, and to none. Each kind's
median is compared with that of the emails that nobody has, and the exit code is 1 unless every one
of them is shown to be the same within MARGIN.

Shown, not merely unrefuted: a difference that was not found may be there. Here the whole interval
in which the difference lies with CONFIDENCE has to be inside the margin (two one-sided tests, which
is the way to test equivalence), so few or noisy samples show nothing.
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

from bench.report import add_database_url, leave_when_terminated, machine, say
from bench.servers import JSON, PASSWORD, ROOT, database, service, serving, url_text
from project import passwords
from project.config import BaseConfig
from project.errors import InvalidCredentials

MARGIN = 5.0  # ms
CONFIDENCE = 0.99
RESAMPLES = 10_000
WARM = 2  # rounds that do not count
COST = 12
LOWEST_COST = 4  # that bcrypt knows
WRONG = "wrong horse battery staple!!"  # as long as PASSWORD
# As long as a body may be; plain, as normalizing has its price by the text alone.
OVERLONG = "x" * 60_000

USER = """
INSERT INTO users (username, username_key, email, password, active, created_at)
VALUES (%(name)s, %(name)s, %(email)s, %(password)s, %(active)s, now())
"""


@dataclass(frozen=True)
class Case:
    """A kind of login that is refused."""

    name: str
    password: str = WRONG
    cost: int | None = None  # of the account's hash; None: there is no account
    active: bool = True
    mark: str = ""  # of the kind of the hash

    @property
    def email(self) -> str:
        """The account's email; where there is no account, each time another."""
        return f"{secrets.token_hex(8) if self.cost is None else self.username}@example.com"

    @property
    def username(self) -> str:
        """The account's name."""
        return self.name.replace(" ", "-")


def cases(cost: int) -> list[Case]:
    """Return what is compared, and first what it is compared with."""
    return [
        Case("unknown email"),
        Case("unknown email, over-long password", OVERLONG),
        Case("wrong password", cost=cost),
        Case("over-long password", OVERLONG, cost),
        Case("deactivated user", cost=cost, active=False),
        Case(f"old hash of cost {cost - 1}", cost=cost - 1),
        Case(f"old hash of cost {LOWEST_COST}", cost=LOWEST_COST),
        Case("imported hash", cost=cost, mark=passwords.FOREIGN),
    ]


def add_accounts(database_url: URL, kinds: Sequence[Case]) -> None:
    """Add the account of each case that has one; its password is PASSWORD."""
    plain = url_text(database_url.set(drivername="postgresql"))
    with closing(psycopg2.connect(plain)) as connection, connection, connection.cursor() as cursor:
        for case in kinds:
            if case.cost is not None:
                hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(case.cost)).decode()
                row = {"name": case.username, "email": case.email, "active": case.active}
                cursor.execute(USER, {**row, "password": case.mark + hashed})


def attempt(connection: http.client.HTTPConnection, case: Case) -> float:
    """Return the milliseconds that a refusal takes; raises RuntimeError for any other answer."""
    body = json.dumps({"email": case.email, "password": case.password}).encode()
    start = time.perf_counter()
    connection.request("POST", "/auth/login", body, JSON)
    answer = connection.getresponse()
    content = answer.read()
    taken = time.perf_counter() - start
    if json.loads(content).get("code") != InvalidCredentials.code:
        raise RuntimeError(f"{case.name}: {content!r}")
    return taken * 1000


def measure(port: int, kinds: Sequence[Case], samples: int) -> list[list[float]]:
    """Return the milliseconds of each case: so many rounds in which each has one turn.

    The order is another in each round, so that none always follows the same one. All go over one
    connection, and so to one process: nothing but the case differs.
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
    """Return the interval that holds the difference of the medians with CONFIDENCE.

    Percentiles of the bootstrap (Efron and Tibshirani, 1993, 13.3). What is drawn is rounds, both
    values of each, as they share whatever else the machine did just then.
    """
    chance = random.Random(0)  # noqa: S311  # the same samples have the same interval
    differences = []
    for _ in range(RESAMPLES):
        drawn = chance.choices(range(len(times)), k=len(times))
        median = statistics.median([times[number] for number in drawn])
        differences.append(median - statistics.median([others[number] for number in drawn]))
    percentiles = statistics.quantiles(differences, n=round(2 / (1 - CONFIDENCE)))
    return percentiles[0], percentiles[-1]


@dataclass(frozen=True)
class Finding:
    """What the samples of a case say, in ms."""

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
            f" | {'same' if self.same else '**not shown to be**'} |"
        )


def compare(kinds: Sequence[Case], times: Sequence[Sequence[float]]) -> Iterator[Finding]:
    """Yield what is found of each case but the first, with which they are compared."""
    unknown = statistics.median(times[0])
    for case, taken in zip(kinds[1:], times[1:], strict=True):
        median = statistics.median(taken)
        yield Finding(case, median, median - unknown, *interval(taken, times[0]))


def report(where: str, cost: int, unknown: Sequence[float], findings: Sequence[Finding]) -> str:
    """Return what was found in Markdown; `unknown` are the times of the unknown emails."""
    heading = (
        f"{where}; bcrypt cost {cost}, {len(unknown)} samples of each kind. An unknown email:"
        f" {statistics.median(unknown):.1f} ms."
    )
    columns = f"refused login | median ms | difference ms | its {CONFIDENCE:.0%} interval"
    table = [f"| {columns} | ±{MARGIN:g} ms |", "|---|---|---|---|---|", *map(str, findings)]
    return "\n".join([heading, "", *table, ""])


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.timing", description=__doc__)
    parser.add_argument("--samples", type=int, default=250, help="of each case")
    parser.add_argument("--cost", type=int, default=COST, help="bcrypt's; noise grows with it")
    parser.add_argument(
        "--checkout", type=Path, default=ROOT, help="measure the service as it stands there"
    )
    add_database_url(parser)
    parser.add_argument("--output", type=Path, help="where to write the table, in Markdown")
    return parser.parse_args()


def main() -> None:
    """Measure and print; the exit code is 1 unless all is shown to be the same."""
    options = parse()
    leave_when_terminated()
    # The same accounts are tried again and again: everything is counted, and no limit reached.
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
    text = report(machine(server_url), options.cost, times[0], findings)
    print(text)
    if options.output:
        options.output.write_text(text)
    sys.exit(not all(finding.same for finding in findings))


if __name__ == "__main__":
    main()
