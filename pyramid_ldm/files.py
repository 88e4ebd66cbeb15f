"""Writing files so that a reader never sees half of one, and reading them with errors a person can use."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyramid_ldm.errors import UserError


def fsync_path(path: Path) -> None:
    """Flushes a file or a directory entry to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such thing
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_as_oserror(path: Path) -> Iterator[None]:
    """Raises OSError(ENOSPC) naming `path` where a writer failed on a full disk.

    safetensors and torch.save report one as errors of their own, which say nothing a user could act on.
    """
    try:
        yield
    except Exception as error:
        if "No space left" in str(error) or shutil.disk_usage(path.parent).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)`, then puts the result in place of `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk_as_oserror(path):
            write(temporary)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Atomic `path.write_text`."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """The parsed file, or a UserError that names it and says `remedy`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {remedy}") from None


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Builds a directory with `write(temporary)`, then swaps it for `target`.

    A directory cannot be renamed over another, so for one moment the old one is `.NAME.previous`; `recover_directory`
    puts it back if the process died exactly there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(target)
    fresh, previous = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.previous")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        with full_disk_as_oserror(target):
            write(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    for path in sorted(fresh.rglob("*"), reverse=True):
        fsync_path(path)
    fsync_path(fresh)
    if target.exists():
        target.rename(previous)
    fresh.rename(target)
    fsync_path(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover_directory(target: Path) -> None:
    """Undoes a `replace_directory` that was killed between its two renames."""
    previous = target.with_name(f".{target.name}.previous")
    if previous.exists():
        if target.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(target)
