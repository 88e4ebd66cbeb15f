"""Runs items in processes of their own, and survives their deaths."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import median

from bench.results import Row
from bench.settings import Item, Settings

TOOLS = Path(__file__).resolve().parents[1]
Say = Callable[[str], None]
POLL = 0.2  # seconds


def run_items(items: list[Item], settings: Settings, say: Say) -> list[Row]:
    """A row an item, in order."""
    rows: list[Row] = []
    for batch in batches(items, settings):
        rows += run_batch(batch, settings, say)
    return rows


def batches(items: list[Item], settings: Settings) -> Iterator[list[Item]]:
    """Items that share a process: one alone, or neighbours that do not mind; under --quick all."""

    def process(place: tuple[int, Item]) -> tuple[int, int | None]:
        number, item = place
        return (number if item.alone and not settings.quick else -1), None if settings.quick else item.threads

    for _, group in groupby(enumerate(items), process):
        yield [item for _, item in group]


def run_batch(items: list[Item], settings: Settings, say: Say) -> list[Row]:
    """Starts workers until every item has a row; the item at which one dies has its death as reason."""
    rows: list[Row] = []
    while len(rows) < len(items):
        todo = items[len(rows) :]
        found, reason = run_worker(todo, settings, say)
        rows += found
        if len(found) < len(todo):
            row = Row.of(todo[len(found)], status="failed", notes=[reason])
            say(line(row))
            rows.append(row)
    return rows


def run_worker(items: list[Item], settings: Settings, say: Say) -> tuple[list[Row], str]:
    """One worker process. Returns its rows, and why there are fewer than items."""
    threads = items[0].threads or settings.threads
    paths = [str(TOOLS), str(TOOLS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
    request = json.dumps({"settings": asdict(settings), "items": [item.to_json() for item in items]})
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="pyramid-bench-") as folder:
        out, errors = Path(folder) / "rows", Path(folder) / "stderr"
        out.touch()
        with errors.open("w") as stderr:
            worker = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", str(out)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr, env=environment, text=True,
            )  # fmt: skip
            try:
                assert worker.stdin is not None
                worker.stdin.write(request)
                worker.stdin.close()
                in_time = follow(worker, out, rows, settings.limit, say)
            finally:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait()
        if not in_time:
            return rows, f"given up after {settings.limit:g} s"
        return rows, death(worker.returncode, errors.read_text(errors="replace"))


def follow(worker: "subprocess.Popen[str]", out: Path, rows: list[Row], limit: float, say: Say) -> bool:
    """Collects rows until the worker ends; False where it took longer than `limit` for one of them."""
    last = time.monotonic()
    with out.open(encoding="utf-8") as lines:
        while True:
            ended = worker.poll() is not None
            while text := lines.readline():
                rows.append(Row(**json.loads(text)))
                say(line(rows[-1]))
                last = time.monotonic()
            if ended:
                return True
            if time.monotonic() - last > limit:
                return False
            time.sleep(POLL)


def death(code: int, stderr: str) -> str:
    """Why a worker ended early."""
    if code == -signal.SIGKILL:
        return "killed by the system, most likely for memory"
    last = stderr.strip().splitlines()[-1:] or [""]
    return f"the process ended with {code}: {last[0][:200]}"


def line(row: Row) -> str:
    """A row as one line of progress."""
    what = f"{row.section}: {row.group}: {row.name}"
    seconds = row.figures.get("seconds")
    if row.status == "measured" and seconds:
        return f"{what}: {median(seconds):.4g} s"
    return f"{what}: {row.status}{': ' if row.notes else ''}{'; '.join(row.notes)}"


def lacking(items: list[Item]) -> list[str]:
    """Packages that items need and that are not installed."""
    return sorted({item.needs for item in items if item.needs and find_spec(item.needs) is None})
