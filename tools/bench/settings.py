"""What a run is asked to do. Travels to the worker processes as JSON."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

SHRINK = 16  # --quick: sides of images are divided by this


class Unavailable(Exception):
    """An item that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Settings:
    """Options that both sides of every ratio share."""

    device: str = "cpu"
    precision: str = "bf16"  # bf16: autocast | fp32
    repeats: int = 5
    budget: float = 60.0  # seconds of timed runs an item
    limit: float = 1800.0  # seconds after which an item is given up
    threads: int = 1
    quick: bool = False
    smallest: int = 0  # pixels: peers are compared at no smaller images
    ceiling: float | None = None  # the best convolution of this run in `precision`, FLOP/s

    @property
    def dtype(self) -> torch.dtype:
        """What layers compute in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def side(self, pixels: int) -> int:
        """A side of an image, shrunk under --quick."""
        return pixels // SHRINK if self.quick else pixels

    def image_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width, shrunk under --quick."""
        return self.side(size[0]), self.side(size[1])

    def autocast(self) -> torch.autocast:
        """bfloat16 where asked."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    @contextmanager
    def inference(self) -> Iterator[None]:
        """What every inference runs in, ours and the peers'."""
        with torch.inference_mode(), self.autocast():
            yield


@dataclass(frozen=True)
class Item:
    """One line of a table, to be measured.

    Items of one `group` are compared; their ratios refer to the group's `reference`. Two items with one section,
    group and name are one line: its runs are spread over the group.
    """

    section: str
    group: str
    name: str
    params: dict[str, Any] = field(default_factory=dict)
    reference: bool = False
    alone: bool = True  # in a process of its own, so that memory is its own
    needs: str = ""  # a package beside ours
    threads: int | None = None  # instead of the settings'

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it one line."""
        return self.section, self.group, self.name

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def interleave(ours: list[Item], peers: list[Item]) -> list[Item]:
    """Ours before and after the peers, so that a machine that slows down slows both sides."""
    return [*ours, *peers, *ours] if peers else ours
