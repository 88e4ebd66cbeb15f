"""One optimizer step of each stage."""

from statistics import median

from bench import ours
from bench.measuring import measure
from bench.results import Figures
from bench.section import Section
from bench.settings import Item, Settings
from bench.tables import IMAGES, PARAMETERS, PEAK, RSS, TIME, Column, duration, size, times
from bench.training import StageOne, StageTwo, stage_one_config

CONFIG, REGIONS, BATCH = "scapes2k", 2, 16


def items(settings: Settings) -> list[Item]:
    """Stage one with and without regions, stage two."""
    height, width = settings.image_size(ours.SIZES[CONFIG])
    group = f"stage one, {height}x{width}, batch 1"
    side = settings.side(512)
    return [
        Item("train", group, f"{CONFIG}, whole images", {"regions": 0}, reference=True),
        Item("train", group, f"{CONFIG}, {REGIONS} regions of {side}", {"regions": REGIONS}),
        Item("train", f"stage two, batch {BATCH}", CONFIG, {"flow": True}),
    ]


def measure_item(item: Item, settings: Settings) -> Figures:
    """A step, and its parts."""
    if item.params.get("flow"):
        return measure_step(StageTwo(ours.flow_config(CONFIG, settings), settings, BATCH), settings, BATCH)
    step = StageOne(stage_one_config(CONFIG, settings, 1, item.params["regions"]), settings)
    figures = measure_step(step, settings, 1)
    figures["encoder_seconds"] = encoder = step.encoder_seconds()
    figures["decoder_seconds"] = figures.pop("gradient_seconds") - encoder
    return figures


def measure_step(step: StageOne | StageTwo, settings: Settings, images: int) -> Figures:
    """Whole steps; the medians of their two parts."""
    figures = measure(step.run, settings, step.existing())
    gradients, updates = zip(*step.split[1:], strict=True)
    figures |= {"gradient_seconds": median(gradients), "update_seconds": median(updates)}
    return figures | {"images": images, "parameters": step.parameters()}


SECTION = Section(
    title="A training step",
    about="Stage one: L1, LPIPS through a random VGG-16 and the GAN, all active, with the config's checkpointing. "
    "The encoder's share is its forward and backward pass alone; the rest of the gradients is the decoder and the "
    "losses; the update is clipping, Adam, averages and spectral norm. State is weights, averages and Adam's moments; "
    "the peak comes on top of it.",
    columns=(
        PARAMETERS,
        TIME,
        Column("encoder_seconds", "encoder", duration),
        Column("decoder_seconds", "decoder, losses", duration),
        Column("gradient_seconds", "gradients", duration),
        Column("update_seconds", "update", duration),
        IMAGES,
        Column("state_bytes", "state", size),
        PEAK,
        RSS,
        Column("ratio", "time / whole images", times(1)),
    ),
    items=items,
    measure=measure_item,
)
