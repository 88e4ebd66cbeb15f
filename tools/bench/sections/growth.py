"""Cost as a function of size, batch and threads."""

import os
from dataclasses import replace
from typing import Any

import torch

from bench import ours
from bench.measuring import Subject, measure_subject
from bench.results import Figures
from bench.section import Section
from bench.sections.train import measure_step
from bench.settings import Item, Settings
from bench.tables import FLOPS, IMAGES, PEAK, PIXELS, RSS, SHARE, TIME, Column, times
from bench.training import StageOne, stage_one_config

SIDES, TILED, BATCHES = (512, 1024, 2048, 4096), (2048, 4096, 8192), (1, 2, 4)
BASE, TRAIN, TRAIN_CONFIG = 1024, 512, "celebahq_1024"


def items(settings: Settings) -> list[Item]:
    """One quantity changes in each group; the group's first line is its reference."""
    found = group("decode", "side", [{"kind": "decode", "side": side} for side in SIDES], settings)
    found += group("decode_tiled", "side", [{"kind": "tiled", "side": side} for side in TILED], settings)
    found += group("encode", "side", [{"kind": "encode", "side": side} for side in (*SIDES, 8192)], settings)
    found += group("decode", "batch", [{"kind": "decode", "side": BASE, "batch": n} for n in BATCHES], settings)
    found += group("train", "batch", [{"kind": "train", "side": TRAIN, "batch": n} for n in BATCHES], settings)
    for kind in ("decode", "encode"):
        counts = [n for n in (1, 2, 4, 8, 16) if n <= len(os.sched_getaffinity(0))]
        found += group(kind, "threads", [{"kind": kind, "side": BASE, "threads": n} for n in counts], settings)
    return found


def group(kind: str, what: str, params: list[dict[str, Any]], settings: Settings) -> list[Item]:
    """Items that differ in `what`."""
    found = []
    for i, values in enumerate(params):
        side = settings.side(values["side"])
        about = {"side": "by size", "batch": f"{side}x{side} by batch", "threads": f"{side}x{side} by threads"}[what]
        name = f"{side}x{side}" if what == "side" else f"{what} {values[what]}"
        item = Item("growth", f"{kind}, {about}", name, values | {"side": side}, reference=i == 0)
        found.append(replace(item, threads=values.get("threads")))
    return found


def measure(item: Item, settings: Settings) -> Figures:
    """One point."""
    kind, side, batch = item.params["kind"], item.params["side"], item.params.get("batch", 1)
    pixels = {"pixels": batch * side * side}
    if kind == "train":
        config = stage_one_config(TRAIN_CONFIG, settings, batch, 0, f"image_size=[{side},{side}]")
        return measure_step(StageOne(config, settings), settings, batch) | pixels

    def build(device: torch.device) -> Subject:
        model = ours.any_size_autoencoder(settings, device)
        if kind == "encode":
            return ours.encode_subject(model, (side, side), device, batch=batch)
        return ours.decode_subject(model, (side, side), device, batch=batch, tiled=kind == "tiled")

    return measure_subject(build, settings) | pixels


SECTION = Section(
    title="Growth",
    about="`people2k` without its 1x1 level, at any size; attention stands where it stands at 2048x2048, so that above "
    "4096 positions its spatial half is linear. Training: `celebahq_1024` at a small size, L1, LPIPS and GAN. "
    "Linear growth is a constant rate of pixels.",
    columns=(FLOPS, TIME, PIXELS, IMAGES, SHARE, PEAK, RSS, Column("ratio", "time / first line", times(1))),
    items=items,
    measure=measure,
    needs_ceiling=True,
)
