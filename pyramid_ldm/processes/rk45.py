"""Dormand-Prince 5(4) (Dormand & Prince 1980) with a step size and an error control for every sample of a batch.

torchdiffeq's dopri5 has one step size for the whole state, so that a sample's path depends on what is solved beside
it, and spends several milliseconds an evaluation on a large state; this does not. Times and step sizes are Python
floats: one transfer from the device a step tells which samples were accepted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor, Tensor], None]  # (states (A, N), times (A,), where their derivatives go (A, N))

NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # the fifth-order solution itself
)
# Fifth-order minus fourth-order weights.
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
LEAST_STEP = 1e-7  # float32's resolution of time near 1


class StepVanishedError(ArithmeticError):
    """A sample's step has become too small to move time; `time` says where."""

    def __init__(self, time: float) -> None:
        super().__init__(f"the step size vanished at t = {time:.4f}")
        self.time = time


@dataclass
class _Samples:
    """Those not at the end yet: which rows of the batch, their states, times and next step sizes."""

    rows: list[int]
    states: Tensor  # (A, N)
    stages: Tensor  # (A, 7, N): derivatives; the first is the one at `times`. A sample's stages lie together in memory
    times: list[float]
    steps: list[float]

    def keep(self, which: list[int]) -> "_Samples":
        index = torch.tensor(which, dtype=torch.long, device=self.states.device)
        return _Samples(
            [self.rows[i] for i in which],
            self.states[index],
            self.stages[index],
            [self.times[i] for i in which],
            [self.steps[i] for i in which],
        )


def solve(
    field: Field,
    start: Tensor,
    begin: float,
    end: float,
    *,
    rtol: float,
    atol: float,
    parts: list[int],
    first_step: float = 0.01,
    at: Callable[[float], None] = lambda time: None,
) -> tuple[Tensor, list[int]]:
    """The state at `end`, reached exactly: no time beyond it is asked for.

    Args:
        field: writes the derivative; rows are samples, and those at the end are left out.
        start: (B, N), float32, at `begin`.
        parts: sizes that N is made of. A sample's error is the largest RMS over parts of the local error divided by
            atol + rtol * max(|before|, |after|).
        at: told the time of the sample that is furthest behind, before every step.

    Returns:
        (B, N), and how many evaluations each sample took.

    Raises:
        StepVanishedError: a step below float32's resolution of time.
    """
    device, batch = start.device, start.shape[0]
    result, counts = torch.empty_like(start), [1] * batch
    weights = start.new_tensor([[*row, *[0.0] * (7 - len(row))] for row in (*STAGES, ERROR)])  # (8, 7)
    stages = start.new_empty(batch, len(NODES), start.shape[1])
    field(start, start.new_full((batch,), begin), stages[:, 0])
    active = _Samples(list(range(batch)), start, stages, [begin] * batch, [first_step] * batch)
    while active.rows:
        for i, (t, step) in enumerate(zip(active.times, active.steps, strict=True)):
            left = end - t
            if step < min(LEAST_STEP, left):
                raise StepVanishedError(t)
            # What would be left for a step too short to move time belongs to this one.
            active.steps[i] = left if left - step < min(10 * LEAST_STEP, 0.1 * step) else step
        at(min(active.times))
        moments = torch.tensor(
            [active.steps]
            + [
                [min(t + node * step, end) for t, step in zip(active.times, active.steps, strict=True)]
                for node in NODES
            ],
            dtype=start.dtype,
        ).to(device, non_blocking=True)  # fmt: skip
        after, errors = _step(field, active, weights, moments, rtol, atol, parts)
        for row in active.rows:
            counts[row] += len(NODES) - 1
        _advance(active, after, errors, end)
        finished = [t >= end for t in active.times]
        for i, done in enumerate(finished):
            if done:
                result[active.rows[i]] = active.states[i]
        if any(finished):
            active = active.keep([i for i, done in enumerate(finished) if not done])
    return result, counts


def _step(
    field: Field,
    active: _Samples,
    weights: Tensor,
    moments: Tensor,
    rtol: float,
    atol: float,
    parts: list[int],
) -> tuple[Tensor, list[float]]:
    """One attempt for every sample: the states after it, and their errors (nan for what is not finite)."""
    before, stages = active.states, active.stages
    scaled = moments[0][:, None, None] * weights  # (A, 8, 7): a sample's step size times each weight
    after = before
    for i in range(1, len(NODES)):
        after = torch.baddbmm(before[:, None], scaled[:, i : i + 1, :i], stages[:, :i])[:, 0]
        field(after, moments[1 + i], stages[:, i])
    error = torch.bmm(scaled[:, -1:], stages)[:, 0]
    error /= torch.maximum(before.abs(), after.abs()).mul_(rtol).add_(atol)
    norms = [torch.linalg.vector_norm(part, dim=1) / math.sqrt(part.shape[1]) for part in error.split(parts, dim=1)]
    return after, torch.stack(norms).amax(dim=0).tolist()


def _advance(active: _Samples, after: Tensor, errors: list[float], end: float) -> None:
    """Moves the samples whose step is accurate enough and chooses every sample's next step."""
    accepted = [error <= 1 for error in errors]
    if all(accepted):
        active.states = after
        active.stages[:, 0] = active.stages[:, -1]
    elif any(accepted):
        index = torch.tensor([i for i, good in enumerate(accepted) if good], device=after.device)
        active.states = active.states.index_copy(0, index, after[index])
        active.stages[index, 0] = active.stages[index, -1]
    for i, (good, error) in enumerate(zip(accepted, errors, strict=True)):
        if good:
            last = active.steps[i] == end - active.times[i]
            active.times[i] = end if last else active.times[i] + active.steps[i]
        factor = GROW if error == 0 else SAFETY * error**-0.2 if error == error else SHRINK
        active.steps[i] *= min(GROW, max(1.0 if good else SHRINK, factor))
