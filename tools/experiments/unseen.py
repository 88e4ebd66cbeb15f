"""What reconstructions are held against: photographs that no model was trained on, and a bicubic thumbnail."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.latents import crops
from experiments.rows import FIGURES, Task
from experiments.tables import spread
from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.config import AutoencoderConfig, AutoencoderTraining
from pyramid_ldm.data.folder import find_images, fingerprint, split_held_out
from pyramid_ldm.data.photographs import Preprocessing, crops_to_examine
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.evaluate import Figures, reconstruction_figures
from pyramid_ldm.evaluation.frechet import Inception
from pyramid_ldm.evaluation.metrics import bicubic
from pyramid_ldm.files import write_text
from pyramid_ldm.serialization import load_model
from pyramid_ldm.training.runtime import Runtime, start

CROPS = 4  # of each photograph
# Key, title, digits, factor.
COLUMNS = (("psnr", "PSNR, dB", 2, 1), ("ssim", "SSIM", 3, 1), ("lpips", "LPIPS", 3, 1),
           ("rfid", "rFID", 1, 1), ("rkid", "rKID x 1000", 1, 1000))  # fmt: skip


@dataclass(frozen=True)
class Unseen:
    """Random crops of a folder's photographs, the same for every model."""

    about: str
    key: dict[str, Any]  # what figures depend on beside the model
    images: Tensor  # (N, 3, H, W) in [-1, 1]
    perceptual: PerceptualLoss
    inception: Inception | None
    real: Tensor | None  # (N, 2048), the images' own features
    runtime: Runtime

    @classmethod
    def of_folder(
        cls, folder: Path, data: Path, size: Sequence[int], zoom: float, vgg: str, inception: Path | None
    ) -> "Unseen":
        """A few crops of every photograph. UserError where a file is missing, or `data`, which models are trained on,
        holds one of the photographs."""
        runtime = start("auto", "auto")
        files, known = find_images(folder), {file.digest for file in find_images(data)}
        twice = [file.path for file in files if file.digest in known]
        if twice:
            raise UserError(f"{folder}: {len(twice)} of its photographs are in {data}, too, {twice[0]} first")
        images = crops(str(folder), size, CROPS * len(files), zoom)
        network = None if inception is None else Inception(inception, runtime.device)
        real = None if network is None else torch.cat([network(batch) for batch in images.split(8)])
        about = f"{len(images)} crops of {len(files)} photographs"
        key = {"photographs": fingerprint(files), "crops": len(images), "inception": inception is not None}
        return cls(about, key, images, PerceptualLoss(vgg, runtime.device), network, real, runtime)

    def judge(self, task: Task) -> Figures:
        """A trained row's figures; kept beside its model, so that they are computed once."""
        kept = task.run / "unseen.json"
        found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
        if found.get("asked") != self.key:
            model = load_model(task.run / "model", task.row.build(), AutoencoderConfig).to(self.runtime.device)
            found = {
                "asked": self.key,
                "figures": self.figures(lambda images: model.decode(model.encode(images).mode())),
            }
            write_text(kept, json.dumps(found, indent=1) + "\n")
        return found["figures"]

    def figures(self, reconstruct: Callable[[Tensor], Tensor]) -> Figures:
        """Means over the crops; with the Inception network also the distances of all reconstructions from all
        originals."""

        def autocast(images: Tensor) -> Tensor:
            with self.runtime.autocast():
                return reconstruct(images)

        batches = (batch.to(self.runtime.device) for batch in self.images.split(8))
        return reconstruction_figures({"": autocast}, batches, self.perceptual, self.inception, self.real)[1][""]

    def thumbnails(self, values: int) -> Figures:
        """Bicubic ones of as many values."""
        return self.figures(lambda images: bicubic(images.cpu(), values).to(images.device))

    def markdown(self, groups: dict[str, list[Figures]]) -> str:
        """A line a group of seeds."""
        columns = [column for column in COLUMNS if column[0] in next(iter(groups.values()))[0]]
        lines = [
            "| | " + " | ".join(title for _, title, _, _ in columns) + " | seeds |",
            "|" + "---|" * (len(columns) + 2),
        ]
        for name, results in groups.items():
            cells = [spread([factor * r[key] for r in results], digits) for key, _, digits, factor in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(results)} |")
        return "\n".join(lines) + f"\n\n{self.about}.\n"


def bicubic_figures(config: AutoencoderTraining, values: int, perceptual: PerceptualLoss) -> Figures:
    """What a thumbnail of as many values does on the images that training measures itself by."""
    files = split_held_out(find_images(Path(config.data.root)), config.data.validation)[1]
    height, width = config.image_size
    data = config.data
    look = Preprocessing((height, width), data.crop, data.zoom, data.flip, data.upscale)
    crops = crops_to_examine(files[: config.log.examined], look, config.seed, [])
    images = torch.stack([crop for _, crop in crops])
    _, found = reconstruction_figures({"": lambda x: bicubic(x, values)}, [images], perceptual, None)
    return {key: found[""][key.removeprefix("held_out_")] for key in FIGURES}
