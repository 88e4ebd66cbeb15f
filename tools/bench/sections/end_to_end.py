"""Noise to PNG files."""

import tempfile
from pathlib import Path
from statistics import median

import torch

from bench import ours, peers
from bench.measuring import measure, time_runs
from bench.results import Figures, Row
from bench.section import Section
from bench.sections.coding import label
from bench.settings import Item, Settings
from bench.tables import IMAGES, PEAK, RATIO, RSS, TIME
from pyramid_ldm import PyramidPipeline
from pyramid_ldm.data.images import to_pil
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.pyramid import LatentScaling, Pyramid, pyramid_noise

CONFIG, EULER, RK45, DDIM, BATCH = "people2k", 200, 70, 50, 4


def items(settings: Settings) -> list[Item]:
    """Euler measured whole, RK45 from its parts, several images at once."""
    group = label(settings.image_size(ours.SIZES[CONFIG]))
    steps = 4 if settings.quick else EULER
    return [
        Item("end_to_end", group, f"ours: Euler {steps}", {"steps": steps, "images": 1}, reference=True),
        Item("end_to_end", group, f"ours: RK45, {RK45} evaluations", {"images": 1}),
        Item("end_to_end", f"{group}, {BATCH} images", f"ours: Euler {steps}", {"steps": steps, "images": BATCH}),
    ]


def pipeline(settings: Settings) -> PyramidPipeline:
    """Random weights; velocities are zero, as an untrained network's are."""
    device = torch.device(settings.device)
    autoencoder, flow = ours.autoencoder(CONFIG, settings, device), ours.flow(CONFIG, settings, device)
    zeros, ones = (tuple((value,) * level.channels for level in flow.levels) for value in (0.0, 1.0))
    for network in (autoencoder, flow):
        network.requires_grad_(False)
    return PyramidPipeline(flow, autoencoder, LatentScaling(zeros, ones)).to(device)


def measure_item(item: Item, settings: Settings) -> Figures:
    """Euler as a user calls it; RK45's parts, since its steps on random weights say nothing."""
    pipe, images = pipeline(settings), item.params["images"]
    existing = [*pipe.network.parameters(), *pipe.autoencoder.parameters()]
    bf16 = settings.precision == "bf16"
    with tempfile.TemporaryDirectory(prefix="pyramid-bench-") as folder:

        def draw(steps: int) -> None:
            out = pipe(num_images=images, batch_size=images, solver="euler", steps=steps, bf16=bf16)
            for i, image in enumerate(out.images):
                image.save(Path(folder) / f"{i}.png")

        if "steps" in item.params:
            steps = item.params["steps"]
            figures = measure(lambda: draw(steps), settings, existing, first=lambda: draw(2))
            return figures | {"images": images}
        return rk45_parts(pipe, Path(folder), settings) | {"images": images}


def rk45_parts(pipe: PyramidPipeline, folder: Path, settings: Settings) -> Figures:
    """An evaluation inside RK45, decoding and writing, each measured; their sum computed."""
    bf16 = settings.precision == "bf16"
    noise = pyramid_noise(pipe.network.shapes, 0, "sample", [0])
    evaluations: list[int] = []

    def solve() -> Pyramid:
        solution = pipe.solve(noise, SolverOptions("rk45"), bf16=bf16)
        evaluations.append(solution.nfe)
        return solution.latents

    latents = solve()
    image = next(iter(pipe.decode(latents, bf16=bf16)))
    evaluation = median(time_runs(solve, settings)) / evaluations[0]
    decode = median(time_runs(lambda: list(pipe.decode(latents, bf16=bf16)), settings))
    write = median(time_runs(lambda: to_pil(image).save(folder / "0.png"), settings))
    return {
        "status": "computed",
        "seconds": [RK45 * evaluation + decode + write],
        "parts": {"evaluation": evaluation, "decode": decode, "png": write},
        "note": f"{RK45} x {evaluation:.4g} s (measured inside RK45, over {evaluations[0]}) + decoding {decode:.3g} s "
        f"+ PNG {write:.3g} s",
    }


def computed(rows: dict[str, list[Row]], settings: Settings) -> list[Row]:
    """The peers: 50 DDIM steps of a measured evaluation, and a measured decode."""
    group = label(settings.image_size(ours.SIZES[CONFIG]))
    found = []
    for name in peers.GENERATORS:
        row = Row("end_to_end", group, f"{name}: {DDIM} steps of DDIM", status="computed")
        decoder = peers.DECODER_OF.get(name)
        evaluation = seconds_of(rows, "flow", group, name)
        decode = seconds_of(rows, "decode", group, decoder) if decoder else 0.0
        if evaluation is None or decode is None:
            row.status = "skipped"
            row.note("its evaluation or its decoder was not measured in this run")
        else:
            row.figures |= {"seconds": [DDIM * evaluation + decode], "median_seconds": DDIM * evaluation + decode}
            row.figures["images_per_second"] = 1 / row.figures["median_seconds"]
            row.note(f"{DDIM} x {evaluation:.4g} s + " + (f"decoding {decode:.3g} s" if decoder else "no decoder"))
            row.note("from two measured parts, without guidance" if decoder else "its f4 decoder is not measured")
        found.append(row)
    return found


def seconds_of(rows: dict[str, list[Row]], section: str, group: str, name: str) -> float | None:
    """Median time of a measured row."""
    for row in rows.get(section, []):
        if (row.group, row.name) == (group, name):
            return row.figures.get("median_seconds")
    return None


SECTION = Section(
    title="Noise to PNG",
    about=f"`people2k`, random weights. How many evaluations RK45 takes on them says little: {RK45} are assumed. "
    "Peers: computed from the evaluation and the decode measured above, without writing a file.",
    columns=(TIME, IMAGES, PEAK, RSS, RATIO),
    items=items,
    measure=measure_item,
    computed=computed,
)
