"""The machine a run stands on: device, precision, processes."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyramid_ldm.allocator import keep_freed_memory
from pyramid_ldm.errors import UserError
from pyramid_ldm.randomness import derive_seed
from pyramid_ldm.signals import StopRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """Where tensors live, in what precision layers compute, and which of how many processes this is."""

    device: torch.device
    bf16: bool
    rank: int = 0
    ranks: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """bfloat16 where the run uses it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def wrap(self, model: nn.Module, compile_model: bool = False) -> nn.Module:
        """The module to call in training: compiled if asked, DDP if there are several processes."""
        if compile_model:
            import torch._dynamo as dynamo  # slow to import, and few runs compile

            dynamo.config.recompile_limit = 256  # compiled parts share their code, not their shapes
            model.compile(dynamic=False)
        if self.ranks == 1:
            return model
        # Spectral-norm vectors move by an explicit call, alike on every rank: nothing to broadcast.
        return DistributedDataParallel(model, broadcast_buffers=False)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes."""
        if self.ranks > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def average(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        return self.sum(value) / self.ranks

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Each value's mean over processes, which must agree on the names."""
        if self.ranks == 1 or not values:
            return values
        means = self.average(torch.tensor(list(values.values()), dtype=torch.float32, device=self.device))
        return dict(zip(values, means.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""
        if self.ranks == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        """Waits for every process."""
        if self.ranks > 1:
            dist.barrier()

    def first(self, make: Callable[[], T]) -> T:
        """`make()` of the first process, for all of them: what must be the same everywhere, or is done once."""
        if self.ranks == 1:
            return make()
        found: list[T | UserError | None] = [None]
        if self.main:
            try:
                found = [make()]
            except UserError as error:
                found = [error]
        dist.broadcast_object_list(found, src=0, device=self.device if self.device.type == "cuda" else None)
        if isinstance(found[0], UserError):
            raise found[0]
        return cast(T, found[0])

    def gather_largest(self, value: Tensor) -> Tensor:
        """The element-wise maximum over processes."""
        if self.ranks > 1:
            value = value.clone()
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def from_first(self, value: Tensor) -> Tensor:
        """The first process's tensor; those of the others must have its shape."""
        if self.ranks > 1:
            dist.broadcast(value, 0)
        return value

    @contextlib.contextmanager
    def last_micro_step(self, last: bool, *models: nn.Module | None) -> Iterator[None]:
        """Within, backward passes of DDP-wrapped models sum gradients over processes only if `last`."""
        with contextlib.ExitStack() as stack:
            for model in models:
                if isinstance(model, DistributedDataParallel) and not last:
                    stack.enter_context(model.no_sync())
            yield

    def fetch(self, stop: StopRequest, batches: Iterator[T]) -> T:
        """The next one. One process alone may be interrupted while it waits; several look at signals together, between
        steps."""
        return stop.wait_for(lambda: next(batches)) if self.ranks == 1 else next(batches)

    def seed_step(self, seed: int, images_seen: int) -> None:
        """Seeds what a forward pass draws (dropout) from (seed, rank, images seen)."""
        torch.manual_seed(derive_seed(seed, "step", self.rank, images_seen))


def start(device: str, precision: str) -> Runtime:
    """Picks device and precision, and joins the other processes when started by torchrun."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if ranks > 1 and not dist.is_initialized():
        # One process may evaluate or encode for long while the others wait.
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=4))
    return Runtime(chosen, use_bf16(precision, chosen), rank, ranks)


def finish() -> None:
    """Leaves the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """ "auto" is CUDA, else Apple's MPS, else the CPU. UserError where a named device is not there."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}: PyTorch {torch.__version__} sees no CUDA device here; use device=cpu")
    if device not in ("cpu", "mps", "cuda") and not re.fullmatch(r"cuda:\d{1,4}", device):
        raise UserError(f"device={device}: no such device; use auto, cpu, cuda, cuda:1 or mps")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device=mps: PyTorch {torch.__version__} sees no such device here; use device=cpu")
    chosen = torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device}: this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0")
    return chosen


def use_bf16(precision: str, device: torch.device) -> bool:
    """ "auto" is bfloat16 where it is fast: recent CUDA devices, and CPUs with AVX512-BF16 or AMX."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware, as far as Linux tells."""
    with contextlib.suppress(OSError):
        return any(flag in Path("/proc/cpuinfo").read_text() for flag in (" avx512_bf16", " amx_bf16"))
    return False
