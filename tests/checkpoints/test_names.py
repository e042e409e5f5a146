"""Pairs of names: what is found, what is said about it, and what is never guessed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from spectra.checkpoints.checkpoint import TensorInfo
from spectra.checkpoints.names import Pair, Pairing, canonical_name, layer_and_role, pair_names
from spectra.errors import MismatchError


def infos(tensors: Mapping[str, tuple[Any, ...]]) -> dict[str, TensorInfo]:
    """Infos from name → shape; a first entry that is a string is the dtype."""
    found = {}
    for name, shape in tensors.items():
        dtype, dims = (shape[0], shape[1:]) if shape and isinstance(shape[0], str) else ("F32", shape)
        found[name] = TensorInfo(name, dtype, tuple(dims), "model.safetensors", 0)
    return found


def pair(base: Mapping[str, tuple[Any, ...]], tuned: Mapping[str, tuple[Any, ...]], **aliases: Any) -> Pairing:
    return pair_names(infos(base), infos(tuned), **aliases)


def rows(pairing: Pairing) -> dict[str, Pair]:
    return {row.name: row for row in pairing.pairs}


def encoder(prefix: str = "", layers: int = 2) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {f"{prefix}embeddings.word_embeddings.weight": (30, 8)}
    for i in range(layers):
        tensors[f"{prefix}encoder.layer.{i}.attention.self.query.weight"] = (8, 8)
        tensors[f"{prefix}encoder.layer.{i}.intermediate.dense.weight"] = (16, 8)
        tensors[f"{prefix}encoder.layer.{i}.intermediate.dense.bias"] = (16,)
    return tensors


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module.h.0.weight", "h.0.weight"),
        ("h.module._orig_mod.0.weight", "h.0.weight"),
        ("_fsdp_wrapped_module.h._checkpoint_wrapped_module.0.weight", "h.0.weight"),
        ("base_model.model.model.layers.0.q.base_layer.weight", "model.layers.0.q.weight"),
        ("base_model.base_model.model.model.q.weight", "q.weight"),
        ("base_model.module.model.q.weight", "q.weight"),
        ("base_model.encoder.weight", "base_model.encoder.weight"),
        ("model.q.weight", "model.q.weight"),
        ("x.module", "x.module"),
        ("base_model.model", "base_model.model"),
        ("", ""),
    ],
)
def test_canonical_name(name: str, expected: str) -> None:
    assert canonical_name(name) == expected


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("bert.encoder.layer.0.attention.self.query.weight", 0, "attention.self.query"),
        ("bert.encoder.layer.0.attention.self.query.bias", 0, "attention.self.query.bias"),
        ("transformer.h.11.attn.c_attn.weight", 11, "attn.c_attn"),
        ("model.layers.3.mlp.up_proj.weight", 3, "mlp.up_proj"),
        ("encoder.block.3.layer.0.SelfAttention.q.weight", 3, "encoder.layer.0.SelfAttention.q"),
        ("decoder.block.3.layer.0.SelfAttention.q.weight", 3, "decoder.layer.0.SelfAttention.q"),
        ("model.decoder.layers.5.fc1.weight", 5, "decoder.fc1"),
        ("vision_model.encoder.layers.5.mlp.fc1.weight", 5, "vision_model.mlp.fc1"),
        ("text_model.encoder.layers.5.mlp.fc1.weight", 5, "text_model.mlp.fc1"),
        ("blocks.2.attn.qkv.weight", 2, "attn.qkv"),
        ("layer2.0.conv1.weight", 0, "layer2.conv1"),
        ("encoder.albert_layer_groups.0.albert_layers.0.ffn.weight", 0, "albert_layer_groups.albert_layers.0.ffn"),
        ("model.layers.1.block_sparse_moe.experts.7.w1.weight", 1, "block_sparse_moe.experts.*.w1"),
        ("model.layers.1.mlp.experts.gate_up_proj[7]", 1, "mlp.experts.gate_up_proj"),
        ("experts.7.w1.weight", None, "experts.*.w1"),
        ("classifier.0.weight", None, "classifier.0"),
        ("0.weight", 0, "weight"),
        ("layers.0.weight", 0, "weight"),
        ("layers.99999999999999999999.weight", None, "layers.99999999999999999999"),
        ("layers.².weight", None, "layers.²"),
        ("embeddings.word_embeddings.weight", None, "embeddings.word_embeddings"),
        ("weight", None, "weight"),
        ("", None, ""),
    ],
)
def test_layer_and_role(name: str, layer: int | None, role: str) -> None:
    assert layer_and_role(name) == (layer, role)
    assert layer_and_role(f"module.base_model.model.{name}") == (layer, role)


def test_same_names_pair_in_stored_order() -> None:
    pairing = pair(encoder(), dict(reversed(encoder().items())))
    assert [row.base for row in pairing.pairs] == [row.tuned for row in pairing.pairs] == list(encoder())
    assert (pairing.matched, pairing.total, pairing.share, pairing.transforms) == (7, 7, 1.0, ())


def test_a_collision_after_stripping_names_both() -> None:
    with pytest.raises(MismatchError, match=r"tuned.*'q\.weight' and 'module\.q\.weight'"):
        pair({"q.weight": (2, 2)}, {"q.weight": (2, 2), "module.q.weight": (2, 2)})


@pytest.mark.parametrize(
    ("base", "tuned", "said"),
    [
        ("", "bert.", "tuned names lose the prefix 'bert.'"),
        ("model.", "", "base names lose the prefix 'model.'"),
        ("", "a.b.c.", "tuned names lose the prefix 'a.b.c.'"),
        ("roberta.", "bert.", "the prefix 'bert.' of tuned names is read as 'roberta.'"),
        (
            "language_model.model.",
            "model.language_model.",
            "the prefix 'model.language_model.' of tuned names is read as ",
        ),
    ],
)
def test_a_prefix_on_one_side_is_found_and_said(base: str, tuned: str, said: str) -> None:
    pairing = pair(encoder(base), encoder(tuned))
    assert pairing.share == 1.0
    assert len(pairing.transforms) == 1
    assert pairing.transforms[0].startswith(said)
    assert [row.name for row in pairing.pairs] == list(encoder(tuned))


def test_the_prefix_with_most_matches_wins_and_the_rest_stays() -> None:
    tuned = {**encoder("encoder."), **dict(list(encoder("decoder.").items())[:3])}
    pairing = pair(encoder(), tuned)
    assert pairing.transforms == ("tuned names lose the prefix 'encoder.'",)
    assert (pairing.matched, pairing.total) == (7, 10)


def test_chance_agreements_are_no_prefix() -> None:
    """A pooler and a head's transform are both "dense" and of the same shape, and are two things."""
    base = {**encoder(), "pooler.dense.weight": (8, 8), "pooler.dense.bias": (8,)}
    tuned = {**encoder("bert."), "cls.transform.dense.weight": (8, 8), "cls.transform.dense.bias": (8,)}
    found = rows(pair(base, tuned))
    assert found["pooler.dense.weight"].status == "base_only"
    assert found["cls.transform.dense.weight"].status == "tuned_only"
    assert "'pooler.dense.weight'" in found["cls.transform.dense.weight"].reason


def test_one_agreement_is_no_prefix_once_names_have_matched() -> None:
    pairing = pair(encoder() | {"dense.weight": (8, 8)}, encoder() | {"pooler.dense.weight": (8, 8)})
    assert pairing.transforms == ()
    assert rows(pairing)["dense.weight"].status == "base_only"


def test_two_towers_that_share_half_their_names_are_two() -> None:
    shared = {f"layers.{i}.fc.weight": (8, 8) for i in range(6)}
    text = {f"text.{name}": shape for name, shape in shared.items()} | {f"text.layers.{i}.q": (4, 4) for i in range(6)}
    image = {f"image.{name}": shape for name, shape in shared.items()} | {
        f"image.layers.{i}.k": (4, 4) for i in range(6)
    }
    pairing = pair(encoder() | text, encoder() | image)
    assert (pairing.matched, pairing.total, pairing.transforms) == (7, 31, ())


def test_several_parts_may_be_renamed() -> None:
    base = {**encoder("language_model.model."), **encoder("vision_tower."), "language_model.lm_head.weight": (30, 8)}
    tuned = {**encoder("model.language_model."), **encoder("model.vision_tower."), "lm_head.weight": (30, 8)}
    pairing = pair(base, tuned)
    assert pairing.share == 1.0
    by_base = {row.base: row.tuned for row in pairing.pairs}
    for name, found in by_base.items():
        assert name is not None
        assert found is not None
        assert ("vision" in name) == ("vision" in found)


def test_first_spellings_of_norms_pair_with_todays() -> None:
    base = {"bert.LayerNorm.gamma": (8,), "bert.LayerNorm.beta": (8,), "x.weight_g": (4, 1), "x.weight_v": (4, 3)}
    tuned = {
        "bert.LayerNorm.weight": (8,),
        "bert.LayerNorm.bias": (8,),
        "x.parametrizations.weight.original0": (4, 1),
        "x.parametrizations.weight.original1": (4, 3),
    }
    assert pair(base, tuned).share == 1.0
    assert pair({"blend.gamma": (8,)}, {"blend.weight": (8,)}).matched == 0


def test_a_resized_vocabulary_compares_the_common_rows() -> None:
    base = encoder() | {"cls.predictions.bias": (30,)}
    tuned = encoder() | {"embeddings.word_embeddings.weight": (33, 8), "cls.predictions.bias": (33,)}
    found = rows(pair(base, tuned))
    row = found["embeddings.word_embeddings.weight"]
    assert (row.status, row.view, row.reason) == ("ok", "rows:30", "30 → 33 rows; the 30 common rows compared")
    assert found["cls.predictions.bias"].view == "rows:30"


@pytest.mark.parametrize(
    ("name", "base", "tuned"),
    [
        ("classifier.weight", (2, 8), (3, 8)),
        ("embeddings.word_embeddings.weight", (30, 8), (33, 9)),
        ("embeddings.word_embeddings.weight", (0, 8), (33, 8)),
        ("decoder.layers.0.fc.weight", (4, 8), (6, 8)),
        ("q.weight", (4, 8), (4, 8, 1)),
        ("conv.weight", (4, 8, 3, 3), (3, 3, 8, 4)),
    ],
)
def test_other_shapes_do_not_match_and_both_are_named(name: str, base: tuple[int, ...], tuned: tuple[int, ...]) -> None:
    pairing = pair({name: base}, {name: tuned})
    assert (pairing.pairs[0].status, pairing.matched, pairing.total) == ("shape_mismatch", 0, 1)
    assert str(base) in pairing.pairs[0].reason
    assert str(tuned) in pairing.pairs[0].reason


def test_transposes_are_seen_where_they_can_be() -> None:
    found = rows(pair({"up": (4, 8), "square": (4, 4)}, {"up": (8, 4), "square": (4, 4)}))
    assert found["up"].view == "transpose_tuned"
    assert "(4, 8) in base, (8, 4) in tuned" in found["up"].reason
    assert (found["square"].view, found["square"].reason) == ("", "")


LM = {"model.embed_tokens.weight": (30, 8), "model.layers.0.q.weight": (8, 8)}


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_head_that_one_side_ties_is_compared_with_the_embeddings(side: str) -> None:
    untied = LM | {"lm_head.weight": (30, 8)}
    pairing = pair(LM, untied) if side == "base" else pair(untied, LM)
    row = rows(pairing)["lm_head.weight"]
    assert row.status == "ok"
    assert row.reason == f"tied to 'model.embed_tokens.weight' in {side}"
    assert getattr(row, side) == "model.embed_tokens.weight"
    assert pairing.share == 1.0


def test_a_head_is_not_said_to_be_tied_where_the_base_has_none() -> None:
    headless = {name.removeprefix("model."): shape for name, shape in LM.items()}
    row = rows(pair(headless, LM | {"lm_head.weight": (30, 8)}))["lm_head.weight"]
    assert (row.status, row.base) == ("tuned_only", None)
    assert "tie it to its word embeddings, or have no head" in row.reason


def test_second_embeddings_are_tied_to_the_shared_one() -> None:
    shared = {"shared.weight": (30, 8), "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}
    second = {f"{side}.embed_tokens.weight": (30, 8) for side in ("encoder", "decoder")}
    pairing = pair(shared, shared | second)
    assert pairing.share == 1.0
    assert {rows(pairing)[name].base for name in second} == {"shared.weight"}


def test_aliases_on_both_sides_get_a_row_and_no_comparison() -> None:
    tie = {"lm_head.weight": "model.embed_tokens.weight"}
    tensors = LM | {"lm_head.weight": (30, 8)}
    pairing = pair(tensors, tensors, base_aliases=tie, tuned_aliases=tie)
    row = pairing.pairs[-1]
    assert (row.name, row.status, row.reason) == ("lm_head.weight", "alias", "tied to 'model.embed_tokens.weight'")
    assert (row.base, row.tuned) == ("lm_head.weight", "lm_head.weight")
    assert (pairing.matched, pairing.total) == (2, 2)


def test_an_alias_that_the_other_side_stores_is_compared() -> None:
    tie = {"lm_head.weight": "model.embed_tokens.weight"}
    tensors = LM | {"lm_head.weight": (30, 8)}
    row = rows(pair(tensors, tensors, base_aliases=tie))["lm_head.weight"]
    assert (row.status, row.base, row.tuned) == ("ok", "model.embed_tokens.weight", "lm_head.weight")


def test_either_name_of_a_tied_tensor_may_be_the_stored_one() -> None:
    base = {"lm_head.weight": (30, 8), "model.layers.0.q.weight": (8, 8)}
    pairing = pair(
        base,
        LM,
        base_aliases={"model.embed_tokens.weight": "lm_head.weight"},
        tuned_aliases={"lm_head.weight": "model.embed_tokens.weight"},
    )
    assert pairing.share == 1.0
    assert [row.status for row in pairing.pairs] == ["ok", "ok", "alias"]
    assert (pairing.pairs[0].base, pairing.pairs[0].tuned) == ("lm_head.weight", "model.embed_tokens.weight")


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_stacked_experts_meet_single_ones(side: str, flip: bool) -> None:
    stacked = {"model.layers.0.mlp.experts.w1": (3, 8, 16), "model.layers.0.q.weight": (8, 4)}
    single = {f"layers.0.mlp.experts.{i}.w1.weight": (16, 8) if flip else (8, 16) for i in range(3)}
    single |= {"layers.0.q.weight": (8, 4)}
    pairing = pair(stacked, single) if side == "base" else pair(single, stacked)
    experts = [row for row in pairing.pairs if "experts" in row.name]
    assert [row.view for row in experts] == [f"expert:{i}:{side}" + "|transpose_tuned" * flip for i in range(3)]
    assert pairing.share == 1.0
    assert len({row.name for row in experts}) == 3


def test_an_expert_too_few_gets_a_row() -> None:
    pairing = pair({"experts.w": (2, 4, 8)}, {"experts.0.w.weight": (4, 8), "experts.5.w.weight": (4, 8)})
    found = rows(pairing)
    assert found["experts.w[1]"].status == "base_only"
    assert found["experts.5.w.weight"].status == "tuned_only"


def test_two_stacks_pair_expert_by_expert_and_kernels_do_not() -> None:
    pairing = pair(
        {"moe.experts.w": (2, 4, 8), "conv.weight": (2, 4, 8)}, {"moe.experts.w": (2, 8, 4), "conv.weight": (2, 4, 8)}
    )
    assert [(row.name, row.view) for row in pairing.pairs] == [
        ("moe.experts.w[0]", "expert:0:both|transpose_tuned"),
        ("moe.experts.w[1]", "expert:1:both|transpose_tuned"),
        ("conv.weight", ""),
    ]


def test_a_stack_without_end_is_not_unrolled() -> None:
    shape = (2**40, 0, 4)
    assert len(pair({"experts.w": shape}, {"experts.w": shape}).pairs) == 1


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bert.embeddings.position_ids", ("I64", 1, 512)),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", ("F32", 8)),
        ("bn.num_batches_tracked", ("I64",)),
        ("h.0.attn.bias", ("F32", 1, 1, 8, 8)),
        ("h.0.attn.bias", ("U8", 1, 1, 8, 8)),
        ("h.0.attn.masked_bias", ("F32",)),
    ],
)
def test_a_buffer_on_one_side_raises_no_alarm(name: str, shape: tuple[Any, ...]) -> None:
    for pairing in (pair(encoder() | {name: shape}, encoder()), pair(encoder(), encoder() | {name: shape})):
        row = rows(pairing)[name]
        assert row.status in {"base_only", "tuned_only"}
        assert (row.reason, row.buffer, pairing.share) == ("buffer", True, 1.0)


def test_packed_weights_are_no_buffers() -> None:
    for dtype, last in (("I32", "qweight"), ("U8", "weight"), ("I8", "weight"), ("F32", "bias")):
        assert pair({f"q.{last}": (dtype, 8, 8) if last != "bias" else (dtype, 8)}, {}).total == 1


def test_what_is_left_counts_and_names_its_neighbours() -> None:
    pairing = pair(encoder() | {"pooler.dens.weight": (8, 8)}, encoder() | {"pooler.dense.weight": (9, 9)})
    found = rows(pairing)
    assert found["pooler.dens.weight"].reason == "no counterpart in tuned; nearest there: 'pooler.dense.weight'"
    assert (pairing.matched, pairing.total) == (7, 9)
    assert pairing.share == 7 / 9


def test_nothing_to_compare_is_no_full_match() -> None:
    assert pair({}, {}).share == 0.0


def test_a_hundred_thousand_names_take_seconds() -> None:
    """Linear in the number of names, also where every name has the same ending or thousands of segments."""
    many = {f"model.layers.{i}.experts.{j}.w.weight": (8, 4) for i in range(40) for j in range(250)}
    hostile = {f"p{i}.0.weight": (8, 4) for i in range(10_000)}
    start = time.perf_counter()
    assert pair(many, {name.removeprefix("model."): shape for name, shape in many.items()}).share == 1.0
    assert pair(hostile, {name.replace("p", "q"): shape for name, shape in hostile.items()}).share == 0.0
    assert pair({"a." * 5000 + "w": (2, 2)}, {"b." * 5000 + "w": (2, 2)}).matched == 0
    # Ten thousand names a side took half a second each where this was written; n² would take minutes.
    assert time.perf_counter() - start < 20
