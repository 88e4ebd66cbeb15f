"""The data set of stage two: cached latents by position."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyramid_ldm.data.batch import Batch
from pyramid_ldm.data.order import item_at
from pyramid_ldm.data.shards import LatentCache
from pyramid_ldm.errors import UserError
from pyramid_ldm.pyramid import Pyramid, flatten, pyramid_noise
from pyramid_ldm.randomness import generator

Item = tuple[Tensor, int, Tensor | None]


class LatentRecords(Dataset[Item]):
    """Stage two's data by position of the run: item p is (raw latents (D,), p, the noise that a flow drew them from or
    None).

    Everything random at p is a function of (seed, p): the row and the posterior sample.
    """

    def __init__(self, cache: LatentCache, rows: list[int], seed: int, posterior: str, shuffle: bool = True) -> None:
        if not rows:
            raise UserError(f"{cache.directory}: holds no record to train on; encode more photographs")
        self.cache, self.rows, self.seed, self.posterior, self.shuffle = cache, rows, seed, posterior, shuffle

    def __getitem__(self, position: int) -> Item:
        place = item_at(position, len(self.rows), self.seed) if self.shuffle else position % len(self.rows)
        record, noise = self.cache.read(self.rows[place]), None
        plan = self.cache.plan
        if plan.pairs is not None:
            index = int(self.cache.rows[self.rows[place]].source)
            noise = flatten(pyramid_noise(plan.shapes(), plan.seed, plan.noise, [index]))[0]
        if self.cache.plan.has_variance:
            mean, log_variance = record.chunk(2)
            if self.posterior == "sample":
                drawn = torch.randn(mean.shape, generator=generator(self.seed, "posterior", position))
                mean = mean + (0.5 * log_variance).exp() * drawn
        else:
            mean = record
        return mean, position, noise


def collate_latents(items: list[Item]) -> Batch:
    """Items of `LatentRecords` to one batch."""
    latents, positions, noise = zip(*items, strict=True)
    given = None if noise[0] is None else torch.stack(noise)
    return Batch(list(positions), latents=torch.stack(latents), noise=given)


def make_record(mean: Pyramid, log_variance: Pyramid | None, dtype: str) -> Tensor:
    """(B, D) records of a batch, on the CPU."""
    parts = [flatten(mean)] + ([] if log_variance is None else [flatten(log_variance)])
    return torch.cat(parts, dim=1).to(getattr(torch, dtype)).cpu()
