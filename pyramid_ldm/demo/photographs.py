"""The demo's photographs: rendered landscapes in a folder."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from pyramid_ldm.demo.scenes import render_landscape
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.files import write_atomic
from pyramid_ldm.ownership import claim
from pyramid_ldm.training.runtime import stop_on_signal

LARGE = 256 * 256  # pixels: beyond, several processes render, and files are JPEGs
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # of NumPy's matrix products


def render_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Landscapes 0 to `count` - 1, PNGs or, where they are large, JPEGs; those already there are kept.

    KeyboardInterrupt after a signal, UserError where a process was killed: the same call goes on.
    """
    claim(folder, "photographs", "--out")
    large = size[0] * size[1] > LARGE
    paths = {index: folder / f"{index:05d}.{'jpg' if large else 'png'}" for index in range(count)}
    todo = [(index, path) for index, path in paths.items() if not path.exists()]
    if not large or not todo:
        for each in todo:
            render(each, size)
        return
    processes, context = min(os.cpu_count() or 1, len(todo)), multiprocessing.get_context("spawn")
    with stop_on_signal() as stop, one_thread_each(), Progress("landscapes", count) as progress:
        progress.advance(count - len(todo))
        with ProcessPoolExecutor(processes, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            try:
                for done in as_completed([pool.submit(render, each, size) for each in todo]):
                    if stop.requested:
                        break
                    done.result()
                    progress.advance(1)
            except BrokenProcessPool:
                if not stop.requested:
                    raise UserError(f"{folder}: a process that renders was killed; run again, it goes on") from None
            finally:
                pool.shutdown(cancel_futures=True)
    if stop.requested:
        raise KeyboardInterrupt


@contextmanager
def one_thread_each() -> Iterator[None]:
    """For processes begun here: each would take every core for its matrix products, and wait for the others."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def render(what: tuple[int, Path], size: tuple[int, int]) -> None:
    """A landscape, by its number, to its file, in one step."""
    index, path = what
    image = Image.fromarray(render_landscape(index, *size))
    settings = {"format": "JPEG", "quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {"format": "PNG"}
    write_atomic(path, lambda temporary: image.save(temporary, **settings))
