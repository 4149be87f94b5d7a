"""Show how fast users move in and out, and in how much memory: python -m bench.importing --help.

A file of users is made and taken into a database that was just made, with the command that people
run; then one of the users logs in over HTTP. The time is that of the whole command.
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

from bench.report import add_database_url, leave_when_terminated, machine, say
from bench.servers import JSON, PASSWORD, ROOT, database, service, serving, url_text

COST = 12  # of the hashes in the file
DIGITS = "./" + string.ascii_letters + string.digits  # of bcrypt's base 64


class Run(NamedTuple):
    """What one command took."""

    seconds: float
    peak: int  # bytes of resident memory


def write_users(path: Path, number: int) -> None:
    """Write a file of users, no two with the same hash; the last of them has the PASSWORD."""
    choose = random.Random(number).choices  # noqa: S311  # they are to be the same every time
    with path.open("w", encoding="ascii") as file:
        for user in range(1, number):
            # The last digits of salt and digest have bits to spare, which are zero.
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
    """Run manage.py and return what it took; raises RuntimeError when it fails."""
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
        raise RuntimeError(f"{arguments[0]} ended with {process.returncode}")
    return Run(time.perf_counter() - start, usage.ru_maxrss * 1_024)


def log_in(database_url: URL, number: int) -> None:
    """Log the last user in, on a server; raises when that fails."""
    credentials = {"email": f"last.{number}@example.com", "password": PASSWORD}
    with serving(service(2, 16), database_url, COST) as server:
        body = json.dumps(credentials).encode()
        request = Request(f"http://127.0.0.1:{server.port}/auth/login", body, JSON)
        with urlopen(request, timeout=30) as answer:  # noqa: S310  # it is http
            if answer.status != 200 or not json.load(answer)["auth_token"]:
                raise RuntimeError("the user could not log in")


def measure(server_url: URL, number: int, folder: Path) -> list[Run]:
    """Import so many users, again, and export them; return what each took."""
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
    """Yield what the best of the rounds took, and all of them, in Markdown."""
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
    parser.add_argument("--output", type=Path, help="where to write it, in Markdown")
    options = parser.parse_args()
    leave_when_terminated()
    text = report(make_url(options.database_url), options.users, options.rounds)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
