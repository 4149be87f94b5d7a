"""Measure the service beside the plain reference application: python -m bench.run --help.

With --against, measure it beside the service in another checkout. Both use the same PostgreSQL
server, each with its own database, and take turns under the same load. The result is the median of
the ratios of the turns.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import bcrypt
from sqlalchemy import URL, make_url

from bench.load import Outcome, closed, paced
from bench.pgproxy import PostgresProxy
from bench.report import (
    add_database_url,
    cores,
    exit_on_sigterm,
    machine,
    say,
    spread,
    spread_in_words,
)
from bench.servers import (
    PASSWORD,
    Contender,
    Server,
    before,
    database,
    fill,
    http,
    populate,
    reference,
    registrations,
    service,
    serving,
)
from project.config import BaseConfig

CONNECTIONS = 16
LOGGING_IN_AT_ONCE = 8  # clients that always find a hash slot, however they are spread
LOW_COST, HIGH_COST = 4, 12
REGISTRATIONS_PER_SECOND = 2_000  # more than either program reaches
STATUS_PER_SECOND, STATUS_CONNECTIONS = 50, 4
WARM_REQUESTS, COUNTED_REQUESTS = 5, 4


@dataclass(frozen=True)
class Load:
    """One line of the table: the requests, and the bcrypt cost."""

    name: str
    cost: int
    requests: Callable[[Server, float], list[bytes]]  # the float: seconds
    connections: int = CONNECTIONS
    storm: int = 0  # clients that log in without pause while `requests` come at a steady rate

    def run(self, server: Server, seconds: float, pool: ProcessPoolExecutor) -> "Turn":
        """Load `server` for `seconds` from separate processes."""
        if self.cost == HIGH_COST:
            seconds *= 2  # with few responses a second, the rate needs more time
        requests = self.requests(server, seconds)
        if not self.storm:
            once = self.name == "register"
            settle = min(1.0, seconds / 2)
            future = pool.submit(
                closed, server.port, requests, self.connections, seconds, settle=settle, once=once
            )
            return Turn(future.result(), server.memory())
        storm = pool.submit(closed, server.port, server.logins, self.storm, seconds)
        steady = pool.submit(
            paced, server.port, requests, STATUS_PER_SECOND, STATUS_CONNECTIONS, seconds
        )
        return Turn(steady.result(), server.memory(), storm.result())


@dataclass(frozen=True)
class Turn:
    """The result of one contender in one round of a load."""

    outcome: Outcome
    memory: float  # MiB
    storm: Outcome | None = None


LOADS = [
    Load("ping", LOW_COST, lambda *_: [http("GET", "/ping")]),
    Load("status", LOW_COST, lambda server, _: server.statuses),
    Load("users", LOW_COST, lambda *_: [http("GET", "/users?limit=50")]),
    Load("login", LOW_COST, lambda server, _: server.logins, LOGGING_IN_AT_ONCE),
    Load(
        "register",
        LOW_COST,
        lambda _, seconds: registrations(int((seconds + 1) * REGISTRATIONS_PER_SECOND)),
        LOGGING_IN_AT_ONCE,
    ),
    Load("login-12", HIGH_COST, lambda server, _: server.logins, LOGGING_IN_AT_ONCE),
    Load("storm-8", HIGH_COST, lambda server, _: server.statuses, storm=8),
    Load("storm-40", HIGH_COST, lambda server, _: server.statuses, storm=40),
]


def count_statements(
    contender: Contender, database_url: URL, loads: Sequence[Load]
) -> dict[str, list[list[str]]]:
    """Return the SQL statements of each of some warm requests, by the name of the load.

    A warm request meets a server of one process with open connections to the database.
    """
    counted: dict[str, list[list[str]]] = {}
    upstream = database_url.host or "127.0.0.1", database_url.port or 5432
    with (
        PostgresProxy(*upstream) as proxy,
        serving(
            contender, database_url.set(host="127.0.0.1", port=proxy.port), LOW_COST, workers=1
        ) as server,
    ):
        populate(server)
        for load in loads:
            requests = load.requests(server, 1)[: WARM_REQUESTS + COUNTED_REQUESTS]
            while len(requests) < WARM_REQUESTS + COUNTED_REQUESTS:
                requests = requests * 2
            closed(server.port, requests[:WARM_REQUESTS], 1, 10, settle=0, once=True)
            counted[load.name] = []
            for request in requests[WARM_REQUESTS : WARM_REQUESTS + COUNTED_REQUESTS]:
                proxy.clear()
                closed(server.port, [request], 1, 10, settle=0, once=True)
                time.sleep(0.05)  # for statements that follow the response
                counted[load.name].append(proxy.statements)
    return counted


def bcrypt_limit(cost: int, seconds: float) -> float:
    """Return how many hashes a second this machine checks with one thread on each core."""
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(cost))
    durations: list[float] = []

    def check() -> None:
        until = time.monotonic() + seconds
        while (start := time.monotonic()) < until:
            bcrypt.checkpw(PASSWORD.encode(), hashed)
            durations.append(time.monotonic() - start)

    threads = [threading.Thread(target=check) for _ in range(cores())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(threads) / statistics.fmean(durations)


@dataclass
class Row:
    """The results of one load: the turns of both contenders, round by round."""

    load: Load
    turns: dict[str, list[Turn]]  # by contender, the service first
    limits: list[float]  # bcrypt_limit after each round, for the logins at the high cost
    statements: dict[str, list[list[str]]]

    def median(self, name: str, value: Callable[[Turn], float]) -> float:
        """Return the median of `value` over the turns of a contender."""
        return statistics.median(value(turn) for turn in self.turns[name])

    def ratio(self, value: Callable[[Turn], float]) -> str:
        """Return the median of the rounds' ratios of service to other, and its spread."""
        return spread(
            [
                value(ours) / value(theirs) if value(theirs) else float("inf")
                for ours, theirs in zip(*self.turns.values(), strict=True)
            ]
        )

    def pair(self, value: Callable[[Turn], float], digits: int = 0) -> str:
        """Return the medians of both."""
        return " / ".join(f"{self.median(name, value):,.{digits}f}" for name in self.turns)

    def sql(self) -> str:
        """Return the statements per request of both."""
        return " / ".join(
            f"{statistics.fmean(map(len, self.statements[name])):g}" for name in self.turns
        )

    def others(self) -> str:
        """Return the unsuccessful responses of all turns; empty if there were none."""
        found = []
        for name, turns in self.turns.items():
            outcomes = [turn.outcome for turn in turns]
            busy = sum(outcome.busy for outcome in outcomes)
            lost = sum(outcome.lost for outcome in outcomes)
            unexpected = [outcome.unexpected for outcome in outcomes if outcome.unexpected]
            if busy or lost or unexpected:
                found.append(f"{name}: {busy} busy, {lost} lost, {unexpected or 'no'} others")
        return "; ".join(found)


def contend(options: argparse.Namespace) -> list[Contender]:
    """Return the service and the program that it is compared with."""
    size = options.workers, options.threads
    return [service(*size), before(options.against, *size) if options.against else reference()]


def measure(contenders: list[Contender], options: argparse.Namespace) -> list[Row]:
    """Return the results of the chosen loads."""
    chosen = [load for load in LOADS if load.name in options.only]
    rows = [Row(load, {c.name: [] for c in contenders}, [], {}) for load in chosen]
    with ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(2, get_context("spawn")))
        databases = [
            stack.enter_context(database(make_url(options.database_url))) for _ in contenders
        ]
        counted = [load for load in chosen if load.cost == LOW_COST]
        for contender, url in zip(contenders, databases, strict=True):
            if counted:
                say(f"statements: {contender.name}")
                statements = count_statements(contender, url, counted)
                for row in rows:
                    row.statements[contender.name] = statements.get(row.load.name, [])
        for cost in (LOW_COST, HIGH_COST):
            if group := [row for row in rows if row.load.cost == cost]:
                with ExitStack() as running:
                    servers = [
                        running.enter_context(serving(contender, url, cost))
                        for contender, url in zip(contenders, databases, strict=True)
                    ]
                    for server in servers:
                        populate(server)
                        if cost == LOW_COST:
                            fill(server)
                    for row in group:
                        take_turns(row, servers, options, pool)
    return rows


def take_turns(
    row: Row, servers: list[Server], options: argparse.Namespace, pool: ProcessPoolExecutor
) -> None:
    """Load each server in turn, round by round; the order is reversed in each round."""
    for number in range(options.rounds):
        for server in reversed(servers) if number % 2 else servers:
            turn = row.load.run(server, options.seconds, pool)
            row.turns[server.contender.name].append(turn)
            say(f"{row.load.name} {number + 1}/{options.rounds} {server.contender.name}: {turn}")
        if row.load.cost == HIGH_COST and not row.load.storm:
            row.limits.append(bcrypt_limit(HIGH_COST, 2 * options.seconds))


def report(rows: list[Row], contenders: list[Contender], options: argparse.Namespace) -> str:
    """Return the tables in Markdown."""
    names = " / ".join(contender.name for contender in contenders)
    circumstances = [
        machine(make_url(options.database_url)),
        *(f"{contender.name}: {contender.description}" for contender in contenders),
        f"{options.rounds} rounds of {options.seconds:g} s (at cost 12 twice that)",
    ]
    heading = (
        f"{'; '.join(circumstances)}. {names.capitalize()}, medians;"
        f" ratios with {spread_in_words(options.rounds)}."
    )
    plain = [row for row in rows if not row.load.storm]
    storms = [row for row in rows if row.load.storm]
    lines = [heading]
    if plain:
        lines += [
            "",
            "| load | requests/s | ratio | p50 ms | p99 ms | MiB | SQL |",
            "|---|---|---|---|---|---|---|",
            *map(_plain_line, plain),
        ]
    if storms:
        lines += [
            "",
            f"| {STATUS_PER_SECOND} status/s | p50 ms | p99 ms | logins/s | 503 | lost | MiB |",
            "|---|---|---|---|---|---|---|",
            *map(_storm_line, storms),
        ]
    notes = [f"- {row.load.name}: {row.others()}" for row in rows if row.others()]
    for row in rows:
        if row.limits:
            limit = statistics.median(row.limits)
            shares = (row.median(name, _per_second) / limit for name in row.turns)
            notes.append(
                f"- {row.load.name}: bcrypt alone does {limit:.2f} hashes a second"
                f" at cost {HIGH_COST} on these cores;"
                f" {names} reach {' / '.join(f'{share:.0%}' for share in shares)}"
            )
    return "\n".join([*lines, "", *notes, ""])


def _per_second(turn: Turn) -> float:
    return turn.outcome.per_second


def _plain_line(row: Row) -> str:
    cells = [
        row.load.name,
        row.pair(_per_second, digits=1 if row.load.cost == HIGH_COST else 0),
        row.ratio(_per_second),
        row.pair(lambda turn: turn.outcome.p50_ms, digits=1),
        row.pair(lambda turn: turn.outcome.p99_ms, digits=1),
        row.pair(lambda turn: turn.memory),
        row.sql() if row.load.cost == LOW_COST else "",
    ]
    return f"| {' | '.join(cells)} |"


def _storm_line(row: Row) -> str:
    def storm(value: Callable[[Outcome], float]) -> Callable[[Turn], float]:
        return lambda turn: value(turn.storm) if turn.storm else 0.0

    cells = [
        row.load.name,
        row.pair(lambda turn: turn.outcome.p50_ms, digits=1),
        row.pair(lambda turn: turn.outcome.p99_ms, digits=1),
        row.pair(storm(lambda outcome: outcome.per_second), digits=1),
        row.pair(storm(lambda outcome: outcome.busy)),
        row.pair(lambda turn: turn.outcome.lost + (turn.storm.lost if turn.storm else 0)),
        row.pair(lambda turn: turn.memory),
    ]
    return f"| {' | '.join(cells)} |"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    names = [load.name for load in LOADS]
    fields = BaseConfig.model_fields
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one turn")
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of each program under each load"
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument(
        "--against",
        type=_checkout,
        metavar="PATH",
        help="compare with the service in another checkout, not with the reference",
    )
    add_database_url(parser)
    parser.add_argument(
        "--workers", type=int, default=fields["GRANIAN_WORKERS"].default, help="processes"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=fields["GRANIAN_BLOCKING_THREADS"].default,
        help="threads in each process",
    )
    parser.add_argument("--output", type=Path, help="the file for the tables, in Markdown")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the SQL statements")
    return parser.parse_args(arguments)


def _checkout(text: str) -> Path:
    root = Path(text).resolve()
    if not (root / "manage.py").is_file():
        raise argparse.ArgumentTypeError(f"{root} is not a checkout of the service")
    return root


def main() -> None:
    """Measure and print."""
    options = parse()
    exit_on_sigterm()
    contenders = contend(options)
    rows = measure(contenders, options)
    text = report(rows, contenders, options)
    print(text)
    if options.verbose:
        for row in rows:
            for name, requests in row.statements.items():
                for statement in requests[-1:]:
                    print(row.load.name, name, json.dumps(statement, indent=2))
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
