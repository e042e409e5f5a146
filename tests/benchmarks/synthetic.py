"""Sharded bf16 pairs in the shapes of real decoders: ``python -m tests.benchmarks.synthetic DIR``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

# (hidden, key/value width, feed-forward, layers, vocabulary), as their config.json give them.
SHAPES = {
    "tinyllama-1.1b": (2048, 256, 5632, 22, 32000),
    "llama-7b": (4096, 4096, 11008, 32, 32000),
}
RANK, RELATIVE = 8, 0.02
SHARD_BYTES = 500_000_000


def tensors(model: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama-like model."""
    hidden, kv, inner, layers, vocabulary = SHAPES[model]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            yield f"model.layers.{i}.{name}.weight", shape
        yield f"model.layers.{i}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{i}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def make_pair(folder: Path, model: str = "tinyllama-1.1b") -> tuple[Path, Path]:
    """Write base and tuned, shard by shard, never more than a shard in memory; what is there already is kept."""
    sides = folder / "base", folder / "tuned"
    if all((side / "model.safetensors.index.json").is_file() for side in sides):
        return sides
    for side in sides:
        side.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shards: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    held, number = 0, 1

    def flush() -> None:
        nonlocal held, number
        name = f"model-{number:05d}.safetensors"
        for side, shard in zip(sides, shards, strict=True):
            save_file(shard, side / name)
            weight_map.update(dict.fromkeys(shard, name))
            shard.clear()
        held, number = 0, number + 1

    for name, shape in tensors(model):
        base = torch.randn(shape, generator=generator).mul_(0.02)
        tuned = base.clone()
        if len(shape) == 2:
            b = torch.randn(shape[0], RANK, generator=generator)
            a = torch.randn(RANK, shape[1], generator=generator)
            tuned.addmm_(b, a, alpha=RELATIVE * 0.02 / RANK**0.5)
        shards[0][name], shards[1][name] = base.bfloat16(), tuned.bfloat16()
        held += 2 * base.numel()
        if held > SHARD_BYTES:
            flush()
    flush()
    for side in sides:
        index = {"metadata": {}, "weight_map": weight_map}
        (side / "model.safetensors.index.json").write_text(json.dumps(index))
    return sides


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", type=click.Choice(list(SHAPES)), default="tinyllama-1.1b", show_default=True)
def main(folder: Path, model: str) -> None:
    """Write a synthetic pair into FOLDER/base and FOLDER/tuned."""
    for side in make_pair(folder, model):
        click.echo(side)


if __name__ == "__main__":
    main()
