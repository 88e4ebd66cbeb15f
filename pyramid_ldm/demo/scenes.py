"""Procedural landscapes: the built-in data of the demo.

A picture is drawn in two steps. `Scene.draw` picks the composition and palette from a random generator; the
functions below it paint that scene back to front (sky, stars, sun or moon, clouds, ranges, water, bank).

Everything is computed in normalised coordinates: y runs from 0 (top) to 1 (bottom), x has the same unit and is 0 in
the centre column. Size therefore only sets the resolution and, through the aspect ratio, how much is seen to the
sides. Noise octaves too fine for the pixel grid are faded out, so small pictures are clean rather than aliased.
Colours are blended directly as sRGB values in [0, 1], which is the space the palettes were picked in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyramid_ldm.demo import detail
from pyramid_ldm.demo.noise import Array, fractal_noise
from pyramid_ldm.demo.scene import Clouds, Range, Scene


def render_landscape(index: int, height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Render landscape number `index` of the endless collection `seed`.

    The scene depends only on (seed, index). The size changes its resolution, and the aspect ratio how much of it is
    seen to the left and right of the centre.

    Returns:
        uint8 array (height, width, 3), sRGB.

    Raises:
        ValueError: `height` or `width` is not positive, or `index` or `seed` is negative.
    """
    if height <= 0 or width <= 0:
        raise ValueError(f"size must be positive, got {height}x{width}")
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must not be negative, got index {index}, seed {seed}")
    scene = Scene.draw(np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index]))))
    columns, rows = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    view = _View((columns + 0.5 - width / 2) / height, (rows + 0.5) / height, 1 / height)
    image = _sky(scene, view)
    if scene.night:
        _paint_stars(image, scene, view)
    _paint_body(image, scene, view)
    for clouds in scene.clouds:
        _paint_clouds(image, clouds, scene, view)
    texture = fractal_noise(3 * view.x, 5 * view.y, scene.offset, octaves=5)
    for hills in scene.ranges:
        _paint_range(image, hills, texture, scene, view)
    if scene.water is not None:
        _paint_water(image, scene, scene.water, view)
        if scene.bank is not None:
            _paint_range(image, scene.bank, texture, scene, view)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class _View:
    """The pixel grid in normalised coordinates."""

    x: Array  # (width,)
    y: Array  # (height,)
    pixel: float  # side of a pixel

    def finer(self, times: int) -> _View:
        """The same columns, each divided."""
        parts = (np.arange(times, dtype=np.float32) + 0.5) / times - 0.5
        return _View((self.x[:, None] + self.pixel * parts).ravel(), self.y, self.pixel / times)


def _smoothstep(low: float, high: float, value: Array) -> Array:
    """0 below `low`, 1 above `high`, smooth between (falling if `low` > `high`)."""
    t = np.clip((value - low) / (high - low), 0, 1)
    step: Array = t * t * (3 - 2 * t)
    return step


def _blend(image: Array, colour: Array, alpha: Array) -> None:
    """Paint `colour` over `image` in place; `alpha` is (height, width)."""
    image += (colour - image) * alpha[..., None]


def _gaussian(target: Array, source: Array, sigma: Array) -> Array:
    """Weights (len(target), len(source)) that blur samples at `source` to each target with its own `sigma`."""
    weights = np.exp(-0.5 * ((source - target[:, None]) / sigma[:, None]) ** 2) + np.float32(1e-12)
    normalised: Array = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def _sky(scene: Scene, view: _View) -> Array:
    """The sky: zenith to horizon, with a warm band on the horizon below the sun."""
    t = np.clip(view.y / scene.horizon, 0, 1)
    rows = np.stack([np.interp(t, (0, 0.55, 1), scene.palette[:3, c]) for c in range(3)], axis=-1)
    image = np.repeat(rows[:, None].astype(np.float32), len(view.x), axis=1)
    warmth = 0.55 * math.exp(-((scene.elevation / 0.35) ** 2))
    aside = np.exp(-(((view.x - scene.body[0]) / (0.5 * scene.glow)) ** 2))
    above = np.exp(-np.abs(scene.horizon - view.y) / 0.16)
    _blend(image, scene.palette[3], warmth * above[:, None] * aside)
    return image


def _paint_stars(image: Array, scene: Scene, view: _View) -> None:
    """Stars: small Gaussian spots, fainter where a pixel is larger than the star."""
    sigma = max(0.0009, 0.55 * view.pixel)
    dark = min(1.0, (-0.4 - scene.elevation) / 0.3) * min(1.0, 0.0022 / sigma)
    faint = 0.35 * detail.shown(0.004, view.pixel)
    stars = scene.stars
    if faint:
        stars = np.concatenate([stars, scene.faint_stars * np.array((1, 1, faint), np.float32)])
    for sx, sy, brightness in stars:
        column, row = round((sx - view.x[0]) / view.pixel), round((sy - view.y[0]) / view.pixel)
        if 2 <= column < len(view.x) - 2 and 2 <= row < len(view.y) - 2:
            block = slice(row - 2, row + 3), slice(column - 2, column + 3)
            square = ((view.x[block[1]] - sx) ** 2 + (view.y[block[0]][:, None] - sy) ** 2) / (2 * sigma * sigma)
            image[block] += (dark * brightness**2 * np.exp(-square))[..., None]


def _paint_body(image: Array, scene: Scene, view: _View) -> None:
    """The sun or moon: a disc and its halo."""
    x, y, radius = scene.body
    distance = np.hypot(view.x - x, view.y[:, None] - y)
    halo = np.exp(-distance / (0.1 * scene.glow)) * 0.5 + np.exp(-distance / (0.3 * scene.glow)) * 0.3
    disc = np.clip((radius - distance) / view.pixel + 0.5, 0, 1)
    if scene.night:
        shadow = np.hypot(view.x - x - 1.5 * radius * scene.phase, view.y[:, None] - y + 0.4 * radius)
        disc *= np.clip((shadow - radius) / view.pixel + 0.5, 0, 1) if scene.phase < 0.6 else 1
        halo *= 0.45
    _blend(image, scene.palette[3], halo)
    white = 0.7 if scene.night else min(0.55 + 0.5 * abs(scene.elevation), 0.85)
    _blend(image, scene.palette[3] * (1 - white) + white, disc)


def _paint_clouds(image: Array, clouds: Clouds, scene: Scene, view: _View) -> None:
    """A layer of clouds, lit from above by day and from below when the sun is low."""
    u, v = clouds.frequency * view.x, clouds.frequency * clouds.stretch * view.y
    noise = fractal_noise(u, v, clouds.offset)
    from_sun = 0.25 if scene.elevation > 0.15 or scene.night else -0.25
    relief = noise - fractal_noise(u, v - np.float32(from_sun), clouds.offset, octaves=3)
    noise = noise + 0.16 * detail.wisps(u, v, clouds.offset)
    # Towards the edges of the layer only the densest parts remain.
    threshold = 1.2 - 2.4 * clouds.cover + ((view.y[:, None] - clouds.centre) / clouds.spread) ** 2
    alpha = _smoothstep(0, 2 * clouds.softness, noise - threshold) * clouds.opacity
    light = _smoothstep(-1.2, 1.2, relief)[..., None]
    dark = 0.55 * scene.palette[1] + 0.35 * scene.palette[0]
    bright = scene.palette[3] if not scene.night else 0.6 * scene.palette[1] + 0.4 * scene.palette[3]
    _blend(image, dark + (bright - dark) * light, alpha)


def _ridge(hills: Range, view: _View) -> Array:
    """The y of the ridge line in every column."""
    noise = fractal_noise(hills.frequency * view.x, None, hills.offset, gain=0.45)
    rolling = 0.5 + 0.28 * noise
    # A crease in the noise, slightly rounded, is a peak; the average keeps a rugged range from being all spikes.
    sharp = 1.1 - 0.8 * np.sqrt(noise * noise + 0.003)
    x, extra, spread = hills.summit
    summit = extra * (1 + 0.08 * noise) * np.exp(-np.abs(view.x - x) / spread)
    profile = rolling + (sharp - rolling) * hills.ruggedness
    ridge: Array = hills.base + hills.tilt * view.x - hills.height * profile - summit
    return ridge


def _hillside_light(ridge: Array, depth: Array, texture: Array, lean: bool, scene: Scene, view: _View) -> Array:
    """How lit each point below the ridge is, 0 to 1: bright on slopes that face the sun, fading out with `depth`."""
    rise = np.interp(view.x - 0.03, view.x, ridge) - np.interp(view.x + 0.03, view.x, ridge)
    aspect = np.tanh(35 * rise) * (1 if scene.body[0] < 0 else -1)
    below = np.maximum(depth, 0)
    # Spurs run down at an angle (to the side that `lean` says) where plain columns would be vertical stripes.
    aside = view.x + below * (0.5 if lean else -0.5) + 0.02 * texture
    facing = np.interp(aside, view.x, aspect).astype(np.float32) * np.exp(-below / 0.15)
    light: Array = np.clip(0.5 + 0.4 * facing + 0.08 * texture, 0, 1)
    return light


def _paint_range(image: Array, hills: Range, texture: Array, scene: Scene, view: _View) -> None:
    """A range: ground lit from the sun's side, snow on top, haze with distance, mist at its foot."""
    ridge = _ridge(hills, view)
    slope = np.gradient(ridge, view.pixel) if len(ridge) > 1 else np.zeros_like(ridge)
    depth = view.y[:, None] - ridge
    trees = scene.woods.height * (1 - 0.75 * hills.haze) * (hills.ruggedness < 0.5)
    shown = detail.shown(trees, view.pixel)
    if shown:
        cover = _wooded(hills, trees * shown, scene, view)
    else:
        # Dividing by the length of the normal makes the edge one pixel wide on steep slopes too.
        cover = np.clip(depth / (view.pixel * np.sqrt(1 + slope * slope)) + 0.5, 0, 1)
    clear = 1 - 0.8 * hills.haze
    rough = _roughness(hills, view)
    if shown:
        rough = detail.forest(0.5 * rough, view.x, view.y, ridge, trees * shown, scene.woods, hills.offset)
    lit = _hillside_light(ridge, depth, texture, hills.offset % 2 == 1, scene, view)
    lit = np.clip(lit + 0.25 * clear * rough, 0, 1)[..., None]
    zenith, middle, horizon, light = scene.palette
    day = float(np.interp(scene.elevation, (-1, -0.4, 0, 0.5), (0.16, 0.25, 0.55, 0.95)))
    shade = scene.ground * 0.3 * day + zenith * 0.06 + middle * 0.12 * day
    colour = shade + (scene.ground * light * day * 1.4 - shade) * lit
    # Land against the light stays darker than the sky, most of all at dusk.
    air = (0.3 * horizon + 0.5 * middle + 0.2 * zenith) * (0.78 + 0.2 * day)
    colour += (air - colour) * hills.haze
    if hills.snow:
        line = hills.base - (hills.height + hills.summit[1]) * (1 - hills.snow)
        shadow = 0.5 * air + 0.4 * middle
        white = shadow + ((0.2 + 0.8 * day**0.6) * (0.4 * light + 0.6) - shadow) * np.sqrt(lit)
        edge = view.y[:, None] - line + 0.04 * texture + 0.02 * rough
        _blend(colour, white, (1 - 0.35 * hills.haze) * _smoothstep(0.025, -0.025, edge))
    _blend(colour, 0.5 * air + 0.5 * horizon, hills.mist * _smoothstep(0.0, 0.22, depth))
    _blend(image, colour, cover)


def _roughness(hills: Range, view: _View) -> Array:
    """What a hillside is made of: crags, or grass."""
    grass = 0.5 * detail.grass(view.x, view.y, 0.012 * (1.2 - hills.haze), hills.offset)
    if not hills.ruggedness:
        return grass
    return grass + (detail.crags(view.x, view.y, hills.offset) - grass) * hills.ruggedness


def _wooded(hills: Range, height: float, scene: Scene, view: _View) -> Array:
    """How much of each pixel a range covers whose ridge is fringed with trees."""
    woods, times = scene.woods, max(1, math.ceil(view.pixel / 0.0006))
    fine = view.finer(times)
    tops, _ = detail.treeline(fine.x, height, woods.cover, woods.rounded, hills.offset)
    top = _ridge(hills, fine) - tops
    cover = np.zeros((len(view.y), len(view.x)), np.float32)
    first, last = (int(np.searchsorted(view.y, edge)) for edge in (top.min() - view.pixel, top.max() + view.pixel))
    band = np.clip((view.y[first:last, None] - top) / view.pixel + 0.5, 0, 1)
    cover[first:last] = band.reshape(last - first, len(view.x), times).mean(axis=2)
    cover[last:] = 1
    return cover


def _paint_water(image: Array, scene: Scene, shore: float, view: _View) -> None:
    """Water below `shore`: a reflection that blurs towards the viewer, ripples, and the glitter path of the sun."""
    below = view.y > shore - view.pixel
    y, above = view.y[below], view.y[view.y < shore]
    if not len(y) or not len(above):
        return
    distance = np.maximum(y - shore, 0)
    mirrored = shore - 1.15 * distance
    blur = 0.006 + 0.12 * distance + 0.5 * view.pixel
    surface: Array = np.tensordot(_gaussian(mirrored, above, blur), image[: len(above)], 1)
    surface = _gaussian(view.x, view.x, np.full_like(view.x, 0.018)) @ surface
    # Equal steps of the logarithm are ripples that shrink towards the far shore.
    ripple = fractal_noise(3 * view.x, 8 * np.log(distance + 0.05), scene.offset, gain=0.6, octaves=6)
    small = detail.waves(view.x, distance, scene.offset)
    ripple = ripple + 0.8 * np.minimum(1, 14 * distance)[:, None] * small
    deep = 0.5 * scene.palette[0] + 0.1 * scene.palette[1]
    _blend(surface, deep, np.clip(0.12 + 0.6 * distance[:, None] + 0.07 * ripple, 0, 1))
    x, altitude, radius = scene.body
    if altitude < shore:
        path = np.exp(-(((view.x - x) / (radius + 0.25 * distance[:, None])) ** 2) - distance[:, None] / 0.3)
        # Waves glitter less where they mirror dark land.
        path *= np.clip(0.6 + 0.45 * ripple, 0, 1) * np.minimum(0.35 + surface.mean(axis=2), 1)
        _blend(surface, 0.4 + 0.6 * scene.palette[3], path * _smoothstep(0, 0.06, distance)[:, None])
    cover = np.clip((y - shore) / view.pixel + 0.5, 0, 1)
    region = image[below]
    _blend(region, surface, np.broadcast_to(cover[:, None], region.shape[:2]))
    image[below] = region
