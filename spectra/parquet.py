"""A result as one Parquet file: rows, and where they came from in its metadata; written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spectra.errors import CheckpointNotFound, UnsafeCheckpoint

_INFO_KEY = b"spectra"


def write_table(table: pa.Table, info: Mapping[str, Any], path: Path) -> Path:
    """Write a table and its info, atomically; the same table and info give the same bytes.

    Parameters
    ----------
    table : pyarrow.Table
    info : mapping
        JSON-able.
    path : Path
        Of the file; its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata({_INFO_KEY: json.dumps(info, sort_keys=True).encode()})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".spectra-")
    os.close(handle)
    try:
        pq.write_table(table, temporary, compression="zstd")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def read_table(folder: str | os.PathLike[str], name: str, *, kind: str) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table and its info back, from its folder or from the file itself.

    Parameters
    ----------
    folder : path
    name : str
        Of the file in a folder.
    kind : str
        What a message calls it: ``"run"``, ``"geometry"``.

    Raises
    ------
    CheckpointNotFound
        If there is none.
    UnsafeCheckpoint
        If the file was not written by `write_table`.
    """
    path = Path(folder)
    path = path / name if path.is_dir() else path
    if not path.is_file():
        raise CheckpointNotFound(f"{path}: no {kind} is saved there; python -m spectra.report writes one")
    try:
        table = pq.read_table(path)
        return table, json.loads((table.schema.metadata or {})[_INFO_KEY])
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise UnsafeCheckpoint(f"{path} is not a {kind} of this program: {error}") from error
