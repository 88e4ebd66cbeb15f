"""Stage two's data by position."""

import pickle

import numpy as np
import torch
from conftest import CPU, OPTIONS, WIDTH

from pyramid_ldm import encode as encoding
from pyramid_ldm.data.latents import LatentRecords, collate_latents
from pyramid_ldm.data.order import item_at
from pyramid_ldm.data.photographs import load_pixels
from pyramid_ldm.data.shards import LatentCache
from pyramid_ldm.encode import encode
from pyramid_ldm.randomness import generator


def test_items_depend_on_seed_and_position_alone(finished):
    cache = LatentCache(finished)
    rows = cache.indices("train")
    one = LatentRecords(cache, rows, seed=4, posterior="sample")
    forwards = [one[p] for p in range(30)]
    torch.manual_seed(1)
    again = LatentRecords(LatentCache(finished), rows, seed=4, posterior="sample")
    backwards = [again[p] for p in reversed(range(30))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert torch.equal(a[0], b[0])
    other = LatentRecords(cache, rows, seed=5, posterior="sample")
    assert not any(torch.equal(other[p][0], forwards[p][0]) for p in range(30))
    batch = collate_latents(forwards[10:14])
    assert batch.latents.shape == (4, WIDTH)
    assert batch.positions == [10, 11, 12, 13]
    copy = pickle.loads(pickle.dumps(batch))  # as it comes from a worker
    assert torch.equal(copy.latents, batch.latents)
    assert copy.positions == batch.positions


def test_the_latents_drawn_are_mean_plus_deviation_times_noise(finished):
    cache = LatentCache(finished)
    rows = cache.indices("train")
    dataset = LatentRecords(cache, rows, seed=4, posterior="sample")
    modes = LatentRecords(cache, rows, seed=4, posterior="mode")
    for position in (0, 7, len(rows) + 3):
        record = cache.read(rows[item_at(position, len(rows), 4)])
        mean, std = record[:WIDTH], (record[WIDTH:] / 2).exp()
        drawn = torch.randn(WIDTH, generator=generator(4, "posterior", position))
        latents, at, noise = dataset[position]
        torch.testing.assert_close(latents, mean + std * drawn)
        assert torch.equal(modes[position][0], mean)
        assert (at, noise) == (position, None)


def test_a_row_has_a_fresh_posterior_sample_each_epoch(finished):
    cache = LatentCache(finished)
    dataset = LatentRecords(cache, [0], seed=0, posterior="sample")
    draws = torch.stack([dataset[p][0] for p in range(2000)])
    mean, log_variance = cache.read(0).chunk(2)
    errors = (draws.mean(dim=0) - mean) / (0.5 * log_variance).exp() * 2000**0.5
    assert float(errors.abs().max()) < 4.5
    np.testing.assert_allclose(draws.std(dim=0) / (0.5 * log_variance).exp(), 1, atol=0.08)


def test_without_shuffling_rows_come_in_order(finished):
    cache = LatentCache(finished)
    rows = cache.indices("held_out")
    dataset = LatentRecords(cache, rows, seed=0, posterior="mode", shuffle=False)
    for position in range(len(rows) + 1):
        assert torch.equal(dataset[position][0], cache.read(rows[position % len(rows)])[:WIDTH])


def test_a_pickled_cache_holds_paths_not_records(finished):
    """What a loader's worker gets where processes are spawned, not forked."""
    cache = LatentCache(finished)
    copy = pickle.loads(pickle.dumps(cache))
    assert not any(record.tobytes() in pickle.dumps(cache) for record in (cache.read(3).numpy(),))
    assert torch.equal(copy.read(3), cache.read(3))


def test_a_photograph_is_decoded_once_for_its_plain_and_its_mirrored_record(
    autoencoder_directory, photographs, tmp_path, monkeypatch
):
    loaded = []

    def load(path, *rest, **options):
        loaded.append(path)
        return load_pixels(path, *rest, **options)

    monkeypatch.setattr(encoding, "load_pixels", load)
    encode(autoencoder_directory, photographs, tmp_path / "shards", OPTIONS, CPU)
    assert sorted(loaded) == sorted(str(path) for path in photographs.iterdir())
