"""Autoencoders on photographs that nothing was trained on, and no default chosen by."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from experiments.latents import crops
from experiments.rows import Task
from experiments.tables import spread
from pyramid_ldm.autoencoder.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoder.perceptual import PerceptualLoss
from pyramid_ldm.config import AutoencoderConfig
from pyramid_ldm.data.images import find_images
from pyramid_ldm.evaluation.frechet import Inception, Moments, frechet_distance, kernel_distance
from pyramid_ldm.evaluation.metrics import psnr, ssim
from pyramid_ldm.files import write_text
from pyramid_ldm.serialization import load_model
from pyramid_ldm.training.runtime import start

CROPS = 8  # of each photograph
Figures = dict[str, float]
# Key, title, digits, factor.
COLUMNS = (("psnr", "PSNR, dB", 2, 1), ("ssim", "SSIM", 3, 1), ("lpips", "LPIPS", 3, 1),
           ("rfid", "rFID", 1, 1), ("rkid", "rKID x 1000", 1, 1000))  # fmt: skip


@dataclass(frozen=True)
class Unseen:
    """Random crops of a folder's photographs, the same for every model."""

    folder: Path
    images: Tensor  # (N, 3, H, W) in [-1, 1]
    perceptual: PerceptualLoss
    inception: Inception | None
    device: torch.device

    @classmethod
    def of_folder(cls, folder: Path, size: Sequence[int], zoom: float, vgg: str, inception: Path | None) -> "Unseen":
        """A few crops of every photograph. UserError where a file is missing."""
        device = start("auto", "auto").device
        images = crops(str(folder), size, CROPS * len(find_images(folder)), zoom)
        network = None if inception is None else Inception(inception, device)
        return cls(folder, images, PerceptualLoss(vgg, device), network, device)

    def judge(self, task: Task) -> Figures:
        """A trained row's figures; kept beside its model, so that they are computed once."""
        kept = task.run / "unseen.json"
        asked = {"folder": str(self.folder), "crops": len(self.images), "inception": self.inception is not None}
        found: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
        if found.get("asked") != asked:
            model = load_model(task.run / "model", task.row.build(), AutoencoderConfig).to(self.device)
            found = {"asked": asked, "figures": self.figures(model)}
            write_text(kept, json.dumps(found, indent=1) + "\n")
        return found["figures"]

    @torch.inference_mode()
    def figures(self, model: PyramidAutoencoder) -> Figures:
        """Means over the crops, in float32; with the Inception network also the distances of all reconstructions from
        all originals."""
        rows, features = [], []
        for batch in self.images.split(8):
            original = batch.to(self.device)
            decoded = model.decode(model.encode(original).mode()).clamp(-1, 1)
            for image, target in zip(decoded.split(1), original.split(1), strict=True):
                near = (float(psnr(image, target)), float(ssim(image, target)), float(self.perceptual(image, target)))
                rows.append(near)
            if self.inception is not None:
                features.append(torch.stack([self.inception(decoded), self.inception(original)]))
        found = dict(zip(("psnr", "ssim", "lpips"), map(mean, zip(*rows, strict=True)), strict=True))
        if features:
            ours, real = torch.cat(features, dim=1)
            found |= {
                "rfid": frechet_distance(Moments.of([ours]), Moments.of([real])),
                "rkid": kernel_distance(ours, real),
            }
        return found

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
        return "\n".join(lines) + f"\n\n{len(self.images)} crops of {len(find_images(self.folder))} photographs.\n"
