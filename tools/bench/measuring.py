"""Time, memory and FLOPs of one call. Everything here runs in a worker process."""

import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from bench.results import Figures
from bench.settings import Settings, Unavailable
from pyramid_ldm.info.memory import PeakMemory
from pyramid_ldm.nn.layers import cast_to_bfloat16

SHORTEST = 1.0  # seconds of timed runs at least, where the budget allows
Call = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """A network with its inputs; `call(*inputs)` is what is measured."""

    model: nn.Module
    inputs: tuple[Any, ...]
    call: Callable[..., object]
    images: int = 1


Builder = Callable[[torch.device], Subject]


def synchronize(settings: Settings) -> None:
    """Waits for the GPU."""
    if settings.device == "cuda":
        torch.cuda.synchronize()


def time_once(call: Call, settings: Settings) -> float:
    """Seconds of one call."""
    synchronize(settings)
    start = time.perf_counter()
    call()
    synchronize(settings)
    return time.perf_counter() - start


def time_runs(call: Call, settings: Settings) -> list[float]:
    """Seconds of `repeats` warm calls (more of short ones), as far as the budget goes; one at least."""
    seconds = [time_once(call, settings)]
    shortest = 0.0 if settings.quick else SHORTEST
    while len(seconds) < settings.repeats or sum(seconds) < shortest:
        if sum(seconds) + seconds[-1] > settings.budget or len(seconds) >= 200:
            break
        seconds.append(time_once(call, settings))
    return seconds


def warm_up(call: Call, settings: Settings, existing: Iterable[Tensor]) -> Figures:
    """The first, untimed call: bytes of what existed before, and the peak of what lived beside it."""
    if settings.device == "cuda":
        synchronize(settings)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronize(settings)
        return {"state_bytes": before, "peak_bytes": torch.cuda.max_memory_allocated() - before}
    with PeakMemory(existing) as memory:
        before = memory.live
        call()
    return {"state_bytes": before, "peak_bytes": memory.peak - before}


def measure(call: Call, settings: Settings, existing: Iterable[Tensor] = (), first: Call | None = None) -> Figures:
    """A warm-up under the memory counter, then the timed runs; peak resident memory is that of all.

    Args:
        existing: tensors that are no part of the call's peak, as far as it reads them.
        first: a shorter call to warm up with.
    """
    reset_peak_rss()
    figures = warm_up(first or call, settings, existing)
    return figures | {"seconds": time_runs(call, settings), "rss_bytes": peak_rss()}


def measure_subject(build: Builder, settings: Settings) -> Figures:
    """Counts on meta tensors, then measures on the device, in eval mode and channels_last."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = count(build)
        refuse_hopeless(figures["flops"], settings)
        subject = build(torch.device(settings.device))
        model = subject.model.eval().requires_grad_(False)
        if settings.precision == "bf16":
            cast_to_bfloat16(model)  # once, as for sampling: autocast would at every call
        model.to(memory_format=torch.channels_last)
        inputs = [channels_last(x) for x in subject.inputs]
        existing = [*model.parameters(), *model.buffers(), *tensors(inputs)]

        def call() -> None:
            with settings.inference():
                subject.call(*inputs)

        return figures | measure(call, settings, existing) | {"images": subject.images}


def count(build: Builder) -> Figures:
    """Parameters and FLOPs (a multiply-add is two) without computing anything."""
    subject = build(torch.device("meta"))
    subject.model.eval()
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        subject.call(*subject.inputs)
    return {"parameters": parameters(subject.model), "flops": counter.get_total_flops()}


def parameters(model: nn.Module) -> int:
    """Values of all parameters."""
    return sum(p.numel() for p in model.parameters())


def refuse_hopeless(flops: int, settings: Settings) -> None:
    """Raises Unavailable where even the best convolution's speed cannot bring two runs under the limit."""
    if settings.ceiling and 2 * flops / settings.ceiling > settings.limit:
        raise Unavailable(
            f"not run: {flops / 1e12:.1f} TFLOP take {flops / settings.ceiling:.0f} s or more at this machine's best "
            f"convolution; limit {settings.limit:g} s for two runs"
        )


def channels_last(value: Any) -> Any:
    """A batch of images, or a pyramid of them, in the layout that convolutions prefer; others unchanged."""
    if isinstance(value, tuple):
        return tuple(channels_last(part) for part in value)
    if isinstance(value, Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def tensors(values: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]


def reset_peak_rss() -> None:
    """Forgets the peak of building the model, where Linux lets us."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Peak resident bytes of this process since `reset_peak_rss`."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
