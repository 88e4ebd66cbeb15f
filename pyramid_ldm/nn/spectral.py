"""Spectral normalisation: W / sigma(W), sigma the largest singular value of a weight as a matrix."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASIS = 4  # right singular vectors that are followed
POWERS = 4  # of W^T W that a step of `advance` applies to them
COLUMNS = BASIS * (POWERS + 1)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast within: for what bfloat16 would spoil."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as (out, in) or (out, k * k * in): as convolutions lie in memory where images are channels last."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight.flatten(1)


class SpectralNorm(nn.Module):
    """W / sigma(W), sigma the largest singular value of `as_matrix(W)` (Miyato et al. 2018; PDM section 3.3).

    sigma = u^T W v with u, v held fixed in `forward`: a forward pass never changes state, so recomputing it under
    gradient checkpointing, or splitting a batch, gives the same gradient. `advance` moves u and v.
    (torch's own parametrization iterates in `forward`, and removing it from a copied module breaks the original.)
    """

    u: Tensor  # (out,)
    basis: Tensor  # (up to BASIS, columns), v first

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows = as_matrix(weight.detach())
        start = torch.randn(sum(rows.shape), device=rows.device)[rows.shape[0] :]
        step, count = max(1, len(start) // BASIS), min(BASIS, len(start))
        twice = torch.cat([start, start])
        self.register_buffer("u", torch.zeros(rows.shape[0], device=rows.device))
        self.register_buffer("basis", twice.unfold(0, len(start), step)[:count].clone())
        if weight.device.type != "meta":  # loading: the weights come later, and meta kernels are slow
            advance([(weight, self)], 4)  # photographs_256: to 0.03 % of the largest singular value

    def forward(self, weight: Tensor) -> Tensor:
        with full_precision(weight.device):
            return weight / self.sigma(weight)

    def sigma(self, weight: Tensor) -> Tensor:
        """The current estimate of the largest singular value, a scalar."""
        return torch.dot(self.u, as_matrix(weight) @ self.basis[0])


@torch.no_grad()
def advance(layers: Iterable[tuple[Tensor, SpectralNorm]], iterations: int = 1) -> None:
    """Brings the vectors of norms, each with its weight, nearer to their weights' first singular ones, in place.

    A step is a block Krylov method, restarted from a few vectors B: the best of span{B, (W^T W) B, (W^T W)^2 B, ...}.
    Power iteration from one vector takes dozens of products to find a direction that has just become the largest, which
    at a learning rate of 2e-3 happens all the time (sigma is then up to a third too small); the other vectors have
    followed it for long. Weights of one shape go together, and the small eigenproblems of all of them.
    """
    groups: dict[tuple[int, ...], list[tuple[Tensor, SpectralNorm]]] = defaultdict(list)
    for weight, norm in layers:
        matrix = as_matrix(weight)
        groups[(*matrix.shape, len(norm.basis))].append((matrix, norm))
    every = [
        (_stack([weight for weight, _ in group]), _stack([norm.basis for _, norm in group]), group)
        for group in groups.values()
    ]
    if not every:
        return
    for _ in range(iterations):
        spans = [_krylov(weights, basis) for weights, basis, _ in every]
        grams = torch.cat([F.pad(gram, (0, COLUMNS - gram.shape[1]) * 2) for _, gram in spans])
        vectors = _eigenvectors(grams).flip(-1).mT  # rows, the largest first
        parts = vectors.split([len(gram) for _, gram in spans])
        every = [
            (weights, part[:, : basis.shape[1], : span.shape[1]] @ span, group)
            for (weights, basis, group), (span, _), part in zip(every, spans, parts, strict=True)
        ]
    for weights, basis, group in every:
        us = F.normalize((basis[:, :1] @ weights.mT)[:, 0], dim=1, eps=1e-12)
        for (_, norm), u, rows in zip(group, us, basis, strict=True):
            norm.u.copy_(u)
            norm.basis.copy_(rows)


def _eigenvectors(grams: Tensor) -> Tensor:
    """Columns, the smallest first."""
    try:
        return torch.linalg.eigh(grams).eigenvectors
    except RuntimeError:  # float32 may not converge where a weight has a rank of one
        exact = grams.double().cpu().nan_to_num(0.0, 0.0, 0.0)  # a run that diverges ends with a line of its own
        return torch.linalg.eigh(exact).eigenvectors.to(grams)


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _krylov(weights: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """(orthonormal rows (L, c, n), W^T W on their span (L, c, c)) of weights (L, m, n) and vectors (L, p, n).

    Vectors are rows: thin products with columns are three times slower on a CPU.
    """
    found = [basis]
    for _ in range(POWERS):
        found.append(F.normalize((found[-1] @ weights.mT) @ weights, dim=2, eps=1e-12))
    span = torch.linalg.qr(torch.cat(found, dim=1)[:, : basis.shape[2]].mT).Q.mT
    products = span @ weights.mT
    return span, products @ products.mT
