"""Every term alone moves exactly the parameters it should."""

import copy

import pytest
import torch
from conftest import randomise, tiny_autoencoder
from torch import nn

from pyramid_ldm.autoencoders.pyramid.discriminator import PatchDiscriminator, hinge_loss
from pyramid_ldm.autoencoders.pyramid.loss import AutoencoderLoss, discriminator_learns, gan_factor
from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.config.autoencoder import GanConfig, LossConfig, PerceptualConfig


def terms(l1=0.0, lpips=0.0, kl=0.0, codebook=0.0, gan=0.0, mode="constant"):
    return LossConfig(
        l1=l1,
        perceptual=PerceptualConfig(weight=lpips),
        kl=kl,
        codebook=codebook,
        gan=GanConfig(weight=gan, mode=mode, start=0, disc_warmup=0, ramp=0),
    )


def moved(config, perceptual=None, latent="kl"):
    """Names of the parts of the autoencoder, and of the discriminator, that the objective gives a gradient."""
    autoencoder = randomise(tiny_autoencoder(latent=latent), 0.05).train()
    discriminator = PatchDiscriminator(channels=8, layers=2)
    loss = AutoencoderLoss(config, perceptual if config.perceptual.weight else None, discriminator)
    loss.adaptive.value = 1.0
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    loss.accumulate_gradients(autoencoder(image), image, autoencoder.decoder.last_weight, 10, 1.0)

    def parts(module):
        return {n.split(".")[0] for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    return parts(autoencoder), parts(discriminator)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (terms(l1=1), {"encoder", "decoder"}),
        (terms(lpips=1), {"encoder", "decoder"}),
        (terms(gan=1), {"encoder", "decoder"}),
        (terms(gan=1, mode="adaptive"), {"encoder", "decoder"}),
        (terms(kl=1), {"encoder"}),
        (terms(), set()),
    ],
    ids=["l1", "lpips", "gan", "adaptive gan", "kl", "nothing"],
)
def test_reach_of_each_term(config, expected, perceptual):
    assert moved(config, perceptual) == (expected, set())


def test_reach_of_the_codebook_term():
    assert moved(terms(codebook=1), latent="vq") == ({"encoder", "quantizers"}, set())
    assert moved(terms(l1=1), latent="vq") == ({"encoder", "decoder"}, set())


def test_the_discriminators_loss_reaches_the_discriminator_alone():
    autoencoder = tiny_autoencoder().train()
    discriminator = PatchDiscriminator(channels=8, layers=2)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    output = autoencoder(image)
    real, fake = discriminator(torch.cat([image, output.reconstruction.detach()])).chunk(2)
    hinge_loss(real, fake).backward()
    assert all(p.grad is None for p in autoencoder.parameters())
    assert all(p.grad is not None for p in discriminator.parameters())


def test_the_gradient_is_that_of_the_written_objective(perceptual):
    """Term-wise gradients at the reconstruction, pushed through once, equal autograd on the sum of all terms."""
    config = terms(l1=0.7, lpips=0.3, kl=0.2, gan=0.5)
    discriminator = PatchDiscriminator(channels=8, layers=2)
    image = torch.rand(2, 3, 32, 32) * 2 - 1

    def gradients(compute):
        autoencoder = randomise(tiny_autoencoder(), 0.05).train()
        torch.manual_seed(0)
        output = autoencoder(image)
        compute(autoencoder, output)
        return {n: p.grad for n, p in autoencoder.named_parameters() if p.grad is not None}

    def written(autoencoder, output):
        seen = output.reconstruction
        total = 0.7 * (seen - image).abs().mean() + 0.3 * perceptual(seen, image) + 0.2 * output.posterior.kl()
        (total - 0.5 * discriminator(seen).mean()).backward()

    loss = AutoencoderLoss(config, perceptual, discriminator)
    found = gradients(
        lambda autoencoder, output: loss.accumulate_gradients(output, image, autoencoder.decoder.last_weight, 10, 1.0)
    )
    for name, expected in gradients(written).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-4)


def test_accumulating_four_equals_a_batch_of_four(perceptual):
    """Also for the sums behind the adaptive weight: they are used in the next step, so they add up."""
    config = terms(l1=1, lpips=0.3, kl=0.1, gan=0.5, mode="adaptive")
    image, generator = torch.rand(4, 3, 32, 32) * 2 - 1, torch.Generator().manual_seed(0)
    noise = (torch.randn(4, 6, 2, 2, generator=generator), torch.randn(4, 4, 4, 4, generator=generator))
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=8, layers=2)

    def run(parts):
        autoencoder = randomise(tiny_autoencoder(), 0.05).train()
        discriminator.zero_grad()
        loss = AutoencoderLoss(config, perceptual, discriminator)
        loss.adaptive.value = 0.3
        for rows in torch.arange(4).chunk(parts):
            output = autoencoder(image[rows], tuple(n[rows] for n in noise))
            loss.accumulate_gradients(output, image[rows], autoencoder.decoder.last_weight, 10, 1 / parts)
            real, fake = discriminator(torch.cat([image[rows], output.reconstruction.detach()])).chunk(2)
            (hinge_loss(real, fake) / parts).backward()
        loss.adaptive.finish_step(lambda x: x)
        found = {
            n: p.grad.clone()
            for m in (autoencoder, discriminator)
            for n, p in m.named_parameters()
            if p.grad is not None
        }
        return found, loss.adaptive.value

    (whole, weight), (accumulated, weight_too) = run(1), run(4)
    assert weight > 0
    assert weight == pytest.approx(weight_too, rel=1e-3)
    for name in whole:
        torch.testing.assert_close(whole[name], accumulated[name], atol=1e-5, rtol=1e-4)


def test_adaptive_weight_is_the_ratio_at_the_last_layer():
    autoencoder = randomise(tiny_autoencoder(), 0.05).train()
    discriminator = PatchDiscriminator(channels=8, layers=2)
    loss = AutoencoderLoss(terms(l1=1, gan=0.5, mode="adaptive"), None, discriminator)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    noise = (torch.zeros(2, 6, 2, 2), torch.zeros(2, 4, 4, 4))
    seen, last = autoencoder(image, noise).reconstruction, autoencoder.decoder.last_weight
    rec = torch.autograd.grad((seen - image).abs().mean(), last, retain_graph=True)[0].norm()
    gan = torch.autograd.grad(-discriminator(seen).mean(), last)[0].norm()
    first = loss.accumulate_gradients(autoencoder(image, noise), image, last, 10, 1.0)
    assert first["gan_weight"] == 0, "nothing is known before the first step"
    loss.adaptive.finish_step(lambda x: x)
    assert loss.adaptive.value == pytest.approx(float(rec / (gan + 1e-4)), rel=1e-4)
    second = loss.accumulate_gradients(autoencoder(image, noise), image, last, 10, 1.0)
    assert float(second["gan_weight"]) == pytest.approx(0.5 * loss.adaptive.value)
    loss.adaptive.max_weight = 1e-3
    loss.adaptive.finish_step(lambda x: x)
    assert loss.adaptive.value == pytest.approx(1e-3)


def test_warmup_and_ramp_of_the_generators_term():
    gan = GanConfig(weight=0.5, start=100, disc_warmup=50, ramp=10)
    assert [discriminator_learns(gan, n) for n in (99, 100)] == [False, True]
    assert [gan_factor(gan, n) for n in (0, 100, 149)] == [0, 0, 0]
    assert [gan_factor(gan, n) for n in (150, 154, 159, 10_000)] == pytest.approx([0.05, 0.25, 0.5, 0.5])
    assert not discriminator_learns(GanConfig(weight=0, start=0), 5)


def test_lpips_fades_in(perceptual):
    """It is not computed before its start, then counts 1/4, 2/4, 3/4 and wholly."""
    config = LossConfig(l1=0.0, perceptual=PerceptualConfig(weight=2.0, start=100, ramp=4), gan=GanConfig(weight=0))
    loss = AutoencoderLoss(config, perceptual, None)
    image, target = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    whole = 2 * float(perceptual(image, target))
    totals = [loss.reconstruction(image, target, seen) for seen in (0, 99, 100, 102, 103, 10_000)]
    assert [float(total) / whole for total, _ in totals] == pytest.approx([0, 0, 0.25, 0.75, 1, 1])
    assert ["lpips" in parts for _, parts in totals] == [False, False, True, True, True, True]


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_loss(real, fake).item() == 0.5 * ((0 + 0.5) / 2 + (0 + 1) / 2)
    assert hinge_loss(real, fake, torch.tensor([False, True])).item() == 0.5 * (0.5 / 2 + 1 / 2)


def test_the_discriminator_has_no_batch_statistics():
    discriminator = PatchDiscriminator()
    assert not [m for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d)]
    x = torch.rand(3, 3, 256, 256)
    together = discriminator(x)
    assert together.shape == (3, 1, 30, 30)
    torch.testing.assert_close(together[1:2], discriminator(x[1:2]), atol=1e-4, rtol=1e-3)


def test_lpips_stays_asleep_and_reaches_the_image(perceptual):
    image, target = torch.rand(2, 2, 3, 32, 32)
    image.requires_grad_()
    first = perceptual(image, target)
    assert first == perceptual(image, target), "dropout would make two calls differ"
    assert torch.autograd.grad(first, image)[0].abs().max() > 0
    assert not any(p.requires_grad for p in perceptual.network.parameters())
    assert perceptual(target, target) < 1e-6


def test_vgg_weights_from_a_file(tmp_path, perceptual, monkeypatch):
    from safetensors.torch import save_file

    from pyramid_ldm.errors import UserError

    state = {
        f"features.{n.split('.', 1)[1]}": p.detach().clone(memory_format=torch.contiguous_format)
        for n, p in perceptual.network.net.named_parameters()
    }
    save_file(state, tmp_path / "vgg16.safetensors")
    torch.save(state, tmp_path / "vgg16.pth")
    image, target = torch.rand(2, 1, 3, 32, 32)

    def blank(**_):  # torchvision initialises 138 million weights, most of which lpips throws away
        network = copy.deepcopy(perceptual.network)
        for parameter in network.net.parameters():
            parameter.data.zero_()
        return network

    monkeypatch.setattr("lpips.LPIPS", blank)
    for name in ("vgg16.safetensors", "vgg16.pth"):
        loaded = PerceptualLoss(str(tmp_path / name), torch.device("cpu"))
        assert loaded(image, target) == perceptual(image, target)
    state.pop("features.0.weight")
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"features\.0\.weight is missing"):
        PerceptualLoss(str(tmp_path / "part.safetensors"), torch.device("cpu"))
    with pytest.raises(UserError, match="no such file"):
        PerceptualLoss(str(tmp_path / "none.pth"), torch.device("cpu"))


def test_lpips_in_parts_is_the_mean_over_parts(perceptual):
    image, target = torch.rand(2, 1, 3, 48, 64) * 2 - 1
    parts = [
        float(perceptual(image[..., y, x], target[..., y, x])) * weight
        for y, h in ((slice(0, 32), 32), (slice(32, 48), 16))
        for x, w in ((slice(0, 32), 32), (slice(32, 64), 32))
        for weight in [h * w / (48 * 64)]
    ]
    assert perceptual.in_parts(image, target, side=32) == pytest.approx(sum(parts), rel=1e-5)
    assert perceptual.in_parts(image, target) == pytest.approx(float(perceptual(image, target)), rel=1e-5)
