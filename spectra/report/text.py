"""Names and numbers as text: what a reader sees of a tensor's name, and how many digits of a value.

A name comes from a file that anyone may have written. Everything that is shown goes through `visible` first: control,
format and bidirectional characters become escapes, so that a name can neither move a terminal's cursor nor reverse a
line. HTML escaping is Jinja's, on top.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

# Control, format (bidi, zero width), surrogate, private, unassigned, line and paragraph separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
MISSING = "–"


def visible(name: str) -> str:
    r"""Return a name with every character that does not print, and the backslash, escaped.

    Parameters
    ----------
    name : str
        A tensor's name, a path or an error message.

    Examples
    --------
    >>> visible("a\x1b[2J"), visible("safe.weight")
    ('a\\x1b[2J', 'safe.weight')
    >>> visible("\u202egpj.exe") == "\\u202egpj.exe"
    True
    """
    if name.isascii() and name.isprintable() and "\\" not in name:
        return name
    return "".join(_visible_character(c) for c in name)


def _visible_character(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def width(text: str) -> int:
    """Return the columns that a text takes in a terminal: two for wide characters, none for combining ones.

    Parameters
    ----------
    text : str
        Text that `visible` has passed.

    Examples
    --------
    >>> width("query"), width("層")
    (5, 2)
    """
    return sum(_cell(c) for c in text)


def _cell(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def elide(text: str, columns: int) -> str:
    """Shorten a text in its middle, where names of tensors differ least.

    Parameters
    ----------
    text : str
        Text that `visible` has passed.
    columns : int
        Columns it may take, at least 3.

    Examples
    --------
    >>> elide("encoder.layer.0.attention.self.query.weight", 21)
    'encoder.la…ery.weight'
    """
    if len(text) <= 4 * columns and width(text) <= columns:
        return text
    left = (columns - 1) // 2
    tail = take(text[::-1][: 4 * columns], columns - 1 - left)
    return take(text[: 4 * columns], left) + "…" + tail[::-1]


def take(text: str, columns: int) -> str:
    """Return as much of the start of a text as fits into so many columns.

    Parameters
    ----------
    text : str
        Text that `visible` has passed.
    columns : int
        Columns it may take.
    """
    used, kept = 0, []
    for character in text:
        used += _cell(character)
        if used > columns:
            break
        kept.append(character)
    return "".join(kept)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, in powers of ten where it is far from one.

    Parameters
    ----------
    value : float or None
        NaN and None give a dash.
    digits : int
        Significant digits; whole numbers below 100 000 are given whole.

    Examples
    --------
    >>> number(231.0), number(0.012345), number(3.2e-7), number(None)
    ('231', '0.0123', '3.20×10⁻⁷', '–')
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    return significant(value, digits)


def significant(value: float, digits: int) -> str:
    """Return a finite number with exactly so many significant digits, zeros and all.

    Parameters
    ----------
    value : float
        Zero gives "0".
    digits : int
        Significant digits.

    Examples
    --------
    >>> significant(2.0, 2), significant(0.6, 2), significant(1234.5, 2)
    ('2.0', '0.60', '1234')
    """
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def percent(share: float | None) -> str:
    r"""Return a share as a percentage with two significant digits; a hard space stands before the sign.

    Parameters
    ----------
    share : float or None
        1.0 is all of it. NaN and None give a dash.

    Examples
    --------
    >>> percent(0.0123), percent(0.02), percent(2e-9), percent(0.0)
    ('1.2\xa0%', '2.0\xa0%', '2.0×10⁻⁷\xa0%', '0\xa0%')
    """
    if share is None or math.isnan(share):
        return MISSING
    value = 100.0 * share
    if 99.5 <= value < 100.0:
        return "over 99\xa0%"
    return f"{significant(value, 2) if math.isfinite(value) else number(value)}\xa0%"


def whole_percent(share: float) -> str:
    r"""Return a share in whole per cent, which may be negative: how far above chance, where chance itself varies.

    Parameters
    ----------
    share : float
        1.0 is all of it. NaN gives a dash.

    Examples
    --------
    >>> whole_percent(0.747), whole_percent(-0.0014), whole_percent(float("nan"))
    ('75\xa0%', '0\xa0%', '–')
    """
    return MISSING if math.isnan(share) else f"{round(100 * share)}\xa0%"


def trace(share: float | None) -> str:
    r"""Return a share as `percent` does, with everything below a hundredth of a per cent as just that.

    Parameters
    ----------
    share : float or None
        1.0 is all of it.

    Examples
    --------
    >>> trace(0.03), trace(2e-6)
    ('3.0\xa0%', '<\xa00.01\xa0%')
    """
    return "<\xa00.01\xa0%" if share is not None and 0 < share < 1e-4 else percent(share)


def size(count: float) -> str:
    """Return a number of bytes in decimal units.

    Parameters
    ----------
    count : float
        Bytes.

    Examples
    --------
    >>> size(90_900_000), size(512)
    ('90.9 MB', '512 bytes')
    """
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable: the last unit returns")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun.

    Parameters
    ----------
    count : int
        How many.
    noun, plural : str
        The noun, and its plural where that is not the noun with an s.

    Examples
    --------
    >>> counted(1, "matrix", "matrices"), counted(36, "matrix", "matrices"), counted(0, "flag")
    ('1 matrix', '36 matrices', '0 flags')
    """
    return f"{grouped(count)} {noun if count == 1 else plural or noun + 's'}"


def grouped(count: int) -> str:
    """Return a whole number with its digits in groups of three.

    Parameters
    ----------
    count : int
        How many.

    Examples
    --------
    >>> grouped(1234567) == "1\u202f234\u202f567"
    True
    """
    return f"{count:,}".replace(",", "\u202f")


def listed(names: Sequence[str], *, most: int = 3) -> str:
    """Return names joined as in a sentence, the rest counted.

    Parameters
    ----------
    names : sequence of str
        Names as stored; they are made visible and elided here.
    most : int
        How many to spell out.

    Examples
    --------
    >>> listed(["a", "b"]), listed(list("abcde"))
    ('a and b', 'a, b, c and 2 more')
    """
    shown = [elide(visible(n), 60) for n in names[:most]]
    if len(names) > most:
        return ", ".join(shown) + f" and {len(names) - most} more"
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1] if shown else ""


def dump(value: Any, *, indent: int | None = None) -> str:
    r"""Return canonical JSON that is also inert inside HTML: sorted keys, no NaN, ``<``, ``>`` and ``&`` escaped.

    Parameters
    ----------
    value : object
        Plain values; a NaN or an infinity is an error here, and is turned into null by whoever made it.
    indent : int, optional
        Spaces a level; compact when None.

    Examples
    --------
    >>> dump({"b": "</script>", "a": None})
    '{"a":null,"b":"\\u003c/script\\u003e"}'
    """
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, sort_keys=True, allow_nan=False, indent=indent, separators=separators)
    for character in "<>&":  # only ever inside JSON strings, where an escape means the same
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def finite(value: float | None, digits: int | None = None) -> float | int | None:
    """Return a number for JSON: None for NaN or an infinity, an int where it is whole, rounded on request.

    Parameters
    ----------
    value : float or None
        Any number.
    digits : int, optional
        Significant digits to keep.

    Examples
    --------
    >>> finite(float("nan")), finite(12.0), finite(0.123456, 3)
    (None, 12, 0.123)
    """
    if value is None or not math.isfinite(value):
        return None
    kept = float(f"{value:.{digits}g}") if digits else float(value)
    return int(kept) if kept == int(kept) and abs(kept) < 2**53 else kept
