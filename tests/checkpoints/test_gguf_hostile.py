"""GGUF files that lie about themselves, are cut or mangled, or have no reader: refused by name, at once."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest

from spectra.checkpoints import gguf_header
from spectra.checkpoints.gguf_header import parse_gguf_header
from spectra.errors import SpectraError, UnsafeCheckpoint, UnsupportedFormat
from tests.checkpoints.gguf_files import LLAMA, TYPES, gguf, numbers, opened, write


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, shape: Iterable[int] = (2, 3), kind: int = 0, offset: int = 0) -> bytes:
    """One tensor of a header; the first axis is the one that is consecutive in memory."""
    axes = tuple(shape)
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


def raw(
    *tensors: bytes,
    metadata: Iterable[bytes] = (),
    data: bytes = bytes(32),
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of these parts, its data aligned."""
    entries = tuple(metadata)
    header = b"GGUF" + struct.pack("<I2Q", version, *(counts or (len(tensors), len(entries))))
    header += b"".join(entries) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


def number(key: str, value: int, kind: int = 4) -> bytes:
    return text(key) + struct.pack("<II", kind, value)


def array(key: str, kind: int, count: int, content: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, count) + content


FORTY_NINE = raw(metadata=[array("a", 0, 2**60)])[:49]  # the package's reader never comes back from it

LYING: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "does not begin as a GGUF file"),
    "four bytes": (b"GGUF", "does not begin as a GGUF file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
    "forty-nine bytes": (FORTY_NINE, "1152921504606846976 bytes or entries for 'a'"),
    "an endless array of texts": (raw(metadata=[array("a", 8, 2**60)]), "entries for 'a'"),
    "an endless text in an array": (raw(metadata=[array("a", 8, 1, struct.pack("<Q", 2**60))]), "for 'a'"),
    "an endless text": (raw(metadata=[text("a") + struct.pack("<IQ", 8, 2**60)]), "for 'a'"),
    "an endless key": (raw(metadata=[struct.pack("<Q", 2**60) + bytes(20)]), "bytes are left"),
    "endless metadata": (raw(counts=(0, 2**60)), "for metadata"),
    "endless tensors": (raw(counts=(2**60, 0)), "for tensors"),
    "all that 64 bits can count": (raw(counts=(2**64 - 1, 2**64 - 1)), "for metadata"),
    "an array of arrays": (raw(metadata=[array("a", 9, 1, bytes(12))]), "array of type 9"),
    "an unknown kind of value": (raw(metadata=[number("a", 1, kind=13)]), "type 13"),
    "a key twice": (raw(metadata=[number("a", 1), number("a", 2)]), "the key 'a' twice"),
    "a key that is no text": (raw(metadata=[struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8)]), "not UTF-8"),
    "a name that is no text": (raw(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(24)), "not UTF-8"),
    "a name twice": (raw(entry("a"), entry("a", offset=32), data=bytes(64)), "tensor 'a' is there twice"),
    "five axes": (raw(entry("a", (1, 1, 1, 1, 1))), "5 axes"),
    "endless axes": (raw(text("a") + struct.pack("<I", 2**32 - 1) + bytes(64)), "4294967295 axes"),
    "an empty axis": (raw(entry("a", (0, 2**40))), "no entries"),
    "a product past 64 bits": (raw(entry("a", (2**32, 2**32))), "'a' ends at byte"),
    "the largest axes": (raw(entry("a", (2**64 - 1,) * 4)), "'a' ends at byte"),
    "part of a block": (raw(entry("a", (33, 2), kind=2)), "no whole blocks of Q4_0"),
    "an offset past the end": (raw(entry("a", offset=2**40)), "'a' ends at byte"),
    "the largest offset": (raw(entry("a", offset=2**64 - 32)), "'a' ends at byte"),
    "an uneven offset": (raw(entry("a", offset=4)), "no multiple of 32"),
    "too little data": (raw(entry("a"), data=bytes(23)), "truncated"),
    "one inside the other": (raw(entry("a", (16, 1)), entry("b", offset=32), data=bytes(64)), "inside another's data"),
    "a gap": (raw(entry("a", offset=32), data=bytes(64)), "leaving a gap"),
    "bytes that belong to none": (raw(entry("a"), data=bytes(64)), "belong to none"),
    "an alignment of 3": (raw(entry("a"), metadata=[number("general.alignment", 3)]), "no power of two"),
    "an alignment of 0": (raw(entry("a"), metadata=[number("general.alignment", 0)]), "no power of two"),
}  # fmt: skip


@pytest.mark.parametrize("case", LYING)
def test_lying_header(tmp_path: Path, case: str) -> None:
    content, message = LYING[case]
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UnsafeCheckpoint) as caught:
        opened(tmp_path)
    assert caught.value.exit_code == 4
    assert message in str(caught.value)
    assert str(tmp_path / "model.gguf") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_hand_made_file_is_right_where_it_does_not_lie(tmp_path: Path) -> None:
    """Else the cases above could be refused for another reason than their own."""
    content = raw(entry("a"), entry("b", (32, 1), kind=2, offset=32), metadata=[number("n", 1)], data=bytes(50))
    (tmp_path / "model.gguf").write_bytes(content)
    assert {name: info.shape for name, info in opened(tmp_path).infos().items()} == {"a": (3, 2), "b": (1, 32)}
    assert len(FORTY_NINE) == 49


def test_a_header_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1000)
    path = tmp_path / "model.gguf"
    path.write_bytes(raw(metadata=[array("a", 0, 900, bytes(900))], data=b""))
    assert len(opened(path)) == 0
    path.write_bytes(raw(metadata=[array("a", 0, 1000, bytes(1000))], data=b""))
    with pytest.raises(UnsafeCheckpoint, match="no genuine one does"):
        opened(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw(version=1), "version 1"),
        (raw(version=4), "version 4"),
        (raw(version=3 << 24), "big-endian"),
        (raw(entry("a", kind=4)), "'a' is of type 4"),
        (raw(entry("a", kind=2**32 - 1)), "'a' is of type 4294967295"),
    ],
)
def test_what_has_no_reader_is_refused_with_the_way_out(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UnsupportedFormat) as caught:
        opened(tmp_path)
    assert message in str(caught.value)
    assert "onvert" in str(caught.value)


def test_big_endian_files_of_the_package_are_recognised(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", {"a": numbers(2, 3)}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedFormat, match="big-endian"):
        opened(path)


def test_every_truncation_and_mangling_is_an_error_or_a_header(tmp_path: Path) -> None:
    """Cut at every byte, and 4 000 headers with a few bytes changed: refused by name, or every tensor in the file."""
    quantized = gguf.quants.quantize(numbers(2, 32), TYPES.Q8_0)
    whole = write(
        tmp_path / "model.gguf",
        {"blk.0.attn_q.weight": numbers(8, 4), "w": (quantized, TYPES.Q8_0)},
        architecture="llama",
        metadata=LLAMA,
        more=lambda writer: writer.add_array("tokens", ["a", "bc", ""]),
    ).read_bytes()
    for length in range(len(whole) - 31):  # the last bytes may be those that fill to the alignment
        with pytest.raises(UnsafeCheckpoint):
            parse_gguf_header(io.BytesIO(whole[:length]), size=length, file="file")
    chance = random.Random(0)
    header = parse_gguf_header(io.BytesIO(whole), size=len(whole), file="file").nbytes
    messages, read = [], []
    for _ in range(4000):
        mangled = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 5))):
            mangled[chance.randrange(header)] = chance.choice((0, 1, 4, 8, 9, 127, 255, chance.randrange(256)))
        try:
            found = parse_gguf_header(io.BytesIO(mangled), size=len(mangled), file="file")
            assert all(0 < tensor.begin <= len(whole) - tensor.nbytes for tensor in found.tensors.values())
            read.append(bytes(mangled))
        except SpectraError as error:
            messages.append(str(error))
    assert all(message.isprintable() for message in messages)
    assert min(len(read), len(messages)) > 400  # neither way may be the only one
    for content in read[:40]:
        (tmp_path / "model.gguf").write_bytes(content)
        checkpoint = opened(tmp_path)
        assert all(checkpoint[name].shape == checkpoint.info(name).shape for name in checkpoint)
