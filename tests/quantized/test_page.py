"""The page: what it says first, the same bytes, complete by itself, and safe from what it is told."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from spectra.errors import JournalError
from spectra.quantize.scheme import Scheme
from spectra.quantized import QuantizedRun, quantization
from spectra.quantized.build import findings
from spectra.quantized.page import render_page, write_page
from spectra.quantized.terminal import render
from spectra.quantized.verdict import leading
from spectra.report.text import width
from tests.quantized.conftest import noise, saved

HOSTILE = "<script>alert(1)</script>\u202e\x1b[2J"


def test_files_and_bytes(run: QuantizedRun, tmp_path: Path) -> None:
    written = write_page(run, tmp_path)
    assert {path.name for path in written} == {
        "quantized.html", "quantized.json", "quantized.parquet", "ladder.svg", "absorbed.svg", "errors.svg",
    }  # fmt: skip
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_page(QuantizedRun.load(tmp_path), tmp_path)] == before
    page = written[0].read_text("utf-8")
    left = page.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")  # namespaces
    assert not re.search(r"https?://", left), "nothing is fetched"
    assert "default-src &#39;none&#39;" in page
    assert run.sentences[0][1] in page.replace("&#39;", "'")
    told = json.loads(written[1].read_text())
    assert [one["scheme"] for one in told["schemes"]] == ["nf4", "int4", "int8"]
    assert told["schemes"][0]["sqnr_db"] == pytest.approx(run.pooled[0].sqnr_db)


def test_the_first_sentence_says_it_all(run: QuantizedRun) -> None:
    about, said = run.sentences[0]
    lead = leading(run.pooled)
    assert (about, lead.scheme) == ("verdict", "nf4"), "of two formats of as many bits the one that keeps more"
    for words in (
        f"nf4 keeps {lead.sqnr_db:.1f}\xa0dB",
        f"int8 {run.pooled[2].sqnr_db:.1f}\xa0dB",
        f"{lead.short_of_shannon:.1f}\xa0dB short of the rate–distortion bound",
        "Lloyd–Max",
        "looks like noise in every matrix",
        "rank 16 takes back",
    ):
        assert words in said


def test_names_cannot_run(tmp_path: Path) -> None:
    ref = saved(tmp_path / "m", {f"{HOSTILE}.weight": noise(64, 64, 0), f"{HOSTILE}.bias": noise(1, 64, 0)[0]})
    found = quantization(ref, progress=False)
    found = replace(found, info={**found.info, "model": {**found.info["model"], "ref": HOSTILE}})
    page = render_page(findings(found), ())
    assert "<script>alert" not in page
    assert "\u202e" not in page
    assert page.count("<script>") == 1
    text = render(findings(found))
    assert "\u202e" not in text
    assert "\x1b" not in text
    for path in write_page(found, tmp_path / "out"):
        assert b"<script>alert" not in path.read_bytes() or path.suffix == ".parquet"


def test_what_went_through_a_scheme_before_is_kept(tmp_path: Path) -> None:
    """Quantized weights lose nothing in the same scheme, and no share of nothing is told."""
    weight = Scheme.parse("nf4/64/fp32").quantize(noise(64, 64, 0)).dequantize()
    found = quantization(saved(tmp_path / "m", {"w.weight": weight}), ["nf4/64/fp32"], progress=False)
    assert found.pooled[0].relative_mse == 0.0
    assert "loses nothing" in found.sentences[0][1]
    assert any(flag.kind == "exact" for flag in findings(found).flags)
    write_page(found, tmp_path / "out")
    assert QuantizedRun.load(tmp_path / "out").records == found.records
    assert "nf4/64/fp32" in found._repr_html_()


def test_the_terminal_keeps_to_its_columns(run: QuantizedRun) -> None:
    assert max(map(width, render(findings(run)).splitlines())) <= 80


def test_figures_is_no_link(run: QuantizedRun, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JournalError, match="symbolic link"):
        write_page(run, tmp_path)
