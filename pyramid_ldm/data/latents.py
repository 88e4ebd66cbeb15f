"""The data set of stage two: cached latents by position, with the noise and the time of each."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyramid_ldm.data.loading import Travelling
from pyramid_ldm.data.order import item_at
from pyramid_ldm.data.shards import LatentCache
from pyramid_ldm.errors import UserError
from pyramid_ldm.pyramid import Pyramid, flatten
from pyramid_ldm.randomness import generator, uniform


@dataclass
class LatentBatch(Travelling):
    """Records of consecutive positions, with what training draws for them."""

    latents: Tensor  # (B, D), raw
    noise: Tensor  # (B, D)
    uniform: Tensor  # (B,), for the time
    positions: list[int]


class LatentRecords(Dataset[tuple[Tensor, Tensor, Tensor, int]]):
    """Stage two's data by position of the run: item p is (raw latents (D/2,), noise (D/2,), uniform for t, p).

    Everything random at p is a function of (seed, p): the row, the posterior sample, the noise and the time.
    """

    def __init__(self, cache: LatentCache, rows: list[int], seed: int, posterior: str, shuffle: bool = True) -> None:
        if not rows:
            raise UserError(f"{cache.directory}: holds no record to train on; encode more photographs")
        self.cache, self.rows, self.seed, self.posterior, self.shuffle = cache, rows, seed, posterior, shuffle

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor, int]:
        place = item_at(position, len(self.rows), self.seed) if self.shuffle else position % len(self.rows)
        record = self.cache.read(self.rows[place])
        if self.cache.plan.has_variance:
            mean, log_variance = record.chunk(2)
            if self.posterior == "sample":
                noise = torch.randn(mean.shape, generator=generator(self.seed, "posterior", position))
                mean = mean + (0.5 * log_variance).exp() * noise
        else:
            mean = record
        noise = torch.randn(mean.shape, generator=generator(self.seed, "noise", position))
        return mean, noise, torch.tensor(uniform(self.seed, "time", position)), position


def collate_latents(items: list[tuple[Tensor, Tensor, Tensor, int]]) -> LatentBatch:
    """Items of `LatentRecords` to one batch."""
    latents, noise, time, positions = zip(*items, strict=True)
    return LatentBatch(torch.stack(latents), torch.stack(noise), torch.stack(time), list(positions))


def make_record(mean: Pyramid, log_variance: Pyramid | None, dtype: str) -> Tensor:
    """(B, D) records of a batch, on the CPU."""
    parts = [flatten(mean)] + ([] if log_variance is None else [flatten(log_variance)])
    return torch.cat(parts, dim=1).to(getattr(torch, dtype)).cpu()
