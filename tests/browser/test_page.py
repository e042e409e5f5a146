"""The page in a real browser: what a reader does with it, and what a hostile name cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

from spectra.report import write_report
from tests.browser.reader import FAINT_TEXT, find, jump, load, panel, press
from tests.report.planted import HOSTILE, planted_run

KEY = "encoder.layer.0.attention.self.key.weight"


@pytest.fixture
def opened(browser: Chrome, page: Path) -> Chrome:
    """The page, freshly loaded."""
    return load(browser, page)


def rows(browser: Chrome) -> list[str]:
    """Names of the rows that are shown, in their order."""
    script = """const names = JSON.parse(document.getElementById('data').textContent).rows.map(row => row.name);
        return [...document.querySelectorAll('#table tbody tr')].filter(row => !row.hidden)
            .map(row => names[row.dataset.row]);"""
    return list(browser.execute_script(script))


def column(browser: Chrome, place: int) -> list[str]:
    script = """return [...document.querySelectorAll('#table tbody tr')].filter(row => !row.hidden)
        .map(row => row.cells[arguments[0]].textContent);"""
    return list(browser.execute_script(script, place))


def test_it_loads_without_an_error_or_a_request(opened: Chrome, page: Path) -> None:
    jump(opened, find(opened, ".cell"))
    assert [e for e in opened.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert opened.execute_script("return window.violations") == []
    messages = [json.loads(e["message"])["message"] for e in opened.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url for url in urls if not url.startswith("data:")} <= {page.as_uri()}


def test_the_policy_is_alive(opened: Chrome) -> None:
    """An injected script and an injected style are refused: what an unescaped name would come to."""
    opened.execute_script(
        """const script = document.createElement('script'); script.textContent = 'window.pwned = 1';
        document.body.append(script);
        document.body.insertAdjacentHTML('beforeend', '<img src="x" onerror="window.pwned=1">');
        document.body.insertAdjacentHTML('beforeend', '<p id="styled" style="color: red">');"""
    )
    opened.execute_async_script("setTimeout(arguments[0], 100)")
    assert opened.execute_script("return window.pwned") is None
    assert len(opened.execute_script("return window.violations")) >= 3


def test_hostile_names_are_inert_and_readable(opened: Chrome) -> None:
    shown = rows(opened)
    for name in HOSTILE:
        if name.isprintable() and "\\" not in name:
            assert name in shown
    search = find(opened, "#filter")
    for name in ("window.pwned", "javascript:", "\\u202e", "\\x07", "xxxxxxxxxx"):
        search.clear()
        search.send_keys(name)
        for button in opened.find_elements(By.CSS_SELECTOR, "tr:not([hidden]) .open"):
            jump(opened, button)
            assert panel(opened) is not None
            press(opened, Keys.ESCAPE)
    for cell in opened.find_elements(By.CSS_SELECTOR, "#map-relative_change .cell")[-9:]:
        opened.execute_script("arguments[0].click()", cell)
    assert opened.execute_script("return window.pwned") is None
    assert opened.execute_script("return window.violations") == []
    assert opened.execute_script("return document.querySelectorAll('img').length") == 0


def test_a_long_name_does_not_widen_the_page(opened: Chrome) -> None:
    assert opened.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    find(opened, "#filter").send_keys("xxxxxxxx")
    jump(opened, find(opened, "tr:not([hidden]) .open"))
    assert len(panel(opened) or "") == 10_000
    assert find(opened, "#panel").size["width"] <= 1280
    assert opened.execute_script("return panel.scrollWidth <= panel.clientWidth")


def test_sorting(opened: Chrome) -> None:
    header = find(opened, "[data-key='relative_frobenius']")
    before = column(opened, 0)
    jump(opened, header)
    cell = header.find_element(By.XPATH, "./..")
    assert cell.get_attribute("aria-sort") == "descending"
    numbers = [float(text.split("\u00a0")[0]) for text in column(opened, 4) if text]
    assert numbers == sorted(numbers, reverse=True)
    assert column(opened, 4)[-1] == "", "what has no number stands last"
    header.click()
    assert cell.get_attribute("aria-sort") == "ascending"
    numbers = [float(text.split("\u00a0")[0]) for text in column(opened, 4) if text]
    assert numbers == sorted(numbers)
    assert column(opened, 4)[-1] == ""
    assert sorted(before) == sorted(column(opened, 0)), "no row is lost"


def test_sorting_by_name_with_the_keyboard(opened: Chrome) -> None:
    header = find(opened, "[data-key='name']")
    opened.execute_script("arguments[0].focus()", header)
    press(opened, Keys.ENTER)
    # The browser orders strings by UTF-16 units.
    assert rows(opened) == sorted(rows(opened), key=lambda name: name.encode("utf-16-be", "surrogatepass"))


def test_filtering(opened: Chrome) -> None:
    whole = len(rows(opened))
    search = find(opened, "#filter")
    search.send_keys("layer.3 QUERY")
    assert rows(opened) == [f"encoder.layer.3.attention.self.query.{kind}" for kind in ("weight", "bias")]
    assert find(opened, "#count").text == f"2 of {whole} tensors"
    find(opened, "#status option[value='vector']").click()
    assert rows(opened) == ["encoder.layer.3.attention.self.query.bias"]
    search.send_keys("nothing is called this")
    assert rows(opened) == []
    assert find(opened, "#nothing").is_displayed()
    find(opened, "#reset").click()
    assert len(rows(opened)) == whole
    assert not find(opened, "#reset").is_displayed()


def test_a_flag_shows_its_rows(opened: Chrome) -> None:
    jump(opened, find(opened, ".flags .alarm:nth-child(2) .show"))
    assert rows(opened) == [KEY]


def test_a_row_opens_by_mouse_and_by_keyboard(opened: Chrome) -> None:
    row = find(opened, "#table tbody tr:nth-child(3)")
    jump(opened, row.find_element(By.CSS_SELECTOR, "td.shape"))
    assert panel(opened) == "encoder.layer.0.attention.self.query.weight"
    press(opened, Keys.ESCAPE)
    assert panel(opened) is None
    assert opened.switch_to.active_element.text == "encoder.layer.0.attention.self.query.weight", "focus comes back"
    press(opened, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER)
    assert panel(opened) == KEY
    assert opened.switch_to.active_element.get_attribute("id") == "panel"
    press(opened, Keys.ARROW_RIGHT)
    assert panel(opened) == "encoder.layer.0.attention.self.key.bias"
    press(opened, Keys.ARROW_LEFT)
    assert panel(opened) == KEY
    find(opened, "#close").click()
    assert panel(opened) is None


def test_the_panel_says_everything_about_its_matrix(opened: Chrome) -> None:
    find(opened, "#filter").send_keys(KEY)
    jump(opened, find(opened, "tr:not([hidden]) .open"))
    text = find(opened, "#panel").text
    assert "Mostly storage rounding" in text
    assert "All 384 singular values were computed" in text
    assert "directions above the floor" in text
    assert "14 of 384" in text
    plots = opened.find_elements(By.CSS_SELECTOR, "#panel svg.plot")
    assert len(plots) == 2
    assert "storage rounding floor" in plots[0].text
    assert "Marchenko–Pastur edge" in plots[0].text
    assert "r = 8: " in plots[1].text
    numbers = opened.execute_script(
        """return [...document.querySelectorAll('#panel svg [d], #panel svg [x], #panel svg [cx]')]
            .filter(e => /NaN|Infinity|undefined/.test(e.outerHTML)).length"""
    )
    assert numbers == 0


def test_the_panel_shows_what_the_criteria_advise(opened: Chrome) -> None:
    find(opened, "#filter").send_keys(KEY)
    jump(opened, find(opened, "tr:not([hidden]) .open"))
    assert "may be rounding" in find(opened, "#advice .certificate").text
    lines = opened.find_elements(By.CSS_SELECTOR, "#advice tr")
    labels = [line.find_element(By.CSS_SELECTOR, "th").text for line in lines]
    assert len(labels) == 10
    assert "above the storage floor" in labels
    places = {
        label: float(line.find_element(By.CSS_SELECTOR, "circle").get_attribute("cx") or "nan")
        for label, line in zip(labels, lines, strict=True)
    }
    assert places["above the storage floor"] < places["90 % of the energy"], "fewer directions lie further left"
    find(opened, "#filter").clear()
    find(opened, "#filter").send_keys("word_embeddings")
    jump(opened, find(opened, "tr:not([hidden]) .open"))
    assert opened.find_elements(By.CSS_SELECTOR, "#advice .reach"), "a truncated spectrum's advice is a band"


def test_the_budgets_stand_in_tables(opened: Chrome) -> None:
    ranks = [cell.text for cell in opened.find_elements(By.CSS_SELECTOR, "#budgets-table tbody th")]
    assert ranks == ["1", "2", "4", "8", "16", "32", "64"]
    assert len(opened.find_elements(By.CSS_SELECTOR, "#shares-table tbody tr")) == 4
    assert "or more" in find(opened, "#shares-table").text
    jump(opened, find(opened, "nav a[href='#directions']"))
    assert opened.execute_script("return location.hash") == "#directions"


def test_a_truncated_spectrum_shows_its_band(opened: Chrome) -> None:
    find(opened, "#filter").send_keys("word_embeddings")
    jump(opened, find(opened, "tr:not([hidden]) .open"))
    assert len(opened.find_elements(By.CSS_SELECTOR, "#panel .band")) == 2
    text = find(opened, "#panel").text
    assert "leading 64 of 384" in text
    assert "–" in text


def test_the_axis_can_be_linear(opened: Chrome) -> None:
    jump(opened, find(opened, "#map-effective_rank .cell"))
    before = find(opened, "#panel .line").get_attribute("d")
    find(opened, "#scale").click()
    assert find(opened, "#panel .line").get_attribute("d") != before
    assert find(opened, "#scale").text == "logarithmic index"


def test_a_pointer_reads_the_curve(opened: Chrome) -> None:
    jump(opened, find(opened, "#map-effective_rank .cell"))
    ActionChains(opened).move_to_element(find(opened, "#panel svg.plot")).perform()
    assert find(opened, "#panel .reading").text.startswith("σ")


def test_a_cell_opens_its_matrix_by_mouse_and_keyboard(opened: Chrome) -> None:
    cell = find(opened, "#map-relative_change [aria-label^='attention.self.key, layer 0']")
    jump(opened, cell)
    assert panel(opened) == KEY
    press(opened, Keys.ESCAPE)
    assert opened.switch_to.active_element == cell
    press(opened, Keys.TAB, Keys.ENTER)
    assert panel(opened) == "encoder.layer.1.attention.self.key.weight"


def test_every_row_opens(opened: Chrome) -> None:
    """Every status, with or without a spectrum; a failure would stand in the log."""
    opened.execute_script("document.querySelectorAll('#table .open').forEach(button => button.click())")
    assert panel(opened) is not None
    assert [e for e in opened.get_log("browser") if e["level"] == "SEVERE"] == []


def test_the_theme_is_kept_in_memory_alone(opened: Chrome, page: Path) -> None:
    def paper() -> Any:
        return opened.execute_script("return getComputedStyle(document.documentElement).backgroundColor")

    light = paper()
    toggle = find(opened, "#theme")
    assert toggle.text == "Dark"
    toggle.click()
    assert paper() != light
    assert toggle.text == "Light"
    toggle.click()
    assert paper() == light
    toggle.click()
    assert opened.execute_script("return document.cookie") == ""
    opened.get(page.as_uri())
    assert paper() == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_paper(opened: Chrome, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for text, in both themes, flags and chips included."""
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    try:
        assert opened.execute_script(FAINT_TEXT) == []
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_phone_scrolls_only_downwards(opened: Chrome) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 390
        opened.execute_script("document.querySelector('.cell').click()")
        assert opened.execute_script("return panel.getBoundingClientRect().width") <= 390
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_paper_shows_all_rows_and_no_controls(opened: Chrome) -> None:
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not find(opened, ".tools").is_displayed()
        assert not find(opened, "nav").is_displayed()
        assert find(opened, "#reading").is_displayed()
        assert find(opened, "#table tbody tr:last-child").is_displayed()
        assert (
            opened.execute_script("return getComputedStyle(document.querySelector('#table th')).position") == "static"
        )
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_tab_reaches_what_can_be_pressed(opened: Chrome) -> None:
    press(opened, Keys.TAB)
    assert opened.switch_to.active_element.get_attribute("class") == "skip"
    outline = "const s = getComputedStyle(document.activeElement); return s.outlineStyle + ' ' + s.outlineWidth"
    assert opened.execute_script(outline) == "solid 2px"
    press(opened, Keys.TAB)
    assert opened.switch_to.active_element.text == "Maps"


def test_a_deep_model_fits_the_page(browser: Chrome, tmp_path: Path) -> None:
    """Eighty layers: the maps scroll inside their frame, and the page does not widen."""
    browser.get(write_report(planted_run(layers=80), tmp_path)[0].as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    jump(browser, find(browser, "#map-effective_rank [aria-label^='output.dense, layer 79']"))
    assert panel(browser) == "encoder.layer.79.output.dense.weight"
