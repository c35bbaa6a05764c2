"""The label solve in few reads: Newton steps in a box, on the curvature that is cheapest.

K columns (clusters) of the score matrix.

A step minimises the quadratic model of the semi-dual F (see `semidual`) in a box about
the potentials: within it no plan entry changes by more than a constant factor, so that
the Hessian means something. Where rows are nearly decided, their plans are sparse and
every read gives the Hessian too. Elsewhere it comes from a sample of the rows, or from all
of them; BFGS updates keep it while a new one would cost more than the reads it may save.
From a far start, problems of smaller lambda are solved first, loosely, on a sample.
Sources: Carmon et al. 2020 (Newton steps in balls for softmax problems); BFGS and Wolfe's
curvature condition (Nocedal and Wright, ch. 3, 6); raising lambda in steps (Schmitzer 2019).
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sela_cli import parallel
from sela_cli.semidual import FAST_BFLOAT16, Point, Problem, Solution, breadth, laplacian, total
from sela_cli.tiles import InMemory, Rows, Some, evenly

# A given start with a larger residual is left for an annealed one.
_NEAR = 0.02
_ANNEAL_TOL = 0.01
# Rows that the range of the scores is taken from.
_SPREAD = 1024
# Rows of a sample, per cluster and at least; of fewer than twice as many all are taken.
_SMALL, _LARGE = (4, 4096), (16, 8192)
# One row of so many is in the sample for rows that are nearly decided.
_SHARE = 8
# Half the side of the box: at first, doubled after a step to its side that went well, and
# at most for a Hessian that is not of this very point. And how often the bounds that hold
# are looked for.
_BOX, _STALE_BOX = 5.0, 20.0
_BOX_ROUNDS = 6
# With more of the coordinates at the sides, and more than half, the rest is not solved for.
_MANY_HELD = 64
# A step along which F falls by less than this for each unit of gradient is no good.
_DESCENT = 0.1
_DAMPING = 1e-6
_LEAST_SHARE = 1e-4
# Where a cluster has less than this share of its due, the quadratic model says nothing
# about it: Sinkhorn steps bring it back.
_STARVED = 1e-6
# Costs in softmax entries: a multiply-add of a dense product (in bfloat16 where the
# processor has it) and of a Cholesky factor in float64; looking for entries that are not
# negligible, each such entry, and each pair of them in a row.
_DENSE, _FACTOR = 1 / 128 if FAST_BFLOAT16 else 1 / 64, 1 / 16
_LOOK, _ENTRY, _PAIR = 0.5, 50.0, 1.4
# A Hessian of all rows that costs no more steps than this is taken whenever one is due,
# unless they are so many times the sample's.
_CHEAP, _MANY = 4.0, 8
# A sample's Hessian is good for residuals above _NOISE; above _FAR no other is taken.
_NOISE, _FAR = 0.02, 0.1
# One is due when a step lowers the logarithm of the residual by less than _FAST; _RATE is
# what is expected of the first step, _NEWTON of those with a Hessian of all rows.
_FAST, _RATE, _NEWTON = 1.2, 0.5, 3.0


def solve(problem: Problem, init_K: Tensor | None = None) -> Solution:
    """Minimise the semi-dual; arguments and result as those of `sinkhorn.solve`."""
    samples = _Samples(problem)
    levels = _levels(problem)
    if init_K is None and (not levels or problem.over()):
        init_K = torch.zeros_like(problem.marginal_K)
    descent = _Descent(problem, samples)
    point = descent.read(init_K) if init_K is not None else None
    if point is None or (levels and problem.residual(point) > _NEAR and not problem.over()):
        # Another descent: what Hessians cost at the start says nothing of those here.
        descent = _Descent(problem, samples)
        point = descent.read(_anneal(problem, samples, levels))
    rate = 0.0 if levels else math.inf
    while rate > _FAST and problem.residual(point) > problem.tol and not problem.over():
        before, point = point, descent.read(problem.sinkhorn(point))
        rate = math.log(problem.residual(before) / max(problem.residual(point), 1e-300))
    return problem.solution(descent.run(point))


def refine(problem: Problem, init_K: Tensor) -> Solution:
    """Go on from potentials that are nearly right: no annealing."""
    descent = _Descent(problem, _Samples(problem))
    return problem.solution(descent.run(descent.read(init_K)))


class _Samples:
    """Rows drawn evenly, when they are first asked for; all of them where they are few."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    @cached_property
    def small(self) -> Rows:
        """For plans that are soft."""
        return self._kept(_SMALL)

    @cached_property
    def large(self) -> Rows:
        """For Hessians."""
        return self._kept(_LARGE)

    @cached_property
    def middle(self) -> Rows:
        """For rows that are nearly decided; not kept in memory."""
        problem, (share, least) = self._problem, _LARGE
        if problem.count // _SHARE < max(share * problem.rows.shape[1], least):
            return problem.rows
        return Some(problem.rows, self._drawn(problem.rows.shape[0] // _SHARE))

    def _kept(self, size: tuple[int, int]) -> Rows:
        problem, (share, least) = self._problem, size
        # Of all processes together, so that they agree.
        wanted = max(share * problem.rows.shape[1], least) // parallel.size()
        if problem.count <= 2 * wanted * parallel.size():
            return problem.rows
        return InMemory.of(problem.rows, self._drawn(wanted))

    def _drawn(self, wanted: int) -> np.ndarray:
        count = self._problem.rows.shape[0]
        return np.sort(np.random.default_rng(0).choice(count, wanted, replace=False))


def _levels(problem: Problem) -> int:
    """Smaller lambdas to go by: at the first no plan entry is near 0 or 1.

    None where that is so at `lamb` itself: rows that are much alike, as those of a fresh
    network, are balanced by Sinkhorn at once.
    """
    return math.ceil(math.log(max(problem.lamb * _spread(problem.rows), 1.0), 4))


def _anneal(problem: Problem, samples: _Samples, levels: int) -> Tensor:
    """Potentials by way of smaller lambdas, each four times the one before.

    They are solved on a small sample, unless rows are nearly decided: then it says little
    of the prices of the rest.
    """
    prices_K = torch.zeros_like(problem.marginal_K)
    for level in range(levels, -1, -1):
        lamb = problem.lamb / 4**level
        costs = _Costs(problem, breadth(problem.rows, lamb, prices_K * lamb))
        decided = costs.exact <= _CHEAP and level <= 2
        rows = samples.middle if decided else samples.small
        if level == 0 and rows is problem.rows:
            break
        softer = problem.at(rows, lamb, _ANNEAL_TOL)
        descent = _Descent(softer, samples, "large" if decided else "small")
        prices_K = descent.run(descent.read(prices_K * lamb)).a_K / lamb
        if problem.over():
            break
    return prices_K * problem.lamb


def _spread(rows: Rows) -> float:
    """Mean standard deviation of the scores within a row, of some rows."""
    spread_n = evenly(rows, _SPREAD).tile(0, _SPREAD, torch.float32).std(1, correction=0)
    return float(parallel.mean_of(spread_n.cpu()))


class _Costs:
    """What a Hessian of all rows costs, in steps, and whether as products of sparse plans."""

    def __init__(self, problem: Problem, breadth: float) -> None:
        clusters = problem.rows.shape[1]
        dense = _DENSE * clusters
        sparse = _LOOK + (_ENTRY * breadth + _PAIR * breadth**2) / clusters
        entries = problem.count * clusters
        step = entries + _FACTOR * clusters**3 / 3
        self.exact = entries * (1 + min(dense, sparse)) / step
        self.sparse = sparse < dense
        self.curved = problem.rows.device.type == "cpu" and entries * sparse <= step


class _Descent:
    """Steps down F, and the Hessian they go by."""

    def __init__(self, problem: Problem, samples: _Samples, sample: str = "large") -> None:
        self.problem, self._samples, self._sample = problem, samples, sample
        self.hessian_KK: Tensor | None = None
        self.costs: _Costs | None = None
        self.boxed = False
        self.box = _BOX
        self.residual = math.inf

    @property
    def sample(self) -> Rows:
        """Rows for Hessians that are not of all rows."""
        return self._samples.small if self._sample == "small" else self._samples.large

    def read(self, a_K: Tensor) -> Point:
        """A read at potentials, with the Hessian where that is cheap."""
        return self.problem.read(a_K, self._costs_at(a_K).curved)

    def _costs_at(self, a_K: Tensor) -> _Costs:
        if self.costs is None or self.boxed:
            self.costs = _Costs(self.problem, breadth(self.problem.rows, self.problem.lamb, a_K))
        return self.costs

    def run(self, point: Point) -> Point:
        """From `point` to the tolerance, or to where the reads are over."""
        problem = self.problem
        while problem.residual(point) > problem.tol and not problem.over():
            if problem.starved(point, _STARVED):
                self.hessian_KK = None
                point = self.read(problem.sinkhorn(point))
            else:
                point = self._step(point)
        return point

    def _step(self, point: Point) -> Point:
        before, costs = self.hessian_KK, self._costs_at(point.a_K)
        hessian_KK = self._hessian(point, costs)
        fresh = hessian_KK is not before
        box = self.box if fresh else min(self.box, _STALE_BOX)
        change_K = _box_step(hessian_KK, self.problem.gradient(point), point.s_K, box)
        reads = len(self.problem.trace)
        reached = self.problem.move(point, change_K, costs.curved)
        self.boxed = float(change_K.abs().max()) == box
        if len(self.problem.trace) > reads + 1:
            self.box = _BOX
        elif self.boxed and fresh:
            self.box *= 2
        if reached.hessian_KK is None:
            _update(hessian_KK, reached.a_K - point.a_K, reached.s_K - point.s_K)
        return reached

    def _hessian(self, point: Point, costs: _Costs) -> Tensor:
        """The Hessian to use: taken anew where that costs less than the steps it may save."""
        problem = self.problem
        before, self.residual = self.residual, problem.residual(point)
        if point.hessian_KK is not None:
            self.hessian_KK = point.hessian_KK
            return self.hessian_KK
        part = total(self.sample) / problem.count
        rate = _RATE if self.hessian_KK is None else max(math.log(before / self.residual), 1e-3)
        left = math.log(self.residual / problem.tol)
        worth = self.residual < _NOISE and left / rate > costs.exact + left / _NEWTON
        cheap = costs.exact <= _CHEAP and part * _MANY >= 1
        # Steps to where a sample says no more, at this rate and at that of a fresh Hessian.
        saved = math.log(max(self.residual / _NOISE, 1.0)) * (1 / rate - 1 / _FAST)
        due = rate < _FAST if cheap else saved > costs.exact * part
        if self.hessian_KK is None or worth or due:
            rows = problem.rows if worth or (cheap and self.residual < _FAR) else self.sample
            self.hessian_KK = laplacian(rows, problem.lamb, point.a_K, costs.sparse)
        return self.hessian_KK


def _update(hessian_KK: Tensor, moved_K: Tensor, turned_K: Tensor) -> None:
    """BFGS: the Hessian, in place, is to explain the last step."""
    across = float(moved_K @ turned_K)
    foreseen_K = hessian_KK @ moved_K
    along = float(moved_K @ foreseen_K)
    if across > 1e-12 * along > 0:
        hessian_KK += torch.outer(turned_K, turned_K / across)
        hessian_KK -= torch.outer(foreseen_K, foreseen_K / along)


def _box_step(hessian_KK: Tensor, gradient_K: Tensor, s_K: Tensor, box: float) -> Tensor:
    """The change that minimises the quadratic model within the box (half its side given),
    or nearly.

    Coordinates that leave the box are held at its side, and the others follow: by one
    factor for all rounds.
    """
    clusters = len(s_K)
    # F does not change along (1, ..., 1): the constant makes the system regular there.
    system_KK = hessian_KK + 1 / clusters**2
    # Clusters that hardly any row is due to would leave it singular to rounding.
    s_K = s_K.clamp(min=_LEAST_SHARE / clusters**2)
    system_KK.diagonal().add_(_DAMPING * s_K)
    factor_KK = torch.linalg.cholesky(system_KK)
    free_K = torch.cholesky_solve(-gradient_K[:, None], factor_KK)[:, 0]
    free_K -= free_K.median()
    change_K, held = free_K, torch.zeros(clusters, dtype=torch.bool)
    for _ in range(_BOX_ROUNDS):
        outside = change_K.abs() > box * (1 + 1e-9)
        held |= outside
        if not outside.any() or int(held.sum()) > max(clusters / 2, _MANY_HELD):
            break
        units = torch.eye(clusters, dtype=s_K.dtype)[:, held]
        answers = torch.cholesky_solve(units, factor_KK)
        excess = free_K[held] - change_K[held].clamp(-box, box)
        change_K = free_K - answers @ torch.linalg.solve(answers[held], excess)
    change_K = change_K.clamp(-box, box)
    # Held coordinates are never let go: where that leads nowhere, damping shortens the step.
    damping = _DAMPING
    while (
        held.any()
        and damping < 1
        and float(gradient_K @ change_K) > -_DESCENT * float(gradient_K.abs().sum())
    ):
        damping *= 10
        system_KK.diagonal().add_(damping * s_K)
        factor_KK = torch.linalg.cholesky(system_KK)
        change_K = torch.cholesky_solve(-gradient_K[:, None], factor_KK)[:, 0]
        change_K -= change_K.mean()
        change_K *= min(1.0, box / float(change_K.abs().max()))
    return change_K
