from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise, tiny_autoencoder
from PIL import Image

from pyramid_ldm.demo.pictures import nearest_neighbours
from pyramid_ldm.evaluation.latents import psnr_by_level
from pyramid_ldm.evaluation.metrics import bicubic, local_lipschitz, psnr
from pyramid_ldm.evaluation.sheets import comparison_grid, grid, latent_contributions, latents_sheet
from pyramid_ldm.nn.resample import bilinear_up, box_low_pass
from pyramid_ldm.pyramid import Level


def test_grid_places_images_in_reading_order():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = grid([Image.new("RGB", (4, 2), colour) for colour in colours], columns=2)
    assert sheet.size == (10, 6)
    assert [sheet.getpixel(xy) for xy in ((0, 0), (6, 0), (0, 4), (6, 4))] == [*colours, (255, 255, 255)]


def test_comparison_puts_originals_over_reconstructions():
    sheet = np.asarray(comparison_grid(torch.ones(2, 3, 4, 4), -torch.ones(2, 3, 4, 4)))
    assert sheet.shape == (10, 10, 3)
    assert (sheet[:4, :4] == 255).all()
    assert (sheet[6:, :4] == 0).all()


def test_contributions_of_figure_7():
    autoencoder = randomise(tiny_autoencoder(), 0.05).eval()
    with torch.no_grad():
        latents = autoencoder.encode(torch.rand(1, 3, 32, 32)).mode()
        zeros = tuple(torch.zeros_like(z) for z in latents)
        parts = latent_contributions(autoencoder, latents, zeros)
        assert torch.equal(parts.whole, autoencoder.decode(latents))
        assert torch.equal(parts.only[0], autoencoder.decode((latents[0], zeros[1])))
        assert torch.equal(parts.without[0], autoencoder.decode((zeros[0], latents[1])))
        assert torch.equal(parts.without[1], parts.only[0]), "with two levels, all but one is the other alone"
        assert torch.equal(parts.coarsest[0], parts.only[0])
        assert torch.equal(parts.coarsest[1], parts.whole)
        sheet = latents_sheet(autoencoder, torch.rand(3, 32, 32), zeros)
    assert sheet.size == (3 * 38 + 6, 3 * 56 + 6)


def test_bicubic_baseline_keeps_no_more_values_than_allowed():
    def near(images, values):
        return psnr(bicubic(images, values), images).mean()

    assert near(torch.linspace(-1, 1, 64).expand(2, 3, 64, 64), 3 * 16 * 16) > 40
    noise = torch.rand(1, 3, 64, 64) * 2 - 1
    assert near(noise, 3 * 16 * 16) < near(noise, 3 * 32 * 32) < near(noise, 3 * 64 * 64)
    assert near(noise, 3 * 64 * 64) > 50
    assert near(noise, 3 * 64 * 64 - 1) < 20


def test_nearest_neighbour_by_hand():
    candidates = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    index, distance = nearest_neighbours(torch.full((1, 3, 2, 2), 0.9), candidates)
    assert index.tolist() == [1]
    assert distance.item() == pytest.approx(0.1 * 127.5, rel=1e-5)


def test_local_lipschitz_of_a_linear_map():
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(local_lipschitz(lambda x: (3 * x,), images), torch.full((2,), 3.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(local_lipschitz(lambda x: (x, x), images), torch.full((2,), 2**0.5), atol=1e-3, rtol=0)


def test_psnr_by_level_of_a_known_pyramid():
    """Blocks of 4x4, then what they leave out: up to the first, exactly what its resolution shows; then all."""

    class Blocks:
        levels = (Level(4, 3), Level(1, 3))

        def encode(self, images):
            return SimpleNamespace(mode=lambda: (F.avg_pool2d(images, 4), images - box_low_pass(images, 4)))

        def decode_tiled(self, latents):
            return bilinear_up(bilinear_up(latents[0])) + latents[1]

    images = torch.rand(2, 3, 16, 16, generator=torch.manual_seed(0)) * 2 - 1
    zeros = (torch.zeros(1, 3, 1, 1),) * 2
    (first, coarse), (_, whole) = psnr_by_level(Blocks(), images, zeros)
    errors = (box_low_pass(images, 4) - images).square().flatten(1).mean(dim=1)
    assert first > 100
    assert coarse == pytest.approx(float((10 * (4 / errors).log10()).mean()), abs=1e-3)
    assert whole > 100
