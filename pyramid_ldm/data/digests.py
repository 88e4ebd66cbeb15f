"""Hashes of whole files, remembered between commands: a folder of photographs is read once, not at every start."""

import errno
import hashlib
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pyramid_ldm.errors import UserError

RETRIES = (0.1, 0.5, 2.0)  # seconds before each further attempt
# What is wrong with one file rather than with the disk it lies on.
OF_THE_FILE = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
                         errno.ENAMETOOLONG, errno.ENXIO})  # fmt: skip
SETTLED = 2 * 10**9  # nanoseconds: a file that changed so lately may change again within one tick of its clock
T = TypeVar("T")


class UnreadableFileError(OSError):
    """One file that cannot be opened: gone, or without permission."""


def with_retries(path: Path, read: Callable[[], T]) -> T:
    """`read()`, again after a short while where the disk fails.

    Raises:
        UnreadableFileError: this file cannot be opened, however often one tries.
        UserError: the disk, or what is between, still fails.
    """
    for pause in (*RETRIES, None):
        try:
            return read()
        except OSError as error:
            if error.errno in OF_THE_FILE:
                raise UnreadableFileError(error.errno, error.strerror, str(path)) from None
            if pause is None:
                raise UserError(
                    f"{path}: cannot be read ({error.strerror or error}, {len(RETRIES) + 1} attempts); the disk or the "
                    f"network fails, the file may be whole; run again when it works"
                ) from None
            time.sleep(pause)
    raise AssertionError


@dataclass(frozen=True)
class Facts:
    """What is remembered of a file."""

    digest: str  # SHA-256 of all of its bytes, the first 32 hex digits
    note: str  # whatever `describe` said of it


def digest_of(content: bytes) -> str:
    """As `read_facts` has it."""
    return hashlib.sha256(content).hexdigest()[:32]


def read_facts(path: Path, describe: Callable[[Path], str]) -> Facts:
    """Reads the file whole."""
    with path.open("rb") as file:
        return Facts(hashlib.file_digest(file, "sha256").hexdigest()[:32], describe(path))


def cache_file() -> Path | None:
    """Where facts are kept; None where there is no place for it."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "pyramid_ldm" / "files.sqlite"
    except RuntimeError:  # no home
        return None


class FactsCache:
    """Facts by device, inode, size and both times of a file. Anything that fails here only costs time."""

    COLUMNS = "device, inode, size, changed, modified, kind"

    def __init__(self, kind: str) -> None:
        self.kind, self.connection = kind, None
        path = cache_file()
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.connection = sqlite3.connect(path, timeout=5)
                self.connection.execute(
                    f"create table if not exists facts_1 (device, inode, size, changed, modified, kind, digest, note, "
                    f"primary key ({self.COLUMNS})) without rowid"
                )
        except (OSError, sqlite3.Error):
            self.connection = None

    def key(self, found: os.stat_result) -> tuple[int | str, ...]:
        """What tells whether a file is the same; an edit that sets the file's time back still changes `ctime`."""
        return found.st_dev, _signed(found.st_ino), found.st_size, found.st_ctime_ns, found.st_mtime_ns, self.kind

    def get(self, found: os.stat_result) -> Facts | None:
        """What is known."""
        if self.connection is None:
            return None
        try:
            where = " and ".join(f"{name} = ?" for name in self.COLUMNS.split(", "))
            row = self.connection.execute(f"select digest, note from facts_1 where {where}", self.key(found)).fetchone()
        except sqlite3.Error:
            return None
        return Facts(*map(str, row)) if row else None

    def put(self, rows: Sequence[tuple[os.stat_result, Facts]]) -> None:
        """Remembers those that have not been touched just now."""
        settled = time.time_ns() - SETTLED
        values = [
            (*self.key(found), facts.digest, facts.note)
            for found, facts in rows
            if max(found.st_ctime_ns, found.st_mtime_ns) < settled
        ]
        if self.connection is None or not values:
            return
        try:
            with self.connection:
                self.connection.executemany(f"insert or replace into facts_1 values ({', '.join('?' * 8)})", values)
        except sqlite3.Error:
            self.connection = None


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number  # SQLite's integers


def facts_of(
    paths: Sequence[Path], kind: str, describe: Callable[[Path], str], what: str
) -> list[Facts | UnreadableFileError]:
    """Facts of every file, in order: remembered ones, the others by reading them whole, a few at once.

    Args:
        kind: what `describe` describes; facts of different kinds do not mix.
        what: what to call the work that may take long.

    Raises UserError where a disk fails.
    """
    cache, found = FactsCache(kind), list[Facts | UnreadableFileError | None]([None] * len(paths))
    unknown: list[int] = []
    stats: dict[int, os.stat_result] = {}
    for i, path in enumerate(paths):
        try:
            stats[i] = with_retries(path, path.stat)
            found[i] = cache.get(stats[i])
        except UnreadableFileError as error:
            found[i] = error
        if found[i] is None:
            unknown.append(i)

    def read(i: int) -> Facts | UnreadableFileError:
        try:
            return with_retries(paths[i], lambda: read_facts(paths[i], describe))
        except UnreadableFileError as error:
            return error

    began = time.monotonic()
    said = began
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            for start in range(0, len(unknown), 256):
                part = unknown[start : start + 256]
                for i, facts in zip(part, pool.map(read, part), strict=True):
                    found[i] = facts
                cache.put([(stats[i], one) for i in part if isinstance(one := found[i], Facts)])
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    done = start + len(part)
                    left = (said - began) / done * (len(unknown) - done)
                    print(f"{what}: {done} of {len(unknown)} files read, {left:.0f} s left", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [facts for facts in found if facts is not None]
