"""Randomness as a function of (seed, purpose, index): there is no generator state to save, and nothing for a
batch size, a worker, a rank or a resumed run to change."""

import hashlib

import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed for one purpose ("noise", "order", ...) of one thing (an image, a level)."""
    text = ":".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded by `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *index))


def normal(shape: tuple[int, ...], seed: int, purpose: str, *index: int) -> Tensor:
    """Standard normal values on the CPU, float32, the same on every machine and for every batch size."""
    return torch.randn(shape, generator=generator(seed, purpose, *index))


def uniform(seed: int, purpose: str, *index: int) -> float:
    """One float in [0, 1)."""
    return float(torch.rand((), generator=generator(seed, purpose, *index)))
