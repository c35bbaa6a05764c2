"""The label solve by L-BFGS: many reads, but no matrix of K x K.

K columns (clusters) of the score matrix. Source: Nocedal and Wright, ch. 7.
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

from sela_cli.semidual import Point, Problem, Solution

_MEMORY = 20
# Largest change of a potential in a step.
_LONGEST = 5.0
# Where a cluster has less than this share of its due, only Sinkhorn's step knows how far to go.
_STARVED = 0.1

Pairs = deque[tuple[Tensor, Tensor]]


def solve(problem: Problem, init_K: Tensor | None = None) -> Solution:
    """Minimise the semi-dual; arguments and result as those of `sinkhorn.solve`."""
    point = problem.read(problem.zeros() if init_K is None else init_K)
    pairs: Pairs = deque(maxlen=_MEMORY)
    while problem.residual(point) > problem.tol and not problem.over():
        if problem.starved(point, _STARVED):
            pairs.clear()
            point = problem.read(problem.sinkhorn(point))
            continue
        before, change_K = point, _direction(problem.gradient(point), point, pairs)
        point = problem.move(point, change_K.clamp(-_LONGEST, _LONGEST))
        moved_K = point.a_K - before.a_K
        turned_K = problem.turn(before, point)
        if float(moved_K @ turned_K) > 0:
            pairs.append((moved_K, turned_K))
    return problem.solution(point)


def _direction(gradient_K: Tensor, point: Point, pairs: Pairs) -> Tensor:
    """The two loops, about Sinkhorn's metric diag(s)."""
    weights = []
    for moved_K, turned_K in reversed(pairs):
        weights.append(float(moved_K @ gradient_K) / float(moved_K @ turned_K))
        gradient_K = gradient_K - weights[-1] * turned_K
    change_K = gradient_K / point.s_K
    for (moved_K, turned_K), weight in zip(pairs, reversed(weights), strict=True):
        back = float(turned_K @ change_K) / float(moved_K @ turned_K)
        change_K = change_K + (weight - back) * moved_K
    return change_K.mean() - change_K
