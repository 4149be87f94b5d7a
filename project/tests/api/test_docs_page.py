"""The page of the API document, used in a browser."""

import json
import os
import shutil
import unittest
from importlib.util import find_spec
from typing import Any

from project.tests import scratch

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WAIT = 20  # seconds for an element to appear
# Where to save a screenshot at the end of the test, if anywhere.
SCREENSHOT = os.environ.get("SCREENSHOT", "")


@unittest.skipUnless(
    CHROMIUM and DRIVER and find_spec("selenium"), "needs chromium, chromedriver and selenium"
)
class TestDocsPage(unittest.TestCase):
    """A user logs in, authorizes the page and requests their status."""

    def setUp(self) -> None:
        """Start a server, register a user, and open the page."""
        url = self.enterContext(scratch.database())
        self.service = self.enterContext(scratch.Service(url, API_DOCS="1"))
        self.assertEqual(201, self.service.register("ada")[0])
        self.browser = self.open_browser()
        self.addCleanup(self.browser.quit)
        self.browser.get(f"http://127.0.0.1:{self.service.port}/docs")

    def open_browser(self) -> Any:
        """Return a headless browser."""
        from selenium import webdriver  # a tool for developers
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.add_argument("--window-size=1280,1600")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        return webdriver.Chrome(options, Service(DRIVER))

    def find(self, selector: str) -> Any:
        """Wait for the element with this CSS selector to be visible, and return it."""
        from selenium.webdriver.support.ui import WebDriverWait

        def seen(browser: Any) -> Any:
            found = browser.find_elements("css selector", selector)
            return next((element for element in found if element.is_displayed()), None)

        return WebDriverWait(self.browser, WAIT).until(seen, f"there is no {selector}")

    def click(self, selector: str) -> None:
        """Scroll to an element and click on it."""
        element = self.find(selector)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def write(self, selector: str, text: str) -> None:
        """Replace the content of a field."""
        field = self.find(selector)
        field.send_keys("\ue009a\ue000")  # Control and a
        field.send_keys(text)

    def execute(self, operation: str, body: object = None) -> tuple[str, Any]:
        """Execute an operation, and return the status and the JSON that the page shows."""
        block = f"#operations-{operation}"
        self.click(f"{block} .opblock-summary-control")
        if body is not None:
            self.write(f"{block} .body-param__text", json.dumps(body))
        self.click(f"{block} .execute")
        answer = f"{block} .live-responses-table tr.response"
        status = self.find(f"{answer} .response-col_status").text
        shown = self.find(f"{answer} .response-col_description .highlight-code").text
        text = shown[shown.index("{") : shown.rindex("}") + 1]
        return status.split()[0], json.loads(text)

    def test_login_and_status(self) -> None:
        """The page works, and the browser reports no error."""
        credentials = {"email": "ada@test.com", "password": "test"}
        status, logged_in = self.execute("auth-login_user", credentials)
        self.assertEqual("200", status)

        refused, _ = self.execute("auth-get_user_status")
        self.assertEqual("401", refused)

        self.click(".scheme-container .authorize")
        self.write("#auth-bearer-value", logged_in["auth_token"])
        self.click(".auth-btn-wrapper .authorize")
        self.click(".auth-btn-wrapper .btn-done")
        self.click("#operations-auth-get_user_status .opblock-summary-control")
        status, answer = self.execute("auth-get_user_status")
        if SCREENSHOT:
            self.browser.save_screenshot(SCREENSHOT)
        self.assertEqual(("200", "ada@test.com"), (status, answer["data"]["email"]))
        complaints = [
            line
            for line in self.browser.get_log("browser")
            if line["level"] == "SEVERE" and "401" not in line["message"]
        ]
        self.assertEqual([], complaints)
