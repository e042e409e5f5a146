"""The page and figure: every verdict has one, deterministic, self-contained, and safe from what it is told."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.axes._secondary_axes import SecondaryAxis
from matplotlib.figure import Figure

from spectra.errors import JournalError
from spectra.intrinsic.page import render_page, sentences, write_page
from spectra.intrinsic.plot import accuracy_against_dimension, draw
from spectra.intrinsic.result import IntrinsicDimension
from spectra.intrinsic.searching import SearchConfig
from tests.intrinsic.synthetic import Synthetic, found

TOLD = {"model": "minilm", "task": "rotten-tomatoes", "structure": "said", "projection": "fastfood", "layers": 8}


@pytest.fixture(scope="module")
def results() -> dict[str, IntrinsicDimension]:
    """One search of each verdict."""
    few = SearchConfig(steps=100, seeds=2)
    made = {
        "reached": found(Synthetic(), few),
        "never reached": found(Synthetic(top=0.8, middle=1e9), replace(few, largest=1000)),
        "reached by the smallest": found(Synthetic(middle=1e-3), few),
        "reached by the head alone": found(Synthetic(base=0.75), replace(few, free_head=True)),
        "unfinished": found(Synthetic(), replace(few, runs=4)),
    }
    assert {name: result.verdict for name, result in made.items()} == {name: name for name in made}
    return {name: replace(result, config={**result.config, **TOLD}) for name, result in made.items()}


VERDICTS = ("reached", "never reached", "reached by the smallest", "reached by the head alone", "unfinished")


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_verdict_has_a_page(verdict: str, results: dict[str, IntrinsicDimension], tmp_path: Path) -> None:
    result = results[verdict]
    page, svg, png = write_page(result, tmp_path)
    text = page.read_text("utf-8")
    first = result.sentence().split(":")[0].split("(")[0].strip()
    assert first in text.replace("&#39;", "'")
    assert len(re.findall(r"<tr><th scope=\"row\" class=\"word\">", text)) == len(result.trials)
    assert not re.search(r"https?://", re.sub(r"xmlns[:\w]*=\"[^\"]*\"", "", text)), "nothing is fetched"
    assert png.read_bytes().startswith(b"\x89PNG")
    before = [path.read_bytes() for path in (page, svg, png)]
    assert [path.read_bytes() for path in write_page(result, tmp_path)] == before


def test_what_it_is_told_cannot_run(results: dict[str, IntrinsicDimension]) -> None:
    hostile = "<script>alert(1)</script>\u202e"
    config = {**results["reached"].config, "model": hostile, "task": hostile, "versions": {hostile: hostile}}
    told = replace(results["reached"], config=config)
    text = render_page(told, draw(told)[0])
    assert "<script>alert" not in text
    assert "\u202e" not in text
    assert text.count("<script>") == 1


def test_the_figure_tells_what_it_shows(results: dict[str, IntrinsicDimension]) -> None:
    drawing, _ = draw(results["reached"])
    text = drawing.svg.decode()
    for words in ("full fine-tuning", "90 % of it", "d90 =", "numbers that train, d"):
        assert words in text
    dimension = results["reached"].sentence().split("(")[0].strip()
    assert f">{dimension}<" in text, "rounded as the sentence rounds it"
    assert "head alone" in draw(results["reached by the head alone"])[0].svg.decode()


@pytest.mark.parametrize("dimensions", [(600,), (600, 900), (4, 1_000_000)])
def test_both_axes_have_ticks_that_stand_apart(dimensions: tuple[int, ...]) -> None:
    """Whatever was tried: a single dimension may have no power of four beside it, a wide range has many."""
    config = SearchConfig(steps=100, seeds=1, dimensions=dimensions)
    figure = Figure(figsize=(7.0, 4.3), layout="constrained")
    ax = figure.subplots()
    accuracy_against_dimension(ax, found(Synthetic(), config))
    figure.draw_without_rendering()
    axes = [ax, *(child for child in ax.get_children() if isinstance(child, SecondaryAxis))]
    assert len(axes) == 2
    for one in axes:
        low, high = one.get_xlim()
        shown = [label for at, label in zip(one.get_xticks(), one.get_xticklabels(), strict=True) if low <= at <= high]
        assert shown
        boxes = [label.get_window_extent() for label in shown]
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_the_key_stands_clear_of_lines_and_labels(results: dict[str, IntrinsicDimension]) -> None:
    figure = Figure(figsize=(7.0, 4.3), layout="constrained")
    ax = figure.subplots()
    accuracy_against_dimension(ax, results["reached"])
    figure.draw_without_rendering()
    key = ax.get_legend().get_window_extent()
    assert key.y1 < ax.xaxis.get_tightbbox().y0
    assert key.y0 >= 0, "inside the figure"


def test_sentences(results: dict[str, IntrinsicDimension]) -> None:
    told = dict(sentences(results["reached"]))
    assert "of the" in told["size"]
    assert re.search(r"the steps of [\d.]+ whole ones, \d+ seconds", told["cost"])
    longer = replace(results["reached"], config={**results["reached"].config, "seconds": 5400.0})
    assert sentences(longer)[-1][1].endswith(" 90 minutes.")
    assert "size" not in dict(sentences(results["never reached"]))
    assert "head" in dict(sentences(results["reached by the head alone"]))


def test_figures_is_no_link(results: dict[str, IntrinsicDimension], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JournalError, match="symbolic link"):
        write_page(results["reached"], tmp_path)


def test_pilots_are_told_where_there_were_any(results: dict[str, IntrinsicDimension]) -> None:
    result = results["reached"]
    drawing, _ = draw(result)
    told = render_page(result, drawing)
    assert "Short pilots choose" in told
    assert "share one learning rate" not in told
    trials = tuple(trial for trial in result.trials if trial.ask.kind != "pilot")
    assert "share one learning rate" in render_page(replace(result, trials=trials), drawing)
