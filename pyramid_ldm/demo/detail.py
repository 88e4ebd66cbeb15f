"""What only large pictures show of a landscape: trees, crags, grass, waves, faint stars, the grain of clouds.

Everything here is too fine for a picture of 64 pixels and fades out towards it, so that the same scene is the same
picture at every size.
"""

from __future__ import annotations

import numpy as np

from pyramid_ldm.demo.noise import Array, fractal_noise
from pyramid_ldm.demo.scene import Woods

_NEIGHBOURS = range(-2, 3)
_ROWS = 18  # of trees on a slope
_CELLS = 8192  # of trees, from x = -_CELLS / 2 spacings on


def shown(size: float, pixel: float) -> float:
    """How much of a thing of that size is drawn: nothing below 1.7 pixels, all from 2.7 on."""
    return float(np.clip(size / pixel - 1.7, 0, 1))


def treeline(x: Array, height: float, cover: float, rounded: bool, offset: int) -> tuple[Array, Array]:
    """(how far treetops rise above a ridge at `x` (n,), how bright the tree there is, 0 to 1): conifers, or `rounded`
    crowns, of about `height`, standing where `cover` (0 to 1) says."""
    spacing = np.float32(0.3 * height)
    random = np.random.Generator(np.random.PCG64(offset)).random((4, _CELLS), dtype=np.float32)
    cell = np.floor(x / spacing).astype(np.int64)
    tops: Array = np.zeros_like(x)
    bright: Array = np.zeros_like(x)
    for step in _NEIGHBOURS:
        here = (cell + step + _CELLS // 2) % _CELLS
        aside, tall, there = random[0][here], random[1][here], random[2][here]
        distance = np.abs(x / spacing - (cell + step) - aside)
        # Groves: a slow wave lets whole groups be missing.
        grove = 0.5 + 0.5 * np.sin(0.11 * (cell + step) + offset) * np.sin(0.043 * (cell + step) + 2 * offset)
        grown = height * (0.45 + 0.75 * tall * tall) * (there < cover * (0.4 + 1.2 * grove))
        if rounded:
            crown = np.sqrt(np.maximum(1 - (distance / 1.1) ** 2, 0)) * 0.7
        else:
            within = np.maximum(1 - distance / 0.85, 0)
            tiers = within * 6
            crown = 0.8 * within + 0.2 * (np.floor(tiers) + np.minimum(2.5 * (tiers % 1), 1)) / 6 * (within > 0)
        rises = grown * crown
        bright = np.where(rises > tops, random[3][here], bright)
        tops = np.maximum(tops, rises)
    return tops, bright


def forest(ground: Array, x: Array, y: Array, ridge: Array, height: float, woods: Woods, offset: int) -> Array:
    """`ground` (len(y), len(x)) with rows of trees before it, ever nearer and larger below the ridge (len(x),): how
    much brighter or darker than the slope everything is, about 1 in size."""
    pixel = float(y[1] - y[0])
    rough: Array = ground.copy()
    below = np.float32(0.0)
    for row in range(_ROWS):
        below += 0.55 * height * 1.13**row
        tall = height * 1.07**row
        tops, bright = treeline(x, tall, woods.cover, woods.rounded, offset + 31 * row + 1)
        foot = ridge + below
        first, last = (int(np.searchsorted(y, edge)) for edge in ((foot - tops).min(), foot.max() + pixel))
        if first >= len(y):
            break
        down = y[first:last, None] - (foot - tops)  # from the treetop
        tree = np.clip(down / pixel + 0.5, 0, 1) * np.clip(1.5 - (down - tops) / (0.3 * tall), 0, 1) * (tops > 0)
        shade = 1.5 * bright + 0.1 - 1.5 * np.clip(down / tall, 0, 1.2)
        rough[first:last] += (shade - rough[first:last]) * tree
    return rough


def grass(x: Array, y: Array, height: float, offset: int) -> Array:
    """A slope of shrubs and tufts of that height: zero on average, about 1 in size, (len(y), len(x))."""
    frequency = np.float32(max(0.8 / height, 32.0))
    return fractal_noise(frequency * x, 0.55 * frequency * y, offset, gain=0.6, octaves=4)


def crags(x: Array, y: Array, offset: int) -> Array:
    """Bare rock: creases of noise at 32 to 512 a picture height, steeper than wide; zero on average."""
    if len(x) < 2 or 36 * float(x[1] - x[0]) >= 0.5:  # a grid that does not show the coarsest
        return np.zeros((len(y), len(x)), np.float32)
    plain = fractal_noise(36 * x, 20 * y, offset, gain=0.62, octaves=5)
    finer = fractal_noise(64 * x + 5, 40 * y, offset + 77, gain=0.6, octaves=4)
    creased: Array = 0.8 - np.abs(plain) + 0.35 * finer
    return creased


def waves(x: Array, distance: Array, offset: int) -> Array:
    """Small waves on water `distance` (n,) below its far shore: long across, ever finer towards it."""
    return fractal_noise(34 * x, 60 * np.log(distance + np.float32(0.06)), offset, gain=0.7, octaves=4)


def wisps(u: Array, v: Array, offset: int) -> Array:
    """The grain of clouds whose own noise has coordinates `u` and `v`."""
    return fractal_noise(28 * u, 28 * v, offset + 11, gain=0.65, octaves=4)
