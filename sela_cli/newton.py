"""The label solve in few reads: Newton steps in a box, on the curvature that is cheapest.

K columns (clusters) of the score matrix.

A step minimises the quadratic model of the semi-dual F (see `semidual`) in a box about
the potentials: within it no plan entry changes by more than a constant factor, so that
the Hessian means something. It comes from a sample of the rows, or from all of them; BFGS
updates keep it while a new one would cost more than the reads it may save. Where rows are
nearly decided a read gives their plans too, and with these a model of F in memory: it is
minimised between two reads, each of which corrects it. Where a matrix of K x K would cost
more than it saves, steps go by the Hessian's products with vectors, or by earlier steps.
From a far start, problems of smaller lambda are solved first, loosely, on a sample.
Sources: Carmon et al. 2020 (Newton steps in balls for softmax problems); BFGS and Wolfe's
curvature condition (Nocedal and Wright, ch. 3, 6); raising lambda in steps (Schmitzer 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sela_cli import lbfgs, parallel
from sela_cli.curvature import Curvature, Factored, Metric, Products
from sela_cli.machine import has_fast_bfloat16
from sela_cli.marginals import Marginal
from sela_cli.plans import NEGLIGIBLE, Plans, Take
from sela_cli.semidual import Point, Problem, Solution, breadth, laplacian
from sela_cli.tiles import InMemory, Rows, Some, by_itself, evenly

# A given start with a larger residual is left for an annealed one. Annealing need not come
# nearer than a sample tells.
_NEAR = 0.02
_ANNEAL_TOL = 0.01
# Rows that the range of the scores is taken from, and where it ends: masked columns may be
# as far away as numbers go.
_SPREAD, _WIDEST = 1024, 1e9
# Rows of a sample, per cluster and at least; of fewer than twice as many all are taken.
_SMALL, _LARGE = (4, 4096), (16, 8192)
# One row of so many is in the sample for rows that are nearly decided: those that are spread
# over no more than this share of the clusters.
_SHARE, _DECIDED = 8, 1 / 24
# Factors of matrices of up to so many columns are made by one thread: more gain little, and
# where the processors are busy they wait for one another for seconds.
_ALONE = 2048
# Half the side of the box: at first, doubled after a step to its side that went well where
# each costs a read, and at most for a Hessian that is not of this very point.
_BOX, _STALE_BOX = 5.0, 20.0
# Where a cluster has less than this share of its due, the quadratic model says nothing
# about it: Sinkhorn steps bring it back.
_STARVED = 1e-6
# Costs in softmax entries. A multiply-add of a dense product, also in bfloat16 where the
# processor has it, and of a Cholesky factor in float64; the part of a factor's work that a
# step takes.
_DENSE, _DENSE_BFLOAT16, _FACTOR, _HOLDING = 1 / 64, 1 / 128, 1 / 16, 1 / 4
# Looking for entries of a plan that are not negligible, taking one, going over one that was
# taken, and over one of a plan that is kept whole.
_LOOK, _TAKE, _KEPT, _WHOLE = 0.5, 10.0, 6.0, 0.3
# In sparse products, an entry, and a pair of entries in a row.
_ENTRY, _PAIR = 50.0, 2.4
# Rows that are spread over more than this share of the clusters are better kept whole.
_THICK = 1 / 16
# Products with the Hessian that a step is expected to take, and reads that a Hessian is worth.
_EXPECTED, _PATIENCE = 6, 10
# Plans are taken where that costs no more reads than _WORTH: of the entries above the first
# of _LEAST, or above the last that cost no more than _EASY. Bytes of one, work included.
_WORTH, _EASY = 2.0, 1.0
_LEAST = (NEGLIGIBLE, 1e-6, 1e-8, 1e-10)
_ENTRY_BYTES = 24
# A model's own reads, at most; and how much nearer than the tolerance it is brought where
# plans are that good: steps in memory are cheap, and fewer rows are left to be balanced.
_MODEL_READS, _NEARER = 200, 1 / 32
# Plans are taken anew where a potential has moved so far that entries left out may be _SEEN,
# and a model is left where they may be _LOST. It is not used again if it has not brought
# the residual down to a _GAIN-th.
_SEEN, _LOST, _GAIN = 1e-3, 1.0, 4.0
# A Hessian of all rows that costs no more steps than this is taken whenever one is due,
# unless they are so many times the sample's.
_CHEAP, _MANY = 4.0, 8
# One that costs no more than this is taken for every step.
_ALWAYS = 2.0
# A sample's Hessian is good for residuals above _NOISE; above _FAR no other is taken.
_NOISE, _FAR = 0.02, 0.1
# One is due when a step lowers the logarithm of the residual by less than _FAST; _RATE is
# what is expected of the first step, _NEWTON of those with a Hessian of all rows.
_FAST, _RATE, _NEWTON = 1.2, 0.5, 3.0


def solve(problem: Problem, init_K: Tensor | None = None) -> Solution:
    """Minimise the semi-dual; arguments and result as those of `sinkhorn.solve`."""
    with _threads(problem):
        return _solve(problem, init_K)


def _solve(problem: Problem, init_K: Tensor | None) -> Solution:
    samples = _Samples(problem)
    levels = _levels(problem)
    if init_K is None and (not levels or problem.over()):
        init_K = problem.zeros()
    descent = _Descent(problem, _OfRows(problem, samples, "large"))
    point = descent.read(init_K) if init_K is not None else None
    far = point is not None and levels and problem.residual(point) > _NEAR
    if point is None or (far and problem.left > 1 and not problem.over()):
        point = descent.read(_anneal(problem, samples, levels))
    if not levels:
        point = _by_sinkhorn(problem, point)
    return problem.solution(descent.run(point))


def _by_sinkhorn(problem: Problem, point: Point) -> Point:
    """To the tolerance, or for as long as that is fast."""
    rate, before = math.inf, math.inf
    while rate > _FAST and problem.residual(point) > problem.tol and not problem.over():
        dtype = problem.dtype
        point = problem.read(problem.sinkhorn(point), problem.whole)
        residual = problem.residual(point)
        rate = math.log(before / max(residual, 1e-300))
        # What was read in float32 last may have been its rounding.
        before = residual if problem.dtype == dtype else math.inf
    return point


def refine(problem: Problem, init_K: Tensor) -> Solution:
    """Go on from potentials that are nearly right: no annealing."""
    with _threads(problem):
        descent = _Descent(problem, _OfRows(problem, _Samples(problem), "large"))
        return problem.solution(descent.run(descent.read(init_K)))


def _threads(problem: Problem) -> AbstractContextManager[None]:
    return by_itself() if problem.rows.shape[1] <= _ALONE else nullcontext()


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

    def size(self, share: tuple[int, int]) -> int:
        """Rows of a sample, of all processes together, so that they agree."""
        wanted = max(share[0] * self._problem.rows.shape[1], share[1])
        return wanted if self._problem.count > 2 * wanted else self._problem.count

    def _kept(self, share: tuple[int, int]) -> Rows:
        if (wanted := self.size(share)) == self._problem.count:
            return self._problem.rows
        return InMemory.of(self._problem.rows, self._drawn(wanted // parallel.size()))

    def _drawn(self, wanted: int) -> np.ndarray:
        count = self._problem.rows.shape[0]
        return np.sort(np.random.default_rng(0).choice(count, wanted, replace=False))


def _levels(problem: Problem) -> int:
    """Smaller lambdas to go by: at the first no plan entry is near 0 or 1.

    None where that is so at `lamb` itself: rows that are much alike, as those of a fresh
    network, are balanced by Sinkhorn at once.
    """
    return math.ceil(math.log(min(max(problem.lamb * _spread(problem.rows), 1.0), _WIDEST), 4))


def _anneal(problem: Problem, samples: _Samples, levels: int) -> Tensor:
    """Potentials by way of smaller lambdas, each four times the one before.

    They are solved on a small sample, unless rows are nearly decided: then it says little
    of the prices of the rest.
    """
    prices_K = problem.zeros()
    for level in range(levels, -1, -1):
        lamb = problem.lamb / 4**level
        (spread,) = breadth(problem.rows, lamb, prices_K * lamb, [NEGLIGIBLE])
        decided = level <= 2 and spread <= _DECIDED * problem.rows.shape[1]
        rows = samples.middle if decided else samples.small
        if level == 0 and rows is problem.rows:
            break
        softer = problem.at(rows, lamb, _ANNEAL_TOL)
        if rows is problem.rows:
            # The last read is for `lamb` itself.
            softer.max_iter -= 1
            if softer.over():
                break
        descent = _Descent(softer, _OfRows(softer, samples, "large" if decided else "small"))
        prices_K = descent.run(descent.read(prices_K * lamb)).a_K / lamb
        if problem.over():
            break
    return prices_K * problem.lamb


def _spread(rows: Rows) -> float:
    """Mean standard deviation of the scores within a row, of some rows."""
    some_nK = evenly(rows, _SPREAD).tile(0, _SPREAD)
    # Not torch's own, which warns of a process without rows.
    spread_n = (some_nK - some_nK.mean(1, keepdim=True)).square().mean(1).sqrt()
    return float(parallel.mean_of(spread_n.cpu()))


class _Costs(NamedTuple):
    """How many clusters a row's plan is spread over; what a Hessian of all rows costs, in
    steps, and whether as products of sparse plans; the plans that are worth taking."""

    spread: float
    exact: float
    sparse: bool
    take: Take | None = None


def _costs(problem: Problem, a_K: Tensor) -> _Costs:
    """At potentials, for the rows of a problem."""
    clusters = problem.rows.shape[1]
    spreads = breadth(problem.rows, problem.lamb, a_K, _LEAST)
    taking = [_LOOK + _TAKE * spread / clusters for spread in spreads]
    dense = _dense(parallel.size()) * clusters
    sparse = taking[0] + (_ENTRY * spreads[0] + _PAIR * spreads[0] ** 2) / clusters
    # A step is a read and, where coordinates are held in the box, part of a factor's work.
    entries, factoring = problem.count * clusters, _factoring(clusters)
    take = problem.whole if spreads[0] > _THICK * clusters else None
    read = _WHOLE if take else 1.0
    exact = entries * (1 + min(dense, sparse)) / (entries * read + _HOLDING * factoring)
    if take is None and problem.rows.device.type == "cpu" and taking[0] <= _WORTH:
        finest = max([0, *(n for n, cost in enumerate(taking) if cost <= _EASY)])
        fitting = (_fitting(problem, spreads[n], _LEAST[n]) for n in range(finest, -1, -1))
        take = next(filter(None, fitting), None)
    return _Costs(spreads[0], exact, sparse < dense, take)


def _fitting(problem: Problem, spread: float, least: float) -> Take | None:
    """Plans of as many rows as memory has room for, unless these are too few."""
    size = problem.count / parallel.size() * spread * _ENTRY_BYTES
    every = max(1, math.ceil(size / max(problem.memory, 1)))
    enough = every == 1 or problem.count >= every * _LARGE[0] * problem.rows.shape[1]
    return Take(every, least) if enough else None


@cache
def _dense(processes: int) -> float:
    """What a multiply-add of a dense product costs on the slowest of the processors: all
    processes have to take the same steps."""
    return _DENSE if parallel.any_of(not has_fast_bfloat16()) else _DENSE_BFLOAT16


def _factoring(clusters: int) -> float:
    """What the Cholesky factor of a Hessian costs."""
    return _FACTOR * clusters**3 / 3


def _has_squares(problem: Problem, sample: int, count: int) -> bool:
    """Whether steps on `count` rows are to go by matrices of K x K, from a sample of them."""
    if not problem.square:
        return False
    clusters = problem.rows.shape[1]
    cost = sample * clusters * (1 + _dense(parallel.size()) * clusters)
    cost += (1 + _HOLDING) * _factoring(clusters)
    return problem.rows.device.type != "cpu" or cost < _PATIENCE * count * clusters


class _OfRows:
    """Hessians of F, from the rows of a problem or from a sample of them."""

    def __init__(self, problem: Problem, samples: _Samples, sample: str) -> None:
        self._problem, self._samples, self._sample = problem, samples, sample
        self._known: _Costs | None = None
        # Of the rows that are drawn, of all processes.
        self._size = samples.size(_SMALL if sample == "small" else _LARGE)
        self.squares = _has_squares(problem, self._size, problem.count)
        self.starved = _STARVED if self.squares else lbfgs.STARVED

    def costs(self, a_K: Tensor, anew: bool) -> _Costs:
        """Those of Hessians; `anew`: as they may have changed."""
        if self._known is None or anew:
            self._known = _costs(self._problem, a_K)
        return self._known

    @property
    def _drawn(self) -> Rows:
        return self._samples.small if self._sample == "small" else self._samples.large

    @property
    def part(self) -> float:
        """The sample's share of the rows."""
        return self._size / self._problem.count

    def at(self, a_K: Tensor, costs: _Costs, everything: bool) -> Tensor:
        """The Hessian at potentials, of all rows or of the sample."""
        rows = self._problem.rows if everything else self._drawn
        return laplacian(rows, self._problem.lamb, a_K, costs.sparse)


class _OfPlans:
    """Hessians of a model."""

    starved = _STARVED

    def __init__(self, plans: Plans, spread: float, square: bool) -> None:
        clusters = len(plans.a_K)
        share, least = _LARGE
        self._plans = plans
        self._every = max(1, plans.rows // max(share * clusters, least))
        dense = clusters * (1 + _dense(parallel.size()) * clusters)
        sparse = _ENTRY * spread + _PAIR * spread**2
        read, factoring = _KEPT * plans.entries, _factoring(clusters)
        made = plans.rows * min(dense, sparse)
        self._costs = _Costs(spread, (read + made) / (read + _HOLDING * factoring), sparse < dense)
        products = _EXPECTED * _KEPT * plans.rows * spread
        self.squares = square and made / self._every + (1 + _HOLDING) * factoring < products

    def costs(self, a_K: Tensor, anew: bool) -> _Costs:
        """Those of Hessians."""
        return self._costs

    @property
    def part(self) -> float:
        """The sample's share of the rows."""
        return 1 / self._every

    def at(self, a_K: Tensor, costs: _Costs, everything: bool) -> Tensor:
        """The Hessian at potentials, of all rows or of some."""
        return self._plans.laplacian(a_K, 1 if everything else self._every, costs.sparse)

    def products(self, a_K: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """That of all rows by its products, and its diagonal."""
        return self._plans.products(a_K)


class _InPart:
    """A marginal times the share of each cluster that some plans have."""

    def __init__(self, whole: Marginal, share_K: Tensor) -> None:
        self._whole, self._share_K = whole, share_K

    def at(self, a_K: Tensor) -> Tensor:
        """r(a)."""
        return self._part(self._whole.at(a_K))

    def scaled_to(self, a_K: Tensor, log_s_K: Tensor) -> Tensor:
        """After Sinkhorn's step."""
        return self._part(self._whole.scaled_to(a_K, log_s_K))

    def free(self, a_K: Tensor) -> Tensor | None:
        """That of the whole."""
        return self._whole.free(a_K)

    def levelled(self, a_K: Tensor) -> Tensor:
        """By the whole."""
        return self._whole.levelled(a_K)

    def _part(self, r_K: Tensor) -> Tensor:
        part_K = r_K * self._share_K
        return part_K / part_K.sum()


class _Model(Problem):
    """A problem as the plans at a point have it, with a marginal that makes up for what
    they leave out: r_k times the share of s_k that they have."""

    def __init__(self, problem: Problem, point: Point, plans: Plans) -> None:
        # What plans leave out counts for more than a smaller residual.
        tol = max(plans.taken.least**0.5 * problem.residual(point), _NEARER * problem.tol)
        self._plans, self._moved = plans, 0.0
        found_K = plans.soft_sizes(point.a_K)
        self.start = Point(point.a_K, found_K.log())
        marginal = _InPart(problem.marginal, found_K / point.s_K)
        super().__init__(problem.rows, marginal, problem.lamb, tol, _MODEL_READS, stop=problem.stop)

    def read(self, a_K: Tensor, take: Take | None = None) -> Point:
        """What a read would give, from the plans."""
        return self._read(a_K - a_K.mean(), None)

    def _soft_sizes(self, a_K: Tensor, take: Take | None) -> Point:
        return Point(a_K, self._plans.soft_sizes(a_K).log())

    def move(self, point: Point, change_K: Tensor, take: Take | None = None) -> Point:
        """As that of any problem; notes how far the point it leads to is."""
        reached = super().move(point, change_K)
        self._moved = float((reached.a_K - self.start.a_K).abs().max())
        return reached

    def over(self) -> bool:
        """Whether it is to be left."""
        return self.far or super().over()

    @property
    def far(self) -> bool:
        """Whether the way leads farther than the plans are good for."""
        return self._moved > math.log(_LOST / self._plans.taken.least)


class _Descent:
    """Steps down F, and the Hessian they go by."""

    def __init__(self, problem: Problem, hessians: _OfRows | _OfPlans) -> None:
        self.problem, self._hessians = problem, hessians
        self.curvature: Curvature | None = None
        self.boxed = False
        self.box = _BOX
        self.residual = math.inf
        # Where the last model was no good, at what residual.
        self._failed = math.inf

    def read(self, a_K: Tensor) -> Point:
        """A read at potentials, with the plans where these are worth it."""
        return self.problem.read(a_K, self._hessians.costs(a_K, anew=True).take)

    def run(self, point: Point) -> Point:
        """From `point` to the tolerance, or to where the reads are over."""
        problem = self.problem
        while problem.residual(point) > problem.tol and not problem.over():
            if problem.starved(point, _STARVED if point.plans else self._hessians.starved):
                self.curvature = None
                point = self.read(problem.sinkhorn(point))
                continue
            point = self._by_plans(point) or self._step(point)
        return point

    def _by_plans(self, point: Point) -> Point | None:
        """A read at what minimises a model; None where there is none, or it is no good."""
        plans, residual = point.plans, self.problem.residual(point)
        # After one that was no good, much has to change.
        if plans is None or residual * _GAIN >= self._failed:
            return None
        self._failed = residual
        model = _Model(self.problem, point, plans)
        if not (model.marginal.at(point.a_K) > 0).all():
            return None
        descent = _Descent(model, self._of_plans(plans, self._hessians.costs(point.a_K, False)))
        descent.curvature = self.curvature
        found = descent.run(model.start)
        left = model.residual(found)
        if left * _GAIN > residual and not (model.far and left < residual):
            self.curvature = None
            return None
        self._failed, self.curvature = math.inf, descent.curvature
        return self._checked(point, plans, found.a_K, last=left <= self.problem.tol)

    def _of_plans(self, plans: Plans, costs: _Costs) -> _OfPlans:
        return _OfPlans(plans, costs.spread, self.problem.square)

    def _checked(self, point: Point, plans: Plans, found_K: Tensor, last: bool) -> Point:
        """A read at what a model found, with plans to go on by unless it may be the `last`."""
        moved = float((found_K - plans.a_K).abs().max())
        far = moved > math.log(_SEEN / plans.taken.least)
        take = self._hessians.costs(point.a_K, anew=True).take if far and not last else None
        reached = self.problem.move(point, found_K - point.a_K, take)
        if reached.plans is None and (
            self.problem.residual(reached) * _GAIN < self.problem.residual(point)
        ):
            return reached._replace(plans=plans)
        return reached

    def _step(self, point: Point) -> Point:
        before, costs = self.curvature, self._hessians.costs(point.a_K, self.boxed)
        curvature = self._curvature(point, costs)
        fresh = curvature is not before
        box = self.box if fresh else min(self.box, _STALE_BOX)
        change_K = curvature.step(point, self.problem.gradient(point), box)
        reads = len(self.problem.trace)
        reached = self.problem.move(point, change_K, costs.take)
        self.boxed = float(change_K.abs().max()) == box
        if len(self.problem.trace) > reads + 1:
            self.box = _BOX
        elif self.boxed and fresh and isinstance(self._hessians, _OfRows):
            self.box *= 2
        curvature.update(reached.a_K - point.a_K, self.problem.turn(point, reached))
        return reached

    def _curvature(self, point: Point, costs: _Costs) -> Curvature:
        """The one to use: taken anew where that costs less than the steps it may save."""
        problem = self.problem
        source = self._of_plans(point.plans, costs) if point.plans else self._hessians
        if not source.squares:
            return self._without_squares(point, source)
        before, self.residual = self.residual, problem.residual(point)
        curvature = self.curvature if isinstance(self.curvature, Factored) else None
        rate = _RATE if curvature is None else max(math.log(before / self.residual), 1e-3)
        left = math.log(self.residual / problem.tol)
        worth = self.residual < _NOISE and left / rate > costs.exact + left / _NEWTON
        cheap = costs.exact <= _CHEAP and source.part * _MANY >= 1
        # Steps to where a sample says no more, at this rate and at that of a fresh Hessian.
        saved = math.log(max(self.residual / _NOISE, 1.0)) * (1 / rate - 1 / _FAST)
        due = rate < _FAST if cheap else saved > costs.exact * source.part
        if curvature is None or worth or due or costs.exact <= _ALWAYS:
            everything = worth or costs.exact <= _ALWAYS or (cheap and self.residual < _FAR)
            hessian_KK = source.at(point.a_K, costs, everything)
            free_K = problem.marginal.free(point.a_K)
            if free_K is not None:
                free_K = free_K.to(hessian_KK)
                hessian_KK.diagonal().add_(free_K)
                hessian_KK -= torch.outer(free_K, free_K / free_K.sum())
            curvature = Factored(hessian_KK, point.s_K)
        self.curvature = curvature
        return curvature

    def _without_squares(self, point: Point, source: _OfRows | _OfPlans) -> Curvature:
        if isinstance(source, _OfRows):
            curvature = self.curvature if isinstance(self.curvature, Metric) else Metric()
            self.curvature = curvature
            return curvature
        product, diagonal_K = source.products(point.a_K)
        free_K = self.problem.marginal.free(point.a_K)
        if free_K is None:
            return Products(product, diagonal_K, point.s_K)
        whole = free_K.sum()
        return Products(
            lambda x_K: product(x_K) + free_K * (x_K - free_K @ x_K / whole),
            diagonal_K + free_K - free_K**2 / whole,
            point.s_K,
        )
