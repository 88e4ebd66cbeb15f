"""The training loop of both stages."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pyramid_ldm.data.batch import Batch
from pyramid_ldm.data.order import PositionSampler
from pyramid_ldm.errors import UserError
from pyramid_ldm.ownership import replace_directory
from pyramid_ldm.signals import Interrupted, StopRequest, stop_on_signal
from pyramid_ldm.training.checkpoint import prune, save_checkpoint
from pyramid_ldm.training.log import Metrics, RunLog
from pyramid_ldm.training.runtime import Runtime
from pyramid_ldm.training.schedule import due, learning_rate, whole_steps
from pyramid_ldm.training.step import StepGuard, per_step, rounding_note


class State(Protocol):
    """What a step changes, as far as the loop knows it."""

    images_seen: int
    nonfinite: StepGuard
    metrics: Metrics

    def state_dict(self) -> dict[str, Any]:
        """All of it, tensors and plain values."""
        ...


class Stage(ABC):
    """What one stage does in the loop. What is built here is at `state.images_seen`."""

    NAME: str  # of its command
    PICTURES: str  # of the sheets in images/

    def __init__(self, config: Any, run: Path, runtime: Runtime, state: State) -> None:
        self.config, self.run, self.runtime, self.state = config, run, runtime, state
        self.networks: list[nn.Module] = []  # what `accumulate` calls, as `runtime.wrap` gave it
        self.notes: list[str] = []  # to be said first

    @abstractmethod
    def describe(self, total: int) -> str:
        """What is about to happen, in a few lines."""

    @abstractmethod
    def batches(self, positions: PositionSampler) -> Iterator[Batch]:
        """The training data."""

    @abstractmethod
    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step."""

    @abstractmethod
    def accumulate(self, batch: Batch) -> dict[str, Tensor]:
        """One micro-batch: adds its gradients, and changes nothing else that outlives the step. Returns its terms."""

    @abstractmethod
    def step(self, before: int) -> bool:
        """What follows the gradients of a step that began at `before` images: whether all was finite, or else left."""

    @abstractmethod
    def examine(self, log: RunLog) -> None:
        """Held-out figures and a sheet of pictures, on the first process."""

    @abstractmethod
    def save_model(self, directory: Path) -> None:
        """What model/ holds."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What the marker of model/ says of its data."""

    def prepare(self, stop: StopRequest, log: RunLog) -> None:
        """Before the first step of all. Interrupted after a signal."""
        return

    def received(self, batch: Batch, log: RunLog) -> None:
        """A batch has come."""
        return

    def refuse(self) -> UserError | None:
        """Why training cannot go on with the data that came; the same on every process."""
        return None

    def figures(self) -> dict[str, float]:
        """Further figures of a log line."""
        return {}


def train(stage: Stage) -> bool:
    """Runs a stage to `train.images`, or to a signal; returns whether it got there.

    Raises UserError where the data or the loss let it go no further; what was done by then is saved, but for a gradient
    that `StepGuard` no longer accepts.
    """
    config, state, runtime = stage.config, stage.state, stage.runtime
    step_images = per_step(config.train, runtime)
    total = whole_steps(config.train.images, step_images)
    stop_at = state.images_seen + whole_steps(total - state.images_seen, step_images)
    size = config.train.batch_size
    positions = PositionSampler(
        start=state.images_seen, stop=stop_at, batch_size=size, rank=runtime.rank, ranks=runtime.ranks
    )
    batches = stage.batches(positions)
    failure: UserError | None = None
    with (
        stop_on_signal() as stop,
        RunLog(stage.run, main=runtime.main, start=state.images_seen, total=total, name=stage.NAME) as log,
    ):
        for line in [*stage.notes, rounding_note(config.train.images, total) + stage.describe(total)]:
            log.say(line)
        if not state.images_seen:
            try:
                stage.prepare(stop, log)
            except Interrupted:
                return False
        done = state.images_seen >= total
        if done:
            log.say(f"trained already; model/ is written again: the average of ema.export={config.ema.export}")
            export(stage)
        if log.picture_missing(stage.PICTURES, config.log.pictures_every, step_images, last=done):
            examine(stage, log)  # a kill came between the checkpoint and its pictures
        while state.images_seen < total and not runtime.any(stop.requested):
            before = state.images_seen
            rate = learning_rate(config.train, before)
            stage.set_rate(rate)
            try:
                terms, sources = accumulate(stage, stop, batches, log)
            except (Interrupted, UserError) as error:  # the state is still that of a whole step
                if runtime.ranks > 1:  # the others know nothing of it
                    raise
                failure = error if isinstance(error, UserError) else None
                break
            failure = stage.refuse()
            if failure is not None:
                break
            state.images_seen = before + step_images
            finite = stage.step(before)
            failure = state.nonfinite.record(finite, sources)
            if failure is not None:
                break
            if finite:
                state.metrics.add_all(terms)
            log.advance(state.images_seen)
            last = state.images_seen >= total
            if due(config.log.every, before, state.images_seen) or last:
                values = runtime.mean(state.metrics.take()) | stage.figures()
                values |= {"learning_rate": rate, "nonfinite": float(state.nonfinite.count)}
                log.metrics(state.images_seen, values)
            if due(config.checkpoint.every, before, state.images_seen) or last:
                save(stage)
            if due(config.log.pictures_every, before, state.images_seen) or last:
                examine(stage, log)
        if 0 < state.images_seen < total and not state.nonfinite.exceeded:
            save(stage)
    if failure is not None:
        raise failure
    runtime.barrier()
    return state.images_seen >= total


def accumulate(
    stage: Stage, stop: StopRequest, batches: Iterator[Batch], log: RunLog
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """The gradients of one step: (the terms of each micro-batch, where its images came from)."""
    train, runtime, before = stage.config.train, stage.runtime, stage.state.images_seen
    terms: list[dict[str, Tensor]] = []
    sources: list[str] = []
    for micro in range(train.accumulate):
        batch = runtime.fetch(stop, batches)
        stage.received(batch, log)
        sources += batch.files or [f"position {position}" for position in batch.positions]
        runtime.seed_step(stage.config.seed, before + micro * train.batch_size * runtime.ranks)
        with runtime.last_micro_step(micro == train.accumulate - 1, *stage.networks):
            terms.append(stage.accumulate(batch))
    return terms, sources


def examine(stage: Stage, log: RunLog) -> None:
    """On the first process; whatever goes wrong here ends no run."""
    if not stage.runtime.main:
        return
    try:
        stage.examine(log)
    except Exception as error:
        log.warn(f"no held-out figures and pictures this time: {type(error).__name__}: {error}")


def export(stage: Stage) -> None:
    """model/, whole or as it was."""
    if stage.runtime.main:
        replace_directory(stage.run / "model", "model", stage.save_model, **stage.about())


def save(stage: Stage) -> None:
    """The exported model and a checkpoint."""
    export(stage)  # first: a kill in between only repeats work
    state, checkpoint = stage.state, stage.config.checkpoint
    if stage.runtime.main:
        save_checkpoint(stage.run, state.images_seen, state.state_dict())
        prune(stage.run, checkpoint.keep_last, checkpoint.keep_every, per_step(stage.config.train, stage.runtime))
    stage.runtime.barrier()
