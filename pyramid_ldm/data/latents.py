"""The data set of stage two: cached latents by position."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyramid_ldm.data.batch import Batch
from pyramid_ldm.data.order import item_at
from pyramid_ldm.data.shards import LatentCache
from pyramid_ldm.errors import UserError
from pyramid_ldm.pyramid import Pyramid, flatten
from pyramid_ldm.randomness import generator


class LatentRecords(Dataset[tuple[Tensor, int]]):
    """Stage two's data by position of the run: item p is (raw latents (D,), p).

    Everything random at p is a function of (seed, p): the row and the posterior sample.
    """

    def __init__(self, cache: LatentCache, rows: list[int], seed: int, posterior: str, shuffle: bool = True) -> None:
        if not rows:
            raise UserError(f"{cache.directory}: holds no record to train on; encode more photographs")
        self.cache, self.rows, self.seed, self.posterior, self.shuffle = cache, rows, seed, posterior, shuffle

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        place = item_at(position, len(self.rows), self.seed) if self.shuffle else position % len(self.rows)
        record = self.cache.read(self.rows[place])
        if self.cache.plan.has_variance:
            mean, log_variance = record.chunk(2)
            if self.posterior == "sample":
                noise = torch.randn(mean.shape, generator=generator(self.seed, "posterior", position))
                mean = mean + (0.5 * log_variance).exp() * noise
        else:
            mean = record
        return mean, position


def collate_latents(items: list[tuple[Tensor, int]]) -> Batch:
    """Items of `LatentRecords` to one batch."""
    latents, positions = zip(*items, strict=True)
    return Batch(list(positions), latents=torch.stack(latents))


def make_record(mean: Pyramid, log_variance: Pyramid | None, dtype: str) -> Tensor:
    """(B, D) records of a batch, on the CPU."""
    parts = [flatten(mean)] + ([] if log_variance is None else [flatten(log_variance)])
    return torch.cat(parts, dim=1).to(getattr(torch, dtype)).cpu()
