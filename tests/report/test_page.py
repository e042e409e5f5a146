"""The page as a document: what its policy allows, that it fetches nothing, and that names stay text."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest

from spectra.report import ReportData
from spectra.report.figures import draw_figures
from spectra.report.page import payload, render_page
from spectra.report.text import dump
from tests.report.document import FETCHES, Document, policy_of
from tests.report.planted import HOSTILE


@pytest.fixture(scope="module")
def html(hostile: ReportData) -> str:
    return render_page(hostile, draw_figures(hostile))


@pytest.fixture(scope="module")
def document(html: str) -> Document:
    return Document(html)


def test_tags_are_balanced(document: Document) -> None:
    assert document.open == []


def test_the_policy_forbids_all_but_the_one_script_and_style(document: Document) -> None:
    policy = policy_of(document)
    assert policy["default-src"] == ["'none'"]
    assert policy["img-src"] == ["data:"]
    style, (data, script) = document.raw["style"], document.raw["script"]
    assert len(style) == 1
    for kind, text in (("style-src", style[0]), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[kind] == [f"'sha256-{digest}'"]
    json.loads(data)


def test_nothing_is_inline_that_the_policy_would_block(document: Document) -> None:
    for tag, attributes in document.tags:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag


def test_the_page_names_no_other_file(document: Document, html: str) -> None:
    for tag, attributes in document.tags:
        for name in FETCHES & set(attributes):
            value = attributes[name] or ""
            assert value.startswith("#") or value == "data:,", (tag, name, value)
    assert not re.search(r"url\((?!#)", document.raw["style"][0])
    assert not re.search(
        r"\b(?:fetch|XMLHttpRequest|WebSocket|import|localStorage|document\.cookie)\b", document.raw["script"][1]
    )


def test_ids_are_unique(document: Document) -> None:
    ids = [a["id"] for _, a in document.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {(a["href"] or "")[1:] for t, a in document.tags if t in ("a", "use") and "href" in a}
    assert targets <= set(ids)


def test_hostile_names_make_no_tag(document: Document) -> None:
    assert "img" not in {tag for tag, _ in document.tags}
    assert sum(tag == "script" for tag, _ in document.tags) == 2
    assert not [a for _, a in document.tags if "onerror" in a]


def test_hostile_names_are_still_there_to_be_read(document: Document, html: str) -> None:
    words = "".join(document.words)
    assert "<script>window.pwned=1</script>" in words
    assert "\\u202egnp.live\\u202c" in words
    assert "{{ 7*7 }}" in words, "a name is not a template"
    held = [r["name"] for r in json.loads(document.raw["script"][0])["rows"]]
    assert {n for n in HOSTILE if n.isprintable() and "\\" not in n} <= set(held)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", html)


def test_a_long_name_is_elided_wherever_it_is_repeated(html: str) -> None:
    assert html.count("x" * 9_000) == 1, "once, in the data; elided in rows, titles, maps and figures"


def test_three_sentences_stand_first(document: Document, hostile: ReportData) -> None:
    words = " ".join("".join(document.words).split())
    places = [words.index(" ".join(sentence.split())[:60]) for sentence in hostile.verdict]
    assert places == sorted(places)
    assert places[-1] < words.index("Before you read on") < words.index("Every tensor") < words.rindex("Provenance")


def test_every_row_is_in_the_table_without_the_script(document: Document, hostile: ReportData) -> None:
    rows = [a["data-row"] for t, a in document.tags if t == "tr" and "data-row" in a]
    assert rows == [str(r.position) for r in hostile.rows]


def test_payload_stays_small_for_a_thousand_matrices(data: ReportData) -> None:
    size = len(dump(payload(data))) / sum(r.analysed for r in data.rows)
    assert size < 5_000, f"{size:.0f} bytes a matrix: a thousand of them make more than 5 MB"


def test_the_same_data_gives_the_same_page(hostile: ReportData, html: str) -> None:
    assert render_page(hostile, draw_figures(hostile)) == html


def test_payload_keeps_whole_bounds(data: ReportData) -> None:
    held = next(r for r in data.rows if r.truncated)
    plain = payload(data)["rows"][held.position]
    assert plain["numbers"]["entropy_rank"][0] < plain["numbers"]["entropy_rank"][1]
    assert len(plain["curve"]["high"]) == len(plain["curve"]["values"]) == len(plain["curve"]["low"])
