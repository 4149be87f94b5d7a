"""The page in examples/account.html, used in a browser with the service in development."""

import base64
import email
import email.policy
import hashlib
import http.client
import io
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pyotp

from project.config import DevelopmentConfig
from project.tests import browser, scratch

PAGE = (scratch.ROOT / "examples" / "account.html").read_text()
CONTENT = PAGE.partition("-->")[2]  # after the comment for those who copy the page
SERVICE_IN_PAGE = "http://127.0.0.1:5000"
FOLDER = "MAIL_FOLDER_OF_TEST"
WAIT = 20  # seconds for an email
PASSWORD, NEW_PASSWORD = "correct horse battery", "staple of another stable"
STEP = 30  # seconds for which an authenticator shows a code
MARGIN = 5  # seconds from reading a code until the service has it, at most
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 3, "mobile": True}
EMULATE = "Emulation.setDeviceMetricsOverride"
STOP_EMULATING = "Emulation.clearDeviceMetricsOverride"
DECODER = bool(find_spec("zxingcpp") and find_spec("PIL"))


class Settings(DevelopmentConfig):
    """The settings of development, with the emails in a folder of the test."""

    MAIL_FOLDER: ClassVar[Path | None] = Path(os.environ.get(FOLDER, os.devnull))


def headers() -> dict[str, str]:
    """Return the headers that the comment in the page tells its readers to send."""
    [(policy, referrer)] = re.findall(
        r"Content-Security-Policy: (.*?)\s+Referrer-Policy: (\S+)", PAGE, re.DOTALL
    )
    return {
        "Content-Security-Policy": " ".join(policy.split()),
        "Referrer-Policy": referrer,
        "Content-Type": "text/html; charset=utf-8",
    }


class Authenticator:
    """An authenticator, as an app on a phone."""

    def __init__(self, key: str) -> None:
        """Take the key that the page shows, in groups."""
        self.key = key
        self._totp = pyotp.TOTP(key.replace(" ", ""))
        self._last_step = 0

    def code(self) -> str:
        """Return a code that is valid for MARGIN seconds at least, and another one each time.

        The service accepts the code of the present step and of the one before. So the first two
        codes are there at once, except near the end of a step.
        """
        earliest = int(time.time() + MARGIN) // STEP - 1
        self._last_step = max(earliest, self._last_step + 1)
        while int(time.time()) // STEP < self._last_step:
            time.sleep(0.05)
        return self._totp.generate_otp(self._last_step)

    def wrong_code(self) -> str:
        """Return six digits that are no code of these minutes."""
        present = int(time.time()) // STEP
        near = {self._totp.generate_otp(present + step) for step in range(-2, 3)}
        return next(code for code in map(str, range(100_000, 100_006)) if code not in near)


def scan_qr_codes(screenshot: bytes) -> list[str]:
    """Return the texts of the QR codes in an image."""
    import zxingcpp  # tools for developers
    from PIL import Image

    with Image.open(io.BytesIO(screenshot)) as image:
        return [found.text for found in zxingcpp.read_barcodes(image)]


class Site(ThreadingHTTPServer):
    """A web server with the page at /, and with the URL of the service in it."""

    def __init__(self, service: str) -> None:
        super().__init__(("127.0.0.1", 0), _SiteHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.page = PAGE.replace(SERVICE_IN_PAGE, service).encode()
        self.headers = {
            name: value.replace(SERVICE_IN_PAGE, service) for name, value in headers().items()
        }
        self.log: list[tuple[str, str, str | None]] = []  # method, path and Referer


class _SiteHandler(BaseHTTPRequestHandler):
    server: Site

    def _answer(self) -> None:
        self.server.log.append((self.command, self.path, self.headers["Referer"]))
        found = self.path == "/"
        self.send_response(200 if found else 404)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if found and self.command == "GET":
            self.wfile.write(self.server.page)

    do_GET = do_HEAD = _answer  # noqa: N815  # names of the standard library

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Print nothing."""


class TestHeaders(unittest.TestCase):
    """The headers in the comment of the page."""

    def test_hashes(self) -> None:
        """The policy has the hashes of both scripts and of the style sheet (CSP Level 3, 2.3.1)."""
        policy = headers()["Content-Security-Policy"]
        for kind, number in (("script", 2), ("style", 1)):
            with self.subTest(kind):
                texts = re.findall(rf"<{kind}>(.*?)</{kind}>", CONTENT, re.DOTALL)
                self.assertEqual(number, len(texts))
                digests = [hashlib.sha256(text.encode()).digest() for text in texts]
                hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
                self.assertIn(f"{kind}-src {' '.join(hashes)};", policy)

    def test_library(self) -> None:
        """The library in the page is the file that the comment above it names, unchanged."""
        [(digest, file)] = re.findall(
            r"SHA-256 (\w{64})\..*?=> \{\n(.*?\n) +return", CONTENT, re.DOTALL
        )
        self.assertEqual(digest, hashlib.sha256(file.encode()).hexdigest())


@unittest.skipUnless(browser.INSTALLED, browser.WHY_SKIPPED)
class PageTestCase(unittest.TestCase):
    """A test with a browser, the page, and the service in development."""

    environment: ClassVar[dict[str, str]]  # more settings
    mails: ClassVar[Path]
    port: ClassVar[int]  # of the service
    settings: ClassVar[dict[str, str]]
    site: ClassVar[Site]
    browser: ClassVar[browser.Browser]

    @classmethod
    def setUpClass(cls) -> None:
        """Start the development server, a web server with the page, and a browser."""
        cls.mails = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.port = scratch.free_port()
        cls.site = Site(f"http://127.0.0.1:{cls.port}")
        thread = threading.Thread(target=cls.site.serve_forever, args=(0.01,))
        thread.start()
        for stop in (cls.site.server_close, thread.join, cls.site.shutdown):
            cls.addClassCleanup(stop)
        cls.start_service()
        cls.browser = cls.enterClassContext(browser.Browser())

    @classmethod
    def start_service(cls) -> None:
        """Start the service as a developer does, with the settings that the page needs."""
        cls.settings = {
            "APP_SETTINGS": f"{__name__}.Settings",
            "DATABASE_URL": cls.enterClassContext(scratch.database()),
            "SECRET_KEY": "any",
            "ENCRYPTION_KEYS": "another",
            "PASSWORD_MIN_LENGTH": "12",
            "LINK_BASE_URL": cls.site.url,
            "CORS_ORIGINS": cls.site.url,
            FOLDER: str(cls.mails),
            **cls.environment,
        }
        scratch.manage("db", "upgrade", **cls.settings).check_returncode()
        log = cls.enterClassContext(tempfile.TemporaryFile("w+"))
        server = subprocess.Popen(
            [sys.executable, "manage.py", "runserver", "--port", str(cls.port)],
            cwd=scratch.ROOT,
            env=scratch.settings(**cls.settings),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        cls.addClassCleanup(server.wait, 10)
        cls.addClassCleanup(server.terminate)
        deadline = time.monotonic() + scratch.START_TIMEOUT
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", cls.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        log.seek(0)
        raise RuntimeError(log.read())

    def open(self, url: str) -> None:
        """Open the page, as if in a new tab: another fragment alone would not load it again."""
        self.browser.driver.get("about:blank")
        self.browser.driver.get(url)

    def fill_in(self, form: str, **fields: str) -> None:
        """Write into the fields of a form, and send it."""
        for name, text in fields.items():
            self.browser.write(f"form[name={form}] input[name={name}]", text)
        self.browser.click(f"form[name={form}] button")

    def await_message(self, text: str) -> None:
        """Wait until the page shows a message."""
        self.browser.find("#message", text)

    def await_view(self, title: str) -> None:
        """Wait for a view. Its title has the focus, for users of screen readers."""
        heading = self.browser.find("h1", title)
        self.assertEqual(heading, self.browser.driver.switch_to.active_element)

    def set_up(self) -> Authenticator:
        """Send the password, and return the authenticator whose key is shown then."""
        self.fill_in("totp", current_password=PASSWORD)
        self.await_view("Scan the QR code")
        return Authenticator(self.browser.find("#confirm-key").text)

    def keep_recovery_codes(self, message: str) -> list[str]:
        """Return the recovery codes that are shown after this message, and go on to the account."""
        self.await_view("Keep your recovery codes")
        self.await_message(message)
        codes: list[str] = self.browser.find("#recovery-codes").text.split("\n")
        self.assertEqual(10, len(set(codes)))
        self.fill_in("recovery")
        self.browser.find("#account-totp", "On (recovery codes left: 10)")
        return codes

    def link(self, purpose: str) -> str:
        """Wait for an email with a link for this purpose, and return the link."""
        deadline = time.monotonic() + WAIT
        pattern = rf"{re.escape(self.site.url)}/#/{purpose}\?token=\S+"
        while time.monotonic() < deadline:
            for file in self.mails.glob("*.eml"):
                message = email.message_from_bytes(file.read_bytes(), policy=email.policy.default)
                text = message.get_body(("plain",))
                found = re.search(pattern, text.get_content()) if text else None
                if found:
                    file.unlink()
                    return found[0]
            time.sleep(0.05)
        raise AssertionError(f"there is no email with a link to {purpose}")

    def follow(self, link: str) -> None:
        """Open a link, and see that its token leaves the address bar."""
        self.open(link)
        self.browser.find("h1")
        self.assertEqual(link.partition("?")[0], self.browser.driver.current_url)

    def scan(self, link: str, path: str) -> None:
        """Request a link 100 times by GET and by HEAD, and open it in a browser, but send no form.

        Scanners of emails do this. `path` is that of the service to which the page sends the token.
        """
        token = link.partition("=")[2]
        for port, target in ((self.site.server_port, "/"), (self.port, f"{path}?token={token}")):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
            for _ in range(100):
                for method in ("GET", "HEAD"):
                    connection.request(method, target)
                    connection.getresponse().read()
            connection.close()
        for _ in range(2):
            self.follow(link)

    def request(
        self, method: str, path: str, json: object = None, token: str | None = None
    ) -> dict[str, Any]:
        """Send a request to the service, without the browser; return the JSON of the response."""
        return scratch.request(self.port, method, path, json, token)[1]

    def check_logs(self) -> None:
        """Check that no token reached the site or a storage, and that the page has no errors."""
        stored = "return localStorage.length + sessionStorage.length + document.cookie.length"
        self.assertEqual(0, self.browser.driver.execute_script(stored))
        self.assertEqual(set(), {entry[1:] for entry in self.site.log} - {("/", None)})
        complaints = self.browser.driver.get_log("browser")
        errors = [line for line in complaints if line["level"] == "SEVERE"]
        # A refusal of the service is an error of the network.
        self.assertEqual([], [line for line in errors if line["source"] != "network"])


class TestAccountPage(PageTestCase):
    """Users register, confirm, recover and change their accounts with links from emails."""

    environment: ClassVar[dict[str, str]] = {
        "EMAIL_VERIFICATION": "required",
        "STEP_UP_SECONDS": "0",
    }

    def test_walk(self) -> None:
        """A user registers, confirms, logs in and out, and sets a new password.

        The old password is refused then, and the links work once. Scanners of emails that open a
        link do not use it up.
        """
        ada = {"email": "ada@example.com", "password": PASSWORD}
        self.open(f"{self.site.url}/#/register")
        self.fill_in("register", username="ada", email=ada["email"], password="short")
        self.await_message("Invalid payload.")
        self.browser.find("#register-password-error", "12 characters")
        self.fill_in("register", password=PASSWORD)
        self.await_message("Please confirm your email address.")
        verify = self.link("verify")

        self.fill_in("login", **ada)
        self.browser.find("form[name=verification]")
        self.browser.click("form[name=verification] button")
        self.await_message("an email is on its way")
        again = self.link("verify")

        self.scan(verify, "/auth/verify")
        self.fill_in("verify")
        self.await_message("Email confirmed.")
        self.follow(again)
        self.fill_in("verify")
        self.await_message("This link is no longer valid.")

        self.open(self.site.url)
        self.fill_in("login", **ada)
        self.await_message("Successfully logged in.")
        self.browser.find("#account-email", ada["email"])
        self.browser.find("#account-username", "ada")
        self.fill_in("logout")
        self.await_message("Successfully logged out.")

        session = self.request("POST", "/auth/login", ada)["auth_token"]
        self.browser.click("a", "Forgot your password?")
        self.fill_in("forgot", email=ada["email"])
        self.await_message("an email is on its way")
        reset = self.link("reset")
        self.scan(reset, "/auth/password/reset")
        self.fill_in("reset", new_password="short")
        self.browser.find("#reset-password-error", "12 characters")
        self.fill_in("reset", new_password=NEW_PASSWORD)
        self.await_message("Password changed. Please log in.")
        self.assertEqual(
            "session_ended", self.request("GET", "/auth/status", token=session)["code"]
        )

        self.fill_in("login", **ada)
        self.await_message("User does not exist")
        self.fill_in("login", email=ada["email"], password=NEW_PASSWORD)
        self.browser.find("#account-email", ada["email"])
        self.follow(reset)
        self.fill_in("reset", new_password=PASSWORD)
        self.await_message("This link is no longer valid.")
        self.check_logs()

    def test_invitation_and_change(self) -> None:
        """An invited user sets a name and a password, and confirms a change of the email."""
        admin = {"email": "root@example.com", "password": PASSWORD}
        added = scratch.manage(
            "create_admin", "root", admin["email"], stdin=PASSWORD, **self.settings
        )
        self.assertEqual(0, added.returncode, added.stderr)
        token = self.request("POST", "/auth/login", admin)["auth_token"]
        self.request("POST", "/users/invitations", {"email": "bob@example.com"}, token)
        self.follow(self.link("invitation"))
        self.fill_in("invitation", password=PASSWORD)
        self.browser.find("#invitation-username-error", "is required")
        self.fill_in("invitation", username="root")
        self.browser.find("#invitation-username-error", "is taken")
        self.fill_in("invitation", username="bob")
        self.await_message("Successfully registered.")
        self.browser.find("#account-email", "bob@example.com")

        bob = {"email": "bob@example.com", "password": PASSWORD}
        token = self.request("POST", "/auth/login", bob)["auth_token"]
        change = {"email": "new@example.com", "current_password": PASSWORD}
        self.request("POST", "/auth/email", change, token)
        self.follow(self.link("email"))
        self.fill_in("email")
        self.await_message("Email changed.")
        self.fill_in("login", email="new@example.com", password=PASSWORD)
        self.browser.find("#account-email", "new@example.com")
        self.check_logs()

    def test_without_token(self) -> None:
        """A reload forgets the token of a link, and the page says so."""
        self.follow(f"{self.site.url}/#/reset?token=any")
        self.browser.find("form[name=reset]")
        self.browser.driver.refresh()
        self.await_message("Please open the link in the email again.")
        self.assertFalse(self.browser.driver.find_element("name", "reset").is_displayed())
        self.check_logs()

    def test_second_factor(self) -> None:
        """A user sets an authenticator up, needs a code to log in, and turns it off again.

        A code is one from the authenticator or a recovery code.
        """
        eve = {"email": "eve@example.com", "password": PASSWORD}
        self.open(f"{self.site.url}/#/register")
        self.fill_in("register", username="eve", **eve)
        self.await_message("Please confirm your email address.")
        self.request("POST", "/auth/verify", {"token": self.link("verify").partition("=")[2]})
        self.fill_in("login", **eve)
        self.browser.find("#account-totp", "Off")

        self.browser.click("a", "Set up an authenticator")
        self.await_view("Set up an authenticator")
        self.fill_in("totp", current_password=NEW_PASSWORD)
        self.await_message("Current password is wrong.")
        authenticator = self.set_up()
        self.fill_in("confirm", code=authenticator.wrong_code())
        self.await_message("The code is wrong.")
        self.fill_in("confirm", code=authenticator.code())
        first_codes = self.keep_recovery_codes("Authenticator turned on.")
        self.fill_in("logout")

        self.fill_in("login", **eve)
        self.await_view("Enter a code")
        self.await_message("Please enter the code from your authenticator.")
        self.fill_in("mfa", code="12345")
        self.browser.find("#mfa-code-error", "must be 6 digits, or a recovery code")
        self.fill_in("mfa", code=authenticator.wrong_code())
        self.await_message("The code is wrong.")
        self.browser.click("a", "Back to the login")
        self.await_view("Log in")
        self.fill_in("login", **eve)
        self.fill_in("mfa", code=authenticator.code())
        self.await_message("Successfully logged in.")
        self.browser.find("#account-totp", "On (recovery codes left: 10)")
        self.fill_in("logout")

        self.fill_in("login", **eve)
        self.fill_in("mfa", code=first_codes[0].replace("-", " ").lower())
        self.browser.find("#account-totp", "On (recovery codes left: 9)")
        self.browser.click("a", "Make new recovery codes")
        self.fill_in("renewal", current_password=PASSWORD)
        self.await_message("Please enter the code from your authenticator.")
        self.fill_in("renewal", code=first_codes[1])
        second_codes = self.keep_recovery_codes("Recovery codes replaced.")
        self.assertFalse(set(first_codes) & set(second_codes))

        self.browser.click("a", "Turn off the authenticator")
        self.fill_in("removal", current_password=PASSWORD, code=first_codes[2])
        self.await_message("The code is wrong.")
        self.fill_in("removal", code=second_codes[0])
        self.await_message("Authenticator turned off.")
        self.browser.find("#account-totp", "Off")
        self.fill_in("logout")
        self.fill_in("login", **eve)
        self.browser.find("#account-totp", "Off")
        self.check_logs()


class TestRequiredAuthenticator(PageTestCase):
    """The operator requires an authenticator of all users."""

    environment: ClassVar[dict[str, str]] = {"REQUIRE_MFA": "all"}

    def register(self, name: str) -> None:
        """Register a user."""
        self.open(f"{self.site.url}/#/register")
        self.fill_in("register", username=name, email=f"{name}@example.com", password=PASSWORD)

    def test_enrolment(self) -> None:
        """Users without an authenticator are led to set one up, whenever they have none.

        A session that has just given a code needs no other one.
        """
        self.register("ada")
        self.await_message("Please set up an authenticator first.")
        authenticator = self.set_up()
        self.fill_in("confirm", code=authenticator.code())
        codes = self.keep_recovery_codes("Authenticator turned on.")
        self.browser.find("#account-username", "ada")
        self.browser.click("a", "Make new recovery codes")
        self.fill_in("renewal", current_password=PASSWORD)
        self.assertNotEqual(codes, self.keep_recovery_codes("Recovery codes replaced."))
        self.browser.click("a", "Turn off the authenticator")
        self.fill_in("removal", current_password=PASSWORD)
        self.await_message("Please set up an authenticator first.")
        self.await_view("Set up an authenticator")
        self.fill_in("logout")
        self.await_message("Successfully logged out.")
        self.fill_in("login", email="ada@example.com", password=PASSWORD)
        self.await_view("Set up an authenticator")
        self.check_logs()

    @unittest.skipUnless(DECODER, "needs zxing-cpp and pillow")
    def test_qr_code(self) -> None:
        """Another program reads the key that is shown from the QR code, also on a phone."""
        self.register("bob")
        authenticator = self.set_up()
        driver = self.browser.driver
        self.check_qr_code(authenticator, "bob@example.com")
        self.addCleanup(driver.execute_cdp_cmd, STOP_EMULATING, {})
        driver.execute_cdp_cmd(EMULATE, PHONE)
        self.check_qr_code(authenticator, "bob@example.com")
        width = driver.execute_script("return document.documentElement.scrollWidth")
        self.assertEqual(PHONE["width"], width)

    def check_qr_code(self, authenticator: Authenticator, account: str) -> None:
        """Check what the QR code on the screen says."""
        [uri] = scan_qr_codes(self.browser.driver.get_screenshot_as_png())
        read = pyotp.parse_uri(uri)
        self.assertEqual(authenticator.key.replace(" ", ""), read.secret)
        self.assertEqual(account, read.name)

    def test_shown_once(self) -> None:
        """The key and the recovery codes leave the page with their views, and do not come back."""
        self.register("eve")
        authenticator = self.set_up()
        self.fill_in("confirm", code=authenticator.code())
        codes = self.keep_recovery_codes("Authenticator turned on.")
        self.browser.click("a", "Make new recovery codes")
        self.await_view("Make new recovery codes")
        self.browser.driver.execute_script("history.go(-2)")  # to the recovery codes
        self.await_view("Your account")
        for secret in (authenticator.key, *codes):
            self.assertNotIn(secret, self.browser.driver.page_source)
        width = "return document.querySelector('#confirm-qr').width"
        self.assertEqual(0, self.browser.driver.execute_script(width))
        self.check_logs()

    def test_second_step_is_late(self) -> None:
        """A login whose first step is no longer valid begins again."""
        fay = {"email": "fay@example.com", "password": PASSWORD}
        token = self.request("POST", "/auth/register", {"username": "fay", **fay})["auth_token"]
        password = {"current_password": PASSWORD}
        key = self.request("POST", "/auth/totp", password, token)["data"]["secret"]
        code = {"code": Authenticator(key).code()}
        self.request("POST", "/auth/totp/confirm", code, token)
        self.open(self.site.url)
        self.fill_in("login", **fay)
        self.await_view("Enter a code")
        change = {**password, "new_password": NEW_PASSWORD}
        self.request("POST", "/auth/password", change, token)
        self.fill_in("mfa", **code)
        self.await_message("Invalid token. Please log in again.")
        self.await_view("Log in")
        self.check_logs()
