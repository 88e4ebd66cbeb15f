import dataclasses
import json
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import randomise, tiny_autoencoder_config, tiny_flow
from torch import nn

from pyramid_ldm.config import AutoencoderTraining, LevelConfig, load_saved
from pyramid_ldm.config.autoencoder import ImageDataConfig
from pyramid_ldm.config.common import TrainConfig
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import recover_directory, replace_directory, write_atomic, write_json, write_text
from pyramid_ldm.nn.layers import advance_spectral_norm, spectral_layers
from pyramid_ldm.training.checkpoint import checkpoint_directories, load_newest, prune, save_checkpoint
from pyramid_ldm.training.ema import PowerEma, exponent
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.run import open_run
from pyramid_ldm.training.runtime import Runtime
from pyramid_ldm.training.schedule import due, learning_rate, whole_steps
from pyramid_ldm.training.step import NonFinite, set_learning_rate, take_step

CPU = Runtime(torch.device("cpu"), False)


def state(value):
    return {"images_seen": value, "weights": {"a": torch.full((50,), float(value))}}


def names(run):
    return [int(path.name) for path in checkpoint_directories(run)]


def fill(run, *counts):
    for count in counts:
        save_checkpoint(run, count, state(count))


def test_a_checkpoint_comes_back_whole(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "images_seen": 12, "note": None}
    path = save_checkpoint(tmp_path, 12, saved)
    assert path == tmp_path / "checkpoints" / "00000012"
    assert json.loads((path / "manifest.json").read_text())["images_seen"] == 12
    loaded, skipped = load_newest(tmp_path)
    assert skipped == []
    assert loaded["images_seen"] == 12
    assert loaded["note"] is None
    assert all(torch.equal(loaded["model"][key], value) for key, value in model.state_dict().items())
    other = torch.optim.AdamW(nn.Linear(3, 2).parameters(), lr=9.0)
    other.load_state_dict(loaded["optimizer"])
    assert other.param_groups[0]["lr"] == 1e-3
    torch.testing.assert_close(other.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


def test_a_fresh_run_has_none(tmp_path):
    assert load_newest(tmp_path) == (None, [])


def test_the_newest_is_loaded_by_number(tmp_path):
    fill(tmp_path, 1000, 9, 200)
    assert names(tmp_path) == [9, 200, 1000]
    assert load_newest(tmp_path)[0]["images_seen"] == 1000


def test_saving_a_count_again_replaces_it(tmp_path):
    fill(tmp_path, 5)
    save_checkpoint(tmp_path, 5, state(6))
    assert load_newest(tmp_path)[0]["images_seen"] == 6
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000005"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [50]), (2, 0, [40, 50]), (2, 20, [20, 40, 50]), (1, 30, [30, 50]), (9, 0, [10, 20, 30, 40, 50])],
)
def test_pruning_keeps_the_last_and_the_multiples(tmp_path, keep_last, keep_every, kept):
    fill(tmp_path, 10, 20, 30, 40, 50)
    prune(tmp_path, keep_last, keep_every)
    assert names(tmp_path) == kept


def damage(directory, kind):
    file, manifest = directory / "state.pt", directory / "manifest.json"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif kind == "flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif kind == "no state":
        file.unlink()
    elif kind == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text('{"format": 1')


KINDS = {
    "truncated": "state.pt is missing or truncated",
    "flipped": "state.pt does not match its hash",
    "no state": "state.pt is missing or truncated",
    "no manifest": "manifest.json is missing or damaged",
    "half a manifest": "manifest.json is missing or damaged",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_newest_falls_back_to_the_one_before_and_says_so(tmp_path, kind):
    fill(tmp_path, 10, 20, 30)
    damage(tmp_path / "checkpoints" / "00000030", kind)
    loaded, skipped = load_newest(tmp_path)
    assert loaded["images_seen"] == 20
    where = tmp_path / "checkpoints" / "00000030"
    assert skipped == [f"{where}: {KINDS[kind]}; falling back to the checkpoint before it"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(tmp_path, kind):
    fill(tmp_path, 10, 20)
    for path in checkpoint_directories(tmp_path):
        damage(path, kind)
    with pytest.raises(UserError, match=rf"no checkpoint is whole \(.*00000020: {KINDS[kind]}\)") as caught:
        load_newest(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_format_is_refused_rather_than_passed_over(tmp_path):
    fill(tmp_path, 10, 20)
    manifest = tmp_path / "checkpoints" / "00000020" / "manifest.json"
    write_json(manifest, json.loads(manifest.read_text()) | {"format": 7})
    with pytest.raises(UserError, match="checkpoint format 7, this version reads 1"):
        load_newest(tmp_path)


def test_leftovers_of_a_killed_save_are_ignored(tmp_path):
    fill(tmp_path, 10)
    leftover = tmp_path / "checkpoints" / ".00000020.tmp"
    leftover.mkdir()
    (leftover / "state.pt").write_bytes(b"half")
    assert load_newest(tmp_path)[0]["images_seen"] == 10
    fill(tmp_path, 20)
    assert load_newest(tmp_path)[0]["images_seen"] == 20
    assert not leftover.exists()


def test_a_directory_is_replaced_whole(tmp_path):
    target = tmp_path / "model"
    replace_directory(target, lambda path: write_text(path / "old", "1"))
    replace_directory(target, lambda path: write_text(path / "inner" / "new", "2"))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "model", "model/inner", "model/inner/new",
    ]  # fmt: skip


def test_a_directory_survives_a_writer_that_fails(tmp_path):
    target = tmp_path / "model"
    replace_directory(target, lambda path: write_text(path / "old", "1"))

    def fail(path):
        write_text(path / "new", "2")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        replace_directory(target, fail)
    assert [path.name for path in target.iterdir()] == ["old"]


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path):
    target, previous = tmp_path / "model", tmp_path / ".model.previous"
    previous.mkdir()
    (previous / "weights").write_text("1")
    recover_directory(target)
    assert (target / "weights").read_text() == "1"
    assert not previous.exists()


def test_a_replacement_killed_after_its_renames_stands(tmp_path):
    for name, text in (("model", "new"), (".model.previous", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(text)
    recover_directory(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert not (tmp_path / ".model.previous").exists()


def test_replacing_after_a_kill_between_the_renames_works(tmp_path):
    (tmp_path / ".model.previous").mkdir()
    replace_directory(tmp_path / "model", lambda path: write_text(path / "weights", "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "new"


def test_a_writer_that_fails_leaves_the_file_and_nothing_else(tmp_path):
    path = tmp_path / "index.json"
    write_json(path, {"a": 1})

    def fail(temporary):
        temporary.write_text("half of")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomic(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    seen = []

    def write(temporary):
        temporary.write_text("new, half")
        seen.append(path.read_text())
        temporary.write_text("new, whole")

    write_atomic(path, write)
    assert seen == ["old"]
    assert path.read_text() == "new, whole"


def test_exponents_of_edm2():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)
    for width in (0.02, 0.05, 0.1, 0.2):  # equation 126: the deviation of t^gamma on [0, 1]
        gamma = exponent(width)
        deviation = math.sqrt((gamma + 1) / ((gamma + 3) * (gamma + 2) ** 2))
        assert deviation == pytest.approx(width, rel=1e-9)


def scalar_model(value):
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def test_a_track_is_the_power_function_average_of_the_weights():
    values, images = [3.0, -1.0, 4.0, 1.0, -5.0], 16
    model = scalar_model(100.0)  # what it starts with is forgotten at the first step
    ema = PowerEma(model, [0.1, 0.2])
    for step, value in enumerate(values, start=1):
        model.weight.data.fill_(value)
        ema.update(model, images * step, images)
    for width in (0.1, 0.2):
        power = exponent(width) + 1
        # the mean of a piecewise constant function of t in [0, 5] under the density t^gamma
        weights = np.diff(np.arange(6) ** power) / 5**power
        assert weights.sum() == pytest.approx(1)
        assert ema.tracks[f"{width:g}"]["weight"].item() == pytest.approx(np.dot(weights, values), rel=1e-12)


class Pair(nn.Module):
    def __init__(self, order):
        super().__init__()
        for name in order:
            self.register_parameter(name, nn.Parameter(torch.full((2,), {"a": 1.0, "b": 2.0, "c": 3.0}[name])))


def test_tracks_go_by_name_not_by_order():
    ema = PowerEma(Pair("ab"), [0.1])
    swapped = Pair("ba")
    for step in range(1, 5):
        ema.update(swapped, step, 1)
    assert ema.tracks["0.1"]["a"].tolist() == pytest.approx([1, 1])
    assert ema.tracks["0.1"]["b"].tolist() == pytest.approx([2, 2])
    exported = ema.export(Pair("ba"), 0.1)
    assert exported.a.tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match=r"differ in \['c'\]"):
        ema.update(Pair("abc"), 9, 1)


def test_export_averages_weights_copies_buffers_and_folds():
    network = randomise(tiny_flow())
    ema = PowerEma(network, [0.1])
    before = deepcopy(network)
    randomise(network, 0.3)
    advance_spectral_norm(network, 3)
    network.register_buffer("seen", torch.tensor([7.0]))
    ema.update(network, 100, 10)
    assert not any("spectral" in name for name in ema.tracks["0.1"])
    live = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    exported = ema.export(network, 0.1)
    assert exported.seen.tolist() == [7.0]
    assert not spectral_layers(exported)
    assert not exported.training
    assert not any(p.requires_grad for p in exported.parameters())
    assert all(torch.equal(live[name], tensor) for name, tensor in network.state_dict().items())
    assert spectral_layers(network), "the live one keeps its norms"
    normalised = {id(layer.weight) for layer, _ in spectral_layers(network)}
    old, new = dict(before.named_parameters()), dict(network.named_parameters())
    beta = 0.9 ** (exponent(0.1) + 1)
    checked = [0, 0]
    for name, parameter in exported.named_parameters():
        average = (beta * old[name] + (1 - beta) * new[name]).detach()
        if id(new[name]) in normalised:
            sigma = float(average.norm() / parameter.norm())
            torch.testing.assert_close(parameter, average / sigma)
            # power iteration reaches the largest singular value from below
            assert 0.95 < sigma / float(torch.linalg.matrix_norm(average.flatten(1), 2)) < 1.0001
        else:
            torch.testing.assert_close(parameter, average)
        checked[id(new[name]) in normalised] += 1
    assert min(checked) > 5


def test_tracks_survive_a_checkpoint_and_refuse_others(tmp_path):
    model = scalar_model(1.0)
    ema = PowerEma(model, [0.05, 0.1])
    model.weight.data.fill_(2.0)
    ema.update(model, 20, 10)
    save_checkpoint(tmp_path, 20, {"ema": ema.state_dict()})
    saved = load_newest(tmp_path)[0]["ema"]
    fresh = PowerEma(scalar_model(9.0), [0.05, 0.1])
    fresh.load_state_dict(saved)
    assert {k: t["weight"].item() for k, t in fresh.tracks.items()} == {
        k: t["weight"].item() for k, t in ema.tracks.items()
    }
    with pytest.raises(ValueError, match="EMA tracks"):
        PowerEma(model, [0.05]).load_state_dict(saved)
    with pytest.raises(ValueError, match="parameters differ"):
        PowerEma(Pair("ab"), [0.05, 0.1]).load_state_dict(saved)


def test_the_rate_rises_linearly_then_stays():
    config = TrainConfig(images=1000, learning_rate=0.8, warmup=100)
    rates = [learning_rate(config, seen) for seen in (0, 49, 99, 100, 999, 5000)]
    assert rates == pytest.approx([0.008, 0.4, 0.8, 0.8, 0.8, 0.8])
    assert learning_rate(TrainConfig(learning_rate=0.8), 0) == 0.8


def test_the_rate_falls_along_a_cosine_to_zero():
    config = TrainConfig(images=1100, learning_rate=0.8, warmup=100, decay="cosine")
    # cos 60 degrees is a half: 0.75 of the rate after a third
    rates = [learning_rate(config, seen) for seen in (49, 100, 100 + 1000 / 3, 600, 1100, 2000)]
    assert rates == pytest.approx([0.4, 0.8, 0.6, 0.4, 0, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("interval", "before", "after", "expected"),
    [
        (100, 0, 99, False),
        (100, 0, 100, True),
        (100, 100, 199, False),
        (100, 96, 128, True),
        (100, 100, 100, False),
        (100, 150, 450, True),
        (0, 0, 1000, False),
    ],
)
def test_an_interval_is_due_once_a_multiple_is_passed(interval, before, after, expected):
    assert due(interval, before, after) is expected


def test_counts_are_rounded_up_to_whole_steps():
    assert [whole_steps(n, 48) for n in (1, 47, 48, 49, 1000)] == [48, 48, 48, 96, 1008]


def test_too_many_bad_steps_in_a_row_stop_the_run_with_their_files():
    guard = NonFinite(3)
    assert [guard.record(ok, ["x.jpg"]) for ok in (False, False, True, False, False)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert (guard.count, guard.in_a_row) == (4, 2)
    with pytest.raises(UserError, match=r"3 steps in a row.*train\.learning_rate.*: a\.jpg, b\.png"):
        guard.record(False, ["a.jpg", "b.png"])


def one_step(gradient, clip=0.0):
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    set_learning_rate(optimizer, 0.5)
    model.weight.grad = torch.tensor([gradient])
    metrics = Metrics()
    done = take_step(optimizer, model, clip, CPU, metrics, "norm")
    assert model.weight.grad is None
    return done, model.weight[0].tolist(), metrics.take()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(bad):
    assert one_step([1.0, bad]) == (False, [1.0, 1.0], {})


def test_a_step_moves_the_weights_by_the_clipped_gradient():
    assert one_step([3.0, 4.0]) == (True, [-0.5, -1.0], {"norm": 5.0})
    done, weights, metrics = one_step([3.0, 4.0], clip=1.0)
    assert done
    assert weights == pytest.approx([1 - 0.3, 1 - 0.4], abs=1e-5)
    assert metrics == {"norm": 5.0}, "the norm before clipping"


@pytest.fixture
def config(tmp_path):
    return AutoencoderTraining(
        run_dir=str(tmp_path / "run"),
        image_size=[32, 32],
        model=tiny_autoencoder_config(),
        data=ImageDataConfig(root="photos"),
        train=TrainConfig(images=100),
    )


def changed(config, key, value):
    """A copy with one dotted key changed."""
    copy = deepcopy(config)
    *parts, last = key.split(".")
    target = copy
    for part in parts:
        target = getattr(target, part)
    assert getattr(target, last) != value
    setattr(target, last, value)
    return copy


@pytest.fixture
def run(config):
    run = open_run(config, "f1", CPU)
    save_checkpoint(run, 10, state(10))
    return run


def test_a_run_holds_its_config_and_where_it_comes_from(run, config):
    assert load_saved(AutoencoderTraining, run / "config.yaml") == config
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["data_fingerprint"] == "f1"
    assert provenance["torch"] == torch.__version__
    assert {"argv", "git_commit", "pyramid_ldm", "python"} <= provenance.keys()


@pytest.mark.parametrize(
    ("key", "value", "old"),
    [
        ("train.batch_size", 8, "4"),
        ("train.learning_rate", 1.0, "0.0001"),
        ("seed", 1, "0"),
        ("data.flip", False, "True"),
        ("loss.gan.weight", 0.0, "0.5"),
        ("model.levels", [LevelConfig(16, 6), LevelConfig(8, 5)], ".*"),
    ],
)
def test_another_config_is_refused_by_key(run, config, key, value, old):
    with pytest.raises(UserError, match=rf"was started with {key}={old}, now .*; use a new run_dir") as caught:
        open_run(changed(config, key, value), "f1", CPU)
    assert "\n" not in str(caught.value)
    assert load_saved(AutoencoderTraining, run / "config.yaml") == config


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.images", 500), ("data.root", "moved"), ("data.workers", 0), ("log.every", 7), ("checkpoint.keep_last", 5),
     ("device", "cpu"), ("precision", "fp32")],
)  # fmt: skip
def test_length_place_and_intervals_may_change(run, config, key, value):
    longer = changed(config, key, value)
    assert open_run(longer, "f1", CPU) == run
    assert load_saved(AutoencoderTraining, run / "config.yaml") == longer


def test_other_data_is_refused(run, config):
    with pytest.raises(UserError, match=r"was started on other data \(f1, now f2\)"):
        open_run(config, "f2", CPU)
    assert json.loads((run / "provenance.json").read_text())["data_fingerprint"] == "f1"


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="run: is not empty and not a run"):
        open_run(config, "f1", CPU)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_only_the_first_process_writes(config, tmp_path):
    other = dataclasses.replace(CPU, rank=1)
    assert open_run(config, "f1", other) == tmp_path / "run"
    assert not (tmp_path / "run").exists()
