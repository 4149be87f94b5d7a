"""The contenders: how to start each on its own database, fill it with users, and stop it."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.request import Request, urlopen

import psycopg2
from psycopg2 import sql
from sqlalchemy import URL

from bench.load import closed

ROOT = Path(__file__).resolve().parent.parent
USERS = 1_000  # registered before the measurements at the low cost
LOGGING_IN = 16  # users who log in and get their status
PASSWORD = "correct horse battery staple"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Contender:
    """A program under test; `environment` returns its variables for a port and process count."""

    name: str
    description: str
    serve: list[str]
    environment: Callable[[int, int], dict[str, str]]
    workers: int
    prepare: list[str] = field(default_factory=list)  # creates the tables if `serve` does not
    root: Path = ROOT  # the working directory


@dataclass
class Server:
    """A running contender, and the requests of its users."""

    contender: Contender
    port: int
    pid: int
    logins: list[bytes] = field(default_factory=list)
    statuses: list[bytes] = field(default_factory=list)

    def memory(self) -> float:
        """Return the proportional set size of its processes in MiB."""
        kibibytes = 0
        for pid in _session(self.pid):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            kibibytes += int(rollup.split("\nPss:")[1].split()[0])
        return kibibytes / 1024

    def cpu(self) -> float:
        """Return the seconds of CPU time that its processes have used."""
        ticks = 0
        for pid in _session(self.pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # user and system
        return ticks / os.sysconf("SC_CLK_TCK")


def service(workers: int, threads: int) -> Contender:
    """Return the service with production settings."""
    return Contender(
        name="service",
        description=f"Granian, {workers} processes of {threads} threads",
        serve=[sys.executable, "manage.py", "serve"],
        environment=lambda port, workers: {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "USERS_API_OPEN": "true",
            # All load comes from one address. Attempts are still counted.
            "REGISTRATIONS_PER_ADDRESS": "1000000",
            "GRANIAN_HOST": "127.0.0.1",
            "GRANIAN_PORT": str(port),
            "GRANIAN_WORKERS": str(workers),
            "GRANIAN_BLOCKING_THREADS": str(threads),
            "GRANIAN_LOG_LEVEL": "warning",
        },
        workers=workers,
    )


def before(root: Path, workers: int, threads: int) -> Contender:
    """Return the service in another checkout, started in the same way."""
    return replace(
        service(workers, threads), name="before", description="another checkout", root=root
    )


def reference() -> Contender:
    """Return the plain application, served by gunicorn with 2 processes of 4 threads."""
    return Contender(
        name="reference",
        description="gunicorn gthread, 2 processes of 4 threads",
        serve=[
            *(sys.executable, "-m", "gunicorn", "--worker-class", "gthread", "--threads", "4"),
            *("--log-level", "warning", "bench.reference:app"),
        ],
        prepare=[sys.executable, "-m", "bench.reference"],
        environment=lambda port, workers: {
            "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{port} --workers {workers}"
        },
        workers=2,
    )


def http(
    method: str, path: str, body: object = None, token: str = "", host: str = "127.0.0.1"
) -> bytes:
    """Return an HTTP/1.1 request with `body` as JSON and `token` as the bearer token."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    content = b""
    if body is not None:
        content = json.dumps(body).encode()
        lines += [f"{key}: {value}" for key, value in JSON.items()]
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode() + content


def registrations(count: int) -> list[bytes]:
    """Return requests that register `count` new users."""
    return [http("POST", "/auth/register", new_user()) for _ in range(count)]


def new_user() -> dict[str, str]:
    """Return the body of a registration with a random name."""
    name = f"user-{secrets.token_hex(8)}"
    return {"username": name, "email": f"{name}@example.com", "password": PASSWORD}


@contextmanager
def database(server_url: URL) -> Iterator[URL]:
    """Create a database on the server, and drop it at the end."""
    name = f"bench_{secrets.token_hex(6)}"
    _administer(server_url, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        yield server_url.set(drivername="postgresql+psycopg2", database=name)
    finally:
        drop = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
        _administer(server_url, drop)


def _administer(server_url: URL, statement: sql.Composable) -> None:
    connection = psycopg2.connect(url_text(server_url.set(drivername="postgresql")))
    try:
        connection.autocommit = True
        connection.cursor().execute(statement)
    finally:
        connection.close()


def url_text(url: URL) -> str:
    """Return the URL with its password, as drivers expect it."""
    return url.render_as_string(hide_password=False)


@contextmanager
def serving(
    contender: Contender, database_url: URL, cost: int, workers: int | None = None
) -> Iterator[Server]:
    """Start a contender on a database that it migrates first; stop it at the end."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "SECRET_KEY": secrets.token_hex(32),
        "DATABASE_URL": url_text(database_url),
        "BCRYPT_LOG_ROUNDS": str(cost),
        **contender.environment(port, workers or contender.workers),
    }
    with tempfile.TemporaryFile("w+") as log, ExitStack() as stack:

        def start(command: list[str]) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                command,
                cwd=contender.root,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

        try:
            if contender.prepare and start(contender.prepare).wait(60):
                raise RuntimeError(f"{contender.name}: the tables were not created")
            process = start(contender.serve)
            stack.callback(_stop, process)
            _await_ping(process, port)
        except (RuntimeError, subprocess.TimeoutExpired):
            log.seek(0)
            sys.stderr.write(log.read())
            raise
        yield Server(contender, port, process.pid)


def _await_ping(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when the server answers; raise RuntimeError if it exits or takes a minute."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the server did not start")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server and every process of its session: SIGTERM, and SIGKILL after 10 seconds."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    for pid in _session(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def _session(leader: int) -> list[int]:
    """Return the IDs of the processes in the session that `leader` leads."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has just exited
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            pids.append(int(stat.parent.name))
    return pids


def populate(server: Server) -> None:
    """Register the users who log in and get their status."""
    for _ in range(LOGGING_IN):
        user = new_user()
        token = _post(server.port, "/auth/register", user)["auth_token"]
        server.statuses.append(http("GET", "/auth/status", token=token))
        del user["username"]
        server.logins.append(http("POST", "/auth/login", user))


def _post(port: int, path: str, body: object) -> dict[str, str]:
    request = Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), JSON)
    with urlopen(request, timeout=30) as answer:  # noqa: S310  # an http URL
        parsed: dict[str, str] = json.load(answer)
    return parsed


def fill(server: Server) -> None:
    """Register USERS users."""
    outcome = closed(server.port, registrations(USERS), 4, 120, settle=0, once=True)
    if outcome.statuses != {201: USERS}:
        raise RuntimeError(f"{server.contender.name} did not register the users: {outcome}")
