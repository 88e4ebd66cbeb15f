import math
import warnings

import pytest
import torch
from conftest import randomise

from pyramid_ldm.nn.attention import (
    LinearAttention,
    SpatialChannelAttention,
    channel_attention,
    linear_attention,
    softmax_attention,
    spatial_weight,
)


@pytest.mark.parametrize(
    ("side", "channels", "expected"),
    [(1024, 16, 1.0), (512, 32, 0.9999), (256, 64, 0.9990), (128, 128, 0.9922), (64, 256, 0.9412), (32, 512, 0.6667),
     (16, 1024, 0.2), (8, 1024, 0.0588), (32, 1024, 0.5)],
)  # fmt: skip
def test_weights_of_figure_3(side, channels, expected):
    assert round(spatial_weight(side * side, channels), 4) == pytest.approx(expected, abs=1e-9)


def test_both_halves_are_weighted_by_equation_8():
    module = randomise(SpatialChannelAttention(8, kind="spatial_channel"))
    q, k, v = torch.randn(3, 2, 8, 2, 6)[0], torch.randn(2, 8, 2, 6), torch.randn(2, 8, 2, 6)
    q = torch.randn(2, 8, 2, 6)
    expected = 12 / 20 * module.spatial(q, k, v) + 8 / 20 * module.channel(q, k, v)  # H * W = 12, not square
    torch.testing.assert_close(module.mix(q, k, v), expected)


def test_softmax_attention_by_hand():
    q, k, v = torch.randn(3, 1, 4, 2, 3).unbind(0)
    flat = [x.flatten(2)[0].T for x in (q, k, v)]  # (positions, channels)
    expected = ((flat[0] @ flat[1].T) / math.sqrt(4)).softmax(-1) @ flat[2]
    torch.testing.assert_close(softmax_attention(q, k, v, 1).flatten(2)[0].T, expected, atol=1e-6, rtol=1e-5)


def test_channel_attention_by_hand():
    q, k, v = torch.randn(3, 1, 4, 2, 3).unbind(0)
    q_, k_, v_ = (x.flatten(2)[0] for x in (q, k, v))  # (channels, positions)
    q_, k_ = (x / x.square().mean(0).add(1e-6).sqrt() for x in (q_, k_))
    expected = (2.0 * q_ @ k_.T / 6).softmax(-1) @ v_
    torch.testing.assert_close(channel_attention(q, k, v, torch.tensor(2.0)).flatten(2)[0], expected)


def test_channel_attention_is_smooth_at_one_position():
    """An L2 norm over one position would be sign(q): no gradient, and a jump where q changes sign."""
    q, k, v = (torch.randn(1, 8, 1, 1, requires_grad=True) for _ in range(3))
    channel_attention(q, k, v, torch.tensor(1.0)).square().sum().backward()
    assert torch.isfinite(q.grad).all()
    assert q.grad.abs().max() > 1e-4
    near = q.detach().clone()
    near[0, 0] = 1e-4
    other = near.clone()
    other[0, 0] = -1e-4
    difference = channel_attention(near, k, v, torch.tensor(1.0)) - channel_attention(other, k, v, torch.tensor(1.0))
    assert difference.abs().max() < 1e-3


def test_channel_affinity_does_not_depend_on_size():
    x = torch.randn(1, 8, 4, 4)
    tiled = x.repeat(1, 1, 2, 2)
    small = channel_attention(x, x, x, torch.tensor(3.0))
    torch.testing.assert_close(channel_attention(tiled, tiled, tiled, torch.tensor(3.0)), small.repeat(1, 1, 2, 2))


def test_linear_attention_by_hand():
    q, k, v = torch.randn(3, 1, 4, 2, 3).unbind(0)
    q_, k_, v_ = (x.flatten(2)[0] for x in (q, k, v))
    context = k_.softmax(-1) @ v_.T
    torch.testing.assert_close(linear_attention(q, k, v, 1).flatten(2)[0], context.T @ q_.softmax(0))


def test_linear_attention_costs_in_proportion_to_the_positions():
    from torch.utils.flop_counter import FlopCounterMode

    module = LinearAttention(16)

    def flops(side: int) -> int:
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(1, 16, side, side))
        return counter.get_total_flops()

    assert flops(64) == 4 * flops(32)


@pytest.mark.parametrize("kind", ["spatial_channel", "spatial", "channel"])
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_a_new_module_is_the_identity(kind, spectral_norm):
    x = torch.randn(2, 16, 3, 5)
    torch.testing.assert_close(SpatialChannelAttention(16, kind=kind, spectral_norm=spectral_norm)(x), x)


def test_the_spatial_half_turns_linear_above_its_tokens_and_says_so():
    module = SpatialChannelAttention(8, kind="spatial", softmax_tokens=16)
    q, k, v = torch.randn(3, 1, 8, 4, 5).unbind(0)
    with pytest.warns(UserWarning, match="20 positions exceed"):
        torch.testing.assert_close(module.spatial(q, k, v), linear_attention(q, k, v, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.spatial(*(x[..., :4, :4] for x in (q, k, v)))
