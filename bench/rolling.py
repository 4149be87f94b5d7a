"""Show that restarts and key rotation lose no request: python -m bench.rolling --help.

Two servers run behind a proxy of deploy/ on one PostgreSQL. Clients register, log in, get their
status, refresh and log out without pause, while the servers are restarted one after the other,
first without changes and then through the steps of a rotation of SECRET_KEY. Before a server stops,
it drains, as with the unit of deploy/systemd. Every response that is not a success is a loss. Each
request also claims another address, which no server may believe.
"""

import argparse
import contextlib
import http.client
import json
import os
import secrets
import signal
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

from bench.load import running
from bench.proxies import FILES, await_port, free_ports, proxy
from bench.report import add_database_url, exit_on_sigterm, machine, say
from bench.servers import PASSWORD, ROOT, database, new_user, url_text

CLIENTS = 8
DRAIN = 3.0  # seconds, as in deploy/systemd/users@.service
FORGED = "203.0.113.9"  # the address that each request claims


class Server:
    """One of the two servers, which can be restarted with other settings."""

    def __init__(self, port: int, settings: dict[str, str], log: Path) -> None:
        self.port = port
        self.settings = settings
        self._log = log.open("ab")
        self._drain_file = log.with_suffix(".drain")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, **changes: str) -> None:
        """Apply these changes of settings, start the server, and wait until it is ready."""
        self.settings |= changes
        environment = {**os.environ, "GRANIAN_PORT": str(self.port), **self.settings}
        environment["DRAIN_FILE"] = str(self._drain_file)
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
        """Drain and stop the server, and start it with these changes of settings."""
        self._drain_file.touch()
        time.sleep(DRAIN)
        self.stop()
        self._drain_file.unlink()
        self.start(**changes)


class Client(threading.Thread):
    """A client that repeats all actions of a user."""

    def __init__(self, port: int, over: threading.Event, *, keep_alive: bool = False) -> None:
        super().__init__(daemon=True)
        self._over = over
        self._keep_alive = keep_alive
        self._connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30)
        self.answers: Counter[str] = Counter()
        self.losses: list[str] = []

    def run(self) -> None:
        """Repeat the visit until `over` is set."""
        while not self._over.is_set():
            try:
                self._visit()
            except _Lost:
                pass
            except Exception as error:  # noqa: BLE001  # an answer without what the client needs
                self.losses.append(repr(error))

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
        headers = {"X-Forwarded-For": FORGED, "X_Forwarded_For": FORGED}
        if body:
            headers["Content-Type"] = "application/json"
        if token:
            headers["Authorization"] = f"Bearer {token}"
        outcome = ""
        try:
            content = json.dumps(body) if body else None
            self._connection.request(method, path, content, headers)
            answer = self._connection.getresponse()
            outcome, text = str(answer.status), answer.read()
            if answer.status < 300:
                return json.loads(text)
        except (OSError, http.client.HTTPException, ValueError) as error:
            outcome = type(error).__name__
            self._connection.close()
        finally:
            if not self._keep_alive:
                self._connection.close()
            self.answers[outcome] += 1
        self.losses.append(f"{method} {path}: {outcome}")
        raise _Lost


class _Lost(Exception):
    """A response that was not a success."""


@contextlib.contextmanager
def load(port: int) -> Iterator[list[Client]]:
    """Run the clients while the context lasts; every second one keeps its connection."""
    over = threading.Event()
    clients = [Client(port, over, keep_alive=bool(each % 2)) for each in range(CLIENTS)]
    with running(clients, over):
        yield clients


def steps(servers: list[Server], seconds: float, rotation: bool) -> Iterator[str]:
    """Run one step after the other on both servers, `seconds` apart, and yield the name of each.

    Without `rotation`, the first step is the only one.
    """
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
        if not rotation:
            break


def report(server_url: URL, name: str, seconds: float, rotation: bool) -> tuple[str, bool]:
    """Return the table in Markdown, and whether every response was a success."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "DATABASE_URL": url_text(stack.enter_context(database(server_url))),
            "SECRET_KEY": secrets.token_hex(32),
            "BCRYPT_LOG_ROUNDS": "4",
            "TRUSTED_PROXIES": "1",
            "FORCE_HTTPS": "true",
            "REGISTRATIONS_PER_ADDRESS": "1000000",
            "GRANIAN_HOST": "127.0.0.1",
        }
        ports = free_ports(2)
        servers = [Server(port, dict(settings), folder / f"{port}.log") for port in ports]
        for server in servers:
            stack.callback(server.stop)
            server.start()
        port = stack.enter_context(proxy(name, folder, ports))
        clients = stack.enter_context(load(port))
        lines = [f"| {name} | responses | not successful |", "|---|---|---|"]
        answers = losses = 0
        for step in steps(servers, seconds, rotation):
            say(step)
            answered = sum(sum(client.answers.values()) for client in clients)
            lost = [loss for client in clients for loss in client.losses]
            lines.append(f"| {step} | {answered - answers:,} | {len(lost) - losses:,} |")
            answers, losses = answered, len(lost)
        for port in ports:
            if f'"ip":"{FORGED}"' in (folder / f"{port}.log").read_text():
                lost.append("a server believed the address that a client claimed")
    for loss, count in Counter(lost).most_common(10):
        say(f"{count} times {loss}")
    heading = f"{machine(server_url)}; {CLIENTS} clients."
    return "\n".join([heading, "", *lines, ""]), not lost


def main() -> int:
    """Print the table; return 1 if a response was lost."""
    parser = argparse.ArgumentParser(prog="python -m bench.rolling", description=__doc__)
    add_database_url(parser)
    parser.add_argument("--proxy", choices=FILES, default="nginx")
    parser.add_argument(
        "--no-rotation", action="store_true", help="only the restart without changes"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="before, between and after the restarts"
    )
    options = parser.parse_args()
    exit_on_sigterm()
    url, rotation = make_url(options.database_url), not options.no_rotation
    table, good = report(url, options.proxy, options.seconds, rotation)
    print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
