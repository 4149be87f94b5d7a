"""Show that hours of load change nothing: python -m bench.soak --help.

One server runs on PostgreSQL. Visitors register, get their status, refresh, log in and delete their
account without end. Beside them other clients send bad input, keep idle connections, stop in the
middle of a body for ever, or send it byte by byte. Sessions and events expire and are purged, and
the younger of two processes is killed with SIGKILL. What the older one needs must not grow.
"""

import argparse
import contextlib
import http.client
import json
import math
import os
import random
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg2
from sqlalchemy import URL, make_url

from bench.load import running
from bench.report import add_database_url, exit_on_sigterm, machine, say
from bench.servers import PASSWORD, ROOT, Server, database, new_user, service, serving, url_text
from bench.servers import http as raw_request

VISITORS, RETURNING, IDLE, SILENT = 3, 4, 20, 4
PAUSE = 0.03  # seconds between two requests of a client
BODY_TIMEOUT = 5
SETTINGS = {
    "BODY_TIMEOUT": str(BODY_TIMEOUT),
    "TOKEN_EXPIRATION_DAYS": "0",
    "TOKEN_EXPIRATION_SECONDS": "60",
    "REFRESH_EXPIRATION_SECONDS": "60",
    "EVENTS_DAYS": "1",
    "LOGIN_FAILURES_PER_ADDRESS": "1000000",
}
# Clients of a process that is killed lose their connections. Nothing else may be lost.
KILL_SECONDS = 5.0
# What may remain different: a value is compared with the one of the first minutes.
MORE_MEMORY, MORE_SPACE, MORE_TIME, MORE_DESCRIPTORS = 0.02, 1.5, 1.5, 5
JUDGED_MINUTES = 10  # a shorter run shows errors, not growth
# Events expire after a day at the earliest. These are made older than that.
AGE = "UPDATE events SET created_at = created_at - interval '2 days'"
SIZES = """
    SELECT relname, pg_table_size(oid), pg_indexes_size(oid) FROM pg_class
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
"""
BAD_INPUT = (
    raw_request("POST", "/auth/login", {"email": 1, "password": None}),
    raw_request("POST", "/auth/refresh", {"refresh_token": "x" * 1_000}),
    raw_request("GET", "/auth/status", token="eyJhbGciOiJub25lIn0.e30."),
    raw_request("GET", "/users?limit=-1&after=%00"),
    raw_request("PATCH", "/users/0", {"admin": True}),
    raw_request("POST", "/auth/register", {"username": "\ud800", "email": "x", "password": "x"}),
    raw_request("GET", "/nothing/../%ff"),
    b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n\xff\xff\xff\xff",
    b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n",
    b"POST /auth/login HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GARBAGE\r\n\r\n",
)
HALF = (
    b"POST /auth/%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b'Content-Length: %d\r\n\r\n{"'
)


@dataclass
class Sample:
    """What a process of the server has at a time."""

    at: float
    memory: float  # anonymous memory in MiB: what other processes share counts in full
    descriptors: int
    threads: int


@dataclass
class Record:
    """What the clients have seen, and what the server has needed."""

    started: float = field(default_factory=time.monotonic)
    killed: float = -math.inf  # when a process was killed last
    over: threading.Event = field(default_factory=threading.Event)
    answers: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    silent: list[float] = field(default_factory=list)  # seconds until they were disconnected
    # Seconds of a status, and of a query on a connection of our own right after it.
    statuses: list[tuple[float, float, float]] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    sizes: list[dict[str, int]] = field(default_factory=list)  # bytes, after each purge
    connections: list[int] = field(default_factory=list)  # of PostgreSQL

    def fault(self, name: str) -> None:
        """Count a fault, unless it may come from the death of a process."""
        if time.monotonic() - self.killed > KILL_SECONDS:
            self.faults[name] += 1
        else:
            self.answers["lost with a killed process"] += 1


class Lost(Exception):
    """A response that did not come, or was not what the client may expect."""


class Client(threading.Thread):
    """A client that repeats its visit until the record is over."""

    def __init__(self, server: Server, record: Record) -> None:
        super().__init__(daemon=True)
        self.port = server.port
        self.record = record
        self.sent = 0.0
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        """Repeat the visit."""
        while not self.record.over.is_set():
            try:
                self.visit()
            except Lost:
                pass
            except Exception as error:  # noqa: BLE001  # each one is a fault
                self.record.faults[f"{type(self).__name__}: {error!r}"] += 1
        if self._connection:
            self._connection.close()

    def visit(self) -> None:
        """Send requests; to be defined by each kind of client."""
        raise NotImplementedError

    def send(self, method: str, path: str, body: object = None, token: str = "") -> Any:
        """Return the JSON of a success; raise Lost for anything else, and count what is a fault.

        `sent` is the time at which the request was sent, after a pause.
        """
        time.sleep(PAUSE * random.uniform(0.5, 1.5))  # noqa: S311
        self.sent = time.monotonic()
        headers = {"Content-Type": "application/json"} if body else {}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        name = f"{method} {path}"
        try:
            self._connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = self._connection.getresponse()
            content = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            self._connection = None
            self.record.fault(f"{name}: {type(error).__name__}")
            raise Lost from None
        if answer.status < 300:
            self.record.answers["2xx"] += 1
            return content
        if answer.status == 503 and answer.headers["Retry-After"]:
            self.record.answers["503 with Retry-After"] += 1
        else:
            self.record.fault(f"{name}: {answer.status}")
        raise Lost

    def connect(self) -> socket.socket:
        """Return a connection of its own; raise Lost if there is none."""
        try:
            return socket.create_connection(("127.0.0.1", self.port), timeout=30)
        except OSError as error:
            self.record.fault(f"connect: {type(error).__name__}")
            raise Lost from None


class Visitor(Client):
    """A new user, from the registration to the deletion of the account."""

    def __init__(self, server: Server, record: Record, database_url: URL) -> None:
        super().__init__(server, record)
        self._cursor = connected(database_url).cursor()

    def visit(self) -> None:
        """Use every route that users use most."""
        user = new_user()
        pair = self.send("POST", "/auth/register", user)
        for _ in range(5):
            self.send("GET", "/auth/status", token=pair["auth_token"])
            after = time.monotonic()
            self._cursor.execute("SELECT 1")
            times = after - self.sent, time.monotonic() - after
            self.record.statuses.append((self.sent, *times))
            pair = self.send("POST", "/auth/refresh", {"refresh_token": pair["refresh_token"]})
        credentials = {"email": user["email"], "password": PASSWORD}
        other = self.send("POST", "/auth/login", credentials)
        self.send("GET", "/auth/sessions", token=other["auth_token"])
        self.send("POST", "/auth/logout", token=pair["auth_token"])
        confirmation = {"current_password": PASSWORD}
        self.send("DELETE", "/auth/account", confirmation, token=other["auth_token"])


class Returning(Client):
    """A user who logs in again and again and never logs out: the sessions expire."""

    def __init__(self, server: Server, record: Record) -> None:
        super().__init__(server, record)
        self._user: dict[str, str] = {}

    def visit(self) -> None:
        """Log in."""
        if not self._user:
            user = new_user()
            self.send("POST", "/auth/register", user)
            self._user = user
        self.send("POST", "/auth/login", {"email": self._user["email"], "password": PASSWORD})


class Bad(Client):
    """A client that sends what is no request, or one that has to be refused."""

    def visit(self) -> None:
        """Send bad input on a connection of its own; anything but a 4xx is a fault."""
        time.sleep(PAUSE)
        request = random.choice(BAD_INPUT)  # noqa: S311
        with self.connect() as connection:
            try:
                connection.sendall(request)
                status = connection.recv(65_536)[9:12]
            except OSError as error:
                status = type(error).__name__.encode()
        if status[:1] == b"4":
            self.record.answers["4xx to bad input"] += 1
        else:
            self.record.fault(f"{status!r} to {request[:40]!r}")


class Idle(Client):
    """A client that connects and sends nothing, until the server closes the connection."""

    def visit(self) -> None:
        """Connect."""
        with self.connect() as connection:
            connection.settimeout(1)
            while not self.record.over.is_set():
                with contextlib.suppress(TimeoutError):
                    with contextlib.suppress(ConnectionError):
                        connection.recv(1)
                    break
        time.sleep(PAUSE)


class Silent(Client):
    """A client that sends the beginning of a body and nothing more."""

    def visit(self) -> None:
        """Measure after how long the server closes the connection."""
        route = random.choice((b"login", b"refresh"))  # noqa: S311
        began = time.monotonic()
        with self.connect() as connection, contextlib.suppress(OSError):
            connection.settimeout(BODY_TIMEOUT + 30)
            connection.sendall(HALF % (route, 100))
            connection.recv(4_096)  # a 503, or nothing
        self.record.silent.append(time.monotonic() - began)


class Slow(Client):
    """A client whose body comes byte by byte, each within BODY_TIMEOUT."""

    def visit(self) -> None:
        """Send the body of a refused refresh in ten seconds."""
        body = json.dumps({"refresh_token": secrets.token_hex(4)}).encode()[1:]
        with self.connect() as connection:
            try:
                connection.sendall(HALF[:-2] % (b"refresh", len(body) + 1))
                for byte in b"{" + body:
                    connection.sendall(bytes([byte]))
                    time.sleep(10 / len(body))
                status = connection.recv(4_096)[9:12]
            except OSError as error:
                status = type(error).__name__.encode()
        if status == b"401":
            self.record.answers["4xx to slow bodies"] += 1
        elif status != b"503":
            self.record.fault(f"{status!r} to a slow body")


def connected(url: URL) -> Any:
    """Return a connection to a database, in AUTOCOMMIT."""
    connection = psycopg2.connect(url_text(url.set(drivername="postgresql")))
    connection.autocommit = True
    return connection


def sample(pid: int, at: float) -> Sample:
    """Return what a process has."""
    folder = Path(f"/proc/{pid}")
    memory = (folder / "smaps_rollup").read_text().split("\nAnonymous:")[1].split()[0]
    return Sample(
        at,
        int(memory) / 1024,
        len(list((folder / "fd").iterdir())),
        len(list((folder / "task").iterdir())),
    )


def children(pid: int) -> list[int]:
    """Return the processes that the main process `pid` of a server has started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


class Operator:
    """What happens to the server beside its clients, each in its own rhythm."""

    def __init__(self, server: Server, record: Record, database_url: URL) -> None:
        self._server = server
        self._record = record
        self._url = database_url
        self._cursor = connected(database_url).cursor()
        self._older = children(server.pid)[0]

    def measure(self) -> None:
        """Sample the main process and the older of its workers."""
        now = time.monotonic() - self._record.started
        for name, pid in (("main process", self._server.pid), ("older worker", self._older)):
            self._record.samples.setdefault(name, []).append(sample(pid, now))
        self._cursor.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name <> ''"
        )
        self._record.connections.append(self._cursor.fetchone()[0])

    def purge(self) -> None:
        """Make the events expire, delete what has expired, and note the sizes of all tables.

        VACUUM follows at once, because autovacuum may be off, and runs when it wants to.
        """
        self._cursor.execute(AGE)
        environment = {**os.environ, **SETTINGS, "DATABASE_URL": url_text(self._url)}
        environment |= {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "SECRET_KEY": secrets.token_hex(32),
        }
        purged = subprocess.run(
            [sys.executable, "manage.py", "purge"],
            cwd=ROOT,
            env=environment,
            check=False,
            capture_output=True,
        )
        if purged.returncode:
            self._record.faults[f"purge: {purged.stderr.decode()[-200:]}"] += 1
        self._cursor.execute("VACUUM")
        self._cursor.execute(SIZES)
        sizes = {}
        for name, of_table, of_indexes in self._cursor.fetchall():
            sizes |= {name: of_table, f"indexes of {name}": of_indexes}
        self._record.sizes.append(sizes)

    def kill(self) -> None:
        """Kill the younger of the processes."""
        self._record.killed = time.monotonic()
        for pid in children(self._server.pid):
            if pid != self._older:
                os.kill(pid, signal.SIGKILL)
                self._record.answers["workers killed"] += 1


@contextlib.contextmanager
def repeating(seconds: float, act: Callable[[], None], record: Record) -> Iterator[None]:
    """Call `act` every so many seconds on a thread of its own while the context lasts."""

    def repeat() -> None:
        while not record.over.wait(seconds):
            try:
                act()
            except Exception as error:  # noqa: BLE001  # each one is a fault
                # Even right after a process was killed: this is no client of it.
                record.faults[f"{act.__name__}: {error!r}"] += 1

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        record.over.set()
        thread.join(60)


def soak(server_url: URL, minutes: float, record: Record) -> None:
    """Run the server, its clients and its operator for so many minutes."""
    contender = service(workers=2, threads=16)
    environment = contender.environment
    contender = replace(
        contender, environment=lambda port, workers: environment(port, workers) | SETTINGS
    )
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(database(server_url))
        server = stack.enter_context(serving(contender, url, cost=4))
        operator = Operator(server, record, url)
        clients: list[Client] = [Visitor(server, record, url) for _ in range(VISITORS)]
        for kind, count in ((Returning, RETURNING), (Bad, 2), (Idle, IDLE), (Silent, SILENT)):
            clients += [kind(server, record) for _ in range(count)]
        clients += [Slow(server, record) for _ in range(2)]
        stack.enter_context(running(clients, record.over))
        period = min(60.0, minutes * 60 / 4)
        for seconds, act in (
            (min(5.0, period / 4), operator.measure),
            (period, operator.purge),
            (period * 1.3, operator.kill),
        ):
            stack.enter_context(repeating(seconds, act, record))
        record.started = time.monotonic()
        for minute in range(math.ceil(minutes)):
            time.sleep(min(1.0, minutes - minute) * 60)
            say(f"minute {minute + 1}: {dict(record.answers)} {dict(record.faults)}")


def slope(points: Sequence[tuple[float, float]], blocks: int = 10) -> tuple[float, float]:
    """Return the slope of a line through `points`, and half of its 95 % interval.

    Neighboring samples resemble each other. So the line goes through the means of ten blocks.
    """
    size = len(points) // blocks
    means = [
        tuple(
            statistics.fmean(axis) for axis in zip(*points[n * size : (n + 1) * size], strict=True)
        )
        for n in range(blocks)
    ]
    xs, ys = zip(*means, strict=True)
    line = statistics.linear_regression(xs, ys)
    residuals = sum((y - line.slope * x - line.intercept) ** 2 for x, y in means)
    spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    t_of_8 = 2.306  # Student's t for 97.5 % and ten blocks less two parameters
    return line.slope, t_of_8 * math.sqrt(residuals / (blocks - 2) / spread)


def judge(record: Record, minutes: float) -> tuple[list[str], list[str]]:
    """Return the rows of the table, and the promises that were broken."""
    rows, broken = [], [f"{count} times {fault}" for fault, count in record.faults.items()]
    for name, count in sorted(record.answers.items()):
        rows.append(f"| {name} | {count:,} |")
    slowest = max(record.silent, default=0.0)
    rows.append(f"| half bodies: longest until disconnected | {slowest:.1f} s of {BODY_TIMEOUT} |")
    if slowest > 2 * BODY_TIMEOUT:
        broken.append(f"a silent client was disconnected after {slowest:.1f} s")
    if minutes < JUDGED_MINUTES:
        return rows, broken
    warm = minutes * 60 / 5
    for name, samples in record.samples.items():
        settled = [each for each in samples if each.at > warm]
        first, last = settled[: len(settled) // 3], settled[-len(settled) // 3 :]
        memory, half = slope([(each.at / 3_600, each.memory) for each in settled])
        now = statistics.fmean(each.memory for each in last)
        rows.append(f"| {name}: memory | {now:.0f} MiB, {memory:+.1f} ± {half:.1f} MiB an hour |")
        hours = (settled[-1].at - settled[0].at) / 3_600
        grown, doubt = memory * hours, half * hours
        if grown > max(MORE_MEMORY * now, doubt):
            broken.append(f"{name}: {grown:.1f} MiB more")
        elif doubt > MORE_MEMORY * now:
            broken.append(f"{name}: growth cannot be told, {grown:+.1f} ± {doubt:.1f} MiB")
        for unit in ("descriptors", "threads"):
            before, after = (max(getattr(each, unit) for each in part) for part in (first, last))
            rows.append(f"| {name}: {unit}, at most, first and last third | {before}, {after} |")
            if after > before + MORE_DESCRIPTORS:
                broken.append(f"{name}: {after} {unit} after {before}")
    third = len(record.connections) // 3
    before, after = max(record.connections[:third]), max(record.connections[-third:])
    rows.append(f"| connections to PostgreSQL, first and last third | {before}, {after} |")
    if after > before + MORE_DESCRIPTORS:
        broken.append(f"{after} connections to PostgreSQL after {before}")
    half_way = len(record.sizes) // 2
    for table in sorted(record.sizes[-1]):
        before = max(sizes[table] for sizes in record.sizes[1:half_way])
        after = max(sizes[table] for sizes in record.sizes[half_way:])
        if after < 1_000_000:
            continue
        rows.append(
            f"| {table}: MB in the first and second half | {before / 1e6:.1f}, {after / 1e6:.1f} |"
        )
        if after > MORE_SPACE * before:
            broken.append(f"{table} has grown from {before} to {after} bytes")
    rows.append(latency(record, warm, broken))
    return rows, broken


def latency(record: Record, warm: float, broken: list[str]) -> str:
    """Return the row of the time of a status, and note whether it has grown.

    The machine may be busier in one minute than in another. So a status is also compared with the
    query that was sent to PostgreSQL right after it.
    """
    end = record.statuses[-1][0]
    begin = record.started + warm
    parts = []
    for from_, to in ((begin, begin + 60), (end - 60, end)):
        times = [(took, query) for at, took, query in record.statuses if from_ <= at <= to]
        took, query = (statistics.median(column) for column in zip(*times, strict=True))
        parts.append((took * 1e3, took / query))
    (first, before), (last, after) = parts
    if min(after / before, last / first) > MORE_TIME:
        broken.append(f"a status takes {after:.1f} queries after {before:.1f}")
    return (
        f"| status, first and last minute | {first:.1f} ms, {last:.1f} ms;"
        f" {before:.1f} and {after:.1f} times a query |"
    )


def main() -> int:
    """Print the table; return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    add_database_url(parser)
    parser.add_argument(
        "--minutes", type=float, default=30, help=f"growth is judged from {JUDGED_MINUTES} on"
    )
    options = parser.parse_args()
    exit_on_sigterm()
    server_url = make_url(options.database_url)
    record = Record()
    soak(server_url, options.minutes, record)
    rows, broken = judge(record, options.minutes)
    heading = f"{machine(server_url)}; {options.minutes:g} minutes."
    print("\n".join([heading, "", "| | |", "|---|---|", *rows, "", *broken]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
