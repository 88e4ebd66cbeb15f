"""Solvers of fixed steps: they stand on a grid, at one host time for the whole batch.

Every first-order step z' = alpha' x + sigma' eps is straight in some coordinate; those of higher order integrate
polynomials through what was found before in the same coordinate.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_ldm.processes.prediction import Prediction
from pyramid_ldm.processes.process import Process
from pyramid_ldm.pyramid import Pyramid

Evaluate = Callable[[Pyramid, Tensor, Tensor, float], Prediction]  # (noisy, t, the t that is told, also on the host)
Draw = Callable[[int], Pyramid]  # fresh noise of step k


@dataclass(frozen=True)
class Node:
    """A place on the grid: alpha and sigma of every level. At the end, 1 and 0."""

    time: float
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]


class Walk:
    """A grid's nodes, a level each its own coefficients, and the noise to start with."""

    def __init__(self, process: Process, evaluate: Evaluate, grid: Sequence[float], noise: Pyramid) -> None:
        self.process, self.evaluate = process, evaluate
        shifts = process.shifts(len(noise))
        self.nodes = [self._node(time, shifts) for time in grid]
        self.nodes.append(Node(1.0, (1.0,) * len(noise), (0.0,) * len(noise)))
        first = on_host(grid[0])
        scales = [float(process.at_start(first, shift)) for shift in shifts]
        self.start = tuple(times(z, scale) for z, scale in zip(noise, scales, strict=True))

    def _node(self, time: float, shifts: Sequence[float]) -> Node:
        pairs = [self.process.coefficients(on_host(time), shift) for shift in shifts]
        return Node(time, tuple(float(alpha) for alpha, _ in pairs), tuple(float(sigma) for _, sigma in pairs))

    def steps(self) -> Iterator[tuple[int, Node, Node]]:
        """(k, from, to)."""
        return ((k, a, b) for k, (a, b) in enumerate(itertools.pairwise(self.nodes)))

    def predict(self, latents: Pyramid, node: Node) -> Prediction:
        """At a node."""
        t = on_host(node.time)
        told = self.process.evaluated_at(t)
        return self.evaluate(latents, t, told, float(told))

    def direction(self, prediction: Prediction) -> Pyramid:
        """Which way a step of first order goes, straight in `place`."""
        return prediction.noise if self.process.STRAIGHT_IN_SIGMA else prediction.velocity

    def place(self, node: Node, level: int) -> tuple[float, float]:
        """(scale, coordinate): d(z / scale) is `direction` times d(coordinate)."""
        alpha, sigma = node.alpha[level], node.sigma[level]
        if self.process.STRAIGHT_IN_SIGMA:
            return alpha, sigma / alpha
        return alpha + sigma, alpha / (alpha + sigma)

    def follow(self, latents: Pyramid, known: "Sequence[Known]", a: Node, b: Node) -> Pyramid:
        """From a to b by the integral of the polynomial through known directions."""
        moved = []
        for i, z in enumerate(latents):
            (scale, begin), (next_scale, end) = self.place(a, i), self.place(b, i)
            weights = integrals([self.place(node, i)[1] for node, _ in known], begin, end)
            z = times(z, 1 / scale)
            for (_, direction), weight in zip(known, weights, strict=True):
                z = torch.add(z, direction[i], alpha=weight)
            moved.append(times(z, next_scale))
        return tuple(moved)


Known = tuple[Node, Pyramid]  # where a direction was found


def integrals(points: Sequence[float], begin: float, end: float) -> list[float]:
    """Over [begin, end], of the polynomials that are 1 at one of up to four points and 0 at the others: by Simpson's
    rule, which is exact for them."""

    def basis(i: int, at: float) -> float:
        return math.prod((at - other) / (points[i] - other) for j, other in enumerate(points) if j != i)

    middle = (begin + end) / 2
    return [
        (end - begin) / 6 * (basis(i, begin) + 4 * basis(i, middle) + basis(i, end)) for i in range(len(points))
    ]  # fmt: skip


def times(z: Tensor, factor: float) -> Tensor:
    """Their product; z itself where the factor is 1 but for rounding."""
    return z if math.isclose(factor, 1.0, rel_tol=1e-12) else z * factor


def on_host(time: float) -> Tensor:
    return torch.tensor([time], dtype=torch.float64)


def first_order(walk: Walk) -> Pyramid:
    """z' = alpha' x + sigma' eps: Euler's step, and DDIM's."""
    latents = walk.start
    for _, a, b in walk.steps():
        latents = walk.follow(latents, [(a, walk.direction(walk.predict(latents, a)))], a, b)
    return latents


def ancestral(walk: Walk, eta: float, draw: Draw) -> Pyramid:
    """The same with fresh noise: `eta` times the deviation of z' given z and x (Ho et al. 2020; Song et al. 2021,
    equation 16, for any alpha and sigma)."""
    latents = walk.start
    for k, a, b in walk.steps():
        prediction, fresh, moved = walk.predict(latents, a), draw(k), []
        for i, (x, e) in enumerate(zip(prediction.data, prediction.noise, strict=True)):
            before, after = a.sigma[i], b.sigma[i]
            between = before**2 - (a.alpha[i] / b.alpha[i] * after) ** 2
            deviation = eta * math.sqrt(max(between, 0.0)) * after / before
            kept = math.sqrt(max(after**2 - deviation**2, 0.0))
            moved.append(b.alpha[i] * x + kept * e + deviation * fresh[i].to(x.device))
        latents = tuple(moved)
    return latents


def heun(walk: Walk) -> Pyramid:
    """Karras et al. 2022, algorithm 1: the mean of the directions at a step's ends, but for the last step."""
    latents = walk.start
    for _, a, b in walk.steps():
        here = a, walk.direction(walk.predict(latents, a))
        tried = walk.follow(latents, [here], a, b)
        if b is walk.nodes[-1]:
            return tried
        latents = walk.follow(latents, [here, (b, walk.direction(walk.predict(tried, b)))], a, b)
    return latents


def abm2(walk: Walk) -> Pyramid:
    """Adams-Bashforth of order 2 predicts; once the next evaluation is there, Adams-Moulton of order 3, through it and
    the two before, corrects the step that led to it: one evaluation a step, as UniPC-2 (Zhao et al. 2023) has it."""
    latents = corrected = walk.start
    known: list[Known] = []
    for k, a, b in walk.steps():
        known = [*known[-2:], (a, walk.direction(walk.predict(latents, a)))]
        if k:
            corrected = walk.follow(corrected, known, known[-2][0], a)
        latents = walk.follow(corrected, known[-2:], a, b)
    return latents


def dpmpp_2m(walk: Walk) -> Pyramid:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); the first step and the last are of first order."""
    latents, before = walk.start, None
    for _, a, b in walk.steps():
        data = walk.predict(latents, a).data
        moved = []
        for i, (z, x) in enumerate(zip(latents, data, strict=True)):
            step = half_log_snr(b, i) - half_log_snr(a, i)
            if before is not None and b is not walk.nodes[-1]:
                node, earlier = before
                x = x + (x - earlier[i]) * (step / (2 * (half_log_snr(a, i) - half_log_snr(node, i))))
            moved.append(b.sigma[i] / a.sigma[i] * z - b.alpha[i] * math.expm1(-step) * x)
        latents, before = tuple(moved), (a, data)
    return latents


def half_log_snr(node: Node, level: int) -> float:
    """log(alpha / sigma), infinite at the ends."""
    alpha, sigma = node.alpha[level], node.sigma[level]
    return math.inf if sigma == 0 else -math.inf if alpha == 0 else math.log(alpha / sigma)
