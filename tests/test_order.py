import multiprocessing

import pytest
import torch

from pyramid_ldm.data import loading
from pyramid_ldm.data.folder import ImageFile, find_images
from pyramid_ldm.data.loading import load_batches
from pyramid_ldm.data.order import PositionSampler, item_at
from pyramid_ldm.data.photographs import Photographs, Preprocessing, collate_images, load_crop, load_pixels
from pyramid_ldm.errors import UserError
from pyramid_ldm.pyramid import pyramid_noise
from pyramid_ldm.randomness import derive_seed, generator, normal, uniform

RANDOM = Preprocessing((32, 32), crop="random", zoom=1.5, flip=True)


def epoch(number, count=50, seed=0):
    return [item_at(number * count + i, count, seed) for i in range(count)]


def test_each_epoch_is_a_permutation():
    for number in range(3):
        assert sorted(epoch(number)) == list(range(50))


def test_epochs_and_seeds_differ_and_repeat():
    orders = [epoch(0), epoch(1), epoch(2), epoch(0, seed=1), list(range(50))]
    assert len({tuple(order) for order in orders}) == 5
    assert epoch(1) == orders[1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_every_position_without_overlap(ranks):
    parts = [
        list(PositionSampler(start=12, stop=36, batch_size=4, rank=rank, ranks=ranks)) for rank in range(ranks)
    ]  # fmt: skip
    assert sorted(p for part in parts for batch in part for p in batch) == list(range(12, 36))
    assert all(len(batch) == 4 for part in parts for batch in part)
    assert {len(part) for part in parts} == {24 // (4 * ranks)}
    assert parts[-1][0] == list(range(12 + 4 * (ranks - 1), 12 + 4 * ranks)), "a rank's piece is contiguous"


def test_length_counts_batches():
    assert len(PositionSampler(start=12, stop=36, batch_size=4, ranks=2)) == 3


def test_resuming_continues_where_the_run_stopped():
    whole = list(PositionSampler(start=0, stop=40, batch_size=4, rank=1, ranks=2))
    rest = list(PositionSampler(start=16, stop=40, batch_size=4, rank=1, ranks=2))
    assert rest == whole[2:]


@pytest.fixture
def dataset(photographs):
    return Photographs(find_images(photographs), RANDOM, seed=3)


def read(dataset, workers, start=0):
    sampler = PositionSampler(start=start, stop=24, batch_size=4)
    batches = list(load_batches(dataset, collate_images, sampler, workers=workers))
    positions = [p for batch in batches for p in batch.positions]
    return positions, torch.cat([b.pixels for b in batches]), [f for b in batches for f in b.files]


@pytest.mark.parametrize(("workers", "method"), [(2, "fork"), (5, "fork"), (1, "spawn")])
def test_workers_change_nothing(dataset, workers, method, monkeypatch):
    monkeypatch.setattr(loading, "multiprocessing", multiprocessing.get_context(method))
    positions, images, files = read(dataset, 0)
    assert positions == list(range(24))
    other_positions, other_images, other_files = read(dataset, workers)
    assert (other_positions, other_files) == (positions, files)
    assert torch.equal(images, other_images)


def test_resuming_gives_the_images_that_would_have_come(dataset):
    torch.manual_seed(5)  # the global generator has no say
    _, images, files = read(dataset, 0)
    torch.manual_seed(6)
    _, rest, rest_files = read(dataset, 0, start=16)
    assert rest_files == files[16:]
    assert torch.equal(rest, images[16:])


def test_positions_and_seeds_see_different_crops(photographs):
    files = find_images(photographs)[:1]
    views = [Photographs(files, RANDOM, seed)[p][0] for seed in (0, 1) for p in range(4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_centre_crops_are_mirrored_half_of_the_time(photographs):
    files = find_images(photographs)[:1]
    plain = load_pixels(files[0].path, (32, 32), (1.0, 0.5, 0.5))
    unflipped = Photographs(files, Preprocessing((32, 32), flip=False), seed=0)
    assert all(torch.equal(unflipped[p][0], plain) for p in range(4))
    flipped = Photographs(files, Preprocessing((32, 32), flip=True), seed=0)
    mirrored = [torch.equal(flipped[p][0], plain.flip(-1)) for p in range(60)]
    assert all(torch.equal(flipped[p][0], plain) for p in range(60) if not mirrored[p])
    assert 18 <= sum(mirrored) <= 42  # three standard deviations of 3.9 around 30


def test_an_unreadable_file_is_replaced_by_the_next_and_reported(photographs, tmp_path):
    files = find_images(photographs)[:3]
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    mixed = [files[0], ImageFile(str(broken), "0"), files[2]]
    items = [Photographs(mixed, RANDOM, seed=0)[p] for p in range(3)]
    batch = collate_images(items)
    at = next(p for p in range(3) if item_at(p, 3, 0) == 1)
    assert batch.files[at] == files[2].path
    (bad,) = batch.bad
    assert str(broken) in bad.message
    assert (bad.digest, bad.of_content) == ("0", True)
    assert items[at][3] == batch.bad
    others = [p for p in range(3) if p != at]
    assert sorted(batch.files[p] for p in others) == [files[0].path, files[2].path]


def test_a_file_known_to_be_bad_is_not_tried_again_and_moves_no_other(photographs, tmp_path):
    files = find_images(photographs)[:3]
    (tmp_path / "broken.png").write_text("no image")
    mixed = [files[0], ImageFile(str(tmp_path / "broken.png"), "0"), files[2]]
    removed = [files[0], ImageFile("", "0"), files[2]]
    found, known = Photographs(mixed, RANDOM, seed=0), Photographs(removed, RANDOM, seed=0, known_bad={"0"})
    for p in range(6):
        assert torch.equal(found[p][0], known[p][0])
        assert found[p][2] == known[p][2]
        assert known[p][3] == []


def test_what_a_batch_holds_are_the_photographs(photographs):
    """uint8 on the way, [-1, 1] on the device, channels last."""
    files = find_images(photographs)[:4]
    dataset = Photographs(files, Preprocessing((32, 32), flip=False), seed=0)
    batch = collate_images([dataset[p] for p in range(4)])
    images = batch.images(torch.device("cpu"))
    assert batch.pixels.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, torch.stack([load_crop(path, (32, 32)) for path in batch.files]))


def test_the_last_file_is_replaced_by_the_first(photographs, tmp_path):
    good = find_images(photographs)[0]
    files = [good, ImageFile(str(tmp_path / "gone.png"), "0")]
    dataset = Photographs(files, RANDOM, seed=0)
    assert {dataset[p][2] for p in range(2)} == {good.path}


def test_nothing_readable_is_the_users_fault(tmp_path):
    files = [ImageFile(str(tmp_path / f"{i}.png"), "0") for i in range(2)]
    with pytest.raises(UserError, match=r"none of the 2 images can be read.*\d\.png"):
        Photographs(files, RANDOM, seed=0)[0]


def test_noise_does_not_depend_on_its_batch():
    shapes = [(6, 2, 2), (4, 4, 4)]
    alone, together = pyramid_noise(shapes, 7, "sample", [3]), pyramid_noise(shapes, 7, "sample", [1, 2, 3])
    for one, many in zip(alone, together, strict=True):
        assert torch.equal(one[0], many[2])
    for changed in (pyramid_noise(shapes, 8, "sample", [3]), pyramid_noise(shapes, 7, "noise", [3])):
        assert not torch.equal(alone[0], changed[0])


def test_levels_of_one_shape_have_noise_of_their_own():
    first, second = pyramid_noise([(4, 4, 4), (4, 4, 4)], 0, "sample", [0])
    assert not torch.equal(first, second)


def test_noise_is_standard_normal():
    values = normal((100_000,), 0, "noise", 5)
    assert float(values.mean()) == pytest.approx(0, abs=0.01)
    assert float(values.std()) == pytest.approx(1, abs=0.01)


def test_seeds_of_neighbouring_indices_do_not_run_together():
    assert len({derive_seed(1, "noise", 23), derive_seed(1, "noise", 2, 3), derive_seed(12, "noise", 3)}) == 3
    assert 0 <= derive_seed(0, "x") < 2**63
    assert generator(0, "x", 1).initial_seed() == derive_seed(0, "x", 1)
    draws = [uniform(0, "flip", p) for p in range(2000)]
    assert 0 <= min(draws) < 0.01
    assert 0.99 < max(draws) < 1
    assert sum(draws) / 2000 == pytest.approx(0.5, abs=0.02)
