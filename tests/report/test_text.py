"""Names and numbers as text: nothing a file holds may move a cursor, and no digit is invented."""

from __future__ import annotations

import json
import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectra.report.text import dump, elide, finite, listed, number, percent, size, visible, width
from tests.report.planted import HOSTILE

MOVES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
ANY_TEXT = st.text(st.characters(codec=None), max_size=60)  # surrogates too


@given(ANY_TEXT)
def test_visible_leaves_nothing_that_moves_a_cursor(name: str) -> None:
    assert not {unicodedata.category(c) for c in visible(name)} & MOVES


@given(ANY_TEXT, ANY_TEXT)
def test_visible_never_makes_two_names_one(a: str, b: str) -> None:
    assert (visible(a) == visible(b)) == (a == b)


@given(ANY_TEXT, st.integers(3, 40))
def test_elided_text_fits_and_keeps_both_ends(name: str, columns: int) -> None:
    shown = visible(name)
    short = elide(shown, columns)
    assert width(short) <= columns
    assert short == shown or "…" in short


def test_a_name_of_ten_kilobytes_is_short_when_shown() -> None:
    assert len(elide(visible("x" * 10_000), 60)) == 60
    # Combining marks take no column, so columns alone would not bound the length.
    assert len(elide("\u0301" * 10_000, 60)) <= 500


@given(st.floats(-1e300, 1e300), st.integers(2, 6))
def test_number_is_right_to_its_digits(value: float, digits: int) -> None:
    text = number(value, digits).translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")).replace("×10", "e")
    # Half a unit of the last digit, and a whole one where a number of five figures is given without decimals.
    assert math.isclose(float(text), value, rel_tol=0.51 * 10.0 ** (1 - digits), abs_tol=0.51 if abs(value) > 10 else 0)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.9999, "over 99\xa0%"), (1.0, "100\xa0%"), (0.0, "0\xa0%"), (math.nan, "–"), (None, "–"), (math.inf, "∞\xa0%")],
)
def test_percent_at_its_edges(share: float | None, text: str) -> None:
    assert percent(share) == text


def test_sizes_and_lists() -> None:
    assert size(999) == "999 bytes"
    assert size(22_700_000_000_000_000_000) == "2.27e+04 PB"
    assert listed([]) == ""
    assert listed(["\x1b[2J"]) == "\\x1b[2J"


@pytest.mark.parametrize("name", [*HOSTILE, "\ud800"])
def test_json_is_inert_in_html_and_means_the_same(name: str) -> None:
    text = dump({name: [name, None, 1.5]})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {name: [name, None, 1.5]}


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError):
        dump({"a": math.nan})
    assert [finite(v) for v in (math.nan, math.inf, None, 2.0)] == [None, None, None, 2]
