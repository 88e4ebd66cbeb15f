"""Batches prepared ahead by other processes, each with a connection of its own.

torch's DataLoader sends batches through /dev/shm, of which containers have 64 MiB, and a worker that finds none left
does not say so; through one pipe for all workers instead, a worker that is killed in the middle of a batch leaves its
reader waiting for ever. Here its connection closes with it. Whatever else goes wrong in a worker comes back as a value.
"""

import contextlib
import multiprocessing
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyramid_ldm.allocator import return_freed_memory
from pyramid_ldm.errors import UserError

Batch = TypeVar("Batch")
PREFETCH = 4  # batches ahead a worker


class Travelling:
    """A dataclass whose tensors are pickled as plain arrays, by value."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)

    def pin_memory(self) -> Self:
        """In memory that a GPU can read by itself."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.pin_memory())
        return self


@dataclass(frozen=True)
class Failure:
    """What could not be done, and what that is: by default the user's to mend."""

    message: str
    kind: type[Exception] = UserError


OUT_OF_MEMORY = Failure("out of memory while reading data; lower data.workers (--workers)")


@dataclass(frozen=True)
class _Maker:
    """A batch from the indices of its items."""

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Any]

    def __call__(self, indices: list[int]) -> Any:
        try:
            return self.collate([self.dataset[index] for index in indices])
        except UserError as error:
            return Failure(str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return Failure(f"{where}{error.strerror or error}")
        except MemoryError:
            return OUT_OF_MEMORY


def load_batches(
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], Batch],
    indices: Iterable[list[int]],
    *,
    workers: int,
    pin: bool = False,
    prefetch: int = PREFETCH,
) -> Iterator[Batch]:
    """One batch of `dataset` for each list of indices, in order, prepared ahead by `workers` processes (0: by this
    one), which start with the first batch that is asked for and end with the iterator.

    Raises:
        UserError: what a worker met: a failing disk, no image that can be read.
        UserError: a worker was killed; noticed at once.
    """
    make = _Maker(dataset, collate)
    if not workers:
        return _checked(_pinned(make(batch), pin) for batch in indices)
    return _ahead(make, indices, workers, prefetch, pin)


def _pinned(item: Any, pin: bool) -> Any:
    return item.pin_memory() if pin and isinstance(item, Travelling) else item


def _checked(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        if isinstance(item, Failure):
            raise item.kind(item.message)
        yield item


def _ahead(make: _Maker, tasks: Iterable[list[int]], count: int, prefetch: int, pin: bool) -> Iterator[Any]:
    with contextlib.closing(_Workers(tasks, prefetch, pin)) as workers:
        workers.start(make, count)
        yield from _checked(workers.batches())


class _Workers:
    """Processes that make batches, in turn, and the thread that receives them."""

    def __init__(self, tasks: Iterable[list[int]], prefetch: int, pin: bool) -> None:
        self.ready: queue.Queue[Any] = queue.Queue(maxsize=2)
        self.tasks, self.prefetch, self.pin = iter(tasks), prefetch, pin
        self.closed = threading.Event()
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        self.receiver = threading.Thread(target=self._receive, daemon=True)

    def start(self, make: _Maker, count: int) -> None:
        """Starts `count` processes and begins to ask them."""
        return_freed_memory()
        for _ in range(count):
            mine, theirs = multiprocessing.Pipe()
            self.connections.append(mine)
            process = multiprocessing.Process(target=_work, args=(theirs, make), daemon=True)
            process.start()
            self.processes.append(process)
            theirs.close()  # else nobody would notice the other end's death
        self.receiver.start()

    def batches(self) -> Iterator[Any]:
        """In order; a Failure where there is no batch."""
        while (item := self.ready.get()) is not None:
            yield item

    def close(self) -> None:
        """Ends the processes, wherever they are."""
        self.closed.set()
        for process in self.processes:
            process.kill()
        if self.receiver.is_alive():
            self.receiver.join()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()

    def _receive(self) -> None:
        pending = deque[Connection]()  # whose batch comes next

        def ask(connection: Connection) -> None:
            for task in self.tasks:
                connection.send(task)
                pending.append(connection)
                return

        try:
            for connection in self.connections * self.prefetch:
                ask(connection)
            while pending:
                connection = pending.popleft()
                item = connection.recv()
                ask(connection)
                self._put(_pinned(item, self.pin))
            self._put(None)
        except (EOFError, OSError):
            message = "a process that reads data was killed, perhaps because memory ran out"
            self._put(Failure(f"{message}; lower data.workers (--workers), and run again"))
        except Exception:
            self._put(Failure(traceback.format_exc(), RuntimeError))

    def _put(self, item: Any) -> None:
        while not self.closed.is_set():
            with contextlib.suppress(queue.Full):
                return self.ready.put(item, timeout=0.1)


def _work(connection: Connection, make: _Maker) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; the loop decides when its workers end. Not so SIGTERM: it is how Python
    # ends workers at exit.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    made = queue.SimpleQueue[Any]()  # sent by another thread: the next batch is made meanwhile

    def send() -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            while True:
                item = made.get()
                try:
                    connection.send(item)
                except MemoryError:
                    connection.send(OUT_OF_MEMORY)

    threading.Thread(target=send, daemon=True).start()
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(EOFError, OSError):
        while parent.sentinel not in wait([connection, parent.sentinel]):
            task = connection.recv()
            try:
                made.put(make(task))
            except Exception:
                made.put(Failure(f"in a process that reads data: {traceback.format_exc()}", RuntimeError))
