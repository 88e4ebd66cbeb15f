"""Decoding a part of an image equals the same part of decoding it all."""

import random

import pytest
import torch
from conftest import randomise, tiny_autoencoder
from torch.utils.flop_counter import FlopCounterMode

from pyramid_ldm.autoencoders.pyramid.regions import Regions, plan
from pyramid_ldm.info.memory import PeakMemory

CONFIGS = {
    "attention below factor 8": {"levels": ((32, 6), (16, 4)), "attention__max_tokens": 32},
    "no attention": {"levels": ((16, 4),), "attention__max_tokens": 0},
    "a latent in the local part": {"levels": ((32, 6), (4, 4), (2, 2)), "attention__max_tokens": 16},
    "vit branch": {"levels": ((32, 6), (8, 4)), "attention__max_tokens": 16, "decoder__branch": "vit"},
    "skip": {"levels": ((16, 4),), "attention__max_tokens": 32, "skip": "skip"},
    "residual": {"levels": ((16, 4),), "attention__max_tokens": 32, "skip": "residual"},
    "neither": {"levels": ((16, 4),), "attention__max_tokens": 32, "skip": "none"},
    "deep branch": {"levels": ((16, 4), (4, 4)), "attention__max_tokens": 0, "decoder__branch_blocks": 3},
    "vq": {"levels": ((16, 4), (8, 4)), "latent": "vq", "codebook_size": 16},
    "group norms": {"levels": ((32, 6), (8, 4)), "attention__max_tokens": 16, "norm": "group"},
    "bilinear": {"levels": ((32, 6), (4, 4)), "attention__max_tokens": 16, "decoder__upsampling": "bilinear"},
    "no norms": {"levels": ((32, 6), (4, 4)), "attention__max_tokens": 16, "norm": "none"},
    "patches of two": {"levels": ((32, 6), (4, 4)), "attention__max_tokens": 16, "patch": 2},
    "patches of four": {"levels": ((32, 6), (4, 4)), "attention__max_tokens": 0, "patch": 4, "norm": "none"},
    "patches, bilinear": {"levels": ((16, 4), (8, 4)), "patch": 4, "decoder__upsampling": "bilinear"},
    "patches without skips": {"levels": ((16, 4),), "attention__max_tokens": 32, "patch": 4, "skip": "none"},
    "thumbnail": {"levels": ((32, 6), (8, 12)), "attention__max_tokens": 16, "base": "thumbnail", "norm": "none"},
    "thumbnail, patches": {"levels": ((16, 4), (8, 48)), "patch": 4, "base": "thumbnail", "skip": "residual"},
    "linear base": {"levels": ((32, 6), (8, 12)), "attention__max_tokens": 16, "base": "linear", "norm": "none"},
    "linear base, patches": {"levels": ((16, 4), (8, 12)), "patch": 4, "base": "linear", "skip": "residual"},
    "one level": {"levels": ((1, 4),), "attention__max_tokens": 0},
}
ALL_GLOBAL = {"levels": ((8, 4),), "attention__max_tokens": 1 << 20}
SIZES = [(128, 128), (64, 160), (224, 64)]


def model_and_latents(changes, size, batch=2):
    # The encoder takes no part; without spectral norm it is built in half the time.
    model = randomise(tiny_autoencoder(image_size=size, encoder__spectral_norm=False, **changes)).eval()
    generator = torch.Generator().manual_seed(3)
    latents = tuple(
        torch.randn(batch, level.channels, size[0] // level.factor, size[1] // level.factor, generator=generator)
        for level in model.levels
    )
    return model, latents


def random_region(size, rng):
    height, width = rng.randint(1, size[0]), rng.randint(1, size[1])
    if rng.random() < 0.7:
        height, width = min(height, rng.randint(1, 24)), min(width, rng.randint(1, 24))
    top = rng.choice([0, size[0] - height, rng.randint(0, size[0] - height)])
    left = rng.choice([0, size[1] - width, rng.randint(0, size[1] - width)])
    return top, left, height, width


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_region_is_that_part_of_the_image(changes, size):
    """float32 sums in another order differ by about 1e-6; values are of order one."""
    if size[0] % changes["levels"][0][0] or size[1] % changes["levels"][0][0]:
        pytest.skip("the size is no multiple of the coarsest factor")
    model, latents = model_and_latents(changes, size)
    rng = random.Random(5)
    with torch.no_grad():
        whole = model.decode(latents)
        for _ in range(5):
            top, left, height, width = region = random_region(size, rng)
            part = model.decode(latents, region=region)
            torch.testing.assert_close(
                part, whole[:, :, top : top + height, left : left + width], atol=1e-4, rtol=0, msg=f"region {region}"
            )


def test_with_attention_everywhere_all_of_it_is_computed():
    model, latents = model_and_latents(ALL_GLOBAL, (32, 48), batch=1)
    with torch.no_grad():
        whole = model.decode(latents)
        torch.testing.assert_close(model.decode(latents, region=(3, 5, 8, 9)), whole[:, :, 3:11, 5:14])
        torch.testing.assert_close(model.decode_tiled(latents, 16), whole)


@pytest.mark.parametrize("tile", [16, 40, 1000])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_tiles_make_the_same_image(changes, tile):
    model, latents = model_and_latents(changes, (64, 160))
    with torch.no_grad():
        torch.testing.assert_close(model.decode_tiled(latents, tile), model.decode(latents), atol=1e-4, rtol=0)


def test_several_regions_of_several_images_are_one_batch():
    model, latents = model_and_latents(CONFIGS["attention below factor 8"], (128, 128))
    regions = Regions(24, 17, ((1, 0, 0), (0, 50, 60), (1, 104, 111), (0, 3, 111)))
    with torch.no_grad():
        parts = model.decoder(latents, regions)
        torch.testing.assert_close(parts, regions.cut(model.decode(latents)), atol=1e-4, rtol=0)


def test_gradients_of_a_region_are_those_of_the_whole_image_cut():
    """With and without recomputing: what a loss on the region asks of every weight and latent."""
    found = []
    for changes in ({}, {"checkpoint_factors": [1, 2, 4]}):
        for in_part in (False, True):
            model, latents = model_and_latents(CONFIGS["a latent in the local part"] | changes, (64, 160))
            latents = tuple(level.requires_grad_() for level in latents)
            regions = Regions(20, 30, ((0, 10, 33), (1, 44, 130)))
            parts = model.decoder(latents, regions) if in_part else regions.cut(model.decode(latents))
            parts.square().sum().backward()
            found.append([p.grad for p in [*model.decoder.parameters(), *latents]])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_region_costs_its_share():
    """Above the levels with attention only the region and its halo is computed."""
    model, latents = model_and_latents(CONFIGS["attention below factor 8"], (512, 512), batch=1)
    with torch.no_grad():
        with FlopCounterMode(display=False) as whole:
            model.decode(latents)
        with FlopCounterMode(display=False) as part:
            model.decode(latents, region=(100, 300, 64, 64))
    assert part.get_total_flops() < 0.1 * whole.get_total_flops()


def test_tiles_need_less_memory():
    model, latents = model_and_latents(CONFIGS["attention below factor 8"], (1024, 1024), batch=1)
    with torch.no_grad():
        with PeakMemory() as whole:
            model.decode(latents)
        with PeakMemory() as tiles:
            model.decode_tiled(latents, 128)
    image = 3 * 1024 * 1024 * 4
    assert tiles.peak - image < 0.2 * (whole.peak - image)


@pytest.mark.parametrize("region", [(-1, 0, 8, 8), (0, 0, 65, 8), (60, 0, 8, 8), (0, 157, 8, 8), (0, 0, 0, 8)])
def test_a_region_outside_the_image_is_refused(region):
    model, latents = model_and_latents(CONFIGS["no attention"], (64, 160))
    with pytest.raises(ValueError, match="does not lie inside"):
        model.decode(latents, region=region)


def test_windows_by_hand():
    """A 4x4 region at (10, 20) of 64x64; two levels that reach 2 pixels each.

    Finest: rows 10 to 14 widened to 8 to 16. Those are read from rows (8 - 1) // 2 = 3 on, 8 / 2 + 2 = 6 of them,
    of the coarser level, which is computed on 1 to 11, read from rows 0 to 7 of the level below it.
    """
    (coarse, fine), final = plan(Regions(4, 4, ((0, 10, 20),)), [(32, 32), (64, 64)], [2, 2])
    assert (fine.above.height, fine.latent.places) == (8, ((0, 8, 18),))
    assert (fine.below.height, fine.below.places) == (6, ((0, 3 - 1, 8 - 6),))
    assert fine.above.places == ((0, 8 - 2 * 3, 18 - 2 * 8),)
    assert (coarse.latent.height, coarse.latent.places) == (10, ((0, 1, 6),))
    assert (coarse.below.height, coarse.below.places) == (7, ((0, 0, 2),))
    assert final.places == ((0, 2, 2),)


def test_drawn_regions_lie_inside_and_belong_to_their_position():
    drawn = [Regions.draw(3, 16, (40, 64), seed=0, positions=[p]) for p in range(200)]
    together = Regions.draw(3, 16, (40, 64), seed=0, positions=range(200))
    assert [corner[1:] for regions in drawn for corner in regions.corners] == [c[1:] for c in together.corners]
    assert [c[0] for c in together.corners] == [image for image in range(200) for _ in range(3)]
    together.check(200, 40, 64)
    assert Regions.draw(1, 100, (40, 64), 0, [0]) == Regions(40, 64, ((0, 0, 0),))


def test_every_pixel_is_looked_at_about_as_often():
    """Half as often at a border, at most one and a half times as often near it."""
    seen = torch.zeros(48, 64)
    drawn = Regions.draw(1, 16, (48, 64), seed=1, positions=range(20_000))
    for _, top, left in drawn.corners:
        seen[top : top + 16, left : left + 16] += 1
    rows, columns = seen.mean(1) / seen.mean(), seen.mean(0) / seen.mean()
    assert 0.4 < rows.min() < rows.max() < 1.6
    assert 0.4 < columns.min() < columns.max() < 1.6
