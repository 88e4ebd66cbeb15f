"""The networks that the toolkit is held beside, built by diffusers after their published configs.

stabilityai/sd-vae-ft-mse, mit-han-lab/dc-ae-f32c32-in-1.0 and dc-ae-f64c128-in-1.0, CompVis/ldm-celebahq-256,
facebook/DiT-XL-2-256.
"""

from collections.abc import Sequence
from typing import Any

AUTOENCODERS = {"SD VAE f8": (8, 4), "DC-AE f32c32": (32, 32), "DC-AE f64c128": (64, 128)}  # factor, channels
GENERATORS = {  # factor and channels of the latents, patch (0: the U-Net)
    "LDM U-Net on f4": (4, 3, 0),
    "DiT-XL/2 on SD f8": (8, 4, 2),
    "DiT-XL/1 on DC-AE f32c32": (32, 32, 1),
    "DiT-XL/1 on DC-AE f64c128": (64, 128, 1),
}
SD_WIDTHS = (128, 256, 512, 512)  # at factor 1, 2, 4, 8; further factors repeat the last
DC_WIDTHS = (128, 256, 512, 512, 1024, 1024, 2048)  # f64c128's
DC_LAYERS = {"encoder": (0, 4, 8, 2, 2, 2, 2), "decoder": (0, 5, 10, 2, 2, 2, 2)}


def autoencoder(name: str, small: bool = False) -> Any:
    """One of `AUTOENCODERS`; `small`: of a sixteenth of the widths."""
    factor, channels = AUTOENCODERS[name]
    build = sd_vae if name.startswith("SD") else dc_ae
    return build(factor.bit_length(), channels, 1 / 16 if small else 1.0)


def sd_vae(depth: int, channels: int, width: float) -> Any:
    """Stable Diffusion's with `depth` resolutions and `width` times the published widths."""
    from diffusers import AutoencoderKL

    widths = [int(SD_WIDTHS[min(i, 3)] * width) for i in range(depth)]
    return AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=channels,
        norm_num_groups=32 if widths[0] % 32 == 0 else 4,
        down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth,
    )  # fmt: skip


def dc_ae(depth: int, channels: int, width: float, norms: Sequence[str] | None = None) -> Any:
    """DC-AE with `depth` resolutions and `width` times the published widths; `norms`: the decoder's, fine to coarse."""
    from diffusers import AutoencoderDC

    fine = min(3, depth)  # of residual blocks; coarser ones have EfficientViT's
    halves: dict[str, Any] = {}
    for half, layers in DC_LAYERS.items():
        halves[f"{half}_layers_per_block"] = layers[:depth]
        halves[f"{half}_block_types"] = ["ResBlock"] * fine + ["EfficientViTBlock"] * (depth - fine)
        halves[f"{half}_block_out_channels"] = [int(w * width) for w in DC_WIDTHS[:depth]]
        halves[f"{half}_qkv_multiscales"] = [()] * depth
    return AutoencoderDC(
        latent_channels=channels, attention_head_dim=32, decoder_act_fns=["relu"] * fine + ["silu"] * (depth - fine),
        decoder_norm_types=list(norms or ["batch_norm"] * fine + ["rms_norm"] * (depth - fine)),
        downsample_block_type="pixel_unshuffle", upsample_block_type="pixel_shuffle", **halves,
    )  # fmt: skip


def generator(name: str, side: int, small: bool = False) -> Any:
    """One of `GENERATORS` for latents of side x side; DiT-XL with learned variance, as published."""
    from diffusers import DiTTransformer2DModel, UNet2DModel

    _, channels, patch = GENERATORS[name]
    if patch:
        heads, dimension, layers = (2, 8, 2) if small else (16, 72, 28)
        return DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=dimension, num_layers=layers, in_channels=channels,
            out_channels=2 * channels, patch_size=patch, sample_size=side,
        )  # fmt: skip
    widths, groups, dimension = ((8, 16, 24, 32), 4, 8) if small else ((224, 448, 672, 896), 32, 32)
    return UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=channels, layers_per_block=2, block_out_channels=widths,
        norm_num_groups=groups, attention_head_dim=dimension,
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    )  # fmt: skip
