"""Muon beside torch's own, and Adam for the rest."""

import copy

import pytest
import torch
from conftest import tiny_network
from torch import nn

from pyramid_ldm.config.common import TrainConfig
from pyramid_ldm.training.optimizer import Muon, build_optimizer, orthogonal

RATE = 3e-3


def model(layout=torch.channels_last) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(8, 40, 3), nn.Conv2d(40, 48, 1), nn.Flatten(), nn.Linear(48, 32), nn.Linear(32, 4))
    return layers.to(memory_format=layout)


def muon_of(network: nn.Module, *, bf16: bool = False, max_norm: float = 0.0) -> Muon:
    return Muon(network, RATE, (0.9, 0.99), max_norm=max_norm, fused=True, bf16=bf16)


def loss(network: nn.Module, step: int) -> torch.Tensor:
    torch.manual_seed(step)
    return network(torch.randn(6, 8, 3, 3)).square().mean()


def trained(network: nn.Module, optimizer, first=0, steps=3) -> dict[str, torch.Tensor]:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss(network, step).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_matrices_move_as_torchs_muon_moves_them_and_the_rest_as_adam(layout):
    """The oracle trains a copy whose matrices are (outputs, inputs * 9) parameters of their own."""
    network = model(layout)
    found = trained(network, muon_of(network, bf16=True))

    oracle = model(layout)
    matrices = {"0.weight": 40, "1.weight": 48, "3.weight": 32}  # 4.weight has too few rows
    flat = {
        name: nn.Parameter(p.detach().permute(0, 2, 3, 1).flatten(1).clone() if p.ndim == 4 else p.detach().clone())
        for name, p in oracle.named_parameters()
        if name in matrices
    }
    muon = torch.optim.Muon(flat.values(), lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam([p for n, p in oracle.named_parameters() if n not in flat], lr=RATE, betas=(0.9, 0.99))
    for step in range(3):
        oracle.zero_grad()
        loss(oracle, step).backward()
        for name, p in oracle.named_parameters():
            if name in flat:
                flat[name].grad = p.grad.permute(0, 2, 3, 1).flatten(1) if p.ndim == 4 else p.grad.clone()
        muon.step()
        adam.step()
        with torch.no_grad():
            for name, p in oracle.named_parameters():
                if name in flat:
                    new = (
                        flat[name].unflatten(1, (*p.shape[2:], p.shape[1])).permute(0, 3, 1, 2)
                        if p.ndim == 4
                        else flat[name]
                    )
                    p.copy_(new)
    for name, p in oracle.named_parameters():
        # A permutation of columns permutes the orthogonal matrix; sums in bfloat16 run in another order.
        torch.testing.assert_close(found[name], p.detach(), atol=0.1 * RATE, rtol=0, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("shape", [(3, 32, 200), (2, 80, 32), (1, 48, 48)])
def test_newton_and_schulz_change_singular_values_alone(shape, dtype, tolerance):
    """To five times 3.4445 s - 4.775 s^3 + 2.0315 s^5 of s over the norm; here from 1 down to 1e-4 of it."""
    matrices = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    s = torch.logspace(0, -4, u.shape[2], dtype=torch.float64)
    matrices, s = (u * s) @ v, s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    found = orthogonal(matrices.to(dtype)).double()
    torch.testing.assert_close(found, (u * s) @ v, atol=tolerance, rtol=0)


def test_a_step_has_orthogonal_rows_of_adams_size():
    network = model()
    before = network[3].weight.detach().clone()
    optimizer = muon_of(network)
    network[3].weight.grad = torch.randn_like(before)
    optimizer.step()
    step = (network[3].weight.detach() - before) / (RATE * 0.2 * 48**0.5)
    singular = torch.linalg.svdvals(step)
    assert 0.5 < singular.min() < singular.max() < 1.3, "five Newton-Schulz steps: all about 1"


def test_rows_are_as_long_as_they_may_be():
    """`torch.renorm` is the oracle; what has too few rows for Muon keeps its length."""
    free, held = model(), model()
    trained(free, muon_of(free), steps=1)
    trained(held, muon_of(held, max_norm=0.5), steps=1)
    shortened = 0
    for name, weight in free.named_parameters():
        limited = name in ("0.weight", "1.weight", "3.weight")
        expected = torch.renorm(weight.detach(), 2, 0, 0.5) if limited else weight.detach()
        torch.testing.assert_close(dict(held.named_parameters())[name].detach(), expected, atol=1e-6, rtol=1e-5)
        shortened += bool((weight.detach() - expected).abs().max() > 1e-3)
    assert shortened > 0


@pytest.mark.parametrize(("asked", "length"), [(None, 0.6), (0.3, 0.3), (0.0, 1e9)])
def test_how_long_rows_may_be_is_the_configs_or_the_stages(asked, length):
    network = model()
    train = TrainConfig(optimizer="muon", learning_rate=RATE, max_norm=asked)
    optimizer = build_optimizer(network, train, torch.device("cpu"), precision="fp32", max_norm=0.6)
    trained(network, optimizer, steps=1)
    longest = max(float(network[i].weight.detach().flatten(1).norm(dim=1).max()) for i in (0, 1, 3))
    assert longest <= length + 1e-6
    assert longest > min(length, 0.61) - 1e-6
    assert optimizer.dtype == torch.float32, "as the run computes"


def test_it_goes_on_where_it_was_saved():
    network = model()
    optimizer = muon_of(network)
    trained(network, optimizer)
    kept, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(network.state_dict())
    expected = trained(network, optimizer, first=3)
    other = model()
    again = muon_of(other)
    other.load_state_dict(weights)
    again.load_state_dict(kept)
    found = trained(other, again, first=3)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_small_matrices_embeddings_and_gains_stay_with_adam():
    network = nn.ModuleList(
        [nn.Embedding(64, 64), nn.Conv2d(3, 64, 3), nn.Conv2d(64, 3, 3), nn.GroupNorm(4, 64), nn.Linear(32, 32)]
    )
    optimizer = muon_of(network)
    assert [id(p) for p in optimizer.matrices] == [id(network[4].weight)], "27 columns, three rows, no layer"
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))


def test_every_weight_of_the_flow_moves():
    network = tiny_network(widths=[32, 32]).to(memory_format=torch.channels_last)
    train = TrainConfig(optimizer="muon", learning_rate=1e-2)
    optimizer = build_optimizer(network, train, torch.device("cpu"), precision="auto", max_norm=0.0)
    assert isinstance(optimizer, Muon)
    assert len(optimizer.matrices) > 20
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert [name for name, p in network.named_parameters() if torch.equal(p, before[name])] == []
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in network.parameters())
