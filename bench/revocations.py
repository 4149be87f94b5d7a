"""Show that the feed of ended sessions is complete: python -m bench.revocations --help.

Two servers run on one PostgreSQL. Sessions are ended in every way there is, some of them in
transactions that are held open, while readers poll the feed in small pages. Each session has to
appear once, at most a second later than the first poll after its end.
"""

import argparse
import base64
import contextlib
import http.client
import itertools
import json
import math
import os
import random
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

import jwt
from sqlalchemy import URL, Row, make_url

from bench.proxies import free_ports
from bench.report import add_database_url, exit_on_sigterm, machine, say
from bench.rolling import Server
from bench.servers import PASSWORD, database, new_user, url_text
from project import UsersService, create_app, db
from project.accounts import administration, audit, clients, links, recovery, registration, sessions
from project.lib import logs
from project.ops.command_line import ORIGIN
from project.tokens.links import Purpose

HELD_OPEN = 5  # seconds
HOLDERS = 15  # transactions that are held open at a time; the pool has 16 connections
ACTORS = 4  # clients that end sessions over HTTP at a time
LIMIT = 7  # sessions of a page
POLLS = 1.0, 0.1  # seconds between two polls of each reader
ALLOWED = 1  # second, in addition to the time between two polls
NEW_PASSWORD = "a staple battery horse, correct"
ADMIN = "admin@example.com"


class Http:
    """Requests that two servers answer in turn."""

    def __init__(self, ports: Sequence[int], basic: str) -> None:
        self._ports = itertools.cycle(ports)
        self._basic = basic  # the name and the secret of a client
        self.admin = ""  # the auth token of an admin

    def __call__(
        self, method: str, path: str, body: object = None, *, token: str = "", status: int = 200
    ) -> Any:
        """Return the JSON of a response; raise RuntimeError if it has another status."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        content = None
        if path.startswith("/oauth/"):
            headers["Authorization"] = f"Basic {base64.b64encode(self._basic.encode()).decode()}"
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            content = urlencode(body) if isinstance(body, dict) else None
        elif body:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body)
        connection = http.client.HTTPConnection("127.0.0.1", next(self._ports), timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            read = answer.read()
        if answer.status != status:
            raise RuntimeError(f"{method} {path}: {answer.status} {read!r}")
        return json.loads(read)


@dataclass
class Account:
    """A user with sessions; `pairs` are the tokens of each."""

    email: str
    pairs: list[dict[str, Any]]

    @property
    def token(self) -> str:
        """The auth token of the first session."""
        return str(self.pairs[0]["auth_token"])

    @property
    def id(self) -> int:
        """The ID of the user."""
        return int(_claims(self.token)["sub"])

    @property
    def sessions(self) -> list[str]:
        """The IDs of the sessions."""
        return [_claims(pair["auth_token"])["sid"] for pair in self.pairs]


def _claims(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


@dataclass(frozen=True)
class Way:
    """A way to end all sessions of an account, but for the first `kept` of them."""

    name: str
    act: Callable[[Http, Account], object]
    sessions: int = 3
    kept: int = 0
    held: bool = False  # in a transaction of this process that is held open


def _reuse(request: Http, account: Account) -> None:
    first = {"refresh_token": account.pairs[0]["refresh_token"]}
    second = request("POST", "/auth/refresh", first)
    request("POST", "/auth/refresh", {"refresh_token": second["refresh_token"]})
    request("POST", "/auth/refresh", first, status=401)


def _address(account: Account) -> audit.Origin:
    """Return an address of the user's own: the count of attempts at one is locked until the end."""
    return ORIGIN._replace(ip=f"10.0.{account.id // 256}.{account.id % 256}")


def _reset_token(account: Account) -> str:
    user = cast(Row[Any], links.user_by_email(account.email))
    return links.for_user(Purpose.RESET, user, 1_800).url.rpartition("token=")[2]


OWN = {"current_password": PASSWORD}
NEW = {"new_password": NEW_PASSWORD}
WAYS = [
    Way("log out", lambda request, of: request("POST", "/auth/logout", token=of.token), 1),
    Way(
        "log out elsewhere",
        lambda request, of: request("POST", "/auth/logout?scope=others", token=of.token),
        kept=1,
    ),
    Way(
        "log out everywhere",
        lambda request, of: request("POST", "/auth/logout?scope=all", token=of.token),
    ),
    Way(
        "end one of the sessions",
        lambda request, of: request("DELETE", f"/auth/sessions/{of.sessions[1]}", token=of.token),
        sessions=2,
        kept=1,
    ),
    Way("reuse of a refresh token", _reuse, sessions=1),
    Way(
        "change of the password",
        lambda request, of: request("POST", "/auth/password", OWN | NEW, token=of.token),
        kept=1,
    ),
    Way(
        "reset of the password",
        lambda request, of: request(
            "POST", "/auth/password/reset", NEW | {"token": _reset_token(of)}
        ),
    ),
    Way(
        "deletion by the user",
        lambda request, of: request("DELETE", "/auth/account", OWN, token=of.token),
    ),
    Way(
        "deletion by an admin",
        lambda request, of: request("DELETE", f"/users/{of.id}", token=request.admin),
    ),
    Way(
        "deactivation by an admin",
        lambda request, of: request(
            "PATCH", f"/users/{of.id}", {"active": False}, token=request.admin
        ),
    ),
    Way(
        "revocation of an auth token",
        lambda request, of: request("POST", "/oauth/revoke", {"token": of.token}),
        sessions=1,
    ),
    Way(
        "revocation of a refresh token",
        lambda request, of: request(
            "POST", "/oauth/revoke", {"token": of.pairs[0]["refresh_token"]}
        ),
        sessions=1,
    ),
    Way(
        "held open: end_sessions",
        lambda _, of: administration.end_sessions(of.email, ORIGIN),
        held=True,
    ),
    Way(
        "held open: deactivate",
        lambda _, of: administration.set_active(of.email, False, ORIGIN),
        held=True,
    ),
    Way(
        "held open: activate",
        lambda _, of: administration.set_active(of.email, True, ORIGIN),
        held=True,
    ),
    Way(
        "held open: reset of the password",
        lambda _, of: recovery.reset_password(_reset_token(of), NEW_PASSWORD, ORIGIN),
        held=True,
    ),
    Way(
        "held open: deletion by the user",
        lambda _, of: administration.delete(
            of.id, sessions.identify(of.token), _address(of), password=PASSWORD
        ),
        held=True,
    ),
]
OF_EACH_WAY = sum(way.sessions - way.kept for way in WAYS)  # sessions, with one account of each


class Reader(threading.Thread):
    """Another service, which polls the feed and remembers when it read of each session."""

    def __init__(self, request: Http, interval: float) -> None:
        super().__init__(daemon=True)
        self.interval = interval
        self.over = threading.Event()
        self.seen: list[tuple[str, float]] = []
        self._request = request
        self._after = ""

    def run(self) -> None:
        """Poll until `over` is set, and then once more."""
        due = time.monotonic()
        while not self.over.wait(max(0, due - time.monotonic())):
            due += self.interval
            self.poll()
        self.poll()

    def poll(self, limit: int = LIMIT) -> None:
        """Read all pages that there are."""
        full = True
        while full:
            query = {"limit": limit} | ({"after": self._after} if self._after else {})
            page = self._request("GET", f"/oauth/revocations?{urlencode(query)}")["data"]
            now = time.monotonic()
            self.seen += [(session["sid"], now) for session in page["revocations"]]
            self._after = page["next"]
            full = len(page["revocations"]) == limit


def add_account(request: Http, way: Way) -> Account:
    """Register a user, and log them in until they have the sessions that `way` needs."""
    user = new_user()
    pairs = [request("POST", "/auth/register", user, status=201)]
    del user["username"]
    pairs += [request("POST", "/auth/login", user) for _ in range(way.sessions - 1)]
    return Account(user["email"], pairs)


def end(app: UsersService, request: Http, way: Way, account: Account) -> float:
    """End the sessions, and return a time just before the commit or the request."""
    with app.app_context():
        if way.held:
            way.act(request, account)
            time.sleep(HELD_OPEN)
            began = time.monotonic()
            db.session.commit()
        else:
            began = time.monotonic()
            way.act(request, account)
    return began


def measure(app: UsersService, request: Http, number: int) -> tuple[list[str], bool]:
    """End at least `number` sessions while readers poll; return the lines, and whether all is good.

    All sessions have begun before the first one ends.
    """
    rounds = math.ceil(number / OF_EACH_WAY)
    ways = WAYS * rounds
    random.shuffle(ways)
    with ThreadPoolExecutor(ACTORS) as pool:
        accounts = list(pool.map(lambda way: add_account(request, way), ways))
    say(f"{sum(len(account.pairs) for account in accounts):,} sessions have begun")
    readers = [Reader(request, interval) for interval in POLLS]
    for reader in readers:
        reader.start()
    ended: dict[str, tuple[Way, float]] = {}
    held = sum(way.held for way in ways)
    # The requests are spread over the time that the held transactions take.
    pause = ACTORS * math.ceil(held / HOLDERS) * HELD_OPEN / (len(ways) - held)

    def act(way: Way, account: Account) -> None:
        time.sleep(0 if way.held else pause)
        gone = account.sessions[way.kept :]
        ended.update(dict.fromkeys(gone, (way, end(app, request, way, account))))

    with ThreadPoolExecutor(HOLDERS) as holders, ThreadPoolExecutor(ACTORS) as actors:
        began = time.monotonic()
        acts = [
            (holders if way.held else actors).submit(act, way, account)
            for way, account in zip(ways, accounts, strict=True)
        ]
        for each in acts:
            each.result()
        seconds = time.monotonic() - began
    time.sleep(max(POLLS) + ALLOWED)
    for reader in readers:
        reader.over.set()
        reader.join(60)
    # A service that starts afterwards reads the same, in the same order, whatever its pages.
    late = Reader(request, 0)
    late.poll(limit=3)
    say(f"{len(ended):,} sessions have ended")
    of_held = sum(way.held for way, _ in ended.values())
    where = f"{held:,} transactions that were held open for {HELD_OPEN} s"
    summary = f"{len(ended):,} sessions ended in {seconds:.0f} s, {of_held:,} of them in {where}."
    first = {sid: now - ended[sid][1] for sid, now in readers[0].seen if sid in ended}
    lines = [summary, "", "| ended by | sessions | median s | at most s |", "|---|---|---|---|"]
    for way in WAYS:
        took = [first.get(sid, math.inf) for sid, (how, _) in ended.items() if how is way]
        cells = f"{len(took):,}", f"{statistics.median(took):.2f}", f"{max(took):.2f}"
        lines.append(f"| {way.name} | {' | '.join(cells)} |")
    lines += [
        "",
        "| reader | read | missing | twice | others | at most s |",
        "|---|---|---|---|---|---|",
    ]
    good = True
    for reader in [*readers, late]:
        order = [sid for sid, _ in reader.seen]
        missing, others = len(ended.keys() - set(order)), len(set(order) - ended.keys())
        twice = len(order) - len(set(order))
        latest = max(now - ended[sid][1] for sid, now in reader.seen if sid in ended)
        good &= not (missing or twice or others) and order == [sid for sid, _ in late.seen]
        good &= reader is late or latest <= reader.interval + ALLOWED
        name, at_most = f"polls every {reader.interval:g} s", f"{latest:.2f}"
        if reader is late:
            name, at_most = "begins afterwards", ""
        lines.append(f"| {name} | {len(order):,} | {missing} | {twice} | {others} | {at_most} |")
    return [*lines, ""], good


def report(server_url: URL, number: int) -> tuple[str, bool]:
    """Return the tables in Markdown, and whether the feed is complete and in time."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "DATABASE_URL": url_text(stack.enter_context(database(server_url))),
            "SECRET_KEY": secrets.token_hex(32),
            "ENCRYPTION_KEYS": secrets.token_hex(32),
            "ISSUER": "https://users.example",
            "BCRYPT_LOG_ROUNDS": "4",
            "REGISTRATIONS_PER_ADDRESS": "1000000",
            "GRANIAN_HOST": "127.0.0.1",
        }
        ports = free_ports(2)
        for port in ports:
            server = Server(port, dict(settings), folder / f"{port}.log")
            stack.callback(server.stop)
            server.start()
        os.environ.update(settings)
        app = create_app()
        logs.configure(readable=False, level="CRITICAL")
        with app.app_context():
            secret = clients.create("reader", settings["ISSUER"], [], ORIGIN)
            registration.add("admin", ADMIN, PASSWORD, ORIGIN, admin=True, email_verified=True)
            db.session.commit()
        request = Http(ports, f"reader:{secret}")
        credentials = {"email": ADMIN, "password": PASSWORD}
        request.admin = request("POST", "/auth/login", credentials)["auth_token"]
        lines, good = measure(app, request, number)
        with app.app_context():
            for engine in db.engines.values():
                engine.dispose()
    return "\n".join([machine(server_url), "", *lines]), good


def main() -> int:
    """Print the tables; return 1 if a session is missing, twice or late."""
    parser = argparse.ArgumentParser(prog="python -m bench.revocations", description=__doc__)
    add_database_url(parser)
    parser.add_argument("--sessions", type=int, default=1_000, help="how many are ended at least")
    options = parser.parse_args()
    exit_on_sigterm()
    tables, good = report(make_url(options.database_url), options.sessions)
    print(tables)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
