"""The sender: takes emails from the outbox and sends them, several at once.

Nothing is sent inside a transaction. An email that hangs or fails does not hold up another one.
"""

import contextlib
import threading
from collections.abc import Callable
from email.message import EmailMessage
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import structlog
from flask import Flask
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from project.extensions import db
from project.mail import outbox, transport
from project.mail.transport import Rejected, Transport

CONCURRENCY = 16  # emails that a sender sends at once
POLL_INTERVAL = 1.0  # seconds between two looks into an empty outbox

log = structlog.get_logger()


class Outgoing(NamedTuple):
    """A message that is ready to be sent."""

    message: EmailMessage
    link: str | None  # the link in it


# Returns the message of a row of the outbox, or None if there is nothing to tell any more.
Compose = Callable[[Row[Any]], Outgoing | None]


class Sender:
    """Sends the emails of the outbox of an application, each in a thread of its own.

    The threads are not those of a ThreadPoolExecutor, which accepts no work from the moment when
    the main thread ends: emails that were claimed at that moment would wait for their claim to
    expire.
    """

    def __init__(self, app: Flask, channel: Transport, compose: Compose) -> None:
        """Send over `channel` what `compose` returns for each row."""
        self._app = app
        self._transport = channel
        self._compose = compose
        self._sending = 0
        self._finished: SimpleQueue[None] = SimpleQueue()
        self._available = True  # whether the last look into the outbox succeeded

    def run(self, stopped: Callable[[float], bool]) -> None:
        """Send emails when they are due, until `stopped`, which waits some seconds, returns True.

        Then finish those that are being sent.
        """
        idle = True
        while not stopped(POLL_INTERVAL if idle else 0):
            idle = not self._send_due()
        while self._sending:
            self._finish_one(None)

    def run_once(self) -> None:
        """Send the emails that are due, and return when each of them has been tried."""
        while self._send_due():
            pass

    def _send_due(self) -> bool:
        """Start to send emails, and wait until one is finished; return False if there is none."""
        for mail in self._claim(CONCURRENCY - self._sending):
            self._sending += 1
            threading.Thread(target=self._send, args=(mail,), name="mail").start()
        if not self._sending:
            return False
        self._finish_one(POLL_INTERVAL)
        return True

    def _finish_one(self, seconds: float | None) -> None:
        """Wait until an email is finished, at most `seconds`."""
        with contextlib.suppress(Empty):
            self._finished.get(timeout=seconds)
            self._sending -= 1

    def _claim(self, limit: int) -> list[Row[Any]]:
        claimed: list[Row[Any]] = []
        if limit:
            with self._app.app_context():
                try:
                    claimed = list(outbox.claim(limit))
                except SQLAlchemyError as error:
                    if self._available:  # log changes, not every look
                        log.warning("mail_outbox_unavailable", reason=type(error).__name__)
                    self._available = False
                else:
                    self._available = True
        return claimed

    def _send(self, mail: Row[Any]) -> None:
        """Try one email, and store the outcome."""
        try:
            with self._app.app_context():
                self._try(mail)
        finally:
            self._finished.put(None)

    def _try(self, mail: Row[Any]) -> None:
        about = {"mail": mail.id, "mail_kind": mail.kind, "tries": mail.tries}
        try:
            try:
                outgoing = self._compose(mail)
                if outgoing:
                    self._transport.send(*outgoing)
            except Exception as error:  # noqa: BLE001  # whatever it is, the email is kept
                db.session.rollback()
                reason = transport.describe(error)
                permanent = isinstance(error, Rejected)
                dead = outbox.postpone(mail, reason, permanent=permanent)
                log.warning("mail_failed", **about, dead=dead, reason=reason)
            else:
                outbox.delete_sent(mail.id)
                log.info("mail_sent" if outgoing else "mail_dropped", **about)
        except SQLAlchemyError as error:
            # The claim expires, and the email is tried again.
            log.warning("mail_outbox_unavailable", **about, reason=type(error).__name__)


def start(app: Flask, compose: Compose) -> None:
    """Send the emails of `app` in a thread of this process, if emails can be sent.

    When the main thread ends, emails that are being sent are finished first.
    """
    channel = transport.of(app)
    if channel:
        sender = Sender(app, channel, compose)
        threading.Thread(target=sender.run, args=(_main_thread_ends,), name="mail").start()


def _main_thread_ends(seconds: float) -> bool:
    """Wait at most `seconds` for the main thread to end; return whether it has ended."""
    main = threading.main_thread()
    main.join(seconds)
    return not main.is_alive()
