r"""PEFT's patterns of module names, matched in linear time: a stranger's pattern cannot make a reader hang.

PEFT looks a module up with ``re.match(rf"(.*\.)?({pattern})$", module)``; the first pattern that matches wins.
Python's ``re`` backtracks, and ``(a+)+b`` takes it for ever. Here a pattern is compiled to a nondeterministic
automaton whose states are followed all at once (Thompson 1968), so that the work is at most (length of the name) ×
(length of the pattern). What is no regular language, such as look-ahead and back references, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spectra.checkpoints.strict_json import shown
from spectra.errors import UnsafeCheckpoint, UnsupportedFormat

# Longest pattern, deepest parentheses, most states. A name of a module written as a pattern has some 60 characters.
_LONGEST, _DEEPEST, _MOST_STATES = 1000, 30, 2000
# Patterns of one table that are more than names, and the states they may have together: about half a second's work.
_MOST_EXPRESSIONS, _MOST_STATES_TOGETHER = 1000, 30_000
# Steps that all look-ups of one table may take, about a second. A name for each of 560 modules of a model of 80 layers
# takes 160 000, ten expressions against them 220 000.
_MOST_STEPS = 1_000_000

_PLAIN = re.compile(r"(?:[\w\-.]|\\[^\w\s])*", re.ASCII)
_REPEAT = re.compile(r"\{(\d{1,3})(,?)(\d{0,3})\}")
_SPECIAL = "()[]{}*+?|^$"

Test = Callable[[str], object]


class PatternTable:
    r"""Values by pattern of module name, looked up as PEFT does.

    Parameters
    ----------
    values : mapping of str to number
        Pattern to value, in the order in which patterns are tried.
    source : str
        File and field, for messages.

    Raises
    ------
    UnsafeCheckpoint
        A pattern is no regular expression, is too long, or the table would take too long to search.
    UnsupportedFormat
        A pattern needs look-around, back references or flags.

    Examples
    --------
    >>> table = PatternTable({r"layer\.0\.query": 4, "(query|value)": 2}, source="example")
    >>> table.find("bert.layer.0.query"), table.find("bert.layer.1.value"), table.find("bert.layer.1.evalue")
    (4, 2, None)
    """

    def __init__(self, values: Mapping[str, float], *, source: str) -> None:
        self._source = source
        self._steps = 0
        self._found: dict[str, float | None] = {}
        self._entries: list[tuple[_Plain | _Automaton, float]] = []
        expressions, states = 0, 0
        for pattern, value in values.items():
            matcher = _matcher(pattern, source)
            if isinstance(matcher, _Automaton):
                expressions, states = expressions + 1, states + len(matcher.edges)
            if expressions > _MOST_EXPRESSIONS or states > _MOST_STATES_TOGETHER:
                raise UnsafeCheckpoint(f"{source} holds more regular expressions than any genuine adapter needs")
            self._entries.append((matcher, value))

    def find(self, module: str) -> float | None:
        """Value of the first pattern that matches a module's path, or None."""
        if module not in self._found:
            self._found[module] = next((value for match, value in self._entries if self._matches(match, module)), None)
        return self._found[module]

    def _matches(self, matcher: _Plain | _Automaton, module: str) -> bool:
        matched, steps = matcher.match(module)
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise UnsafeCheckpoint(
                f"{self._source}: the patterns would take too long to match against the modules; "
                "write plain module names in their place"
            )
        return matched


def _matcher(pattern: str, source: str) -> _Plain | _Automaton:
    if len(pattern) > _LONGEST:
        raise UnsafeCheckpoint(f"{source}: pattern {shown(pattern)} has {len(pattern)} characters, over {_LONGEST}")
    if _PLAIN.fullmatch(pattern):
        return _Plain(pattern)
    return _compile(pattern, source)


class _Plain:
    """A pattern without alternatives or repeats: a name, in which a bare dot stands for any character."""

    def __init__(self, pattern: str) -> None:
        characters = re.findall(r"\\?.", pattern)
        self._characters = [None if c == "." else c[-1] for c in characters]
        self._literal = "".join(c or "." for c in self._characters)
        self._exact = None not in self._characters

    def match(self, module: str) -> tuple[bool, int]:
        start = len(module) - len(self._literal)
        if start < 0 or (start > 0 and module[start - 1] != "."):
            return False, 1
        if module.endswith(self._literal):
            return True, 1
        if self._exact:
            return False, 1
        pairs = zip(module[start:], self._characters, strict=True)
        return all(want is None or have == want for have, want in pairs), 1 + len(self._literal) // 8


@dataclass
class _Automaton:
    """States with edges; an edge without a test costs no character. State 0 starts, state 1 accepts."""

    edges: list[list[tuple[Test | None, int]]]
    only_whole_names: bool

    def match(self, module: str) -> tuple[bool, int]:
        """Whether the pattern matches the end of a path from a segment on, and how many steps that took."""
        steps = 1
        states = self._closure({0})
        for i, character in enumerate(module):
            after = set()
            for state in states:
                steps += 2 * len(self.edges[state])  # an edge costs twice what a failing name does
                after |= {to for test, to in self.edges[state] if test is not None and test(character)}
            # A match may begin after any dot.
            if character == "." and i + 1 < len(module) and not self.only_whole_names:
                after.add(0)
            states = self._closure(after)
            if steps > _MOST_STEPS or (self.only_whole_names and not states):
                return False, steps
        return 1 in states, steps

    def _closure(self, states: set[int]) -> set[int]:
        reached, queue = set(states), list(states)
        while queue:
            for test, to in self.edges[queue.pop()]:
                if test is None and to not in reached:
                    reached.add(to)
                    queue.append(to)
        return reached


# A parsed pattern: a test of one character, a sequence, alternatives, or a repeat with its least and most.
@dataclass(frozen=True)
class _Character:
    test: Test


@dataclass(frozen=True)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclass(frozen=True)
class _Choice:
    branches: tuple[_Node, ...]


@dataclass(frozen=True)
class _Repeat:
    part: _Node
    least: int
    most: int | None


_Node = _Character | _Sequence | _Choice | _Repeat


def _compile(pattern: str, source: str) -> _Automaton:
    try:
        re.compile(f"({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise UnsafeCheckpoint(f"{source}: {shown(pattern)} is no regular expression: {error}") from None
    anchored = pattern.startswith("^")
    text = pattern.removeprefix("^")
    text = text[:-1] if text.endswith("$") and not text.endswith("\\$") else text
    if anchored and "|" in text:
        # "^a|b" anchors "a" alone; which of the two was meant cannot be told.
        raise _unsupported(pattern, source)
    builder = _Builder(pattern, source)
    builder.connect(_Parser(text, pattern, source).parse(), 0, 1)
    return _Automaton(builder.edges, anchored)


def _unsupported(pattern: str, source: str) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"{source}: pattern {shown(pattern)} needs more than groups, alternatives, character sets and repeats; "
        "write the modules' names in its place"
    )


class _Parser:
    """Recursive descent over a pattern that `re` has already found well formed."""

    def __init__(self, text: str, pattern: str, source: str) -> None:
        self.text, self.pattern, self.source = text, pattern, source
        self.at = 0

    def parse(self) -> _Node:
        node = self._choice(0)
        if self.at < len(self.text):
            raise _unsupported(self.pattern, self.source)
        return node

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _choice(self, depth: int) -> _Node:
        if depth > _DEEPEST:
            raise _unsupported(self.pattern, self.source)
        branches = [self._sequence(depth)]
        while self._peek() == "|":
            self.at += 1
            branches.append(self._sequence(depth))
        return branches[0] if len(branches) == 1 else _Choice(tuple(branches))

    def _sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom(depth)))
        return _Sequence(tuple(parts))

    def _atom(self, depth: int) -> _Node:
        character = self._peek()
        if character == "(":
            self.at += 3 if self.text.startswith("(?:", self.at) else 1
            if self._peek() == "?" or self.text.startswith("(?", self.at):
                raise _unsupported(self.pattern, self.source)
            node = self._choice(depth + 1)
            if self._peek() != ")":
                raise _unsupported(self.pattern, self.source)
            self.at += 1
            return node
        start = self.at
        if character == "[":
            self.at = self._end_of_set()
        elif character == "\\":
            self.at += 2
            escaped = self.text[start + 1 : self.at]
            if escaped.isalnum() and escaped not in "dDwWsS":
                raise _unsupported(self.pattern, self.source)
        elif character in _SPECIAL:
            raise _unsupported(self.pattern, self.source)
        else:
            self.at += 1
        return _Character(re.compile(self.text[start : self.at]).fullmatch)

    def _end_of_set(self) -> int:
        at = self.at + (2 if self.text.startswith("[^", self.at) else 1)
        at += self.text.startswith("]", at)  # a bracket in first place is one of the set
        while self.text[at] != "]":
            at += 2 if self.text[at] == "\\" else 1
        return at + 1

    def _repeated(self, atom: _Node) -> _Node:
        bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        counted = _REPEAT.match(self.text, self.at)
        if self._peek() in bounds and self._peek():
            least, most = bounds[self._peek()]
            self.at += 1
        elif counted:
            least = int(counted[1])
            most = least if not counted[2] else int(counted[3]) if counted[3] else None
            self.at = counted.end()
        else:
            return atom
        if self._peek() == "?":  # lazy: the same strings match
            self.at += 1
        elif self._peek() == "+":
            raise _unsupported(self.pattern, self.source)
        return _Repeat(atom, least, most)


class _Builder:
    """Thompson's construction: a fragment of automaton between two states for each node."""

    def __init__(self, pattern: str, source: str) -> None:
        self.pattern, self.source = pattern, source
        self.edges: list[list[tuple[Test | None, int]]] = [[], []]

    def connect(self, node: _Node, start: int, end: int) -> None:
        """Add the edges that lead from `start` to `end` over what `node` matches."""
        match node:
            case _Character(test):
                self.edges[start].append((test, end))
            case _Choice(branches):
                for branch in branches:
                    self.connect(branch, start, end)
            case _Sequence(parts):
                self._chain(parts, start, end)
            case _Repeat(part, least, None):
                loop = self._state()
                self._chain((part,) * least, start, loop)
                after = self._state()
                self.connect(part, loop, after)
                self.edges[after].append((None, loop))
                self.edges[loop].append((None, end))
            case _Repeat(part, least, most):
                here = self._state()
                self._chain((part,) * least, start, here)
                for _ in range((most or 0) - least):
                    self.edges[here].append((None, end))
                    following = self._state()
                    self.connect(part, here, following)
                    here = following
                self.edges[here].append((None, end))

    def _chain(self, parts: tuple[_Node, ...], start: int, end: int) -> None:
        for part in parts:
            following = self._state()
            self.connect(part, start, following)
            start = following
        self.edges[start].append((None, end))

    def _state(self) -> int:
        if len(self.edges) >= _MOST_STATES:
            raise UnsafeCheckpoint(f"{self.source}: pattern {shown(self.pattern)} repeats too much to be genuine")
        self.edges.append([])
        return len(self.edges) - 1
