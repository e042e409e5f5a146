"""JSON that strangers wrote: size-limited, UTF-8, one object, no key twice, and never a bare Python error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spectra.errors import CheckpointError, CheckpointNotFound, UnsafeCheckpoint


def parse_object(data: bytes, source: str, *, unique: bool = True) -> dict[str, Any]:
    """Parse one JSON object.

    Parameters
    ----------
    data : bytes
        UTF-8 text.
    source : str
        What the bytes are, for messages: ``"model.safetensors: header"``.
    unique : bool
        Refuse what readers disagree on, so that no two of them see different checkpoints: a key that stands twice,
        and ``NaN`` and ``Infinity``, which Python writes and JSON does not have.

    Raises
    ------
    UnsafeCheckpoint
        The bytes are not UTF-8, not JSON, not an object, nested too deeply, or, where `unique`, ambiguous.

    Examples
    --------
    >>> parse_object(b'{"a": [1, 2]}', "example")
    {'a': [1, 2]}
    """
    try:
        text = data.decode("utf-8")
        value = (
            json.loads(text, object_pairs_hook=_unique_pairs, parse_constant=_no_constant)
            if unique
            else json.loads(text)
        )
    except _RepeatedKey as error:
        raise UnsafeCheckpoint(f"{source} has the key {shown(error.key)} twice") from None
    except RecursionError:
        raise UnsafeCheckpoint(f"{source} is nested too deeply to be genuine") from None
    except ValueError as error:  # also UnicodeDecodeError, JSONDecodeError and integers of over 4300 digits
        raise UnsafeCheckpoint(f"{source} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UnsafeCheckpoint(f"{source} is not a JSON object but a {type(value).__name__}")
    return value


def read_object(path: Path, *, limit: int, unique: bool = True) -> dict[str, Any]:
    """Read the JSON object in a file of at most `limit` bytes.

    Raises
    ------
    UnsafeCheckpoint
        The file is larger than `limit`, or its content fails `parse_object`.
    CheckpointNotFound, CheckpointError
        The file is missing, is no regular file, or cannot be read.
    """
    size = regular_size(path)
    if size > limit:
        raise UnsafeCheckpoint(f"{path} has {size} bytes; no genuine {path.name} needs over {limit}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_object(data, str(path), unique=unique)


def regular_size(path: Path) -> int:
    """Size of a regular file in bytes; a folder, pipe or device is refused before it is opened.

    Raises
    ------
    CheckpointNotFound
        Nothing stands at `path`.
    CheckpointError
        It is no regular file (opening a pipe would wait for ever), or may not be looked at.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CheckpointNotFound(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size


def shown(name: object, limit: int = 80) -> str:
    """A stranger's text as it may stand in a message: quoted, control characters escaped, cut to `limit`.

    Examples
    --------
    >>> shown("encoder.weight")
    "'encoder.weight'"
    """
    text = repr(name)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def is_unicode(name: str) -> bool:
    r"""Whether a name can be written to a file or terminal: JSON and pickles can spell lone surrogates, which cannot.

    Examples
    --------
    >>> is_unicode("größe"), is_unicode("\ud800")
    (True, False)
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _RepeatedKey(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKey(key)
            seen.add(key)
    return unique
