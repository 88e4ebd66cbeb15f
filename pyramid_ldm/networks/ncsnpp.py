"""The pyramid NCSN++ (PDM section 3.3, figure 6; NCSN++: Song et al. 2021).

The backbone is NCSN++ on the finest latent. Every coarser latent has a branch: on the way down its features are added
to the backbone at its own resolution (input skip), on the way up the backbone's features there, together with the
branch's own, give what is predicted there (res-skip). Without coarser latents this is NCSN++.
"""

import math
from pathlib import Path
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyramid_ldm.condition import Context
from pyramid_ldm.config.flow import NCSNppConfig
from pyramid_ldm.nn.attention import build_attention
from pyramid_ldm.nn.layers import conv2d, dropout_schedule, group_norm, linear, rescaled_sum
from pyramid_ldm.nn.resample import box_down, fir_down, fir_up, nearest_up
from pyramid_ldm.nn.resblock import Resample, ResidualBlock
from pyramid_ldm.nn.spectral import full_precision
from pyramid_ldm.pyramid import Pyramid, level_shapes
from pyramid_ldm.serialization import assemble, read_model, read_stored, save_model


class NoiseEmbedding(nn.Module):
    """Fixed random Fourier features of a noise label (B,), then two linear layers: (B, 4 width)."""

    frequencies: Tensor

    def __init__(self, width: int, *, scale: float, spectral_norm: bool) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width) * scale)
        self.linear1 = linear(2 * width, 4 * width, spectral_norm=spectral_norm)
        self.linear2 = linear(4 * width, 4 * width, spectral_norm=spectral_norm)

    def forward(self, label: Tensor) -> Tensor:
        with full_precision(label.device):  # the angles reach hundreds of radians
            angles = 2 * math.pi * label.float()[:, None] * self.frequencies
            features = torch.cat([angles.sin(), angles.cos()], dim=1)
        embedding: Tensor = self.linear2(F.silu(self.linear1(features)))
        return embedding


class Head(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution that starts at zero; exempt from spectral norm."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.conv = conv2d(width, channels)
        nn.init.zeros_(self.conv.weight)

    def forward(self, h: Tensor) -> Tensor:
        predicted: Tensor = self.conv(F.silu(self.norm(h)))
        return predicted


class _Blocks(nn.Module):
    """Residual blocks with attention after each, all at one resolution."""

    def __init__(self, widths_in: list[int], width: int, make: "_Factory", *, attention: list[bool]) -> None:
        super().__init__()
        self.residual = nn.ModuleList(make.block(w, width) for w in widths_in)
        self.attention = nn.ModuleList(make.attention(width) if has else nn.Identity() for has in attention)
        self.recompute = make.config.checkpoint

    def step(self, i: int, h: Tensor, embedding: Tensor) -> Tensor:
        """Block i and what follows it."""

        def run(h: Tensor, embedding: Tensor) -> Tensor:
            out: Tensor = self.attention[i](self.residual[i](h, embedding))
            return out

        if self.recompute and torch.is_grad_enabled():
            result: Tensor = checkpoint(run, h, embedding, use_reentrant=False)
            return result
        return run(h, embedding)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        for i in range(len(self.residual)):
            h = self.step(i, h, embedding)
        return h


class _Factory:
    """Makes blocks and attention for one resolution with the network's settings."""

    def __init__(self, config: NCSNppConfig, factor: int, dropout: float) -> None:
        self.config, self.dropout = config, dropout
        self.has_attention = config.attention != "none" and factor in (config.attention_factors or [])

    def block(self, inputs: int, outputs: int, resample: Resample | None = None) -> ResidualBlock:
        return ResidualBlock(
            inputs,
            outputs,
            embedding=4 * self.config.widths[0],
            resample=resample,
            dropout=self.dropout,
            spectral_norm=self.config.spectral_norm,
        )

    def attention(self, width: int) -> nn.Module:
        return build_attention(
            self.config.attention,
            width,
            head_channels=self.config.head_channels,
            spectral_norm=self.config.spectral_norm,
            rescale=True,
        )


class LevelBranch(nn.Module):
    """One coarse latent's way into the backbone and its prediction's way out."""

    def __init__(self, channels: int, width: int, make: _Factory) -> None:
        super().__init__()
        depth = make.config.branch_blocks
        attention = [make.has_attention] * depth
        self.input = conv2d(channels, width, spectral_norm=make.config.spectral_norm)
        self.enter = _Blocks([width] * depth, width, make, attention=attention)
        self.leave = _Blocks([width] * depth, width, make, attention=attention)
        self.head = Head(width, channels)
        self.early = Head(width, channels) if make.config.early else None

    def features(self, latent: Tensor, embedding: Tensor) -> Tensor:
        """What is added to the backbone on the way down."""
        out: Tensor = self.enter(self.input(latent), embedding)
        return out

    def predict_early(self, backbone: Tensor) -> Tensor:
        """This level's prediction, from the backbone on the way down."""
        assert self.early is not None
        out: Tensor = self.early(backbone)
        return out

    def leave_backbone(self, backbone: Tensor, features: Tensor, embedding: Tensor) -> Tensor:
        """This level's prediction, from the backbone on the way up and the branch's own features."""
        out: Tensor = self.head(self.leave(rescaled_sum(backbone, features), embedding))
        return out


class DownLevel(nn.Module):
    """One resolution on the way down. `combine` lets the re-sampled finest latent in again (NCSN++'s input skip)."""

    def __init__(
        self, width_in: int, width: int, make: _Factory, *, down: Resample | None, latent_channels: int
    ) -> None:
        super().__init__()
        n = make.config.blocks
        self.blocks = _Blocks([width_in] + [width] * (n - 1), width, make, attention=[make.has_attention] * n)
        self.down = make.block(width, width, down) if down else None
        self.early = Head(width, latent_channels) if make.config.early else None
        self.combine = conv2d(latent_channels, width, 1, spectral_norm=make.config.spectral_norm) if down else None


class UpLevel(nn.Module):
    """One resolution on the way up; attention once, after the last block. `head` adds to the finest prediction
    (NCSN++'s output skip)."""

    def __init__(
        self, width_in: int, skips: list[int], width: int, make: _Factory, *, up: Resample | None, latent_channels: int
    ) -> None:
        super().__init__()
        inputs = [
            previous + skip for previous, skip in zip([width_in] + [width] * (len(skips) - 1), skips, strict=True)
        ]
        last = [i == len(skips) - 1 and make.has_attention for i in range(len(skips))]
        self.blocks = _Blocks(inputs, width, make, attention=last)
        self.head = Head(width, latent_channels)
        self.up = make.block(width, width, up) if up else None


class PyramidNCSNpp(nn.Module):
    """What a process wants predicted of every latent level: `network(noisy, context)`, coarse to fine.

    Levels, widths and attention are in `NCSNppConfig`; `widths[i]` belongs to factor finest * 2^i.
    """

    def __init__(self, config: NCSNppConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = list(config.levels)
        self.shapes = level_shapes(self.levels, config.image_size)
        finest, sn, widths = self.levels[-1], config.spectral_norm, config.widths
        depth = len(widths)
        self.factors = [finest.factor << i for i in range(depth)]  # fine to coarse
        rates = dropout_schedule(depth, config.dropout, config.dropout_schedule)[::-1]
        makers = [_Factory(config, factor, rate) for factor, rate in zip(self.factors, rates, strict=True)]
        self.downs = [self._resampling(i, fir_down, box_down) for i in range(depth - 1)]
        self.ups = [self._resampling(i, fir_up, nearest_up) for i in range(depth - 1)]

        self.time = NoiseEmbedding(widths[0], scale=config.fourier_scale, spectral_norm=sn)
        self.input = conv2d(finest.channels, widths[0], spectral_norm=sn)
        arriving = [widths[0], *widths[:-1]]
        place = {factor: i for i, factor in enumerate(self.factors)}
        self.branches = nn.ModuleDict(
            {
                str(level.factor): LevelBranch(level.channels, widths[place[level.factor]], makers[place[level.factor]])
                for level in self.levels[:-1]
            }
        )
        self.down_levels = nn.ModuleList(
            DownLevel(
                arriving[i],
                widths[i],
                makers[i],
                down=self.downs[i] if i + 1 < depth else None,
                latent_channels=finest.channels,
            )
            for i in range(depth)
        )
        coarsest = makers[-1]
        self.middle = _Blocks([widths[-1]] * 2, widths[-1], coarsest, attention=[config.attention != "none", False])
        skips = [widths[0]]  # widths of the features stored on the way down
        for i, width in enumerate(widths):
            skips += [width] * (config.blocks + (i + 1 < depth))
        self.up_levels = nn.ModuleList()
        for i in reversed(range(depth)):
            taken = [skips.pop() for _ in range(config.blocks + 1)]
            self.up_levels.append(
                UpLevel(
                    widths[min(i + 1, depth - 1)],
                    taken,
                    widths[i],
                    makers[i],
                    up=self.ups[i - 1] if i else None,
                    latent_channels=finest.channels,
                )
            )

    def _resampling(self, i: int, fir: Resample, plain: Resample) -> Resample:
        """Between resolution i and the next coarser one: FIR, but box or nearest where the finer is 4x4 or smaller
        (FIR's zero padding would lose up to 44% of the signal there)."""
        small = min(side // self.factors[i] for side in self.config.image_size) <= 4
        return plain if small and not self.config.fir_everywhere else fir

    def forward(self, latents: Pyramid, context: Context) -> Pyramid:
        """Noisy latents (B, C_i, H/f_i, W/f_i), coarse to fine -> predictions of the same shapes; with `context.early`,
        those of the way down after them, where there are any."""
        early = self.config.early and (context.early or context.guidance != 1)
        said: dict[int, Tensor] = {}  # on the way down, by factor
        additions: list[Tensor] = []  # to what it says there of the finest level, fine to coarse
        embedding = self.time(context.label)
        by_factor = dict(zip((level.factor for level in self.levels), latents, strict=True))
        entered = {
            factor: self._branch(factor).features(by_factor[factor], embedding) for factor in list(by_factor)[:-1]
        }

        image = latents[-1]
        h: Tensor = self.input(image)
        stored = [h]
        for i, (factor, level) in enumerate(zip(self.factors, cast("list[DownLevel]", self.down_levels), strict=True)):
            for n in range(self.config.blocks):
                h = level.blocks.step(n, h, embedding)
                if n == 0 and factor in entered:
                    h = rescaled_sum(h, entered[factor])
                stored.append(h)
            if early and level.early is not None:
                additions.append(level.early(h))
                if factor in entered:
                    said[factor] = self._branch(factor).predict_early(h)
            if level.down is not None and level.combine is not None:
                image = self.downs[i](image)
                h = level.down(h, embedding) + level.combine(image)
                stored.append(h)

        h = self.middle(h, embedding)

        predictions: dict[int, Tensor] = {}
        finest: Tensor | None = None
        for i, rise in zip(reversed(range(len(self.factors))), cast("list[UpLevel]", self.up_levels), strict=True):
            for n in range(self.config.blocks + 1):
                h = rise.blocks.step(n, torch.cat([h, stored.pop()], dim=1), embedding)
            factor = self.factors[i]
            if factor in entered:
                predictions[factor] = self._branch(factor).leave_backbone(h, entered[factor], embedding)
            addition = rise.head(h)
            finest = addition if finest is None else self.ups[i](finest) + addition
            if rise.up is not None:
                h = rise.up(h, embedding)
        assert finest is not None
        predictions[self.levels[-1].factor] = finest
        found = tuple(predictions[level.factor] for level in self.levels)
        if not early:
            return found
        finest = additions.pop()
        for i in reversed(range(len(additions))):
            finest = self.ups[i](finest) + additions[i]
        said[self.levels[-1].factor] = finest
        before = tuple(said[level.factor] for level in self.levels)
        if context.early:
            return found + before
        return tuple(torch.lerp(a.float(), b.float(), context.guidance) for a, b in zip(before, found, strict=True))

    def _branch(self, factor: int) -> LevelBranch:
        branch = self.branches[str(factor)]
        assert isinstance(branch, LevelBranch)
        return branch

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.yaml` and `model.safetensors`, spectral norm folded into the weights."""
        save_model(Path(directory), self.config, self)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Loads what `save_pretrained` wrote, in eval mode, float32, on the CPU."""
        return assemble(read_model(Path(directory), "train-flow", lambda home: read_stored(home, NCSNppConfig)), cls)
