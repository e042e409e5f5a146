"""What a reader does with a page, and what is asked of it: shared by the tests of both reports."""

from __future__ import annotations

from pathlib import Path

from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

LISTEN = """window.violations = [];
    document.addEventListener('securitypolicyviolation', event => violations.push(event.blockedURI));"""
# Elements with text of their own whose colour stands less than 4.5 to 1 against the nearest painted ancestor.
FAINT_TEXT = """
    const parts = (text) => text.match(/[\\d.]+/g).map(Number);
    const painted = (e) => { const c = parts(getComputedStyle(e).backgroundColor); return c.length < 4 || c[3] > 0; };
    const light = (text) => {
        const [r, g, b] = parts(text).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    for (const e of document.querySelectorAll('main *, header *')) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || e.closest('svg') || !e.getClientRects().length) continue;
        let paper = e;
        while (paper.parentElement && !painted(paper)) paper = paper.parentElement;
        const [a, b] = [light(getComputedStyle(e).color), light(getComputedStyle(paper).backgroundColor)];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) found.push(`${e.className} | ${e.textContent.slice(0, 40)} | ${ratio.toFixed(2)}`);
    }
    return [...new Set(found)];"""


def load(browser: Chrome, page: Path) -> Chrome:
    """Load a page, with an ear on violations of its policy. The log of an earlier page is dropped."""
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": LISTEN})
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    return browser


def find(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def press(browser: Chrome, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()


def jump(browser: Chrome, element: WebElement) -> None:
    """Click an element that may be out of sight."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def panel(browser: Chrome) -> str | None:
    held = find(browser, "#panel")
    return find(browser, "#panel-title").text if held.is_displayed() else None
