"""Emails reach a mail server: from the commit of their row to the response of the server."""

import email
import email.policy
import threading
from datetime import timedelta
from email.message import EmailMessage
from unittest import mock

from bench.mailserver import CREDENTIALS, PASSWORD, MailServer
from project import clock, db
from project.accounts import mails
from project.mail import outbox, rendering, transport
from project.mail.sender import CONCURRENCY, Outgoing, Sender
from project.tests.lib.log_capture import captured_log
from project.tests.mail.servers import MailServerTestCase, raw_server


class TestDelivery(MailServerTestCase):
    """What is sent, once and completely."""

    def test_commit_and_rollback(self) -> None:
        """A rollback sends nothing, and a commit sends; a sent email leaves the outbox."""
        outbox.add("account_deleted", "no@test.com", "en")
        db.session.rollback()
        self.add("yes@test.com")

        self.send()

        self.assertEqual(["yes@test.com"], [address for address, _ in self.server.received])
        self.assertEqual([], self.rows())

    def test_message(self) -> None:
        """A message has its headers and both parts, and a bare server without TLS gets it too."""
        self.add("ada@test.com")
        created = self.rows()[0].created_at
        plain = self.enterContext(MailServer(tls=False))

        self.send(f"smtp://127.0.0.1:{plain.port}")

        message = email.message_from_bytes(plain.received[0][1], policy=email.policy.default)
        self.assertEqual("Example <users@app.example>", message["From"])
        self.assertEqual("ada@test.com", message["To"])
        self.assertEqual("Your account at Example was deleted", message["Subject"])
        self.assertEqual("auto-generated", message["Auto-Submitted"])
        self.assertEqual(created.replace(microsecond=0), message["Date"].datetime)
        parts = [part.get_content_type() for part in message.walk()]
        self.assertEqual(["multipart/alternative", "text/plain", "text/html"], parts)

    def test_message_id(self) -> None:
        """Each try of an email has the same Message-ID, and no other email has it."""
        self.add("ada@test.com", "bob@test.com")
        sent = [self.app_message(mail) for mail in (*self.rows(), *self.rows())]

        self.assertEqual(sent[:2], sent[2:])
        self.assertEqual(2, len(set(sent)))

    def app_message(self, mail: object) -> str:
        """Return the Message-ID of an email."""
        return str(rendering.render(mail)["Message-ID"])  # type: ignore[arg-type]

    def test_server_away(self) -> None:
        """Emails stay while the server is away, and are delivered when it is back."""
        addresses = [f"user{number}@test.com" for number in range(40)]
        self.add(*addresses)
        self.send("smtp://127.0.0.1:1")
        self.assertEqual({1}, {row.tries for row in self.rows()})
        self.assertEqual(40, len(self.rows()))
        self.send()
        self.assertEqual([], self.server.received)

        self.move_clock(outbox.FIRST_DELAY * (1 + outbox.JITTER) + 1)
        self.send()

        self.assertEqual(set(addresses), {address for address, _ in self.server.received})
        self.assertEqual([], self.rows())

    def test_others_hang(self) -> None:
        """An email is sent while ten others hang, which are added before it."""
        self.add(*(f"slow{number}@test.com" for number in range(10)), "fast@test.com")
        released, arrived = threading.Event(), threading.Event()

        class Channel:
            """A transport that hangs for some addresses."""

            def send(self, message: EmailMessage, link: str | None) -> None:
                if message["To"] == "fast@test.com":
                    arrived.set()
                else:
                    released.wait()

        sender = Sender(self.app, Channel(), mails.compose)
        thread = threading.Thread(target=sender.run_once)
        thread.start()
        found = arrived.wait(10)
        waiting = released.is_set()
        released.set()
        thread.join()

        self.assertTrue(found)
        self.assertFalse(waiting)
        self.assertLess(10, CONCURRENCY)

    def test_nothing_to_tell(self) -> None:
        """An email for which there is no reason any more is deleted and not sent."""
        self.add("ada@test.com")

        def compose(_mail: object) -> Outgoing | None:
            return None

        Sender(self.app, transport.SmtpTransport(self.server.url), compose).run_once()

        self.assertEqual([], self.rows())
        self.assertEqual([], self.server.received)


class TestFailures(MailServerTestCase):
    """What happens to an email that is not sent."""

    def assert_kept(self, url: str, *reasons: str) -> None:
        """Check that an email stays, with a reason in the row and the log, without secrets."""
        self.add("ada@test.com")
        with captured_log(readable=False) as log:
            self.send(url)
        (row,) = self.rows()
        for reason in reasons:
            self.assertIn(reason, row.error)
            self.assertIn(reason, log.getvalue())
        self.assertIn("mail_failed", log.getvalue())
        for secret in (PASSWORD, CREDENTIALS, "sesame"):
            self.assertNotIn(secret, log.getvalue() + row.error)
        self.assertEqual((1, None, None), (row.tries, row.claimed_until, row.failed_at))
        self.assertGreater(row.next_try_at, row.created_at + timedelta(seconds=20))

    def test_wrong_password(self) -> None:
        """A server that refuses the password."""
        url = self.server.url.replace("sesame", "sesame2")
        self.assert_kept(url, "535 the mail server refused user and password")

    def test_certificate_of_another_name(self) -> None:
        """A certificate for another name."""
        self.assert_kept(
            self.server.url.replace("127.0.0.1", "localhost"), "CERTIFICATE_VERIFY_FAILED"
        )

    def test_untrusted_certificate(self) -> None:
        """A certificate of an unknown authority."""
        with mock.patch.dict("os.environ", {"SSL_CERT_FILE": "/dev/null"}):
            self.assert_kept(self.server.url, "CERTIFICATE_VERIFY_FAILED")

    def test_no_starttls(self) -> None:
        """A server without STARTTLS gets neither the password nor the email."""
        plain = self.enterContext(MailServer(tls=False))
        url = self.server.url.replace(str(self.server.port), str(plain.port))
        self.assert_kept(url, "STARTTLS extension not supported")
        self.assertEqual([], plain.received)

    def test_closed(self) -> None:
        """A server that closes the connection."""
        port = self.enterContext(raw_server(drip=False))
        self.assert_kept(f"smtp://127.0.0.1:{port}", "SMTPServerDisconnected")

    def test_dripping(self) -> None:
        """A server that sends a byte at a time, of which no part of the response is kept."""
        port = self.enterContext(raw_server(drip=True))
        with mock.patch.multiple(transport, SEND_TIMEOUT=0.3, STEP_TIMEOUT=1):
            self.assert_kept(f"smtp://127.0.0.1:{port}", "TimeoutError: not sent in 0.3 s")

    def test_refusals(self) -> None:
        """A 5xx for the recipient is final, a 4xx is not, and the other recipients get theirs."""
        self.server.responses = {"gone@test.com": "550 no mailbox", "full@test.com": "450 later"}
        self.add("gone@test.com", "full@test.com", "ada@test.com", "a..b@test.com")

        self.send()

        gone, full, unwritable = self.rows()
        self.assertEqual("550 no mailbox", gone.error)
        self.assertEqual("450 later", full.error)
        self.assertIn("RFC 5322", unwritable.error)
        dead = [row.failed_at is not None for row in (gone, full, unwritable)]
        self.assertEqual([True, False, True], dead)
        self.assertEqual(["ada@test.com"], [address for address, _ in self.server.received])
        self.assertEqual(outbox.Counts(waiting=1, dead=2), outbox.counts())

    def test_backoff(self) -> None:
        """Tries are 30 s apart, then twice as long up to an hour; the twelfth is the last."""
        self.add("ada@test.com")
        expected = [30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600, 3600]
        for tries, seconds in enumerate(expected, 1):
            self.send("smtp://127.0.0.1:1")
            (row,) = self.rows()
            self.assertEqual((tries, None), (row.tries, row.failed_at))
            wait = (row.next_try_at - clock.utcnow()).total_seconds()
            self.assertAlmostEqual(seconds, wait, delta=seconds * outbox.JITTER + 2)
            self.move_clock(wait - 1)
            self.send("smtp://127.0.0.1:1")
            self.assertEqual(tries, self.rows()[0].tries)
            self.move_clock(2)
        self.send("smtp://127.0.0.1:1")
        (row,) = self.rows()
        self.assertEqual((12, clock.utcnow()), (row.tries, row.failed_at))
        self.assertEqual(1, outbox.retry_dead())
        db.session.commit()

        self.send()

        self.assertEqual(1, len(self.server.received))
        self.assertGreater(len({outbox.delay(1) for _ in range(9)}), 1)

    def test_expired_claim(self) -> None:
        """An email whose sender died is sent by another one when the claim has expired."""
        self.add("ada@test.com")
        (first,) = outbox.claim(16)
        self.send()
        self.assertEqual([], self.server.received)

        self.move_clock(outbox.CLAIM_SECONDS + 1)
        (second,) = outbox.claim(16)
        outbox.postpone(first, "late", permanent=True)

        (row,) = self.rows()
        self.assertEqual((2, None, ""), (row.tries, row.failed_at, row.error))
        self.assertEqual(second.claimed_until, row.claimed_until)
