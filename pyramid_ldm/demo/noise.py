"""Smooth fractal noise that is free of aliasing at any resolution."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]  # float32 throughout

# Lattice values shared by all noise; a scene reads them at its own random offsets.
_LATTICE = np.random.Generator(np.random.PCG64(20240)).uniform(-1, 1, (256, 256)).astype(np.float32)


def _basis(u: Array, octaves: int) -> list[tuple[NDArray[np.int64], Array]]:
    """For each octave, the lattice indices (m,) and cubic B-spline weights (n, m) that evaluate its noise at `u` (n,).

    Weights fade to 0 as an octave's wavelength goes from four samples down to two, the finest that a grid can show.
    """
    step = np.abs(np.diff(u, append=2 * u[-1:] - u[-2:-1])) if len(u) > 1 else np.ones(1, np.float32)
    low, high, finest = float(u.min()), float(u.max()), float(step.min())
    scales = [2.0**k for k in range(octaves) if 2**k * finest < 0.5]
    if not scales:
        return []
    lattices = [np.arange(math.floor(low * scale) - 1, math.floor(high * scale) + 3) for scale in scales]
    # All octaves at once: for small pictures the time is in the number of numpy calls.
    scale = np.repeat(np.array(scales, np.float32), [len(lattice) for lattice in lattices])
    distance = np.abs(u[:, None] * scale - np.concatenate(lattices).astype(np.float32))
    outer, inner = np.maximum(2 - distance, 0), np.maximum(1 - distance, 0)
    visible = np.minimum(np.maximum(0.5 / (step[:, None] * scale) - 1, 0), 1)
    weights = (outer * outer * outer - 4 * inner * inner * inner) * (visible / 6)
    ends = list(accumulate(len(lattice) for lattice in lattices))
    return [(lattice, weights[:, end - len(lattice) : end]) for lattice, end in zip(lattices, ends, strict=True)]


def fractal_noise(u: Array, v: Array | None, offset: int, gain: float = 0.5, octaves: int = 8) -> Array:
    """Smooth fractal noise of about unit deviation: (len(v), len(u)) on a grid, or (len(u),) on a line if `v` is None.

    Separable B-splines make an octave two small matrix products.
    """
    total = np.zeros(len(u) if v is None else (len(v), len(u)), np.float32)
    down = None if v is None else _basis(v, octaves)
    for k, (columns, across) in enumerate(_basis(u, octaves)):
        columns, row = (columns + offset + 37 * k) % 256, (offset >> 8) + 71 * k
        if down is None:
            total += gain**k * (across @ _LATTICE[row % 256, columns])
        elif k < len(down):
            rows, weights = down[k]
            total += gain**k * (weights @ (_LATTICE[np.ix_((rows + row) % 256, columns)] @ across.T))
    return total * np.float32((2.6 if v is None else 3.6) * math.sqrt(1 - gain * gain))
