"""Tasks from files, folders and data sets; batches as functions of their number; and what bad files get."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from spectra.errors import CheckpointNotFound, UsageError
from spectra.examples import fetch
from spectra.train.batches import TextBatches, WindowBatches, batches, held_out
from spectra.train.data import Split, Task, load_task
from tests.train.saved import reviews

ROWS = reviews(100)


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("label", "text")) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def texts(task: Task) -> set[str]:
    return {*task.train.texts, *task.test.texts}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "csv.gz", "csv.bz2"])
def test_one_task_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"reviews.{kind}"
    table = "label,text\n" + "".join(f"{label},{text}\n" for label, text in ROWS)
    contents = {
        "csv": table.encode(),
        "tsv": table.replace(",", "\t").encode(),
        "jsonl": "".join(json.dumps({"text": text, "label": label}) + "\n" for label, text in ROWS).encode(),
        "csv.gz": gzip.compress(table.encode()),
        "csv.bz2": bz2.compress(table.encode()),
    }
    path.write_bytes(contents[kind])
    task = load_task(str(path))
    assert texts(task) == {text for _, text in ROWS}
    assert task.label_names == ("neg", "pos")
    by_text = dict(zip(task.train.texts, task.train.labels, strict=True))
    assert all(task.label_names[by_text[text]] == label for label, text in ROWS if text in by_text)


def test_the_cut_is_the_same_whenever_it_is_made_and_no_text_is_on_both_sides(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [*ROWS, *ROWS[:10], ("pos", ""), ("neg", "   ")])
    one, two = load_task(str(path)), load_task(str(path))
    assert one == two
    assert not set(one.train.texts) & set(one.test.texts)
    assert len(one.test) == 20
    assert one.notes == ("2 empty texts left out of those given", "10 repeated texts left out of those given")


def test_quotes_and_newlines_of_a_csv_stay_in_a_tsv_they_are_letters(tmp_path: Path) -> None:
    rows = [("a", 'he said "no",\nand left'), *((label, text) for label, text in ROWS)]
    assert 'he said "no",\nand left' in texts(load_task(str(write_csv(tmp_path / "a.csv", rows)), labels=["a", "pos"]))
    (tmp_path / "b.tsv").write_text('label\ttext\na\t"odd quote\n' + "".join(f"b\t{text}\n" for _, text in ROWS))
    assert '"odd quote' in texts(load_task(str(tmp_path / "b.tsv")))


def test_a_second_file_is_tested_on_and_its_repetitions_of_the_first_are_left_out(tmp_path: Path) -> None:
    train, test = ROWS[:60], [*ROWS[60:], ROWS[0]]
    task = load_task(str(write_csv(tmp_path / "a.csv", train)), test=str(write_csv(tmp_path / "b.csv", test)))
    assert set(task.train.texts) == {text for _, text in train}
    assert set(task.test.texts) == {text for _, text in ROWS[60:]}
    assert "1 repeated texts left out of those held out" in task.notes


def test_labels_are_ordered_by_number_where_they_are_numbers(tmp_path: Path) -> None:
    rows = [(str(i % 11), text) for i, (_, text) in enumerate(ROWS)]
    assert load_task(str(write_csv(tmp_path / "a.csv", rows))).label_names == tuple(map(str, range(11)))


def test_chosen_labels_keep_their_order(tmp_path: Path) -> None:
    rows = [(("x", "y", "z")[i % 3], text) for i, (_, text) in enumerate(ROWS)]
    task = load_task(str(write_csv(tmp_path / "a.csv", rows)), labels=["z", "x"])
    assert task.label_names == ("z", "x")
    assert f"{sum(label == 'y' for label, _ in rows)} rows with other labels left out" in task.notes


def test_unusual_columns_are_named(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS, header=("stars", "words"))
    with pytest.raises(UsageError, match=r"no text column; its columns are 'stars', 'words'.*--text-column"):
        load_task(str(path))
    with pytest.raises(UsageError, match="no column 'word'; its columns are"):
        load_task(str(path), text_column="word")
    assert len(texts(load_task(str(path), text_column="words", label_column="stars"))) == len({t for _, t in ROWS})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"label,text\n", "holds no row of text"),
        ("a.jsonl", b"\n\n", "holds no row of text"),
        ("a.csv", b"label,text\npos,good,more\n", r"a\.csv:2: 3 fields under 2 columns"),
        ("a.csv", b'label,text\npos,"good\n', r"a\.csv:2: malformed"),
        ("a.csv", b"label,text\npos,\xff\xfe\n", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"', r"a\.jsonl:1: not JSON"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"text": 5, "label": "a"}', r"a\.jsonl:1: 'text' holds int, not a text"),
        ("a.jsonl", b'{"text": "a", "label": 0.5}', r"'label' holds float, not a label"),
        ("a.csv", b"label,text\n,good\n", r"a\.csv:2: 'label' holds nothing"),
        ("a.csv.gz", b"no gzip", "cannot be read"),
        ("a.txt", b"  \n", "the file is empty"),
        ("a.csv", b"label,text\n" + b"".join(b"pos,t%d\n" % i for i in range(9)), "every text has the label 'pos'"),
        ("a.csv", b"label,text\n" + b"".join(b"%d,t%d\n" % (i, i) for i in range(99)), "99 different labels among 99"),
        ("a.csv", b"label,text\na,x\nb,y\n", "too few to hold some out"),
        ("a.parquet", b"x", "not a table of texts"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said) as raised:
        load_task(str(tmp_path / name))
    assert name in str(raised.value)


def test_unknown_labels_are_told_beside_those_there_are(tmp_path: Path) -> None:
    path = str(write_csv(tmp_path / "a.csv", ROWS))
    with pytest.raises(UsageError, match="unknown label 'fresh'; its labels are 'neg', 'pos'"):
        load_task(path, labels=["pos", "fresh"])
    other = str(write_csv(tmp_path / "b.csv", [("good", "a text of its own")]))
    with pytest.raises(UsageError, match=r"b\.csv:2: unknown label 'good'; the texts to train on have 'neg', 'pos'"):
        load_task(path, test=other)


def test_a_name_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder; the built-in tasks are rotten-tomatoes, shakespeare"):
        load_task(str(tmp_path / "absent.csv"))
    with pytest.raises(UsageError, match="not fetched offline"):
        load_task("org/set", offline=True)


class Table:
    """What is used of `datasets.Dataset`."""

    def __init__(self, rows: list[tuple[int, str]], names: list[str] | None) -> None:
        self.column_names = ["sentence", "label"]
        self.features = {"label": SimpleNamespace(names=names) if names else SimpleNamespace()}
        self._columns = {"sentence": [text for _, text in rows], "label": [label for label, _ in rows]}

    def __getitem__(self, column: str) -> list[Any]:
        return self._columns[column]


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, revision: str | None) -> dict[str, Table]:
        asked.append((name, revision))
        if name == "org/none":
            raise ConnectionError("the hub is not reachable")
        rows = [(int(label == "pos"), text) for label, text in ROWS]
        hidden = [(-1, f"hidden {i}") for i in range(9)]
        return {
            "train": Table(rows[:70], ["no", "yes"]),
            "test": Table(hidden, ["no", "yes"]),
            "validation": Table(rows[70:], ["no", "yes"]),
        }

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    task = load_task("org/set@main")
    assert asked == [("org/set", "main")]
    assert task.label_names == ("no", "yes")
    assert set(task.test.texts) == {text for _, text in ROWS[70:]} - set(task.train.texts)
    with pytest.raises(UsageError, match=r"org/none: no such file, no built-in task.*the hub is not reachable"):
        load_task("org/none")


def test_documents_are_held_out_whole_where_there_are_many(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 5)
    task = load_task(str(tmp_path))
    assert task.kind == "language"
    assert (len(task.train), len(task.test)) == (18, 2)
    assert not set(task.train.texts) & set(task.test.texts)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("abcdefghij")
    alone = load_task(str(tmp_path / "one"))
    assert (alone.train.texts, alone.test.texts) == (("abcdefghi",), ("j",))
    with pytest.raises(UsageError, match="has no majority label"):
        _ = alone.majority


def test_the_built_in_tasks() -> None:
    try:
        fetch("rotten-tomatoes"), fetch("shakespeare")
    except CheckpointNotFound as error:
        pytest.skip(str(error))
    films = load_task("rotten-tomatoes")
    assert films.label_names == ("rotten", "fresh")
    # 12 808 reviews, 56 of them repetitions: a set of the file's texts has as many.
    assert len(films.train) + len(films.test) == 12752
    assert len(load_task("rotten-tomatoes", limit=64).train) == 64
    plays = load_task("shakespeare")
    assert (len(plays.train), len(plays.test)) == (38, 4)


def stream(count: int = 10, size: int = 4, seed: int | None = 0) -> TextBatches:
    rows = [[i + 1] * (1 + i % 5) for i in range(count)]
    return TextBatches(rows, [i % 2 for i in range(count)], size=size, pad=0, seed=seed)


def test_a_batch_is_a_function_of_its_number() -> None:
    one, two = stream(), stream()
    _ = [two[step] for step in (7, 0, 3)]
    for step in (0, 3, 12):
        for name, tensor in one[step].items():
            assert torch.equal(tensor, two[step][name])
    with pytest.raises(IndexError):
        one[-1]


def test_every_epoch_shows_every_text_once_in_another_order() -> None:
    batched = stream(10, 4)
    shown = torch.cat([batched[step]["input_ids"][:, 0] for step in range(5)]).tolist()  # 20 texts: two epochs
    first, second = shown[:10], shown[10:]
    assert sorted(first) == sorted(second) == list(range(1, 11))
    assert first != second
    assert torch.cat([stream(seed=1)[s]["input_ids"][:, 0] for s in range(3)]).tolist()[:10] != first
    assert batched.epoch == 2.5


def test_padding_gets_no_attention_and_the_labels_go_with_their_texts() -> None:
    batch = stream(10, 4)[0]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 8)
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
    assert torch.equal(batch["labels"], (batch["input_ids"][:, 0] - 1) % 2)


def test_once_shows_every_text_once() -> None:
    shown = [row for batch in stream(10, 4, None).once() for row in batch["input_ids"][:, 0].tolist()]
    assert sorted(shown) == list(range(1, 11))


def test_windows_cover_the_stream_without_overlap() -> None:
    windows = WindowBatches(torch.arange(103), size=3, length=10, seed=0)
    seen = torch.cat([windows[step]["input_ids"].flatten() for step in range(3)])  # 9 windows: an epoch
    assert windows.epoch == 3.0
    assert len(set(seen.tolist())) == 90
    assert torch.equal(windows[0]["labels"], windows[0]["input_ids"])
    assert not torch.equal(windows[0]["input_ids"], windows[3]["input_ids"])
    assert sum(len(batch["input_ids"]) for batch in windows.once()) == 10
    with pytest.raises(UsageError, match="15 tokens of text are too few for windows of 10"):
        WindowBatches(torch.arange(15), size=1, length=10, seed=0)


class Letters:
    """What is used of a tokenizer: one token a letter."""

    pad_token_id: int | None = None
    eos_token_id: int | None = 1

    def __call__(self, texts: list[str], *, max_length: int | None = None, **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text][:max_length] for text in texts]}


def test_texts_are_cut_and_padded_with_the_end_where_there_is_no_padding_token() -> None:
    task = Task(
        "t", "classification", Split(("abcdefghijkl", "ab"), (0, 1)), Split(("z", "yy", "x"), (0, 1, 0)), ("a", "b")
    )
    batch = batches(task, Letters(), size=2, length=5, seed=0)[0]
    assert sorted(batch["attention_mask"].sum(dim=1).tolist()) == [2, 5]
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {1}
    tested = list(held_out(task, Letters(), size=2, length=5).once())
    assert [batch["labels"].tolist() for batch in tested] == [[0, 0], [1]]  # short texts first
    assert len(list(held_out(task, Letters(), size=2, limit=2).once())) == 1


def test_documents_are_joined_by_the_end_of_text() -> None:
    task = Task("t", "language", Split(("abc", "def")), Split(("abc", "xyz" * 9)))
    tested = [batch["input_ids"].tolist() for batch in held_out(task, Letters(), size=1, length=4, limit=3).once()]
    assert tested[0] == [[97, 98, 99, 1]]
    assert len(tested) == 3
    assert batches(task, Letters(), size=1, length=2)[0]["input_ids"].shape == (1, 2)
    with pytest.raises(UsageError, match="at least 1 and 2 are needed"):
        batches(task, Letters(), size=0)
