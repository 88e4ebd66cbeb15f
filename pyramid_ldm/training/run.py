"""The run directory: claiming, locking and re-opening it, and where a run comes from."""

import contextlib
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pyramid_ldm import __version__
from pyramid_ldm.config import load_saved, save_config
from pyramid_ldm.config.base import differences
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import read_json, write_atomic, write_json
from pyramid_ldm.ownership import claim, held, keep_apart
from pyramid_ldm.training.checkpoint import checkpoint_directories
from pyramid_ldm.training.runtime import Runtime


@contextlib.contextmanager
def open_run(config: Any, inputs: dict[str, Path | None], runtime: Runtime) -> Iterator[Path]:
    """Creates or re-opens `config.run_dir` and keeps other commands off it.

    Args:
        inputs: what the run reads, by the name the user knows it by; none of it may lie inside the run or around it.

    Raises UserError where the directory is not a run of ours, another command has it, or it holds a run of another
    config.
    """
    run = Path(config.run_dir)
    keep_apart(run, "run_dir", inputs)
    if runtime.main:
        claim(run, "run", "run_dir")
    with held(run, runtime.main):
        if checkpoint_directories(run):
            refuse_other_config(run, load_saved(type(config), run / "config.yaml"), config)
        runtime.barrier()  # every process has looked before the first one writes
        yield run


def record_start(run: Path, config: Any, runtime: Runtime, images_seen: int, data: str) -> None:
    """Writes config.yaml and adds this start to provenance.json."""
    if not runtime.main:
        return
    path = run / "provenance.json"
    starts: Any = []
    with contextlib.suppress(UserError):  # it only records
        starts = read_json(path, "")
    write_json(
        path, [*(starts if isinstance(starts, list) else []), describe_start(config, runtime, images_seen, data)]
    )
    write_atomic(run / "config.yaml", lambda temporary: save_config(config, temporary))


def refuse_other_config(run: Path, before: Any, now: Any) -> None:
    """UserError naming the first key that differs and may not."""
    for key, old, new in differences(before, now):
        raise UserError(f"{run}: was started with {key}={old}, now {new}; use a new run_dir, or the old value")


def refuse_other_step(run: Path, before: int, config: Any, runtime: Runtime) -> None:
    """UserError where a step would not see as many images as those before."""
    train = config.train
    now = train.batch_size * train.accumulate * runtime.ranks
    if now == before:
        return
    fitting, rest = divmod(before, train.batch_size * runtime.ranks)
    remedy = f"train.accumulate={fitting}" if rest == 0 and fitting else "train.batch_size and train.accumulate"
    raise UserError(
        f"{run}: every step so far saw {before} images, now {train.batch_size} (train.batch_size) x {train.accumulate} "
        f"(train.accumulate) x {runtime.ranks} (processes) = {now}; set {remedy} so that it stays {before}"
    )


def describe_start(config: Any, runtime: Runtime, images_seen: int, data: str) -> dict[str, Any]:
    """What a result's reader wants to know of how it was made."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "images_seen": images_seen,
        "pyramid_ldm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": str(runtime.device),
        "precision": "bf16" if runtime.bf16 else "fp32",
        "processes": runtime.ranks,
        "batch_size": config.train.batch_size,
        "accumulate": config.train.accumulate,
        "learning_rate": config.train.learning_rate,
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "argv": sys.argv,
        "data_fingerprint": data,
    }


def git_commit() -> str | None:
    """The commit of the source tree the package runs from, if it is one."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
