#!/usr/bin/env python3
"""What the toolkit costs, next to its peers, in one run on one machine.

    tools/benchmark.py --out bench/                      # everything; hours on a CPU
    tools/benchmark.py --only decode flow --budget 30
    tools/benchmark.py --quick                           # tiny networks: does it run at all?

Prints a table a section, and writes benchmark.json and BENCHMARKS.md into --out after each. Weights are random on
both sides. Heavy items run in a process of their own: one that does not fit in memory or time is said to, with its
reason, and the rest goes on. The peers are diffusers' classes: pip install -e '.[bench]'.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from bench.machine import describe
from bench.report import Report
from bench.sections import SECTIONS
from bench.settings import Settings


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", default=list(SECTIONS),
                        help=f"of {', '.join(SECTIONS)}; ceilings come along where shares are shown")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16 is autocast")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of an item, after one to warm up")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timed runs an item; one at least")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which an item is given up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--megapixels", type=float, default=0.0, help="compare peers at images of at least so many")
    parser.add_argument("--quick", action="store_true", help="tiny networks and images: a smoke test")
    parser.add_argument("--out", type=Path, help="folder for benchmark.json and BENCHMARKS.md")
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: PyTorch {torch.__version__} sees no CUDA device here")
    if min(args.repeats, args.threads) < 1 or min(args.budget, args.limit) <= 0:
        parser.error("--repeats and --threads are at least 1, --budget and --limit above 0")
    return args


def chosen_sections(only: list[str]) -> list[str]:
    """In the order of the output, with the ceilings that shares refer to."""
    wanted = set(only)
    if any(SECTIONS[name].needs_ceiling for name in wanted):
        wanted.add("ceilings")
    return [name for name in SECTIONS if name in wanted]


def main() -> int:
    args = parse()
    settings = Settings(
        device=args.device,
        precision=args.precision,
        repeats=args.repeats,
        budget=args.budget,
        limit=args.limit,
        threads=args.threads,
        quick=args.quick,
        smallest=int(args.megapixels * 1e6),
    )
    report = Report(settings, describe(settings), args.out)
    report.run(chosen_sections(args.only))
    return 0


if __name__ == "__main__":
    sys.exit(main())
