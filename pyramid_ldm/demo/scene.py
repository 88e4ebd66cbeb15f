"""What is drawn at random about a procedural landscape: its composition and palette, independent of its size.

Lengths are in picture heights: y runs from 0 (top) to 1 (bottom), and x is 0 in the centre column.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass

import numpy as np

from pyramid_ldm.demo.noise import Array

# Sun elevation at each palette key: night, blue hour, dusk or dawn, golden hour, day.
_KEY_ELEVATIONS = (-1.0, -0.5, 0.0, 0.35, 1.0)
# Three palettes [palette, key, (zenith, middle, horizon, light)]; a scene uses a random mixture of them.
_PALETTES = (
    np.array(
        [
            [
                [(7, 12, 36), (17, 32, 72), (44, 70, 112), (120, 146, 196)],
                [(20, 38, 92), (62, 90, 156), (196, 160, 172), (170, 160, 200)],
                [(44, 76, 146), (176, 130, 166), (255, 178, 120), (255, 170, 120)],
                [(84, 142, 200), (176, 194, 206), (255, 220, 164), (255, 214, 150)],
                [(36, 104, 196), (104, 170, 228), (208, 232, 244), (255, 250, 236)],
            ],
            [
                [(14, 8, 36), (38, 24, 76), (92, 58, 112), (150, 130, 190)],
                [(36, 22, 84), (112, 58, 132), (238, 132, 128), (220, 140, 160)],
                [(74, 40, 116), (206, 82, 116), (255, 156, 76), (255, 140, 90)],
                [(120, 120, 180), (240, 176, 156), (255, 228, 168), (255, 206, 150)],
                [(92, 132, 206), (168, 188, 232), (248, 226, 226), (255, 244, 230)],
            ],
            [
                [(4, 18, 30), (10, 46, 60), (36, 98, 102), (120, 176, 176)],
                [(10, 52, 84), (46, 118, 134), (226, 190, 150), (190, 180, 170)],
                [(24, 92, 122), (150, 166, 150), (255, 200, 104), (255, 186, 110)],
                [(60, 150, 176), (164, 208, 190), (255, 236, 176), (255, 226, 160)],
                [(30, 134, 176), (116, 200, 208), (230, 244, 228), (255, 252, 232)],
            ],
        ],
        dtype=np.float32,
    )
    / 255
)
# Colours of the land along one continuous "season" axis.
_GROUNDS = (
    np.array(
        [
            (84, 120, 58),
            (46, 92, 64),
            (40, 84, 92),
            (62, 76, 118),
            (98, 70, 112),
            (142, 70, 76),
            (176, 98, 56),
            (188, 148, 82),
            (128, 130, 60),
            (84, 120, 58),
        ],
        dtype=np.float32,
    )
    / 255
)


@dataclass(frozen=True)
class Range:
    """One range of hills: its ridge line, and how it is coloured."""

    base: float  # y of the foot of its ridge line
    height: float  # how far peaks rise above the base
    frequency: float  # bumps per unit of x
    ruggedness: float = 0.0  # 0 is rolling hills, 1 is sharp peaks
    tilt: float = 0.0  # slope of the base line, y per x
    summit: tuple[float, float, float] = (0.0, 0.0, 1.0)  # x, extra height and width of one dominating mountain
    haze: float = 0.0  # 0 is full ground colour, 1 is the colour of the air
    mist: float = 0.0  # strength of the mist that gathers at its foot
    snow: float = 0.0  # fraction of the height, from the top, that is white
    offset: int = 0  # where its noise reads the lattice


@dataclass(frozen=True)
class Woods:
    """What grows on the nearer ranges."""

    height: float  # of the nearest trees; 0 where there are none
    cover: float  # 0 is a tree here and there, 1 a closed wood
    rounded: bool  # broad-leaved trees rather than conifers


@dataclass(frozen=True)
class Clouds:
    """One layer of clouds, between wispy veils (soft, stretched) and heaped clouds (crisp, rounder)."""

    centre: float  # y of the middle of the layer
    spread: float  # half of its thickness in y
    cover: float  # 0 is clear, 1 is closed
    softness: float  # width of the edge, in units of noise
    frequency: float  # clouds per unit of x
    stretch: float  # how much wider than high they are
    opacity: float
    offset: int


@dataclass(frozen=True)
class Scene:
    """All that was drawn at random about one landscape, independent of the picture's size."""

    elevation: float  # of the sun: -1 is deep night, 0 sunset or sunrise, 1 noon
    palette: Array  # (4, 3): zenith, middle, horizon, light
    ground: Array  # (3,): colour of the nearest land in full light
    horizon: float
    body: tuple[float, float, float]  # x, y and radius of the sun or moon
    phase: float  # of the moon: full above 0.6, towards 0 an ever thinner crescent
    glow: float  # size of the halo
    stars: Array  # (count, 3): x, y, brightness
    clouds: tuple[Clouds, ...]
    ranges: tuple[Range, ...]  # far to near
    water: float | None  # y of the far shore
    bank: Range | None  # land in front of the water
    offset: int
    woods: Woods
    faint_stars: Array  # (count, 3), seen in large pictures alone

    @property
    def night(self) -> bool:
        """Whether the moon, rather than the sun, is in the sky."""
        return self.elevation < -0.4

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Scene:
        """Draw a scene; the same state of `rng` gives the same scene."""
        elevation = float(rng.uniform(-0.9, 1))
        night = elevation < -0.4
        mixture = rng.dirichlet((0.5, 0.5, 0.5)).astype(np.float32)
        palette = _at(_KEY_ELEVATIONS, np.tensordot(mixture, _PALETTES, 1), elevation)
        palette = np.clip(palette * rng.normal(1, 0.05, 3).astype(np.float32), 0, 1)
        water = float(rng.uniform(0.52, 0.8)) if rng.random() < 0.5 else None
        horizon = float(rng.uniform(0.46, 0.72)) if water is None else water - 0.01
        altitude = rng.uniform(0.25, 0.5) if night else 0.42 * elevation + rng.uniform(-0.02, 0.1)
        radius = rng.uniform(0.03, 0.065) if night else 0.03 + 0.09 * rng.random() ** 2 * (1 - 0.7 * abs(elevation))
        # The bank rises to one side, and leaves the picture at the other.
        bank = Range(
            base=float(rng.uniform(0.98, 1.06)),
            height=0.07,
            frequency=1.5,
            offset=int(rng.integers(65536)),
            tilt=float(rng.uniform(0.12, 0.4) * rng.choice((-1, 1))),
        )
        return cls(
            elevation=elevation,
            palette=palette,
            horizon=horizon,
            water=water,
            phase=float(rng.uniform(0.2, 1)),
            ground=_at(range(len(_GROUNDS)), _GROUNDS, rng.uniform(0, len(_GROUNDS) - 1)),
            body=(float(rng.uniform(-0.38, 0.38)), max(horizon - float(altitude), 0.1), float(radius)),
            glow=float(rng.uniform(0.6, 1.5)),
            stars=rng.uniform((-2, 0, 0), (2, horizon, 1), (150, 3)).astype(np.float32),
            clouds=tuple(_draw_clouds(rng, horizon) for _ in range(rng.choice(4, p=(0.25, 0.4, 0.25, 0.1)))),
            ranges=_draw_ranges(rng, horizon, water),
            bank=bank if rng.random() < 0.45 else None,
            offset=int(rng.integers(65536)),
            # Drawn last: they change nothing of what was there before them.
            woods=_draw_woods(rng),
            faint_stars=rng.uniform((-2, 0, 0), (2, horizon, 1), (2500, 3)).astype(np.float32),
        )


def _draw_woods(rng: np.random.Generator) -> Woods:
    """Woods on two landscapes of three."""
    kind, height, cover, rounded = rng.random(4).tolist()
    return Woods(0.012 + 0.014 * height if kind < 0.66 else 0.0, 0.35 + 0.75 * cover, rounded < 0.3)


def _draw_clouds(rng: np.random.Generator, horizon: float) -> Clouds:
    """A layer of clouds above `horizon`."""
    crisp, place, spread, cover, frequency, stretch, opacity = rng.random(7).tolist()
    return Clouds(
        centre=horizon * (0.1 + 0.75 * place),
        spread=0.1 + 0.2 * spread,
        cover=0.35 + 0.4 * cover,
        softness=0.7 - 0.5 * crisp,
        frequency=1.2 + 1.4 * frequency,
        stretch=4.1 + 0.8 * stretch - 2.5 * crisp,
        opacity=0.5 + 0.45 * opacity,
        offset=int(rng.integers(65536)),
    )


def _draw_ranges(rng: np.random.Generator, horizon: float, water: float | None) -> tuple[Range, ...]:
    """Three to five ranges (at most three if there is water), far to near: ever lower, smoother and less hazy."""
    count = int(rng.integers(3, 6) if water is None else rng.integers(2, 4))
    lowest = float(rng.uniform(0.86, 0.95)) if water is None else horizon + 0.01
    alpine, air, mist = float(rng.random()), float(rng.uniform(0.55, 0.85)), float(rng.uniform(0, 0.8))
    snow = float(rng.uniform(0.35, 0.75)) if alpine > 0.35 and rng.random() < 0.7 else 0.0
    summit = (float(rng.uniform(-0.4, 0.4)), float(rng.uniform(0.12, 0.3)), float(rng.uniform(0.15, 0.35)))
    lone = rng.random() < 0.35
    ranges = []
    for i in range(count):
        near = i / (count - 1)
        bump, relief, frequency, tilt = rng.random(4).tolist()
        ruggedness = min(1.4 * alpine * (1 - near), 1.0)
        ranges.append(
            Range(
                base=horizon + (lowest - horizon) * near**1.2,
                ruggedness=ruggedness,
                tilt=0.2 * (tilt - 0.5) * near,
                height=0.05 + 0.08 * bump + alpine * (0.1 + 0.14 * relief) * (1 - near) ** 1.5,
                summit=summit if lone and i == 0 else (0.0, 0.0, 1.0),
                frequency=0.9 + 0.8 * frequency + 0.5 * ruggedness,
                haze=air * (1 - near) ** 1.3 + 0.06,
                mist=mist * (1 - 0.7 * near),
                snow=snow if i == 0 else 0.0,
                offset=int(rng.integers(65536)),
            )
        )
    return tuple(ranges)


def _at(keys: range | tuple[float, ...], values: Array, position: float) -> Array:
    """Linear interpolation between the rows of `values`, which lie at `keys`."""
    i = min(max(bisect(keys, position), 1), len(keys) - 1)
    t = (position - keys[i - 1]) / (keys[i] - keys[i - 1])
    row: Array = values[i - 1] * np.float32(1 - t) + values[i] * np.float32(t)
    return row
