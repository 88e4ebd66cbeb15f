"""The peers: diffusers' classes with random weights, after the published configs.

AutoencoderKL: Stable Diffusion's (stabilityai/sd-vae-ft-mse). AutoencoderDC: mit-han-lab/dc-ae-f32c32-in-1.0 and
dc-ae-f64c128-in-1.0. UNet2DModel: CompVis/ldm-celebahq-256. DiTTransformer2DModel: DiT-XL (facebook/DiT-XL-2-256).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measuring import Builder, Subject
from bench.settings import Settings

AUTOENCODERS = {"SD VAE f8": (8, 4), "DC-AE f32c32": (32, 32), "DC-AE f64c128": (64, 128)}  # factor, channels
GENERATORS = {  # factor and channels of the latents, patch (0: the U-Net)
    "LDM U-Net on f4": (4, 3, 0),
    "DiT-XL/2 on SD f8": (8, 4, 2),
    "DiT-XL/1 on DC-AE f32c32": (32, 32, 1),
    "DiT-XL/1 on DC-AE f64c128": (64, 128, 1),
}
DECODER_OF = {
    "DiT-XL/2 on SD f8": "SD VAE f8",
    "DiT-XL/1 on DC-AE f32c32": "DC-AE f32c32",
    "DiT-XL/1 on DC-AE f64c128": "DC-AE f64c128",
}


def autoencoder(name: str, quick: bool = False) -> Any:
    """One of `AUTOENCODERS`; a tiny one of the same shape under `quick`."""
    from diffusers import AutoencoderDC, AutoencoderKL

    factor, channels = AUTOENCODERS[name]
    if name.startswith("SD"):
        return AutoencoderKL(
            block_out_channels=(8, 8, 16, 16) if quick else (128, 256, 512, 512),
            layers_per_block=1 if quick else 2,
            latent_channels=channels,
            norm_num_groups=4 if quick else 32,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=512,
        )
    deep = factor.bit_length() - 3  # resolutions with EfficientViT blocks, below three of residual blocks
    widths = [8, 8, 16, 32, 32, 32, 128] if quick else [128, 256, 512, 512, 1024, 1024, 2048]
    kinds = ["ResBlock"] * 3 + ["EfficientViTBlock"] * deep
    encoder, decoder = ([0, 1, 1], [0, 1, 1]) if quick else ([0, 4, 8], [0, 5, 10])
    depth = [1 if quick else 2] * deep
    return AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=32,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths[: 3 + deep],
        decoder_block_out_channels=widths[: 3 + deep],
        encoder_layers_per_block=encoder + depth,
        decoder_layers_per_block=decoder + depth,
        encoder_qkv_multiscales=[()] * (3 + deep),
        decoder_qkv_multiscales=[()] * (3 + deep),
        decoder_norm_types=["batch_norm"] * 3 + ["rms_norm"] * deep,
        decoder_act_fns=["relu"] * 3 + ["silu"] * deep,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
    )


def unet(quick: bool = False) -> Any:
    """LDM's U-Net on f4 latents of three channels."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        layers_per_block=1 if quick else 2,
        block_out_channels=(8, 16, 16, 16) if quick else (224, 448, 672, 896),
        norm_num_groups=4 if quick else 32,
        attention_head_dim=8 if quick else 32,
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    )


def dit(channels: int, patch: int, quick: bool = False) -> Any:
    """DiT-XL with learned variance, as published."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2 if quick else 16,
        attention_head_dim=8 if quick else 72,
        num_layers=2 if quick else 28,
        in_channels=channels,
        out_channels=2 * channels,
        patch_size=patch,
        sample_size=32,
    )


def run_dit(model: Any, latents: Tensor, step: Tensor, label: Tensor) -> Tensor:
    """DiTTransformer2DModel.forward, which takes squares only, up to the re-ordering of its output's pixels.

    Position encodings are added as a constant of the right shape: diffusers would compute them anew in every call.
    """
    h = model.pos_embed.proj(latents).flatten(2).transpose(1, 2)
    h = h + h.new_zeros(1, h.shape[1], h.shape[2])
    for block in model.transformer_blocks:
        h = block(h, timestep=step, class_labels=label)
    condition = model.transformer_blocks[0].norm1.emb(step, label, hidden_dtype=h.dtype)
    shift, scale = model.proj_out_1(F.silu(condition)).chunk(2, dim=1)
    output: Tensor = model.proj_out_2(model.norm_out(h) * (1 + scale[:, None]) + shift[:, None])
    return output


def decoder_builder(name: str, size: tuple[int, int], settings: Settings) -> Builder:
    """Latents of an image of `size` to the image."""
    factor, channels = AUTOENCODERS[name]

    def build(device: torch.device) -> Subject:
        with device:
            model = autoencoder(name, settings.quick)
            latents = torch.randn(1, channels, size[0] // factor, size[1] // factor)
        return Subject(model, (latents,), lambda z: model.decode(z, return_dict=False))

    return build


def encoder_builder(name: str, size: tuple[int, int], settings: Settings) -> Builder:
    """An image of `size` to its latents (KL: their mean)."""

    def build(device: torch.device) -> Subject:
        with device:
            model = autoencoder(name, settings.quick)
            image = torch.rand(1, 3, *size) * 2 - 1
        if name.startswith("SD"):
            return Subject(model, (image,), lambda x: model.encode(x).latent_dist.mode())
        return Subject(model, (image,), lambda x: model.encode(x, return_dict=False))

    return build


def generator_builder(name: str, size: tuple[int, int], settings: Settings, batch: int = 1) -> Builder:
    """One evaluation on the latents of an image of `size`."""
    factor, channels, patch = GENERATORS[name]

    def build(device: torch.device) -> Subject:
        with device:
            latents = torch.randn(batch, channels, size[0] // factor, size[1] // factor)
            step, label = (torch.full((batch,), value, dtype=torch.long) for value in (500, 1))
            model = dit(channels, patch, settings.quick) if patch else unet(settings.quick)
        if patch:
            return Subject(model, (latents, step, label), lambda z, t, y: run_dit(model, z, t, y), batch)
        return Subject(model, (latents, step), lambda z, t: model(z, t, return_dict=False), batch)

    return build
