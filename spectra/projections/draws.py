"""Random draws by address: the same seed and place give the same bits, on any device and with any number of threads."""

from __future__ import annotations

import numpy as np
import torch


def stream(seed: int, *place: int) -> np.random.Generator:
    """Generator of one place; places are independent of each other.

    The number of its coordinates stands in front, since NumPy takes zeros at the end of a seed for nothing.
    """
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, len(place), *place])))


def random_bytes(generator: np.random.Generator, count: int) -> np.ndarray:
    """So many uniform bytes, (count,) uint8, eight to a draw."""
    words = generator.bit_generator.random_raw(-(-count // 8))
    return np.asarray(words, dtype="<u8").view(np.uint8)[:count]


def signs(generator: np.random.Generator, count: int, like: torch.Tensor) -> torch.Tensor:
    """So many independent signs ±1, (count,) of the dtype and device of another tensor."""
    bits = np.unpackbits(random_bytes(generator, -(-count // 8)), count=count)
    return torch.from_numpy(bits).to(device=like.device).to(like.dtype).mul_(-2.0).add_(1.0)


def normal(generator: np.random.Generator, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers drawn in float32, of the dtype and device of another tensor."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).to(like.device).to(like.dtype)
