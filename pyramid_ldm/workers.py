"""Work on many things by several processes, in whatever order it gets done."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from pyramid_ldm.errors import UserError
from pyramid_ldm.signals import stop_on_signal

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 8  # items that wait, a process
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # of matrix products


def in_processes(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`work` of each item, as soon as it is done, by as many processes as there are cores. Both have to be picklable.

    Raises:
        KeyboardInterrupt: after a signal, once what was begun is done.
        UserError: a process was killed.
    """
    if not items:
        return
    processes, context = min(os.cpu_count() or 1, len(items)), multiprocessing.get_context("spawn")
    with stop_on_signal() as stop, ProcessPoolExecutor(processes, context, _begin) as pool:
        waiting, pending = iter(items), set[Future[Result]]()
        try:
            while not stop.requested:
                pending |= _submitted(pool, work, islice(waiting, AHEAD * processes - len(pending)))
                if not pending:
                    break
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for each in done:
                    yield each.result()
        except BrokenProcessPool:
            if not stop.requested:
                raise UserError("a process was killed, perhaps because memory ran out; run again") from None
        finally:
            pool.shutdown(cancel_futures=True)
    if stop.requested:
        raise KeyboardInterrupt


def _submitted(pool: ProcessPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item]) -> set[Future[Result]]:
    """The first of all starts the processes, which are deaf to Ctrl-C until they have begun."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        with one_thread_each():
            return {pool.submit(work, item) for item in items}
    finally:
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _begin() -> None:
    """In each process, first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which reaches all of a terminal's processes
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    warnings.filterwarnings("ignore", module=r"PIL\.")  # as in the command itself
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


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
