"""tools/gpu_check.py: a part that fails or is too slow takes no other with it."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import gpu_check  # noqa: E402


def test_parts_that_fail_or_are_slow_are_lines_of_the_summary(tmp_path):
    check = gpu_check.Check(tmp_path / "out", tmp_path, 1.0)
    assert check.part("good", 60, "-c", "print('x | y')")
    assert not check.part("bad", 60, "-c", "raise SystemExit('why')")
    patient = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"
    assert check.part("slow", 4, "-c", patient)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(60)"
    process = check.start("-c", deaf)
    while "deaf" not in (check.out / "log.txt").read_text().splitlines():
        assert process.poll() is None
    assert gpu_check.stop(process, 1.0) == -9
    assert gpu_check.stop(process, 1.0) == -9  # once more does no harm
    check.ends = 0.0
    assert not check.part("late", 60, "-c", "")
    lines = [line.split(" | ") for line in (check.out / "summary.md").read_text().splitlines()[-4:]]
    assert [(name, outcome, last) for name, outcome, _, last in lines] == [
        ("| good", "done", "x / y |"),
        ("| bad", "ended with 1", "why |"),
        ("| slow", "stopped after 4 s", "saved |"),
        ("| late", "not run: no time left", " |"),
    ]
    assert check.failed


def test_the_sheet_takes_what_there_is(tmp_path):
    from PIL import Image

    (tmp_path / "samples").mkdir()
    Image.new("RGB", (64, 32), "red").save(tmp_path / "samples" / "seed0-0.png")
    assert gpu_check.sheet(tmp_path, tmp_path) == 0
    picture = Image.open(tmp_path / "pictures.jpg")
    assert picture.size == (2048, 1536)
    assert picture.getpixel((500, 1200))[0] > 240  # the sample
    assert min(picture.getpixel((500, 500))) > 240  # no originals


def test_a_gpu_machines_wheels_are_asked_for(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda words, check: asked.extend(words))
    (tmp_path / "old.whl").touch()
    assert gpu_check.collect(tmp_path, "3.12") == 0
    assert {"einops", "pytest", "diffusers", "manylinux2014_x86_64", "3.12"} <= set(asked)
    assert not any(word.startswith(("torch>", "numpy", "pillow>")) for word in asked)
    assert not (tmp_path / "old.whl").exists()
