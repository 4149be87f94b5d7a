"""Measure the speed and memory of import and export: python -m bench.importing --help.

Write a file of users, import it into a new database with the operator's command, import it again,
and export it; then log in one of the users over HTTP. Times are those of the whole command.
"""

import argparse
import json
import os
import random
import secrets
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import bcrypt
from sqlalchemy import URL, make_url

from bench.report import add_database_url, exit_on_sigterm, machine, say
from bench.servers import JSON, PASSWORD, ROOT, database, service, serving, url_text

COST = 12  # of the hashes in the file
DIGITS = "./" + string.ascii_letters + string.digits  # of bcrypt's base64


class Run(NamedTuple):
    """The time and memory of one command."""

    seconds: float
    peak: int  # resident memory, bytes


def write_users(path: Path, number: int) -> None:
    """Write a file of users with different hashes; the last user's password is PASSWORD."""
    choose = random.Random(number).choices  # noqa: S311  # reproducible on purpose
    with path.open("w", encoding="ascii") as file:
        for user in range(1, number):
            # The unused bits in the last digits of salt and digest must be zero.
            hashed = f"$2b${COST}${''.join(choose(DIGITS, k=21))}u{''.join(choose(DIGITS, k=30))}O"
            file.write(_line(user, "".join(choose(string.ascii_lowercase, k=8)), hashed))
        genuine = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(COST)).decode()
        file.write(_line(number, "last", genuine))


def _line(user: int, name: str, hashed: str) -> str:
    fields = {
        "username": f"{name}-{user}",
        "email": f"{name}.{user}@example.com",
        "password_hash": hashed,
        "active": True,
        "created_at": f"20{user % 26:02d}-{user % 12 + 1:02d}-{user % 28 + 1:02d}T09:00:00Z",
    }
    return json.dumps(fields) + "\n"


def manage(database_url: URL, *arguments: str) -> Run:
    """Run manage.py and return its time and memory; raise RuntimeError if it fails."""
    environment = os.environ | {
        "APP_SETTINGS": "project.config.ProductionConfig",
        "SECRET_KEY": secrets.token_hex(32),
        "DATABASE_URL": url_text(database_url),
    }
    command = [sys.executable, "manage.py", *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments[0]} exited with {process.returncode}")
    return Run(time.perf_counter() - start, usage.ru_maxrss * 1_024)


def log_in(database_url: URL, number: int) -> None:
    """Log in the last user on a server; raise RuntimeError if the response has no token."""
    credentials = {"email": f"last.{number}@example.com", "password": PASSWORD}
    with serving(service(2, 16), database_url, COST) as server:
        body = json.dumps(credentials).encode()
        request = Request(f"http://127.0.0.1:{server.port}/auth/login", body, JSON)
        with urlopen(request, timeout=30) as answer:  # noqa: S310  # an http URL
            if answer.status != 200 or not json.load(answer)["auth_token"]:
                raise RuntimeError("the user could not log in")


def measure(server_url: URL, number: int, folder: Path) -> list[Run]:
    """Import `number` users twice and export them; return the run of each command."""
    users, written = folder / f"{number}.jsonl", folder / f"{number}-out.jsonl"
    if not users.exists():
        say(f"writing {number:,} users")
        write_users(users, number)
    with database(server_url) as url:
        manage(url, "db", "upgrade")
        runs = []
        for command, path in (
            ("import_users", users),
            ("import_users", users),
            ("export_users", written),
        ):
            runs.append(manage(url, command, str(path)))
            say(f"{command}: {number / runs[-1].seconds:,.0f} users/s")
        written.unlink()
        log_in(url, number)
    return runs


def table(number: int, rounds: Sequence[Sequence[Run]]) -> Iterator[str]:
    """Yield a line of Markdown for each command: the best round, and the others."""
    for name, runs in zip(
        ("import", "import, again", "export"), zip(*rounds, strict=True), strict=True
    ):
        rates = sorted((number / run.seconds for run in runs), reverse=True)
        others = ", ".join(f"{rate:,.0f}" for rate in rates[1:])
        peak = max(run.peak for run in runs) / 2**20
        yield f"| {name} | {number:,} | **{rates[0]:,.0f}** ({others}) | {peak:.0f} |"


def report(server_url: URL, sizes: Sequence[int], rounds: int) -> str:
    """Return the rates and the memory in Markdown."""
    lines = [
        f"{machine(server_url)}; {rounds} rounds, the best and in brackets the others.",
        "",
        "| command | users | users/s | peak MiB |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number in sizes:
            runs = [measure(server_url, number, Path(folder)) for _ in range(rounds)]
            lines += table(number, runs)
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.importing", description=__doc__)
    add_database_url(parser)
    parser.add_argument("--users", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="the file for the results, in Markdown")
    options = parser.parse_args()
    exit_on_sigterm()
    text = report(make_url(options.database_url), options.users, options.rounds)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
