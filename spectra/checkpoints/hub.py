"""Checkpoints on the Hugging Face hub: revision to commit first, then only the files that hold the weights."""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spectra.checkpoints.folder import PICKLES, SAFETENSORS, choose, contained, read_index
from spectra.errors import CheckpointError, CheckpointNotFound, SpectraError

_ID = re.compile(r"(?P<repo>\w[\w.-]{0,95}(/\w[\w.-]{0,95})?)(@(?P<revision>[\w][\w./-]{0,254}))?", re.ASCII)
TIMEOUT = 30.0  # seconds for the first answer; a hub that is up gives it in well under one
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
# What a mistyped local path ends in, and no repository's name does.
_FILE_ENDINGS = (*SAFETENSORS, *PICKLES, ".json", ".gguf", ".onnx", ".h5", ".npz", ".msgpack")


@dataclass(frozen=True)
class Snapshot:
    """A commit's files on this machine.

    Attributes
    ----------
    folder : Path
        ``snapshots/<commit>`` in the hub's cache.
    commit : str
        Full commit hash.
    notes : tuple of str
        What a reader of the results should know about how it was found.
    """

    folder: Path
    commit: str
    notes: tuple[str, ...] = ()


def is_hub_id(ref: str) -> bool:
    """Whether a string can be a hub id rather than a path.

    Examples
    --------
    >>> [is_hub_id(ref) for ref in ("org/name@main", "gpt2", "./name", "folder/model.safetensors", "a/b/c")]
    [True, True, False, False, False]
    """
    match = _ID.fullmatch(ref)
    return match is not None and not any(mark in ref for mark in ("..", "--")) and not ref.endswith(_FILE_ENDINGS)


def fetch(
    ref: str,
    *,
    trust_pickle: bool = False,
    offline: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Snapshot:
    """Find or download the files of a hub id that hold its weights.

    Parameters
    ----------
    ref : str
        ``"name"``, ``"org/name"``, either with ``"@revision"``: a branch, tag or commit; ``main`` by default.
    trust_pickle : bool
        Whether pickles may be fetched where there are no safetensors.
    offline : bool
        Look only into the cache; implied by ``HF_HUB_OFFLINE``.
    cache_dir : path, optional
        The hub's cache; by default huggingface_hub's own.

    Raises
    ------
    CheckpointNotFound
        No such repository, revision or weights; or, offline, none in the cache.
    UnsafeCheckpoint
        The index names files outside the repository, or there are only pickles, which are not trusted.
    CheckpointError
        The repository is gated, or the hub cannot be reached.
    """
    from huggingface_hub import constants

    match = _ID.fullmatch(ref)
    if match is None:
        raise CheckpointNotFound(f"{ref!r} is no hub id (name, org/name, org/name@revision)")
    source = _Repository(match["repo"], match["revision"], None if cache_dir is None else os.fspath(cache_dir))
    if offline or constants.HF_HUB_OFFLINE:
        return source.cached()
    return source.download(trust_pickle=trust_pickle)


@dataclass(frozen=True)
class _Repository:
    repo: str
    revision: str | None
    cache_dir: str | None

    @property
    def id(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    def cached(self) -> Snapshot:
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            # No pattern matches: only the folder is asked for, for newer versions refuse one that is not whole.
            folder = self._snapshot([], local_files_only=True)
        except LocalEntryNotFoundError:
            revision = f" --revision {self.revision}" if self.revision else ""
            raise CheckpointNotFound(
                f"{self.id} is not in the hub's cache, and looking it up is switched off. "
                f"Fetch it once while online, with `hf download {self.repo}{revision}`, or leave out --offline "
                "and HF_HUB_OFFLINE."
            ) from None
        return Snapshot(folder, folder.name)

    def download(self, *, trust_pickle: bool) -> Snapshot:
        try:
            return self._download(trust_pickle=trust_pickle)
        except SpectraError:
            raise
        except Exception as error:  # requests (huggingface_hub < 1) and httpx share no base class
            return self._without(error)

    def _download(self, *, trust_pickle: bool) -> Snapshot:
        commit, names = self._list()
        choice = choose(names, trust_pickle=trust_pickle, where=self.id)
        small = [name for name in ("config.json", "adapter_config.json", choice.index) if name in names]
        folder = self._snapshot([*small, *choice.files])
        if folder.name != commit:
            raise CheckpointError(f"{self.id} was changed on the hub while it was fetched; try again")
        if choice.index is not None:
            endings = SAFETENSORS if choice.kind == "safetensors" else PICKLES
            weight_map = read_index(contained(folder, choice.index), endings=endings)
            self._snapshot(sorted(set(weight_map.values())))
        return Snapshot(folder, commit)

    def _list(self) -> tuple[str, list[str]]:
        """Commit of the revision, and the names of its files."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(self.repo, revision=self.revision, timeout=TIMEOUT)
        if info.sha is None:
            raise CheckpointError(f"the hub does not say which commit {self.id} is; name one as org/name@commit")
        return info.sha, [file.rfilename for file in info.siblings or []]

    def _snapshot(self, names: Sequence[str], *, local_files_only: bool = False) -> Path:
        from huggingface_hub import snapshot_download

        # The revision is passed as the user gave it, not as a commit: only then does the cache remember what it stood
        # for, and a later run can be offline.
        folder = snapshot_download(
            self.repo,
            revision=self.revision,
            cache_dir=self.cache_dir,
            allow_patterns=[glob.escape(name) for name in names],
            local_files_only=local_files_only,
        )
        return Path(folder)

    def _without(self, error: Exception) -> Snapshot:
        """What to do where the hub gave `error` instead of an answer: say why, or use the cache and say so."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        if isinstance(error, GatedRepoError):
            raise CheckpointError(
                f"{self.id} is gated: ask for access on its page on the hub, then log in with `hf auth login` "
                "or set HF_TOKEN"
            ) from error
        if isinstance(error, RevisionNotFoundError):
            raise CheckpointNotFound(f"{self.repo} has no revision {self.revision!r} on the hub") from error
        if isinstance(error, RepositoryNotFoundError):
            raise CheckpointNotFound(
                f"{self.repo!r} is neither a path on this machine nor a model on the hub. If it is private, log in "
                "with `hf auth login` or set HF_TOKEN."
            ) from error
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise CheckpointError(f"{self.id} cannot be stored in the hub's cache: {error}") from error
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        try:
            snapshot = self.cached()
        except CheckpointNotFound:
            raise CheckpointError(
                f"{self.id} is not on this machine, and the hub gave no answer ({reason}). Check the connection, or "
                "fetch the files on another machine and give their folder."
            ) from error
        return Snapshot(
            snapshot.folder,
            snapshot.commit,
            (f"the hub gave no answer ({reason}); the cached commit {snapshot.commit} was used",),
        )
