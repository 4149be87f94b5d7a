"""Emails rendered from templates: languages, the operator's templates, escaping, headers."""

import tempfile
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from project import db
from project.accounts.mails import WITH_LINK, Kind
from project.mail import outbox, rendering
from project.mail.transport import Rejected
from project.tests.accounts.mail_case import MailTestCase, body_of, send_mail
from project.tests.rows import stored_mails

LINK = "https://app.example/#/reset?token=abc"


class RenderingTestCase(MailTestCase):
    """A test with a folder for templates of the operator."""

    def setUp(self) -> None:
        """Make the folder."""
        super().setUp()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory())) / "templates"
        self.folder.mkdir()

    def use(self, **files: str) -> None:
        """Set MAIL_TEMPLATES to a folder with files named `<language>__<kind>__<extension>`."""
        for name, text in files.items():
            language, kind, extension = name.split("__")
            path = self.folder / language / f"{kind}.{extension}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        self.app.config["MAIL_TEMPLATES"] = self.folder
        rendering.init_app(self.app)

    def row(self, kind: str, address: str, language: str, **parameters: Any) -> Any:
        """Add an email to the outbox, and return its row."""
        outbox.add(kind, address, language, **parameters)
        db.session.commit()
        return outbox.newest(1)[0]

    def render(self, kind: str, language: str = "en", **parameters: str | None) -> EmailMessage:
        """Return an email, rendered with a link."""
        row = self.row(kind, "ada@test.com", language, **parameters)
        return rendering.render(row, link=LINK, minutes=90)


class TestTemplates(RenderingTestCase):
    """The templates of the service."""

    def test_kinds(self) -> None:
        """Each kind has a subject, a text and an HTML part, with the link if it has one."""
        for kind in Kind:
            for ip in ("192.0.2.7", None):
                with self.subTest(kind, ip=ip):
                    message = self.render(kind, ip=ip)
                    texts = [str(message["Subject"]), body_of(message, "plain")]
                    texts.append(body_of(message, "html"))

                    for text in texts:
                        self.assertIn("Example", text)
                        self.assertNotRegex(text, r"None|Undefined|\{[{%]")
                    for text in texts[1:]:
                        self.assertEqual(kind in WITH_LINK, LINK in text)

    def test_files(self) -> None:
        """There is a text and an HTML template for each kind, and no other."""
        expected = {f"{kind}.{extension}" for kind in Kind for extension in ("txt", "html")}
        found = {path.name for path in (rendering.TEMPLATES / "en").iterdir()}

        self.assertEqual(expected, found - {"duration.txt"})
        self.assertEqual(["en"], list(rendering.languages()))

    def test_service_name(self) -> None:
        """The service is called by the name in MAIL_FROM, or its domain; it has another without."""
        for sender, expected in (
            ("Example <users@app.example>", "Example"),
            ('"Example, Inc." <users@app.example>', "Example, Inc."),
            ("users@app.example", "app.example"),
            (None, "users-service"),
        ):
            with self.subTest(sender):
                self.app.config["MAIL_FROM"] = sender

                self.assertEqual(expected, rendering.service_name())
                if sender:
                    self.assertIn(expected, body_of(self.render("totp_enabled", ip=None), "plain"))

    def test_language_of_the_page(self) -> None:
        """The HTML part names its language, which is English for a language without templates."""
        self.use(de__reset__html='{% extends "layout.html" %}')

        for language, expected in (("de", "de"), ("en", "en"), ("fr", "en")):
            with self.subTest(language):
                html = body_of(self.render("reset", language), "html")
                self.assertIn(f'<html lang="{expected}">', html)


class TestOperator(RenderingTestCase):
    """MAIL_TEMPLATES and the language of a request."""

    def test_override(self) -> None:
        """The operator's files replace subject, text and HTML of one kind, and of no other."""
        before = self.render("verify")
        self.use(
            en__reset__txt='{% set subject = "S " ~ service %}\nT {{ link }} {{ minutes }}',
            en__reset__html="<p>H {{ service }}</p>",
        )

        message = self.render("reset")

        self.assertEqual("S Example", message["Subject"])
        self.assertEqual(f"T {LINK} 90\n", body_of(message, "plain"))
        self.assertEqual("<p>H Example</p>\n", body_of(message, "html"))
        after = self.render("verify")
        self.assertEqual(before["Subject"], after["Subject"])
        for part in ("plain", "html"):
            self.assertEqual(body_of(before, part), body_of(after, part))

    def test_missing_template(self) -> None:
        """A template that a language lacks is taken from English."""
        html = body_of(self.render("reset"), "html")
        self.use(de__reset__txt='{% set subject = "Neues Passwort" %}\nHallo,')

        message = self.render("reset", "de")

        self.assertEqual("Neues Passwort", message["Subject"])
        self.assertEqual("Hallo,\n", body_of(message, "plain"))
        self.assertEqual(html, body_of(message, "html"))

    def test_accept_language(self) -> None:
        """The language of an email is the one of the folders that the request prefers."""
        self.use(de__reset__txt="", fr__reset__txt="")
        for header, expected in {
            "de": "de",
            "de-AT,de;q=0.9,en;q=0.8": "de",
            "de-AT": "de",
            "it, fr;q=0.7, de;q=0.2": "fr",
            "en;q=0.4, fr;q=0.5": "fr",
            "en, de;q=0.9": "en",
            "it": "en",
            "../de": "en",
            "de;q=0": "en",
            "\x7f;;=,": "en",
            "": "en",
        }.items():
            with self.subTest(header):
                response = self.app.test_client().post(
                    "/auth/password/forgot",
                    json={"email": f"{expected}@test.com"},
                    headers={"Accept-Language": header},
                )

                self.assertEqual(202, response.status_code)
                self.assertEqual(expected, stored_mails()[-1]["language"])

    def test_registration(self) -> None:
        """A user who registers gets the email in the language of the request."""
        self.app.config["EMAIL_VERIFICATION"] = "required"
        self.use(de__verify__txt='{% set subject = "Willkommen" %}\n{{ link }}')
        body = {"username": "eve", "email": "eve@test.com", "password": "test"}

        self.app.test_client().post(
            "/auth/register", json=body, headers={"Accept-Language": "de-CH"}
        )

        (message,) = self.send_mail()
        self.assertEqual("Willkommen", message["Subject"])
        self.link_in(message, "verify")


class TestEscaping(RenderingTestCase):
    """Values in templates cannot become HTML or headers."""

    def test_html(self) -> None:
        """Values are escaped in HTML, and neither in the text nor in the subject."""
        self.app.config["MAIL_FROM"] = '"<b>A & B</b>" <users@app.example>'
        message = self.render("new_login", ip="<i>&")

        text, html = body_of(message, "plain"), body_of(message, "html")
        self.assertEqual("New login to your account at <b>A & B</b>", message["Subject"])
        self.assertEqual('"<b>A & B</b>" <users@app.example>', message["From"])
        self.assertIn("account at <b>A & B</b> on", text)
        self.assertIn("the address <i>&,", text)
        self.assertIn("account at &lt;b&gt;A &amp; B&lt;/b&gt; on", html)
        self.assertIn("the address &lt;i&gt;&amp;,", html)
        self.assertNotRegex(html, "<b>|<i>")

    def test_subject(self) -> None:
        """Line breaks in a subject become blanks, so that it cannot add a header."""
        breaks = r"Hello\r\nBcc: a@test.com\nX: y\r\u2028Z\x85\x0b\x0c"
        self.use(en__reset__txt=f'{{% set subject = "{breaks}" %}}\ntext')

        message = self.render("reset")

        self.assertEqual("Hello Bcc: a@test.com X: y Z", message["Subject"])
        self.assertIsNone(message["Bcc"])
        head = bytes(message).partition(b"\r\n\r\n")[0]
        self.assertNotRegex(head, rb"(?m)^(Bcc|X):")

    def test_address(self) -> None:
        """An address with a line break is given up, and nothing is sent."""
        for address in (
            "ada@test.com\r\nBcc: eve@test.com",
            "ada@test.com\nBcc: eve@test.com",
            "ada@test.com\r\n\r\nbody",
            "ada\r@test.com",
            "ada@test.com, eve@test.com",
        ):
            with self.subTest(address):
                with self.assertRaises(Rejected):
                    rendering.render(self.row("account_deleted", address, "en"))
                self.assertEqual([], send_mail(self.app))
                (mail,) = stored_mails()
                self.assertIsNotNone(mail["failed_at"])
                self.assertIn("RFC 5322", mail["error"])
                outbox.forget(address)
                db.session.commit()

    def test_language(self) -> None:
        """A language that is a path leads to no file outside of the folders."""
        outside = self.folder.with_name("secret")
        outside.mkdir()
        for extension in ("txt", "html"):
            (outside / f"reset.{extension}").write_text('{% set subject = "outside" %}')
        self.use(de__reset__txt="")
        for language in ("../secret", "de/../../secret", "..", "/", "de\r\nX: y"):
            with self.subTest(language):
                message = self.render("reset", language)

                self.assertEqual("Choose a new password for Example", message["Subject"])
                self.assertIn('<html lang="en">', body_of(message, "html"))
