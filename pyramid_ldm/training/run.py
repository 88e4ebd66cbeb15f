"""The run directory: opening it, refusing to resume under another config, and the loader that feeds a loop."""

import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from pyramid_ldm import __version__
from pyramid_ldm.config import load_saved, save_config
from pyramid_ldm.data.order import PositionSampler
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import write_atomic, write_json
from pyramid_ldm.training.runtime import Runtime

# May differ from one start of a run to the next; everything else is what the run *is*.
MUTABLE = ("device", "compile", "precision", "train.images", "train.regions", "train.region_size",
           "train.max_nonfinite", "data.workers", "data.root",
           "data.shards", "data.max_bad_fraction", "ema.export",
           "log.", "checkpoint.", "samples.", "run_dir")  # fmt: skip

Batch = TypeVar("Batch")


def open_run(config: Any, data_fingerprint: str, runtime: Runtime) -> Path:
    """Creates or re-opens `config.run_dir`; writes config.yaml and provenance.json.

    Raises UserError where the directory holds a run with another config or other data.
    """
    run = Path(config.run_dir)
    saved, provenance = run / "config.yaml", run / "provenance.json"
    if saved.is_file() and (run / "checkpoints").is_dir():
        refuse_other_config(run, load_saved(type(config), saved), config)
        if provenance.is_file():
            before = json.loads(provenance.read_text()).get("data_fingerprint")
            if before != data_fingerprint:
                raise UserError(
                    f"{run}: was started on other data ({before}, now {data_fingerprint}); use a new run_dir"
                )
    elif run.exists() and any(run.iterdir()) and not saved.is_file():
        raise UserError(f"{run}: is not empty and not a run; give another run_dir")
    runtime.barrier()  # every process has looked before the first one writes
    if runtime.main:
        run.mkdir(parents=True, exist_ok=True)
        write_atomic(saved, lambda path: save_config(config, path))
        write_json(provenance, describe_provenance(data_fingerprint))
    runtime.barrier()
    return run


def refuse_other_config(run: Path, before: Any, now: Any) -> None:
    """UserError naming the first key, outside MUTABLE, that differs."""
    old, new = flat_keys(dataclasses.asdict(before)), flat_keys(dataclasses.asdict(now))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(MUTABLE):
            raise UserError(
                f"{run}: was started with {key}={old.get(key)}, now {new.get(key)}; use a new run_dir, or the old value"
            )


def flat_keys(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.images": 100, ...}; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, child in value.items():
        found |= flat_keys(child, f"{prefix}.{key}" if prefix else key)
    return found


def describe_provenance(data_fingerprint: str) -> dict[str, Any]:
    """What a result's reader wants to know of how it was made."""
    return {
        "pyramid_ldm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "argv": sys.argv,
        "data_fingerprint": data_fingerprint,
    }


def git_commit() -> str | None:
    """The commit of the source tree the package runs from, if it is one."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def batches(
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], Batch],
    *,
    start: int,
    stop: int,
    batch_size: int,
    workers: int,
    runtime: Runtime,
) -> Iterator[Batch]:
    """Micro-batches of this rank from position `start` to `stop`, prepared ahead by `workers` processes."""
    sampler = PositionSampler(start=start, stop=stop, batch_size=batch_size, rank=runtime.rank, ranks=runtime.ranks)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=runtime.device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=_single_thread,
    )
    return iter(loader)


def _single_thread(worker: int) -> None:
    import signal

    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; the loop decides when its workers end. Not so SIGTERM: it is how Python
    # ends workers at exit.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
