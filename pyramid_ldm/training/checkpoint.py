"""Training state on disk: atomic, strict, versioned, with fallback to the one before.

`checkpoints/NNNNNNNN/` (images seen) holds `state.pt` and `manifest.json` with its size and hash. A checkpoint is
built under a temporary name and renamed, so one that has its name is whole; the manifest tells whether it still is.
"""

from pathlib import Path
from typing import Any

import torch

from pyramid_ldm.errors import UserError
from pyramid_ldm.files import read_json, sha256, write_json
from pyramid_ldm.ownership import delete_directory, kind_of, replace_directory
from pyramid_ldm.training.schedule import due

FORMAT = 2


def checkpoint_directories(run: Path) -> list[Path]:
    """Every complete checkpoint, oldest first: by number, whatever its digits."""
    found = [p for p in (run / "checkpoints").glob("[0-9]*") if p.name.isdecimal() and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def save_checkpoint(run: Path, images_seen: int, state: dict[str, Any]) -> Path:
    """Writes one checkpoint; state holds tensors and plain values only."""
    target = run / "checkpoints" / f"{images_seen:08d}"

    def write(directory: Path) -> None:
        file = directory / "state.pt"
        torch.save(state, file)
        write_json(
            directory / "manifest.json",
            {
                "format": FORMAT,
                "images_seen": images_seen,
                "files": {file.name: {"size": file.stat().st_size, "sha256": sha256(file)}},
            },
        )

    replace_directory(target, "checkpoint", write)
    return target


def load_newest(run: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """(state of the newest whole checkpoint or None, a line for every broken one that was passed over).

    Raises UserError where checkpoints exist and none is whole, or one is of another version.
    """
    skipped: list[str] = []
    for directory in reversed(checkpoint_directories(run)):
        fault = find_fault(directory)
        if fault is None:
            state: dict[str, Any] = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
            return state, skipped
        skipped.append(f"{directory}: {fault}; falling back to the checkpoint before it")
    if skipped:
        raise UserError(f"{run}: no checkpoint is whole ({skipped[0].split(';')[0]}); move the run away to start anew")
    return None, []


def find_fault(directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_json(directory / "manifest.json", "")
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{directory}: checkpoint format {manifest['format']}, this version reads {FORMAT}; finish the run "
                f"with the version that began it, or begin anew in another run_dir"
            )
        for name, entry in manifest["files"].items():
            file = directory / name
            if not file.is_file() or file.stat().st_size != entry["size"]:
                return f"{name} is missing or truncated"
            if sha256(file) != entry["sha256"]:
                return f"{name} does not match its hash"
    except (UserError, KeyError, TypeError, AttributeError) as error:
        if "checkpoint format" in str(error):
            raise
        return "manifest.json is missing or damaged"
    return None


def prune(run: Path, keep_last: int, keep_every: int, per_step: int = 1) -> None:
    """Deletes all but the newest `keep_last` checkpoints and those at multiples of `keep_every` images, rounded up to
    whole steps of `per_step` images. What is not a checkpoint of ours stays."""
    ours = [directory for directory in checkpoint_directories(run) if kind_of(directory) == "checkpoint"]
    for directory in ours[:-keep_last]:
        images_seen = int(directory.name)
        if not due(keep_every, images_seen - per_step, images_seen):
            delete_directory(directory, "checkpoint")
