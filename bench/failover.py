"""Show what users notice when the machine of the database fails: python -m bench.failover --help.

Two servers use a Patroni cluster of three machines, with the configuration of deploy/patroni.
Clients register, log in, get their status, refresh and log out without pause, while the machine of
the primary is killed, frozen, or cut off from the network, and later comes back.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import math
import random
import secrets
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from bench import cluster, load, servers
from bench.cluster import Cluster, Machine
from bench.report import machine, say, spread, spread_in_words
from bench.rolling import Server, free_ports
from bench.servers import PASSWORD, new_user

KINDS = ("kill", "freeze", "cut")  # of the primary; "standby" freezes the synchronous standby
CLIENTS = 8
PAUSE = 0.05  # seconds between the requests of a client
RETRY = 0.25  # seconds until a client repeats a request that was answered with 503
BEFORE = 5  # seconds of load before a fault
AWAY = 5  # seconds between the promotion and the return of the old primary
SLOWER = 2.0  # seconds by which the time without success may exceed the promotion
SLOWEST_503 = 5.0  # seconds
SLOW_PING = 0.5  # seconds, the 99th percentile
PROMOTED_WITHIN = 90  # seconds

LOST = "acknowledged registrations lost"
UNKNOWN = "acknowledged sessions and successors unknown"
BACK = "ended sessions that came back"
OTHER = "answers other than a success or a 503 with Retry-After"
RESTARTED = "servers with other processes than before"
PROMISES = (LOST, UNKNOWN, BACK, OTHER, RESTARTED)


@dataclass
class Record:
    """What the clients of one round were answered."""

    registered: list[str] = field(default_factory=list)  # usernames
    ended: list[str] = field(default_factory=list)  # tokens of sessions that were logged out
    kept: list[str] = field(default_factory=list)  # tokens of sessions that were not
    successes: list[float] = field(default_factory=list)  # when each was answered
    unavailable: list[float] = field(default_factory=list)  # seconds until each 503
    pings: list[float] = field(default_factory=list)  # seconds
    refused: int = 0  # refreshes that were repeated after a 503, and then refused
    broken: Counter[str] = field(default_factory=Counter)

    def others(self) -> int:
        """Return the number of successes that were no registrations."""
        return len(self.successes) - len(self.registered)

    def longest_gap(self, start: float, end: float) -> float:
        """Return the longest time without a success between two moments."""
        inside = [start, *sorted(at for at in self.successes if start < at < end), end]
        return max(later - earlier for earlier, later in itertools.pairwise(inside))


class Agent(threading.Thread):
    """A thread that sends requests to both servers until `over` is set."""

    def __init__(self, ports: list[int], record: Record, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self._ports = ports
        self._record = record
        self._over = over

    def run(self) -> None:
        """Repeat the task of the subclass."""
        while not self._over.is_set():
            try:
                self._act()
            except _Abandoned:
                pass
            except Exception as error:  # noqa: BLE001  # an answer without what the client needs
                say(f"{type(self).__name__}: {error!r}")
                self._record.broken[OTHER] += 1
            self._over.wait(PAUSE)

    def _act(self) -> None:
        raise NotImplementedError

    def _send(
        self, method: str, path: str, body: object = None, token: str = ""
    ) -> tuple[int, Any]:
        """Return status and JSON of a response; raise _Abandoned if it is no 2xx, 401 or 503."""
        port = random.choice(self._ports)  # noqa: S311  # not for security
        status, content, headers, seconds = request(port, method, path, body, token)
        if status == 503:
            self._record.unavailable.append(seconds)
            if "Retry-After" in headers:
                return status, None
        elif 200 <= status < 300:
            self._record.successes.append(time.monotonic())
            return status, content
        elif status == 401:
            return status, content
        say(f"{method} {path}: {status or content}")
        self._record.broken[OTHER] += 1
        raise _Abandoned

    def _repeat(
        self, method: str, path: str, body: object = None, token: str = ""
    ) -> tuple[int, Any, bool]:
        """Send a request until the answer is no 503; return also whether it was sent again."""
        again = False
        while True:
            status, content = self._send(method, path, body, token)
            if status != 503:
                return status, content, again
            again = True
            if self._over.wait(RETRY):
                raise _Abandoned


class _Abandoned(Exception):
    """The visit cannot go on."""


class Client(Agent):
    """A client that repeats all actions of a user."""

    def _act(self) -> None:
        user = new_user()
        status, pair = self._send("POST", "/auth/register", user)
        if status != 201:  # it may have been stored: the next visit is another user's
            self._over.wait(RETRY)
            return
        self._record.registered.append(user["username"])
        for _ in range(4):
            self._expect(self._repeat("GET", "/auth/status", token=pair["auth_token"])[0])
            pair = self._refresh(pair)
        credentials = {"email": user["email"], "password": PASSWORD}
        _, other, _ = self._repeat("POST", "/auth/login", credentials)
        status, _, again = self._repeat("POST", "/auth/logout", token=pair["auth_token"])
        if not again:  # otherwise 401 says that the first request ended the session
            self._expect(status)
        self._record.ended.append(pair["auth_token"])
        self._record.kept.append(self._refresh(other)["auth_token"])

    def _refresh(self, pair: dict[str, str]) -> dict[str, str]:
        body = {"refresh_token": pair["refresh_token"]}
        status, successor, again = self._repeat("POST", "/auth/refresh", body)
        if status == 401 and again:
            self._record.refused += 1
            raise _Abandoned
        self._expect(status)
        return dict(successor)

    def _expect(self, status: int) -> None:
        """Raise _Abandoned for a session that the server has acknowledged and does not know."""
        if status == 401:
            self._record.broken[UNKNOWN] += 1
            raise _Abandoned


class Watcher(Agent):
    """A client that tries the tokens of sessions that have ended."""

    def _act(self) -> None:
        if self._record.ended:
            token = random.choice(self._record.ended)  # noqa: S311  # not for security
            if self._send("GET", "/auth/status", token=token)[0] == 200:
                self._record.broken[BACK] += 1


class Pinger(Agent):
    """A client that measures how long `/ping` takes."""

    def _act(self) -> None:
        for port in self._ports:
            status, _, _, seconds = request(port, "GET", "/ping")
            self._record.pings.append(seconds)
            self._record.broken[OTHER] += status != 200


def request(
    port: int, method: str, path: str, body: object = None, token: str = ""
) -> tuple[int, Any, http.client.HTTPMessage, float]:
    """Return status, JSON, headers and seconds of a response.

    Without a response, the status is 0 and the second value the name of the error.
    """
    headers = {"Content-Type": "application/json"} if body else {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    since = time.monotonic()
    try:
        connection.request(method, path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        content = json.loads(answer.read())
        return answer.status, content, answer.headers, time.monotonic() - since
    except (OSError, http.client.HTTPException, ValueError) as error:
        return 0, type(error).__name__, http.client.HTTPMessage(), time.monotonic() - since
    finally:
        connection.close()


@dataclass
class Round:
    """One fault: its kind, its times in seconds, and what the clients were answered."""

    kind: str
    promotion: float
    outage: float  # the longest time without success after the fault
    returning: float  # and after the return of the machine
    record: Record

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return (
            not +self.record.broken
            and self.outage <= self.promotion + SLOWER
            and max(self.record.unavailable, default=0) <= SLOWEST_503
            and quantile(self.record.pings, 0.99) <= SLOW_PING
        )


def quantile(values: Iterable[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def fail(kind: str, victim: Machine) -> None:
    """Let a machine fail."""
    if kind == "kill":
        victim.signal(signal.SIGKILL)
    elif kind == "cut":
        victim.plug("down")
    else:
        victim.signal(signal.SIGSTOP)


def mend(kind: str, victim: Machine) -> None:
    """Bring a machine back."""
    if kind == "kill":
        victim.start()
    elif kind == "cut":
        victim.plug("up")
    else:
        victim.signal(signal.SIGCONT)


def run(kind: str, trial: Cluster, ours: list[Server]) -> Round:
    """Let a machine fail under load, bring it back, and check what was lost."""
    ports = [server.port for server in ours]
    record = Record()
    workers = [server.workers() for server in ours]
    with clients(ports, record):
        time.sleep(BEFORE)
        victim = trial.find("sync_standby" if kind == "standby" else "leader")
        others = [each for each in trial.machines.values() if each is not victim]
        failed = time.monotonic()
        fail(kind, victim)
        promotion = first_commit(others) - failed
        time.sleep(AWAY)
        mended = time.monotonic()
        mend(kind, victim)
        trial.await_whole()
        time.sleep(AWAY)
        end = time.monotonic()
    record.broken[LOST] = len(set(record.registered) - stored(trial.find("leader")))
    record.broken[UNKNOWN] += count_not(200, ports, record.kept)
    record.broken[BACK] += count_not(401, ports, record.ended)
    record.broken[RESTARTED] = sum(
        server.workers() != before for server, before in zip(ours, workers, strict=True)
    )
    return Round(
        kind,
        promotion,
        record.longest_gap(failed - 1, mended),
        record.longest_gap(mended, end),
        record,
    )


@contextlib.contextmanager
def clients(ports: list[int], record: Record) -> Iterator[None]:
    """Run the clients while the context lasts."""
    over = threading.Event()
    agents: list[Agent] = [Client(ports, record, over) for _ in range(CLIENTS)]
    agents += [Watcher(ports, record, over), Pinger(ports, record, over)]
    with load.running(agents, over):
        yield


def first_commit(machines: list[Machine]) -> float:
    """Return the moment when one of the machines first acknowledges a commit."""
    moments: list[float] = []
    deadline = time.monotonic() + PROMOTED_WITHIN

    def watch(machine: Machine) -> None:
        while not moments and time.monotonic() < deadline:
            if machine.writes():
                moments.append(time.monotonic())
            time.sleep(0.1)

    threads = [threading.Thread(target=watch, args=(machine,)) for machine in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not moments:
        raise RuntimeError("no standby was promoted")
    return min(moments)


def stored(leader: Machine) -> set[str]:
    """Return the usernames in the database."""
    with leader.connect("users") as cursor:
        cursor.execute("SELECT username FROM users")
        return {name for (name,) in cursor}


def count_not(expected: int, ports: list[int], tokens: Iterable[str]) -> int:
    """Return how many tokens are answered with another status than expected."""

    def status(token: str) -> int:
        return request(random.choice(ports), "GET", "/auth/status", token=token)[0]  # noqa: S311

    with ThreadPoolExecutor(4) as executor:
        return sum(answered != expected for answered in executor.map(status, tokens))


@contextlib.contextmanager
def serving(folder: Path, urls: list[str]) -> Iterator[list[Server]]:
    """Start one of our servers for each DATABASE_URL, with the same keys; stop them at the end."""
    settings = {
        "APP_SETTINGS": "project.config.ProductionConfig",
        "SECRET_KEY": secrets.token_hex(32),
        "BCRYPT_LOG_ROUNDS": "4",
        "REGISTRATIONS_PER_ADDRESS": "1000000",
        "GRANIAN_HOST": "127.0.0.1",
        "GRANIAN_WORKERS": "2",
    }
    with contextlib.ExitStack() as stack:
        started = []
        for port, url in zip(free_ports(len(urls)), urls, strict=True):
            server = Server(port, settings | {"DATABASE_URL": url}, folder / f"{port}.log")
            stack.callback(server.stop)
            server.start()
            started.append(server)
        yield started


def table(rounds: list[Round]) -> str:
    """Return the table of the faults in Markdown: one column for each kind."""
    kinds = list(dict.fromkeys(each.kind for each in rounds))
    columns = [_column([each for each in rounds if each.kind == kind]) for kind in kinds]
    lines = [f"| | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]
    ]
    return "\n".join(lines)


def _column(rounds: list[Round]) -> dict[str, str]:
    """Return the figures of one kind of fault, by name."""
    records = [each.record for each in rounds]
    broken = sum((record.broken for record in records), Counter[str]())
    unavailable = [seconds for record in records for seconds in record.unavailable]
    pings = [seconds for record in records for seconds in record.pings]
    return {
        "rounds": str(len(rounds)),
        "registrations acknowledged": f"{sum(len(each.registered) for each in records):,}",
        "other requests acknowledged": f"{sum(map(Record.others, records)):,}",
        **{promise: str(broken[promise]) for promise in PROMISES},
        "until a commit is acknowledged, s": _range(each.promotion for each in rounds),
        "without success, s": _range(each.outage for each in rounds),
        "longer than that by at most, s": (
            f"{max(each.outage - each.promotion for each in rounds):.1f}"
        ),
        "503": f"{len(unavailable):,}",
        "slowest 503, s": f"{max(unavailable, default=0):.1f}",
        "`/ping`, 99th percentile, s": f"{quantile(pings, 0.99):.2f}",
        "`/ping`, slowest, s": f"{max(pings):.2f}",
        "refreshes refused after a 503": str(sum(record.refused for record in records)),
        "longest time without success when the machine returns, s": _range(
            each.returning for each in rounds
        ),
    }


def _range(values: Iterable[float]) -> str:
    ordered = sorted(values)
    low, high = f"{ordered[0]:.1f}", f"{ordered[-1]:.1f}"
    return low if low == high else f"{low} to {high}"


def costs(folder: Path, url: str, rounds: int) -> str:
    """Return the table of what waiting for the standby costs, in Markdown.

    One server waits for the disk of a standby at each commit, the other, with the user `alone` of
    the cluster, for the disk of the primary only. They take turns.
    """
    alone = url.replace("//users:", "//alone:")
    ratios: dict[str, list[float]] = {"login": [], "register": []}
    with serving(folder, [url, alone]) as ours:
        contenders = [servers.Server(servers.service(2, 16), each.port, 0) for each in ours]
        for contender in contenders:
            servers.populate(contender)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for name in ratios:
                rates = {}
                for contender in contenders[:: 1 if number % 2 else -1]:
                    requests = contender.logins if name == "login" else servers.registrations(2_000)
                    outcome = load.closed(contender.port, requests, 8, 1, settle=0.5)
                    if outcome.unexpected or outcome.lost:
                        raise RuntimeError(f"{name}: {outcome}")
                    rates[contender.port] = outcome.per_second
                ratios[name].append(rates[ours[0].port] / rates[ours[1].port])
    lines = ["| load | with / without waiting for the standby |", "|---|---|"]
    lines += [f"| {name} | {spread(values)} |" for name, values in ratios.items()]
    return "\n".join([f"Ratios of requests/s with {spread_in_words(rounds)}.", "", *lines])


def main() -> int:
    """Print the table; return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m bench.failover", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each fault")
    parser.add_argument(
        "--only",
        choices=(*KINDS, "standby"),
        help="one kind of fault; standby: the synchronous standby is frozen",
    )
    parser.add_argument(
        "--through",
        choices=tuple(cluster.URLS),
        default="haproxy",
        help="how our servers find the primary",
    )
    parser.add_argument(
        "--cost", action="store_true", help="measure what synchronous replication costs instead"
    )
    options = parser.parse_args()
    folder = cluster.isolate("bench.failover")
    url = cluster.URLS[options.through]
    with cluster.running(folder) as trial:
        server_url = make_url(
            f"postgresql://postgres:{cluster.PASSWORD}@{trial.find('leader').address}/postgres"
        )
        heading = f"{machine(server_url)}; through {options.through}"
        if options.cost:
            print(heading, "", costs(folder, url, options.rounds), sep="\n")
            return 0
        rounds: list[Round] = []
        kinds = (options.only,) if options.only else KINDS
        with serving(folder, [url, url]) as ours:
            for kind in kinds:
                for _ in range(options.rounds):
                    rounds.append(run(kind, trial, ours))
                    say(f"{kind}: {_column(rounds[-1:])}")
        print(f"{heading}; {CLIENTS} clients.", "", table(rounds), sep="\n")
    return 0 if all(each.kept for each in rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
