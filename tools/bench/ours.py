"""Our networks at their shipped configs, with random weights."""

from dataclasses import replace
from pathlib import Path

import torch

from bench.measuring import Builder, Subject
from bench.settings import Settings
from pyramid_ldm import PyramidAutoencoder, PyramidNCSNpp
from pyramid_ldm.config import AutoencoderTraining, FlowTraining, load_config
from pyramid_ldm.nn.layers import fold_spectral_norm
from pyramid_ldm.pyramid import Pyramid, level_shapes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {(1024, 1024): "celebahq_1024", (1024, 2048): "scapes2k", (2048, 2048): "people2k"}  # by height, width
SIZES = {name: size for size, name in CONFIGS.items()}
WIDTHS = "[8,8,16,16,16,16]"
TINY_AUTOENCODER = (
    "model.levels=[{factor: 32, channels: 8}, {factor: 16, channels: 4}]",
    f"model.encoder.widths={WIDTHS}",
    f"model.decoder.widths={WIDTHS}",
    "model.attention.max_tokens=64",
    "loss.gan.channels=8",
)
TINY_FLOW = ("model.widths=[16,16]", "model.blocks=1")


def configs(settings: Settings) -> dict[tuple[int, int], str]:
    """The config for each size of image, by the size as run; --quick leaves the smallest out."""
    chosen = {size: name for size, name in CONFIGS.items() if size[0] * size[1] >= settings.smallest}
    return {settings.image_size(size): name for size, name in list(chosen.items())[settings.quick :]}


def autoencoder_config(name: str, settings: Settings, *overrides: str) -> AutoencoderTraining:
    """A shipped config; tiny under --quick."""
    height, width = settings.image_size(SIZES[name])
    tiny = (*TINY_AUTOENCODER, f"image_size=[{height},{width}]") if settings.quick else ()
    path = ROOT / "autoencoder_configs" / f"{name}.yaml"
    return load_config(AutoencoderTraining, path, ["data.root=none", *tiny, *overrides])


def flow_config(name: str, settings: Settings, *overrides: str) -> FlowTraining:
    """A shipped config on the latents of the autoencoder of the same name."""
    tiny = TINY_FLOW if settings.quick else ()
    path = ROOT / "diffusion_configs" / f"{name}.yaml"
    config = load_config(FlowTraining, path, ["data.shards=none", *tiny, *overrides])
    stage_one = autoencoder_config(name, settings)
    config.model.resolve(stage_one.image_size, stage_one.model.levels)
    return config


def latent_shapes(name: str, settings: Settings) -> list[tuple[int, int, int]]:
    """(channels, height, width) of each level of a config."""
    model = autoencoder_config(name, settings).model
    return level_shapes(model.levels, model.image_size)


def autoencoder(name: str, settings: Settings, device: torch.device) -> PyramidAutoencoder:
    """For inference: spectral norm folded."""
    with device:
        model = PyramidAutoencoder(autoencoder_config(name, settings).model)
    fold_spectral_norm(model)
    return model.eval()


def any_size_autoencoder(settings: Settings, device: torch.device) -> PyramidAutoencoder:
    """people2k without its coarsest level, so that it takes sides from 512 on; its weights do not depend on them."""
    base = autoencoder_config("people2k", settings).model
    levels = base.levels[1:]
    depth = levels[0].factor.bit_length()
    encoder = replace(base.encoder, widths=base.encoder.widths[:depth])
    decoder = replace(base.decoder, widths=base.decoder.widths[:depth])
    with device:
        model = PyramidAutoencoder(replace(base, levels=levels, encoder=encoder, decoder=decoder))
    fold_spectral_norm(model)
    return model.eval()


def flow(name: str, settings: Settings, device: torch.device) -> PyramidNCSNpp:
    """For inference: spectral norm folded."""
    with device:
        model = PyramidNCSNpp(flow_config(name, settings).model)
    fold_spectral_norm(model)
    return model.eval()


def latents(
    model: PyramidAutoencoder | PyramidNCSNpp, size: tuple[int, int], device: torch.device, batch: int = 1
) -> Pyramid:
    """Random latents of images of `size`."""
    return tuple(torch.randn(batch, *shape, device=device) for shape in level_shapes(model.levels, size))


def decode_subject(
    model: PyramidAutoencoder, size: tuple[int, int], device: torch.device, *, batch: int = 1, tiled: bool = False
) -> Subject:
    """Latents to images."""
    decode = model.decode_tiled if tiled else model.decode
    return Subject(model, latents(model, size, device, batch), lambda *levels: decode(levels), batch)


def encode_subject(
    model: PyramidAutoencoder, size: tuple[int, int], device: torch.device, *, batch: int = 1
) -> Subject:
    """Images to the mean of their latents."""
    image = torch.rand(batch, 3, *size, device=device) * 2 - 1
    return Subject(model, (image,), lambda x: model.encode(x).mode(), batch)


def decoder_builder(name: str, settings: Settings, *, tiled: bool = False) -> Builder:
    """A config's decoder at its own size."""
    size = settings.image_size(SIZES[name])
    return lambda device: decode_subject(autoencoder(name, settings, device), size, device, tiled=tiled)


def encoder_builder(name: str, settings: Settings) -> Builder:
    """A config's encoder at its own size."""
    size = settings.image_size(SIZES[name])
    return lambda device: encode_subject(autoencoder(name, settings, device), size, device)


def flow_builder(name: str, settings: Settings, batch: int = 1) -> Builder:
    """One evaluation of a config's velocity network."""
    size = settings.image_size(SIZES[name])

    def build(device: torch.device) -> Subject:
        model = flow(name, settings, device)
        time = torch.full((batch,), 0.5, device=device)
        return Subject(model, (latents(model, size, device, batch), time), model, batch)

    return build
