"""Show that restarts and key rotation lose no request: python -m bench.rolling --help.

Two servers run behind nginx on one PostgreSQL. Clients register, log in, get their status, refresh
and log out without pause, while the servers are restarted one after the other, first without
changes and then through the steps of a rotation of SECRET_KEY. Every response that is not a success
is a loss.
"""

import argparse
import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, make_url

from bench.report import add_database_url, exit_on_sigterm, machine, say
from bench.servers import PASSWORD, ROOT, database, new_user, url_text

CLIENTS = 8
# The nginx configuration of docs/operations.md, and otherwise nginx's defaults.
NGINX = """
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream users {{
        server 127.0.0.1:{ports[0]} max_fails=1 fail_timeout=1s;
        server 127.0.0.1:{ports[1]} max_fails=1 fail_timeout=1s;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://users;
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header X-Request-ID $request_id;
        }}
    }}
}}
"""


class Server:
    """One of the two servers, which can be restarted with other settings."""

    def __init__(self, port: int, settings: dict[str, str], log: Path) -> None:
        self.port = port
        self.settings = settings
        self._log = log.open("ab")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, **changes: str) -> None:
        """Apply these changes of settings, start the server, and wait until it is ready."""
        self.settings |= changes
        environment = {**os.environ, "GRANIAN_PORT": str(self.port), **self.settings}
        command = [sys.executable, "manage.py", "serve"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self._log, stderr=self._log
        )
        await_port(self._process, self.port)

    def workers(self) -> str:
        """Return the IDs of its processes, which change when one of them is started again."""
        pid = self._process.pid if self._process else 0
        return Path(f"/proc/{pid}/task/{pid}/children").read_text()

    def stop(self) -> None:
        """Send SIGTERM, as an operator does, and wait until the server has exited."""
        if self._process:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(60)
            self._process = None

    def restart(self, **changes: str) -> None:
        """Stop the server, and start it with these changes of settings."""
        self.stop()
        self.start(**changes)


class Client(threading.Thread):
    """A client that repeats all actions of a user."""

    def __init__(self, port: int, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._over = over
        self.answers: Counter[str] = Counter()
        self.losses: list[str] = []

    def run(self) -> None:
        """Repeat the visit until `over` is set."""
        while not self._over.is_set():
            with contextlib.suppress(_Lost):
                self._visit()

    def _visit(self) -> None:
        user = new_user()
        pair = self._send("POST", "/auth/register", user)
        for _ in range(10):
            self._send("GET", "/auth/status", token=pair["auth_token"])
            body = {"refresh_token": pair["refresh_token"]}
            pair = self._send("POST", "/auth/refresh", body)
        self._send("POST", "/auth/logout", token=pair["auth_token"])
        credentials = {"email": user["email"], "password": PASSWORD}
        pair = self._send("POST", "/auth/login", credentials)
        self._send("GET", "/auth/sessions", token=pair["auth_token"])

    def _send(self, method: str, path: str, body: object = None, token: str = "") -> Any:
        """Return the JSON of a response; record any other than a success, and end the visit."""
        headers = {"Content-Type": "application/json"} if body else {}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        outcome = ""
        try:
            connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            outcome, content = str(answer.status), answer.read()
            if answer.status < 300:
                return json.loads(content)
        except (OSError, http.client.HTTPException) as error:
            outcome = type(error).__name__
        finally:
            connection.close()
            self.answers[outcome] += 1
        self.losses.append(f"{method} {path}: {outcome}")
        raise _Lost


class _Lost(Exception):
    """A response that was not a success."""


@contextlib.contextmanager
def load(port: int) -> Iterator[list[Client]]:
    """Run the clients while the context lasts."""
    over = threading.Event()
    clients = [Client(port, over) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield clients
    finally:
        over.set()
        for client in clients:
            client.join(60)


@contextlib.contextmanager
def nginx(folder: Path, ports: list[int]) -> Iterator[int]:
    """Run nginx in front of two servers, and yield its port."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    (port,) = free_ports(1)
    configuration = folder / "nginx.conf"
    configuration.write_text(NGINX.format(folder=folder, ports=ports, port=port))
    command = [program, "-c", str(configuration), "-p", str(folder), "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        await_port(process, port)
        yield port
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(30)


def await_port(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when a process listens; raise RuntimeError if it exits or takes 30 seconds."""
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.05)
    raise RuntimeError(f"no process listens on {port}")


def free_ports(count: int) -> list[int]:
    """Return unused ports of 127.0.0.1."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def steps(servers: list[Server], seconds: float) -> Iterator[str]:
    """Run one step after the other on both servers, `seconds` apart, and yield the name of each."""
    old, new = servers[0].settings["SECRET_KEY"], secrets.token_hex(32)
    for name, changes in {
        "restart without changes": {},
        "the new key is accepted": {"SECRET_KEY_FALLBACKS": new},
        "the new key signs": {"SECRET_KEY": new, "SECRET_KEY_FALLBACKS": old},
        "the old key is removed": {"SECRET_KEY_FALLBACKS": ""},
    }.items():
        for server in servers:
            time.sleep(seconds)
            server.restart(**changes)
        time.sleep(seconds)
        yield name


def report(server_url: URL, seconds: float) -> tuple[str, bool]:
    """Return the table in Markdown, and whether every response was a success."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "DATABASE_URL": url_text(stack.enter_context(database(server_url))),
            "SECRET_KEY": secrets.token_hex(32),
            "BCRYPT_LOG_ROUNDS": "4",
            "TRUSTED_PROXIES": "1",
            "REGISTRATIONS_PER_ADDRESS": "1000000",
            "GRANIAN_HOST": "127.0.0.1",
        }
        ports = free_ports(2)
        servers = [Server(port, dict(settings), folder / f"{port}.log") for port in ports]
        for server in servers:
            stack.callback(server.stop)
            server.start()
        port = stack.enter_context(nginx(folder, ports))
        clients = stack.enter_context(load(port))
        lines = ["| | responses | not successful |", "|---|---|---|"]
        answers = losses = 0
        for step in steps(servers, seconds):
            say(step)
            answered = sum(sum(client.answers.values()) for client in clients)
            lost = [loss for client in clients for loss in client.losses]
            lines.append(f"| {step} | {answered - answers:,} | {len(lost) - losses:,} |")
            answers, losses = answered, len(lost)
    for loss, count in Counter(lost).most_common(10):
        say(f"{count} times {loss}")
    heading = f"{machine(server_url)}; {CLIENTS} clients."
    return "\n".join([heading, "", *lines, ""]), not lost


def main() -> int:
    """Print the table; return 1 if a response was lost."""
    parser = argparse.ArgumentParser(prog="python -m bench.rolling", description=__doc__)
    add_database_url(parser)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="before, between and after the restarts"
    )
    options = parser.parse_args()
    exit_on_sigterm()
    table, good = report(make_url(options.database_url), options.seconds)
    print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
