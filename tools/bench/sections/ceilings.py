"""The machine's own ceilings."""

from typing import Any

import torch
import torch.nn.functional as F

from bench.measuring import measure
from bench.results import Figures, Row
from bench.section import Section
from bench.settings import Item, Settings
from bench.tables import RSS, TIME, Column, significant

CONVOLUTIONS = (  # batch, channels in and out, side
    (1, 64, 512),
    (1, 128, 256),
    (1, 256, 128),
    (1, 512, 64),
    (4, 512, 64),
)
MATRIX, TENSOR = 4096, 2**28  # side; bytes
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def items(settings: Settings) -> list[Item]:
    """Convolutions, matrix product, copy and SiLU, in both precisions."""
    found: list[tuple[str, str, str, dict[str, Any]]] = []
    for precision in DTYPES:
        shapes = CONVOLUTIONS[:2] if settings.quick else CONVOLUTIONS
        for batch, channels, side in shapes:
            side = settings.side(side)
            name = f"3x3 convolution {batch}x{channels}x{side}x{side}"
            found.append(("convolution", precision, name, {"shape": [batch, channels, side, side]}))
        side, size = settings.side(MATRIX), TENSOR // (256 if settings.quick else 1)
        found.append(("matrix", precision, f"matrix product {side}x{side}x{side}", {"side": side}))
        for kind, name in (("copy", "copy"), ("silu", "SiLU")):
            found.append((kind, precision, f"{name} of {significant(size / 2**20)} MiB", {"bytes": size}))
    return [Item("ceilings", p, name, {"kind": kind} | rest, alone=False) for kind, p, name, rest in found]


def measure_item(item: Item, settings: Settings) -> Figures:
    """A rate in FLOP/s, or in bytes read and written a second."""
    dtype, device, kind = DTYPES[item.group], settings.device, item.params["kind"]
    with torch.inference_mode():
        if kind == "convolution":
            _, channels, height, width = shape = item.params["shape"]
            x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
            weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
            weight = weight.contiguous(memory_format=torch.channels_last)
            figures = measure(lambda: F.conv2d(x, weight, padding=1), settings)
            work = 2 * 9 * shape[0] * channels**2 * height * width
        elif kind == "matrix":
            a, b = (torch.randn(item.params["side"], item.params["side"], device=device, dtype=dtype) for _ in "ab")
            figures, work = measure(lambda: a @ b, settings), 2 * item.params["side"] ** 3
        else:
            source = torch.randn(item.params["bytes"] // dtype.itemsize, device=device, dtype=dtype)
            target = torch.empty_like(source)
            calls = {"copy": lambda: target.copy_(source), "silu": lambda: F.silu(source)}
            figures, work = measure(calls[kind], settings), 2 * item.params["bytes"]
    best = min(figures["seconds"])
    return figures | {"best_bytes_per_second" if kind in ("copy", "silu") else "best_flops_per_second": work / best}


def best_convolution(rows: list[Row], precision: str) -> float | None:
    """FLOP/s of the fastest convolution."""
    rates = [
        row.figures["best_flops_per_second"]
        for row in rows
        if row.group == precision and "convolution" in row.name and row.status == "measured"
    ]
    return max(rates, default=None)


SECTION = Section(
    title="The machine's ceilings",
    about="The fastest of all runs. Bytes are counted read and written; SiLU allocates its result.",
    columns=(
        TIME,
        Column("best_flops_per_second", "GFLOP/s", lambda v: significant(v * 1e-9)),
        Column("best_bytes_per_second", "GB/s", lambda v: significant(v * 1e-9)),
        RSS,
    ),
    items=items,
    measure=measure_item,
)
