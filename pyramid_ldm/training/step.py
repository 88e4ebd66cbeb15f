"""One optimizer step, guarded against gradients that are not finite or beyond all proportion."""

import math

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


class StepGuard:
    """Which steps to leave out: those of a gradient that is not finite, or a hundred times as long as those of about
    the last hundred steps (as VDVAE does, Child 2021): from there on a network would only unlearn. Norms that grow by
    a twentieth a step are found, too. After `limit` in a row the run stops, with its last checkpoint as it was.
    """

    OUTLIER, MEMORY = 100.0, 100  # times the usual norm; steps

    def __init__(self, limit: int) -> None:
        self.limit, self.count, self.in_a_row = limit, 0, 0
        self.mean_log_norm, self.steps = 0.0, 0  # over so many steps, at most MEMORY

    def state_dict(self) -> dict[str, int | float]:
        """For the checkpoint."""
        return {
            "count": self.count,
            "in_a_row": self.in_a_row,
            "mean_log_norm": self.mean_log_norm,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        """The inverse."""
        self.count, self.in_a_row = int(state["count"]), int(state["in_a_row"])
        # Older ones have neither.
        self.mean_log_norm, self.steps = state.get("mean_log_norm", 0.0), int(state.get("steps", 0))

    def accepts(self, norm: float) -> bool:
        """Whether to take a step with a gradient of this norm, which then counts as usual."""
        if not math.isfinite(norm):
            return False
        if norm == 0:  # says nothing of what is usual
            return True
        log_norm = math.log(norm)
        if self.steps >= self.MEMORY and log_norm > self.mean_log_norm + math.log(self.OUTLIER):
            return False
        self.steps = min(self.steps + 1, self.MEMORY)
        self.mean_log_norm += (log_norm - self.mean_log_norm) / self.steps
        return True

    @property
    def exceeded(self) -> bool:
        """Whether the run has ended; what it holds then is not worth keeping."""
        return self.in_a_row >= self.limit

    def record(self, taken: bool, sources: list[str]) -> UserError | None:
        """What to say, with the batch's sources, when too many in a row were left out."""
        self.in_a_row = 0 if taken else self.in_a_row + 1
        self.count += not taken
        if not self.exceeded:
            return None
        return UserError(
            f"{self.limit} steps in a row had a gradient that is not finite, or {self.OUTLIER:g} times the usual: "
            f"training has diverged; lower train.learning_rate or use precision=fp32, and run again from the last "
            f"checkpoint; the last batch: {', '.join(sources[:8])}"
        )


def take_step(
    optimizer: Optimizer,
    model: nn.Module,
    clip: float,
    runtime: Runtime,
    metrics: Metrics,
    name: str,
    guard: StepGuard | None = None,
) -> bool:
    """Clips, steps and clears the gradients. Skips the step on every process if one's norm is not finite or, with a
    guard, is not accepted."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else float("inf"))
    good = math.isfinite(norm) if guard is None else guard.accepts(float(norm))
    taken = not runtime.any(not good)
    if taken:
        optimizer.step()
        metrics.add({name: norm})
    optimizer.zero_grad(set_to_none=True)
    return taken
