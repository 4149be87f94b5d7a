"""Show that no email is lost when a sender is killed: python -m bench.mail --help.

Three processes of `manage.py send_mail` send the emails of one PostgreSQL to a mail server on
loopback, each over a connection of its own with STARTTLS and AUTH. One of them is killed with
SIGKILL in the middle of a send. Every email has to arrive, and at most one in a hundred twice.
"""

import argparse
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable

from sqlalchemy import URL, Engine, create_engine, make_url, text

from bench.mailserver import MailServer, certificate
from bench.report import add_database_url, exit_on_sigterm, machine, say
from bench.servers import ROOT, database, url_text

SENDERS = 3
TIMEOUT = 300  # seconds
MAX_TWICE = 0.01  # of the emails
INSERT = text(
    "INSERT INTO mails (kind, address, parameters, language, created_at, next_try_at, tries, error)"
    " SELECT 'account_deleted', 'user' || n || '@example.com', '{}', 'en', now(), now(), 0, ''"
    " FROM generate_series(1, :number) AS n"
)
# Instead of waiting for the claims of the killed sender to expire.
EXPIRE = text("UPDATE mails SET claimed_until = now() WHERE claimed_until <= :latest")


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when the condition is true; raise RuntimeError after TIMEOUT."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the emails were not sent in time")
        time.sleep(0.05)


def send(engine: Engine, server: MailServer, number: int, environment: dict[str, str]) -> int:
    """Send this many emails; return how many the killed sender had claimed."""
    command = [sys.executable, "manage.py", "send_mail"]
    with contextlib.ExitStack() as stack:
        senders = []
        for _ in range(SENDERS):
            sender = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(sender.wait)
            stack.callback(sender.kill)
            senders.append(sender)
        wait_until(lambda: len(server.received) >= number // 4)
        senders[0].kill()
        senders[0].wait()
        with engine.begin() as connection:
            latest = connection.scalar(text("SELECT max(claimed_until) FROM mails"))
        say(f"killed a sender after {len(server.received)} emails")

        def claimed() -> int:
            rows = "SELECT count(*) FROM mails WHERE claimed_until <= :latest"
            with engine.begin() as connection:
                return int(connection.execute(text(rows), {"latest": latest}).scalar_one())

        def waiting() -> int:
            with engine.begin() as connection:
                return int(connection.scalar(text("SELECT count(*) FROM mails")) or 0)

        wait_until(lambda: waiting() == claimed())
        with engine.begin() as connection:
            expired = connection.execute(EXPIRE, {"latest": latest}).rowcount
        wait_until(lambda: waiting() == 0)
        for sender in senders[1:]:
            sender.send_signal(signal.SIGTERM)
            if sender.wait(30):
                raise RuntimeError("a sender did not end well")
    return expired


def report(server_url: URL, number: int) -> tuple[str, bool]:
    """Return the counts in Markdown, and whether they are good."""
    with database(server_url) as url, MailServer() as server:
        environment = os.environ | {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "SECRET_KEY": secrets.token_hex(32),
            "DATABASE_URL": url_text(url),
            "SMTP_URL": server.url,
            "SSL_CERT_FILE": certificate()[0],
            "MAIL_FROM": "Example <users@app.example>",
            "LINK_BASE_URL": "https://app.example",
        }
        migrate = [sys.executable, "manage.py", "db", "upgrade"]
        subprocess.run(migrate, cwd=ROOT, env=environment, check=True, capture_output=True)
        engine = create_engine(url)
        try:
            with engine.begin() as connection:
                connection.execute(INSERT, {"number": number})
            start = time.perf_counter()
            claimed = send(engine, server, number, environment)
            seconds = time.perf_counter() - start
        finally:
            engine.dispose()
        counts = Counter(address for address, _ in server.received)
    lost = number - len(counts)
    twice = sum(count > 1 for count in counts.values())
    lines = [
        f"{machine(server_url)}; {SENDERS} senders, one of them killed.",
        "",
        "| emails | claimed by the killed sender | arrived | twice | lost | emails/s |",
        "|---|---|---|---|---|---|",
        f"| {number:,} | {claimed} | {len(counts):,} | {twice} | {lost} | {number / seconds:.0f} |",
        "",
    ]
    # Without an email that the killed sender had claimed, the trial would show nothing.
    return "\n".join(lines), bool(claimed) and not lost and twice <= MAX_TWICE * number


def main() -> int:
    """Print the table; return 1 if an email was lost or too many arrived twice."""
    parser = argparse.ArgumentParser(prog="python -m bench.mail", description=__doc__)
    add_database_url(parser)
    parser.add_argument("--mails", type=int, default=2_000, help="the number of emails")
    options = parser.parse_args()
    exit_on_sigterm()
    table, good = report(make_url(options.database_url), options.mails)
    print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
