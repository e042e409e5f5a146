r"""Updates of a model that stood in a few bits while it was trained: adaptation told apart from quantization error.

QLoRA learns BA beside Ŵ = dequant(Q(W)). Merged and saved, tuned − W = BA + (Ŵ − W) is a low-rank update under an
error of full rank, which is what its spectrum then shows. Who knows the format can compute Ŵ from W, for quantizing
is deterministic, and so subtract it; and the error gives itself away: along it, ⟨tuned − W, Ŵ − W⟩/‖Ŵ − W‖² is 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from spectra.checkpoints import Adapter
from spectra.checkpoints.orientation import turned_names
from spectra.delta import AnyDelta, Delta, LowRankDelta, as_rows, is_float, viewed
from spectra.difference import Difference
from spectra.errors import NonFiniteMatrix, SpectraError, UsageError
from spectra.linalg.matrix import row_blocks
from spectra.quantize.scheme import Scheme

SCHEMES = ("nf4", "nf4/64/fp32", "fp4", "fp4/64/fp32", "int8/row/fp32")
"""What trainers quantize to: bitsandbytes' two code books, with scales quantized again and not; eight bits a row."""

# Matrices that a format is recognised by: more would have to be read twice.
_LOOKED_AT = 3
# A base stood in a format where the update lies along its error with a coefficient nearer to 1 than to 0.
_ALONG = 0.5


@dataclass(frozen=True)
class QuantizationShare:
    """How an update ΔW lies to the error E = Ŵ − W of its base.

    Attributes
    ----------
    error : float
        ‖E‖_F.
    projection : float
        ⟨ΔW, −E⟩/‖E‖²: 1 where the update undoes all of E.
    cosine : float
        ⟨ΔW, −E⟩/(‖ΔW‖‖E‖); independent of each other it is 0 ± 1/√(entries).
    """

    error: float
    projection: float
    cosine: float

    def columns(self) -> dict[str, float]:
        """The numbers as columns of a row."""
        return {
            "quantization_frobenius": self.error,
            "quantization_projection": self.projection,
            "quantization_cosine": self.cosine,
        }


@dataclass(frozen=True)
class RequantizedDelta(Delta):
    """tuned − Ŵ where that is what was trained, tuned − W where this matrix was not quantized."""

    scheme: Scheme | None = None
    turned: bool = False

    def difference(self) -> Difference:
        """Read both, quantize the base, and subtract what the update lies nearer to."""
        assert self.scheme is not None
        stored, tuned = self.base[self.base_name], self.tuned_weights()
        base = as_rows(viewed(stored, self.view, "base"))
        try:
            rounded = as_rows(viewed(_rounded(stored, self.scheme, self.turned), self.view, "base"))
        except NonFiniteMatrix:
            return self.between(base, tuned)  # which says of what tensor
        error = _error(rounded, base)
        energy, along = _inner(error, error), _inner(tuned, error) - _inner(base, error)
        if energy == 0.0 or along < _ALONG * energy:
            return self.between(base, tuned)
        found = self.between(rounded, tuned)
        return replace(found, more=_share(_inner(found.matrix, error), found.frobenius, energy).columns())


@dataclass(frozen=True)
class RequantizedLowRankDelta(LowRankDelta):
    """An adapter's update, which is what it is, and how it lies to the error of the base it was trained on."""

    scheme: Scheme | None = None
    turned: bool = False

    def difference(self) -> Difference:
        """As of any adapter; ⟨BA, E⟩ is taken from the factors."""
        assert self.scheme is not None
        stored = self.weights()
        found, error = self.beside(stored), _error(as_rows(_rounded(stored, self.scheme, self.turned)), stored)
        b, a = (factor.double() for factor in self.factors())
        rows = zip(row_blocks(error), torch.split(b, row_blocks(error)[0].shape[0]), strict=True)
        inner = self.update.scale * math.fsum(float((part.t() @ e.double() * a).sum()) for e, part in rows)
        return replace(found, more=_share(inner, found.frobenius, _inner(error, error)).columns())


def requantized(deltas: Mapping[str, AnyDelta], scheme: Scheme) -> dict[str, AnyDelta]:
    """The same updates on a base that stood in a format; vectors, and what is stored quantized, as they were.

    Parameters
    ----------
    deltas : mapping of str to delta
    scheme : Scheme

    Returns
    -------
    dict of str to delta
    """
    found: dict[str, AnyDelta] = {}
    turned = _turned(deltas)
    for name, delta in deltas.items():
        if _stored_quantized(delta):  # its own quantization is known, and the weights before it are not
            pass
        elif min(delta.shape) > 1 and type(delta) is Delta:
            delta = RequantizedDelta(**vars(delta), scheme=scheme, turned=delta.base_name in turned)
        elif min(delta.shape) > 1 and type(delta) is LowRankDelta:
            delta = RequantizedLowRankDelta(**vars(delta), scheme=scheme, turned=delta.update.name in turned)
        found[name] = delta
    return found


def _stored_quantized(delta: AnyDelta) -> bool:
    return delta.base_info.quantization is not None or delta.tuned_info.quantization is not None


def scheme_of_base(deltas: Mapping[str, AnyDelta], quantized: str | None) -> Scheme | None:
    """What a base stood in: as told, or with ``"auto"`` as a run's record or the weights themselves tell.

    Raises
    ------
    UsageError
        If there is no such format.
    """
    if quantized != "auto":
        return None if quantized in (None, "no") else Scheme.parse(quantized)
    if any(map(_stored_quantized, deltas.values())):
        return None
    tuned = next((delta.tuned for delta in deltas.values()), None)
    return _recorded(tuned) if isinstance(tuned, Adapter) else recognised(deltas)


def _recorded(adapter: Adapter) -> Scheme | None:
    """What ``training.json`` beside an adapter says of its base."""
    path = adapter.root / "training.json"
    try:
        settings = json.loads(path.read_text("utf-8"))
        if settings["method"] != "qlora":
            return None
        told = settings["settings"]
        return Scheme.parse(f"{told['format']}/{told['block']}/{'double' if told['double'] else 'fp32'}")
    except (OSError, ValueError, LookupError, TypeError, UsageError):
        return None  # the file is another program's, or none


def recognised(deltas: Mapping[str, AnyDelta], schemes: Iterable[str] = SCHEMES) -> Scheme | None:
    """The format that a tuned checkpoint's base stood in, or None; a few matrices of middle size are read.

    Adapters tell nothing of their base: None.

    Parameters
    ----------
    deltas : mapping of str to delta
    schemes : iterable of str
        Formats that are tried.
    """
    candidates = [
        delta
        for delta in deltas.values()
        if type(delta) is Delta
        and not isinstance(delta.tuned, Adapter)
        and min(delta.shape) >= _LEAST_SIDE
        and is_float(delta.base_info.dtype)
        and is_float(delta.tuned_info.dtype)
    ]
    candidates.sort(key=lambda delta: (math.prod(delta.shape), delta.name))
    middle = len(candidates) // 2
    looked_at = candidates[max(0, middle - _LOOKED_AT // 2) :][:_LOOKED_AT]
    tried, turned = [Scheme.parse(text) for text in schemes], _turned(deltas)
    votes = [_nearest(delta, tried, turned=delta.base_name in turned) for delta in looked_at]
    first = votes[0] if votes else None
    return first if all(vote == first for vote in votes) else None


# Smaller matrices have too few entries for the coefficient along E to tell 0 from 1 beside a large update.
_LEAST_SIDE = 64


def _nearest(delta: Delta, schemes: Sequence[Scheme], *, turned: bool) -> Scheme | None:
    """The scheme whose Ŵ is nearest to the tuned matrix, if the update lies along its error."""
    try:
        stored = delta.weights()
        moved = delta.between(stored, delta.tuned_weights()).matrix
        if not turned:  # most updates are along no format's error, which a few rows tell
            few = max(1, _GLANCE // stored.shape[1])
            schemes = [s for s in schemes if _along(moved[:few], stored[:few], s, turned=False) is not None]
        left = {scheme: _along(moved, stored, scheme, turned=turned) for scheme in schemes}
    except (SpectraError, OSError):
        return None  # its row will say why
    found = {scheme: norm for scheme, norm in left.items() if norm is not None}
    return min(found, key=found.__getitem__) if found else None


# Entries that a format is ruled out by: √(their number) is what the coefficient along E, 0 or 1, stands out of.
_GLANCE = 1 << 17


def _along(moved: torch.Tensor, stored: torch.Tensor, scheme: Scheme, *, turned: bool) -> float | None:
    """‖update − E‖² where the update lies along the error E of a scheme, None where it does not."""
    error = _error(as_rows(_rounded(stored, scheme, turned)), stored)
    energy = _inner(error, error)
    if energy == 0.0 or _inner(moved, error) < _ALONG * energy:
        return None
    return _inner(moved - error, moved - error)


def _rounded(stored: torch.Tensor, scheme: Scheme, turned: bool) -> torch.Tensor:
    """What a stored tensor rounds to, in its dtype; quantizers turn a Conv1D's (in, out) first."""
    wide = stored if stored.dtype in _QUANTIZED_AS_THEY_ARE else stored.float()
    if turned and wide.dim() == 2:
        return scheme.quantize(wide.t().contiguous()).dequantize().t().contiguous()
    return scheme.quantize(wide).dequantize()


_QUANTIZED_AS_THEY_ARE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _turned(deltas: Mapping[str, AnyDelta]) -> frozenset[str]:
    """Stored names of the base's weights that are (in, out)."""
    base = next((delta.base for delta in deltas.values()), None)
    return frozenset() if base is None else turned_names(base.infos(), base.config)


def _error(rounded: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Ŵ − W, float32 or float64."""
    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    return rounded.to(wide) - stored.to(wide)


def _share(inner: float, norm: float, energy: float) -> QuantizationShare:
    error = math.sqrt(energy)
    projection = -inner / energy if energy > 0.0 else math.nan
    cosine = -inner / (norm * error) if norm > 0.0 and error > 0.0 else math.nan
    return QuantizationShare(error, projection, cosine)


def _inner(one: torch.Tensor, other: torch.Tensor) -> float:
    """⟨A, B⟩ in float64, a block of rows at a time."""
    pairs = zip(row_blocks(one), row_blocks(other), strict=True)
    return math.fsum(float((a.double() * b.double()).sum()) for a, b in pairs)
