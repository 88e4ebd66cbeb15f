"""Dormand-Prince 5(4) (Dormand & Prince 1980) with a step size and an error control for every sample of a batch.

torchdiffeq's dopri5 has one step size for the whole state, so that a sample's path depends on what is solved beside
it, and spends several milliseconds an evaluation on a large state; this does not. Times and step sizes are Python
floats: one transfer from the device a step tells which samples were accepted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]  # (states (A, N), times (A,)) -> their derivatives (A, N)

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
    slopes: Tensor  # (A, N): the derivative at `times`
    times: list[float]
    steps: list[float]

    def keep(self, which: list[int]) -> "_Samples":
        index = torch.tensor(which, dtype=torch.long, device=self.states.device)
        return _Samples(
            [self.rows[i] for i in which],
            self.states[index],
            self.slopes[index],
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
    parts: Sequence[int],
    first_step: float = 0.01,
    at: Callable[[float], None] = lambda time: None,
) -> tuple[Tensor, list[int]]:
    """The state at `end`, reached exactly: no time beyond it is asked for.

    Args:
        field: the derivative; rows are samples, and those at the end are left out.
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
    stages = start.new_empty(len(NODES), *start.shape)
    weights = start.new_tensor([[*row, *[0.0] * (7 - len(row))] for row in (*STAGES, ERROR)])  # (8, 7)
    slopes = field(start, start.new_full((batch,), begin))
    active = _Samples(list(range(batch)), start, slopes, [begin] * batch, [first_step] * batch)
    while active.rows:
        active.steps = [min(step, end - t) for step, t in zip(active.steps, active.times, strict=True)]
        for t, step in zip(active.times, active.steps, strict=True):
            if step < 1e-7:
                raise StepVanishedError(t)
        at(min(active.times))
        moments = torch.tensor(
            [active.steps]
            + [
                [min(t + node * step, end) for t, step in zip(active.times, active.steps, strict=True)]
                for node in NODES
            ],
            dtype=start.dtype,
        ).to(device, non_blocking=True)  # fmt: skip
        after, errors = _step(field, active, stages[:, : len(active.rows)], weights, moments, rtol, atol, parts)
        for row in active.rows:
            counts[row] += len(NODES) - 1
        accepted = [error <= 1 for error in errors]
        _advance(active, after, stages[-1, : len(active.rows)], accepted, errors)
        finished = [end - t < 1e-9 for t in active.times]
        for i, done in enumerate(finished):
            if done:
                result[active.rows[i]] = active.states[i]
        if any(finished):
            active = active.keep([i for i, done in enumerate(finished) if not done])
    return result, counts


def _step(
    field: Field,
    active: _Samples,
    stages: Tensor,
    weights: Tensor,
    moments: Tensor,
    rtol: float,
    atol: float,
    parts: Sequence[int],
) -> tuple[Tensor, list[float]]:
    """One attempt for every sample: the states after it, and their errors (nan for what is not finite)."""
    step, before = moments[0][:, None], active.states
    stages[0] = active.slopes
    after = before
    for i in range(1, len(NODES)):
        after = torch.addcmul(before, step, _combine(weights[i, :i], stages[:i]))
        stages[i] = field(after, moments[1 + i])
    error = _combine(weights[-1], stages).mul_(step)
    error /= torch.maximum(before.abs(), after.abs()).mul_(rtol).add_(atol)
    norms = torch.stack([part.square().mean(dim=1) for part in error.split(list(parts), dim=1)]).amax(dim=0).sqrt()
    return after, norms.tolist()


def _combine(weights: Tensor, stages: Tensor) -> Tensor:
    """sum_i weights_i stages_i: one product instead of a pass over memory a stage."""
    return (weights @ stages.reshape(len(weights), -1)).view(stages.shape[1:])


def _advance(active: _Samples, after: Tensor, slopes: Tensor, accepted: list[bool], errors: list[float]) -> None:
    """Moves accepted samples and chooses every sample's next step."""
    if all(accepted):
        active.states, active.slopes = after, slopes.clone()
    elif any(accepted):
        mask = torch.tensor(accepted, device=after.device)[:, None]
        active.states = torch.where(mask, after, active.states)
        active.slopes = torch.where(mask, slopes, active.slopes)
    for i, (good, error) in enumerate(zip(accepted, errors, strict=True)):
        if good:
            active.times[i] += active.steps[i]
        factor = GROW if error == 0 else SAFETY * error**-0.2 if error == error else SHRINK
        active.steps[i] *= min(GROW, max(1.0 if good else SHRINK, factor))
