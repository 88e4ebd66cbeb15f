import numpy as np
import pytest
import torch
import yaml
from conftest import randomise, tiny_autoencoder, tiny_autoencoder_config
from torch import nn
from torch.nn.functional import pixel_shuffle

from pyramid_ldm.autoencoders.posterior import DiagonalGaussian
from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoders.pyramid.encoder import LatentHead
from pyramid_ldm.errors import UserError
from pyramid_ldm.nn.layers import SpectralNorm, spectral_layers
from pyramid_ldm.nn.resample import bilinear_up
from pyramid_ldm.nn.resblock import ResidualBlock
from pyramid_ldm.pyramid import level_shapes, pyramid_noise

VARIANTS = {
    "default": {},
    "vq": {"latent": "vq", "codebook_size": 16},
    "one level": {"levels": ((8, 4),)},
    "one level, f1": {"levels": ((1, 4),), "attention__max_tokens": 0},
    "three levels": {"image_size": (32, 64), "levels": ((32, 8), (8, 4), (2, 2))},
    "2:1": {"image_size": (32, 64)},
    "vit": {"decoder__branch": "vit"},
    "no branch blocks": {"decoder__branch_blocks": 0},
    "skip": {"skip": "skip"},
    "residual": {"skip": "residual"},
    "none": {"skip": "none"},
    "max pooling": {"encoder__pooling": "max"},
    "image patches of 1": {"encoder__image_patch": 1},
    "image patches of 8, skip": {"encoder__image_patch": 8, "skip": "skip"},
    "no linear heads": {"encoder__linear_heads": False},
    "unshuffle": {"encoder__pooling": "unshuffle"},
    "unshuffle, skip": {"encoder__pooling": "unshuffle", "skip": "skip"},
    "group norms": {"norm": "group"},
    "no norms": {"norm": "none"},
    "thumbnail": {"levels": ((16, 6), (8, 12)), "base": "thumbnail"},
    "thumbnail, patches": {"levels": ((16, 6), (8, 3)), "base": "thumbnail", "patch": 4, "norm": "none"},
    "linear base": {"levels": ((16, 6), (8, 12)), "base": "linear"},
    "linear base, patches": {"levels": ((16, 6), (8, 3)), "base": "linear", "patch": 4, "norm": "none"},
    "patches of 2": {"patch": 2},
    "patches of 8, no norms": {"patch": 8, "norm": "none"},
    "patches of 4, skip none": {"patch": 4, "skip": "none"},
    "no spectral norm": {"encoder__spectral_norm": False},
    "two blocks": {"encoder__blocks": 2},
    "dropout": {"decoder__dropout": 0.35},
    "checkpointing": {"checkpoint_factors": [1, 4]},
    **{f"decoder {kind}": {"attention__decoder": kind} for kind in ("spatial", "channel", "linear", "none")},
    **{f"encoder {kind}": {"attention__encoder": kind} for kind in ("spatial_channel", "none")},
}


# One of each kind of stored weight; the others are made of the same parts.
STORED = {"default", "vq", "one level, f1", "three levels", "vit", "unshuffle, skip", "group norms", "two blocks",
          "no linear heads", "no spectral norm", "no norms", "patches of 2", "linear base"}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_builds_and_steps(name, tmp_path):
    autoencoder = randomise(tiny_autoencoder(**VARIANTS[name]), 0.02).train()
    optimizer = torch.optim.Adam(autoencoder.parameters(), 1e-3)
    size = autoencoder.config.image_size
    image = torch.rand(2, 3, *size) * 2 - 1
    output = autoencoder(image)
    assert output.reconstruction.shape == image.shape
    loss = (output.reconstruction - image).abs().mean() + output.posterior.kl() + output.codebook_loss
    loss.backward()
    without = [name for name, p in autoencoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # An attention's temperature acts only through values that differ between channels, and a linear attention's key
    # bias not at all (softmax over positions); everything else must learn.
    assert not [n for n in without if "temperature" not in n and "key" not in n and "embedding" not in n], without
    optimizer.step()
    if name in STORED:
        saves_loads_and_decodes(autoencoder.eval(), image, tmp_path)


def saves_loads_and_decodes(autoencoder, image, tmp_path):
    size = autoencoder.config.image_size
    autoencoder.save_pretrained(tmp_path)
    loaded = PyramidAutoencoder.from_pretrained(tmp_path)
    assert not spectral_layers(loaded)
    with torch.no_grad():
        latents = loaded.encode(image).mode()
        decoded = loaded.decode(latents)
        assert [tuple(z.shape[1:]) for z in latents] == [
            (level.channels, size[0] // level.factor, size[1] // level.factor) for level in loaded.levels
        ]
        # Folding iterates power iteration on: equal to the live model up to that.
        torch.testing.assert_close(autoencoder.decode(latents), decoded, atol=1e-5, rtol=1e-4)


def test_a_fingerprint_is_the_weights(tmp_path):
    for name, std in (("a", 0.02), ("b", 0.03)):
        randomise(tiny_autoencoder(), std).save_pretrained(tmp_path / name)
    a, again, b = (PyramidAutoencoder.from_pretrained(tmp_path / name).fingerprint() for name in "aab")
    assert a == again != b


def test_ratio_of_celebahq_is_exactly_256():
    config = tiny_autoencoder_config(
        image_size=(1024, 1024), levels=((128, 64), (64, 32)), encoder__widths=[8] * 8, decoder__widths=[8] * 8
    )
    assert PyramidAutoencoder(config).compression_ratio() == 256.0


def test_the_decoder_has_one_block_more_and_no_spectral_norm_and_is_heavier():
    autoencoder = tiny_autoencoder(encoder__blocks=2)

    def blocks(level):
        return sum(isinstance(block, ResidualBlock) for block in level.blocks)

    assert {blocks(level) for level in autoencoder.encoder.levels} == {2}
    assert {blocks(level) for level in autoencoder.decoder.levels} == {3}
    assert not [m for m in autoencoder.decoder.modules() if isinstance(m, SpectralNorm)]
    plain = {
        name
        for name, module in autoencoder.encoder.named_modules()
        if isinstance(module, nn.Conv2d) and getattr(module, "spectral", None) is None
    }
    assert plain == {f"levels.{i}.head.{part}" for i in (3, 4) for part in ("conv", "linear")}
    count = [sum(p.numel() for p in half.parameters()) for half in (autoencoder.encoder, autoencoder.decoder)]
    assert count[0] < count[1]


def test_output_skip_is_the_sum_of_upsampled_rgb():
    """With every to_rgb but the coarsest silent, the image is the coarsest RGB, up-sampled."""
    autoencoder = tiny_autoencoder()
    for level in autoencoder.decoder.levels:
        nn.init.zeros_(level.to_rgb.conv.weight)
    nn.init.constant_(autoencoder.decoder.levels[0].to_rgb.conv.weight, 0.3)
    latents = autoencoder.encode(torch.rand(1, 3, 32, 32)).mode()
    seen = []
    autoencoder.decoder.levels[0].to_rgb.register_forward_hook(lambda module, args, out: seen.append(out))
    image = autoencoder.decode(latents)
    expected = seen[0]
    assert expected.shape == (1, 3, 2, 2)
    assert expected.abs().sum() > 0
    for _ in range(4):
        expected = bilinear_up(expected)
    torch.testing.assert_close(image, expected)


@pytest.mark.parametrize(
    ("skip", "expected"), [("res_skip", True), ("skip", True), ("residual", False), ("none", False)]
)
def test_input_skip_lets_the_pooled_image_in(skip, expected):
    encoder = tiny_autoencoder(skip=skip).encoder
    assert [level.from_rgb is not None for level in encoder.levels] == [False] + [expected] * 4
    has_shortcut = skip in ("res_skip", "residual")
    assert [level.down.shortcut is not None for level in list(encoder.levels)[:-1]] == [has_shortcut] * 4


def test_coarser_levels_enter_softly_only_where_a_latent_does():
    """The same random numbers, so that the weights differ by the factor alone."""
    one, tenth = (tiny_autoencoder(decoder__coarse_init=scale).decoder for scale in (1.0, 0.1))
    assert [level.branch is not None for level in one.levels] == [True, True, False, False, False]
    for a, b, scale in zip(list(one.levels)[1:], list(tenth.levels)[1:], [0.1, 1, 1, 1], strict=True):
        torch.testing.assert_close(b.up.conv.weight, scale * a.up.conv.weight)
        torch.testing.assert_close(b.up.shortcut.weight, scale * a.up.shortcut.weight)


@pytest.mark.parametrize("linear", [True, False])
def test_a_linear_head_knows_how_large_its_features_are(linear):
    """Doubled features: the norm forgets it, so that the moments change by the linear part alone."""
    head = randomise(LatentHead(8, 3, 2, linear=linear), 0.5)
    x = torch.randn(1, 8, 2, 2)
    expected = head.linear.weight[:, :, 0, 0] @ x[0].flatten(1) if linear else torch.zeros(6, 4)
    torch.testing.assert_close((head(2 * x) - head(x))[0].flatten(1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("zero_init", [True, False])
def test_residual_blocks_of_the_decoder_begin_as_their_shortcut(zero_init):
    """Up to the sum's 1 / sqrt 2, in the backbone and in the branches."""
    decoder = tiny_autoencoder(decoder__zero_init=zero_init).decoder
    blocks = [module for module in decoder.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) > len(decoder.levels)
    for block in blocks:
        x = torch.randn(1, block.conv1.in_channels, 4, 4)
        assert torch.allclose(block(x), x / 2**0.5) == zero_init


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_every_level_sees_the_image_so_many_times_finer(patch):
    """Level i sees 2x2, 4x4, ... blocks of the image pooled to `patch` times its own resolution, none finer than the
    image itself: by hand for one level, by shape for all."""
    encoder = tiny_autoencoder(encoder__image_patch=patch).encoder
    seen = []
    for level in list(encoder.levels)[1:]:
        level.from_rgb.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.rand(1, 3, 32, 32)
    encoder(image)
    sides = [min(patch, 2**i) for i in (1, 2, 3, 4)]
    assert [x.shape[1:] for x in seen] == [(3 * s * s, 32 >> i, 32 >> i) for i, s in enumerate(sides, start=1)]
    factor, side = 8, min(patch, 8)
    block = image[0, :, 8:16, 24:32].reshape(3, side, factor // side, side, factor // side).mean(dim=(2, 4))
    torch.testing.assert_close(seen[2][0, :, 1, 3].reshape(3, side, side), block)


def test_above_the_attention_levels_a_far_pixel_changes_nothing():
    """Per-pixel norms: with attention off, nothing reaches from one end of a wide image to the other."""
    autoencoder = randomise(
        tiny_autoencoder(image_size=(16, 256), levels=((4, 4), (2, 2)), attention__max_tokens=0), 0.05
    ).eval()
    image = torch.rand(1, 3, 16, 256)
    changed = image.clone()
    changed[..., -8:] += 1
    with torch.no_grad():
        first, second = (autoencoder.encode(x).mode() for x in (image, changed))
        for a, b in zip(first, second, strict=True):
            half = a.shape[-1] // 2
            assert torch.equal(a[..., :half], b[..., :half])
            assert not torch.equal(a, b)
        a, b = autoencoder.decode(first), autoencoder.decode(second)
        assert torch.equal(a[..., :100], b[..., :100])
        assert not torch.equal(a, b)


def test_translation_by_one_stride_moves_the_latents():
    autoencoder = randomise(tiny_autoencoder(image_size=(16, 256), levels=((4, 4),), attention__max_tokens=0)).eval()
    image = torch.rand(1, 3, 16, 256)
    with torch.no_grad():
        still = autoencoder.encode(image).mode()[0]
        moved = autoencoder.encode(image.roll(4, dims=-1)).mode()[0]
    torch.testing.assert_close(moved[..., 21:44], still[..., 20:43], atol=1e-5, rtol=1e-4)


def test_checkpointing_changes_no_gradient():
    image = torch.rand(2, 3, 32, 32)

    def gradients(factors):
        autoencoder = randomise(tiny_autoencoder(checkpoint_factors=factors), 0.02).train()
        torch.manual_seed(3)
        autoencoder(image).reconstruction.square().mean().backward()
        return {name: p.grad for name, p in autoencoder.named_parameters() if p.grad is not None}

    plain, recomputed = gradients([]), gradients([1, 2, 4, 8, 16])
    assert plain.keys() == recomputed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name], atol=1e-7, rtol=1e-5)


def test_the_last_layers_gradient_recomputes_no_checkpointed_level():
    """The adaptive GAN weight asks for it twice a step; recomputing the finest level each time would cost gigabytes."""
    autoencoder = tiny_autoencoder(checkpoint_factors=[1]).train()
    passes = []
    autoencoder.decoder.levels[-1].blocks[0].register_forward_hook(lambda *_: passes.append(1))
    image = autoencoder(torch.rand(1, 3, 32, 32)).reconstruction
    for _ in range(2):
        torch.autograd.grad(image, autoencoder.decoder.last_weight, torch.ones_like(image), retain_graph=True)
    assert len(passes) == 1
    image.sum().backward()
    assert len(passes) == 2


def test_moments_and_codes_are_float32_under_autocast():
    image = torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = tiny_autoencoder().encoder(image)
        assert {m.dtype for m in moments} == {torch.float32}
    vq = tiny_autoencoder(latent="vq", codebook_size=64)
    latents = tuple(torch.randn(4, c, s, s) * 0.01 for c, s in ((6, 2), (4, 4)))
    plain = vq.quantize(latents)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(vq.quantize(latents)[0], plain, strict=True))


def test_kl_equals_torch_distributions():
    moments = (torch.randn(2, 8, 1, 1), torch.randn(2, 4, 3, 5))
    posterior = DiagonalGaussian.from_moments(moments, has_variance=True)
    total = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Normal(m, (0.5 * v).exp()), torch.distributions.Normal(0.0, 1.0)
        ).sum()
        for m, v in zip(posterior.mean, posterior.log_variance, strict=True)
    )
    torch.testing.assert_close(posterior.kl(), total / sum(m.numel() for m in posterior.mean))


def test_posterior_samples_have_its_mean_and_spread_and_clamp():
    moments = (torch.cat([torch.full((1, 1, 200, 200), 2.0), torch.full((1, 1, 200, 200), -1.0)], dim=1),)
    sample = DiagonalGaussian.from_moments(moments, has_variance=True).sample()[0]
    assert sample.mean() == pytest.approx(2, abs=0.02)
    assert sample.std() == pytest.approx(2.718281828 ** (-0.5), abs=0.02)
    wild = DiagonalGaussian.from_moments((torch.full((1, 2, 1, 1), 100.0),), has_variance=True)
    assert wild.log_variance[0].item() == 20


def test_vq_is_straight_through_and_tells_its_entries():
    autoencoder = tiny_autoencoder(latent="vq", codebook_size=8)
    latents = tuple(torch.randn(2, c, s, s, requires_grad=True) for c, s in ((6, 2), (4, 4)))
    quantized, loss, indices = autoencoder.quantize(latents)
    for z, q, quantizer in zip(latents, quantized, autoencoder.quantizers, strict=True):
        rows = q.movedim(1, -1).reshape(-1, q.shape[1])
        assert torch.cdist(rows, quantizer.embedding.weight).min(dim=1).values.max() < 1e-3
        gradient = torch.autograd.grad(q.sum(), z, retain_graph=True)[0]
        torch.testing.assert_close(gradient, torch.ones_like(z))
    # legacy=False: loss = 0.25 |sg(zq) - z|^2 + |zq - sg(z)|^2, so d loss / dz = 0.25 * 2 (z - zq) / n, over 2 levels.
    gradient = torch.autograd.grad(loss, latents[0])[0]
    expected = 0.25 * 2 * (latents[0] - quantized[0]) / latents[0].numel() / 2
    torch.testing.assert_close(gradient, expected.detach())
    for used, q, quantizer in zip(indices, quantized, autoencoder.quantizers, strict=True):
        torch.testing.assert_close(quantizer.embedding(used).movedim(-1, 1), q)


def test_the_last_patches_are_the_pixels_of_the_image():
    """What comes out of the finest convolution is spread over them, level by level."""
    model = randomise(tiny_autoencoder(levels=((8, 4),), patch=4, skip="none", attention__max_tokens=0), 0.3).eval()
    latents = (torch.randn(2, 4, 4, 4),)
    seen = []
    finest = [level for level in model.decoder.levels if hasattr(level, "blocks")][-1]
    finest.to_rgb.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        image = model.decode(latents)
    assert seen[0].shape == (2, 48, 8, 8)
    torch.testing.assert_close(image, pixel_shuffle(pixel_shuffle(seen[0], 2), 2))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_leave_levels_out_at_full_resolution(patch):
    model = tiny_autoencoder(levels=((16, 6), (8, 4)), patch=patch)
    stem = model.encoder.stem
    assert (stem.in_channels, len(model.encoder.levels)) == (3 * patch**2, 5 - patch.bit_length() + 1)
    assert [level.head is not None for level in model.encoder.levels][-2:] == [True, True]


@pytest.mark.parametrize(("channels", "side"), [(3, 1), (11, 1), (12, 2), (48, 4)])
def test_a_thumbnail_is_what_it_begins_as(channels, side):
    """The finest latent, at factor 8, holds side x side colours a position; RGB is these, enlarged."""
    model = tiny_autoencoder(levels=((16, 6), (8, channels)), base="thumbnail", norm="none").eval()
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        decoded = model.decode(model.encode(image).mode())
    small = torch.nn.functional.avg_pool2d(image, 8 // side)
    while small.shape[-1] < 32:
        small = bilinear_up(small)
    torch.testing.assert_close(decoded, small, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("factor", "patch", "side", "averaged"), [(8, 1, 8, 1), (8, 4, 2, 4), (32, 1, 16, 2)])
def test_a_linear_base_begins_as_principal_components_and_least_squares(factor, patch, side, averaged):
    """By numpy's SVD and lstsq on the same blocks: latents with their proportions, and what is decoded untrained."""
    size, channels = (2 * factor, 4 * factor), 5
    config = {"levels": ((factor, channels),), "image_size": size, "patch": patch, "base": "linear", "norm": "none"}
    model = tiny_autoencoder(**config).eval()
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(32, 3, size[0] // 4, size[1] // 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear") * 2 - 1
    model.fit_base(lambda: images.split(8), variance=0.01)
    with torch.no_grad():
        latents = model.encode(images).mode()
        decoded = model.decode(latents)

    small = images.unflatten(3, (-1, averaged)).unflatten(2, (-1, averaged)).mean(dim=(3, 5)).double().numpy()
    rows, columns = size[0] // factor, size[1] // factor
    blocks = small.reshape(32, 3, rows, side, columns, side).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * side * side)
    mean = blocks.mean(axis=0)
    _, lengths, components = np.linalg.svd(blocks - mean, full_matrices=False)
    found = (blocks - mean) @ components[:channels].T
    found /= np.sqrt(np.mean(lengths[:channels] ** 2 / len(blocks)))
    ours = latents[0].permute(0, 2, 3, 1).reshape(-1, channels).double().numpy()
    np.testing.assert_allclose(np.abs(ours), np.abs(found), atol=2e-4)  # components have no sign
    assert ours.std() == pytest.approx(1, abs=1e-3)

    around = np.pad(found.reshape(32, rows, columns, channels), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    windows = [around[:, y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
    inputs = np.concatenate(windows, axis=-1).reshape(len(blocks), -1)
    noise = np.sqrt(0.01 * len(blocks)) * np.eye(9 * channels)  # what so many noisy inputs add up to
    noisy, wanted = (
        np.concatenate([inputs, noise]),
        np.concatenate([blocks - mean, np.zeros((len(noise), blocks.shape[1]))]),
    )
    predicted = mean + inputs @ np.linalg.lstsq(noisy, wanted, rcond=None)[0]
    expected = predicted.reshape(32, rows, columns, 3, side, side).transpose(0, 3, 1, 4, 2, 5)
    expected = torch.from_numpy(np.ascontiguousarray(expected.reshape(small.shape))).float()
    while expected.shape[-1] < size[1]:
        expected = bilinear_up(expected)
    torch.testing.assert_close(decoded, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["one colour", "grey", "one image"])
def test_a_linear_base_of_images_that_say_little_is_finite_and_not_large(kind):
    drawn = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one_colour = drawn[:1, :, :1, :1].expand(8, 3, 32, 32)
    images = {"one colour": one_colour, "grey": drawn[:, :1].expand(8, 3, 32, 32), "one image": drawn[:1]}[kind]
    model = tiny_autoencoder(levels=((16, 6), (8, 12)), base="linear", norm="none").eval()
    model.fit_base(lambda: [images])
    with torch.no_grad():
        latents = model.encode(torch.rand(2, 3, 32, 32) * 2 - 1).mode()
        decoded = model.decode(model.encode(images).mode())
    assert latents[-1].abs().max() < 1000
    assert (decoded - images).square().mean() <= images.var(unbiased=False) + 1e-4


def test_a_linear_base_says_what_it_cannot_be_fitted_to():
    model = tiny_autoencoder(levels=((16, 6), (8, 12)), base="linear")
    images = torch.rand(2, 3, 32, 32)
    once = iter([images])
    for given, fault in ((lambda: once, "32 blocks, then 0"), (lambda: [], "no images")):
        with pytest.raises(ValueError, match=fault):
            model.fit_base(given)
        assert not model.decoder.base.weight.any(), "half of it is not left behind"
    with pytest.raises(ValueError, match="nothing to fit"):
        tiny_autoencoder().fit_base(lambda: [images])


def test_without_norms_a_block_adds_to_its_shortcut():
    """x + f(x), not (x + f(x)) / sqrt 2: what begins at zero leaves features as they are."""
    model = tiny_autoencoder(norm="none")
    block = model.decoder.levels[0].blocks[0]
    x = torch.randn(1, block.conv1.in_channels, 4, 4)
    torch.testing.assert_close(block(x), x)
    assert not [name for name, _ in model.decoder.named_parameters() if "norm1" in name or "norm2" in name]


def test_levels_that_are_not_kept_are_zeros():
    model = randomise(tiny_autoencoder(levels=((16, 6), (8, 4), (4, 2))), 0.05).eval()
    image = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        found = model(image, model_noise(model, image), kept=torch.tensor([1, 2, 3])).reconstruction
        latents = model.encode(image).sample(model_noise(model, image))
        for k in range(3):
            part = tuple(z[k : k + 1] if i <= k else torch.zeros_like(z[k : k + 1]) for i, z in enumerate(latents))
            torch.testing.assert_close(found[k : k + 1], model.decode(part), atol=1e-5, rtol=0)


def model_noise(model, image):
    return pyramid_noise(level_shapes(model.levels, image.shape[2:]), 0, "test", range(len(image)))


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny_autoencoder().encode(torch.rand(1, 3, 24, 32))
    with pytest.raises(UserError, match="coarsest factor, 16"):
        tiny_autoencoder_config(image_size=(40, 32))
    with pytest.raises(UserError, match="fall from coarse to fine"):
        tiny_autoencoder_config(levels=((8, 4), (16, 4)))
    with pytest.raises(UserError, match="not a power of two"):
        tiny_autoencoder_config(levels=((16, 4), (12, 4)))
    with pytest.raises(UserError, match="need 5"):
        tiny_autoencoder_config(encoder__widths=[8, 8])


def test_attention_stands_where_the_training_size_puts_it_at_every_size():
    autoencoder = tiny_autoencoder(image_size=(32, 64))  # 16 tokens: factors 16 (2x4) only
    assert autoencoder.config.attention.factors == [16]
    larger = torch.rand(1, 3, 128, 128)
    assert autoencoder.decode(autoencoder.encode(larger).mode()).shape == larger.shape


def test_a_model_saved_before_the_newer_keys_loads_as_the_changelog_says(tmp_path):
    old = {"encoder__image_patch": 1, "encoder__linear_heads": False, "decoder__zero_init": False}
    tiny_autoencoder(**old, decoder__coarse_init=1.0).save_pretrained(tmp_path)
    whole = PyramidAutoencoder.from_pretrained(tmp_path)
    file = tmp_path / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for part, keys in (("encoder", ("image_patch", "linear_heads")), ("decoder", ("zero_init", "coarse_init"))):
        for key in keys:
            del config[part][key]
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"Missing key\(s\) in state_dict: \"encoder") as caught:
        PyramidAutoencoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    config["encoder"] |= {"image_patch": 1, "linear_heads": False}
    config["decoder"]["zero_init"] = False
    file.write_text(yaml.safe_dump(config))
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        loaded = PyramidAutoencoder.from_pretrained(tmp_path)
        first, second = (model.decode(model.encode(image).mode()) for model in (loaded, whole))
    assert torch.equal(first, second)
