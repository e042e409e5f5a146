"""The page on two updates as a document: its policy, its text, what it holds without its script."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest

from spectra.report.pairs.build import PairsData, build_report
from spectra.report.pairs.figures import draw_figures
from spectra.report.pairs.page import KEYS, payload, render_page
from spectra.report.text import dump
from tests.report.document import FETCHES, Document, policy_of
from tests.report.planted import HOSTILE
from tests.report.planted_pairs import geometry_of, planted_geometry


@pytest.fixture(scope="module")
def hostile() -> PairsData:
    return build_report(planted_geometry(updates=3, hostile=True))


@pytest.fixture(scope="module")
def html(hostile: PairsData) -> str:
    return render_page(hostile, draw_figures(hostile))


@pytest.fixture(scope="module")
def document(html: str) -> Document:
    return Document(html)


def test_tags_are_balanced(document: Document) -> None:
    assert document.open == []


def test_the_policy_forbids_all_but_the_one_script_and_style(document: Document) -> None:
    policy = policy_of(document)
    assert policy["default-src"] == ["'none'"]
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
    assert not {"img", "image"} & {tag for tag, _ in document.tags}, "no bitmap inside a figure"


def test_the_page_names_no_other_file(document: Document) -> None:
    for tag, attributes in document.tags:
        for name in FETCHES & set(attributes):
            value = attributes[name] or ""
            assert value.startswith("#") or value == "data:,", (tag, name, value)
    assert not re.search(r"url\((?!#)", document.raw["style"][0])
    assert not re.search(
        r"\b(?:fetch|XMLHttpRequest|WebSocket|import|localStorage|innerHTML|document\.cookie)\b",
        document.raw["script"][1],
    )


def test_ids_are_unique_and_links_lead_somewhere(document: Document) -> None:
    ids = [a["id"] for _, a in document.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {(a["href"] or "")[1:] for t, a in document.tags if t in ("a", "use") and "href" in a}
    assert targets <= set(ids)


def test_hostile_names_make_no_tag_and_are_there_to_be_read(document: Document, html: str) -> None:
    assert sum(tag == "script" for tag, _ in document.tags) == 2
    words = "".join(document.words)
    assert "<script>window.pwned=1</script>" in words
    assert "{{ 7*7 }}" in words, "a name is not a template"
    held = [r["name"] for r in json.loads(document.raw["script"][0])["rows"]]
    assert {n for n in HOSTILE if n.isprintable() and "\\" not in n} <= set(held)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", html)
    assert html.count("x" * 9_000) == 1, "once, in the data"


def test_hostile_labels_make_no_tag() -> None:
    labels = ("</title><script>window.pwned=1</script>", "\u202eevil\x1b[2J")
    geometry = geometry_of(*planted_geometry().records, labels=labels, notes=[labels[1]])
    for side, label in zip(geometry.info["updates"], labels, strict=True):
        side |= {"ref": label, "notes": [label]}
    data = build_report(geometry)
    text = render_page(data, draw_figures(data))
    assert sum(tag == "script" for tag, _ in Document(text).tags) == 2
    assert not re.search("[\u202a-\u202e\x1b]", text)


def test_the_verdict_stands_first(document: Document, hostile: PairsData) -> None:
    words = " ".join("".join(document.words).split())
    places = [words.index(" ".join(sentence.split())[:60]) for sentence in hostile.verdict]
    assert places == sorted(places)
    assert places[-1] < words.index("Before you read on") < words.index("Every tensor") < words.rindex("Provenance")


def test_every_row_is_in_the_table_without_the_script(document: Document, hostile: PairsData) -> None:
    rows = [a["data-row"] for t, a in document.tags if t == "tr" and "data-row" in a]
    assert rows == [str(r.position) for r in hostile.rows]


def test_every_pair_has_its_maps_and_only_the_first_is_shown(document: Document, hostile: PairsData) -> None:
    parts = [a for _, a in document.tags if "data-pair" in a]
    assert len(parts) == 2 * len(hostile.pairs) == 6
    assert {a["data-pair"] for a in parts if "hidden" not in a} == {"0-1"}
    offered = [a["value"] for t, a in document.tags if t == "option" and re.fullmatch(r"\d-\d", a.get("value") or "")]
    assert offered == ["0-1", "0-2", "1-2"]


def test_two_updates_need_no_choice_of_a_pair() -> None:
    data = build_report(planted_geometry())
    page = Document(render_page(data, draw_figures(data)))
    assert "pair" not in [a.get("id") for _, a in page.tags]
    assert not [a for _, a in page.tags if "data-choose" in a]


def test_the_data_say_what_the_table_says(hostile: PairsData) -> None:
    plain = payload(hostile)
    assert [c["key"] for c in plain["columns"]] == list(KEYS)
    for row in plain["rows"]:
        for key, held in row.get("pairs", {}).items():
            assert set(held["numbers"]) >= set(KEYS) - {"resolved"}
            a, b = (row["updates"][int(i)] for i in key.split("-"))
            assert len(held["left"]["overlap"]) == sum(r <= a["held"] for r in plain["ranks"])
            assert len(held["left"]["overlap"][0]) == sum(r <= b["held"] for r in plain["ranks"])
            assert all(0 <= v <= 1000 for line in held["right"]["overlap"] for v in line)


def test_payload_stays_small_for_a_thousand_matrices() -> None:
    data = build_report(planted_geometry())
    size = len(dump(payload(data)["rows"])) / sum(r.analysed for r in data.rows)
    assert size < 5_000, f"{size:.0f} bytes a matrix: a thousand of them make more than 5 MB"


def test_a_geometry_without_a_pair_is_still_a_page() -> None:
    bare = {"name": "w", "status": "nonfinite", "rows": 4, "cols": 4, "layer": 0, "role": "q"}
    data = build_report(geometry_of(bare))
    assert draw_figures(data) == ()
    assert "No matrix could be compared" in render_page(data, ())


def test_the_same_data_gives_the_same_page(hostile: PairsData, html: str) -> None:
    assert render_page(hostile, draw_figures(hostile)) == html
