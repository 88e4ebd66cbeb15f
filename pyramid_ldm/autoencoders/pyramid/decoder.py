"""The heavy half: latent pyramid to image (PDM section 3.3, figure 5 right)."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyramid_ldm.autoencoders.pyramid.base import build_base
from pyramid_ldm.autoencoders.pyramid.decoder_level import (
    DecoderLevel,
    ResidualBranch,
    ShuffleLevel,
    ToRGB,
    TransformerBranch,
)
from pyramid_ldm.autoencoders.pyramid.regions import Regions, Step, plan
from pyramid_ldm.nn.layers import dropout_schedule
from pyramid_ldm.nn.resample import bilinear_up
from pyramid_ldm.pyramid import Level, Pyramid


class PyramidDecoder(nn.Module):
    """Each latent passes its own branch and is added to the backbone at its resolution; no spectral norm.

    Args:
        widths: channels at factor `patch`, 2 `patch`, ... down to the coarsest latent.
        levels: the latents, coarse to fine.
        patch: pixels a side of the blocks that the finest level says at once, every pixel a channel.
        blocks: residual blocks (each with attention where `attention_factors` says) a resolution.
        branch: "residual" or "vit", `branch_blocks` deep.
        skip: "skip" and "res_skip" sum RGB over resolutions, rgb = upsample(rgb) + to_rgb(h); "residual" and
            "res_skip" put a shortcut around every re-sampling (PDM figure 4).
        dropout: at the lowest resolution, falling linearly to 0 at the highest.
        norm: "pixel", so that above the attention levels an output pixel depends on its neighbourhood alone; "group"
            sees the whole image everywhere.
        upsampling, zero_init: see DecoderConfig.
        base: "thumbnail" or "linear": RGB begins as what the finest latent says of a reduced image, and at first as
            that alone (see `base`).
        coarse_init: scale at first, where a latent enters, of what comes up from coarser levels: 1 would hide it.
        checkpoint_factors: resolutions recomputed in the backward pass.
    """

    def __init__(
        self,
        widths: Sequence[int],
        levels: Sequence[Level],
        *,
        blocks: int = 2,
        branch: str = "residual",
        branch_blocks: int = 1,
        skip: str = "res_skip",
        attention: str = "spatial_channel",
        attention_factors: Sequence[int] = (),
        head_channels: int = 64,
        softmax_tokens: int = 4096,
        dropout: float = 0.35,
        norm: str = "pixel",
        upsampling: str = "nearest",
        zero_init: bool = True,
        coarse_init: float = 0.1,
        patch: int = 1,
        base: str = "none",
        checkpoint_factors: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.base = build_base(base, levels[-1], patch, decodes=True)
        channels = {level.factor: level.channels for level in levels}
        factors = [patch << i for i in reversed(range(len(widths)))]  # coarse to fine, as the latents
        rates = dropout_schedule(len(factors), dropout)

        def build_branch(factor: int, width: int, kind: str, rate: float) -> nn.Module | None:
            if factor not in channels:
                return None
            if branch == "vit":
                return TransformerBranch(
                    channels[factor], width, blocks=branch_blocks, head_channels=head_channels, dropout=rate
                )
            return ResidualBranch(
                channels[factor],
                width,
                blocks=branch_blocks,
                attention=kind,
                head_channels=head_channels,
                softmax_tokens=softmax_tokens,
                dropout=rate,
                norm=norm,
                zero_init=zero_init,
            )

        self.factors = factors
        self.latent_factors = tuple(channels)  # coarse to fine
        self.margin = 1 if upsampling == "bilinear" else 0  # see `plan`
        self.checkpoint_factors = frozenset(checkpoint_factors)
        self.levels = nn.ModuleList()
        previous: int | None = None
        for factor, width, rate in zip(factors, reversed(widths), rates, strict=True):
            kind = attention if factor in attention_factors else "none"
            self.levels.append(
                DecoderLevel(
                    previous,
                    width,
                    branch=build_branch(factor, width, kind, rate),
                    blocks=blocks,
                    attention=kind,
                    head_channels=head_channels,
                    softmax_tokens=softmax_tokens,
                    dropout=rate,
                    rgb_leaves=factor == patch or skip in ("skip", "res_skip"),
                    residual=skip in ("residual", "res_skip"),
                    norm=norm,
                    upsampling=upsampling,
                    zero_init=zero_init,
                    coarse_init=coarse_init,
                    patch=patch if factor == patch else 1,
                )
            )
            previous = width
        if self.base is not None:
            for module in self.modules():
                if isinstance(module, ToRGB):
                    nn.init.zeros_(module.conv.weight)
        while factors[-1] > 1:
            factors.append(factors[-1] // 2)
            self.levels.append(ShuffleLevel())

    @property
    def last_weight(self) -> nn.Parameter:
        """The finest `to_rgb` weight, where the adaptive GAN weight compares gradients."""
        finest = next(level for level in reversed(self.levels) if isinstance(level, DecoderLevel))
        assert finest.to_rgb is not None
        weight = finest.to_rgb.conv.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, latents: Pyramid, regions: Regions | None = None) -> Tensor:
        """Latents, coarse to fine, (B, C_i, H/f_i, W/f_i) -> image (B, 3, H, W), in [-1, 1] up to overshoot.

        With `regions`: only these parts, (entries, 3, height, width), each equal to the same part of the image.
        Levels are computed in part from where that is less work than the whole.
        """
        small = self._small(latents)
        if regions is None:
            _, image = self._run(None, None, latents, small, range(len(self.factors)), None)
            assert image is not None
            return image
        regions.check(latents[0].shape[0], *self.image_size(latents))
        first = self._first_in_part(latents, regions)
        h, rgb = self._run(None, None, latents, small, range(first), None)
        return self._finish(h, rgb, latents, small, first, regions)

    def tiled(self, latents: Pyramid, tile: int) -> Tensor:
        """`forward` without gradients, in tiles of up to tile x tile pixels, one at a time: the same image in less
        memory. Levels of no more pixels than a tile are computed once, whole."""
        height, width = self.image_size(latents)
        batch, rows, columns = latents[0].shape[0], min(tile, height), min(tile, width)
        limit = [i for i, size in enumerate(self._sizes(latents)) if size[0] * size[1] <= tile * tile]
        first = max(len(limit), self._global_levels())
        image: Tensor | None = None
        with torch.no_grad():
            small = self._small(latents)
            h, rgb = self._run(None, None, latents, small, range(first), None)
            for top in range(0, height, rows):
                for left in range(0, width, columns):
                    y, x = min(top, height - rows), min(left, width - columns)
                    part = self._finish(h, rgb, latents, small, first, Regions.of((y, x, rows, columns), batch))
                    if image is None:
                        image = part.new_empty(batch, 3, height, width)
                    image[:, :, y : y + rows, x : x + columns] = part
        assert image is not None
        return image

    def image_size(self, latents: Pyramid) -> tuple[int, int]:
        """(height, width) of the image that these latents decode to."""
        return latents[0].shape[2] * self.factors[0], latents[0].shape[3] * self.factors[0]

    def _sizes(self, latents: Pyramid) -> list[tuple[int, int]]:
        height, width = self.image_size(latents)
        return [(height // factor, width // factor) for factor in self.factors]

    def _global_levels(self) -> int:
        """How many of the levels, coarse to fine, have to be computed whole: up to the last with attention."""
        reaches = [level.reach for level in cast("list[DecoderLevel]", self.levels)]
        return max([1, *(i + 1 for i, reach in enumerate(reaches) if reach is None)])

    def _first_in_part(self, latents: Pyramid, regions: Regions) -> int:
        """The first level of which windows are less work than the whole."""
        sizes = self._sizes(latents)
        first = self._global_levels()
        while first < len(sizes):
            (step, *_), _ = plan(regions, sizes[first:], self._reaches(first), self.margin)
            height, width = sizes[first]
            if len(regions.corners) * step.above.height * step.above.width < latents[0].shape[0] * height * width:
                break
            first += 1
        return first

    def _reaches(self, first: int) -> list[int]:
        reaches = [level.reach for level in cast("list[DecoderLevel]", self.levels)[first:]]
        return [reach for reach in reaches if reach is not None]

    def _small(self, latents: Pyramid) -> Tensor | None:
        """What RGB begins as, at the base's factor; always whole, for it is three channels of one convolution."""
        return None if self.base is None else self.base.back(latents[-1])

    def _finish(
        self, h: Tensor, rgb: Tensor | None, latents: Pyramid, small: Tensor | None, first: int, regions: Regions
    ) -> Tensor:
        """The levels from `first` on, in part."""
        steps, final = plan(regions, self._sizes(latents)[first:], self._reaches(first), self.margin)
        _, image = self._run(h, rgb, latents, small, range(first, len(self.factors)), steps)
        assert image is not None, "RGB leaves the finest level"
        return final(image)

    def _run(
        self,
        h: Tensor | None,
        rgb: Tensor | None,
        latents: Pyramid,
        small: Tensor | None,
        levels: range,
        steps: list[Step] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Some levels, coarse to fine: features and RGB (where it leaves already) of the one before to those of the
        last. With `steps`, one a level, in part."""
        by_factor = dict(zip(self.latent_factors, latents, strict=True))
        for n, i in enumerate(levels):
            level, factor = cast(DecoderLevel, self.levels[i]), self.factors[i]
            step = None if steps is None else steps[n]
            if factor in self.checkpoint_factors and torch.is_grad_enabled():
                h, features = checkpoint(level, h, by_factor.get(factor), step, use_reentrant=False)
            else:
                h, features = level(h, by_factor.get(factor), step)
            if rgb is not None:  # nearest would make every finer level learn to undo blocks
                rgb = bilinear_up(rgb) if step is None else step.above(bilinear_up(step.below(rgb)))
            if features is not None and level.to_rgb is not None:
                addition = level.to_rgb(features)
                if addition.shape[1] > 3:  # patches, for the levels that spread them out
                    h = addition
                else:
                    rgb = addition if rgb is None else rgb + addition
            if small is not None and self.base is not None and factor == self.base.factor:
                entering = small if step is None else step.latent(small)
                rgb = entering if rgb is None else rgb + entering
        assert h is not None, "there is at least one level"
        return h, rgb
