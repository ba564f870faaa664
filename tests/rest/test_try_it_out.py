"""Swagger UI in a real browser: with a token, a developer can try every operation."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.wait import WebDriverWait

from tests.actors import Actor
from tests.timeouts import WAIT_TIMEOUT_SECONDS


class Browser:
    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver
        self._wait = WebDriverWait(driver, WAIT_TIMEOUT_SECONDS)

    def open(self, address: str) -> None:
        self._driver.get(address)

    def click(self, where: str) -> None:
        element = self.find(where)
        self._driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        self._wait.until(expected_conditions.element_to_be_clickable(element)).click()

    def type(self, where: str, text: str) -> None:
        self.find(where).send_keys(text)

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def width_of_page(self) -> int:
        return int(self._driver.execute_script("return document.documentElement.scrollWidth"))

    def until(self, where: str, *texts: str) -> None:
        """Wait until the elements have exactly these texts."""
        wait = WebDriverWait(self._driver, WAIT_TIMEOUT_SECONDS, ignored_exceptions=[StaleElementReferenceException])
        wait.until(lambda _: self._texts(where) == list(texts), f"{texts} in {where}")

    def _texts(self, where: str) -> list[str]:
        return [element.text for element in self._driver.find_elements(By.CSS_SELECTOR, where)]

    def count(self, where: str) -> int:
        return len(self._driver.find_elements(By.CSS_SELECTOR, where))

    @property
    def address(self) -> str:
        return str(self._driver.current_url)

    def complaints(self) -> list[str]:
        """Return the messages in the browser's console."""
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def find(self, where: str) -> WebElement:
        return self._wait.until(expected_conditions.visibility_of_element_located((By.CSS_SELECTOR, where)))


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        pytest.skip("Chromium is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "window-size=1200,1000"):
        options.add_argument(f"--{flag}")
    for flag in ("background-networking", "component-update", "sync"):
        options.add_argument(f"--disable-{flag}")
    options.add_argument(f"--user-data-dir={tmp_path}")
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as running:
        yield Browser(running)


def try_profile(browser: Browser, base: str, token: str) -> tuple[str, str]:
    """Read the profile as a developer does it; return the status and the body that the page shows."""
    browser.open(f"{base}/api-docs")
    browser.click(".btn.authorize")
    browser.type(".auth-container input", token)
    browser.click(".auth-btn-wrapper .authorize")
    browser.click(".auth-btn-wrapper .btn-done")
    operation = "[id$='-get_api_v1_auth_profile'], [id*='read_profile']"
    browser.click(f":is({operation}) .opblock-summary-control")
    browser.click(f":is({operation}) .try-out__btn")
    browser.click(f":is({operation}) .execute")
    response = f":is({operation}) .live-responses-table .response"
    return browser.find(f"{response} .response-col_status").text, browser.find(f"{response} .microlight").text


async def test_a_developer_tries_an_operation_with_a_token(browser: Browser, alice: Actor) -> None:
    status, body = await asyncio.to_thread(try_profile, browser, alice.base, alice.access_token)
    assert status.startswith("200")
    assert alice.email in body
