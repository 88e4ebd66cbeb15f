"""Tensors with shapes and without values: a training step of any size, in seconds and without its memory."""

import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from pyramid_ldm.info.memory import Watch

aten = torch.ops.aten
LARGE = 1 << 28  # bytes that a system may refuse to promise, although nobody will touch them
READS_NO_VALUES = (  # and must be asked of the tensors themselves
    aten._fused_sdp_choice.default,
    aten._unsafe_view.default,
    aten.resize_.default,
    aten.set_.source_Storage_storage_offset,
)

KEEPS_CHANNELS_LAST = (  # on a CPU; what torch knows of meta tensors is CUDA's way
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.native_group_norm.default,
    aten.native_group_norm_backward.default,
)


class Shapes(Watch):
    """While it is open, no operation on a CPU tensor computes anything: results have the right shape, type and strides.

    They are real CPU tensors over memory that is reserved and never touched, so autograd, autocast, checkpointing and
    optimizers work as ever, at about 50 us an operation; torch's `FakeTensorMode`, which does the same for any device,
    takes 350. Where a program asks for a value, every bool is true and every number 1; values from before stay.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, Any] = {}  # results on the meta device, as blocks of a network repeat
        self._kinds: dict[Any, str | tuple[tuple[int, str], ...]] = {}  # of operations: see `_kind`

    def watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The shapes of what comes out."""
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind == "as it is":
            return func(*args, **kwargs)
        if kind == "value":
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if isinstance(kind, tuple):
            results = tuple(args[place] if place < len(args) else kwargs.get(name) for place, name in kind)
            return None if not results else results[0] if len(results) == 1 else results
        if func is aten.randn.default:  # of which torch knows the shape by way of its compiler
            return torch.empty(args[0], dtype=kwargs.get("dtype") or torch.get_default_dtype())
        if func is aten.bincount.default:  # no index is beyond the last
            return _reserve(torch.empty(args[2], dtype=torch.int64, device="meta"))
        key = func, _key(args), _key(tuple(kwargs.items()))
        if key not in self._known:
            self._known[key] = _on_meta(func, args, kwargs)
        return _map(_reserve, self._known[key])


def _kind(func: Any) -> str | tuple[tuple[int, str], ...]:
    """What an operation gives: "value", a Python number; "as it is", what it gives anyway, as views do; the arguments
    that it writes to, each by its place and name; or "new", tensors."""
    schema = func._schema
    if func in (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default):
        return "value"
    if func.namespace != "aten" or func in READS_NO_VALUES or (func.is_view and not schema.is_mutable):
        return "as it is"
    if schema.is_mutable and all(map(_is_written, schema.returns)):  # of none, too
        arguments = enumerate(schema.arguments)
        written = {tuple(a.alias_info.before_set): (place, a.name) for place, a in arguments if _is_written(a)}
        return tuple(written[tuple(value.alias_info.before_set)] for value in schema.returns)
    return "new"


def _key(value: Any) -> Any:
    """What decides about the shape of a result."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_key, value)) if isinstance(value, tuple | list) else (type(value), value)


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def to_meta(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    meta_args, meta_kwargs = _map(to_meta, args), {name: _map(to_meta, value) for name, value in kwargs.items()}
    has_tensors = any(map(_has_tensors, (*args, *kwargs.values())))
    for argument in func._schema.arguments:
        if argument.name == "device" and ("device" in kwargs or not has_tensors):
            meta_kwargs["device"] = "meta"
        elif argument.name in ("generator", "pin_memory"):
            meta_kwargs[argument.name] = None
    found = func(*meta_args, **meta_kwargs)
    if func in KEEPS_CHANNELS_LAST and any(map(_channels_last, args)):
        return _map(lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t, found)
    return found


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every tensor changed; operations take and return nothing deeper than lists. (torch's `tree_map`
    takes longer than the operation.)"""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)([_map(change, one) for one in value]) if isinstance(value, tuple | list) else value


def _has_tensors(value: Any) -> bool:
    return any(map(_has_tensors, value)) if isinstance(value, tuple | list) else isinstance(value, Tensor)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _channels_last(value: Any) -> bool:
    return isinstance(value, Tensor) and suggest_memory_format(value) == torch.channels_last


def _reserve(like: Tensor) -> Tensor:
    """On the CPU, in memory that the system does not give before somebody touches it."""
    shape, stride, dtype = like.shape, like.stride(), like.dtype
    size = like.untyped_storage().nbytes()
    if size < LARGE or not hasattr(mmap, "MAP_NORESERVE"):
        return torch.empty_strided(shape, stride, dtype=dtype)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)
