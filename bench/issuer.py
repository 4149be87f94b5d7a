"""Measure what tokens for other services cost: python -m bench.issuer --help.

The service with ISSUER, whose auth tokens are signed with ES256, is measured beside the service
without it, whose tokens are signed with HS256, and its introspection beside its /auth/status. All
use the same PostgreSQL server and take turns under the same load. Two equal servers can differ by
several per cent as long as they run, so both are started anew several times, in another order each
time. The result is the median of the ratios of the starts.
"""

import argparse
import base64
import hashlib
import itertools
import json
import secrets
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import jwt
from sqlalchemy import URL, create_engine, insert, make_url, select

from bench.load import Outcome, closed
from bench.report import add_database_url, exit_on_sigterm, machine, say, spread, spread_in_words
from bench.servers import Server, database, http, populate, service, serving
from project import clock
from project.config import BaseConfig
from project.lib import encryption
from project.models import clients_table, signing_keys_table
from project.tokens import jwk

CONNECTIONS = 16
COST = 4  # of bcrypt
NEW_PER_SECOND = 5_000  # more tokens than are verified
ISSUER = "https://users.example"
CLIENT = "reader"
SECRET = secrets.token_urlsafe(32)
UNVERIFIED: Any = {"verify_signature": False}
BASIC = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()


@dataclass
class Contender:
    """A running service, the key that signs its tokens, and a token of each user."""

    server: Server
    key: Any
    tokens: list[str]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def new(self, seconds: float) -> list[str]:
        """Return tokens of the same sessions, enough for `seconds` if each is sent once."""
        samples = [
            (jwt.get_unverified_header(token), jwt.decode(token, options=UNVERIFIED))
            for token in self.tokens
        ]
        made = []
        for (header, claims), number in zip(
            itertools.cycle(samples), itertools.islice(self.numbers, int(seconds * NEW_PER_SECOND))
        ):
            different = claims | {"exp": claims["exp"] + number}
            made.append(jwt.encode(different, self.key, header["alg"], header))
        return made


def status(token: str) -> bytes:
    """Return a request for /auth/status."""
    return http("GET", "/auth/status", token=token)


def introspect(token: str) -> bytes:
    """Return a request of another service to introspect a token."""
    body = urlencode({"token": token})
    lines = [
        "POST /oauth/introspect HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Basic {BASIC}",
        "Content-Type: application/x-www-form-urlencoded",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", body]).encode()


@dataclass(frozen=True)
class Load:
    """Requests to one contender."""

    contender: Contender
    request: Callable[[str], bytes]
    once: bool  # whether each token is sent once

    def run(self, seconds: float, pool: ProcessPoolExecutor) -> "Turn":
        """Load the contender from a separate process, after half a turn that is not counted."""
        server = self.contender.server
        self._send(seconds / 2, pool)
        before = server.cpu()
        outcome = self._send(seconds, pool)
        return Turn(outcome, server.cpu() - before)

    def _send(self, seconds: float, pool: ProcessPoolExecutor) -> Outcome:
        tokens = self.contender.new(seconds) if self.once else self.contender.tokens
        requests = [self.request(token) for token in tokens]
        port = self.contender.server.port
        once = self.once
        return pool.submit(
            closed, port, requests, CONNECTIONS, seconds, settle=0, once=once
        ).result()


@dataclass(frozen=True)
class Turn:
    """The result of a load in one round, and the CPU time of the server's processes."""

    outcome: Outcome
    cpu: float  # seconds

    @property
    def cpu_us(self) -> float:
        """The CPU time of a request; other programs of the machine disturb it least."""
        return self.cpu / sum(self.outcome.statuses.values()) * 1e6


Value = Callable[[Turn], float]


@dataclass
class Comparison:
    """Two loads that take turns, and their results."""

    name: str
    loads: tuple[Load, Load]
    turns: list[list[Turn]] = field(default_factory=list)  # of each round

    def run(self, seconds: float, pool: ProcessPoolExecutor) -> None:
        """Run both loads once; the order is reversed in each round."""
        order = 1 if len(self.turns) % 2 else -1
        turns = [load.run(seconds, pool) for load in self.loads[::order]]
        self.turns.append(turns[::order])
        say(f"{self.name}: {self.turns[-1]}")

    @property
    def lost(self) -> int:
        """The number of requests without a successful response."""
        outcomes = [turn.outcome for turns in self.turns for turn in turns]
        return sum(each.busy + each.lost + sum(each.unexpected.values()) for each in outcomes)


def line(starts: Sequence[Comparison]) -> str:
    """Return a line of Markdown for a comparison that was made with several starts."""

    def pair(value: Value, digits: int = 0) -> str:
        turns = [turns for start in starts for turns in start.turns]
        medians = (statistics.median(map(value, each)) for each in zip(*turns, strict=True))
        return " / ".join(f"{median:,.{digits}f}" for median in medians)

    def ratio(value: Value) -> str:
        return spread(
            [
                statistics.median(value(ours) / value(theirs) for ours, theirs in start.turns)
                for start in starts
            ]
        )

    cells = [starts[0].name]
    for value in (lambda turn: turn.outcome.per_second), (lambda turn: turn.cpu_us):
        cells += [pair(value), ratio(value)]
    cells += [pair(lambda turn: turn.outcome.p50_ms, 1), pair(lambda turn: turn.outcome.p99_ms, 1)]
    return f"| {' | '.join(cells)} |"


def start(stack: ExitStack, server_url: URL, **settings: str) -> Contender:
    """Start the service with these settings on a database of its own, until `stack` closes."""
    url = stack.enter_context(database(server_url))
    key = secrets.token_hex(32)
    workers, threads = (
        BaseConfig.model_fields[name].default
        for name in ("GRANIAN_WORKERS", "GRANIAN_BLOCKING_THREADS")
    )
    usual = service(workers, threads)
    changed = replace(
        usual,
        environment=lambda *size: usual.environment(*size) | {"SECRET_KEY": key, **settings},
    )
    server = stack.enter_context(serving(changed, url, COST))
    populate(server)
    tokens = [request.split(b"Bearer ")[1].split()[0].decode() for request in server.statuses]
    if not settings:
        return Contender(server, key, tokens)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(
            insert(clients_table).values(
                name=CLIENT,
                audience=ISSUER,
                scope=[],
                created_at=clock.utcnow(),
                secret_hash=hashlib.sha256(SECRET.encode()).hexdigest(),
            )
        )
        row = connection.execute(select(signing_keys_table)).one()
    engine.dispose()
    private = encryption.decrypt(row.private, row.kid, (settings["ENCRYPTION_KEYS"],))
    contender = Contender(server, jwk.parse_private(private), tokens)
    check(contender)
    return contender


def check(contender: Contender) -> None:
    """Raise RuntimeError unless the tokens are good: a response of 200 does not say that."""
    for token in (contender.tokens[0], contender.new(1)[-1]):
        url = f"http://127.0.0.1:{contender.server.port}/oauth/introspect"
        headers = {"Authorization": f"Basic {BASIC}"}
        with urlopen(Request(url, urlencode({"token": token}).encode(), headers)) as answer:
            if not json.load(answer)["active"]:
                raise RuntimeError("a token is not active")


def compare(es256: Contender, hs256: Contender) -> list[Comparison]:
    """Return what is compared."""
    return [
        Comparison(f"{name}{', each token once' * once}", (Load(*ours, once), Load(*theirs, once)))
        for name, ours, theirs in (
            ("status, ES256 / HS256", (es256, status), (hs256, status)),
            ("introspect / status, ES256", (es256, introspect), (es256, status)),
        )
        for once in (False, True)
    ]


def measure(options: argparse.Namespace) -> list[list[Comparison]]:
    """Return the results of each start."""
    server_url = make_url(options.database_url)
    encryption_keys = secrets.token_hex(32)
    settings = {"es256": {"ISSUER": ISSUER, "ENCRYPTION_KEYS": encryption_keys}, "hs256": {}}
    results = []
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for number in range(options.starts):
            with ExitStack() as stack:
                contenders = {
                    name: start(stack, server_url, **settings[name])
                    for name in sorted(settings, reverse=bool(number % 2))
                }
                comparisons = compare(**contenders)
                for _ in range(options.rounds):
                    for comparison in comparisons:
                        comparison.run(options.seconds, pool)
            results.append(comparisons)
    return results


def report(results: list[list[Comparison]], options: argparse.Namespace) -> str:
    """Return the table in Markdown."""
    circumstances = [
        machine(make_url(options.database_url)),
        f"{CONNECTIONS} connections",
        f"{options.starts} starts with {options.rounds} rounds of {options.seconds:g} s each",
        f"ratios of the starts with {spread_in_words(options.starts)}",
    ]
    lost = Counter[str]()
    for each in itertools.chain(*results):
        lost[each.name] += each.lost
    lines = [
        f"{'; '.join(circumstances)}.",
        "",
        "| load | requests/s | ratio | CPU µs | ratio | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|---|",
        *map(line, zip(*results, strict=True)),
        "",
        *(f"- {name}: {count} not successful" for name, count in lost.items() if count),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.issuer", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one turn")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each load in a start")
    parser.add_argument("--starts", type=int, default=12, help="how often the servers are started")
    add_database_url(parser)
    parser.add_argument("--output", type=Path, help="the file for the table, in Markdown")
    options = parser.parse_args()
    exit_on_sigterm()
    text = report(measure(options), options)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
