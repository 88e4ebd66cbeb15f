"""What a run tells: a progress bar, metrics.jsonl, TensorBoard, pictures."""

import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pyramid_ldm.files import append_line, read_lines, write_atomic, write_text
from pyramid_ldm.training.schedule import due


class Metrics:
    """Sums of scalars between two log lines; their means are what is logged."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Detached scalars; nothing is copied to the host."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def add_all(self, values: Iterable[dict[str, Tensor]]) -> None:
        """`add` for each."""
        for part in values:
            self.add(part)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, which need not fall on a log line."""
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """The inverse."""
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])

    def take(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


class RunLog:
    """Files and the progress bar of a run; every method does nothing on other ranks than the first."""

    def __init__(self, run: Path, *, main: bool, start: int, total: int, name: str) -> None:
        self.run, self.main, self.total = run, main, total
        self.metrics_file = run / "metrics.jsonl"
        self.began, self.began_at = time.monotonic(), start
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._truncate(start)
        self.tensorboard = SummaryWriter(str(run), purge_step=start + 1 if start else None)
        self.live = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="img", desc=name, disable=not self.live, dynamic_ncols=True)
        self.name = name

    def _truncate(self, images_seen: int) -> None:
        """Drops lines after the checkpoint that is resumed, which are about to be written again."""
        records = read_lines(self.metrics_file)
        if records:
            kept = [record for record in records if record.get("images_seen", 0) <= images_seen]
            write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def advance(self, images_seen: int) -> None:
        """Moves the bar."""
        if self.main:
            self.bar.update(images_seen - self.bar.n)

    def metrics(self, images_seen: int, values: dict[str, float]) -> None:
        """One line in metrics.jsonl and a point in every TensorBoard curve; a plain line without a terminal."""
        if not self.main:
            return
        elapsed = time.monotonic() - self.began
        rate = (images_seen - self.began_at) / max(elapsed, 1e-9)
        record: dict[str, Any] = {"images_seen": images_seen, "images_per_second": rate, **values}
        clean = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in record.items()}
        append_line(self.metrics_file, clean)
        for key, value in values.items():
            self.tensorboard.add_scalar(key, value, images_seen)
        shown = {k: f"{v:.4g}" for k, v in values.items() if k in ("loss", "l1", "psnr", "lpips")}
        self.bar.set_postfix(shown)
        if shown and not self.live:
            left = (self.total - images_seen) / max(rate, 1e-9)
            text = " ".join(f"{k}={v}" for k, v in shown.items())
            self.say(f"{self.name}: {images_seen}/{self.total} images, {rate:.1f} images/s, {left:.0f} s left, {text}")

    def picture(self, name: str, images_seen: int, image: Image.Image) -> None:
        """images/NAME-IMAGES.png, and the same in TensorBoard."""
        if not self.main:
            return
        import numpy as np

        write_atomic(self.picture_path(name, images_seen), lambda temporary: image.save(temporary, format="PNG"))
        self.tensorboard.add_image(name, torch.from_numpy(np.array(image)), images_seen, dataformats="HWC")

    def picture_path(self, name: str, images_seen: int) -> Path:
        """Where `picture` puts it."""
        return self.run / "images" / f"{name}-{images_seen:08d}.png"

    def picture_missing(self, name: str, interval: int, step: int, *, last: bool) -> bool:
        """Whether the images seen at the start called for a picture (every `interval`, or as the `last`), and it is not
        there."""
        seen = self.began_at
        wanted = seen > 0 and (last or due(interval, seen - step, seen))
        return wanted and self.main and not self.picture_path(name, seen).exists()

    def say(self, text: str) -> None:
        """A line on stderr that does not tear the bar."""
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """A line on stderr from any process."""
        tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.main:
            self.bar.close()
            self.tensorboard.close()
