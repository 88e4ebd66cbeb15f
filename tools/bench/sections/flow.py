"""One evaluation of the generator."""

from bench import ours, peers
from bench.measuring import measure_subject
from bench.results import Figures
from bench.section import Section
from bench.sections.coding import label
from bench.settings import Item, Settings, interleave
from bench.tables import COST

BATCH, SMALLEST_PEER = 8, "DiT-XL/1 on DC-AE f64c128"


def items(settings: Settings) -> list[Item]:
    """Ours and the peers at the latents of every size that a config is shipped for."""
    found = []
    for size, config in ours.configs(settings).items():
        own = [Item("flow", label(size), f"ours: {config}", {"config": config}, reference=True)]
        others = [
            Item("flow", label(size), name, {"peer": name, "size": size}, needs="diffusers")
            for name in peers.GENERATORS
        ]
        found += interleave(own, others)
    group, many = f"{label(size)}, batch {BATCH}", {"batch": BATCH}
    ours_many = Item("flow", group, f"ours: {config}", {"config": config} | many, reference=True)
    other = Item("flow", group, SMALLEST_PEER, {"peer": SMALLEST_PEER, "size": size} | many, needs="diffusers")
    return [*found, *interleave([ours_many], [other])]


def measure(item: Item, settings: Settings) -> Figures:
    """One evaluation."""
    batch = item.params.get("batch", 1)
    if "peer" in item.params:
        build = peers.generator_builder(item.params["peer"], tuple(item.params["size"]), settings, batch)
    else:
        build = ours.flow_builder(item.params["config"], settings, batch)
    return measure_subject(build, settings)


SECTION = Section(
    title="One evaluation of the generator",
    about="Batch 1 unless said, without guidance, at the latents of an image of the given size: f4 latents of 3 "
    "channels, f8 of 4, f32 of 32, f64 of 128; ours: the pyramid of the config.",
    columns=COST,
    items=items,
    measure=measure,
    needs_ceiling=True,
)
