"""The label solve: entropic optimal transport of N rows to K clusters, in its semi-dual.

N rows (images), K columns (clusters), n rows of one tile.

With log-probabilities logp_NK, marginal r_K and lambda, the K potentials a minimise the
convex F(a) = mean_i logsumexp_k(lambda logp_ik + a_k) - sum_k r_k a_k, whose gradient is
s(a) - r with s_k = mean_i softmax_k(lambda logp_i + a). The transport plan is then
Q_ik = softmax_k(lambda logp_i + a) / N. One read of the matrix gives F and s.
Sources: SeLa (Asano, Rupprecht, Vedaldi, ICLR 2020) eq. 5-6; Cuturi 2013; Genevay 2016.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sela_cli.tiles import Rows, map_spans

# Below this a mean of float64 softmax entries may have lost terms to underflow.
_UNDERFLOW = 1e-250


class Step(NamedTuple):
    """Where an iteration stands; the objective is F less a constant of the scores."""

    iteration: int
    residual: float
    objective: float
    seconds: float


class Solution(NamedTuple):
    """What `solve` found: potentials of mean zero, and whether to trust them."""

    potentials_K: Tensor
    residual: float
    converged: bool
    trace: list[Step]


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
    """Sinkhorn-Knopp in the log domain: a <- a + log r - log s(a).

    `marginal_K`: positive, sums to 1, float64. `init_K`: potentials to start from, else
    zeros. Ends when the residual, 0.5 sum_k |s_k - r_k|, is at most `tol`, after
    `max_iter` reads of the matrix, or when `stop()` holds. Never raises for want of
    convergence: see `Solution.converged`.
    """
    a_K = torch.zeros_like(marginal_K) if init_K is None else init_K.clone()
    trace: list[Step] = []
    start = time.monotonic()
    while True:
        sizes = soft_sizes(rows, lamb, a_K)
        residual = sizes.residual(marginal_K)
        objective = sizes.mean_logsumexp - float(marginal_K @ a_K)
        trace.append(Step(len(trace) + 1, residual, objective, time.monotonic() - start))
        progress(trace[-1])
        if residual <= tol or len(trace) >= max_iter or stop():
            return Solution(a_K, residual, residual <= tol, trace)
        a_K = sinkhorn_step(a_K, marginal_K, sizes)


class SoftSizes(NamedTuple):
    """What one read of the matrix gives at potentials a."""

    log_s_K: Tensor
    mean_logsumexp: float
    overlap_KK: Tensor | None

    def residual(self, marginal_K: Tensor) -> float:
        """0.5 sum_k |s_k - r_k|."""
        return 0.5 * float((self.log_s_K.exp() - marginal_K).abs().sum())


def sinkhorn_step(a_K: Tensor, marginal_K: Tensor, sizes: SoftSizes) -> Tensor:
    """a + log r - log s, of mean zero: never raises F."""
    a_K = a_K + marginal_K.log() - sizes.log_s_K
    return a_K - a_K.mean()


def soft_sizes(rows: Rows, lamb: float, a_K: Tensor, overlap: bool = False) -> SoftSizes:
    """log s_K(a), and mean_i logsumexp_k(lambda (score_ik - max score_i) + a_k), in one read.

    With `overlap` also mean_i q_i q_i^T (K, K), q_i the softmax of row i, of float32 products.

    A cluster that no row wants has an s below the smallest float64; its logarithm is then
    taken in the log domain in a second read, so that it is finite for finite scores and
    the cluster can recover.
    """
    count, clusters = rows.shape

    def work(tiles: Iterator[tuple[int, Tensor]]) -> tuple[Tensor, float, Tensor | None]:
        s_K = torch.zeros_like(a_K)
        total = 0.0
        overlap_KK = torch.zeros(clusters, clusters) if overlap else None
        for _, tile_nK in tiles:
            z_nK = _scaled(tile_nK, lamb, a_K)
            top_n = z_nK.amax(1)
            q_nK = z_nK.sub_(top_n[:, None]).exp_()
            sum_n = q_nK.sum(1)
            total += float((top_n + sum_n.log()).sum())
            if overlap_KK is None:
                s_K += sum_n.reciprocal() @ q_nK
            else:
                q_nK.div_(sum_n[:, None])
                s_K += q_nK.sum(0)
                single_nK = q_nK.float()
                overlap_KK.addmm_(single_nK.T, single_nK)
        return s_K, total, overlap_KK

    s_K, total = torch.zeros_like(a_K), 0.0
    overlap_KK = torch.zeros(clusters, clusters, dtype=a_K.dtype) if overlap else None
    for part_K, part_total, part_KK in map_spans(rows, work):
        s_K += part_K
        total += part_total
        if overlap_KK is not None and part_KK is not None:
            overlap_KK += part_KK
    log_s_K = (s_K / count).log()
    dead = (s_K / count < _UNDERFLOW).nonzero()[:, 0]
    if len(dead):
        log_s_K[dead] = _log_sizes(rows, lamb, a_K, dead)
    if overlap_KK is not None:
        overlap_KK /= count
    return SoftSizes(log_s_K, total / count, overlap_KK)


def _log_sizes(rows: Rows, lamb: float, a_K: Tensor, columns: Tensor) -> Tensor:
    def work(tiles: Iterator[tuple[int, Tensor]]) -> Tensor:
        logs = torch.full((len(columns),), -torch.inf, dtype=a_K.dtype)
        for _, tile_nK in tiles:
            z_nK = _scaled(tile_nK, lamb, a_K)
            log_q = z_nK[:, columns] - torch.logsumexp(z_nK, 1, keepdim=True)
            logs = torch.logaddexp(logs, torch.logsumexp(log_q, 0))
        return logs

    return torch.logsumexp(torch.stack(list(map_spans(rows, work))), 0) - math.log(rows.shape[0])


def _scaled(tile_nK: Tensor, lamb: float, a_K: Tensor) -> Tensor:
    """lambda (score - row maximum) + a; the shift keeps huge logits exact."""
    return (tile_nK - tile_nK.amax(1, keepdim=True)).mul_(lamb).add_(a_K)
