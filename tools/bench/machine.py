"""What a run stood on."""

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.settings import Settings

PACKAGES = ("torch", "diffusers", "scipy", "torchdiffeq", "pillow")


def describe(settings: Settings) -> dict[str, str]:
    """The header of the output."""
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", *sys.argv]),
        "CPU": f"{cpu_model()}, {os.cpu_count()} cores, {settings.threads} threads used",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "GPU": gpu(),
        "system": platform.platform(),
        "versions": ", ".join(f"{name} {package(name)}" for name in ("python", *PACKAGES)),
        "commit": commit(),
        "device": settings.device,
        "precision": "bf16 autocast" if settings.precision == "bf16" else settings.precision,
        "both sides": "random weights, bfloat16 weights and autocast (unless fp32), channels_last, inference_mode, "
        "the same threads; freed memory is kept (pyramid_ldm.allocator.keep_freed_memory)",
    }
    if settings.quick:
        found["note"] = "--quick: tiny networks and images; the figures mean nothing"
    return found


def package(name: str) -> str:
    """A version, or "missing"."""
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def cpu_model() -> str:
    """As /proc/cpuinfo names it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu() -> str:
    """As nvidia-smi names it, without starting a CUDA context here."""
    return command("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader") or "none"


def commit() -> str:
    """The repository's commit, and whether files differ from it."""
    here = str(Path(__file__).parent)
    found = command("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    changed = command("git", "-C", here, "status", "--porcelain")
    return (found or "unknown") + (" with changes" if changed else "")


def command(*words: str) -> str:
    """A command's output in one line; empty where it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
        return "; ".join(done.stdout.strip().splitlines())
    return ""
