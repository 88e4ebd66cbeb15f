#!/usr/bin/env python3
"""Runs the four commands on a real config for a few steps, and reports seconds and peak memory of each.

    tools/full_size_check.py scapes2k --data photos/ --out check/ [--images 8] [--encode 3] [--steps 20]
                             [--vgg vgg16.safetensors] [--autoencoder key=value ...] [--flow key=value ...]

It answers "does this config fit this machine, and how long is a step" before anybody starts a week of training.
Steps are timed by the commands themselves (images per second in metrics.jsonl); memory is the peak resident set of
the command and its workers, in main memory. A GPU's is not measured here.
The discriminator and its ramp start at image 0, so that every part of the step is in the figure.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys


def run(name: str, *words: object) -> dict[str, object]:
    """One command in a process of its own: seconds, peak resident GiB."""
    command = [sys.executable, "-m", "pyramid_ldm", name, *map(str, words)]
    print("$ pyramid-ldm", name, *words, flush=True)
    # A fresh waiter process a command: ru_maxrss of children is a maximum over all that were waited for.
    waiter = (
        "import json,resource,subprocess,sys,time; t=time.monotonic(); r=subprocess.run(sys.argv[1:]).returncode; "
        "u=resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps([r, time.monotonic()-t, u.ru_maxrss/2**20]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", waiter, *command], stderr=subprocess.PIPE, text=True)
    *messages, figures = done.stderr.strip().splitlines()
    print("\n".join(messages), flush=True)
    code, seconds, memory = json.loads(figures)
    if code:
        sys.exit(f"{name} ended with {code}")
    return {"command": name, "seconds": round(seconds, 1), "peak GiB": round(memory, 2)}


def step_seconds(run_directory: pathlib.Path) -> list[float]:
    """Seconds of each optimizer step, from the rate that metrics.jsonl holds (a line a step)."""
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    ends = [line["images_seen"] / line["images_per_second"] for line in lines if "learning_rate" in line]
    return [round(b - a, 2) for a, b in zip([0.0, *ends], ends, strict=False)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a name in autoencoder_configs/ and diffusion_configs/, for example scapes2k")
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--images", type=int, default=8, help="that each stage trains on")
    parser.add_argument("--encode", type=int, default=3, help="photographs to encode")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps of the sample")
    parser.add_argument("--vgg", default="random", help="VGG-16 weights for LPIPS (default: random, as costly)")
    parser.add_argument("--autoencoder", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--flow", nargs="*", default=[], metavar="key=value")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out}: is not empty; give another folder")
    few = args.out / "few"
    few.mkdir(parents=True)
    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    for path in sorted(p for p in args.data.rglob("*") if p.suffix.lower() in suffixes)[: args.encode]:
        shutil.copy(path, few)
    ae, latents, flow = args.out / "ae", args.out / "latents", args.out / "flow"
    often = (f"train.images={args.images}", "log.every=1", f"log.pictures_every={10**9}", f"checkpoint.every={10**9}")
    rows = [
        run("train-ae", f"autoencoder_configs/{args.config}.yaml", f"data.root={args.data}", f"run_dir={ae}", *often,
            "log.pictures=1", f"loss.perceptual.weights={args.vgg}", "loss.gan.start=0", "loss.gan.disc_warmup=0",
            "loss.gan.ramp=0", *args.autoencoder),
        run("encode", ae, "--data", few, "--out", latents, "--no-flip", "--batch-size", 1, "--workers", 0),
        run("train-flow", f"diffusion_configs/{args.config}.yaml", f"data.shards={latents}", f"run_dir={flow}", *often,
            "log.pictures=1", "samples.steps=1", *args.flow),
        run("sample", flow, "--num", 1, "--solver", "euler", "--steps", args.steps, "--out", args.out / "samples"),
    ]  # fmt: skip
    for row, directory in ((rows[0], ae), (rows[2], flow)):
        row["seconds a step"] = step_seconds(directory)
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
