"""Which directories are ours. The only place that deletes, renames or replaces any.

A directory that we write holds `pyramid_ldm.json`, written before anything else, which says what kind it is. Nothing
without it, or of another kind, is replaced or deleted.
"""

import ctypes
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pyramid_ldm.errors import UserError
from pyramid_ldm.files import TEMPORARY, fsync_path, is_temporary, system_errors, temporary_name, write_json

MARKER = "pyramid_ldm.json"
LOCK = ".lock"
FORMAT = 1
NAMES = {
    "run": "a run directory", "model": "a model", "checkpoint": "a checkpoint", "shards": "a shard directory",
    "samples": "a folder of samples", "reconstructions": "a folder of reconstructions", "demo": "a demo's folder",
    "photographs": "a folder of photographs",
}  # fmt: skip
T = TypeVar("T")


def marker_of(directory: Path) -> dict[str, Any]:
    """What a directory's marker says; empty where there is none, or none that can be read."""
    try:
        found = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and str(found.get("kind")) in NAMES else {}


def kind_of(directory: Path) -> str | None:
    """Of which kind our directory is; None where it is not ours."""
    kind: str | None = marker_of(directory).get("kind")
    return kind


def claim(directory: Path, kind: str, option: str, **about: Any) -> None:
    """Makes a directory ours, or finds that it is: `directory` is missing, empty, or carries the marker of `kind`.

    Args:
        option: what the user gave it as, for the message.
        about: what a new marker also says.

    Raises UserError where it is somebody else's, or of another kind.
    """
    found = kind_of(directory)
    if found == kind:
        return
    if found is not None:
        raise UserError(f"{directory}: is {NAMES[found]}, not {NAMES[kind]}; give another {option}")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file; give a directory as {option}")
    if directory.is_dir() and any(not is_temporary(entry.name) for entry in directory.iterdir()):
        raise UserError(
            f"{directory}: is not empty and not {NAMES[kind]} of pyramid-ldm (it holds no {MARKER} that says so); give "
            f"another {option}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    mark(directory, kind, **about)


def mark(directory: Path, kind: str, **about: Any) -> None:
    """Writes, or writes again, the marker of a directory that is ours."""
    write_json(directory / MARKER, {"format": FORMAT, "kind": kind, **about})


def keep_apart(output: Path, option: str, inputs: dict[str, Path | None]) -> None:
    """UserError where an output lies inside an input or holds one; links are followed."""
    target = _real(output)
    for name, path in inputs.items():
        if path is None:
            continue
        source = _real(path)
        if target == source:
            raise UserError(f"{option} {output} and {name} {path} are the same place; give another {option}")
        if source in target.parents:
            raise UserError(f"{option} {output} lies inside {name} {path}; give a place outside of it")
        if target in source.parents:
            raise UserError(f"{name} {path} lies inside {option} {output}; give another {option}")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def claim_file(path: Path, option: str, ours: Callable[[Path], bool]) -> None:
    """UserError where a file that a command is about to write exists already and `ours(path)` does not hold, or cannot
    be written."""
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; give a file")
    if path.exists() and not ours(path):
        raise UserError(f"{option} {path}: exists, and pyramid-ldm did not write it; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def held(directory: Path, wanted: bool = True) -> Iterator[None]:
    """Keeps other commands off a directory that is ours, for as long as the context is open; nothing where not
    `wanted`. UserError where another command has it.

    A POSIX record lock: it ends with its process, however that ends, is not inherited by forked workers, and works over
    NFS.
    """
    if not wanted:
        yield
        return
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{directory}: another pyramid-ldm is writing there ({holder}); wait for it, or stop it"
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        clean(directory)
        yield
    finally:
        os.close(descriptor)


def clean(directory: Path) -> None:
    """Deletes what processes that were killed had been writing in a directory of ours. Only with the lock."""
    for entry in [*directory.iterdir(), *(inner for name in ("checkpoints", "images") if (directory / name).is_dir()
                                          for inner in (directory / name).iterdir())]:  # fmt: skip
        if not is_temporary(entry.name) or entry.is_symlink():
            continue
        if entry.is_file():
            if not _is_alive(entry.name):  # another command may be claiming the directory at this moment
                entry.unlink(missing_ok=True)
        elif _is_leftover(entry):
            target = entry.with_name(entry.name.removeprefix(".").rsplit(".", 2)[0])
            if target.is_dir():  # it may be what was there before, and hold what somebody put into it
                _keep_foreign(entry, target)
            _delete_tree(entry)


def _is_alive(name: str) -> bool:
    """Whether the process that a temporary name says is another one that lives here. POSIX alone: elsewhere a signal 0
    is not harmless, and there is no lock with which to clean."""
    number = int(name.removesuffix(TEMPORARY).rpartition(".")[2])
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _is_leftover(directory: Path) -> bool:
    """Whether a directory with a temporary name is one of ours: marked, or not yet."""
    return kind_of(directory) is not None or all(is_temporary(entry.name) for entry in directory.iterdir())


def replace_directory(target: Path, kind: str, write: Callable[[Path], None], **about: Any) -> None:
    """Builds a directory of `kind` with `write(temporary)`, then swaps it for `target`: a reader (`read_whole`) sees
    the old one or the new one. What somebody else put into the old one is moved over. The marker also says `about`.

    Raises UserError where `target` is not ours.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    previous = _previous(target)
    _recover(target, kind)
    for path in (target, previous):
        if path.is_symlink() or (path.exists() and kind_of(path) != kind):
            raise UserError(f"{path}: is not {NAMES[kind]} that pyramid-ldm wrote; move it away, it is not replaced")
    fresh = temporary_name(target)
    if fresh.is_dir() and _is_leftover(fresh):  # of a process that had our number
        _delete_tree(fresh)
    fresh.mkdir()
    swapped = False
    try:
        mark(fresh, kind)
        with system_errors(target):
            write(fresh)
        files = sorted(str(path.relative_to(fresh)) for path in fresh.rglob("*") if path.is_file())
        mark(fresh, kind, **about, files=files)
        for path in sorted(fresh.rglob("*"), reverse=True):
            fsync_path(path)
        fsync_path(fresh)
        if not target.exists():
            fresh.rename(target)
        elif _exchange(fresh, target):
            swapped = True
            fresh.rename(previous)
        else:
            target.rename(previous)
            fresh.rename(target)
        fsync_path(target.parent)
    finally:
        if fresh.exists() and not swapped:
            shutil.rmtree(fresh, ignore_errors=True)
    if previous.exists():
        _keep_foreign(previous, target)
        delete_directory(previous, kind)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _recover(target: Path, kind: str) -> None:
    """Ends a `replace_directory` that was killed at its renames."""
    previous = _previous(target)
    if kind_of(previous) != kind:
        return
    if target.exists():
        _keep_foreign(previous, target)
        delete_directory(previous, kind)
    else:
        previous.rename(target)


def _keep_foreign(old: Path, new: Path) -> None:
    """Moves the files over that are not among those that we wrote."""
    listed = marker_of(old).get("files")
    if not isinstance(listed, list):
        return
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old)
        if not path.is_dir() and str(name) not in listed and not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(new / name)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two directories in one step, where the system can: Linux, on most file systems."""
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None, use_errno=True)
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return bool(library.renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)
    return False


def delete_directory(path: Path, kind: str) -> None:
    """Deletes a directory of `kind`. UserError where it is not one."""
    if path.is_symlink() or kind_of(path) != kind:
        raise UserError(f"{path}: is not {NAMES[kind]} that pyramid-ldm wrote; it is not deleted")
    _delete_tree(path)


def _delete_tree(path: Path) -> None:
    """The marker last: whenever this is killed, what is left still says whose it is."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink(missing_ok=True)
    (path / MARKER).unlink(missing_ok=True)
    path.rmdir()


def delete_file(path: Path, kind: str) -> None:
    """Deletes a file in a directory of `kind`, if it is there. UserError where the directory is not one."""
    if kind_of(path.parent) != kind:
        raise UserError(f"{path.parent}: is not {NAMES[kind]} that pyramid-ldm wrote; nothing in it is deleted")
    path.unlink(missing_ok=True)


def read_whole(directory: Path, read: Callable[[Path], T], seconds: float = 10.0) -> T:
    """`read(directory)`, of one state of a directory that `replace_directory` may replace at any moment.

    Never writes. Where a process was killed between two renames, what it left behind is read.
    """
    end = time.monotonic() + seconds
    while True:
        home = directory if directory.exists() or not _previous(directory).exists() else _previous(directory)
        before = _identity(home)
        try:
            result = read(home)
        except Exception:
            if _identity(home) == before or time.monotonic() > end:
                raise
        else:
            if _identity(home) == before:
                return result
        time.sleep(0.005)


def _identity(directory: Path) -> tuple[int, ...] | None:
    try:
        found = directory.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns
