"""Seeded fuzzing of headers and indices: every outcome is a checked header or an error of ours, at once.

`fuzz_headers` and `fuzz_indices` take the number of cases, so that ``make fuzz`` runs the long campaign:
``python tests/checkpoints/test_headers_fuzz.py 200000 50000``.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from spectra.checkpoints.element_types import BITS
from spectra.checkpoints.folder import check_weight_map
from spectra.checkpoints.safetensors import parse_header
from spectra.checkpoints.strict_json import parse_object
from spectra.errors import SpectraError

SLOWEST = 1.0  # seconds a case
HOSTILE: list[Any] = [
    *(
        0,
        1,
        -1,
        True,
        False,
        None,
        2**31,
        2**32,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "F32",
        "F4",
        "f32",
        "BOOL",
        "..",
        "/etc/passwd",
        "\\\\host\\x",
        "a\0b",
        "\ud800",
        "\u202e<script>",
        "x" * 5000,
    ),
    *([], {}, [0], [2**40, 0], [2**62] * 50, [[[]]], {"dtype": "F32"}, {"a": {"b": 1}}),
]
BYTES = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\\ud800",
    b"\xff",
    b"\0",
    b"-",
    b"9" * 5000,
    b"[" * 5000,
    b" ",
]


def valid_header(rng: random.Random) -> tuple[dict[str, Any], int]:
    """A header as safetensors writes it, and how many bytes of data follow it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if rng.random() < 0.3 else {}
    position = 0
    for index in range(rng.randrange(5)):
        dtype = rng.choice(sorted(BITS))
        shape = [rng.choice([0, 1, 2, 4, 8]) for _ in range(rng.randrange(4))]
        bits = BITS[dtype]
        for axis in shape:
            bits *= axis
        if bits % 8:
            continue
        header[f"layer.{index}.weight"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [position, position + bits // 8],
        }
        position += bits // 8
    return header, position


def hostile(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(HOSTILE))


def containers(value: Any) -> list[Any]:
    """Every dict and list inside a JSON value, itself included."""
    found = [value] if isinstance(value, dict | list) else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return found + [deeper for child in inner for deeper in containers(child)]


def mutate_value(value: Any, rng: random.Random) -> None:
    """Change, add or remove something anywhere in a JSON value, in place."""
    target = rng.choice(containers(value))
    if isinstance(target, list):
        if target and rng.random() < 0.7:
            at = rng.randrange(len(target))
            old = target[at]
            target[at] = old + rng.choice([-8, -1, 1, 8]) if type(old) is int and rng.random() < 0.5 else hostile(rng)
        elif target and rng.random() < 0.5:
            target.pop()
        else:
            target.append(hostile(rng))
        return
    key = rng.choice([*target, "__metadata__", "dtype", "shape", "\u202e", "x"])
    if rng.random() < 0.3:
        target.pop(key, None)
    elif rng.random() < 0.3 and target:
        target[key] = copy.deepcopy(target[rng.choice(list(target))])
    else:
        target[key] = hostile(rng)


def mutate_text(text: bytes, rng: random.Random) -> bytes:
    """Cut, double, flip or insert bytes."""
    begin, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    kind = rng.randrange(4)
    if kind == 0:
        return text[:begin] + text[end:]
    if kind == 1:
        return text[:end] + text[begin:end] + text[end:]
    if kind == 2:
        return text[:begin] + bytes([rng.randrange(256)]) + text[begin + 1 :]
    return text[:begin] + rng.choice(BYTES) + text[begin:]


def damaged(value: dict[str, Any], rng: random.Random) -> bytes:
    for _ in range(rng.randrange(4)):
        mutate_value(value, rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 0, 1, 2])):
        text = mutate_text(text, rng)
    return text


def timed(check: Callable[[], object], outcomes: Counter[str], case: object) -> bool:
    """Run one case: True where it was accepted; anything but an error of ours, or a second's wait, fails."""
    begun = time.perf_counter()
    try:
        check()
        accepted = True
    except SpectraError:
        accepted = False
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} on {case!r}") from error
    assert time.perf_counter() - begun < SLOWEST, f"over {SLOWEST} s on {case!r}"
    outcomes["accepted" if accepted else "refused"] += 1
    return accepted


def fuzz_headers(cases: int, *, seed: int = 0) -> Counter[str]:
    """Damage headers; what is accepted must also satisfy safetensors' own reader."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for _ in range(cases):
        header, data_bytes = valid_header(rng)
        text = damaged(header, rng)
        data_bytes = max(0, data_bytes + rng.choice([0, 0, 0, 0, 0, -1, 1]))
        if timed(lambda text=text, size=data_bytes: parse_header(text, data_bytes=size, file="file"), outcomes, text):
            outcomes[agreement(text, data_bytes)] += 1
    return outcomes


def agreement(text: bytes, data_bytes: int) -> str:
    """Whether safetensors accepts what was accepted here, and finds the same tensors."""
    ours = parse_header(text, data_bytes=data_bytes, file="file").infos
    try:
        peer = dict(safetensors.deserialize(len(text).to_bytes(8, "little") + text + bytes(data_bytes)))
    except safetensors.SafetensorError as error:
        # Known to be readable here and not there: element types newer than safetensors, which only get listed.
        if any(info.dtype not in BITS for info in ours.values()):
            return "newer type"
        raise AssertionError(f"safetensors refuses what was accepted: {text!r}") from error
    assert {name: (found["dtype"], tuple(found["shape"]), len(found["data"])) for name, found in peer.items()} == {
        name: (info.dtype, info.shape, info.nbytes) for name, info in ours.items()
    }, text
    return "agreed"


def fuzz_indices(cases: int, *, seed: int = 0) -> Counter[str]:
    """Damage indices; every file name that is accepted is a plain one inside the folder."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    steps = ["model-00001-of-00002.safetensors", "sub", "..", ".", "", "\\", "C:", "~", "x.safetensors", "\0", " "]
    for _ in range(cases):
        weight_map: dict[str, Any] = {
            f"layer.{index}": "/".join(rng.choices(steps, k=rng.choice([1, 1, 1, 2, 3])))
            for index in range(rng.randrange(4))
        }
        if rng.random() < 0.5:
            weight_map = dict.fromkeys(weight_map, steps[0])
        text = damaged({"metadata": {"total_size": 1}, "weight_map": weight_map}, rng)
        accepted: dict[str, str] = {}

        def check(text: bytes = text, accepted: dict[str, str] = accepted) -> None:
            accepted |= check_weight_map(parse_object(text, "index").get("weight_map"), "index")

        timed(check, outcomes, text)
        for file in accepted.values():
            parts = file.split("/")
            assert parts[-1].endswith(".safetensors"), text
            assert not {"..", ".", ""} & set(parts), text
            assert not set("\\:\0") & set(file), text
    return outcomes


def test_headers() -> None:
    outcomes = fuzz_headers(4000)
    assert outcomes["agreed"] > 400, outcomes
    assert outcomes["refused"] > 1000, outcomes


def test_indices() -> None:
    outcomes = fuzz_indices(2000)
    assert outcomes["accepted"] > 100, outcomes
    assert outcomes["refused"] > 500, outcomes


def test_undamaged_headers_are_all_accepted() -> None:
    rng = random.Random(1)
    for _ in range(500):
        header, data_bytes = valid_header(rng)
        text = json.dumps(header).encode()
        assert len(parse_header(text, data_bytes=data_bytes, file="file").infos) == len(
            header.keys() - {"__metadata__"}
        )


def test_what_safetensors_writes_is_accepted() -> None:
    content = safetensors.torch.save({"ü\u202e": torch.zeros(2, 3), "x": torch.zeros(0)}, metadata={"a": "b"})
    length = int.from_bytes(content[:8], "little")
    header = parse_header(content[8 : 8 + length], data_bytes=len(content) - 8 - length, file="file")
    assert set(header.infos) == {"ü\u202e", "x"}


def test_the_fuzzer_can_fail() -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError on 'case'"):
        timed(lambda: 1 / 0, Counter(), "case")


if __name__ == "__main__":
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("headers:", dict(fuzz_headers(int(sys.argv[1]))))
    print("indices:", dict(fuzz_indices(int(sys.argv[2]))))
    print("peak memory grew by", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, "MiB")
