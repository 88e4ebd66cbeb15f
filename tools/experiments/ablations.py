"""The rows of the ablations: one change each from the recipe, always by config keys."""

from pathlib import Path

# Stage one: latents 1x1x16, 2x2x4, 4x4x6, 8x8x6 (512 values).
AUTOENCODER_RECIPE = Path(__file__).parent / "ablation.yaml"
AUTOENCODER: dict[str, tuple[str, ...]] = {
    "default": (),
    "image patch 1": ("model.encoder.image_patch=1",),
    "image patch 2": ("model.encoder.image_patch=2",),
    "image patch 8": ("model.encoder.image_patch=8",),
    "no linear heads": ("model.encoder.linear_heads=false",),
    "no zero init": ("model.decoder.zero_init=false",),
    "coarse levels at full strength": ("model.decoder.coarse_init=1.0",),
    "none of these": (
        "model.decoder.coarse_init=1.0",
        "model.encoder.image_patch=1",
        "model.encoder.linear_heads=false",
        "model.decoder.zero_init=false",
    ),
    "attention spatial": ("model.attention.decoder=spatial",),
    "attention channel": ("model.attention.decoder=channel",),
    "attention none": ("model.attention.decoder=none",),
    "skip": ("model.skip=skip",),
    "residual": ("model.skip=residual",),
    "no skip": ("model.skip=none",),
    "no spectral norm": ("model.encoder.spectral_norm=false",),
    "group norm": ("model.norm=group",),
    "no branch blocks": ("model.decoder.branch_blocks=0",),
    "branch blocks 2": ("model.decoder.branch_blocks=2",),
    "vit branches": ("model.decoder.branch=vit", "model.decoder.branch_blocks=2"),
    "heavy encoder": (
        "model.encoder.widths=[32, 64, 128, 192, 256, 256, 256]",
    ),
    "max pooling": ("model.encoder.pooling=max",),
    "unshuffle": ("model.encoder.pooling=unshuffle",),
    "bilinear": ("model.decoder.upsampling=bilinear",),
    "dropout 0.35": ("model.decoder.dropout=0.35",),
    "kl 1e-8": ("loss.kl=1.0e-8",),
    "kl 1e-4": ("loss.kl=1.0e-4",),
    "more at the finest": (
        "model.levels=[{factor: 64, channels: 16}, {factor: 16, channels: 3}, {factor: 8, channels: 7}]",
    ),
    "more below": (
        "model.levels=[{factor: 64, channels: 64}, {factor: 32, channels: 16}, {factor: 16, channels: 12}, "
        "{factor: 8, channels: 3}]",
    ),
    "single latent": (  # its trunk ends at the latent: fewer parameters
        "model.levels=[{factor: 8, channels: 8}]",
        "model.encoder.widths=[16, 32, 64, 96]",
        "model.decoder.widths=[16, 32, 64, 128]",
    ),
    "gan": (
        "loss.gan.weight=0.5",
        "loss.gan.start=500",
        "loss.gan.disc_warmup=250",
        "loss.gan.ramp=250",
    ),
}  # fmt: skip

# Stage two, from flow.yaml, on one cache. Rows with a list of levels are for four.
FLOW: dict[str, tuple[str, ...]] = {
    "default": (),
    "no spectral norm": ("model.spectral_norm=false",),
    "dropout none": ("model.dropout=0.0",),
    "dropout decreasing 0.35": ("model.dropout=0.35",),
    "dropout uniform 0.175": ("model.dropout=0.175", "model.dropout_schedule=uniform"),
    "dropout increasing 0.35": ("model.dropout=0.35", "model.dropout_schedule=increasing"),
    "attention spatial": ("model.attention=spatial",),
    "attention none": ("model.attention=none",),
    "scaling paper": ("scaling=paper",),
    "scaling channel": ("scaling=channel",),
    "finer levels weigh more": ("rectified_flow.level_weights=[0.25, 0.5, 1, 2]",),
    "time logit-normal": ("rectified_flow.time_distribution=logit_normal",),
    "coarse levels ahead": ("rectified_flow.level_shifts=[4, 2.5, 1.6, 1]",),
    "coarse levels behind": ("rectified_flow.level_shifts=[0.25, 0.4, 0.63, 1]",),
    "ema 0.05": ("ema.export=0.05",),
    "ema 0.2": ("ema.export=0.2",),
}
