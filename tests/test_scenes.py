"""The procedural landscapes of the demo."""

import numpy as np
import pytest

from pyramid_ldm.demo.scene import Scene
from pyramid_ldm.demo.scenes import render_landscape


def small(index: int, seed: int = 0) -> np.ndarray:
    return render_landscape(index, 64, 64, seed=seed)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference, in levels of 0 to 255."""
    return float(np.abs(a.astype(np.float64) - b).mean())


def test_is_deterministic():
    for index in range(8):
        np.testing.assert_array_equal(small(index), small(index))


def test_seed_and_index_both_matter():
    assert difference(small(3), small(3, seed=1)) > 3
    # Neither order nor sum of the two may be all that counts.
    assert difference(small(1, seed=2), small(2, seed=1)) > 3


def test_no_two_scenes_look_alike():
    images = [small(index) for index in range(40)]
    closest = min(difference(a, b) for i, a in enumerate(images) for b in images[:i])
    assert closest > 10


def test_scenes_span_night_to_day_and_many_hues():
    images = np.stack([small(index) for index in range(100)]).astype(np.float64)
    brightness = images.mean(axis=(1, 2, 3))
    assert brightness.std() > 25
    assert brightness.min() < 60
    assert brightness.max() > 160
    warmth = (images[..., 0] - images[..., 2]).mean(axis=(1, 2))
    assert warmth.min() < -25
    assert warmth.max() > 40


def test_size_changes_only_the_resolution():
    for index in range(16):
        double = render_landscape(index, 128, 128).astype(np.float64)
        reduced = double.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert difference(reduced, small(index)) < 2.5


def test_wider_picture_shows_more_to_the_sides():
    for index in range(16):
        wide = render_landscape(index, 64, 128)
        assert difference(wide[:, 32:96], small(index)) < 1


def test_small_pictures_are_free_of_fine_noise():
    images = np.stack([small(index) for index in range(20)]).astype(np.float64)
    across = np.abs(np.diff(images, axis=2)).mean(axis=(1, 2, 3))
    assert across.max() < 3


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 97), (80, 20), (1, 1), (1, 50), (50, 1), (4, 4), (2, 3)])
def test_any_positive_size(height, width):
    for index in range(12):
        image = render_landscape(index, height, width)
        assert image.shape == (height, width, 3)
        assert image.dtype == np.uint8


@pytest.mark.parametrize(("height", "width"), [(0, 64), (64, 0), (-1, 64)])
def test_rejects_invalid_size(height, width):
    with pytest.raises(ValueError, match="size must be positive"):
        render_landscape(0, height, width)


@pytest.mark.parametrize("arguments", [{"index": -1}, {"index": 0, "seed": -1}])
def test_rejects_negative_index_and_seed(arguments):
    with pytest.raises(ValueError, match="must not be negative"):
        render_landscape(height=8, width=8, **arguments)


def test_draws_stay_within_their_ranges():
    for seed in range(200):
        scene = Scene.draw(np.random.default_rng(seed))
        assert 2 <= len(scene.ranges) <= 5
        assert scene.palette.shape == (4, 3)
        assert scene.palette.min() >= 0
        assert scene.palette.max() <= 1
        assert abs(scene.body[0]) < 0.4
        bases = [hills.base for hills in scene.ranges]
        assert bases == sorted(bases)
