"""A process that measures items: `python -m bench.worker OUT`, with settings and items as JSON on stdin.

Writes one JSON line an item to OUT, as soon as it is known.
"""

import json
import resource
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from bench.results import Row
from bench.sections import SECTIONS
from bench.settings import Item, Settings, Unavailable
from pyramid_ldm.allocator import keep_freed_memory

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "cannot allocate memory", "bad_alloc")


def prepare(settings: Settings) -> None:
    """The process settings that everything is measured under."""
    keep_freed_memory()
    torch.manual_seed(0)
    if settings.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.precision != "fp32"
        return
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if anything is killed for memory, this process
    with suppress(OSError, ValueError, KeyError, StopIteration):
        # Allocations beyond what is free now fail with a message, instead of pushing others out of memory.
        data = kibibytes("/proc/self/status", "VmData") + kibibytes("/proc/meminfo", "MemAvailable")
        resource.setrlimit(resource.RLIMIT_DATA, (data * 1024, resource.RLIM_INFINITY))


def kibibytes(path: str, name: str) -> int:
    """A line of a proc file."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(name + ":"))


def measure_item(item: Item, settings: Settings) -> Row:
    """An item's row, whatever happens."""
    torch.set_num_threads(item.threads or settings.threads)
    row = Row.of(item)
    try:
        row.figures = SECTIONS[item.section].measure(item, settings)
        row.status = row.figures.pop("status", row.status)
        row.note(row.figures.pop("note", ""))
    except Unavailable as reason:
        row.status = "skipped"
        row.note(str(reason))
    except Exception as error:
        row.status = "failed"
        lines = str(error).strip().splitlines()
        text = lines[0] if lines else ""
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY):
            row.note(f"does not fit in memory ({text.split('DefaultCPUAllocator: ')[-1][:120]})")
        else:
            row.note(f"{type(error).__name__}: {text[:200]}")
            traceback.print_exc()
    return row


def main() -> int:
    request = json.load(sys.stdin)
    settings = Settings(**request["settings"])
    prepare(settings)
    with Path(sys.argv[1]).open("a", encoding="utf-8") as out:
        for content in request["items"]:
            row = measure_item(Item(**content), settings)
            print(json.dumps(asdict(row)), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
