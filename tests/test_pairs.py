"""Pairs of noise and what a flow made of it, and flows that begin where another ended."""

import shutil
from dataclasses import replace

import pytest
import torch
from test_training import FLOW_CONFIG

from pyramid_ldm import PyramidPipeline
from pyramid_ldm.cli import main
from pyramid_ldm.data.latents import LatentRecords, collate_latents
from pyramid_ldm.data.shards import LatentCache
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.pyramid import flatten, pyramid_noise
from pyramid_ldm.training.checkpoint import load_newest

SOLVER = ["--steps", "3", "--precision", "fp32", "--batch-size", "8"]


def train(config, *words, code=0):
    assert main(["train-flow", str(config), *map(str, words)]) == code


@pytest.fixture(scope="module")
def home(finished, tmp_path_factory):
    """A flow of 16 images, and 40 pairs of it."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "flow.yaml").write_text(FLOW_CONFIG)
    train(folder / "flow.yaml", f"data.shards={finished}", f"run_dir={folder / 'flow'}", "train.images=16")
    assert main(["sample", str(folder / "flow"), "--pairs", "-n", "40", "--seed", "5", "--out",
                 str(folder / "pairs"), *SOLVER]) == 0  # fmt: skip
    return folder


def test_a_pair_is_noise_and_the_latents_that_it_ends_at(home):
    cache = LatentCache(home / "pairs")
    assert [row.split for row in cache.rows[:3]] == ["held_out", "train", "train"]
    records = LatentRecords(cache, list(range(40)), seed=0, posterior="sample", shuffle=False)
    pipeline = PyramidPipeline.from_pretrained(home / "flow")
    batch = collate_latents([records[k] for k in range(40)])
    noise = pyramid_noise(pipeline.network.shapes, 5, "pair", range(40))
    assert torch.equal(batch.noise, flatten(noise))
    solution = pipeline.solve(noise, SolverOptions(steps=3))
    drawn = flatten(pipeline.scaling.unscale(solution.latents))
    torch.testing.assert_close(batch.latents, drawn, atol=2e-3, rtol=2e-3)  # stored in half precision
    sample = flatten(pyramid_noise(pipeline.network.shapes, 5, "sample", range(40)))
    assert not (sample[:, None] == batch.noise).all(dim=2).any(), "no sample of that seed begins where a pair did"


def test_pairs_of_before_had_the_noise_of_samples(home):
    cache = LatentCache(home / "pairs")
    cache.plan = replace(cache.plan, pairs={key: cache.plan.pairs[key] for key in ("mean", "std")})
    _, _, noise = LatentRecords(cache, [7], seed=0, posterior="sample", shuffle=False)[0]
    assert torch.equal(noise, flatten(pyramid_noise(cache.plan.shapes(), 5, "sample", [7]))[0])


def test_pairs_go_on_after_a_kill_and_are_not_mixed(home, tmp_path, capsys):
    out = tmp_path / "pairs"
    shutil.copytree(home / "pairs", out)
    words = ["sample", str(home / "flow"), "--pairs", "-n", "40", "--seed", "5", "--out", str(out), *SOLVER]
    for lost in (["index.json"], ["index.json", "00000.json"]):  # killed before the index, and in the middle
        for name in lost:
            (out / name).unlink()
        assert main(words) == 0
        assert (out / "index.json").read_text() == (home / "pairs/index.json").read_text()
    capsys.readouterr()
    assert main([*words, "--spacing", "cosine"]) == 2
    assert "holds latents made with data = 40 samples of " in capsys.readouterr().err
    assert main([*words, "--solver", "ancestral"]) == 2
    assert "--solver ancestral draws fresh noise" in capsys.readouterr().err


def test_training_on_pairs_learns_the_way_from_their_noise(home, tmp_path, monkeypatch):
    """The loss sees each pair's own noise, the scale is the flow's that drew them, and jitter moves the input alone."""
    seen, examined = [], []
    loss = RectifiedFlow.loss

    def watch(self, network, data, noise, t, condition=None, jitter=None):
        if jitter is None:
            examined.append(flatten(noise))
        else:
            seen.append((flatten(data), flatten(noise), flatten(jitter)))
        return loss(self, network, data, noise, t, condition, jitter)

    monkeypatch.setattr(RectifiedFlow, "loss", watch)
    words = [f"data.shards={home / 'pairs'}", f"run_dir={tmp_path / 'reflow'}", "train.images=8", "data.jitter=0.1"]
    train(home / "flow.yaml", *words)
    teacher, _ = load_newest(home / "flow")
    student, _ = load_newest(tmp_path / "reflow")
    assert student["scaling"] == teacher["scaling"]
    noise = flatten(pyramid_noise(PyramidPipeline.from_pretrained(home / "flow").network.shapes, 5, "pair", range(40)))
    for _, used, jitter in seen[:2]:
        for row in used:
            assert (noise == row).all(dim=1).any(), "noise of one of the pairs"
        assert 0.05 < jitter.std() < 0.2
    assert len(seen) >= 2
    assert examined
    for used in examined:
        for row in used:
            assert (noise == row).all(dim=1).any(), "held-out losses are of pairs, too"


def test_a_run_begins_with_anothers_average(home, finished, tmp_path):
    """A rate of nearly nothing: after a step the new run draws what the old one does."""
    words = [f"data.shards={finished}", f"init={home / 'flow'}", "train.learning_rate=1e-12", "train.images=4"]
    train(home / "flow.yaml", f"run_dir={tmp_path / 'on'}", *words)
    train(home / "flow.yaml", f"run_dir={tmp_path / 'new'}", words[0], *words[2:])
    old, on, new = (PyramidPipeline.from_pretrained(run)(2, steps=3).latents for run in (
        home / "flow", tmp_path / "on", tmp_path / "new"))  # fmt: skip
    assert max(float((a - b).abs().max()) for a, b in zip(old, on, strict=True)) < 1e-3
    assert max(float((a - b).abs().max()) for a, b in zip(old, new, strict=True)) > 1e-2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init=nowhere"], "init=nowhere: holds no checkpoint of train-flow"),
        (["init={home}/flow", "model.widths=[16, 24]"], "is a run of another network"),
        (
            ["init={home}/flow", "ema.widths=[0.2]", "ema.export=0.2"],
            "has averages of width 0.05, 0.1, not ema.export=0.2",
        ),
        (["init={home}/flow", "run_dir={home}/flow/on"], "lies inside init"),
        (["init={home}/flow", "rectified_flow.prediction=data"], "trained with another process prediction (velocity, "),
    ],
)
def test_what_cannot_begin_a_run_is_one_line(home, finished, tmp_path, capsys, words, message):
    words = [word.format(home=home) for word in words]
    train(home / "flow.yaml", f"data.shards={finished}", f"run_dir={tmp_path / 'x'}", *words, code=2)
    assert not (home / "flow" / "on").exists()
    assert message in capsys.readouterr().err
