"""Decoding and encoding one image."""

from functools import partial

from bench import ours, peers
from bench.measuring import Builder, measure_subject
from bench.results import Figures
from bench.section import Section
from bench.settings import Item, Settings, interleave
from bench.tables import COST


def label(size: tuple[int, int]) -> str:
    """Height x width."""
    return f"{size[0]}x{size[1]}"


def items(section: str, settings: Settings) -> list[Item]:
    """Ours and the peers at every size that a config is shipped for."""
    found = []
    for size, config in ours.configs(settings).items():
        item = partial(Item, section, label(size))
        own = [item(f"ours: {config}", {"config": config}, reference=True)]
        if section == "decode":
            own.append(item(f"ours: {config}, decode_tiled", {"config": config, "tiled": True}))
        others = [item(name, {"peer": name, "size": size}, needs="diffusers") for name in peers.AUTOENCODERS]
        found += interleave(own, others)
    return found


def measure(item: Item, settings: Settings) -> Figures:
    """An item of either section."""
    return measure_subject(builder(item, settings), settings)


def builder(item: Item, settings: Settings) -> Builder:
    """What an item names."""
    decoding, params = item.section == "decode", item.params
    if "peer" in params:
        make = peers.decoder_builder if decoding else peers.encoder_builder
        return make(params["peer"], tuple(params["size"]), settings)
    if decoding:
        return ours.decoder_builder(params["config"], settings, tiled=params.get("tiled", False))
    return ours.encoder_builder(params["config"], settings)


DECODE = Section(
    title="Decoding one image",
    about="Latents to pixels, batch 1; median of warm runs. Parameters are the whole autoencoder's. `decode_tiled` "
    "computes the same image piece by piece. FLOPs are counted on meta tensors, a multiply-add as two.",
    columns=COST,
    items=partial(items, "decode"),
    measure=measure,
    needs_ceiling=True,
)
ENCODE = Section(
    title="Encoding one image",
    about="Pixels to the mean of the latents, batch 1; median of warm runs.",
    columns=COST,
    items=partial(items, "encode"),
    measure=measure,
    needs_ceiling=True,
)
