"""The demo's photographs: rendered landscapes in a folder."""

from functools import partial
from pathlib import Path

from PIL import Image

from pyramid_ldm.demo.scenes import render_landscape
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.files import write_atomic
from pyramid_ldm.ownership import claim
from pyramid_ldm.workers import in_processes

LARGE = 256 * 256  # pixels: beyond, several processes render, and files are JPEGs


def render_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Landscapes 0 to `count` - 1, PNGs or, where they are large, JPEGs; those already there are kept.

    KeyboardInterrupt after a signal, UserError where a process was killed: the same call goes on.
    """
    claim(folder, "photographs", "--out")
    large = size[0] * size[1] > LARGE
    paths = {index: folder / f"{index:05d}.{'jpg' if large else 'png'}" for index in range(count)}
    todo = [(index, path) for index, path in paths.items() if not path.exists()]
    if not large:
        for each in todo:
            render(each, size)
        return
    with Progress("landscapes", count) as progress:
        progress.advance(count - len(todo))
        for _ in in_processes(partial(render, size=size), todo):
            progress.advance()


def render(what: tuple[int, Path], size: tuple[int, int]) -> None:
    """A landscape, by its number, to its file, in one step."""
    index, path = what
    image = Image.fromarray(render_landscape(index, *size))
    settings = {"format": "JPEG", "quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {"format": "PNG"}
    write_atomic(path, lambda temporary: image.save(temporary, **settings))
