"""tools/gpu_check.py: a part that fails or is too slow takes no other with it; slow: every part, tiny, on the CPU."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools
TOOL = Path(__file__).parent.parent / "tools" / "gpu_check.py"
sys.path.insert(0, str(TOOL.parent))

import gpu_check  # noqa: E402
from bench.sections import SECTIONS  # noqa: E402
from bench.settings import Settings  # noqa: E402


@pytest.fixture
def check(tmp_path):
    return gpu_check.Check(argparse.Namespace(out=tmp_path / "out", minutes=1.0), tmp_path)


def test_parts_that_fail_or_are_slow_are_lines_of_the_summary(check):
    assert check.part("good", 60, "-c", "print('x | y')")
    assert not check.part("bad", 60, "-c", "raise SystemExit('why')")
    patient = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"
    assert check.part("slow", 10, "-c", patient)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(60)"
    process = check.start(["-c", deaf])
    while "deaf" not in (check.out / "log.txt").read_text().splitlines():
        assert process.poll() is None
    assert gpu_check.stop(process, 1.0) == -9
    assert gpu_check.stop(process, 1.0) == -9  # once more does no harm
    check.ends = 0.0
    assert not check.part("late", 60, "-c", "")
    found = json.loads((check.out / "summary.json").read_text())["parts"]
    assert [(part["part"], part["status"]) for part in found] == [
        ("good", "done"),
        ("bad", "ended with 1"),
        ("slow", "stopped after 10 s"),
        ("late", "not run: no time left"),
    ]
    assert [part["last_line"] for part in found] == ["x | y", "why", "saved", ""]
    assert "| good | done |" in (check.out / "summary.md").read_text()


def test_the_benchmark_begins_with_what_matters_and_leaves_nothing_out():
    settings = Settings("cuda")
    chunks = list(gpu_check.chunks(settings))
    assert [name for name, _ in chunks[:3]] == ["ceilings", "decode", "flow"]
    assert {item.group for item in chunks[1][1]} == {"2048x2048"}
    planned = sum(len(items) for _, items in chunks)
    assert planned == sum(len(section.items(settings)) for section in SECTIONS.values())


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path):
    command = [sys.executable, str(TOOL), "--device", "cpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert {part["status"] for part in parts} == {"done"}, (tmp_path / "log.txt").read_text()
    assert done.returncode == 0
    names = {"summary.md", "summary.json", "log.txt", "profile.txt", "pictures.jpg", "benchmark.json", "BENCHMARKS.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "profile.txt").read_text().count("convolution") > 3
