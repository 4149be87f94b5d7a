"""The page of the API document, used in a browser."""

import json
import os
import unittest
from typing import Any

from project.tests import browser, scratch

# Where to save a screenshot at the end of the test, if anywhere.
SCREENSHOT = os.environ.get("SCREENSHOT", "")


@unittest.skipUnless(browser.INSTALLED, browser.WHY_SKIPPED)
class TestDocsPage(unittest.TestCase):
    """A user logs in, authorizes the page and requests their status."""

    def setUp(self) -> None:
        """Start a server, register a user, and open the page."""
        url = self.enterContext(scratch.database())
        self.service = self.enterContext(scratch.Service(url, API_DOCS="1"))
        self.assertEqual(201, self.service.register("ada")[0])
        self.browser = self.enterContext(browser.Browser())
        self.url = f"http://127.0.0.1:{self.service.port}/docs"
        self.browser.driver.get(self.url)

    def execute(self, operation: str, body: object = None) -> tuple[str, Any]:
        """Execute an operation, and return the status and the JSON that the page shows."""
        block = f"#operations-{operation}"
        self.browser.click(f"{block} .opblock-summary-control")
        if body is not None:
            self.browser.write(f"{block} .body-param__text", json.dumps(body))
        self.browser.click(f"{block} .execute")
        answer = f"{block} .live-responses-table tr.response"
        status = self.browser.find(f"{answer} .response-col_status").text
        shown = self.browser.find(f"{answer} .response-col_description .highlight-code").text
        text = shown[shown.index("{") : shown.rindex("}") + 1]
        return status.split()[0], json.loads(text)

    def test_login_and_status(self) -> None:
        """The page works, and the browser reports no error."""
        credentials = {"email": "ada@test.com", "password": "test"}
        status, logged_in = self.execute("auth-login_user", credentials)
        self.assertEqual("200", status)

        refused, _ = self.execute("auth-get_user_status")
        self.assertEqual("401", refused)

        self.browser.click(".scheme-container .authorize")
        self.browser.write("#auth-bearer-value", logged_in["auth_token"])
        self.browser.click(".auth-btn-wrapper .authorize")
        self.browser.click(".auth-btn-wrapper .btn-done")
        self.browser.click("#operations-auth-get_user_status .opblock-summary-control")
        status, answer = self.execute("auth-get_user_status")
        if SCREENSHOT:
            self.browser.driver.save_screenshot(SCREENSHOT)
        self.assertEqual(("200", "ada@test.com"), (status, answer["data"]["email"]))

        # The authorization lasts as long as the tab: over a reload, and in no other tab.
        self.browser.driver.get(self.url)
        status, _ = self.execute("auth-get_user_status")
        self.assertEqual("200", status)
        self.assertEqual(0, self.browser.driver.execute_script("return localStorage.length"))
        self.browser.driver.switch_to.new_window("tab")
        self.browser.driver.get(f"{self.url}/")
        status, _ = self.execute("auth-get_user_status")
        self.assertEqual("401", status)
        complaints = [
            line
            for line in self.browser.driver.get_log("browser")
            if line["level"] == "SEVERE" and "401" not in line["message"]
        ]
        self.assertEqual([], complaints)
