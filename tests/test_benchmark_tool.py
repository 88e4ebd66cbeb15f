"""tools/benchmark.py: the peers are the published ones, failures become lines, and one command writes the tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.tools
TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

from bench import ours, peers, worker  # noqa: E402
from bench.measuring import count, measure_subject  # noqa: E402
from bench.results import Row, compare, derive, merge  # noqa: E402
from bench.runner import death, run_items  # noqa: E402
from bench.section import Section  # noqa: E402
from bench.sections import SECTIONS, ceilings, end_to_end  # noqa: E402
from bench.settings import Item, Settings, Unavailable, interleave  # noqa: E402
from bench.tables import cells, duration, markdown, significant, size, terminal  # noqa: E402

QUICK = Settings(precision="fp32", quick=True, repeats=2, budget=1.0)


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


def test_peers_have_the_published_numbers_of_parameters(diffusers):
    with torch.device("meta"):
        found = {name: peers.autoencoder(name) for name in peers.AUTOENCODERS} | {"unet": peers.unet()}
    millions = {name: round(sum(p.numel() for p in model.parameters()) / 1e6) for name, model in found.items()}
    assert millions == {"SD VAE f8": 84, "DC-AE f32c32": 323, "DC-AE f64c128": 677, "unet": 274}


def test_peers_flops_at_2048_are_those_of_the_issue(diffusers):
    size = (2048, 2048)
    decoders = [count(peers.decoder_builder(name, size, Settings()))["flops"] / 1e12 for name in peers.AUTOENCODERS]
    assert decoders == pytest.approx([48.5, 44.3, 44.7], abs=0.05)


@pytest.mark.parametrize("patch", [1, 2])
def test_dit_for_rectangles_computes_what_diffusers_does(diffusers, patch):
    torch.manual_seed(0)
    model = peers.dit(4, patch, quick=True).eval()
    model.pos_embed.pos_embed.zero_()
    model.pos_embed.height = model.pos_embed.width = 8 // patch  # diffusers' own encodings stay out of it
    model.pos_embed.register_buffer("pos_embed", torch.zeros(1, (8 // patch) ** 2, 16))
    latents, step, label = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([1])
    with torch.inference_mode():
        expected = model(latents, timestep=step, class_labels=label).sample
        tokens = peers.run_dit(model, latents, step, label).view(1, 8 // patch, 8 // patch, patch, patch, 8)
    assert torch.allclose(tokens.permute(0, 5, 1, 3, 2, 4).reshape(1, 8, 8, 8), expected, atol=1e-6)


def test_a_subject_is_counted_and_measured():
    figures = measure_subject(ours.decoder_builder("celebahq_1024", QUICK), QUICK)
    model = ours.autoencoder("celebahq_1024", QUICK, torch.device("meta"))
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert figures["flops"] > 1e6
    assert len(figures["seconds"]) >= 1
    assert figures["peak_bytes"] >= 3 * 64 * 64 * 4  # the image at least
    assert figures["state_bytes"] >= 4 * figures["parameters"]
    assert figures["rss_bytes"] > 2**20


def test_hopeless_work_is_not_started():
    settings = Settings(quick=True, ceiling=1.0, limit=1.0)
    with pytest.raises(Unavailable, match="1 s for two runs"):
        measure_subject(ours.decoder_builder("celebahq_1024", settings), settings)


def test_failures_become_lines(monkeypatch):
    def measure(item, settings):
        raise item.params["error"]

    monkeypatch.setitem(SECTIONS, "made up", Section("", "", (), lambda settings: [], measure))

    def row(error):
        return worker.measure_item(Item("made up", "g", "n", {"error": error}), QUICK)

    assert (row(Unavailable("no such part")).status, row(Unavailable("why")).notes) == ("skipped", ["why"])
    memory = row(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 5 bytes"))
    assert (memory.status, memory.notes) == (
        "failed",
        ["does not fit in memory (can't allocate memory: you tried 5 bytes)"],
    )
    assert row(ValueError("odd\nmore")).notes == ["ValueError: odd"]
    assert death(-9, "") == "killed by the system, most likely for memory"
    assert death(1, "a\nlast words\n") == "the process ended with 1: last words"


def test_a_worker_that_takes_too_long_is_given_up():
    item = Item("solver", "g", "ours: euler")
    (row,) = run_items([item], Settings(quick=True, limit=0.1), lambda text: None)
    assert (row.key, row.status, row.notes) == (item.key, "failed", ["given up after 0.1 s"])


def test_one_line_run_twice_is_pooled_and_compared():
    own, peer = Item("decode", "g", "ours", reference=True), Item("decode", "g", "peer")
    items = interleave([own], [peer])
    assert [item.name for item in items] == ["ours", "peer", "ours"]
    times = iter([[1.0], [30.0], [3.0]])
    rows = [Row.of(i, figures={"seconds": next(times), "flops": 6, "peak_bytes": 5, "images": 1}) for i in items]
    rows = merge(rows)
    derive(rows, Settings(ceiling=12.0, repeats=2))
    compare(rows)
    assert [(row.name, row.figures["median_seconds"], row.figures["ratio"]) for row in rows] == [
        ("ours", 2.0, 1.0),
        ("peer", 30.0, 15.0),
    ]
    assert (rows[0].figures["share"], rows[0].figures["flops_per_second"]) == (0.25, 3.0)
    assert (rows[0].notes, rows[1].notes) == ([], ["1 timed run (budget 60 s)"])


def test_a_failed_repetition_is_a_remark():
    good, bad = Row("s", "g", "n", figures={"seconds": [1.0]}), Row("s", "g", "n", status="failed", notes=["why"])
    for order in ([good, bad], [bad, good]):
        (row,) = merge([Row(**vars(r) | {"notes": list(r.notes)}) for r in order])
        assert (row.status, row.figures["seconds"], row.notes) == ("measured", [1.0], ["why"])


def test_end_to_end_of_the_peers_is_computed_from_what_was_measured():
    name, decoder = "DiT-XL/1 on DC-AE f64c128", "DC-AE f64c128"
    rows = {
        "flow": [Row("flow", "2048x2048", name, figures={"median_seconds": 2.0})],
        "decode": [Row("decode", "2048x2048", decoder, figures={"median_seconds": 50.0})],
    }
    found = {row.name.split(":")[0]: row for row in end_to_end.computed(rows, Settings())}
    assert found[name].figures["median_seconds"] == 150.0
    assert found[name].status == "computed"
    assert found["DiT-XL/2 on SD f8"].status == "skipped"


def test_tables_show_what_there_is():
    rows = [Row("s", "g", "a|b", figures={"median_seconds": 0.0123}), Row("s", "g", "c", status="failed", notes=["x"])]
    table = cells(rows, SECTIONS["decode"].columns)
    assert table == [["of", "what", "time", "remarks"], ["g", "a|b", "12.3 ms", ""], ["g", "c", "-", "failed; x"]]
    assert markdown(table).splitlines()[2] == "| g | a\\|b | 12.3 ms |  |"
    assert terminal(table).splitlines()[3] == "g   c     -        failed; x"
    assert [significant(v) for v in (0, 1234.5, 12.345, 0.0001234)] == ["0", "1,234", "12.3", "0.000123"]
    assert (duration(2), size(2**31), size(2**21)) == ("2.00 s", "2.00 GiB", "2.00 MiB")


def test_the_ceiling_is_the_best_convolution_of_the_precision():
    rows = [
        Row("ceilings", group, name, figures={"best_flops_per_second": rate})
        for group, name, rate in (
            ("bf16", "3x3 convolution a", 5.0),
            ("bf16", "3x3 convolution b", 7.0),
            ("bf16", "matrix product", 9.0),
            ("fp32", "3x3 convolution a", 8.0),
        )
    ]
    assert ceilings.best_convolution(rows, "bf16") == 7.0
    assert ceilings.best_convolution([], "bf16") is None


@pytest.mark.parametrize("name", SECTIONS)
def test_every_line_of_a_section_has_its_own_name(name):
    for settings in (Settings(), QUICK):
        items = SECTIONS[name].items(settings)
        assert items
        assert all(item.section == name for item in items)
        assert json.loads(json.dumps([item.to_json() for item in items]))
        repeated = len(items) - len({item.key for item in items})
        assert repeated == 0 or name in ("decode", "encode", "flow")


def run(out: Path, *words: str) -> dict:
    command = [sys.executable, str(TOOLS / "benchmark.py"), "--quick", "--repeats", "2", "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "benchmark.json").read_text())


@pytest.mark.slow
def test_decode_and_solver(tmp_path, diffusers):
    found = run(tmp_path, "--only", "decode", "solver")
    assert {"date", "command", "CPU", "memory", "versions", "precision"} <= found["header"].keys()
    assert list(found["sections"]) == ["ceilings", "decode", "solver"]
    for rows in found["sections"].values():
        assert [row["notes"] for row in rows if row["status"] == "failed"] == []
    decode = {(row["group"], row["name"]): row["figures"] for row in found["sections"]["decode"]}
    peer = decode["128x128", "DC-AE f64c128"]
    assert {
        "parameters",
        "flops",
        "seconds",
        "median_seconds",
        "flops_per_second",
        "share",
        "peak_bytes",
    } <= peer.keys()
    own = decode["128x128", "ours: people2k"]
    assert peer["ratio"] == pytest.approx(peer["median_seconds"] / own["median_seconds"])
    assert found["sections"]["solver"][1]["figures"]["evaluations"] > 6
    text = (tmp_path / "BENCHMARKS.md").read_text()
    assert "## Decoding one image" in text
    assert "| 128x128 | DC-AE f64c128 |" in text


@pytest.mark.slow
def test_every_section(tmp_path, diffusers):
    found = run(tmp_path)
    assert list(found["sections"]) == list(SECTIONS)
    rows = [row for part in found["sections"].values() for row in part]
    assert [(row["section"], row["name"], row["notes"]) for row in rows if row["status"] == "failed"] == []
