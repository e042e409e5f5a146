"""One headless Chromium for the folder, with its log, and reports to open in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from spectra.report import write_report
from tests.report.planted import planted_run

QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--force-prefers-reduced-motion", "--disable-background-networking", "--disable-component-update",
    "--window-size=1280,900",
)  # fmt: skip


def _found(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A Chromium of its own profile. Where CI is set its absence is a failure, elsewhere a reason to skip."""
    binary, driver = _found("chromium", "chromium-browser", "google-chrome"), _found("chromedriver")
    if binary is None or driver is None:
        message = "no chromium and chromedriver on PATH: install them (Debian: chromium chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    held = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield held
    finally:
        held.quit()


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on the planted run with hostile names."""
    return write_report(planted_run(hostile=True), tmp_path_factory.mktemp("report"))[0]
