"""Small checkpoints and PEFT folders on disk, and the dense float64 answers to compare with."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import save_file

from tests.planted import orthonormal

SHAPES = {
    "encoder.layer.0.query.weight": (48, 48),
    "encoder.layer.0.up.weight": (160, 136),  # past the small bidiagonal route: by its Gram matrix
    "encoder.layer.1.query.weight": (48, 48),
    "encoder.layer.1.up.weight": (40, 96),
}


def base_tensors(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: (torch.randn(*shape, generator=generator) * 0.1).to(dtype) for name, shape in SHAPES.items()}
    tensors["encoder.layer.0.norm.weight"] = torch.ones(48)
    tensors["encoder.positions"] = torch.arange(12)
    return tensors


def update(shape, values, seed):
    """An update U·diag(values)·Vᵀ in float64, and its U and V."""
    k = len(values)
    u, v = orthonormal(shape[0], k, seed), orthonormal(shape[1], k, seed + 1000)
    return (u * np.asarray(values)) @ v.T, u, v


def write_checkpoint(folder, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def write_lora(folder, factors, *, base, rank, alpha=None, dtype=torch.float32, **config):
    """A LoRA of {name: (B, A)} whose update is B·A times alpha/rank."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (b, a) in factors.items():
        module = name.removesuffix(".weight")
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.as_tensor(a).to(dtype).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.as_tensor(b).to(dtype).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank if alpha is None else alpha}
    settings |= {"base_model_name_or_path": base} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def svd(matrix, k):
    u, s, vh = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    return u[:, :k], s[:k], vh[:k].T
