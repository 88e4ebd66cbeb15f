"""How far a command is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS = 20.0  # between two plain lines


class Progress:
    """Counts images, or whatever `unit` says."""

    def __init__(self, name: str, total: int, unit: str = "images") -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self.began = self.said = time.monotonic()
        self.bar = tqdm(total=total, unit=f" {unit}", desc=name, disable=not sys.stderr.isatty())

    def advance(self, images: int = 1) -> None:
        """So many more are done."""
        self.done += images
        self.bar.update(images)
        now = time.monotonic()
        if self.bar.disable and (now - self.said >= SECONDS or self.done == self.total > images):
            self.said = now
            rate = self.done / max(now - self.began, 1e-9)
            self.say(
                f"{self.name}: {self.done} of {self.total} {self.unit}, {rate:.2f} {self.unit}/s, "
                f"{(self.total - self.done) / rate:.0f} s left"
            )

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items; each is done when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def say(self, text: str) -> None:
        """A line on stderr that does not tear the bar."""
        tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.bar.close()
        if kind is None and self.done < self.total:
            self.say(f"{self.name}: {self.done} of {self.total} {self.unit}")
