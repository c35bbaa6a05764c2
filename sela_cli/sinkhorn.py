"""The plain label solve: Sinkhorn-Knopp in the log domain.

K columns (clusters) of the score matrix.
"""

from __future__ import annotations

from torch import Tensor

from sela_cli.semidual import Problem, Solution


def solve(problem: Problem, init_K: Tensor | None = None) -> Solution:
    """Sinkhorn-Knopp: a <- a + log r - log s(a).

    `init_K`: potentials to start from, else zeros. Ends when the residual is at most the
    problem's tolerance, or when its reads are over. Never raises for want of
    convergence: see `Solution.converged`. Source: SeLa eq. 7, in the log domain.
    """
    point = problem.read(problem.zeros() if init_K is None else init_K, problem.whole)
    while problem.residual(point) > problem.tol and not problem.over():
        point = problem.read(problem.sinkhorn(point), problem.whole)
    return problem.solution(point)
