"""Batches of token ids, each a function of its number alone: a resumed run reads on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from spectra.errors import UsageError
from spectra.train.data import Split, Task

__all__ = ["Batches", "TextBatches", "WindowBatches", "batches", "held_out"]

IGNORED = -100
"""Label of a position that has no loss (torch's and transformers' convention)."""

# Rows are padded to a multiple of this many tokens: fewer shapes to allocate for.
_MULTIPLE = 8


class Batches(Protocol):
    """What `batches` gives: ``batches[step]`` for every step ≥ 0, the same whenever it is asked."""

    @property
    def epoch(self) -> float:
        """Steps that show every text once."""
        ...

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]: ...


class TextBatches:
    """Labelled texts, shuffled anew every epoch.

    The stream of texts is cut into full batches: one that begins at the end of an epoch ends in the next.

    Parameters
    ----------
    rows : sequence of sequence of int
        Token ids of each text.
    labels : sequence of int
        Index of each text's label.
    size : int
        Texts a batch.
    pad : int
        Token id that fills a row up; it gets no attention.
    seed : int or None
        Seed of the shuffles; None keeps the order.

    Examples
    --------
    >>> stream = TextBatches([[5, 6], [7], [8, 9, 10]], [0, 1, 0], size=2, pad=0, seed=None)
    >>> stream[0]["input_ids"].shape, stream[0]["attention_mask"].sum(dim=1).tolist()
    (torch.Size([2, 8]), [2, 1])
    >>> stream[1]["labels"].tolist()
    [0, 0]
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], labels: Sequence[int], *, size: int, pad: int, seed: int | None
    ) -> None:
        if not rows:
            raise UsageError("there is no text to make batches of")
        self.rows = rows
        self.labels = labels
        self.size = size
        self.pad = pad
        self.seed = seed
        self._order: tuple[int, list[int]] | None = None

    @property
    def epoch(self) -> float:
        """Steps that show every text once."""
        return len(self.rows) / self.size

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Batch of a step: ``input_ids`` and ``attention_mask`` (size, length), ``labels`` (size,)."""
        first = _checked(step) * self.size
        return self._collate([self._text(position) for position in range(first, first + self.size)])

    def once(self) -> Iterator[dict[str, torch.Tensor]]:
        """Every text once, in order; the last batch may be smaller."""
        for first in range(0, len(self.rows), self.size):
            yield self._collate(list(range(first, min(first + self.size, len(self.rows)))))

    def _text(self, position: int) -> int:
        epoch, index = divmod(position, len(self.rows))
        if self.seed is None:
            return index
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, _shuffled(len(self.rows), self.seed, epoch))
        return self._order[1][index]

    def _collate(self, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
        longest = max(len(self.rows[i]) for i in chosen)
        width = -(-longest // _MULTIPLE) * _MULTIPLE
        ids = torch.full((len(chosen), width), self.pad, dtype=torch.long)
        mask = torch.zeros((len(chosen), width), dtype=torch.long)
        for place, i in enumerate(chosen):
            ids[place, : len(self.rows[i])] = torch.tensor(self.rows[i], dtype=torch.long)
            mask[place, : len(self.rows[i])] = 1
        labels = torch.tensor([self.labels[i] for i in chosen], dtype=torch.long)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class WindowBatches:
    """Windows of one long stream of tokens, for language modelling.

    Parameters
    ----------
    tokens : Tensor of shape (n,)
        The stream; only its whole windows are used, each epoch from another offset.
    size : int
        Windows a batch.
    length : int
        Tokens a window.
    seed : int or None
        Seed of offsets and shuffles; None keeps the order.

    Examples
    --------
    >>> WindowBatches(torch.arange(20), size=2, length=4, seed=None)[1]["input_ids"].tolist()
    [[8, 9, 10, 11], [12, 13, 14, 15]]
    """

    def __init__(self, tokens: torch.Tensor, *, size: int, length: int, seed: int | None) -> None:
        if len(tokens) < 2 * length:
            raise UsageError(
                f"{len(tokens)} tokens of text are too few for windows of {length}: give more text or shorter windows"
            )
        self.tokens = tokens
        self.size = size
        self.length = length
        self.seed = seed
        # One window fewer where the offset moves, so that every epoch has the same number.
        self._count = len(tokens) // length - (seed is not None)
        self._order: tuple[int, int, list[int]] | None = None

    @property
    def epoch(self) -> float:
        """Steps that show every window once."""
        return self._count / self.size

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Batch of a step: ``input_ids`` and ``labels``, (size, length), the same ids (the model shifts them)."""
        first = _checked(step) * self.size
        return self._collate([self._start(position) for position in range(first, first + self.size)])

    def once(self) -> Iterator[dict[str, torch.Tensor]]:
        """Every whole window once, in order; the last batch may be smaller."""
        starts = range(0, len(self.tokens) - self.length + 1, self.length)
        for first in range(0, len(starts), self.size):
            yield self._collate(list(starts[first : first + self.size]))

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self._count)
        if self.seed is None:
            return index * self.length
        if self._order is None or self._order[0] != epoch:
            offset = int(torch.randint(self.length, (1,), generator=_generator(self.seed, epoch)))
            self._order = (epoch, offset, _shuffled(self._count, self.seed, epoch))
        return self._order[1] + self._order[2][index] * self.length

    def _collate(self, starts: Sequence[int]) -> dict[str, torch.Tensor]:
        ids = torch.stack([self.tokens[start : start + self.length] for start in starts])
        return {"input_ids": ids, "labels": ids.clone()}


def batches(
    task: Task, tokenizer: Any, *, size: int = 32, length: int = 64, seed: int = 0
) -> TextBatches | WindowBatches:
    """Batches of a task's training texts.

    Parameters
    ----------
    task : Task
        From `spectra.train.data.load_task`.
    tokenizer : transformers tokenizer
        The model's.
    size : int
        Texts, or windows of text, a batch.
    length : int
        Tokens a text is cut at, or tokens a window.
    seed : int
        Seed of the order.

    Returns
    -------
    TextBatches or WindowBatches
        ``batches[step]`` is a dict of tensors that the model takes, the same whenever it is asked.

    Raises
    ------
    UsageError
        If a number is below one, or the text is too short.
    """
    return _of(task.train, task, tokenizer, size, length, seed)


def held_out(
    task: Task, tokenizer: Any, *, size: int = 32, length: int = 64, limit: int | None = None
) -> TextBatches | WindowBatches:
    """Batches of a task's held-out texts, short ones first; iterate over ``held_out(…).once()``.

    Parameters
    ----------
    task, tokenizer, size, length
        As `batches`.
    limit : int, optional
        Take this many texts or windows at most, the first of them: texts stand in shuffled order.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit = {limit}: at least one text is needed to test on")
    split = task.test
    if limit is not None and task.kind == "classification":
        split = Split(split.texts[:limit], split.labels[:limit])
    found = _of(split, task, tokenizer, size, length, None)
    if limit is not None and isinstance(found, WindowBatches):
        found.tokens = found.tokens[: max(2, limit) * length]
    return found


def _of(
    split: Split, task: Task, tokenizer: Any, size: int, length: int, seed: int | None
) -> TextBatches | WindowBatches:
    if size < 1 or length < 2:
        raise UsageError(f"batches of {size} texts of {length} tokens: at least 1 and 2 are needed")
    if task.kind == "language":
        return WindowBatches(_stream(split, tokenizer), size=size, length=length, seed=seed)
    rows = tokenizer(list(split.texts), truncation=True, max_length=length, padding=False)["input_ids"]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise UsageError("the model's tokenizer names neither a padding token nor an end of text to pad with")
    labels = split.labels
    if seed is None:  # texts of one length together: far less padding, and a mean does not mind the order
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        rows, labels = [rows[i] for i in order], tuple(labels[i] for i in order)
    return TextBatches(rows, labels, size=size, pad=int(pad), seed=seed)


def _stream(split: Split, tokenizer: Any) -> torch.Tensor:
    """All documents, an end-of-text token after each where the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    documents = tokenizer(list(split.texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in documents for token in (*ids, *end)], dtype=torch.long)


def _checked(step: int) -> int:
    if step < 0:
        raise IndexError(f"there is no batch {step}: steps count from 0")
    return step


def _generator(seed: int, epoch: int) -> torch.Generator:
    # A large odd multiplier keeps (seed, epoch) apart from (seed + 1, epoch − 1).
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=_generator(seed, epoch)).tolist()
    return order
