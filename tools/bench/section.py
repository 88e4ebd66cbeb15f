"""What a section of the benchmark is made of."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.results import Figures, Row
from bench.settings import Item, Settings
from bench.tables import Column


def nothing_computed(rows: dict[str, list[Row]], settings: Settings) -> list[Row]:
    """Most sections measure everything."""
    return []


@dataclass(frozen=True)
class Section:
    """A table: what there is to measure, how, and how it looks."""

    title: str
    about: str
    columns: tuple[Column, ...]
    items: Callable[[Settings], list[Item]]
    measure: Callable[[Item, Settings], Figures]  # in a worker; raises Unavailable with a reason
    computed: Callable[[dict[str, list[Row]], Settings], list[Row]] = nothing_computed  # from measured rows by section
    needs_ceiling: bool = False  # shows shares of the best convolution
