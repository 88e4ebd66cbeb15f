"""What a step of training draws by position: times, and how many levels an image is decoded from."""

import pytest
import torch
from torch import Tensor

from pyramid_ldm.config import AutoencoderTraining
from pyramid_ldm.config.autoencoder import AutoencoderConfig, AutoencoderTrainConfig, DecoderConfig, EncoderConfig
from pyramid_ldm.nn.resample import box_low_pass
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.pyramid import Level
from pyramid_ldm.training.autoencoder_state import draw_levels
from pyramid_ldm.training.flow_state import draw

COUNT = 4000


def times(kind: str, positions: range) -> Tensor:
    _, t = draw(RectifiedFlow(eps=1e-3), [(1, 1, 1)], positions, 5, torch.device("cpu"), kind)
    return t


def test_low_discrepancy_times_lie_evenly_over_any_stretch():
    """Of n golden sections none leaves a gap of more than about 2.7 / n; of independent times some leave log(n) / n."""
    for first, count in ((0, 16), (7, 16), (1000, 64)):
        for kind, low, high in (("low_discrepancy", 0.0, 3.0), ("independent", 2.0, 100.0)):
            t = times(kind, range(first, first + count)).sort().values
            gaps = torch.diff(t, append=t[:1] + 1) * count
            assert low < gaps.max() < high, (kind, first, count)


def test_low_discrepancy_times_belong_to_their_position_and_are_uniform():
    together = times("low_discrepancy", range(COUNT))
    assert torch.equal(
        together[100:110], torch.cat([times("low_discrepancy", range(p, p + 1)) for p in range(100, 110)])
    )
    assert together.histc(10, 0, 1).sub(COUNT / 10).abs().max() < 5
    assert together.min() >= 1e-3
    assert together.max() <= 1


def config(**train: object) -> AutoencoderTraining:
    widths = [8] * 5
    model = AutoencoderConfig(
        levels=[Level(16, 4), Level(8, 4), Level(4, 2)], encoder=EncoderConfig(widths=widths),
        decoder=DecoderConfig(widths=widths),
    )  # fmt: skip
    return AutoencoderTraining(
        run_dir="r", image_size=[32, 32], seed=3, model=model, train=AutoencoderTrainConfig(**train)
    )


def test_without_level_dropout_all_is_as_it_was():
    images = torch.rand(2, 3, 32, 32)
    kept, target = draw_levels(config(), images, [0, 1])
    assert kept is None
    assert target is images


def test_as_many_images_lose_levels_as_were_asked_for():
    images = torch.zeros(COUNT, 3, 1, 1)
    kept, _ = draw_levels(config(level_dropout=0.4), images, list(range(COUNT)))
    share = [float((kept == k).float().mean()) for k in (1, 2, 3)]
    assert share == pytest.approx([0.2, 0.2, 0.6], abs=0.03), "the coarsest stays, and no fewer levels than that"
    alone, _ = draw_levels(config(level_dropout=0.4), images[:1], [17])
    assert alone[0] == kept[17], "whatever the batch"


def test_what_coarse_levels_alone_are_held_against():
    """The image, or its means over blocks of the finest level that is left, enlarged."""
    settings, images = config(level_dropout=1.0, level_target="low_pass"), torch.rand(8, 3, 32, 32)
    kept, target = draw_levels(settings, images, list(range(8)))
    assert set(kept.tolist()) == {1, 2}
    for k, image, seen in zip(kept.tolist(), images, target, strict=True):
        factor = {1: 16, 2: 8}[k]
        torch.testing.assert_close(seen, box_low_pass(image[None], factor)[0])
        blocks = torch.nn.functional.avg_pool2d(image, factor)
        assert seen.std() < image.std() / 3
        torch.testing.assert_close(seen[:, 0, 0], blocks[:, 0, 0])
    _, plain = draw_levels(config(level_dropout=1.0), images, list(range(8)))
    assert plain is images


def test_what_is_left_of_a_constant_is_that_constant():
    torch.testing.assert_close(box_low_pass(torch.full((1, 3, 32, 32), 0.3), 16), torch.full((1, 3, 32, 32), 0.3))
