"""Development without a mail server: emails are files, and their links are in the log."""

import email
import email.policy
import stat
import tempfile
from pathlib import Path

from project.accounts import mails
from project.config import DevelopmentConfig, ProductionConfig, TestingConfig
from project.mail import transport
from project.mail.sender import Sender
from project.tests.accounts.mail_case import BASE, MailTestCase
from project.tests.lib.log_capture import captured_log, entries
from project.tests.rows import stored_mails


class TestFolder(MailTestCase):
    """The transport of development."""

    def test_files(self) -> None:
        """Each email is a file that only its owner can read; the link is in it and in the log."""
        folder = Path(self.enterContext(tempfile.TemporaryDirectory())) / "instance" / "mail"
        self.app.config.update(SMTP_URL=None, MAIL_FOLDER=folder)
        for _ in range(2):
            self.post("/auth/password/forgot", email="ada@test.com")
        channel = transport.of(self.app)
        assert channel is not None  # noqa: S101  # for mypy

        with captured_log(readable=False) as log:
            Sender(self.app, channel, mails.compose).run_once()

        self.assertEqual([], stored_mails())
        self.assertEqual(0o700, stat.S_IMODE(folder.stat().st_mode))
        written = [entry for entry in entries(log.getvalue()) if entry["event"] == "mail_written"]
        self.assertEqual({str(file) for file in folder.iterdir()}, {w["file"] for w in written})
        self.assertEqual(2, len({entry["file"] for entry in written}))
        for entry in written:
            file = Path(entry["file"])
            self.assertEqual(0o600, stat.S_IMODE(file.stat().st_mode))
            self.assertEqual(".eml", file.suffix)
            # A developer can take the link from the file as it is: no encoding breaks it.
            self.assertIn(entry["link"], file.read_text())
            message = email.message_from_bytes(file.read_bytes(), policy=email.policy.default)
            self.assertEqual("ada@test.com", message["To"])
            self.assertEqual(entry["subject"], message["Subject"])
            token = entry["link"].removeprefix(f"{BASE}/#/reset?token=")
            used = self.post("/auth/password/reset", token=token, new_password="another")
            self.assertEqual(200 if entry is written[0] else 400, used.status_code)

    def test_environments(self) -> None:
        """Only development writes emails to a folder; elsewhere none are sent without SMTP_URL."""
        self.assertEqual(("instance", "mail"), (DevelopmentConfig.MAIL_FOLDER or Path()).parts[-2:])
        for config in (ProductionConfig, TestingConfig):
            self.assertIsNone(config.MAIL_FOLDER)
        self.app.config["SMTP_URL"] = None
        self.assertIsNone(transport.of(self.app))
