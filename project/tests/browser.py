"""A browser for the tests of pages: headless Chromium, driven with Selenium."""

import shutil
from importlib.util import find_spec
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
INSTALLED = bool(CHROMIUM and DRIVER and find_spec("selenium"))
WHY_SKIPPED = "needs chromium, chromedriver and selenium"
WAIT = 20  # seconds for an element to appear
POLL = 0.02  # seconds between two looks


class Browser:
    """A window of a browser, as a context manager; `driver` is Selenium's."""

    def __init__(self) -> None:
        """Start the browser."""
        from selenium import webdriver  # a tool for developers
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.add_argument("--window-size=1280,1600")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver: Any = webdriver.Chrome(options, Service(DRIVER))

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()

    def find(self, selector: str, text: str = "") -> Any:
        """Wait for a visible element with this CSS selector and text, and return it."""
        from selenium.webdriver.support.ui import WebDriverWait

        def seen(driver: Any) -> Any:
            found = driver.find_elements("css selector", selector)
            return next((one for one in found if one.is_displayed() and text in one.text), None)

        wait = WebDriverWait(self.driver, WAIT, POLL)
        return wait.until(seen, f"there is no {selector} {text}")

    def click(self, selector: str, text: str = "") -> None:
        """Scroll to an element and click on it."""
        element = self.find(selector, text)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def write(self, selector: str, text: str) -> None:
        """Replace the content of a field."""
        self.find(selector).send_keys("\ue009a\ue000", text)  # Control and a, and the text
