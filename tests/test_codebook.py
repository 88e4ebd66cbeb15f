"""Dead entries of a codebook come back to life, and what is logged of them."""

import math

import pytest
import torch
from conftest import CPU
from taming.modules.vqvae.quantize import VectorQuantizer2

from pyramid_ldm.training.codebook import CodebookUse
from pyramid_ldm.training.ema import PowerEma


def learn(restart: int) -> tuple[dict[str, float], float]:
    """64 entries for latents at 64 places; (figures of the last 200 images, mean squared distance)."""
    torch.manual_seed(0)
    places = torch.randn(64, 4) * 3
    quantizer = VectorQuantizer2(64, 4, beta=0.25, legacy=False)
    optimizer, ema = torch.optim.Adam(quantizer.parameters(), 1e-2), PowerEma(quantizer, [0.1])
    use = CodebookUse([64], restart, torch.device("cpu"))
    for step in range(100):
        latents = places[torch.randint(64, (8, 4, 4))].permute(0, 3, 1, 2) + 0.05 * torch.randn(8, 4, 4, 4)
        _, loss, (_, _, indices) = quantizer(latents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        use.record([indices], 8 * (step + 1))
        use.revive([quantizer], (latents,), 8 * (step + 1), 0, optimizer, ema, "", CPU)
        if step == 74:
            use.figures(["4x4"], CPU)
    return use.figures(["4x4"], CPU), loss.item() / 1.25


def test_a_restart_brings_dead_entries_back(monkeypatch):
    monkeypatch.setattr(PowerEma, "__init__", lambda self, *_: setattr(self, "tracks", {}))
    (dead, far), (alive, near) = learn(0), learn(80)
    assert dead["codebook_usage_4x4"] < 0.5
    assert alive["codebook_usage_4x4"] > 0.9
    assert alive["codebook_perplexity_4x4"] > 2 * dead["codebook_perplexity_4x4"]
    assert near < 0.5 * far


def test_usage_and_perplexity_by_hand():
    use = CodebookUse([4, 8], 0, torch.device("cpu"))
    use.record([torch.tensor([[0, 0], [1, 1]]), torch.tensor([7])], 1)
    use.record([torch.tensor([[2, 2], [2, 2]]), torch.tensor([7])], 2)
    found = use.figures(["2x2", "1x1"], CPU)
    assert found["codebook_usage_2x2"] == pytest.approx(3 / 4)
    entropy = 2 * (1 / 4) * math.log(4) + (1 / 2) * math.log(2)
    assert found["codebook_perplexity_2x2"] == pytest.approx(math.exp(entropy))
    assert found["codebook_usage_1x1"] == pytest.approx(1 / 8)
    assert found["codebook_perplexity_1x1"] == pytest.approx(1)
    assert use.figures(["2x2", "1x1"], CPU) == {}, "since the last line of the log"


def test_what_is_reborn_is_so_in_the_averages_and_without_momentum():
    torch.manual_seed(0)
    quantizer = torch.nn.Module()
    quantizer.embedding = torch.nn.Embedding(4, 2)
    model = torch.nn.ModuleDict({"quantizers": torch.nn.ModuleList([quantizer])})
    optimizer, ema = torch.optim.Adam(model.parameters(), 1e-2), PowerEma(model, [0.1])
    quantizer.embedding.weight.square().sum().backward()
    optimizer.step()
    use, latents = CodebookUse([4], 100, torch.device("cpu")), torch.randn(3, 2, 5, 5) + 50
    use.record([torch.tensor([0, 2])], 99)
    before = quantizer.embedding.weight.detach().clone()
    assert use.revive([quantizer], (latents,), 99, 0, optimizer, ema, "quantizers", CPU) == 0
    assert use.revive([quantizer], (latents,), 100, 0, optimizer, ema, "quantizers", CPU) == 2
    weight = quantizer.embedding.weight.detach()
    assert torch.equal(weight[[0, 2]], before[[0, 2]])
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 2)
    for entry in (1, 3):
        assert (rows == weight[entry]).all(1).any(), "a latent of the batch at hand"
    (track,) = ema.tracks.values()
    assert torch.equal(track["quantizers.0.embedding.weight"][[1, 3]], weight[[1, 3]])
    state = optimizer.state[quantizer.embedding.weight]
    assert not state["exp_avg"][[1, 3]].any()
    assert not state["exp_avg_sq"][[1, 3]].any()
    assert state["exp_avg"][[0, 2]].all()
    assert use.revive([quantizer], (latents,), 101, 0, optimizer, ema, "quantizers", CPU) == 0
