"""The terminal's text: 80 columns, aligned, and inert."""

from __future__ import annotations

import re

import pytest

from spectra.report import ReportData, build_report
from spectra.report.terminal import COLUMNS, ansi, render
from spectra.report.text import width
from tests.report.planted import adapter_run, planted_run, row, run_of


@pytest.fixture(scope="module")
def texts(data: ReportData, hostile: ReportData) -> dict[str, str]:
    held = {"planted": data, "hostile": hostile, "adapter": build_report(adapter_run())}
    held["same"] = build_report(run_of(row("a", 0, "a", (3, 3), "unchanged", frobenius=0.0)))
    held["deep"] = build_report(planted_run(layers=100))
    return {name: render(one) for name, one in held.items()}


@pytest.mark.parametrize("name", ["planted", "hostile", "adapter", "same", "deep"])
def test_no_line_is_wider_than_the_terminal(texts: dict[str, str], name: str) -> None:
    for line in texts[name].split("\n"):
        assert width(line) <= COLUMNS, line


def test_nothing_from_a_file_moves_the_cursor(texts: dict[str, str]) -> None:
    for text in texts.values():
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text)
    assert "\\x07" in texts["hostile"]


def test_columns_are_aligned(texts: dict[str, str]) -> None:
    block = texts["planted"].split("by role\n")[1].split("\n\n")[0].split("\n")
    ends = {line.rstrip().rfind("%") for line in block[2:] if "%" in line}
    assert len(ends) == 1


def test_everything_is_there(texts: dict[str, str], data: ReportData) -> None:
    text = texts["planted"]
    assert text.index("matched") < text.index("by role") < text.index("by layer") < text.index("verdict")
    flat = " ".join(text.split())
    assert data.directions is not None
    for sentence in data.directions.said:
        assert " ".join(sentence.split()) in flat
    for sentence in data.verdict:
        assert " ".join(sentence.split()) in flat
    for flag in data.flags:
        assert " ".join(flag.text.split()) in flat


def test_a_wide_role_has_a_line_of_its_own(texts: dict[str, str]) -> None:
    assert "\nembeddings.word_embeddings\n" in texts["planted"]


def test_colour_is_the_only_difference(data: ReportData, texts: dict[str, str]) -> None:
    painted = render(data, paint=ansi)
    assert "\x1b[31m" in painted
    assert re.sub(r"\x1b\[\d+m", "", painted) == texts["planted"]
