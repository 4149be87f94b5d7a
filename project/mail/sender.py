"""The sender: takes emails from the outbox and sends them, several at once.

Nothing is sent inside a transaction. An email that hangs or fails does not hold up another one.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from email.message import EmailMessage
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
    """Sends the emails of the outbox of an application."""

    def __init__(self, app: Flask, channel: Transport, compose: Compose) -> None:
        """Send over `channel` what `compose` returns for each row."""
        self._app = app
        self._transport = channel
        self._compose = compose

    def run(self, stop: Callable[[], bool]) -> None:
        """Send emails when they are due, until `stop` returns True."""
        self._run(lambda idle: stop())

    def run_once(self) -> None:
        """Send the emails that are due, and return when each of them has been tried."""
        self._run(lambda idle: idle)

    def _run(self, stop: Callable[[bool], bool]) -> None:
        """Send until `stop` returns True; its argument is whether there is nothing to do."""
        running: set[Future[None]] = set()
        with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="mail") as pool:
            while True:
                claimed = self._claim(CONCURRENCY - len(running))
                running |= {pool.submit(self._send, mail) for mail in claimed}
                if stop(not running):
                    return
                if running:
                    _, running = wait(running, POLL_INTERVAL, FIRST_COMPLETED)
                else:
                    time.sleep(POLL_INTERVAL)

    def _claim(self, limit: int) -> list[Row[Any]]:
        if not limit:
            return []
        with self._app.app_context():
            try:
                return list(outbox.claim(limit))
            except SQLAlchemyError as error:
                log.warning("mail_outbox_unavailable", reason=type(error).__name__)
                return []

    def _send(self, mail: Row[Any]) -> None:
        """Try one email, and store the outcome."""
        with self._app.app_context():
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
    """Send the emails of `app` in a thread of this process, unless MAIL_SENDER is off.

    When the main thread ends, emails that are being sent are finished first.
    """
    channel = transport.of(app)
    if channel and app.config["MAIL_SENDER"]:
        main = threading.main_thread()
        sender = Sender(app, channel, compose)
        threading.Thread(
            target=sender.run, args=(lambda: not main.is_alive(),), name="mail"
        ).start()
