"""What breaks under a running command: files, disks, limits, processes. Each is one line, and nothing is lost."""

import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import CPU, OPTIONS
from PIL import Image, TiffImagePlugin
from safetensors.torch import load_file, save_file
from test_training import AE_CONFIG, FLOW_CONFIG
from torch.utils.data import Dataset

from pyramid_ldm import encode as encoding
from pyramid_ldm.cli import main
from pyramid_ldm.data.folder import find_images, split_held_out
from pyramid_ldm.data.latents import LatentRecords
from pyramid_ldm.data.loading import load_batches
from pyramid_ldm.data.photographs import load_pixels
from pyramid_ldm.data.shards import INDEX, LatentCache
from pyramid_ldm.demo.scenes import render_landscape
from pyramid_ldm.encode import encode
from pyramid_ldm.errors import UserError
from pyramid_ldm.signals import Interrupted

SETTINGS = ("data.max_bad_fraction=0.5", "loss.gan.weight=0", "train.images=16", "train.decay=constant", "log.every=8",
            "log.pictures_every=16")  # fmt: skip


@pytest.fixture
def shards(finished, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(finished, tmp_path / "shards")


@pytest.fixture
def photos(photographs, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(photographs, tmp_path / "photos")


@pytest.fixture
def train(tmp_path, capsys):
    """Runs train-ae; returns its code and its stderr."""
    (tmp_path / "ae.yaml").write_text(AE_CONFIG)

    def train(photos, *settings, run="ae"):
        capsys.readouterr()
        words = ["train-ae", tmp_path / "ae.yaml", f"data.root={photos}", f"run_dir={tmp_path / run}"]
        return main([*map(str, words), *SETTINGS, *settings]), capsys.readouterr().err

    return train


def model_of(run):
    return load_file(run / "model" / "model.safetensors")


# Damaged shards


def header(path, **changes):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    content = json.loads(data[8 : 8 + length])
    content["records"] |= changes
    new = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def payload(path, change):
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    change(memoryview(data)[start:])
    path.write_bytes(data)


def zero(view):
    view[:] = bytes(len(view))


def flip(view):
    view[len(view) // 2] ^= 1


def swap(a, b):
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


DAMAGES = {
    "shard gone": lambda a, b: a.unlink(),
    "shard empty": lambda a, b: a.write_bytes(b""),
    "shard of seven bytes": lambda a, b: a.write_bytes(a.read_bytes()[:7]),
    "cut in the header": lambda a, b: a.write_bytes(a.read_bytes()[:40]),
    "cut in the payload": lambda a, b: a.write_bytes(a.read_bytes()[:-1]),
    "a byte too many": lambda a, b: a.write_bytes(a.read_bytes() + b"x"),
    "a directory": lambda a, b: (a.unlink(), a.mkdir()),
    "header of 2^62 bytes": lambda a, b: a.write_bytes(struct.pack("<Q", 2**62) + a.read_bytes()[8:]),
    "header of 2^64 - 1 bytes": lambda a, b: a.write_bytes(b"\xff" * 8 + a.read_bytes()[8:]),
    "header of no bytes": lambda a, b: a.write_bytes(bytes(8) + a.read_bytes()[8:]),
    "header is no JSON": lambda a, b: a.write_bytes(a.read_bytes()[:8] + b"\xff" + a.read_bytes()[9:]),
    "header is deep": lambda a, b: a.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000),
    "another type": lambda a, b: header(a, dtype="I32"),
    "more rows": lambda a, b: header(a, shape=[2**40, 176]),
    "negative rows": lambda a, b: header(a, shape=[-1, 176]),
    "rows in words": lambda a, b: header(a, shape=["six", 176]),
    "narrower rows": lambda a, b: header(a, shape=[6, 175]),
    "offsets beyond the end": lambda a, b: header(a, data_offsets=[2**62, 2**62 + 4]),
    "offsets the wrong way": lambda a, b: header(a, data_offsets=[8, 0]),
    "no records": lambda a, b: save_file({"other": torch.zeros(2)}, a),
    "zeros": lambda a, b: payload(a, zero),
    "one bit": lambda a, b: payload(a, flip),
    "two shards swapped": swap,
    "another shard": lambda a, b: a.write_bytes(b.read_bytes()),
    "sidecar gone": lambda a, b: a.with_suffix(".json").unlink(),
    "sidecar empty": lambda a, b: a.with_suffix(".json").write_text(""),
    "sidecar cut": lambda a, b: a.with_suffix(".json").write_bytes(a.with_suffix(".json").read_bytes()[:-9]),
    "sidecar a list": lambda a, b: a.with_suffix(".json").write_text("[]"),
    "sidecars swapped": lambda a, b: swap(a.with_suffix(".json"), b.with_suffix(".json")),
    "sidecar's rows changed": lambda a, b: rewrite(a.with_suffix(".json"), rows=[["x", False, 0, "train"]] * 6),
    "sidecar's hash changed": lambda a, b: rewrite(a.with_suffix(".json"), sha256="0" * 64),
    "index cut": lambda a, b: (a.parent / INDEX).write_bytes((a.parent / INDEX).read_bytes()[:200]),
    "index no text": lambda a, b: (a.parent / INDEX).write_bytes(b"\xff\xfe" * 40),
    "index without plan": lambda a, b: rewrite(a.parent / INDEX, plan=None),
    "index with other statistics": lambda a, b: rewrite(a.parent / INDEX, statistics=[]),
    "index with fewer shards": lambda a, b: rewrite(a.parent / INDEX, shards=[]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_before_training_and_mended_by_encode(
    shards, autoencoder_directory, photographs, tmp_path, capsys, damage
):
    first, second = shards / "00000.safetensors", shards / "00001.safetensors"
    whole = {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()}
    DAMAGES[damage](first, second)
    (tmp_path / "flow.yaml").write_text(FLOW_CONFIG)
    words = ["train-flow", tmp_path / "flow.yaml", f"data.shards={shards}", f"run_dir={tmp_path / 'flow'}"]
    assert main(list(map(str, words))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pyramid-ldm: ")
    assert str(shards) in error
    assert "again" in error
    assert not (tmp_path / "flow" / "checkpoints").exists()
    if "index" in damage and "cut" not in damage and "text" not in damage:
        return  # `encode` refuses what a person has edited
    if damage == "a directory":
        first.rmdir()
    if "index" in damage:
        (shards / INDEX).unlink()  # as the line says
    encode(autoencoder_directory, photographs, shards, OPTIONS, CPU)
    assert {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()} == whole


def test_open_files_do_not_grow_with_the_shards(autoencoder_directory, photographs, tmp_path):
    options = dataclasses.replace(OPTIONS, shard_size=1)
    in_use = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 12, hard))
    try:
        cache = LatentCache(encode(autoencoder_directory, photographs, tmp_path / "out", options, CPU))
        cache.verify()
        rows = [cache.read(i) for i in range(len(cache.rows))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(rows) == len(cache.shards) == 24


# A disk that fails

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
static int opened;
static int fails(const char *path) {
    const char *part = getenv("SHIM_PATH"), *after = getenv("SHIM_AFTER");
    return part && path && strstr(path, part) && strstr(path, "g") && __sync_add_and_fetch(&opened, 1) > atoi(after);
}
#define OPEN(NAME) \
    int NAME(const char *path, int flags, ...) { \
        va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
        if (!(flags & O_DIRECTORY) && fails(path)) { errno = EIO; return -1; } \
        return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #NAME))(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """A library that makes every open of a file below SHIM_PATH fail after SHIM_AFTER of them."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"], check=True)
    return folder / "shim.so"


@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_disk_that_fails_in_the_middle_leaves_no_index_and_the_same_command_finishes(
    shim, autoencoder_directory, photos, tmp_path, workers
):
    for i in range(12, 24):
        Image.fromarray(render_landscape(i, 48, 64)).save(photos / f"{i}.png")
    words = ["encode", autoencoder_directory, "--data", photos, "--out", tmp_path / "out", "--shard-size", 8,
             "--batch-size", 2, "--workers", workers, "--precision", "fp32"]  # fmt: skip
    command = [sys.executable, "-m", "pyramid_ldm", *map(str, words)]
    # Each file is opened once to be hashed; the disk goes when some have been opened again to be encoded.
    broken = os.environ | {"LD_PRELOAD": str(shim), "SHIM_PATH": f"{photos}/", "SHIM_AFTER": str(24 + 7 - workers)}
    failed = subprocess.run(command, env=broken, capture_output=True, text=True, timeout=200)
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("pyramid-ldm: ")]
    assert "cannot be read (Input/output error, 4 attempts)" in line
    assert not (tmp_path / "out" / INDEX).exists()
    assert main(list(map(str, words))) == 0
    cache = LatentCache(tmp_path / "out")
    assert len({row.source for row in cache.rows}) == 24
    assert cache.missing == 0


# Files that are no images


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_bad_files_are_counted_by_content_wherever_they_lie(photos, tmp_path, train):
    """The run goes on bit for bit when the folder is moved and the named files are removed, as the message asks."""
    training = split_held_out(find_images(photos), 0.1)[0]
    for file in training[:2]:
        cut(Path(file.path))
    assert train(photos, "train.images=20")[0] == 0
    code, error = train(photos, "train.images=12", run="halves")
    assert code == 0
    assert error.count("skipped ") == 2
    moved = photos.rename(tmp_path / "elsewhere")
    for file in training[:2]:
        (moved / Path(file.path).name).unlink()
    code, error = train(moved, "train.images=20", run="halves")
    assert code == 0, error
    assert "skipped" not in error
    a, b = (model_of(tmp_path / run) for run in ("ae", "halves"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_was_refused_stays_refused_until_it_is_mended(photos, autoencoder_directory, tmp_path, train, capsys):
    """The same command again is refused again; it goes on when the named files are removed, as the line says."""
    files = sorted(photos.iterdir())
    for path in files[:6]:
        cut(path)
    words = ["encode", str(autoencoder_directory), "--data", str(photos), "--out", str(tmp_path / "out"), "--workers"]

    def encode():
        return main([*words, "0", "--shard-size", "4"]), capsys.readouterr().err

    for run in (lambda: train(photos, "data.max_bad_fraction=0.01"), encode):
        for _ in range(3):
            code, error = run()
            assert code == 2
            named = {path for path in files if f"{path}: " in error}
            assert len(named) > 3, "each time"
        for path in named:
            shutil.move(path, tmp_path)
        assert run()[0] == 0
        for path in named:
            shutil.move(tmp_path / path.name, path)
    assert len({row.source for row in LatentCache(tmp_path / "out").rows}) == 6


def test_files_that_cannot_be_opened_count_from_the_start(photos, autoencoder_directory, tmp_path, capsys):
    for i in range(40):
        (photos / f"gone{i}.png").symlink_to("nowhere")
    words = ["encode", str(autoencoder_directory), "--data", str(photos), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "40 of 52 images cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train-ae", "encode", "reconstruct", "evaluate"])
def test_too_many_bad_files_stop_every_command(photos, autoencoder_directory, tmp_path, train, capsys, command):
    for path in sorted(photos.iterdir())[:6]:
        cut(path)
    if command == "train-ae":
        code, error = train(photos, "data.max_bad_fraction=0.2")
        advice = "data.max_bad_fraction"
    else:
        words = {
            "encode": ["--data", photos, "--out", tmp_path / "out", "--max-bad-fraction", "0.2", "--workers", "0"],
            "reconstruct": ["--data", photos, "--out", tmp_path / "out", "--max-bad-fraction", "0.2"],
            "evaluate": ["--data", photos, "--out", tmp_path / "out.json", "--max-bad-fraction", "0.2"],
        }[command]
        code = main(list(map(str, [command, autoencoder_directory, *words])))
        error, advice = capsys.readouterr().err, "--max-bad-fraction"
    assert code == 2
    last = error.strip().splitlines()[-1]
    assert last.startswith("pyramid-ldm: ")
    assert f"more than {advice}" in last
    assert not (tmp_path / "out" / INDEX).exists()


def test_a_damaged_held_out_file_is_named_and_ends_no_run(photos, tmp_path, train):
    (held_out,) = split_held_out(find_images(photos), 0.1)[1]
    cut(Path(held_out.path))
    code, error = train(photos)
    assert code == 0, error
    assert Path(held_out.path).name in error
    assert (tmp_path / "ae" / "model" / "model.safetensors").exists()
    assert list((tmp_path / "ae" / "images").glob("*.png")), "of training images, as there are no others"


def test_index_and_info_say_what_is_missing(photos, autoencoder_directory, tmp_path, capsys):
    bad = sorted(photos.iterdir())[3]
    cut(bad)
    out = encode(
        autoencoder_directory, photos, tmp_path / "out", dataclasses.replace(OPTIONS, max_bad_fraction=0.5), CPU
    )
    assert "1 of 12 images are missing" in capsys.readouterr().err
    assert LatentCache(out).missing == 1
    assert main(["info", str(out)]) == 0
    assert "1 image" in (said := capsys.readouterr().out)
    assert "missing" in said
    encode(autoencoder_directory, photos, out, dataclasses.replace(OPTIONS, max_bad_fraction=0.5), CPU)
    assert "is complete, without 1 images" in capsys.readouterr().err
    bad.unlink()  # as the message asks
    encode(autoencoder_directory, photos, out, dataclasses.replace(OPTIONS, max_bad_fraction=0.5), CPU)
    assert "is complete, without 1 images" in capsys.readouterr().err


def test_a_photograph_that_comes_back_is_encoded_by_the_next_encode(
    photos, autoencoder_directory, tmp_path, monkeypatch
):
    """It was there when the folder was listed, and not when its shard was made."""
    gone, options = sorted(photos.iterdir())[0], dataclasses.replace(OPTIONS, max_bad_fraction=0.5)

    def vanish(path, *arguments, **keywords):
        if Path(path) == gone and gone.exists():
            gone.rename(tmp_path / "away")
        return load_pixels(path, *arguments, **keywords)

    monkeypatch.setattr(encoding, "load_pixels", vanish)
    out = encode(autoencoder_directory, photos, tmp_path / "out", options, CPU)
    assert LatentCache(out).missing == 1
    monkeypatch.undo()
    (tmp_path / "away").rename(gone)
    encode(autoencoder_directory, photos, out, options, CPU)
    cache = LatentCache(out)
    assert cache.missing == 0
    assert len(cache.rows) == 24


def test_junk_beside_the_pixels_is_no_warning(photos, autoencoder_directory, tmp_path, recwarn):
    for path in photos.glob("*.jpg"):
        Image.open(path).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xffjunk")
    words = ["encode", autoencoder_directory, "--data", photos, "--out", tmp_path / "out", "--workers", "0"]
    assert main(list(map(str, words))) == 0
    assert len(LatentCache(tmp_path / "out").rows) == 24
    assert not [str(found.message) for found in recwarn if "PIL" in found.filename]


# Small photographs, and pictures of our own


def test_small_photographs_are_left_out_unless_asked_for(photos, tmp_path, train, capsys):
    for path in sorted(photos.iterdir())[:5]:
        Image.open(path).resize((30, 40)).save(path)
    code, error = train(photos)
    assert code == 0
    assert "photos: 5 (00.jpg 40x30, 01.png 40x30, 02.jpg 40x30, ...)" in error
    assert "smaller than 32x32" in error
    assert "data.upscale=true" in error
    assert "6 images to train on, 1 held out" in error
    code, error = train(photos, "data.upscale=true", run="all")
    assert code == 0
    assert "smaller" not in error
    assert "11 images to train on, 1 held out" in error
    for flag, records in (((), 14), (("--upscale",), 24)):
        out = tmp_path / f"z{records}"
        words = ["encode", tmp_path / "ae", "--data", photos, "--out", out, "--workers", "0", *flag]
        assert main(list(map(str, words))) == 0
        assert len(LatentCache(out).rows) == records
        assert ("smaller" in capsys.readouterr().err) == (not flag)
    code, error = train(photos, "image_size=[64, 64]")
    assert code == 2


def test_a_run_inside_its_photographs_never_sees_its_own_pictures(photos, train, tmp_path, monkeypatch, capsys):
    """`cd photos; pyramid-ldm train-ae ... data.root=.`, whose default run_dir lies below."""
    monkeypatch.chdir(photos)
    words = ["train-ae", str(tmp_path / "ae.yaml"), "data.root=.", "run_dir=runs/ae", *SETTINGS]
    (tmp_path / "ae.yaml").write_text(AE_CONFIG)
    codes = [main([*words, f"train.images={n}"]) for n in (16, 32)]
    said = capsys.readouterr().err
    if codes[0] == 2:  # refused before anything was written
        assert "runs/ae" in said
        assert not (photos / "runs").exists()
        return
    assert codes == [0, 0]
    assert said.count("11 images to train on, 1 held out") == 2
    assert list((photos / "runs/ae/images").glob("*.png"))


# Processes that read data


class Slow(Dataset):
    def __getitem__(self, index):
        if index == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 1024, 2048, dtype=torch.uint8)


def stack(items):
    return torch.stack(items).numpy()


def test_a_dead_worker_is_noticed():
    begin = time.monotonic()
    batches = load_batches(Slow(), stack, [[i] for i in range(20)], workers=2)
    with pytest.raises(UserError, match=r"was killed, perhaps because memory ran out; lower data\.workers"):
        list(batches)
    assert time.monotonic() - begin < 30


class Full(Dataset):
    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(5, "Input/output error", "a.png"), "a.png: Input/output error"),
        (MemoryError(), "out of memory while reading data"),
        (UserError("no image can be read"), "no image can be read"),
    ],
)
def test_what_a_worker_meets_is_one_line(error, message, workers):
    with pytest.raises(UserError, match=message):
        list(load_batches(Full(error), stack, [[0], [1]], workers=workers))


class Unsendable:
    def __reduce__(self):
        raise MemoryError


def unsendable(items):
    return Unsendable()


def test_a_batch_that_cannot_be_sent_is_one_line():
    with pytest.raises(UserError, match="out of memory while reading data"):
        list(load_batches(Full(None), unsendable, [[]], workers=1))


def children():
    return {process.pid for process in multiprocessing.active_children()}


def test_processes_end_with_the_iterator_however_far_it_got():
    before = children()
    batches = load_batches(range(100), list, [[i] for i in range(100)], workers=2)
    assert children() == before, "none before a batch is asked for"
    assert next(batches) == [0]
    assert len(children() - before) == 2
    batches.close()
    assert children() == before
    assert list(load_batches(range(9), list, [[0, 1], [2]], workers=2)) == [[0, 1], [2]]
    assert children() == before


PARENT = """
import multiprocessing, sys, time
from pyramid_ldm.data.loading import load_batches
batches = load_batches(range(100), list, [[i] for i in range(100)], workers=2)
next(batches)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


def test_processes_end_with_the_one_that_started_them():
    """Killed with -9 it cannot tell them."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_while_a_file_is_read_is_not_the_files_fault(photos, monkeypatch):
    """With data.workers=0 the signal comes in the middle of decoding, where any Exception means a damaged file."""
    Image.effect_noise((64, 64), 50).convert("RGB").save(photos / "a.tiff")

    def interrupted(image):
        raise Interrupted

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", interrupted)
    with pytest.raises(Interrupted):
        load_pixels(str(photos / "a.tiff"), (32, 32), (1.0, 0.5, 0.5))


def test_a_shard_that_changes_under_a_reader_is_noticed(shards):
    """`encode` may write it anew, with other rows, while a training reads."""
    cache = LatentCache(shards)
    cache.read(0)
    path = cache.shards[0].path
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-8] + bytes(8))
    with pytest.raises(UserError, match="has changed since it was opened"):
        cache.read(0)


def test_a_cache_without_training_rows_is_one_line(finished):
    with pytest.raises(UserError, match="holds no record to train on"):
        LatentRecords(LatentCache(finished), [], 0, "sample")


def test_batches_do_not_travel_through_shared_memory(photos, tmp_path, train):
    """Containers have 64 MiB of /dev/shm; what is in it while a run trains is watched."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("no /dev/shm")
    before, most, stop = {path.name for path in folder.iterdir()}, [0], threading.Event()

    def watch():
        while not stop.is_set():
            found = [path for path in folder.iterdir() if path.name.startswith("torch_") and path.name not in before]
            most[0] = max(most[0], len(found))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code, error = train(photos, "data.workers=2")
    stop.set()
    watcher.join()
    assert code == 0, error
    assert most[0] == 0
