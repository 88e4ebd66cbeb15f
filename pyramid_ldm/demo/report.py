"""A report as one HTML file: pictures and curves inside it, no scripts, and nothing that is fetched."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from pyramid_ldm.files import write_text

WIDTH, HEIGHT = 480, 270  # of a chart, in its own units; about a pixel each on a desktop
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 58, 458, 10, 222
COLOURS = 6  # c0 to c5 in STYLE; later curves repeat them dashed
LARGEST = 1e100  # larger values are left out like non-finite ones: they would only flatten the rest

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d1f22; --quiet: #5f656d; --line: #e2e4e8; --well: #f5f6f8;
  --c0: #0066b3; --c1: #c8500a; --c2: #00805f; --c3: #a8387f; --c4: #8a6a00; --c5: #5a4fcf; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e4e6e9; --quiet: #9aa1aa; --line: #30343a;
  --well: #1e2126; --c0: #5cb3f5; --c1: #f59052; --c2: #3ecba5; --c3: #ec8cc8; --c4: #e0c04a; --c5: #a79ffa; } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 0.75rem; } h2 { font-size: 1.2rem; margin: 0 0 0.5rem; }
p { margin: 0 0 0.75rem; max-width: 42rem; } .lead { font-size: 1.1rem; } figcaption { font-weight: 600; }
section { margin-top: 2.25rem; padding-top: 1.75rem; border-top: 1px solid var(--line); }
img { display: block; max-width: 100%; height: auto; margin-top: 1rem; image-rendering: auto; border-radius: 3px; }
table { border-collapse: collapse; margin-top: 1rem; font-size: 0.9rem; } i.dashed { border-top-style: dashed; }
th, td { padding: 0.3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: baseline; }
th { padding-right: 2rem; font-weight: 400; } td { text-align: right; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 2rem 1.5rem; }
figure { margin: 0.5rem 0 0; max-width: 34rem; display: flex; flex-direction: column; }
ul { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: 0 0 0.5rem; padding: 0; list-style: none; }
i { display: inline-block; width: 1.2rem; margin-right: 0.4rem; border-top: 3px solid; vertical-align: 0.25em; }
.lead, th, li, span { color: var(--quiet); font-weight: 400; } li { font-size: 0.85rem; }
svg { width: 100%; height: auto; margin-top: auto; overflow: visible; } text { font-size: 12px; fill: var(--quiet); }
polyline { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
path { fill: none; stroke: var(--line); } path.axes { stroke: var(--quiet); } circle { fill: currentColor; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
pre { margin: 0 0 1.25rem; padding: 0.75rem 1rem; overflow-x: auto; background: var(--well); border-radius: 6px; }
code { font: 0.875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; user-select: all; }
polyline.dashed { stroke-dasharray: 6 5; } @media (max-width: 32rem) { text { font-size: 15px; } }
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body><h1>{title}</h1><p class="lead">{lead}</p>
{body}</body></html>
"""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (split at blank lines), a PNG, and a small table of label -> formatted value."""

    title: str
    text: str
    picture: Path | None = None
    figures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """Points are (images seen, value)."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Curves over images seen that share both axes; a logarithmic y axis leaves out values that are not positive."""

    title: str
    curves: Sequence[Curve]
    log_scale: bool = False


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` and where its grid lines are, in the values' unit."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def fraction(self, value: float) -> float:
        """0 at `low`, 1 at `high`; one half everywhere when they are the same."""
        if self.low == self.high:
            return 0.5
        scale = math.log if self.log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))


def read_curve(metrics_file: Path, key: str) -> list[tuple[float, float]]:
    """(images seen, value) of `key` from metrics.jsonl; skips lines without it, with null, or cut off."""
    lines = metrics_file.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [(float(r["images_seen"]), float(r[key])) for r in records if r.get(key) is not None]


def nice_ticks(low: float, high: float) -> list[float]:
    """A few multiples of 1, 2 or 5 times a power of ten, from at most `low` to at least `high`."""
    rough = max((high - low) / 6, 1 / LARGEST)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10, 20) if factor * magnitude >= rough)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def value_axis(values: Sequence[float], log: bool) -> Axis:
    """The values with a little room, never empty; linear axes end at ticks."""
    low, high = min(values), max(values)
    if high - low <= max(1e-3 * max(abs(low), abs(high)), 1 / LARGEST):  # constant, or too close for labels
        room = 0.5 * abs(high) or 1.0
        low, high = low - room, high + room
    if not log:
        ticks = nice_ticks(low, high)
        return Axis(ticks[0], ticks[-1], ticks)
    low, high = low * (low / high) ** 0.05, high * (high / low) ** 0.05
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors, stride = ((1, 2, 5), 1) if high < 500 * low else ((1,), math.ceil((last - first) / 6))
    decades = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    ticks = nice_ticks(low, high) if high < 5 * low else decades
    return Axis(low, high, [tick for tick in ticks if low <= tick <= high], log=True)


def images_label(images: float) -> str:
    """2500 -> 2.5k, 3000000 -> 3M."""
    unit, suffix = (1e6, "M") if abs(images) >= 1e6 else (1e3, "k") if abs(images) >= 1e3 else (1, "")
    return f"{images / unit:.8g}{suffix}"


def value_label(value: float) -> str:
    """0.05 -> 0.05, 0.00005 -> 5e-5."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:g}"
    mantissa, exponent = f"{value:.4e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def plot_svg(curves: Mapping[str, Sequence[tuple[float, float]]], log: bool) -> str:
    """Grid, axes and curves; each of `curves` is CSS classes -> (images seen, value), at least one point."""
    images = [x for points in curves.values() for x, _ in points]
    first, last = min(images), max(images)
    x_axis = Axis(first, last, [tick for tick in nice_ticks(first, last) if first <= tick <= last] or [first])
    y_axis = value_axis([y for points in curves.values() for _, y in points], log)

    def place(x: float, y: float) -> tuple[str, str]:
        across = PLOT_LEFT + x_axis.fraction(x) * (PLOT_RIGHT - PLOT_LEFT)
        down = PLOT_BOTTOM - y_axis.fraction(y) * (PLOT_BOTTOM - PLOT_TOP)
        return f"{across:.2f}", f"{down:.2f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Curves over images seen">']
    for tick in y_axis.ticks:
        _, y = place(x_axis.low, tick)
        parts.append(f'<path d="M{PLOT_LEFT} {y}H{PLOT_RIGHT}"/>')
        parts.append(f'<text x="{PLOT_LEFT - 8}" y="{y}" dy="0.35em" text-anchor="end">{value_label(tick)}</text>')
    for tick in x_axis.ticks:
        x, _ = place(tick, y_axis.low)
        parts.append(f'<path d="M{x} {PLOT_TOP}V{PLOT_BOTTOM}"/>')
        parts.append(f'<text x="{x}" y="{PLOT_BOTTOM + 18}" text-anchor="middle">{images_label(tick)}</text>')
    parts.append(f'<path class="axes" d="M{PLOT_LEFT} {PLOT_TOP}V{PLOT_BOTTOM}H{PLOT_RIGHT}"/>')
    parts.append(f'<text x="{(PLOT_LEFT + PLOT_RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">images seen</text>')
    for classes, points in curves.items():
        line = " ".join(",".join(place(x, y)) for x, y in points)
        x, y = place(*points[-1])
        dot = f'<circle class="{classes}" cx="{x}" cy="{y}" r="4"/>'
        parts.append(dot if len(points) == 1 else f'<polyline class="{classes}" points="{line}"/>')
    return "\n".join([*parts, "</svg>"])


def chart_html(chart: Chart) -> str:
    """Caption, legend and plot; empty when there is no point to draw."""
    legend, curves = "", {}
    smallest = 1 / LARGEST if chart.log_scale else -LARGEST
    for i, curve in enumerate(chart.curves):
        if points := sorted((x, y) for x, y in curve.points if abs(x) < LARGEST and smallest < y < LARGEST):
            classes = f"c{i % COLOURS}" + " dashed" * (i // COLOURS)
            curves[classes] = points
            legend += f'<li><i class="{classes}"></i>{escape(curve.label)}</li>'
    if not curves:
        return ""
    caption = escape(chart.title) + " <span>(log scale)</span>" * chart.log_scale
    plot = plot_svg(curves, chart.log_scale)
    return f"<figure>\n<figcaption>{caption}</figcaption>\n<ul>{legend}</ul>\n{plot}\n</figure>\n"


def section_html(section: Section) -> str:
    """Heading, text, picture, table."""
    html = "".join(f"<p>{escape(part.strip())}</p>\n" for part in section.text.split("\n\n") if part.strip())
    if section.picture is not None:
        data = base64.b64encode(section.picture.read_bytes()).decode()
        html += f'<img src="data:image/png;base64,{data}" alt="{escape(section.title)}">\n'
    if section.figures:
        rows = (f"<tr><th>{escape(label)}</th><td>{escape(v)}</td></tr>\n" for label, v in section.figures.items())
        html += "<table>\n" + "".join(rows) + "</table>\n"
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{html}</section>\n"


def write_report(
    path: Path,
    *,
    title: str,
    lead: str,
    sections: Sequence[Section],
    charts: Sequence[Chart],
    next_steps: Sequence[tuple[str, str]],
) -> None:
    """Title and lead, sections, charts, then the next steps, each (what it does, command), as one file at `path`."""
    body = "".join(section_html(section) for section in sections)
    if drawn := "".join(chart_html(chart) for chart in charts):
        body += f'<section>\n<h2>Training curves</h2>\n<div class="charts">\n{drawn}</div>\n</section>\n'
    if next_steps:
        steps = "".join(f"<p>{escape(does)}</p>\n<pre><code>{escape(run)}</code></pre>\n" for does, run in next_steps)
        body += f"<section>\n<h2>What to do next</h2>\n{steps}</section>\n"
    write_text(path, PAGE.format(title=escape(title), lead=escape(lead), style=STYLE, body=body))
