"""Rows that are done, as Markdown and as a picture of their curves."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.rows import FIGURES

Result = dict[str, Any]
TITLES = {"held_out_psnr": "PSNR, dB", "held_out_ssim": "SSIM", "held_out_lpips": "LPIPS"}
DIGITS = {"held_out_psnr": 2, "held_out_ssim": 3, "held_out_lpips": 3}


def markdown(groups: dict[str, list[Result]], thumbnails: dict[int, Result] | None = None) -> str:
    """A table with a line a group of seeds: mean, and from two seeds on the standard deviation. Costs and latents
    (coarse to fine) are the first seed's; noise is the posterior's own standard deviation; predictable is the share of
    variance that a linear regression explains from coarser levels and from the left and upper neighbours. Below, for
    each number of values, a bicubic thumbnail's figures."""
    costs = ["encoder", "decoder", "encode", "its peak", "decode", "its peak"]
    head = ["", "1:", "values", *costs, *TITLES.values(), "latent std", "noise", "predictable", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, results in groups.items():
        first = results[0]
        cells = [
            name,
            f"{first['ratio']:.0f}",
            str(first["latent_values"]),
            *(f"{first[f'{part}_parameters'] / 1e6:.1f} M" for part in ("encode", "decode")),
            *(
                cell
                for part in ("encode", "decode")
                for cell in (f"{first[f'{part}_flops'] / 1e9:.1f} GFLOP", f"{first[f'{part}_bytes'] / 2**20:.0f} MiB")
            ),
            *(spread([result["curve"][-1][key] for result in results], DIGITS[key]) for key in FIGURES),
            ", ".join(f"{value:.2f}" for value in first["latent_std"]),
            ", ".join(f"{value:.2f}" for value in first["posterior_std"]),
            ", ".join("-" if value is None else f"{value:.2f}" for value in first["predictable"]),
            str(len(results)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for values, figures in (thumbnails or {}).items():
        cells = ["bicubic", "", f"at most {values}", *([""] * len(costs))]
        cells += [f"{figures[key]:.{DIGITS[key]}f}" for key in FIGURES]
        lines.append("| " + " | ".join([*cells, "", "", "", ""]) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; the value alone of one seed."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):.{digits}f}"


def draw_curves(groups: dict[str, list[Result]], path: Path) -> None:
    """Held-out figures over images seen and, where steps were timed, over seconds: one line a run."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    timed = all("seconds_per_image" in result for results in groups.values() for result in results)
    figure, axes = plt.subplots(1 + timed, len(FIGURES), figsize=(4 * len(FIGURES), 3.2 * (1 + timed)), squeeze=False)
    for number, (name, results) in enumerate(groups.items()):
        for result in results:
            for row in range(1 + timed):
                scale = result["seconds_per_image"] if row else 1.0
                seen = [point["images_seen"] * scale for point in result["curve"]]
                for column, key in enumerate(FIGURES):
                    values = [point[key] for point in result["curve"]]
                    label = name if result is results[0] else None
                    axes[row][column].plot(seen, values, color=f"C{number % 10}", label=label)
                    axes[row][column].set_title(f"{TITLES[key]}, held out")
                    axes[row][column].set_xlabel("seconds of training" if row else "images seen")
    axes[0][0].legend(fontsize=7)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
