"""tools/benchmark.py: the peers are the published ones, sides take turns, failures become remarks, one command."""

import json
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import benchmark  # noqa: E402
import peers  # noqa: E402

tools = pytest.mark.tools
SMALL = ["--scale", "small", "--precision", "fp32", "--repeats", "2", "--limit", "60"]


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


@tools
def test_peers_have_the_published_numbers_of_parameters(diffusers):
    with torch.device("meta"):
        found = {name: peers.autoencoder(name) for name in peers.AUTOENCODERS}
        found |= {name: peers.generator(name, 32) for name in ("LDM U-Net on f4", "DiT-XL/2 on SD f8")}
    millions = [round(sum(p.numel() for p in model.parameters()) / 1e6) for model in found.values()]
    assert millions == [84, 323, 677, 274, 750]  # the last: 675 published; diffusers embeds time in every block


def test_sides_take_turns_and_failures_become_remarks(monkeypatch, capsys):
    calls, clock = [], [0.0]
    cost = {"ours": 2.0, "peer": 30.0}
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def case(name):
        def call():
            calls.append(name)
            clock[0] += cost[name]

        return benchmark.Case(call, images=4)

    def missing():
        raise ModuleNotFoundError("No module named 'diffusers'")

    def too_large():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")

    builders = {
        "ours": lambda: case("ours"), "peer": lambda: case("peer"), "missing": missing, "large": too_large,
        "odd": lambda: 1 / 0,
    }  # fmt: skip
    args = benchmark.parse([*SMALL, "--limit", "600"])
    own, peer, *failed = benchmark.side_by_side(args, "g", builders)
    assert calls == ["ours"] * 3 + ["peer"] + ["ours", "peer"] * 2  # a call to warm up, two turns
    assert (own["seconds"], peer["seconds"], peer["ratios"]) == ([2.0] * 4, [30.0] * 2, [15.0] * 2)
    assert [row["remark"] for row in failed] == [
        "not measured: No module named 'diffusers'", "does not fit in memory",
        "failed: ZeroDivisionError: division by zero",
    ]  # fmt: skip
    table = benchmark.markdown([own, peer, *failed]).splitlines()
    assert table[0] == "| of | what | time (fastest to slowest) | turns | images/s | time / ours | remark |"
    assert table[3] == "| g | peer | 30.0 s (30.0 s to 30.0 s) | 2 | 0.133 | 15.0 (15.0 to 15.0) | - |"
    args.limit = 70.0  # half of it is for turns: a second one would take too long
    assert benchmark.side_by_side(args, "g", {"peer": lambda: case("peer")})[0]["seconds"] == [30.0]


@tools
def test_a_line_that_takes_too_long_is_given_up():
    args = benchmark.parse([*SMALL, "--limit", "0.2"])
    began = time.perf_counter()
    rows = benchmark.side_by_side(args, "g", {"slow": lambda: benchmark.Case(lambda: [0 for _ in iter(int, 1)])})
    assert rows == [{"of": "g", "what": "slow", "images": 1, "remark": "given up after 0.2 s"}]
    assert time.perf_counter() - began < 10


@tools
def test_flops_and_the_peak_beside_what_existed_are_counted():
    args = benchmark.parse(SMALL)
    make, inputs = lambda: torch.nn.Linear(64, 256, bias=False), lambda: [torch.ones(8, 64)]
    case = benchmark.inference(args, make, inputs, lambda model, x: model(x))
    found = benchmark.warm_up(case, args.runtime.device)
    assert case.about == {"parameters": 64 * 256}
    assert found == {"flops": 2 * 8 * 64 * 256, "peak_bytes": 4 * 8 * 256}


def test_figures_are_written_with_three_digits():
    assert [benchmark.significant(v) for v in (0, 1234.5, 12.345, 0.0001234)] == ["0", "1,234", "12.3", "0.000123"]
    assert (benchmark.duration(2), benchmark.duration(0.0123)) == ("2.00 s", "12.3 ms")
    assert (benchmark.size_of(2**31), benchmark.size_of(2**21)) == ("2.00 GiB", "2.00 MiB")


@tools
def test_every_measurement_runs_and_is_written(tmp_path, diffusers, capsys):
    pytest.importorskip("scipy")
    out = tmp_path / "benchmark.json"
    assert benchmark.main([*SMALL, "--repeats", "1", "--limit", "300", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    names = [measure.__name__ for measure in benchmark.MEASUREMENTS]
    assert list(found["measurements"]) == names
    rows = [row for part in found["measurements"].values() for row in part]
    missing = [row for row in rows if "seconds" not in row]
    assert {row["what"] for row in missing} <= {"OpenVINO", "ONNX Runtime"}  # not among `bench`
    assert all(row["remark"].startswith("not measured: No module named") for row in missing)
    assert {"date", "command", "CPU", "GPU", "versions", "precision"} <= found["about"].keys()
    printed = capsys.readouterr().out
    assert all(f"\n## {name}\n" in printed for name in names)
    peer = next(row for row in found["measurements"]["decode"] if row["what"] == "DC-AE f64c128")
    assert {"parameters", "flops", "seconds", "ratios", "peak_bytes"} <= peer.keys()
    assert {row["evaluations"] for row in found["measurements"]["solvers"]} >= {100}
    *drawn, whole = found["measurements"]["sample"]
    took = {row["what"].split(",")[0]: statistics.median(row["seconds"]) for row in drawn}
    evaluations = next(int(row["what"].split()[1]) for row in drawn if row["what"].startswith("RK45"))
    parts = took["RK45"] * benchmark.RK45_EVALUATIONS / evaluations + took["decoding"] + took["writing the PNG"]
    assert whole["seconds"] == [pytest.approx(parts)]
