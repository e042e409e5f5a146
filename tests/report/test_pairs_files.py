"""Files, figures and terminal text of a report on two updates."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from spectra.report.drawing import inline
from spectra.report.pairs import PairsData, build_report, write_report
from spectra.report.pairs.figures import draw_figures
from spectra.report.pairs.terminal import render
from spectra.report.terminal import COLUMNS, ansi
from spectra.report.text import width
from tests.report.planted_pairs import geometry_of, planted_geometry

SVG = "{http://www.w3.org/2000/svg}"
FIGURES = ["captured_curve-0-1", "overlap-0-1", "shared-0-1", "captured-0-1", "cosine-0-1", "intruders", "spectra"]


@pytest.fixture(scope="module")
def data() -> PairsData:
    return build_report(planted_geometry())


@pytest.fixture(scope="module")
def texts(data: PairsData) -> dict[str, str]:
    held = {"two": data, "four": build_report(planted_geometry(updates=4))}
    held["hostile"] = build_report(planted_geometry(updates=3, hostile=True))
    held["long"] = build_report(geometry_of(*planted_geometry().records, labels=("a" * 300, "層" * 60)))
    held["bare"] = build_report(geometry_of({"name": "w", "status": "nonfinite", "rows": 4, "cols": 4}))
    return {name: render(one) for name, one in held.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_written_is_what_is_said_and_the_same_twice(tmp_path: Path) -> None:
    written, _ = (write_report(planted_geometry(), tmp_path / name) for name in ("a", "b"))
    assert written[0].name == "report.html"
    assert written[1].name == "geometry.parquet"
    found = contents(tmp_path / "a")
    assert {str(p.relative_to(tmp_path / "a")) for p in written} == set(found)
    assert found == contents(tmp_path / "b")
    assert [p.stem for p in written if p.suffix == ".svg"] == FIGURES
    for name in ("summary.json", "manifest.json"):
        json.loads(found[name])


def test_figures_have_titles_and_axes(data: PairsData) -> None:
    drawings = {d.key: ElementTree.fromstring(d.svg) for d in draw_figures(data)}
    assert list(drawings) == FIGURES
    words = {key: {t.text for t in root.iter(f"{SVG}text")} for key, root in drawings.items()}
    assert {"full inside lora", "lora inside full", "best possible", "random", "leading r of lora"} <= words[FIGURES[0]]
    assert {"output side (left)", "leading i of full", "leading j of lora"} <= words["overlap-0-1"]
    assert {"intruders of 10", "threshold ε on |cos|", "random directions"} <= words["intruders"]
    assert {"index i", "attention.self.query", "lora", "storage floor"} <= words["spectra"]
    for key, root in drawings.items():
        assert root.get("aria-labelledby") == f"{key}-title {key}-desc"


def test_what_is_not_resolved_is_hatched() -> None:
    rows = [json.loads(json.dumps(r)) for r in planted_geometry().records]
    plain = next(d for d in draw_figures(build_report(geometry_of(*rows))) if d.key == "overlap-0-1")
    for row in rows:
        for update in row["updates"][:1]:
            update["resolved"] = 4
    hatched = next(d for d in draw_figures(build_report(geometry_of(*rows))) if d.key == "overlap-0-1")
    # Six columns of the adapter; ranks 64 alone, then 6, 8, … 64 of the full update, on two sides.
    assert hatched.svg.count(b"url(#h") - plain.svg.count(b"url(#h") == 2 * 6 * 7


def test_inline_figures_carry_no_style_and_no_bitmap(data: PairsData) -> None:
    for drawing in draw_figures(data):
        if drawing.key.partition("-")[0] in ("captured_curve", "overlap", "intruders", "spectra"):
            root = ElementTree.fromstring(inline(drawing))
            assert not [e.tag for e in root.iter() if "style" in e.attrib or e.tag in ("style", "image")]


@pytest.mark.parametrize("name", ["two", "four", "hostile", "long", "bare"])
def test_no_line_is_wider_than_the_terminal(texts: dict[str, str], name: str) -> None:
    for line in texts[name].split("\n"):
        assert width(line) <= COLUMNS, line


def test_nothing_from_a_file_moves_the_cursor(texts: dict[str, str]) -> None:
    for text in texts.values():
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text)


def test_everything_is_there(texts: dict[str, str], data: PairsData) -> None:
    text = texts["two"]
    assert text.index("base    models/minilm-base") < text.index("updates\n") < text.index("by role")
    assert text.index("by role") < text.index("verdict")
    flat = " ".join(text.split())
    for sentence in (*data.verdict, *(flag.text for flag in data.flags)):
        assert " ".join(sentence.split()) in flat
    assert "lora · elsewhere" in texts["four"]


def test_colour_is_the_only_difference(data: PairsData, texts: dict[str, str]) -> None:
    painted = render(data, paint=ansi)
    assert "\x1b[31m" in painted
    assert re.sub(r"\x1b\[\d+m", "", painted) == texts["two"]
