"""The flow network without branches is NCSN++: after copying weights it equals diffusers' UNet2DModel in that form."""

import pytest
import torch
from conftest import at, randomise
from torch import nn

from pyramid_ldm.config import NCSNppConfig
from pyramid_ldm.networks.ncsnpp import PyramidNCSNpp
from pyramid_ldm.pyramid import Level

WIDTHS = [64, 128, 128]


def reference():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        time_embedding_type="fourier",
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        block_out_channels=tuple(WIDTHS),
        layers_per_block=2,
        mid_block_scale_factor=2**0.5,
        norm_num_groups=None,
        norm_eps=1e-6,
        attention_head_dim=None,
    )


def ours():
    config = NCSNppConfig(
        image_size=[32, 32],
        levels=[Level(1, 3)],
        widths=WIDTHS,
        blocks=2,
        attention="spatial",
        attention_factors=[2],
        head_channels=0,
        spectral_norm=False,
        dropout=0.0,
        fir_everywhere=True,
    )
    return PyramidNCSNpp(config)


def copy_layer(target: nn.Module, source: nn.Module) -> None:
    for name in ("weight", "bias"):
        a, b = getattr(target, name), getattr(source, name)
        with torch.no_grad():
            a.copy_(b.view(a.shape))  # diffusers' attention has linear layers, ours 1x1 convolutions


def copy_block(target, source) -> None:
    copy_layer(target.norm1, source.norm1)
    copy_layer(target.conv1, source.conv1)
    copy_layer(target.embedding, source.time_emb_proj)
    copy_layer(target.norm2, source.norm2)
    copy_layer(target.conv2.conv, source.conv2)
    if source.conv_shortcut is not None:
        copy_layer(target.shortcut, source.conv_shortcut)
    else:
        assert isinstance(target.shortcut, nn.Identity)


def copy_attention(target, source) -> None:
    copy_layer(target.norm, source.group_norm)
    for a, b in ((target.query, source.to_q), (target.key, source.to_k), (target.value, source.to_v)):
        copy_layer(a, b)
    copy_layer(target.output.conv, source.to_out[0])


def copy_network(target: PyramidNCSNpp, source) -> None:
    with torch.no_grad():
        target.time.frequencies.copy_(source.time_proj.weight)
    copy_layer(target.time.linear1, source.time_embedding.linear_1)
    copy_layer(target.time.linear2, source.time_embedding.linear_2)
    copy_layer(target.input, source.conv_in)
    for level, theirs in zip(target.down_levels, source.down_blocks, strict=True):
        for i, resnet in enumerate(theirs.resnets):
            copy_block(level.blocks.residual[i], resnet)
        for i, attention in enumerate(getattr(theirs, "attentions", [])):
            copy_attention(level.blocks.attention[i], attention)
        if theirs.resnet_down is not None:
            copy_block(level.down, theirs.resnet_down)
            copy_layer(level.combine, theirs.skip_conv)
    for i, resnet in enumerate(source.mid_block.resnets):
        copy_block(target.middle.residual[i], resnet)
    copy_attention(target.middle.attention[0], source.mid_block.attentions[0])
    for level, theirs in zip(target.up_levels, source.up_blocks, strict=True):
        for i, resnet in enumerate(theirs.resnets):
            copy_block(level.blocks.residual[i], resnet)
        for attention in getattr(theirs, "attentions", []):
            copy_attention(level.blocks.attention[-1], attention)
        if theirs.resnet_up is not None:
            copy_block(level.up, theirs.resnet_up)
            copy_layer(level.head.norm, theirs.skip_norm)
            copy_layer(level.head.conv, theirs.skip_conv)
    copy_layer(target.up_levels[-1].head.norm, source.conv_norm_out)
    copy_layer(target.up_levels[-1].head.conv, source.conv_out)


@pytest.mark.filterwarnings("ignore")
def test_without_branches_it_is_ncsnpp():
    source = randomise(reference(), 0.03).eval()
    with torch.no_grad():  # at scale 16 the angles reach thousands of radians, where float32 itself is off by 1e-4
        source.time_proj.weight.div_(16)
    target = ours().eval()
    # Ours has no parameter more or less; the fixed Fourier frequencies are a buffer here.
    assert sum(p.numel() for p in target.parameters()) == sum(
        p.numel() for name, p in source.named_parameters() if not name.startswith("time_proj")
    )
    copy_network(target, source)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0.02, 0.9])
    with torch.no_grad():
        ordered = source(x, 999 * t).sample * (999 * t).view(-1, 1, 1, 1)  # diffusers divides by the time step
        (found,) = target((x,), at(*t.tolist()))
    assert ordered.std() > 0.1
    torch.testing.assert_close(found, ordered, atol=1e-5, rtol=1e-5)
