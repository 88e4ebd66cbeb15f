from copy import deepcopy

import pytest
import torch
from conftest import at, randomise, tiny_autoencoder, tiny_network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyramid_ldm.nn import pixel_norm, spectral
from pyramid_ldm.nn.layers import (
    ZeroConv2d,
    advance_spectral_norm,
    conv2d,
    dropout_schedule,
    fold_spectral_norm,
    group_norm,
    spectral_layers,
)
from pyramid_ldm.nn.pixel_norm import PixelNorm, norm_silu
from pyramid_ldm.nn.resample import bilinear_up, box_down, fir_down, fir_up, max_down, nearest_up, unshuffle_down
from pyramid_ldm.nn.resblock import Resampling, ResidualBlock, TransformerBlock, position_encoding
from pyramid_ldm.nn.spectral import SpectralNorm


def test_dropout_schedule_of_eight_levels():
    assert dropout_schedule(8, 0.35) == pytest.approx([0.35 * (1 - level / 7) for level in range(8)])
    assert dropout_schedule(8, 0.35)[-1] == 0
    assert dropout_schedule(1, 0.35) == [0.0]
    assert dropout_schedule(3, 0.4, "increasing") == pytest.approx([0, 0.2, 0.4])
    assert dropout_schedule(3, 0.4, "uniform") == [0.4] * 3


def test_spectral_norm_bounds_the_largest_singular_value():
    layer = conv2d(8, 16, spectral_norm=True)
    with torch.no_grad():
        layer.weight.mul_(7)
    advance_spectral_norm(layer, 200)
    normalised = layer.spectral(layer.weight).detach().flatten(1)
    assert float(torch.linalg.matrix_norm(normalised, 2)) == pytest.approx(1, abs=1e-3)


def test_one_iteration_a_step_keeps_the_bound_while_training():
    """After optimizer steps, the true largest singular value is at most 1.01."""
    torch.manual_seed(0)
    torch.manual_seed(0)
    layers = nn.Sequential(*(conv2d(a, b, spectral_norm=True) for a, b in ((3, 64), (64, 64), (64, 64), (64, 8))))
    optimizer = torch.optim.Adam(layers.parameters(), 2e-3)  # the demo's, the highest that is shipped
    x, y = torch.randn(8, 3, 8, 8), torch.randn(8, 8, 8, 8)
    worst = 0.0
    for _ in range(60):
        optimizer.zero_grad()
        (layers(x) - 3 * y).square().mean().backward()
        optimizer.step()
        advance_spectral_norm(layers)
        for layer, norm in spectral_layers(layers):
            worst = max(worst, float(torch.linalg.matrix_norm(norm(layer.weight).detach().flatten(1), 2)))
    assert worst < 1.01


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 5, 1, 1), (3, 2, 3, 3), (40, 30), (7, 64), (64, 7)])
def test_vectors_of_any_shape_reach_the_largest_singular_value(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    norm = SpectralNorm(weight)
    spectral.advance([(weight, norm)], 30)
    exact = float(torch.linalg.matrix_norm(weight.flatten(1).double(), 2))
    assert float(norm.sigma(weight)) == pytest.approx(exact, rel=1e-5)
    assert norm(weight).shape == weight.shape


def test_many_weights_at_once_are_each_by_itself():
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in ((8, 9), (8, 9), (3, 4, 3, 3), (5, 1), (8, 9))]
    together, alone = ([SpectralNorm(weight) for weight in weights] for _ in range(2))
    for a, b in zip(together, alone, strict=True):
        b.load_state_dict(a.state_dict())
    moved = [weight + 0.1 * torch.randn_like(weight) for weight in weights]
    spectral.advance(list(zip(moved, together, strict=True)), 6)
    for weight, norm in zip(moved, alone, strict=True):
        spectral.advance([(weight, norm)], 6)
    for weight, a, b in zip(moved, together, alone, strict=True):
        torch.testing.assert_close(a.sigma(weight), b.sigma(weight), rtol=1e-5, atol=1e-6)


def test_forward_does_not_move_the_vectors_and_one_call_does():
    layer = conv2d(4, 8, spectral_norm=True).train()
    randomise(layer, 0.3)
    before = deepcopy(layer.state_dict())
    layer(torch.randn(2, 4, 5, 5))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    advance_spectral_norm(layer)
    assert not torch.equal(before["spectral.u"], layer.spectral.u)


def test_spectral_gradient_is_that_of_the_quotient():
    layer = conv2d(3, 4, 1, spectral_norm=True).double()
    u, v = layer.spectral.u, layer.spectral.basis[0]
    weight = layer.weight.detach().clone().requires_grad_()
    x = torch.randn(1, 3, 2, 2, dtype=torch.double)
    expected = torch.autograd.grad(
        nn.functional.conv2d(x, weight / (u @ weight.flatten(1) @ v), layer.bias).square().sum(), weight
    )[0]
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


def test_folding_keeps_the_function_and_leaves_a_copy_alone():
    network = randomise(tiny_network()).eval()
    advance_spectral_norm(network, 100)
    latents, context = (torch.randn(1, 6, 2, 2), torch.randn(1, 4, 4, 4)), at(0.3)
    expected = network(latents, context)
    copy = deepcopy(network)
    fold_spectral_norm(copy)
    assert not spectral_layers(copy)
    assert not any("spectral" in name for name in copy.state_dict())
    assert spectral_layers(network), "the original still has its norms"
    for a, b, c in zip(expected, copy(latents, context), network(latents, context), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a, c)


def test_every_layer_of_the_flow_but_the_heads_is_normalised():
    network = tiny_network()
    plain = {
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and getattr(module, "spectral", None) is None
    }
    assert plain
    assert all(name.endswith("head.conv") for name in plain), plain
    assert not [m for m in tiny_network(spectral_norm=False).modules() if isinstance(m, SpectralNorm)]


def test_zero_convolution_is_zero_and_still_learns():
    for spectral_norm in (False, True):
        layer = ZeroConv2d(4, 6, spectral_norm=spectral_norm)
        out = layer(torch.randn(1, 4, 3, 3))
        assert out.abs().max() == 0
        out.sum().backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_group_norm_keeps_four_channels_a_group():
    assert [group_norm(c).num_groups for c in (4, 8, 64, 128, 512)] == [1, 2, 16, 32, 32]
    assert group_norm(96 + 128).num_channels % group_norm(96 + 128).num_groups == 0


def test_pixel_norm_is_per_pixel_rms():
    x = torch.randn(2, 8, 3, 3) * 5
    expected = x / x.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(PixelNorm(8)(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [16, 1 << 20])
def test_fused_norm_and_silu_is_one_after_the_other(chunk, monkeypatch):
    """Values and both gradients, whether the work is cut into chunks (the last one shorter) or not."""
    monkeypatch.setattr(pixel_norm, "CHUNK", chunk)
    norm = PixelNorm(8).double()
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm_silu(norm, x), nn.functional.silu(norm(x)))
    assert torch.autograd.gradcheck(lambda x, _: norm_silu(norm, x), (x, norm.weight))


def test_fused_norm_keeps_its_input_alone():
    """Six tensors a block would otherwise wait for the backward pass."""
    kept = []
    x = torch.randn(1, 8, 16, 16, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_silu(PixelNorm(8), x.to(memory_format=torch.channels_last))
    assert sorted({t.untyped_storage().nbytes() for t in kept}) == [8 * 4, x.numel() * 4]


def test_gain_of_a_zero_convolution_scales_its_output():
    layer = ZeroConv2d(4, 6, spectral_norm=True)
    nn.init.uniform_(layer.gain, 0.5, 2.0)
    nn.init.normal_(layer.conv.bias)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), layer.conv(x) * layer.gain)


@pytest.mark.parametrize("size", [(8, 8), (8, 16)])
def test_fir_keeps_constants_inside_and_is_the_public_one(size):
    from diffusers.models.downsampling import FirDownsample2D
    from diffusers.models.upsampling import FirUpsample2D

    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(fir_down(x), FirDownsample2D(3)(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fir_up(x), FirUpsample2D(3)(x), atol=1e-6, rtol=1e-5)
    assert fir_down(torch.ones(1, 1, 8, 8))[0, 0, 1, 1] == pytest.approx(1)


def test_fir_would_dim_small_levels_which_is_why_they_use_boxes():
    assert fir_down(torch.ones(1, 1, 2, 2)).mean() == pytest.approx(0.5625)
    assert fir_down(torch.ones(1, 1, 4, 4)).mean() == pytest.approx(0.766, abs=1e-3)
    assert box_down(torch.ones(1, 1, 2, 2)).mean() == 1
    network = tiny_network(image_size=(64, 64), levels=((64, 4), (8, 4)), widths=[16] * 4)
    assert network.downs == [fir_down, box_down, box_down]
    assert network.ups == [fir_up, nearest_up, nearest_up]


def test_resampling_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    assert box_down(x).item() == 3
    assert max_down(x).item() == 6
    assert bilinear_up(x)[0, 0, 0].tolist() == [1, 1.25, 1.75, 2]
    assert unshuffle_down(x).flatten().tolist() == [1, 2, 3, 6]
    assert nearest_up(x)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 6, 6], [3, 3, 6, 6]]


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_a_new_residual_block_is_its_input_over_root_two(spectral_norm):
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(ResidualBlock(8, 8, spectral_norm=spectral_norm)(x), x / 2**0.5)


def test_biggan_block_resamples_both_paths():
    x = torch.randn(1, 8, 4, 6)
    assert ResidualBlock(8, 8, resample=fir_down)(x).shape == (1, 8, 2, 3)
    assert ResidualBlock(8, 12, resample=fir_up)(x).shape == (1, 12, 8, 12)


def test_residual_resampling_has_a_shortcut():
    x = torch.randn(1, 8, 4, 4)
    step = Resampling(8, 4, box_down, residual=True)
    nn.init.zeros_(step.conv.weight)
    torch.testing.assert_close(step(x), box_down(step.shortcut(x)) / 2**0.5)
    assert Resampling(8, 4, box_down, residual=False).shortcut is None


def test_gathering_resampling_keeps_what_pooling_loses():
    """A checkerboard has no mean, but its four phases are four channels."""
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)[None, None].expand(1, 8, 4, 4)
    lossy = Resampling(8, 4, box_down, residual=True)
    whole = Resampling(8, 4, unshuffle_down, residual=True, gathered=4)
    nn.init.zeros_(lossy.conv.weight)
    nn.init.zeros_(whole.conv.weight)
    assert lossy(board).abs().max() == 0
    assert whole(board).shape == (1, 4, 2, 2)
    assert whole(board).abs().min() > 1e-3


def test_transformer_block_starts_as_the_identity_and_positions_differ():
    x = torch.randn(1, 16, 2, 3)
    torch.testing.assert_close(TransformerBlock(16)(x), x)
    encoded = position_encoding(16, 2, 3, x.device)
    assert encoded.shape == (1, 16, 2, 3)
    assert len({tuple(column.tolist()) for column in encoded.flatten(2)[0].T}) == 6


@pytest.mark.parametrize(("channels", "size"), [((5, 7), (1, 1)), ((5, 7), (1, 2)), ((8, 8), (2, 4))])
def test_a_convolution_of_few_positions_is_the_same_as_a_product(channels, size):
    layer = conv2d(*channels).to(memory_format=torch.channels_last)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, channels[0], *size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = layer(x)
    assert not any("convolution" in str(name) for name in counter.get_flop_counts()["Global"])
    torch.testing.assert_close(found, nn.functional.conv2d(x, layer.weight, layer.bias, padding=1))
    torch.testing.assert_close(found, layer(x))  # with gradients


def test_a_convolution_at_1x1_learns_its_centre():
    layer = conv2d(5, 7)
    x = torch.randn(3, 5, 1, 1, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).square().sum().backward()
    found = x.grad, layer.weight.grad, layer.bias.grad
    assert counter.get_total_flops() == 3 * 2 * 3 * 5 * 7, "forward, and twice backward: a ninth of a convolution's"
    expected = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1).square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, layer.weight, layer.bias)))


def test_spectral_norm_of_weights_of_rank_one():
    """float32's eigensolver gives up on some of them."""
    for value in (1.0, 3.0, 250.0, 500.0):
        model = tiny_autoencoder()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        advance_spectral_norm(model, 3)
        for layer, norm in spectral_layers(model):
            weight = layer.weight.detach()
            exact = torch.linalg.matrix_norm(weight.flatten(1), 2)
            assert norm.sigma(weight).item() == pytest.approx(exact.item(), rel=1e-4)


def test_spectral_norm_of_weights_that_are_not_finite_is_the_losss_to_report():
    model = tiny_autoencoder()
    (layer, norm), *_ = spectral_layers(model)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    advance_spectral_norm(model)
    assert norm.sigma(layer.weight).isnan()
