"""The page and figure: every verdict has one, deterministic, self-contained, and safe from what it is told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from spectra.errors import JournalError
from spectra.intrinsic.page import render_page, sentences, write_page
from spectra.intrinsic.plot import draw
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
    text = render_page(replace(results["reached"], config=config))
    assert "<script>alert" not in text
    assert "\u202e" not in text
    assert text.count("<script>") == 1


def test_the_figure_tells_what_it_shows(results: dict[str, IntrinsicDimension]) -> None:
    drawing, _ = draw(results["reached"])
    text = drawing.svg.decode()
    for words in ("full fine-tuning", "90 % of it", "d90 =", "numbers that train, d"):
        assert words in text
    assert "head alone" in draw(results["reached by the head alone"])[0].svg.decode()


def test_sentences(results: dict[str, IntrinsicDimension]) -> None:
    told = dict(sentences(results["reached"]))
    assert "of the" in told["size"]
    assert "minutes" in told["cost"]
    assert "size" not in dict(sentences(results["never reached"]))
    assert "head" in dict(sentences(results["reached by the head alone"]))


def test_figures_is_no_link(results: dict[str, IntrinsicDimension], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JournalError, match="symbolic link"):
        write_page(results["reached"], tmp_path)
