import errno
import json
import shutil

import pytest
import torch
from torch import nn

from pyramid_ldm.errors import UserError
from pyramid_ldm.files import write_atomic, write_json, write_text
from pyramid_ldm.ownership import held, replace_directory
from pyramid_ldm.training.checkpoint import checkpoint_directories, load_newest, prune, save_checkpoint
from pyramid_ldm.training.runtime import Runtime

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
        manifest.write_text('{"format": 2')


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
    with pytest.raises(UserError, match="checkpoint format 7, this version reads 2"):
        load_newest(tmp_path)


def test_leftovers_of_a_killed_save_are_ignored_and_cleaned_up(tmp_path):
    fill(tmp_path, 10)
    leftover = tmp_path / "checkpoints" / ".00000020.4711.tmp"
    leftover.mkdir()
    write_json(leftover / "pyramid_ldm.json", {"format": 1, "kind": "checkpoint"})
    (leftover / "state.pt").write_bytes(b"half")
    assert load_newest(tmp_path)[0]["images_seen"] == 10
    with held(tmp_path):
        assert not leftover.exists()


def test_the_newest_is_known_by_its_number_whatever_its_digits(tmp_path):
    """From 100,000,000 images on, names have nine digits."""
    fill(tmp_path, 99_000_000, 100_000_000)
    assert load_newest(tmp_path)[0]["images_seen"] == 100_000_000
    fill(tmp_path, 101_000_000)
    prune(tmp_path, keep_last=2, keep_every=0)
    assert names(tmp_path) == [100_000_000, 101_000_000]


def test_somebody_elses_folders_are_no_checkpoints_of_ours(tmp_path):
    fill(tmp_path, 10, 20)
    (tmp_path / "checkpoints" / "99999999").mkdir()
    (tmp_path / "checkpoints" / "99999999" / "thesis.txt").write_text("mine")
    prune(tmp_path, keep_last=1, keep_every=0)
    assert names(tmp_path) == [20, 99999999]
    assert load_newest(tmp_path)[0]["images_seen"] == 20


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


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 64 vs 0"), ValueError("No space left on device")])
def test_a_full_disk_is_an_oserror_whatever_the_writer_raises(tmp_path, monkeypatch, error):
    """torch.save says "unexpected pos", safetensors wraps the system's words."""
    usage = shutil.disk_usage(tmp_path)

    def fail(_):
        raise error

    for write in (write_atomic, lambda path, fail: replace_directory(path, "model", fail)):
        if isinstance(error, RuntimeError):
            with pytest.raises(RuntimeError, match="unexpected pos"):
                write(tmp_path / "x", fail)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
        with pytest.raises(OSError, match="No space left") as caught:
            write(tmp_path / "x", fail)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path / "x")
        assert not list(tmp_path.iterdir())
        monkeypatch.undo()


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
