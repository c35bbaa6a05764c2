"""The label solve's objective: entropic optimal transport of N rows to K clusters.

N rows (images), K columns (clusters), n rows of one tile.

With log-probabilities logp_NK, marginal r_K and lambda, the K potentials a minimise the
convex F(a) = mean_i logsumexp_k(lambda logp_ik + a_k) - sum_k r_k a_k, whose gradient is
s(a) - r with s_k = mean_i q_ik, q_i = softmax_k(lambda logp_i + a), and whose Hessian is
diag(s) - mean_i q_i q_i^T. Where shares are only bounded, r depends on a (see `marginals`).
The transport plan is Q_ik = q_ik / N. One read of the matrix gives s. Sources: SeLa (Asano,
Rupprecht, Vedaldi, ICLR 2020) eq. 5-6; Cuturi 2013; Genevay 2016.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from sela_cli import parallel
from sela_cli.dense import DensePlan
from sela_cli.marginals import Given, Marginal
from sela_cli.plans import WHOLE, Entries, Plans, Take, gram, hessian_of
from sela_cli.spread import spread
from sela_cli.tiles import (
    SQUARE_WORKERS,
    Rows,
    evenly,
    finite,
    finite_like,
    map_in_pool,
    map_spans,
    softmax,
)

# Below this a mean of softmax entries may have lost terms to underflow.
_UNDERFLOW = {torch.float32: 1e-30, torch.float64: 1e-250}
# Rows that the breadth of the plan, and its rounding, are taken from.
_SOME, _ROUNDED = 512, 2048
# From this many entries on, and for such tolerances, float32 is used for as long as it can tell.
_LARGE, _COARSE = 1 << 20, 5e-3
# A residual of so many times the rounding is not spoilt by it.
_CLEAR = 4
# A step is taken back where the slope at its end is still this share of the first, upwards.
_WOLFE = 0.5


class Step(NamedTuple):
    """Where an iteration stands. `iteration` counts reads of the whole matrix."""

    iteration: int
    residual: float
    seconds: float


class Solution(NamedTuple):
    """What a solver found: potentials of mean zero, and whether to trust them."""

    potentials_K: Tensor
    residual: float
    converged: bool
    trace: list[Step]


class Point(NamedTuple):
    """Potentials, and the logarithms of the soft sizes there, both float64 on the CPU; and
    plans, where they were asked for."""

    a_K: Tensor
    log_s_K: Tensor
    plans: Plans | None = None

    @property
    def s_K(self) -> Tensor:
        """Soft sizes."""
        return self.log_s_K.exp()


class Problem:
    """A matrix, the wanted marginal, and the account of the reads that a solve makes.

    `marginal`: given shares, positive, which sum to 1, float64, or what `marginals` has
    beside these. `progress` hears of every read, `stop` is asked after each. `memory`: bytes
    that may be kept of plans; `square`: whether matrices of K x K may be made. In a job of
    several processes each has a share of the rows, and all see the same sums.
    """

    def __init__(
        self,
        rows: Rows,
        marginal: Tensor | Marginal,
        lamb: float,
        tol: float,
        max_iter: int,
        progress: Callable[[Step], None] = lambda step: None,
        stop: Callable[[], bool] = lambda: False,
        memory: int = 1 << 30,
        square: bool = True,
    ) -> None:
        self.rows, self.lamb = rows, lamb
        self.marginal = Given(marginal) if isinstance(marginal, Tensor) else marginal
        self.tol, self.max_iter = tol, max_iter
        self._progress, self.stop = progress, stop
        self.memory, self.square = memory, square
        self.count = total(rows)
        large = self.count * rows.shape[1] >= _LARGE or tol >= _COARSE
        self.dtype = torch.float32 if large else torch.float64
        self._rounded: tuple[float, float] | None = None
        self._dense: DensePlan | None = None
        self.trace: list[Step] = []
        self._start = time.monotonic()

    def at(self, rows: Rows, lamb: float, tol: float, reads: int | None = None) -> Problem:
        """The same problem of other rows, another lambda, another tolerance.

        Its reads count here if the rows are these, unless it has `reads` of its own.
        """
        most = self.max_iter if reads is None else reads
        other = Problem(
            rows,
            self.marginal,
            lamb,
            tol,
            most,
            stop=self.stop,
            memory=self.memory,
            square=self.square,
        )
        if rows is self.rows and reads is None:
            other.trace, other._start, other._progress = self.trace, self._start, self._progress
        return other

    @property
    def whole(self) -> Take | None:
        """Plans to ask for where all of them fit: later reads are products then."""
        values = self.count * self.rows.shape[1] / parallel.size()
        fits = values * self.dtype.itemsize <= self.memory
        return WHOLE if fits and self.rows.device.type == "cpu" else None

    def zeros(self) -> Tensor:
        """Potentials to start from where there are none."""
        return torch.zeros(self.rows.shape[1], dtype=torch.float64)

    def read(self, a_K: Tensor, take: Take | None = None) -> Point:
        """One read of the matrix at potentials `a_K`, and plans with it; or, of the `whole`
        plan, what a read would give.

        Large matrices are read in float32 until its rounding shows in the residual, from
        then on in float64, in which a residual within the tolerance is looked at again.
        """
        point = self._read(a_K - a_K.mean(), take)
        if self.dtype == torch.float32:
            # The relative error of a plan entry near the top of its row: a sum of two
            # numbers that may both be as large as the range of the potentials.
            noise = 2.0**-24 * (4 * float(point.a_K.abs().max()) + 64)
            close = noise > self.tol / 4 and self.residual(point) <= max(self.tol, noise)
            # That is the worst case, so look: once, as plans hardly change from here on.
            if close and self._rounded is None:
                self._rounded = self._rounding(point.a_K)
            moved, off = self._rounded or (0.0, 0.0)
            fine = moved <= self.tol / 4
            if self.residual(point) > self.tol:
                if not fine and self.residual(point) <= _CLEAR * moved:
                    self.dtype = torch.float64
            elif not (self._dense and fine):
                if off <= self.tol / 4:
                    # What was read is what these give.
                    return point._replace(a_K=_single(point.a_K))
                self.dtype = torch.float64
                point = self._read(point.a_K, take)
        return point

    def _rounding(self, a_K: Tensor) -> tuple[float, float]:
        """How much of the mass of some rows, evenly spread, is elsewhere when they are read in
        float32: than at these potentials, and than at those next to them that it holds exactly.

        More than of all rows, where errors of different rows cancel.
        """
        single, double = torch.float32, torch.float64

        def coarse(rows_n: np.ndarray) -> Tensor:
            if self._dense:
                return self._dense.sums_of(rows_n, a_K)
            return _plan(self.rows.take(rows_n, single), self.lamb, a_K).sum(0, dtype=double)

        def off(rows_n: np.ndarray) -> Tensor:
            coarse_K = coarse(rows_n)
            fine_nK = _plan(self.rows.take(rows_n, double), self.lamb, a_K)
            # The potentials next to these change entries by factors.
            factors_K = (_single(a_K) - a_K).exp().to(fine_nK)
            next_K = factors_K * (1 / (fine_nK @ factors_K) @ fine_nK)
            return torch.stack([coarse_K - fine_nK.sum(0), coarse_K - next_K]).cpu()

        rows_n = spread(self.rows.shape[0], _ROUNDED)
        parts = [rows_n[at : at + _SOME] for at in range(0, len(rows_n), _SOME)]
        off_2K = sum(map_in_pool(off, parts, self.rows.device), torch.zeros(2, len(a_K)).double())
        parallel.sum_of(off_2K)
        count = int(parallel.sum_of(torch.tensor(len(rows_n))))
        moved, left = (off_2K.abs().sum(1) / (2 * count)).tolist()
        return moved, left

    def _read(self, a_K: Tensor, take: Take | None) -> Point:
        point = self._soft_sizes(a_K, take)
        seconds = time.monotonic() - self._start
        self.trace.append(Step(len(self.trace) + 1, self.residual(point), seconds))
        self._progress(self.trace[-1])
        return point

    def _soft_sizes(self, a_K: Tensor, take: Take | None) -> Point:
        if take == WHOLE:
            # In double precision it may not fit.
            take = self.whole
        if take != WHOLE:
            # It is that of the last read, or none: two kinds of plans need not fit.
            self._dense = None
            return soft_sizes(self.rows, self.lamb, a_K, self.dtype, take)
        if not (self._dense and self._dense.dtype == self.dtype and self._dense.near(a_K)):
            self._dense = None
            self._dense = DensePlan(self.rows, self.lamb, a_K, self.dtype)
        s_K = _means(self._dense.sums(a_K), self.rows)
        if (s_K < _UNDERFLOW[self.dtype]).any():
            return soft_sizes(self.rows, self.lamb, a_K, self.dtype)
        return Point(a_K, s_K.log())

    def move(self, point: Point, change_K: Tensor, take: Take | None = None) -> Point:
        """The point that a step along `change_K` leads to, shortened where F would rise.

        F is convex: it has not risen where it still slopes down. A step that halves the
        residual is as good. Returns `point` itself where the reads are over first.
        """
        slope = float(self.gradient(point) @ change_K)
        if slope >= 0:
            return self.read(self.sinkhorn(point), take)
        length = 1.0
        while True:
            reached = self.read(point.a_K + length * change_K, take)
            end = float(self.gradient(reached) @ change_K)
            if end <= -_WOLFE * slope or self.residual(reached) < self.residual(point) / 2:
                return reached
            if self.over():
                return point
            length *= min(max(slope / (slope - end), 0.1), 0.9)

    def sinkhorn(self, point: Point) -> Tensor:
        """Potentials after Sinkhorn's step, a + log r - log s: never raises F."""
        r_K = self.marginal.scaled_to(point.a_K, point.log_s_K)
        return point.a_K + r_K.log() - point.log_s_K

    def gradient(self, point: Point) -> Tensor:
        """s - r."""
        return point.s_K - self.marginal.at(point.a_K)

    def turn(self, point: Point, reached: Point) -> Tensor:
        """How the gradient has changed from one point to another."""
        risen_K = self.marginal.at(reached.a_K) - self.marginal.at(point.a_K)
        return reached.s_K - point.s_K - risen_K

    def residual(self, point: Point) -> float:
        """0.5 sum_k |s_k - r_k|, the total variation between the label marginals."""
        return 0.5 * float(self.gradient(point).abs().sum())

    def starved(self, point: Point, share: float) -> bool:
        """Whether some cluster has less than a share of its due."""
        return float((point.s_K / self.marginal.at(point.a_K)).min()) < share

    @property
    def left(self) -> int:
        """Reads that may be made."""
        return self.max_iter - len(self.trace)

    def over(self) -> bool:
        """Whether no more reads are to be made."""
        return self.left <= 0 or parallel.any_of(self.stop())

    def solution(self, point: Point) -> Solution:
        """The result of a solve that ends at `point`."""
        residual, self._dense = self.residual(point), None
        return Solution(point.a_K, residual, residual <= self.tol, self.trace)


def total(rows: Rows) -> int:
    """Rows of all processes together."""
    return int(parallel.sum_of(torch.tensor(rows.shape[0])))


def soft_sizes(
    rows: Rows,
    lamb: float,
    a_K: Tensor,
    dtype: torch.dtype = torch.float64,
    take: Take | None = None,
) -> Point:
    """log s_K(a), in one read of the matrix.

    A cluster that no row wants has an s below the smallest number; its logarithm is then
    taken in the log domain in a second read, so that it is finite for finite scores and
    the cluster can recover. `take`: with these plans.
    """
    kernel = None if take else _kernel(rows.device)

    def work(tiles: Iterator[tuple[int, Tensor]]) -> tuple[Tensor, csr_array | None]:
        s_K, entries = torch.zeros_like(a_K, device=rows.device), Entries(rows.shape[1])
        for first, tile_nK in tiles:
            if kernel:
                s_K += kernel(tile_nK, lamb, a_K, dtype)
                continue
            q_nK = _plan(tile_nK, lamb, a_K)
            s_K += q_nK.sum(0).to(s_K)
            if take:
                entries.add(q_nK[-first % take.every :: take.every].numpy(), take.least)
        return s_K.cpu(), entries.block() if take else None

    sums_K, blocks = torch.zeros_like(a_K), []
    for part_K, block in map_spans(rows, work, None if kernel else dtype, square=8 if take else 0):
        sums_K += part_K
        if block is not None:
            blocks.append(block)
    s_K = _means(sums_K, rows)
    log_s_K = s_K.log()
    dead = (s_K < _UNDERFLOW[dtype]).nonzero()[:, 0]
    if len(dead):
        log_s_K[dead] = _log_sizes(rows, lamb, a_K, dead)
    return Point(a_K, log_s_K, Plans(a_K, take, blocks) if take else None)


def _means(sums_K: Tensor, rows: Rows) -> Tensor:
    """Of all processes' rows, from the sums over this one's: one exchange."""
    sums = parallel.sum_of(torch.cat([sums_K, sums_K.new_tensor([rows.shape[0]])]))
    return sums[:-1] / sums[-1]


@cache
def _kernel(device: torch.device) -> Callable[[Tensor, float, Tensor, torch.dtype], Tensor] | None:
    """The pass as one kernel, on a GPU that Triton can make it for."""
    if device.type != "cuda":
        return None
    try:
        from sela_cli.fused import column_sums

        # Besides the GPU it takes a C compiler.
        column_sums(torch.zeros(1, 1, device=device), 1.0, torch.zeros(1), torch.float32)
    except Exception:
        return None
    return column_sums


def _single(a_K: Tensor) -> Tensor:
    """The potentials that a read in float32 is made at, in float64."""
    return finite(a_K, torch.float32).double()


def plan_of_some(rows: Rows, lamb: float, a_K: Tensor, dtype: torch.dtype) -> Tensor:
    """The plan of some rows, evenly spread, (n, K)."""
    return _plan(evenly(rows, _SOME).tile(0, _SOME, dtype), lamb, a_K)


def _plan(tile_nK: Tensor, lamb: float, a_K: Tensor) -> Tensor:
    """softmax_k(lambda score_ik + a_k) of a tile."""
    return softmax(torch.add(finite_like(a_K, tile_nK), tile_nK, alpha=lamb))


def _log_sizes(rows: Rows, lamb: float, a_K: Tensor, columns: Tensor) -> Tensor:
    def work(tiles: Iterator[tuple[int, Tensor]]) -> Tensor:
        logs = torch.full((len(columns),), -torch.inf, dtype=a_K.dtype, device=rows.device)
        for _, tile_nK in tiles:
            z_nK = torch.add(finite_like(a_K, tile_nK), tile_nK, alpha=lamb)
            log_q = z_nK[:, columns] - torch.logsumexp(z_nK, 1, keepdim=True)
            logs = torch.logaddexp(logs, torch.logsumexp(log_q, 0))
        return logs.cpu()

    # A process of a job may have no rows.
    none = torch.full((len(columns),), -torch.inf, dtype=a_K.dtype)
    logs = torch.stack([none, *map_spans(rows, work)])
    return parallel.logsumexp_of(torch.logsumexp(logs, 0)) - math.log(total(rows))


def laplacian(rows: Rows, lamb: float, a_K: Tensor, sparse: bool) -> Tensor:
    """The Hessian of F over `rows`, (K, K) float64 where they are, from products in float32,
    or in bfloat16 where that is faster: it only decides the direction of a step.

    `sparse` leaves out what is negligible; what is left is still positive semidefinite.
    """
    if rows.device.type != "cpu":
        return _laplacian_on_device(rows, lamb, a_K)
    if sparse:
        plans = soft_sizes(rows, lamb, a_K, torch.float32, Take()).plans
        assert plans is not None
        return plans.laplacian(a_K)
    clusters = rows.shape[1]
    overlap_KK = torch.zeros(clusters, clusters, dtype=torch.float64)

    def overlap(tiles: Iterator[tuple[int, Tensor]]) -> Tensor:
        return gram(torch.cat([_plan(tile_nK, lamb, a_K) for _, tile_nK in tiles]))

    for part_KK in map_spans(rows, overlap, torch.float32, square=2, workers=SQUARE_WORKERS):
        overlap_KK += part_KK
    return hessian_of(overlap_KK, rows.shape[0])


def _laplacian_on_device(rows: Rows, lamb: float, a_K: Tensor) -> Tensor:
    """The same on a GPU, whose dense products are faster than sparse ones would be."""
    clusters = rows.shape[1]

    def overlap(tiles: Iterator[tuple[int, Tensor]]) -> Tensor:
        gram_KK = torch.zeros(clusters, clusters, device=rows.device)
        for _, tile_nK in tiles:
            q_nK = _plan(tile_nK, lamb, a_K).bfloat16()
            gram_KK += q_nK.T @ q_nK
        return gram_KK

    overlap_KK = torch.zeros(clusters, clusters, dtype=torch.float64, device=rows.device)
    for part_KK in map_spans(rows, overlap, torch.float32):
        overlap_KK += part_KK
    # The halves may be rounded differently, and what is not symmetric may have no factor.
    return hessian_of((overlap_KK + overlap_KK.T) / 2, rows.shape[0])


def breadth(rows: Rows, lamb: float, a_K: Tensor, least: Sequence[float]) -> list[float]:
    """Root mean square number of clusters with a share of a row that is above each of `least`.

    Of some rows, evenly spread.
    """
    q_nK = plan_of_some(rows, lamb, a_K, torch.float32)
    # Sums of floats: those of truth values take four times as long.
    above_nK = torch.empty_like(q_nK)
    counts = [torch.gt(q_nK, share, out=above_nK).sum(1) for share in least]
    return parallel.mean_of(torch.stack(counts, 1).double().square().cpu()).sqrt().tolist()
