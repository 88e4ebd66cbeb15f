"""PSNR, SSIM, LPIPS, FID and KID, each against somebody else's implementation."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from pyramid_ldm.data.images import to_tensor
from pyramid_ldm.demo.scenes import render_landscape
from pyramid_ldm.evaluation.frechet import Moments, frechet_distance, kernel_distance
from pyramid_ldm.evaluation.metrics import periodic_error, psnr, ssim

skimage = pytest.importorskip("skimage.metrics")


def pairs():
    """Twenty: landscapes that are blurred, darkened, noisy, shifted, of the wrong colour; bright ones and dark ones."""
    found = []
    for i in range(20):
        height, width = [(48, 64), (64, 64), (33, 80), (96, 40)][i % 4]
        image = Image.fromarray(render_landscape(i, height, width))
        array = np.asarray(image).astype(float)
        noise = np.random.default_rng(i).normal(0, 12, array.shape)
        changed = [
            np.asarray(image.filter(ImageFilter.GaussianBlur(1 + i % 3))).astype(float),
            0.6 * array,
            array + noise,
            np.roll(array, 2, axis=1),
            array[..., ::-1],
            0.1 * array + 3,
            255 - array,
        ][i % 7]
        found.append((array.astype(np.uint8), changed.round().clip(0, 255).astype(np.uint8)))
    return found


PAIRS = pairs()


def tensors(pair):
    return tuple(to_tensor(Image.fromarray(part))[None] for part in pair)


@pytest.mark.parametrize("pair", PAIRS, ids=range(20))
def test_ssim_is_scikit_images(pair):
    expected = skimage.structural_similarity(
        *pair, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert float(ssim(*tensors(pair))) == pytest.approx(expected, abs=1e-3)


def test_ssim_knows_that_black_is_zero():
    """Grey a little above and a little below the middle: of [-1, 1] data the means would have other signs."""
    light, dark = (torch.full((1, 3, 16, 16), value) for value in (0.02, -0.02))
    assert float(ssim(light, dark)) == pytest.approx(0.9992, abs=1e-4)


@pytest.mark.parametrize("pair", PAIRS, ids=range(20))
def test_psnr_is_scikit_images(pair):
    expected = skimage.peak_signal_noise_ratio(*pair, data_range=255)
    assert float(psnr(*tensors(pair))) == pytest.approx(expected, abs=1e-3)


def test_periodic_error_is_what_repeats():
    """Noise of deviation 0.1 has none; stripes of amplitude 0.1 and a period of 4 pixels, two of the 30 frequencies
    that are looked at, add 0.1^2 * 128 / (60 * 0.1^2) to the ratio."""
    generator = torch.manual_seed(0)
    target = torch.rand(8, 1, 128, 128, generator=generator)
    noise = 0.1 * torch.randn(8, 1, 128, 128, generator=generator)
    stripes = 0.1 * torch.cos(torch.arange(128) * torch.pi / 2)
    assert periodic_error(target + noise, target).mean().item() == pytest.approx(1, abs=0.05)
    for pattern in (stripes, stripes[:, None]):
        found = periodic_error(target + noise + pattern, target)
        assert found.mean().item() == pytest.approx(1 + 128 / 60, abs=0.1)
    opposite = torch.stack([stripes, -stripes, torch.zeros(128)]).view(1, 3, 1, 128).expand(-1, -1, 128, -1)
    assert periodic_error(opposite, torch.zeros_like(opposite)).item() > 1e6, "of colours, too"
    assert periodic_error(target, target).tolist() == [1.0] * 8
    assert periodic_error(target[..., :30] + stripes[:30], target[..., :30]).min() > 10, (
        "of a part, cut to whole periods"
    )
    with pytest.raises(ValueError, match="too small"):
        periodic_error(target[..., :7], target[..., :7])


def test_metrics_are_of_each_image():
    same = [pair for pair in PAIRS if pair[0].shape == PAIRS[1][0].shape][:3]
    many = tuple(torch.cat(side) for side in zip(*map(tensors, same), strict=True))
    for metric in (psnr, ssim):
        together = metric(*many)
        assert together.shape == (3,)
        for one, pair in zip(together, same, strict=True):
            assert float(one) == pytest.approx(float(metric(*tensors(pair))), rel=1e-5)


def test_lpips_is_torchmetrics(perceptual):
    """VGG's weights are not there: the same random ones on both sides; the heads are each package's own copy."""
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    theirs = lpips._LPIPS(pretrained=True, net="vgg", pnet_rand=True).eval()
    own = dict(perceptual.network.net.named_parameters())
    for name, parameter in theirs.net.named_parameters():
        parameter.data.copy_(own[name])
    for pair in PAIRS[1::4][:3]:
        a, b = tensors(pair)
        expected = float(theirs(a, b).mean())
        assert float(perceptual(a, b)) == pytest.approx(expected, rel=1e-4)
        assert perceptual.in_parts(a, b) == pytest.approx(expected, rel=1e-4)


def features(count, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(48, 48, generator=torch.Generator().manual_seed(9)) / 7
    return torch.randn(count, 48, generator=generator) @ mixing + shift


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.5])
def test_fid_is_torch_fidelitys(shift):
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = features(300, 0), features(240, 1, shift)
    statistics = [fidelity.fid_features_to_statistics(x) for x in (a, b)]
    expected = fidelity.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(Moments.of(a.split(70)), Moments.of([b])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.5])
def test_kid_is_torch_fidelitys(shift):
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = features(1100, 0).double(), features(1100, 1, shift).double()
    found = fidelity.kid_features_to_metric(
        a, b, kid_subsets=1, kid_subset_size=1100, kid_kernel="poly", kid_degree=3, kid_gamma=None, kid_coef0=1,
        verbose=False, rng_seed=0,
    )  # fmt: skip
    expected = found["kernel_inception_distance_mean"]
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    xx, xy, yy = (((p @ q.T) / 48 + 1).numpy() ** 3 for p, q in ((a, a), (a, b), (b, b)))
    paired = fidelity.mmd2(xx, xy, yy, mmd_est="u-statistic")
    assert kernel_distance(a, b, paired=True) == pytest.approx(paired, rel=1e-6, abs=1e-12)
