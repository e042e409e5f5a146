"""Figures: the same bytes every time, readable by a machine, and fit to stand inside the page."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from spectra.report import ReportData, build_report
from spectra.report.drawing import inline
from spectra.report.figures import draw_figures
from tests.report.planted import adapter_run, row, run_of

SVG = "{http://www.w3.org/2000/svg}"


def test_five_figures_with_titles_and_axes(data: ReportData) -> None:
    drawings = {d.key: ElementTree.fromstring(d.svg) for d in draw_figures(data)}
    assert list(drawings) == ["spectra", "truncation", "budgets", "relative_change", "effective_rank"]
    for key, root in drawings.items():
        title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert title is not None
        assert title.text
        assert description is not None
        assert len(description.text or "") > 60
        assert root.get("aria-labelledby") == f"{key}-title {key}-desc"
    words = {key: {t.text for t in root.iter(f"{SVG}text")} for key, root in drawings.items()}
    assert {"index i", "singular value σᵢ", "attention.self.query", "storage floor"} <= words["spectra"]
    assert {"rank r kept", "8", "64"} <= words["truncation"]
    assert {"parameters of the factors", "equal ranks", "best ranks", "r = 1", "64"} <= words["budgets"]
    assert {"layer", "0", "5", "none"} <= words["relative_change"]


def test_bytes_do_not_change_between_drawings(data: ReportData) -> None:
    assert [d.svg for d in draw_figures(data)] == [d.svg for d in draw_figures(data)]


def test_no_date_in_a_figure(data: ReportData) -> None:
    for drawing in draw_figures(data):
        assert b"dc:date" not in drawing.svg


def test_hostile_roles_are_text(hostile: ReportData) -> None:
    """A role with dollars is not mathematics, and one with tags is not markup."""
    root = ElementTree.fromstring(draw_figures(hostile)[3].svg)
    words = {t.text for t in root.iter(f"{SVG}text")}
    assert "<script>window.pwned=1</script>" in words
    assert any("frac" in (w or "") for w in words)


def test_inline_figures_carry_no_style(data: ReportData) -> None:
    for drawing in draw_figures(data):
        root = ElementTree.fromstring(inline(drawing))
        assert not [e.tag for e in root.iter() if "style" in e.attrib or e.tag in ("style", "metadata")]
        ids = [e.get("id") for e in root.iter() if e.get("id")]
        assert all((i or "").startswith(f"{drawing.key}-") for i in ids)
        used = {(e.get("href") or "#")[1:] for e in root.iter("use")}
        clips = {(e.get("clip-path") or "")[5:-1] for e in root.iter() if e.get("clip-path")}
        assert (used | clips) <= set(ids)


def test_inline_figures_follow_the_theme(data: ReportData) -> None:
    text = inline(draw_figures(data)[1])
    assert "var(--ink)" in text
    assert "var(--series-0)" in text
    assert "#1f2328" not in text


@pytest.mark.parametrize("count", [1, 2])
def test_few_matrices_draw(count: int) -> None:
    held = adapter_run(layers=1)
    held.frame = held.frame.head(count)
    assert len(draw_figures(build_report(held))) == 5


def test_nothing_to_draw() -> None:
    assert draw_figures(build_report(run_of(row("a", 0, "a", (3, 3), "unchanged", frobenius=0.0)))) == ()
