"""The page on two updates in a real browser: what a reader does with it, and what a hostile name cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

from spectra.report.pairs import write_report
from tests.browser.reader import FAINT_TEXT, find, jump, load, panel, press
from tests.report.planted_pairs import geometry_of, planted_geometry

QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on two planted updates, one of them beyond its resolution at high ranks."""
    return write_report(planted_geometry(), tmp_path_factory.mktemp("two"))[0]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on three planted updates with hostile names."""
    return write_report(planted_geometry(updates=3, hostile=True), tmp_path_factory.mktemp("several"))[0]


@pytest.fixture
def pair(browser: Chrome, two: Path) -> Chrome:
    return load(browser, two)


@pytest.fixture
def trio(browser: Chrome, several: Path) -> Chrome:
    return load(browser, several)


def column(browser: Chrome, place: int) -> list[str]:
    script = "return [...document.querySelectorAll('#table tbody tr')].map(row => row.cells[arguments[0]].textContent)"
    return list(browser.execute_script(script, place))


def errors(browser: Chrome) -> list[str]:
    return [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


def test_it_loads_without_an_error_or_a_request(trio: Chrome, several: Path) -> None:
    jump(trio, find(trio, ".cell"))
    assert errors(trio) == []
    assert trio.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert trio.execute_script("return window.violations") == []
    messages = [json.loads(e["message"])["message"] for e in trio.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url for url in urls if not url.startswith("data:")} <= {several.as_uri()}


def test_hostile_names_are_inert(trio: Chrome) -> None:
    trio.execute_script("document.querySelectorAll('#table .open').forEach(button => button.click())")
    for key in ("0-2", "1-2"):
        trio.execute_script(f"document.querySelector('[data-choose=\"{key}\"]').click()")
    assert trio.execute_script("return window.pwned") is None
    assert trio.execute_script("return window.violations") == []
    assert trio.execute_script("return document.querySelectorAll('img').length") == 0
    assert errors(trio) == []


def test_hostile_text_of_every_kind_is_inert(browser: Chrome, tmp_path: Path) -> None:
    """Names of updates, base and roles, dtypes, reasons, notes and transforms: all from files that a stranger made."""
    evil = "\u202e</script><img src=x onerror=window.pwned=1><svg onload=window.pwned=1>$\\frac\x1b[2J"
    labels = (evil, f"{evil}2", f"_{evil}")
    rows = json.loads(json.dumps(planted_geometry(updates=3).records))
    for row in rows:
        row |= {"role": row["role"] + evil, "reason": evil, "dtype_base": evil}
        for update in row["updates"]:
            update["dtype"] = evil
    lost = {"kind": "none", "status": "nonfinite", "reason": evil}
    rows[0] = rows[0] | {"updates": [*rows[0]["updates"][:2], lost], "pairs": rows[0]["pairs"][:1]}
    geometry = geometry_of(*rows, labels=labels, notes=[evil])
    matching = {"matched": 1, "total": 2, "share": 0.5, "transforms": [evil]}
    for side in (geometry.info["base"], *geometry.info["updates"]):
        side |= {"ref": evil, "revision": evil, "notes": [evil], "matching": matching}
        side["digests"] = [each | {"name": evil} for each in side["digests"]]
    page = write_report(geometry, tmp_path)[0]
    load(browser, page)
    browser.execute_script("document.querySelectorAll('#table .open').forEach(button => button.click())")
    for key in ("0-1", "0-2", "1-2"):
        browser.execute_script(f"document.querySelector('[data-choose=\"{key}\"]').click()")
        browser.execute_script(f"document.querySelector('#map-cosine-{key} .cell').click()")
        browser.execute_script("document.getElementById('turn').click(); document.getElementById('chance').click()")
    assert browser.execute_script("return window.pwned") is None
    assert browser.execute_script("return window.violations") == []
    assert errors(browser) == []
    assert browser.execute_script("return document.querySelectorAll('img, [onload], [onerror]').length") == 0
    for file in (page, *page.parent.rglob("*.svg"), page.parent / "summary.json", page.parent / "manifest.json"):
        assert not set("\u202e\x1b") & set(file.read_text()), file.name
    whole = browser.execute_script("return document.documentElement.outerHTML")
    assert not set("\u202e\x1b") & set(whole)
    assert "\\u202e" in whole, "shown, where it is"


def test_an_update_that_failed_alone_says_so_in_the_panel(browser: Chrome, tmp_path: Path) -> None:
    rows = list(planted_geometry(updates=3).records)
    at = next(i for i, row in enumerate(rows) if row["status"] == "ok")
    lost = {"kind": "none", "status": "nonfinite", "reason": "lora: 1 NaN"}
    kept = {"reason": "lora: 1 NaN", "pairs": rows[at]["pairs"][1:2]}
    rows[at] = rows[at] | kept | {"updates": [rows[at]["updates"][0], lost, rows[at]["updates"][2]]}
    geometry = geometry_of(*rows, labels=("full", "lora", "lora-seed-1"))
    load(browser, write_report(geometry, tmp_path)[0])
    line = browser.find_elements(By.CSS_SELECTOR, "#table tbody tr")[at]
    assert [cell.text for cell in line.find_elements(By.CSS_SELECTOR, "td, th")][4:] == [""] * 7, "no pair, no number"
    jump(browser, line.find_element(By.CSS_SELECTOR, ".open"))
    assert "lora: 1 NaN" in find(browser, "#panel .sub").text
    jump(browser, find(browser, "[data-choose='0-2']"))
    assert len(browser.find_elements(By.CSS_SELECTOR, "#panel .grid")) == 2
    assert errors(browser) == []


def test_directions_that_are_none_are_counted(pair: Chrome) -> None:
    """Eight of the ten planted leading directions are resolved: said in the verdict, the caption and the panel."""
    text = find(pair, "main").text
    assert "of those directions 72 of 90 in full and 72 of 90 in lora are resolved" in text.replace("\n", " ")
    assert "72 of 90 in full" in find(pair, "#intruders figcaption").text
    jump(pair, find(pair, "#map-shared-0-1 .cell"))
    told = find(pair, "#panel").text
    assert "full, 8 of 10 directions resolved" in told
    assert "of those leading directions, resolved" in told


def test_a_cell_opens_its_matrix_with_everything_about_it(pair: Chrome) -> None:
    jump(pair, find(pair, "#map-shared-0-1 [aria-label^='attention.self.query, layer 0']"))
    assert panel(pair) == QUERY
    heads = [h.text.split("\n")[0] for h in pair.find_elements(By.CSS_SELECTOR, "#panel h3")]
    assert heads == [
        "Shared directions", "What one holds of the other", "Spectra", "Principal angles", "New directions",
        "Amplification", "Numbers of the pair", "Numbers of each update",
    ]  # fmt: skip
    assert len(pair.find_elements(By.CSS_SELECTOR, "#panel svg.plot")) == 5
    assert len(pair.find_elements(By.CSS_SELECTOR, "#panel .grid")) == 2
    text = find(pair, "#panel").text
    assert "full held by lora" in text, "names in place of A and B"
    assert "adapter of rank 8" in text
    assert "64 of 96 directions" in text
    broken = pair.execute_script(
        """return [...document.querySelectorAll('#panel svg [d], #panel svg [x], #panel svg [cx], #panel td')]
            .filter(e => /NaN|Infinity|undefined|null/.test(e.outerHTML)).length"""
    )
    assert broken == 0


def test_overlaps_turn_from_above_chance_to_raw(pair: Chrome) -> None:
    jump(pair, find(pair, "#map-shared-0-1 .cell"))
    cell = "#panel .grid tbody tr:nth-child(6) td:nth-of-type(6)"
    above = int(find(pair, cell).text)
    told = find(pair, cell).get_attribute("title")
    assert told.startswith("i = 8, j = 8: overlap 85\u00a0%, random 8.3\u00a0%, above chance")
    jump(pair, find(pair, "#chance"))
    assert int(find(pair, cell).text) == 85
    assert above == round(100 * (0.8484 - 8 / 96) / (1 - 8 / 96))  # cos² 0.4 = 0.8484, as planted
    assert find(pair, "#chance").text == "show above chance"


def test_what_is_not_resolved_is_hatched_and_said(pair: Chrome) -> None:
    jump(pair, find(pair, "#map-shared-0-1 .cell"))
    dim = pair.find_elements(By.CSS_SELECTOR, "#panel .grid:first-child .dim")
    assert 0 < len(dim) < 72
    assert all(
        "not resolved" in (d.get_attribute("title") or "") or "within" in (d.get_attribute("title") or "") for d in dim
    )
    assert "Hatched: beyond what is resolved." in find(pair, "#panel .reads").text


def test_arrow_keys_walk_over_a_grid_and_leave_the_tensor_alone(pair: Chrome) -> None:
    jump(pair, find(pair, "#map-shared-0-1 .cell"))
    pair.execute_script("document.querySelector('#panel .grid td[tabindex=\"0\"]').focus()")
    press(pair, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert panel(pair) == QUERY
    assert find(pair, "#panel .reads").text.startswith("i = 2, j = 2: overlap")
    press(pair, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert find(pair, "#panel .reads").text.startswith("i = 2, j = 1: overlap"), "it stays inside"
    pair.execute_script("document.getElementById('panel').focus()")
    press(pair, Keys.ARROW_RIGHT)
    assert panel(pair) != QUERY


def test_the_other_way_round(pair: Chrome) -> None:
    jump(pair, find(pair, "#map-shared-0-1 .cell"))
    before = find(pair, "#panel svg.plot .series.s0:not(.thin)").get_attribute("d")
    assert find(pair, "#turn").text == "show lora in full"
    jump(pair, find(pair, "#turn"))
    assert find(pair, "#turn").text == "show full in lora"
    assert find(pair, "#panel svg.plot .series.s1:not(.thin)").get_attribute("d") != before


def test_a_pointer_reads_a_curve(pair: Chrome) -> None:
    jump(pair, find(pair, "#map-shared-0-1 .cell"))
    plot = find(pair, "#panel svg.plot")
    ActionChains(pair).move_to_element(plot).perform()
    text = plot.find_element(By.CSS_SELECTOR, ".reading").text
    assert text.startswith("r = ")
    assert "random" in text


def test_choosing_a_pair_turns_maps_table_and_panel(trio: Chrome) -> None:
    cosines = column(trio, 4)
    assert find(trio, "[data-key='captured_ab']").text == "full in lora"
    jump(trio, find(trio, "[data-choose='0-2']"))
    assert find(trio, "#pair").get_attribute("value") == "0-2"
    assert find(trio, "[data-key='captured_ab']").text == "full in lora-seed-1"
    assert column(trio, 4) != cosines
    shown = trio.execute_script(
        "return [...document.querySelectorAll('[data-pair]:not([hidden])')].map(e => e.dataset.pair)"
    )
    assert set(shown) == {"0-2"}
    assert trio.execute_script("return document.querySelectorAll('.choose[aria-pressed=\"true\"]').length") >= 1
    jump(trio, find(trio, "#map-cosine-0-2 .cell"))
    assert "full and lora-seed-1" in find(trio, "#panel .sub").text
    press(trio, Keys.ESCAPE)
    find(trio, "#pair option[value='0-1']").click()
    assert column(trio, 4) == cosines, "the script writes the numbers that the page came with"


def test_sorting_by_a_number_of_the_pair(trio: Chrome) -> None:
    jump(trio, find(trio, "[data-choose='1-2']"))
    jump(trio, find(trio, "[data-key='cosine']"))
    numbers = [float(text) for text in column(trio, 4) if text]
    assert numbers == sorted(numbers, reverse=True)
    assert column(trio, 4)[-1] == "", "what has no number stands last"


def test_a_flag_shows_its_rows(pair: Chrome) -> None:
    jump(pair, find(pair, ".flags .alarm .show"))
    shown = pair.execute_script(
        "return [...document.querySelectorAll('#table tbody tr')].filter(r => !r.hidden).length"
    )
    assert shown == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_paper(trio: Chrome, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for text, in both themes, maps and squares included."""
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    trio.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    try:
        trio.execute_script("document.querySelector('.cell').click()")
        assert trio.execute_script(FAINT_TEXT.replace("'main *, header *'", "'main *, header *, #panel *'")) == []
    finally:
        trio.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_phone_scrolls_only_downwards(trio: Chrome) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    trio.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert trio.execute_script("return document.documentElement.scrollWidth") <= 390
        trio.execute_script("document.querySelector('.cell').click()")
        assert trio.execute_script("return panel.scrollWidth <= panel.clientWidth")
        assert trio.execute_script("return panel.getBoundingClientRect().width") <= 390
    finally:
        trio.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_paper_shows_the_pair_and_no_controls(trio: Chrome) -> None:
    trio.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not find(trio, ".chooser").is_displayed()
        assert not find(trio, "nav").is_displayed()
        assert find(trio, "#table tbody tr:last-child").is_displayed()
    finally:
        trio.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_page_without_a_pair_opens_its_rows(browser: Chrome, tmp_path: Path) -> None:
    bare = [{"name": n, "status": "nonfinite", "rows": 4, "cols": 4, "layer": 0, "role": "q"} for n in "ab"]
    load(browser, write_report(geometry_of(*bare), tmp_path)[0])
    jump(browser, find(browser, "#table .open"))
    assert panel(browser) == "a"
    assert errors(browser) == []
