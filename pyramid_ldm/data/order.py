"""What training sees at position p of the run: a function of (seed, p) alone.

Workers, ranks, accumulation and resuming change nothing, and there is no sampler state to save.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler

from pyramid_ldm.randomness import generator


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def item_at(position: int, count: int, seed: int) -> int:
    """Index of the item at a position: each epoch is a fresh permutation of all items."""
    return int(_permutation(seed, position // count, count)[position % count])


class PositionSampler(Sampler[list[int]]):
    """Batches of positions from `start` (images seen) to `stop` for one rank.

    A global batch of `batch_size * ranks` positions is cut into one piece a rank; micro-steps follow each other.
    """

    def __init__(self, *, start: int, stop: int, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.start, self.stop, self.batch_size, self.rank, self.ranks = start, stop, batch_size, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.batch_size * self.ranks
        for first in range(self.start, self.stop, stride):
            begin = first + self.rank * self.batch_size
            yield list(range(begin, begin + self.batch_size))

    def __len__(self) -> int:
        return -(-(self.stop - self.start) // (self.batch_size * self.ranks))
