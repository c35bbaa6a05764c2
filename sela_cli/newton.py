"""The label solve by damped Newton steps: the same optimum as Sinkhorn's in far fewer reads.

K columns (clusters) of the score matrix.

The semi-dual F of `sinkhorn` has gradient s - r and Hessian diag(s) - mean_i q_i q_i^T,
q_i the softmax of row i. One read of the matrix gives all of them, at a cost of N K^2,
and a step solves a K x K system. Sources: Levenberg-Marquardt damping (Nocedal and
Wright, ch. 10); raising lambda in steps (Schmitzer 2019).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sela_cli.sinkhorn import (
    SoftSizes,
    Solution,
    Step,
    sinkhorn_step,
    soft_sizes,
)
from sela_cli.tiles import Rows

# Where a cluster has less than this share of its due, the quadratic model says nothing
# about it: Sinkhorn steps bring it back.
_STARVED = 1e-3
# A start with a larger residual is annealed: lambda is raised to its value in steps.
_FAR = 0.1
_ANNEAL = (1 / 64, 1 / 16, 1 / 4)
_ANNEAL_TOL = 0.02
_ANNEAL_ITER = 20
_DAMPING = 1e-3
_LEAST_DAMPING, _MOST_DAMPING = 1e-9, 1.0
# Largest change of a potential in a step, beyond twice what Sinkhorn would change it by.
_LONGEST = 3.0


def solve(
    rows: Rows,
    marginal_K: Tensor,
    lamb: float,
    tol: float,
    max_iter: int,
    init_K: Tensor | None = None,
    progress: Callable[[Step], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
) -> Solution:
    """Damped Newton on the semi-dual; arguments and result as those of `sinkhorn.solve`.

    From a far start, problems of smaller lambda are solved loosely first, each from the
    one before. A step that does not lower F is taken back and damped more. The trace
    holds the reads at `lamb`; its iteration numbers count all of them.
    """
    a_K = torch.zeros_like(marginal_K) if init_K is None else init_K.clone()
    sizes = soft_sizes(rows, lamb, a_K, overlap=True)
    done = 1
    if sizes.residual(marginal_K) > _FAR:
        a_K = torch.zeros_like(marginal_K)
        for share in _ANNEAL:
            first = soft_sizes(rows, share * lamb, a_K, overlap=True)
            loose = _descend(
                rows, marginal_K, share * lamb, _ANNEAL_TOL, _ANNEAL_ITER, a_K, first, stop=stop
            )
            done += len(loose.trace)
            # Prices a / lambda carry over from one lambda to the next.
            a_K = loose.potentials_K * 4
        sizes = soft_sizes(rows, lamb, a_K, overlap=True)
        done += 1
    return _descend(rows, marginal_K, lamb, tol, max_iter, a_K, sizes, done, progress, stop)


def _descend(
    rows: Rows,
    marginal_K: Tensor,
    lamb: float,
    tol: float,
    max_iter: int,
    a_K: Tensor,
    sizes: SoftSizes,
    done: int = 1,
    progress: Callable[[Step], None] = lambda step: None,
    stop: Callable[[], bool] = lambda: False,
) -> Solution:
    """Newton steps from a_K, where the matrix has been read already: `sizes`."""
    trace: list[Step] = []
    start = time.monotonic()
    damping = _DAMPING
    best_K, best, best_objective, promised = a_K, sizes, float("inf"), 0.0
    while True:
        objective = sizes.mean_logsumexp - float(marginal_K @ a_K)
        # Rounding of F must not look like a rise.
        if objective <= best_objective + 1e-4 * promised + 1e-12 * abs(objective):
            best_K, best, best_objective = a_K, sizes, objective
            damping = max(damping / 10, _LEAST_DAMPING)
        else:
            damping *= 10
        residual = best.residual(marginal_K)
        trace.append(Step(done, residual, best_objective, time.monotonic() - start))
        progress(trace[-1])
        if residual <= tol or done >= max_iter or stop():
            return Solution(best_K - best_K.mean(), residual, residual <= tol, trace)
        starved = float((best.log_s_K.exp() / marginal_K).min()) < _STARVED
        change_K = None
        while not starved and damping <= _MOST_DAMPING and change_K is None:
            change_K = _newton_change(marginal_K, best.log_s_K, best.overlap_KK, damping)
            if change_K is None:
                damping = max(damping * 10, 1e-6)
        if change_K is None:
            a_K, promised, damping = sinkhorn_step(best_K, marginal_K, best), 0.0, _DAMPING
        else:
            a_K = best_K + change_K
            promised = float((best.log_s_K.exp() - marginal_K) @ change_K)
        sizes = soft_sizes(rows, lamb, a_K, overlap=True)
        done += 1


def _newton_change(
    marginal_K: Tensor, log_s_K: Tensor, overlap_KK: Tensor | None, damping: float
) -> Tensor | None:
    """The damped, bounded step of mean zero; None where the system is not positive definite."""
    assert overlap_KK is not None
    s_K = log_s_K.exp()
    hessian_KK = torch.diag(s_K * (1 + damping)) - overlap_KK
    # F does not change along (1, ..., 1): this makes the system regular there.
    hessian_KK += 1 / len(s_K) ** 2
    factor_KK, failed = torch.linalg.cholesky_ex(hessian_KK)
    if failed:
        return None
    change_K = torch.cholesky_solve((marginal_K - s_K)[:, None], factor_KK)[:, 0]
    bound_K = _LONGEST + 2 * (marginal_K.log() - log_s_K).abs()
    change_K = change_K.clamp(-bound_K, bound_K)
    return change_K - change_K.mean()
