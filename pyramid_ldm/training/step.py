"""One optimizer step, guarded against values that are not finite."""

import torch
from torch import nn

from pyramid_ldm.config.common import TrainConfig
from pyramid_ldm.errors import UserError
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.optimizer import Optimizer
from pyramid_ldm.training.runtime import Runtime


def per_step(train: TrainConfig, runtime: Runtime) -> int:
    """Images one optimizer step sees, over micro-steps and processes."""
    return train.batch_size * train.accumulate * runtime.ranks


def rounding_note(images: int, total: int) -> str:
    """A line where `train.images` is not a whole number of steps, else nothing."""
    if images == total:
        return ""
    return f"train.images={images} is rounded up to {total}, a whole number of steps; so is every interval\n"


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def take_step(
    optimizer: Optimizer, model: nn.Module, clip: float, runtime: Runtime, metrics: Metrics, name: str
) -> bool:
    """Clips, steps and clears the gradients; skips the step on every process if the norm is not finite on one."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else float("inf"))
    finite = not runtime.any(not bool(torch.isfinite(norm)))
    if finite:
        optimizer.step()
        metrics.add({name: norm})
    optimizer.zero_grad(set_to_none=True)
    return finite


class NonFinite:
    """Counts steps that were skipped; the run stops after `limit` in a row."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count, self.in_a_row = limit, 0, 0

    def state_dict(self) -> dict[str, int]:
        """For the checkpoint."""
        return {"count": self.count, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The inverse."""
        self.count, self.in_a_row = state["count"], state["in_a_row"]

    @property
    def exceeded(self) -> bool:
        """Whether the run has ended; what it holds then is not worth keeping."""
        return self.in_a_row >= self.limit

    def record(self, finite: bool, sources: list[str]) -> UserError | None:
        """What to say, with the batch's sources, when there have been too many in a row."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.count += not finite
        if not self.exceeded:
            return None
        return UserError(
            f"{self.limit} steps in a row gave a loss that is not finite; lower train.learning_rate or use "
            f"precision=fp32, and run again from the last checkpoint; the last batch: {', '.join(sources[:8])}"
        )
