"""Exact live and peak bytes of tensors, real or fake."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Sees every operation of one part that runs while the context is open."""

    def watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `func` and returns its result."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.is_inference_mode_enabled() and func.namespace == "aten":  # else it arrives in parts anyway
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return self.watch(func, args, kwargs or {})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the compiler is told of every call otherwise, which takes longer than the rest


class PeakMemory(Watch):
    """Bytes of every tensor storage that lives while the context is open, and their maximum.

    A storage counts once, however many views it has, from the first operation that reads or makes it until it is
    freed; all devices together. What a kernel allocates for itself, and what an allocator keeps, is not counted.

        with PeakMemory(model.parameters()) as memory:
            model(x).sum().backward()
        memory.peak, memory.live  # bytes

    Args:
        existing: tensors that count from the start, for example parameters and an optimizer's state.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}  # by address: reference, bytes
        for tensor in existing:
            self._see(tensor)

    def restart(self) -> Self:
        """The peak begins anew at what lives now."""
        self.peak = self.live
        return self

    def watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Counts what goes in and what comes out."""
        if func.is_view:  # of a storage that whatever reads the view will show
            return func(*args, **kwargs)
        for tensor in _tensors((*args, *kwargs.values()) if kwargs else args):
            self._see(tensor)
        result = func(*args, **kwargs)
        for tensor in _tensors((result,)):
            self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is None:
            self._known[key] = (weakref.ref(storage, lambda _: self._forget(key)), size)
        elif known[1] != size:  # resized in place
            self.live -= known[1]
            self._known[key] = (known[0], size)
        else:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
