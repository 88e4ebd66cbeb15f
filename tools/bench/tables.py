"""Rows as tables, on a terminal and in Markdown."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.results import Row


@dataclass(frozen=True)
class Column:
    """A figure by key, with its heading and how it is written."""

    key: str
    heading: str
    write: Callable[[Any], str]


def significant(value: float, digits: int = 3) -> str:
    """Three significant digits without an exponent."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def times(factor: float, unit: str = "") -> Callable[[float], str]:
    """A writer of value * factor."""
    return lambda value: significant(value * factor) + unit


def duration(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{significant(seconds)} s" if seconds >= 1 else f"{significant(seconds * 1000)} ms"


def size(count: float) -> str:
    """GiB, or MiB below a tenth of one."""
    return f"{significant(count / 2**30)} GiB" if count >= 2**30 / 10 else f"{significant(count / 2**20)} MiB"


PARAMETERS = Column("parameters", "parameters", times(1e-6, " M"))
FLOPS = Column("flops", "TFLOP", times(1e-12))
TIME = Column("median_seconds", "time", duration)
RATE = Column("flops_per_second", "GFLOP/s", times(1e-9))
SHARE = Column("share", "of best conv.", lambda value: f"{100 * value:.0f}%")
PEAK = Column("peak_bytes", "activations, peak", size)
RSS = Column("rss_bytes", "process, peak", size)
RATIO = Column("ratio", "time / ours", times(1))
IMAGES = Column("images_per_second", "images/s", times(1))
PIXELS = Column("pixels_per_second", "Mpixel/s", times(1e-6))
COST = (PARAMETERS, FLOPS, TIME, RATE, SHARE, PEAK, RSS, RATIO)


def cells(rows: list[Row], columns: tuple[Column, ...]) -> list[list[str]]:
    """Headings, then a line a row. A figure that was not measured is a dash."""
    shown = [c for c in columns if any(row.figures.get(c.key) is not None for row in rows)]
    grouped = any(row.group for row in rows)
    noted = any(row.notes or row.status != "measured" for row in rows)
    table = [[*(["of"] if grouped else []), "what", *(c.heading for c in shown), *(["remarks"] if noted else [])]]
    for row in rows:
        values = [row.figures.get(c.key) for c in shown]
        line = [*([row.group] if grouped else []), row.name]
        line += ["-" if value is None else c.write(value) for c, value in zip(shown, values, strict=True)]
        if noted:
            line.append("; ".join([row.status] * (row.status != "measured") + row.notes))
        table.append(line)
    return table


def terminal(table: list[list[str]]) -> str:
    """Aligned columns."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text.rstrip() for text in lines)


def markdown(table: list[list[str]]) -> str:
    """A table of GitHub's Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in table]
    lines = ["| " + " | ".join(line) + " |" for line in escaped]
    lines.insert(1, "|" + "---|" * len(table[0]))
    return "\n".join(lines)
