"""Sender processes: several at once, one that is killed, the commands and the server."""

import http.client
import signal
import subprocess
import sys
import time
import unittest
from collections import Counter
from collections.abc import Callable
from typing import ClassVar

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import create_engine, make_url, text

from bench.mailserver import MailServer, certificate
from bench.pgproxy import PostgresProxy
from project.config import database_url
from project.mail.sender import POLL_INTERVAL
from project.tests import scratch
from project.tests.mail.servers import MAIL, needs_openssl
from project.tests.scratch import ON_POSTGRESQL, Service

TIMEOUT = 60  # seconds
PAST = "2026-01-01 00:00:00+00:00"
NUMBER = 300 if ON_POSTGRESQL else 50
MAX_TWICE = 16  # what a sender sends at once


@needs_openssl
class TestSenders(unittest.TestCase):
    """Processes on a database of their own, and a mail server with TLS."""

    url: str
    base: ClassVar[dict[str, str]]

    @classmethod
    def setUpClass(cls) -> None:
        """Migrate the database."""
        cls.url = cls.enterClassContext(scratch.database())
        cls.base = {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "SECRET_KEY": "0123456789abcdef" * 2,
            "DATABASE_URL": cls.url,
        }
        migrated = scratch.manage("db", "upgrade", **cls.base)
        if migrated.returncode:
            raise RuntimeError(migrated.stderr)

    def setUp(self) -> None:
        """Empty the outbox, and start the mail server."""
        self.execute("DELETE FROM mails")
        self.server = self.enterContext(MailServer())
        mail = {"SMTP_URL": self.server.url, "SSL_CERT_FILE": certificate()[0], **MAIL}
        self.settings = self.base | mail

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        """Execute a statement, and return its rows if it has any."""
        engine = create_engine(database_url(self.url))
        try:
            with engine.begin() as connection:
                result = connection.execute(text(statement))
                return [tuple(row) for row in result] if result.returns_rows else []
        finally:
            engine.dispose()

    def add(self, number: int) -> None:
        """Add emails to user1@test.com and so on."""
        self.execute(
            "INSERT INTO mails (kind, address, parameters, language, created_at, next_try_at,"  # noqa: S608
            " tries, error) WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1"
            f" FROM numbers WHERE n < {number}) SELECT 'account_deleted',"
            f" 'user' || n || '@test.com', '{{}}', 'en', '{PAST}', '{PAST}', 0, '' FROM numbers"
        )

    def waiting(self) -> int:
        """Return the number of rows in the outbox."""
        return int(str(self.execute("SELECT count(*) FROM mails")[0][0]))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition is true."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)

    def wait_until_received(self, number: int) -> None:
        """Wait until the mail server has this many emails."""
        self.wait_until(lambda: len(self.server.received) >= number)

    def assert_runs(self, process: "subprocess.Popen[bytes]") -> None:
        """Check that a process still runs after a time in which a sender polls the outbox."""
        with self.assertRaises(subprocess.TimeoutExpired):
            process.wait(1.5 * POLL_INTERVAL)

    def start_sender(self) -> "subprocess.Popen[bytes]":
        """Start `manage.py send_mail`."""
        process = subprocess.Popen(
            [sys.executable, "manage.py", "send_mail"],
            cwd=scratch.ROOT,
            env=scratch.settings(**self.settings),
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def test_one_is_killed(self) -> None:
        """With three senders, one of them killed, each email arrives, and at most 16 twice."""
        self.add(NUMBER)
        senders = [self.start_sender() for _ in range(3)]
        self.wait_until_received(NUMBER // 4)
        senders[0].kill()
        senders[0].wait()
        ((latest,),) = self.execute("SELECT max(claimed_until) FROM mails")
        self.wait_until_received(NUMBER - MAX_TWICE)
        deadline = time.monotonic() + TIMEOUT
        while self.waiting():
            self.assertLess(time.monotonic(), deadline)
            # The claims of the killed sender expire. The others' of that time are long done with.
            self.execute(
                "UPDATE mails SET claimed_until = '2026-01-01 00:00:00+00:00'"  # noqa: S608
                f" WHERE claimed_until <= '{latest}'"
            )
            time.sleep(0.1)
        for sender in senders[1:]:
            sender.send_signal(signal.SIGTERM)
            self.assertEqual(0, sender.wait(10))

        counts = Counter(address for address, _ in self.server.received)
        self.assertEqual({f"user{number}@test.com" for number in range(1, NUMBER + 1)}, set(counts))
        twice = sum(count - 1 for count in counts.values())
        self.assertLessEqual(twice, MAX_TWICE)

    def test_commands(self) -> None:
        """send_mail --once sends, mails lists, and mails --retry revives; neither has a secret."""
        self.add(2)
        self.server.responses = {"user1@test.com": "550 no mailbox"}
        sent = scratch.manage("send_mail", "--once", **self.settings)
        self.assertEqual(0, sent.returncode, sent.stderr)
        self.assertEqual(["user2@test.com"], [address for address, _ in self.server.received])

        listed = scratch.manage("mails", **self.settings).stdout
        self.assertRegex(listed, r"account_deleted +user1@test.com .* given up +550 no mailbox\n")
        self.assertIn("Waiting: 0; given up: 1.", listed)
        self.assertIn("given up: 1.", scratch.manage("check", **self.settings).stdout)

        self.server.responses = {}
        self.assertIn("again: 1.", scratch.manage("mails", "--retry", **self.settings).stdout)
        scratch.manage("send_mail", "--once", **self.settings)
        self.assertEqual(0, self.waiting())
        printed = scratch.manage("check", **self.settings).stdout
        self.assertIn("ok     The mail server of SMTP_URL can be reached", printed)
        self.assertNotIn("sesame", printed + sent.stderr + listed)

    def test_not_configured(self) -> None:
        """Without SMTP_URL send_mail ends with a line."""
        result = scratch.manage("send_mail", **self.settings | {"SMTP_URL": ""})

        self.assertEqual((1, 1), (result.returncode, len(result.stderr.splitlines())))
        self.assertIn("SMTP_URL is not set", result.stderr)

    def serve(self, url: str | None = None, **environment: str) -> Service:
        """Start the server with these settings and those of mail."""
        mail = {name: self.settings[name] for name in ("SMTP_URL", "SSL_CERT_FILE", *MAIL)}
        return self.enterContext(Service(url or self.url, **mail, **environment))

    def test_terminated_sender(self) -> None:
        """After SIGTERM during a send, send_mail finishes it and takes no other email."""
        self.server.accepting.clear()
        self.add(1)
        sender = self.start_sender()
        self.wait_until(lambda: len(self.server.arriving) == 1)
        sender.send_signal(signal.SIGTERM)
        self.assert_runs(sender)
        self.add(1)
        self.server.accepting.set()

        self.assertEqual(0, sender.wait(15))
        self.assertEqual(1, len(self.server.received))
        self.assertEqual(1, self.waiting())

    def test_terminated_server(self) -> None:
        """After SIGTERM during a send, a worker of the server finishes it."""
        service = self.serve()
        self.server.accepting.clear()
        self.add(1)
        self.wait_until(lambda: len(self.server.arriving) == 1)
        service.process.send_signal(signal.SIGTERM)
        service.wait_for_output("Stopping worker", times=2)
        self.assert_runs(service.process)
        self.server.accepting.set()

        self.assertEqual(0, service.process.wait(15))
        self.assertEqual(["user1@test.com"], self.server.arriving)
        self.assertEqual(1, len(self.server.received))
        self.assertEqual(0, self.waiting())

    def metrics(self, port: int) -> dict[str, float]:
        """Return the samples about emails in the response to Prometheus."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        self.assertEqual(200, response.status)
        text = response.read().decode()
        connection.close()
        self.assertIn("users_pool_size", text)
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("users_mails")
        }

    def test_server(self) -> None:
        """A worker sends, shows the outbox in the metrics, and ends in time when it is idle."""
        port = scratch.free_port()
        service = self.serve(METRICS_PORT=str(port))
        self.add(1)
        self.wait_until_received(1)
        self.wait_until(lambda: not self.waiting())
        self.assertEqual({"users_mails_waiting": 0, "users_mails_dead": 0}, self.metrics(port))

        started = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        self.assertEqual(0, service.process.wait(15))
        self.assertLess(time.monotonic() - started, 5)
        service.stop()
        self.assertIn('"mail_sent"', service.log)
        self.assertNotIn("sesame", service.log)

    @unittest.skipUnless(ON_POSTGRESQL, "needs a PostgreSQL server")
    def test_metrics_without_database(self) -> None:
        """While the database is away, a scrape succeeds and has no numbers of emails."""
        address = make_url(self.url)
        proxy = self.enterContext(PostgresProxy(address.host or "127.0.0.1", address.port or 5432))
        ours = address.set(host="127.0.0.1", port=proxy.port)
        port = scratch.free_port()
        self.add(3)
        self.serve(
            ours.render_as_string(hide_password=False), METRICS_PORT=str(port), MAIL_SENDER="false"
        )
        numbers = {"users_mails_waiting": 3.0, "users_mails_dead": 0.0}
        self.assertEqual(numbers, self.metrics(port))

        proxy.cut()
        self.assertEqual({}, self.metrics(port))

        proxy.restore()
        self.wait_until(lambda: self.metrics(port) == numbers)

    def test_server_without_sender(self) -> None:
        """With MAIL_SENDER=false the server connects to no mail server, and send_mail sends."""
        self.add(1)
        service = self.serve(MAIL_SENDER="false")
        self.assert_runs(service.process)
        service.stop()
        self.assertEqual(0, self.server.greetings)
        self.assertEqual([(0, None)], self.execute("SELECT tries, claimed_until FROM mails"))

        scratch.manage("send_mail", "--once", MAIL_SENDER="false", **self.settings)
        self.assertEqual(2, self.server.greetings)
        self.assertEqual(1, len(self.server.received))
        self.assertEqual(0, self.waiting())
