"""What a step of training draws by position: times, and how many levels an image is decoded from."""

import pytest
import torch
from conftest import tiny_network_config
from torch import Tensor

from pyramid_ldm.condition import Condition
from pyramid_ldm.config import AutoencoderTraining, FlowTraining
from pyramid_ldm.config.autoencoder import (
    AutoencoderConfig,
    AutoencoderTrainConfig,
    DecoderConfig,
    EncoderConfig,
    GanConfig,
    LossConfig,
    PerceptualConfig,
)
from pyramid_ldm.config.flow import FlowDataConfig
from pyramid_ldm.data.batch import Batch
from pyramid_ldm.nn.resample import box_low_pass
from pyramid_ldm.processes.build import build_process
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.pyramid import LatentScaling, Level
from pyramid_ldm.training import flow_state
from pyramid_ldm.training.autoencoder_state import accumulate, build_state, draw_levels
from pyramid_ldm.training.flow_state import draw
from pyramid_ldm.training.runtime import Runtime

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
    loss = LossConfig(perceptual=PerceptualConfig(weight=0), gan=GanConfig(weight=0))
    return AutoencoderTraining(
        run_dir="r", image_size=[32, 32], seed=3, model=model, loss=loss, train=AutoencoderTrainConfig(**train)
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


@pytest.mark.parametrize("regions", [0, 2])
def test_the_discriminator_neither_sees_nor_teaches_what_coarse_levels_draw_alone(regions):
    """It would learn that blur is real, and ask for details that these levels cannot know."""
    settings = config(level_dropout=0.5, level_target="low_pass", regions=regions, region_size=16)
    settings.loss.gan = GanConfig(weight=0.5, start=0, mode="constant", disc_warmup=0, ramp=0, channels=8, layers=2)
    pixels = torch.randint(0, 256, (6, *settings.image_size, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    runtime = Runtime(torch.device("cpu"), bf16=False)
    kept, _ = draw_levels(settings, Batch([0], pixels=pixels).images(runtime.device), list(range(6)))
    whole = (kept == 3).nonzero().flatten().tolist()
    assert 0 < len(whole) < 6

    def gradients(positions, l1):
        settings.loss.l1 = l1
        state = build_state(settings, runtime.device)
        state.autoencoder.eval()
        batch = Batch(positions, pixels=pixels[positions])
        terms = accumulate(settings, state, state.autoencoder, state.discriminator, batch, runtime)
        found = [
            torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in m.parameters()])
            for m in (state.autoencoder, state.discriminator)
        ]
        return [len(positions) * gradient for gradient in found], len(positions) * terms["logits_fake"]

    (generator, discriminator), logits = gradients([0, 1, 2, 3, 4, 5], l1=0.0)
    (expected, as_well), those = gradients(whole, l1=0.0)
    assert discriminator.abs().max() > 1e-4
    assert generator.abs().max() > 1e-4
    torch.testing.assert_close(discriminator, as_well, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(generator, expected, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(logits, those)
    (everything, _), _ = gradients([0, 1, 2, 3, 4, 5], l1=1.0)
    (part, _), _ = gradients(whole, l1=1.0)
    assert (everything - part).abs().max() > 1e-3, "L1 sees all of them"


def test_a_step_of_stage_one_decodes_what_was_drawn_and_is_held_against_it(monkeypatch):
    settings = config(level_dropout=1.0, level_target="low_pass")
    state = build_state(settings, torch.device("cpu"))
    pixels = torch.randint(0, 256, (4, *settings.image_size, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    batch, runtime, seen = Batch([0, 1, 2, 3], pixels=pixels), Runtime(torch.device("cpu"), bf16=False), {}

    def model(images, noise, regions, kept):
        seen["kept"] = kept
        return state.autoencoder(images, noise, regions, kept)

    def gradients(output, target, *rest):
        seen["target"] = target
        return {}

    monkeypatch.setattr(state.loss, "accumulate_gradients", gradients)
    accumulate(settings, state, model, None, batch, runtime)
    kept, target = draw_levels(settings, batch.images(torch.device("cpu")), batch.positions)
    assert torch.equal(seen["kept"], kept)
    assert torch.equal(seen["target"], target)
    assert (target - batch.images(torch.device("cpu"))).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["independent", "low_discrepancy"])
def test_a_step_of_stage_two_is_at_the_times_that_were_asked_for(kind, monkeypatch):
    settings = FlowTraining(run_dir="r", model=tiny_network_config(), data=FlowDataConfig(shards="s"), times=kind)
    state, process, seen = flow_state.build_state(settings, torch.device("cpu")), build_process(settings), []
    state.scaling = LatentScaling(((0.0,) * 6, (0.0,) * 4), ((1.0,) * 6, (1.0,) * 4))
    latents = tuple(torch.zeros(5, *shape) for shape in state.network.shapes)
    whole = type(process).loss

    def watch(self, network, data, noise, t, *rest):
        seen.append(t)
        return whole(self, network, data, noise, t, *rest)

    monkeypatch.setattr(type(process), "loss", watch)
    flow_state.accumulate(process, state.network, state, latents, [3, 4, 5, 6, 7], Condition(), settings)
    _, expected = draw(process, state.network.shapes, [3, 4, 5, 6, 7], settings.seed, torch.device("cpu"), kind)
    assert torch.equal(seen[0], expected)
