#!/usr/bin/env python3
"""All that needs a GPU, in one command of under ten minutes, on a machine that has PyTorch and no network.

Here, once (17 MiB of wheels, in a folder that git ignores; --python is the other machine's):

    python3 tools/gpu_check.py --collect .whl --python 3.12

There, in a copy of this tree with that folder in it:

    python3 tools/gpu_check.py --wheels .whl --out "${OUT:-gpu_check}"

To try every part without a GPU: `python tools/gpu_check.py --device cpu --quick`.

Runs the tests marked gpu, profiles both training steps and a decode, runs the benchmark, most important lines first,
and trains both stages on landscapes of 1024x2048 for a moment to draw two more. Each part is a process with a limit:
one that fails or is too slow takes no other with it. --out is written as it goes, seven files without folders:
summary.md and summary.json, log.txt (what the parts printed), profile.txt, pictures.jpg, benchmark.json and
BENCHMARKS.md. No data are needed: landscapes are drawn there; VGG and the benchmark's networks have random weights.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "numpy", "pillow"}  # come with PyTorch's images, as do torchvision and scipy
# What those in pyproject.toml import here (tensorboard's server is not among it), pytest, and the benchmark's peers
# (they need huggingface_hub besides, which comes with transformers; without it their lines say so).
MORE = ("pyyaml", "absl-py", "protobuf", "markdown", "pytest", "iniconfig", "pluggy", "pygments", "packaging",
        "diffusers", "importlib_metadata", "zipp", "regex")  # fmt: skip
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
MOST = 45  # MiB of wheels
RESERVE = 5.0  # seconds for the end
PICTURES = 2.0  # ninths of the time for training and drawing, which come last
# The benchmark's sections in order of importance, first these groups of theirs; then the other groups and sections.
SECTIONS_FIRST = ("ceilings", "decode", "flow", "train", "end_to_end", "encode")
GROUPS_FIRST = ("2048x2048", "bf16", "stage")


class Check:
    """Runs parts one after another in what is left of the time."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.work, self.out = work, args.out.resolve()
        self.ends = time.monotonic() + 60 * args.minutes
        self.outcomes: list[dict[str, Any]] = []
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / "log.txt").open("w", encoding="utf-8")
        paths = [work / "site", ROOT, ROOT / "tools", *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONUNBUFFERED": "1"}

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic() - RESERVE

    def start(self, words: Sequence[object]) -> "subprocess.Popen[str]":
        """`python WORDS`, a process group of its own that hears Ctrl-C even if we, in the background, do not."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, env=self.environment, stdout=self.log,
            stderr=subprocess.STDOUT, text=True, process_group=0,
        )  # fmt: skip

    def part(self, name: str, seconds: float, *words: object) -> bool:
        """`python WORDS` for at most `seconds`; then Ctrl-C, which training takes as its end."""
        limit, began = min(seconds, self.left()), time.monotonic()
        if limit < 3:
            self.note(name, "not run: no time left", 0.0, "")
            return False
        print(f"\n==== {name}: python {' '.join(map(str, words))}", file=self.log, flush=True)
        print(f"{name} (at most {limit:.0f} s) ...", flush=True)
        process = self.start(words)
        try:
            code = process.wait(limit)
            status = "done" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            code = stop(process, min(30.0, max(2.0, self.left())))
            status = f"{'stopped' if code in (0, 130) else 'killed'} after {limit:.0f} s"
        lines = [line for line in (self.out / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
        self.note(name, status, time.monotonic() - began, lines[-1][:200])
        return code in (0, 130)

    def note(self, part: str, status: str, seconds: float, last_line: str) -> None:
        """Keeps how a part went, and writes the summary."""
        print(f"  {status}, {seconds:.0f} s: {last_line}", flush=True)
        self.outcomes.append({"part": part, "status": status, "seconds": round(seconds, 1), "last_line": last_line})
        machine = f"Python {platform.python_version()}, PyTorch {installed('torch')}, {os.cpu_count()} cores"
        content = json.dumps({"machine": machine, "parts": self.outcomes}, indent=1)
        (self.out / "summary.json").write_text(content + "\n", encoding="utf-8")
        table = [["part", "outcome", "seconds", "last line"], ["---"] * 4]
        table += [[str(value).replace("|", "/") for value in outcome.values()] for outcome in self.outcomes]
        lines = ["# What the GPU check found", "", machine, "", *(f"| {' | '.join(cells)} |" for cells in table)]
        (self.out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def stop(process: "subprocess.Popen[str]", patience: float) -> int:
    """Ctrl-C, and after `patience` seconds the end of the whole group. Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGKILL):  # the second for whoever did not listen
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(patience)
    return process.wait()


def installed(name: str) -> str | None:
    """A version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def collect(folder: Path, python: str) -> int:
    """Downloads what pyproject.toml asks for, without the heavy ones, and MORE: wheels for Linux on x86-64."""
    own: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [text for text in own if re.split("[<>=]", text)[0] not in HEAVY] + list(MORE)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    (folder / ".gitignore").write_text("*\n")
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation",
         "cp", "--python-version", python, *platforms, "--dest", str(folder), *wanted],
        check=True,
    )  # fmt: skip
    wheels = sorted(folder.glob("*.whl"))
    size = sum(path.stat().st_size for path in wheels) / 2**20
    print(f"{len(wheels)} wheels, {size:.1f} MiB in {folder}")
    return int(size > MOST)


def run_all(check: Check, args: argparse.Namespace) -> None:
    """The parts. The benchmark takes what the tests leave."""
    minute = 60 * args.minutes / 9
    wheels = sorted(args.wheels.resolve().glob("*.whl")) if args.wheels else []
    wheels = [path for path in wheels if installed(path.name.split("-")[0]) is None]
    if wheels:
        check.part("wheels", minute, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
                   "--no-cache-dir", "--root-user-action=ignore", "--target", check.work / "site", *wheels)  # fmt: skip
    look = "import torch; print(torch.cuda.get_device_name())"
    if args.device == "cuda" and not check.part("device", minute, "-c", look):
        return
    own = ["tools/gpu_check.py", "--device", args.device, "--out", check.out, "--work", check.work]
    own += ["--quick"] * args.quick + ["--part"]
    landscapes = check.start([*own, "scenes"])  # meanwhile: the GPU does not wait for it
    tests = ["-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-v", "-s", "-p", "no:cacheprovider", "--durations=8"]
    tests += ["-k", "not 2048 and not ompiled"] * args.quick  # a minute and a half
    check.part("tests", 3 * minute, *tests, "--accelerator", args.device)
    check.part("profile", 0.8 * minute, *own, "profile")
    seconds = check.left() - PICTURES * minute
    check.part("benchmark", seconds, *own, "benchmark", "--seconds", f"{seconds - 5:.0f}")
    with suppress(subprocess.TimeoutExpired):
        landscapes.wait(max(1.0, 0.5 * minute))
    stop(landscapes, 0.1)
    draw(check, args, minute)
    check.part("pictures", minute, *own, "pictures")


def draw(check: Check, args: argparse.Namespace, minute: float) -> None:
    """The README's four commands on landscapes, for a moment. L1 alone: VGG's weights are not there."""
    work, cli, device = check.work, ("-m", "pyramid_ldm"), f"device={args.device}"
    name, images, workers = ("demo", (16, 32), 0) if args.quick else ("scapes2k", (600, 6400), 8)
    configs = [f"{kind}_configs/{name}.yaml" for kind in ("autoencoder", "diffusion")]
    shared = ("ema.widths=[0.05]", "ema.export=0.05", "checkpoint.every=1000000000", "log.pictures=2", device,
              f"data.workers={workers}")  # fmt: skip
    check.part("train-ae", 0.7 * minute, *cli, "train-ae", configs[0], f"data.root={work / 'photos'}",
               f"run_dir={work / 'ae'}", f"train.images={images[0]}", "train.batch_size=4", "train.accumulate=1",
               "train.learning_rate=3e-4", "train.warmup=40", "loss.perceptual.weight=0", "loss.gan.weight=0",
               f"log.every={images[0] // 8}", f"log.pictures_every={images[0] // 3}", *shared)  # fmt: skip
    check.part("encode", 0.4 * minute, *cli, "encode", work / "ae", "--data", work / "photos", "--out",
               work / "latents", "--workers", workers, "--device", args.device)  # fmt: skip
    check.part("train-flow", 0.4 * minute, *cli, "train-flow", configs[1], f"data.shards={work / 'latents'}",
               f"run_dir={work / 'flow'}", f"train.images={images[1]}", "train.batch_size=16", "train.warmup=320",
               f"log.every={images[1] // 8}", "log.pictures_every=1000000000", "samples.steps=20", *shared)  # fmt: skip
    check.part("sample", 0.4 * minute, *cli, "sample", work / "flow", "--num", 2, "--solver", "euler", "--steps", 50,
               "--out", work / "samples", "--device", args.device)  # fmt: skip


# The parts that are no command of their own; each runs in its own process, where everything is installed.


def scenes(args: argparse.Namespace) -> None:
    """Photographs to train on."""
    from pyramid_ldm.demo.pictures import render_photographs

    render_photographs(args.work / "photos", *((8, (64, 128)) if args.quick else (48, (1024, 2048))))


def profile(args: argparse.Namespace) -> None:
    """A training step of each stage and a decode: where the time goes, and where the host waits."""
    import torch
    from bench import ours
    from bench.settings import Settings
    from bench.training import StageOne, StageTwo, stage_one_config
    from bench.worker import prepare
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    settings, cuda = Settings(args.device, quick=args.quick), args.device == "cuda"
    prepare(settings)

    def decode() -> Callable[[], object]:
        subject = ours.decoder_builder("people2k", settings)(torch.device(args.device))
        subject.model.requires_grad_(False).to(memory_format=torch.channels_last)
        return settings.inference()(lambda: subject.call(*subject.inputs))

    cases: dict[str, Callable[[], Callable[[], object]]] = {
        "stage one, scapes2k, batch 1": lambda: StageOne(stage_one_config("scapes2k", settings, 1), settings).run,
        "stage two, scapes2k, batch 16": lambda: StageTwo(ours.flow_config("scapes2k", settings), settings, 16).run,
        "decode, people2k, batch 1": decode,
    }
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    with (args.out / "profile.txt").open("w", encoding="utf-8") as out:
        for name, build in cases.items():
            call = build()
            for _ in range(3):
                call()
            with record(activities=activities) as found:
                call()
            table = found.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60)
            print(f"{name}\n{table}\n{waits(call) if cuda else ''}\n", file=out, flush=True)
            print(f"profiled: {name}", flush=True)


def waits(call: Callable[[], object]) -> str:
    """Lines at which the host waited for the GPU during a call, as far as PyTorch tells, with counts."""
    import torch

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{w.filename}:{w.lineno}" for w in found if "synchroniz" in str(w.message))
    return "the host waited at\n" + "\n".join(f"  {count:4d} x {place}" for place, count in places.most_common(20))


def pictures(args: argparse.Namespace) -> None:
    """Originals over what the autoencoder made of them, over samples, in one JPEG."""
    from PIL import Image

    grids = sorted((args.work / "ae/images").glob("reconstructions-*.png"))[-1:]
    samples = sorted((args.work / "samples").glob("seed*.png"))[:2]
    sheet = Image.new("RGB", (2048, 1536), "white")
    for path in grids:
        sheet.paste(Image.open(path).convert("RGB").resize((2048, 1024)), (0, 0))
    for i, path in enumerate(samples):
        sheet.paste(Image.open(path).convert("RGB").resize((1024, 512)), (1024 * i, 1024))
    sheet.save(args.out / "pictures.jpg", quality=80)
    print(f"{len(grids)} grid of originals over reconstructions, {len(samples)} samples")


def chunks(settings: Any) -> Iterator[tuple[str, list[Any]]]:
    """(section, items that may share a process), the most important first."""
    from bench.sections import SECTIONS

    first, rest = [], []
    words = [word.replace("2048", str(settings.side(2048))) for word in GROUPS_FIRST]
    for name in [*SECTIONS_FIRST, *(name for name in SECTIONS if name not in SECTIONS_FIRST)]:
        parts: tuple[list[Any], list[Any]] = [], []
        for item in SECTIONS[name].items(settings):
            early = name in SECTIONS_FIRST and any(word in item.group for word in words)
            parts[not early].append(replace(item, alone=False))
        first.append((name, parts[0]))
        rest.append((name, parts[1]))
    yield from (chunk for chunk in (first[:2] if settings.quick else first + rest) if chunk[1])


def benchmark(args: argparse.Namespace) -> None:
    """tools/benchmark.py for somebody in a hurry: other order, several items a process, and an end."""
    from bench.machine import describe
    from bench.report import Report
    from bench.runner import lacking, run_items
    from bench.settings import Settings

    ends = time.monotonic() + args.seconds
    settings = Settings(args.device, budget=5.0, repeats=2 if args.quick else 5, threads=os.cpu_count() or 1,
                        quick=args.quick)  # fmt: skip
    report, rows = Report(settings, describe(settings), args.out), defaultdict[str, list[Any]](list)
    for name, items in chunks(settings):
        left = ends - time.monotonic()
        if left < 10:
            print(f"no time left for {name}: {', '.join(sorted({item.group for item in items}))}")
            continue
        items = [item for item in items if not lacking([item])]
        rows[name] += run_items(items, replace(report.settings, limit=min(90.0, left)), print)
        report.finish([name], deepcopy(rows[name]))
    print(f"measured: {', '.join(rows)}")


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    part.__name__: part for part in (scenes, profile, pictures, benchmark)
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--collect", type=Path, metavar="DIR", help="only download the wheels to DIR, instead of others there"
    )
    parser.add_argument("--python", default="3.12", help="with --collect: Python of the machine with the GPU")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="use the wheels in DIR of what is not installed")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_check")))
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks and images: does it run at all?")
    for name, kind in (("--part", str), ("--work", Path), ("--seconds", float)):  # its own
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.wheels and not args.wheels.is_dir():
        sys.exit(f"--wheels {args.wheels}: no such folder; make it with --collect where there is network")
    if args.collect:
        return collect(args.collect, args.python)
    if args.part:
        PARTS[args.part](args)
        return 0
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        check = Check(args, Path(folder))
        run_all(check, args)
        check.log.close()
    print("\n" + (check.out / "summary.md").read_text())
    return int(any(outcome["status"].startswith(("ended", "killed")) for outcome in check.outcomes))


if __name__ == "__main__":
    sys.exit(main())
