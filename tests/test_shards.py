import dataclasses
import functools
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, OPTIONS, SIZES, WIDTH, lively_autoencoder
from safetensors.torch import load_file

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.config.flow import FlowDataConfig, FlowTraining
from pyramid_ldm.data.folder import find_images, split_held_out
from pyramid_ldm.data.latents import LatentRecords
from pyramid_ldm.data.photographs import load_crop
from pyramid_ldm.data.shards import LatentCache, split_record, write_shard
from pyramid_ldm.encode import EncodeOptions, encode, view_batches
from pyramid_ldm.errors import UserError
from pyramid_ldm.ownership import claim
from pyramid_ldm.pyramid import LatentScaling
from pyramid_ldm.randomness import uniform
from pyramid_ldm.training.runtime import Runtime


@pytest.fixture
def shards(finished, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(finished, tmp_path / "shards")


def all_records(directory):
    return torch.cat([load_file(path)["records"] for path in sorted(directory.glob("*.safetensors"))])


load_autoencoder = functools.cache(PyramidAutoencoder.from_pretrained)


@torch.inference_mode()
def encode_directly(directory, image):
    return load_autoencoder(directory).encode(image[None])


def centre(file):
    return load_crop(file.path, (32, 32), zoom=1.0, top=0.5, left=0.5)


def test_a_record_is_all_means_then_all_log_variances_coarse_to_fine(finished, autoencoder_directory, photographs):
    records, cache = all_records(finished), LatentCache(finished)
    assert records.dtype == torch.float32
    assert records.shape == (len(cache.rows), 2 * WIDTH)
    files = {file.digest: file for file in find_images(photographs)}
    for index, row in enumerate(cache.rows):
        image = centre(files[row.source])
        posterior = encode_directly(autoencoder_directory, image.flip(-1) if row.mirrored else image)
        parts = [*posterior.mean, *posterior.log_variance]
        assert [part.shape[1:] for part in parts] == [(6, 2, 2), (4, 4, 4)] * 2
        expected = torch.cat([part[0].reshape(-1) for part in parts])
        torch.testing.assert_close(records[index], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(cache.read(index), records[index])


def test_splitting_a_record_gives_back_the_levels(finished):
    cache = LatentCache(finished)
    record = cache.read(3)
    means, log_variances = split_record(record[None], cache.plan)
    assert torch.equal(means[0][0], record[:24].reshape(6, 2, 2))
    assert torch.equal(means[1][0], record[24:88].reshape(4, 4, 4))
    assert torch.equal(log_variances[0][0], record[88:112].reshape(6, 2, 2))
    assert torch.equal(log_variances[1][0], record[112:].reshape(4, 4, 4))


def test_both_splits_are_mirrored(finished, photographs):
    train, held = split_held_out(find_images(photographs), 0.3)
    rows = LatentCache(finished).rows
    assert train
    assert held
    found = [(r.source, r.mirrored, r.crop, r.split) for r in rows]
    expected = [(f.digest, mirrored, 0, "train") for f in train for mirrored in (False, True)]
    assert found == expected + [(f.digest, mirrored, 0, "held_out") for f in held for mirrored in (False, True)]
    assert LatentCache(finished).indices("held_out") == list(range(2 * len(train), len(rows)))


def test_no_flip_halves_the_training_rows(autoencoder_directory, photographs, tmp_path):
    out = encode(autoencoder_directory, photographs, tmp_path, dataclasses.replace(OPTIONS, flip=False), CPU)
    assert len(LatentCache(out).rows) == 12
    assert not any(row.mirrored for row in LatentCache(out).rows)


def test_statistics_are_exact(finished):
    records = all_records(finished).double().numpy()
    levels = np.split(records, np.cumsum([*SIZES, *SIZES])[:-1], axis=1)
    for statistics, mean, log_variance, channels in zip(
        LatentCache(finished).statistics, levels[:2], levels[2:], (6, 4), strict=True
    ):
        std = np.sqrt(mean.var() + np.exp(log_variance).mean())
        assert statistics["std"] == pytest.approx(std, rel=1e-9)
        mean, log_variance = (x.reshape(len(records), channels, -1) for x in (mean, log_variance))
        for c in range(channels):
            assert statistics["channel_mean"][c] == pytest.approx(mean[:, c].mean(), rel=1e-9)
            expected = np.sqrt(mean[:, c].var() + np.exp(log_variance[:, c]).mean())
            assert statistics["channel_std"][c] == pytest.approx(expected, rel=1e-9)


def test_scaling_modes(finished):
    cache = LatentCache(finished)
    cache.statistics = [
        {"std": 2.5, "channel_mean": [float(c) for c in range(6)], "channel_std": [1.0 + c for c in range(6)]},
        {"std": 0.4, "channel_mean": [9.0] * 4, "channel_std": [3.0] * 4},
    ]
    zeros = ((0.0,) * 6, (0.0,) * 4)
    assert cache.scaling("unit") == LatentScaling(zeros, ((2.5,) * 6, (0.4,) * 4))
    assert cache.scaling("paper") == LatentScaling(zeros, ((2.5,) * 6, (1.0,) * 4))
    assert cache.scaling("channel") == LatentScaling(
        ((0.0, 1.0, 2.0, 3.0, 4.0, 5.0), (9.0,) * 4), ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (3.0,) * 4)
    )


def test_scaled_samples_have_unit_deviation(finished):
    cache = LatentCache(finished)
    dataset = LatentRecords(cache, list(range(len(cache.rows))), seed=0, posterior="sample", shuffle=False)
    flat = torch.stack([dataset[p][0] for p in range(40 * len(cache.rows))])
    raw = (flat[:, :24].unflatten(1, (6, 2, 2)), flat[:, 24:].unflatten(1, (4, 4, 4)))
    for level in cache.scaling("unit").scale(raw):
        assert float(level.std()) == pytest.approx(1, abs=0.03)
    for level in cache.scaling("channel").scale(raw):
        np.testing.assert_allclose(level.mean(dim=(0, 2, 3)), 0, atol=0.06)
        np.testing.assert_allclose(level.transpose(0, 1).flatten(1).std(dim=1), 1, atol=0.06)


def test_scaling_is_affine_per_channel_and_undone_exactly():
    scaling = LatentScaling(((1.0, -2.0), (0.5,)), ((2.0, 4.0), (8.0,)))
    raw = (torch.tensor([3.0, 6.0]).view(1, 2, 1, 1), torch.tensor([[4.5, -7.5]]).view(1, 1, 1, 2))
    scaled = scaling.scale(raw)
    assert [level.flatten().tolist() for level in scaled] == [[1.0, 2.0], [0.5, -1.0]]
    assert all(torch.equal(a, b) for a, b in zip(scaling.unscale(scaled), raw, strict=True))


def break_by(kind, directory):
    shard, sidecar = directory / "00001.safetensors", directory / "00001.json"
    if kind == "no shard":
        shard.unlink()
    elif kind == "no sidecar":
        sidecar.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-40])


@pytest.mark.parametrize("kind", ["no shard", "no sidecar", "truncated"])
def test_resuming_writes_only_what_is_missing(shards, finished, autoencoder_directory, photographs, kind):
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(names) >= 3
    (shards / "index.json").unlink()
    break_by(kind, shards)
    before = {path.name: path.stat() for path in shards.glob("0*") if not path.name.startswith("00001")}
    encode(autoencoder_directory, photographs, shards, OPTIONS, CPU)
    for name, old in before.items():
        now = (shards / name).stat()
        assert (now.st_mtime_ns, now.st_ino) == (old.st_mtime_ns, old.st_ino), name
    for path in finished.glob("*.*"):
        assert path.read_bytes() == (shards / path.name).read_bytes(), path.name


@pytest.mark.parametrize("kind", ["no shard", "no sidecar", "truncated"])
def test_a_finished_cache_that_lost_a_shard_is_named_and_mended(shards, autoencoder_directory, photographs, kind):
    break_by(kind, shards)
    with pytest.raises(UserError, match=r"00001\.\w+: .*encode.* again"):
        LatentCache(shards)
    encode(autoencoder_directory, photographs, shards, OPTIONS, CPU)
    assert len(LatentCache(shards).rows) == len(all_records(shards))


def test_a_finished_cache_is_not_encoded_again(shards, autoencoder_directory, photographs, capsys):
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir() if path.name != ".lock"}
    encode(autoencoder_directory, photographs, shards, OPTIONS, CPU)
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir() if path.name != ".lock"} == before
    assert "is complete" in capsys.readouterr().err


def test_without_an_index_encode_has_not_finished(shards, tmp_path):
    (shards / "index.json").unlink()
    with pytest.raises(UserError, match=r"index\.json: not found; .*encode. \(or .sample --pairs.\) again"):
        LatentCache(shards)
    with pytest.raises(UserError, match="nowhere: no such directory"):
        LatentCache(tmp_path / "nowhere")


def test_an_index_of_another_version_is_refused(shards):
    index = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps(index | {"format": 99}))
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        LatentCache(shards)


def check_refusal(autoencoder, data, out, options, key):
    with pytest.raises(UserError, match=rf"made with {key} = ") as caught:
        encode(autoencoder, data, out, options, CPU)
    assert "\n" not in str(caught.value)
    assert str(out) in str(caught.value)


@pytest.mark.parametrize("indexed", [True, False])
def test_other_latents_are_refused(shards, autoencoder_directory, photographs, tmp_path, indexed):
    if not indexed:
        (shards / "index.json").unlink()
    other = tmp_path / "other"
    lively_autoencoder(seed_shift=0.1).save_pretrained(other)
    check_refusal(other, photographs, shards, OPTIONS, "autoencoder")
    fewer = shutil.copytree(photographs, tmp_path / "fewer")
    (fewer / "03.png").unlink()
    check_refusal(autoencoder_directory, fewer, shards, OPTIONS, "data")
    for key, value in (("crops", 2), ("zoom", 1.5), ("flip", False), ("dtype", "float16"), ("validation", 0.1),
                       ("seed", 1), ("shard_size", 7)):  # fmt: skip
        check_refusal(
            autoencoder_directory, photographs, shards, dataclasses.replace(OPTIONS, **{key: value}), key
        )  # fmt: skip


def test_moving_the_photographs_is_not_other_data(shards, autoencoder_directory, photographs, tmp_path, capsys):
    encode(autoencoder_directory, shutil.copytree(photographs, tmp_path / "moved"), shards, OPTIONS, CPU)
    assert "is complete" in capsys.readouterr().err


def test_the_batch_size_does_not_make_another_cache(finished, autoencoder_directory, photographs, tmp_path):
    options = dataclasses.replace(OPTIONS, batch_size=3)
    out = encode(autoencoder_directory, photographs, tmp_path / "b3", options, CPU)
    assert LatentCache(out).plan == LatentCache(finished).plan
    torch.testing.assert_close(all_records(out), all_records(finished), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("side", "asked", "size"), [(256, None, 8), (1024, None, 4), (4096, None, 1), (4096, 3, 3)])
def test_large_images_are_encoded_a_few_at_a_time(finished, monkeypatch, side, asked, size):
    monkeypatch.setattr("pyramid_ldm.encode.load_batches", lambda views, collate, parts, **options: parts)
    plan = dataclasses.replace(LatentCache(finished).plan, image_size=[side, side])
    parts = view_batches([], plan, range(12), dataclasses.replace(OPTIONS, batch_size=asked))
    assert len(parts[0]) == size
    assert [i for part in parts for i in part] == list(range(12))


def test_two_processes_share_the_shards(finished, autoencoder_directory, photographs, tmp_path, monkeypatch):
    """Two threads with a barrier stand for them: each shard is written by one of the two, and all are there."""
    meeting, out, writers = threading.Barrier(2, timeout=60), tmp_path / "shared", {}

    class Side(Runtime):
        def barrier(self):
            meeting.wait()

        def first(self, make):
            return make()

    def record(directory, number, *rest):
        writers.setdefault(number, []).append(threading.get_ident())
        write_shard(directory, number, *rest)

    monkeypatch.setattr("pyramid_ldm.encode.write_shard", record)

    def work(rank):
        encode(autoencoder_directory, photographs, out, OPTIONS, Side(torch.device("cpu"), False, rank, 2))

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, rank) for rank in (0, 1)]:
            done.result()
    assert sorted(writers) == [0, 1, 2, 3]
    assert all(len(who) == 1 for who in writers.values())
    assert len({who[0] for who in writers.values()}) == 2
    for path in finished.glob("*.*"):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_float16_is_the_default_and_rounds(finished, autoencoder_directory, photographs, tmp_path):
    assert EncodeOptions().dtype == "float16"
    options = dataclasses.replace(OPTIONS, dtype="float16")
    records = all_records(encode(autoencoder_directory, photographs, tmp_path, options, CPU))
    assert records.dtype == torch.float16
    torch.testing.assert_close(records, all_records(finished).half(), rtol=2e-3, atol=1e-5)
    assert LatentCache(tmp_path).read(0).dtype == torch.float32


def test_values_beyond_float16_are_the_users_to_decide(photographs, tmp_path):
    model = lively_autoencoder()
    with torch.no_grad():
        model.encoder.levels[-1].head.conv.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "huge")
    with pytest.raises(UserError, match="not finite in float16; encode with --dtype float32"):
        encode(tmp_path / "huge", photographs, tmp_path / "out", dataclasses.replace(OPTIONS, dtype="float16"), CPU)
    with pytest.raises(UserError, match="choose float16 or float32"):
        encode(tmp_path / "huge", photographs, tmp_path / "out", dataclasses.replace(OPTIONS, dtype="int8"), CPU)


def test_vq_records_are_half_as_wide_and_need_no_posterior(photographs, tmp_path):
    lively_autoencoder(latent="vq", codebook_size=8).save_pretrained(tmp_path / "vq")
    cache = LatentCache(encode(tmp_path / "vq", photographs, tmp_path / "out", OPTIONS, CPU))
    assert not cache.plan.has_variance
    assert cache.read(0).shape == (WIDTH,)
    files = {file.digest: file for file in find_images(photographs)}
    direct = encode_directly(tmp_path / "vq", centre(files[cache.rows[0].source])).mean
    expected = torch.cat([level[0].reshape(-1) for level in direct])  # before quantisation
    torch.testing.assert_close(cache.read(0), expected, rtol=1e-5, atol=1e-6)
    assert cache.statistics[0]["std"] == pytest.approx(float(all_records(tmp_path / "out")[:, :24].std(correction=0)))
    latents = LatentRecords(cache, [0], seed=0, posterior="sample")[5][0]
    assert torch.equal(latents, cache.read(0))


def test_crops_are_seeded_and_alike_for_both_splits(autoencoder_directory, photographs, tmp_path):
    options = dataclasses.replace(OPTIONS, crops=3, zoom=1.5)
    train, held = split_held_out(find_images(photographs), 0.3)
    cache = LatentCache(encode(autoencoder_directory, photographs, tmp_path / "a", options, CPU))
    found = [(r.source, r.mirrored, r.crop) for r in cache.rows]
    expected = [(f.digest, mirrored, k) for f in train for k in (1, 2, 3) for mirrored in (False, True)]
    assert found == expected + [(f.digest, mirrored, k) for f in held for k in (1, 2, 3) for mirrored in (False, True)]
    first = train[0]
    crops = [cache.read(i) for i in (0, 2, 4)]
    assert not torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[1], crops[2])
    place = (int(first.digest[:8], 16), 2)
    zoom, top, left = (
        1.5 ** uniform(0, "crop-zoom", *place),
        *(uniform(0, f"crop-{s}", *place) for s in ("top", "left")),
    )
    posterior = encode_directly(autoencoder_directory, load_crop(first.path, (32, 32), zoom=zoom, top=top, left=left))
    torch.testing.assert_close(crops[1][:24], posterior.mean[0].flatten(), rtol=1e-5, atol=1e-6)
    other = dataclasses.replace(options, seed=1)
    assert not torch.equal(
        cache.read(0), LatentCache(encode(autoencoder_directory, photographs, tmp_path / "b", other, CPU)).read(0)
    )


def test_an_unreadable_image_is_said_and_left_out(autoencoder_directory, photographs, tmp_path, capsys):
    data = shutil.copytree(photographs, tmp_path / "data")
    (data / "broken.png").write_text("no image")
    cache = LatentCache(encode(autoencoder_directory, data, tmp_path / "out", OPTIONS, CPU))
    assert "skipped" in (error := capsys.readouterr().err)
    assert "broken.png" in error
    digests = {file.digest for file in find_images(photographs)}
    assert {row.source for row in cache.rows} == digests
    assert len(cache.place) == len(cache.rows)


def test_the_cache_carries_its_autoencoder(finished, autoencoder_directory):
    inner = PyramidAutoencoder.from_pretrained(finished / "autoencoder")
    assert inner.fingerprint() == PyramidAutoencoder.from_pretrained(autoencoder_directory).fingerprint()
    assert inner.fingerprint() == LatentCache(finished).plan.autoencoder


def test_the_autoencoder_beside_the_shards_is_the_one_that_made_them(autoencoder_directory, photographs, tmp_path):
    """Another encode was interrupted before its first shard: its autoencoder must not stay."""
    from pyramid_ldm.training.source import CachedLatents

    other = lively_autoencoder()
    with torch.no_grad():
        other.encoder.stem.weight.mul_(1.5)
    claim(tmp_path / "out", "shards", "--out")
    other.save_pretrained(tmp_path / "out" / "autoencoder")
    encode(autoencoder_directory, photographs, tmp_path / "out", OPTIONS, CPU)
    config = FlowTraining(run_dir="x", data=FlowDataConfig(shards=str(tmp_path / "out")))
    source = CachedLatents(config, CPU)
    assert source.autoencoder.fingerprint() == source.cache.plan.autoencoder
    other.save_pretrained(tmp_path / "out" / "autoencoder")
    with pytest.raises(UserError, match="is not the autoencoder that made these shards"):
        CachedLatents(config, CPU)


def test_a_shard_without_a_readable_image_is_empty_and_the_rest_is_used(autoencoder_directory, photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "photos")
    options = dataclasses.replace(OPTIONS, shard_size=1, flip=False)
    broken = split_held_out(find_images(tmp_path / "photos"), OPTIONS.validation)[0][0].path
    Path(broken).write_bytes(Path(broken).read_bytes()[:300])
    out = encode(autoencoder_directory, tmp_path / "photos", tmp_path / "out", options, CPU)
    assert len(LatentCache(out).rows) == 11


def test_another_precision_would_mix_two_roundings_in_one_cache(shards, autoencoder_directory, photographs):
    (shards / "index.json").unlink()
    with pytest.raises(UserError, match="precision = fp32, not bf16"):
        encode(autoencoder_directory, photographs, shards, OPTIONS, Runtime(torch.device("cpu"), True))
