"""Laws of names that hold for every pair of checkpoints."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.checkpoints.checkpoint import TensorInfo
from spectra.checkpoints.names import canonical_name, layer_and_role, pair_names
from spectra.errors import MismatchError

SEGMENTS = [
    "module", "_orig_mod", "base_model", "model", "base_layer", "bert", "encoder", "decoder", "layers", "layer", "h",
    "0", "1", "experts", "embed_tokens", "lm_head", "LayerNorm", "gamma", "weight", "bias", "w1", "", "\u202e", "é",
]  # fmt: skip
NAMES = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=7).map(".".join) | st.text(max_size=12)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3]), max_size=3).map(tuple)
DTYPES = st.sampled_from(["F32", "BF16", "I64", "U8"])


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, TensorInfo]:
    names = draw(st.lists(NAMES, max_size=12, unique_by=canonical_name))
    return {name: TensorInfo(name, draw(DTYPES), draw(SHAPES), "", 0) for name in names}


def aliases_of(draw: st.DrawFn, infos: dict[str, TensorInfo]) -> dict[str, str]:
    names = list(infos)
    half = len(names) // 2
    return {alias: draw(st.sampled_from(names[:half])) for alias in names[half:] if half and draw(st.booleans())}


@given(NAMES)
def test_canonical_name_is_idempotent_and_blind_to_wrappers(name: str) -> None:
    short = canonical_name(name)
    assert canonical_name(short) == short
    assert canonical_name(f"module.base_model.model._orig_mod.{name}") == short
    assert name.endswith(short.rpartition(".")[2])


@given(NAMES)
def test_every_name_has_a_role(name: str) -> None:
    layer, role = layer_and_role(name)
    assert layer is None or 0 <= layer < 1_000_000
    assert role or not canonical_name(name).strip(".")


@given(st.data())
@settings(max_examples=300)
def test_every_tensor_has_a_row_and_every_row_a_name_of_its_own(data: st.DataObject) -> None:
    base, tuned = data.draw(checkpoints()), data.draw(checkpoints())
    ties = aliases_of(data.draw, base), aliases_of(data.draw, tuned)
    pairing = pair_names(base, tuned, base_aliases=ties[0], tuned_aliases=ties[1])
    # An alias may be compared under the name that it is stored under.
    assert {*base} - {*ties[0]} <= {row.base for row in pairing.pairs if row.base is not None} <= {*base}
    assert {*tuned} - {*ties[1]} <= {row.tuned for row in pairing.pairs if row.tuned is not None} <= {*tuned}
    if not pairing.transforms and not any(ties):  # of tied tensors one name may stand for all
        # An expert's index, or a mark that tells two rows apart, may follow the name.
        for name in [*base, *tuned]:
            assert any(row.name.startswith(canonical_name(name)) for row in pairing.pairs)
    assert len({row.name for row in pairing.pairs}) == len(pairing.pairs)
    assert 0 <= pairing.matched <= pairing.total
    for row in pairing.pairs:
        both = row.base is not None and row.tuned is not None
        assert both or row.status in {"base_only", "tuned_only", "alias"}
        assert not both or row.status in {"ok", "shape_mismatch", "alias"}
        assert row.status == "ok" or row.reason
    assert pairing == pair_names(base, tuned, base_aliases=ties[0], tuned_aliases=ties[1])


@given(checkpoints())
def test_a_checkpoint_pairs_with_itself(infos: dict[str, TensorInfo]) -> None:
    pairing = pair_names(infos, infos)
    assert pairing.matched == pairing.total
    assert pairing.transforms == tuple(said for said in pairing.transforms if "wrappers" in said)
    assert all(row.base == row.tuned and row.status == "ok" for row in pairing.pairs)


@given(checkpoints(), st.sampled_from(["bert", "a.b", "transformer"]))
def test_a_common_prefix_is_always_undone(infos: dict[str, TensorInfo], prefix: str) -> None:
    """Only where it can be: unless stripping it makes two names of one, every tensor finds itself."""
    longer = {f"{prefix}.{name}": info for name, info in infos.items()}
    try:
        pairing = pair_names(infos, longer)
    except MismatchError:
        return
    if not any(name.startswith(prefix.split(".")[0]) for name in infos):
        matched = {row.base: row.tuned for row in pairing.pairs if row.base is not None}
        assert matched == {name: f"{prefix}.{name}" for name in infos}
