"""Writing files so that a reader never sees half of one, and reading them with errors a person can use."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyramid_ldm.errors import UserError

TEMPORARY = ".tmp"  # ends the name of what is being written; it also begins with a dot and holds a process's number


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
def system_errors(path: Path) -> Iterator[None]:
    """Raises an OSError naming `path` where a writer failed because of the disk.

    safetensors and torch.save report one as errors of their own, which say nothing a user could act on.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if "No space left" in str(error) or shutil.disk_usage(path.parent).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        for number in (errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EMFILE):
            if f"os error {number}" in str(error).lower() or os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def temporary_name(path: Path) -> Path:
    """Where to write what will become `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


def is_temporary(name: str) -> bool:
    """Whether a file or directory of this name was being written when a process ended."""
    return name.startswith(".") and name.endswith(TEMPORARY) and name[: -len(TEMPORARY)].rpartition(".")[2].isdigit()


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)`, then puts the result in place of `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with system_errors(path):
            write(temporary)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        with contextlib.suppress(OSError):  # what went wrong before says more
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Atomic `path.write_text`."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Atomic CSV, in UTF-8; names that are not have their own bytes."""
    text = io.StringIO()
    csv.writer(text).writerows([columns, *rows])
    data = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def append_line(path: Path, record: dict[str, Any]) -> None:
    """One JSON line in one write, so that several processes may append; on a line of its own also after one that was
    cut off. It is not flushed to the disk: a power cut may lose the last lines."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        begun = size > 0 and file.read(1) != b"\n"
        file.write(b"\n" * begun + json.dumps(record).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none where there is no file. A line that was cut off is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    records = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def read_json(path: Path, remedy: str) -> Any:
    """The parsed file, or a UserError that names it and says `remedy`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {remedy}") from None
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise UserError(f"{path}: not valid JSON ({error}); {remedy}") from None


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """With a hash of itself, which `read_sealed` checks."""
    return content | {"check": _check(content)}


def _check(content: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in content.items() if key != "check"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_sealed(path: Path, remedy: str, newest: int) -> dict[str, Any]:
    """The `sealed` content of a JSON file with a `format` of 1 (without a hash) to `newest`. UserError where it is not
    what was written, or of a later format."""
    content = read_json(path, remedy)
    number = content.get("format") if isinstance(content, dict) else None
    if isinstance(number, int) and not 1 <= number <= newest:
        raise UserError(f"{path}: format {number}, this version reads 1 to {newest}; install the version that wrote it")
    if not isinstance(number, int) or (number > 1 and content.get("check") != _check(content)):
        raise UserError(f"{path}: damaged; {remedy}")
    found: dict[str, Any] = content
    return found


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
