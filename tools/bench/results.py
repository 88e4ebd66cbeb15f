"""Measured lines: merging the runs of one line, and the figures that follow from several."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.settings import Item, Settings

Figures = dict[str, Any]
MAXIMA = ("peak_bytes", "rss_bytes")


@dataclass
class Row:
    """A line of a table. `status` is "measured", "computed" (from other lines), "skipped" or "failed"."""

    section: str
    group: str
    name: str
    reference: bool = False
    status: str = "measured"
    notes: list[str] = field(default_factory=list)
    figures: Figures = field(default_factory=dict)

    @classmethod
    def of(cls, item: Item, **changes: Any) -> "Row":
        """The line of an item."""
        return cls(item.section, item.group, item.name, item.reference, **changes)

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it one line."""
        return self.section, self.group, self.name

    def note(self, text: str) -> None:
        """Adds a remark once."""
        if text and text not in self.notes:
            self.notes.append(text)


def merge(rows: list[Row]) -> list[Row]:
    """One row a key: times pooled, peaks the largest, a failure of one run a note."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        known = found.get(row.key)
        if known is None:
            found[row.key] = row
            continue
        good, other = (known, row) if known.status == "measured" else (row, known)
        found[row.key] = good
        for text in other.notes:
            good.note(text)
        if other.status != "measured":
            continue
        good.figures["seconds"] = [*good.figures.get("seconds", []), *other.figures.get("seconds", [])]
        for name in MAXIMA:
            values = [r.figures[name] for r in (good, other) if r.figures.get(name) is not None]
            good.figures[name] = max(values, default=None)
    return list(found.values())


def derive(rows: list[Row], settings: Settings) -> None:
    """Median time, rates and share of the ceiling; in place."""
    for row in rows:
        seconds = row.figures.get("seconds")
        if not seconds:
            continue
        time = row.figures["median_seconds"] = median(seconds)
        row.figures["runs"] = len(seconds)
        if row.status == "measured" and len(seconds) < settings.repeats:
            row.note(f"{len(seconds)} timed run{'s' if len(seconds) > 1 else ''} (budget {settings.budget:g} s)")
        flops = row.figures.get("flops")
        if flops:
            row.figures["flops_per_second"] = flops / time
            row.figures["share"] = flops / time / settings.ceiling if settings.ceiling else None
        for unit in ("images", "pixels", "bytes"):
            if row.figures.get(unit):
                row.figures[f"{unit}_per_second"] = row.figures[unit] / time


def compare(rows: list[Row]) -> None:
    """Each row's time over that of its group's reference; in place."""
    references = {row.key[:2]: row.figures.get("median_seconds") for row in rows if row.reference}
    for row in rows:
        base, time = references.get(row.key[:2]), row.figures.get("median_seconds")
        if base and time:
            row.figures["ratio"] = time / base
