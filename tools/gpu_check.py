#!/usr/bin/env python3
"""All that needs a GPU, in one command of under ten minutes, on a machine that has PyTorch and no network.

Here, once (17 MiB of wheels, in a folder that git ignores; --python is the other machine's):

    python3 tools/gpu_check.py --collect .whl --python 3.12

There, in a copy of this tree with that folder in it:

    python3 tools/gpu_check.py --wheels .whl --out "${OUT:-gpu_check}"

Runs the tests marked gpu and the benchmark, most important lines first, and trains both stages on landscapes of
1024x2048 for a moment to draw two more; each part is a process with a limit. --out is written as it goes: summary.md,
log.txt (what the parts printed, the benchmark's tables included), benchmark.json and pictures.jpg. Landscapes are drawn
there; weights that are not trained are random. `--device cpu --scale small` tries every part without a GPU.
"""

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "numpy", "pillow"}  # come with PyTorch's images, as do torchvision and scipy
# What those in pyproject.toml import here (tensorboard's server is not among it), pytest, and the benchmark's peers
# (they need huggingface_hub besides, which comes with transformers; without it their lines say so).
MORE = ("pyyaml", "absl-py", "protobuf", "markdown", "pytest", "iniconfig", "pluggy", "pygments", "packaging",
        "diffusers", "importlib_metadata", "zipp", "regex")  # fmt: skip
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
MOST = 45  # MiB of wheels
SCENES = "import sys; from pathlib import Path; from pyramid_ldm.demo.pictures import render_photographs as draw; "


class Check:
    """Parts, one after another, in what is left of the time."""

    def __init__(self, out: Path, work: Path, minutes: float) -> None:
        self.out, self.work, self.ends = out.resolve(), work, time.monotonic() + 60 * minutes - 5
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / "log.txt").open("w", encoding="utf-8")
        paths = [work / "site", ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONUNBUFFERED": "1"}
        machine = f"Python {platform.python_version()}, PyTorch {installed('torch')}, {os.cpu_count()} cores"
        self.summary = (
            f"# What the GPU check found\n\n{machine}\n\n| part | outcome | seconds | last line |\n|{'---|' * 4}\n"
        )
        self.failed = False

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def start(self, *words: object) -> "subprocess.Popen[str]":
        """`python WORDS`, a process group of its own that hears Ctrl-C even if we, in the background, do not."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, env=self.environment, stdout=self.log,
            stderr=subprocess.STDOUT, text=True, process_group=0,
        )  # fmt: skip

    def part(self, name: str, seconds: float, *words: object) -> bool:
        """`python WORDS` for at most `seconds`; then Ctrl-C, which training takes as its end. Whether it went well; a
        line of the summary."""
        limit, began, last = min(seconds, self.left()), time.monotonic(), ""
        if limit < 3:
            code, outcome = None, "not run: no time left"
        else:
            print(f"\n==== {name}: python {' '.join(map(str, words))}", file=self.log, flush=True)
            print(f"{name} (at most {limit:.0f} s) ...", flush=True)
            process = self.start(*words)
            try:
                code = process.wait(limit)
                outcome = "done" if code == 0 else f"ended with {code}"
            except subprocess.TimeoutExpired:
                code = stop(process, min(30.0, max(2.0, self.left())))
                outcome = f"{'stopped' if code in (0, 130) else 'killed'} after {limit:.0f} s"
            lines = (self.out / "log.txt").read_text(errors="replace").split("\n")
            last = [line for line in lines if line.strip()][-1][:200].replace("|", "/")
            self.failed |= code not in (0, 130)
        print(f"  {outcome}: {last}", flush=True)
        self.summary += f"| {name} | {outcome} | {time.monotonic() - began:.0f} | {last} |\n"
        (self.out / "summary.md").write_text(self.summary, encoding="utf-8")
        return code in (0, 130)


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
    """The parts. The benchmark takes what the tests leave of the time; training and drawing need two ninths of it."""
    minute, work, small = 60 * args.minutes / 9, check.work, args.scale == "small"
    wheels = sorted(args.wheels.resolve().glob("*.whl")) if args.wheels else []
    wheels = [path for path in wheels if installed(path.name.split("-")[0]) is None]
    if wheels:
        check.part("wheels", minute, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
                   "--no-cache-dir", "--root-user-action=ignore", "--target", work / "site", *wheels)  # fmt: skip
    name = "import torch; print(torch.cuda.get_device_name())"
    if args.device == "cuda" and not check.part("device", minute, "-c", name):
        return
    scenes = "8, (64, 64)" if small else "48, (1024, 2048)"
    landscapes = check.start("-c", f"{SCENES}draw(Path(sys.argv[1]), {scenes})", work / "photos")  # meanwhile
    tests = ["-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-v", "-s", "-p", "no:cacheprovider", "--durations=8"]
    tests += ["-k", "not 2048 and not ompiled"] * small  # a minute and a half
    check.part("tests", 3 * minute, *tests, "--accelerator", args.device)
    benchmark = ["tools/benchmark.py", "--device", args.device, "--scale", args.scale, "--limit", 40, "--repeats"]
    only = ["--only", "decode", "solvers"] * small
    check.part("benchmark", check.left() - 2 * minute, *benchmark, 2 if small else 5, "--out",
               check.out / "benchmark.json", *only)  # fmt: skip
    with suppress(subprocess.TimeoutExpired):
        landscapes.wait(max(1.0, 0.5 * minute))
    stop(landscapes, 0.1)
    draw(check, args, minute)


def draw(check: Check, args: argparse.Namespace, minute: float) -> None:
    """The README's four commands on landscapes, for a moment, and what they drew. L1 alone: VGG's weights are not
    there."""
    work, cli, device = check.work, ("-m", "pyramid_ldm"), ("--device", args.device)
    name, images, workers = ("demo", (16, 32), 0) if args.scale == "small" else ("scapes2k", (600, 6400), 8)
    shared = ("ema.widths=[0.05]", "ema.export=0.05", "checkpoint.every=1000000000", "log.pictures=2",
              f"device={args.device}", f"data.workers={workers}")  # fmt: skip
    check.part("train-ae", 0.7 * minute, *cli, "train-ae", f"autoencoder_configs/{name}.yaml",
               f"data.root={work / 'photos'}", f"run_dir={work / 'ae'}", f"train.images={images[0]}",
               "train.batch_size=4", "train.accumulate=1", "train.learning_rate=3e-4", "train.warmup=40",
               "loss.perceptual.weight=0", "loss.gan.weight=0", f"log.every={images[0] // 8}",
               f"log.pictures_every={images[0] // 3}", *shared)  # fmt: skip
    check.part("encode", 0.4 * minute, *cli, "encode", work / "ae", "--data", work / "photos", "--out",
               work / "latents", "--workers", workers, *device)  # fmt: skip
    check.part("train-flow", 0.4 * minute, *cli, "train-flow", f"diffusion_configs/{name}.yaml",
               f"data.shards={work / 'latents'}", f"run_dir={work / 'flow'}", f"train.images={images[1]}",
               "train.batch_size=16", "train.warmup=320", f"log.every={images[1] // 8}",
               "log.pictures_every=1000000000", "samples.steps=20", *shared)  # fmt: skip
    check.part("sample", 0.4 * minute, *cli, "sample", work / "flow", "--num", 2, "--solver", "euler", "--steps", 50,
               "--out", work / "samples", *device)  # fmt: skip
    check.part("pictures", 0.5 * minute, __file__, "--sheet", work, "--out", check.out)


def sheet(work: Path, out: Path) -> int:
    """Originals over what the autoencoder made of them, over samples, in one JPEG."""
    from PIL import Image

    grids = sorted((work / "ae/images").glob("reconstructions-*.png"))[-1:]
    samples = sorted((work / "samples").glob("seed*.png"))[:2]
    page = Image.new("RGB", (2048, 1536), "white")
    for path in grids:
        page.paste(Image.open(path).convert("RGB").resize((2048, 1024)), (0, 0))
    for i, path in enumerate(samples):
        page.paste(Image.open(path).convert("RGB").resize((1024, 512)), (1024 * i, 1024))
    page.save(out / "pictures.jpg", quality=80)
    print(f"{len(grids)} grid of originals over reconstructions, {len(samples)} samples")
    return 0


def main() -> int:
    """1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--collect", type=Path, metavar="DIR", help="only download the wheels to DIR, over others there"
    )
    parser.add_argument("--python", default="3.12", help="with --collect: Python of the machine with the GPU")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="use the wheels in DIR of what is not installed")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_check")))
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=("full", "small"), default="full", help="small: does it run at all?")
    parser.add_argument("--sheet", type=Path, help=argparse.SUPPRESS)  # its own
    args = parser.parse_args()
    if args.wheels and not args.wheels.is_dir():
        parser.error(f"--wheels {args.wheels}: no such folder; make it with --collect where there is network")
    if args.collect:
        return collect(args.collect, args.python)
    if args.sheet:
        return sheet(args.sheet, args.out)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        check = Check(args.out, Path(folder), args.minutes)
        run_all(check, args)
        check.log.close()
    print(f"\n{check.summary}")
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
