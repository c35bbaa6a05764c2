"""The label solve by L-BFGS: many reads, but no matrix of K x K.

K columns (clusters) of the score matrix. Source: Nocedal and Wright, ch. 7.
"""

from __future__ import annotations

from torch import Tensor

from sela_cli.curvature import Metric
from sela_cli.semidual import Problem, Solution

# Largest change of a potential in a step.
_LONGEST = 5.0
# Where a cluster has less than this share of its due, only Sinkhorn's step knows how far to go.
STARVED = 0.1


def solve(problem: Problem, init_K: Tensor | None = None) -> Solution:
    """Minimise the semi-dual; arguments and result as those of `sinkhorn.solve`."""
    start_K = problem.zeros() if init_K is None else init_K
    point, curvature = problem.read(start_K, problem.whole), Metric()
    while problem.residual(point) > problem.tol and not problem.over():
        if problem.starved(point, STARVED):
            point, curvature = problem.read(problem.sinkhorn(point), problem.whole), Metric()
            continue
        before, change_K = point, curvature.step(point, problem.gradient(point), _LONGEST)
        point = problem.move(point, change_K, problem.whole)
        curvature.update(point.a_K - before.a_K, problem.turn(before, point))
    return problem.solution(point)
