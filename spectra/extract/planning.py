"""`plan`: two checkpoints opened and paired, every tensor given its place, the rule checked; nothing is read yet."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from spectra.checkpoints import Adapter, Checkpoint
from spectra.checkpoints.checkpoint import listed
from spectra.checkpoints.names import Pairing
from spectra.delta import LowRankDelta, as_base, name_filter, opened, pair_checkpoints
from spectra.errors import MismatchError, UsageError
from spectra.extract.adapter_folder import check_folder
from spectra.extract.places import EMBEDDING_PLACES, REST_PLACES, Model, Place, find_places, model_of
from spectra.extract.ranks import Rule
from spectra.extract.weighting import NONE, Weighting, weighting_of
from spectra.inputs import LEAST_MATCH, check_device, mismatch_message
from spectra.inputs import check_folder as check_inputs
from spectra.moments import Moments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What an extraction would do.

    Parameters
    ----------
    base, tuned : Checkpoint or Adapter
    pairing : Pairing
    places : tuple of Place
        Every tensor that may have changed, and where it goes.
    model : Model
        The model that the adapter is for.
    rule : Rule
        How many directions each matrix keeps.
    out : Path
        Folder of the adapter.
    settings : dict
        Flags beside the rule.
    weighting : Weighting
        Moments of the matrices' inputs, where they are given.
    """

    base: Checkpoint
    tuned: Checkpoint | Adapter
    pairing: Pairing
    places: tuple[Place, ...]
    model: Model
    rule: Rule
    out: Path
    settings: dict[str, Any]
    weighting: Weighting = NONE

    @cached_property
    def matrices(self) -> tuple[Place, ...]:
        """Places that become factors."""
        return tuple(place for place in self.places if place.factored)

    @property
    def torch_dtype(self) -> torch.dtype:
        """What factors are stored in."""
        return DTYPES[self.settings["dtype"]]

    @property
    def base_name(self) -> str:
        """What the adapter calls its base: a hub id without its revision, or a path, absolute."""
        if self.base.revision:
            return str(self.base.ref).partition("@")[0]
        root = self.base.root
        return str((root if root.is_dir() else root.parent).absolute())

    @property
    def base_revision(self) -> str | None:
        """Commit of the base, where it came from a hub."""
        return self.base.revision

    @property
    def command(self) -> str:
        """The command line that does this."""
        words = ["python", "-m", "spectra.extract", str(self.base.ref), str(self.tuned.ref), "--out", str(self.out)]
        words += self.rule.words()
        for flag, value in self.settings.items():
            if value is True:
                words.append(f"--{flag.replace('_', '-')}")
            elif value not in (None, False, _DEFAULTS.get(flag)):
                words += [f"--{flag}", str(value)]
        return shlex.join(words)

    def lines(self) -> list[str]:
        """The plan in words, for a terminal."""
        counts = Counter(place.kind for place in self.places)
        said = [
            f"{self.pairing.matched} of {self.pairing.total} tensors match ({100 * self.pairing.share:.1f}\xa0%)",
            *self.pairing.transforms,
            f"rule: {self.rule}",
            f"task: {self.model.task_type or 'unknown, left out'}",
            *(f"  {counts[kind]:5d} × {words}" for kind, words in _KINDS.items() if counts[kind]),
        ]
        spent = self.rule.parameters_of(self.matrices)
        if spent is not None:
            said.append(f"{spent:,} parameters in factors at most")
        factors = sum(isinstance(place.delta, LowRankDelta) for place in self.matrices)
        if factors:
            said.append(f"{factors} updates are factors already: they are never formed")
        if self.weighting.moments:
            told = f"{len(self.weighting.moments)} of {len(self.matrices)} matrices"
            said.append(f"{told} as best on their inputs, by the moments of {self.weighting.info['inputs']:,} of them")
        return [*said, f"the adapter would go to {self.out}"]


_KINDS = {
    "linear": "matrices of linear maps, as factors",
    "embedding": "embeddings, as factors",
    "convolution": "kernels, as factors",
    "bias": "biases of linear maps, where they changed",
    "whole": "tensors of modules saved whole, where they changed",
    "listed": "tensors listed only",
}
_DEFAULTS = {"embeddings": "lora", "rest": "save", "dtype": "fp32", "seed": 0}


def plan(
    base: Any,
    tuned: Any,
    *,
    out: str | os.PathLike[str],
    rank: int | None = None,
    energy: float | None = None,
    parameters: int | None = None,
    criterion: str | None = None,
    allocation: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
    embeddings: str = "lora",
    rest: str = "save",
    dtype: str = "fp32",
    moments: str | os.PathLike[str] | Mapping[str, Moments] | None = None,
    seed: int = 0,
    device: str | None = None,
    trust_pickle: bool = False,
    offline: bool = False,
    allow_partial: bool = False,
) -> Plan:
    """Open and pair two checkpoints, and give every tensor its place; only headers are read.

    Parameters are those of `spectra.extract.extract`.

    Raises
    ------
    UsageError
        As `spectra.extract.extract`.
    CheckpointError, MismatchError
        If a checkpoint cannot be opened, or the two do not match.
    """
    rule = Rule(rank, energy, parameters, criterion, allocation)
    for flag, value, known in (
        ("embeddings", embeddings, EMBEDDING_PLACES),
        ("rest", rest, REST_PLACES),
        ("dtype", dtype, tuple(DTYPES)),
    ):
        if value not in known:
            raise UsageError(f"{flag} = {value!r}: it is one of {listed(known)}")
    check_device(device)
    wanted = name_filter(include, exclude)
    check_folder(Path(out))
    opened_base = as_base(opened(base, trust_pickle=trust_pickle, offline=offline))
    opened_tuned = opened(tuned, trust_pickle=trust_pickle, offline=offline)
    check_inputs((opened_base, opened_tuned), out)
    if opened_base.root.resolve() == opened_tuned.root.resolve():
        raise UsageError(f"{opened_base.ref} and {opened_tuned.ref} are one checkpoint: there is nothing to extract")
    pairing, deltas = pair_checkpoints(opened_base, opened_tuned)
    if pairing.share < LEAST_MATCH and not allow_partial:
        raise MismatchError(mismatch_message(opened_base, opened_tuned, pairing))
    model = model_of(opened_base, opened_tuned)
    places = find_places(
        pairing, deltas, opened_base, opened_tuned, model, wanted=wanted, embeddings=embeddings, rest=rest
    )
    found = Plan(
        opened_base,
        opened_tuned,
        pairing,
        tuple(places),
        model,
        rule,
        Path(out),
        {
            "include": include,
            "exclude": exclude,
            "embeddings": embeddings,
            "rest": rest,
            "dtype": dtype,
            "seed": seed,
            "device": device,
            "trust_pickle": trust_pickle,
            "allow_partial": allow_partial,
        },
    )
    if not found.matrices:
        raise UsageError(
            f"no matrix of a linear map or embedding is left to factor by include = {include!r}, exclude = "
            f"{exclude!r}, embeddings = {embeddings!r}: an adapter of PEFT needs at least one"
        )
    rule.check(found.matrices)
    weighting = weighting_of(moments, found.matrices, rule)
    if weighting.info.get("file") is not None:
        found.settings["moments"] = weighting.info["file"]
    return replace(found, weighting=weighting)
