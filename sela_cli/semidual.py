"""The label solve's objective: entropic optimal transport of N rows to K clusters.

N rows (images), K columns (clusters), n rows of one tile.

With log-probabilities logp_NK, marginal r_K and lambda, the K potentials a minimise the
convex F(a) = mean_i logsumexp_k(lambda logp_ik + a_k) - sum_k r_k a_k, whose gradient is
s(a) - r with s_k = mean_i q_ik, q_i = softmax_k(lambda logp_i + a), and whose Hessian is
diag(s) - mean_i q_i q_i^T. The transport plan is Q_ik = q_ik / N. One read of the matrix
gives s. Sources: SeLa (Asano, Rupprecht, Vedaldi, ICLR 2020) eq. 5-6; Cuturi 2013;
Genevay 2016.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from sela_cli import parallel
from sela_cli.tiles import Rows, evenly, map_spans

# Below this a mean of softmax entries may have lost terms to underflow.
_UNDERFLOW = {torch.float32: 1e-30, torch.float64: 1e-250}
# Smaller entries of a row's plan are left out of a sparse Hessian.
NEGLIGIBLE = 1e-4
# Blocks of columns that a dense product is made of, and the columns of one at least.
_GRAM_BLOCKS, _GRAM_LEAST = 4, 128
# Rows that the breadth of the plan, and its rounding, are taken from.
_SOME = 512
# From this many entries on, float32 is used for as long as it can tell.
_LARGE = 1 << 20
# A residual of so many times the rounding is not spoilt by it.
_CLEAR = 16
# A step is taken back where the slope at its end is still this share of the first, upwards.
_WOLFE = 0.5


def _has_fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16; elsewhere torch emulates it slowly."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


FAST_BFLOAT16 = _has_fast_bfloat16()


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
    the Hessian, where it was asked for."""

    a_K: Tensor
    log_s_K: Tensor
    hessian_KK: Tensor | None = None

    @property
    def s_K(self) -> Tensor:
        """Soft sizes."""
        return self.log_s_K.exp()


class Problem:
    """A matrix, the wanted marginal, and the account of the reads that a solve makes.

    `marginal_K`: positive, sums to 1, float64. `progress` hears of every read, `stop` is
    asked after each. In a job of several processes each has a share of the rows, and all
    see the same sums.
    """

    def __init__(
        self,
        rows: Rows,
        marginal_K: Tensor,
        lamb: float,
        tol: float,
        max_iter: int,
        progress: Callable[[Step], None] = lambda step: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rows, self.marginal_K, self.lamb = rows, marginal_K, lamb
        self.tol, self.max_iter = tol, max_iter
        self._progress, self._stop = progress, stop
        self.count = total(rows)
        large = self.count * rows.shape[1] >= _LARGE
        self.dtype = torch.float32 if large else torch.float64
        self.trace: list[Step] = []
        self._start = time.monotonic()

    def at(self, rows: Rows, lamb: float, tol: float, reads: int | None = None) -> Problem:
        """The same problem of other rows, another lambda, another tolerance.

        Its reads count here if the rows are these, unless it has `reads` of its own.
        """
        most = self.max_iter if reads is None else reads
        other = Problem(rows, self.marginal_K, lamb, tol, most, stop=self._stop)
        if rows is self.rows and reads is None:
            other.trace, other._start, other._progress = self.trace, self._start, self._progress
        return other

    def read(self, a_K: Tensor, curved: bool = False) -> Point:
        """One read of the matrix at potentials `a_K`, `curved` with the Hessian.

        Large matrices are read in float32 until its rounding shows in the residual, from
        then on in float64, in which a residual within the tolerance is looked at again.
        """
        point = self._read(a_K - a_K.mean(), curved)
        if self.dtype == torch.float32:
            # The relative error of a plan entry near the top of its row: a sum of two
            # numbers that may both be as large as the range of the potentials.
            noise = 2.0**-24 * (4 * float(point.a_K.abs().max()) + 64)
            close = noise > self.tol / 4 and self.residual(point) <= max(self.tol, noise)
            # That is the worst case, so look.
            seen = self._rounding(point.a_K) if close else 0.0
            if seen > self.tol / 4 and self.residual(point) <= max(self.tol, _CLEAR * seen):
                self.dtype = torch.float64
                if self.residual(point) <= self.tol:
                    point = self._read(point.a_K, curved)
        return point

    def _rounding(self, a_K: Tensor) -> float:
        """How much of the mass of some rows, evenly spread, float32 puts elsewhere.

        More than of all rows, where errors of different rows cancel.
        """
        some = evenly(self.rows, _SOME)
        coarse_nK, fine_nK = (
            _plan(some.tile(0, _SOME, dtype), self.lamb, a_K).double()
            for dtype in (torch.float32, torch.float64)
        )
        return 0.5 * float(parallel.mean_of((coarse_nK - fine_nK).cpu()).abs().sum())

    def _read(self, a_K: Tensor, curved: bool) -> Point:
        point = soft_sizes(self.rows, self.lamb, a_K, self.dtype, curved)
        seconds = time.monotonic() - self._start
        self.trace.append(Step(len(self.trace) + 1, self.residual(point), seconds))
        self._progress(self.trace[-1])
        return point

    def move(self, point: Point, change_K: Tensor, curved: bool = False) -> Point:
        """The point that a step along `change_K` leads to, shortened where F would rise.

        F is convex: it has not risen where it still slopes down. A step that halves the
        residual is as good. Returns `point` itself where the reads are over first.
        """
        slope = float(self.gradient(point) @ change_K)
        if slope >= 0:
            return self.read(self.sinkhorn(point), curved)
        length = 1.0
        while True:
            reached = self.read(point.a_K + length * change_K, curved)
            end = float(self.gradient(reached) @ change_K)
            if end <= -_WOLFE * slope or self.residual(reached) < self.residual(point) / 2:
                return reached
            if self.over():
                return point
            length *= min(max(slope / (slope - end), 0.1), 0.9)

    def sinkhorn(self, point: Point) -> Tensor:
        """Potentials after Sinkhorn's step, a + log r - log s: never raises F."""
        return point.a_K + self.marginal_K.log() - point.log_s_K

    def gradient(self, point: Point) -> Tensor:
        """s - r."""
        return point.s_K - self.marginal_K

    def residual(self, point: Point) -> float:
        """0.5 sum_k |s_k - r_k|, the total variation between the label marginals."""
        return 0.5 * float(self.gradient(point).abs().sum())

    def starved(self, point: Point, share: float) -> bool:
        """Whether some cluster has less than a share of its due."""
        return float((point.s_K / self.marginal_K).min()) < share

    def over(self) -> bool:
        """Whether no more reads are to be made."""
        return len(self.trace) >= self.max_iter or parallel.any_of(self._stop())

    def solution(self, point: Point) -> Solution:
        """The result of a solve that ends at `point`."""
        residual = self.residual(point)
        return Solution(point.a_K, residual, residual <= self.tol, self.trace)


def total(rows: Rows) -> int:
    """Rows of all processes together."""
    return int(parallel.sum_of(torch.tensor(rows.shape[0])))


def soft_sizes(
    rows: Rows,
    lamb: float,
    a_K: Tensor,
    dtype: torch.dtype = torch.float64,
    curved: bool = False,
) -> Point:
    """log s_K(a), in one read of the matrix.

    A cluster that no row wants has an s below the smallest number; its logarithm is then
    taken in the log domain in a second read, so that it is finite for finite scores and
    the cluster can recover. `curved`: with the Hessian (`laplacian`, sparse) of the same read.
    """
    clusters = rows.shape[1]
    kernel = None if curved else _kernel(rows.device)

    def work(tiles: Iterator[tuple[int, Tensor]]) -> tuple[Tensor, csr_array | None]:
        s_K, kept = torch.zeros_like(a_K, device=rows.device), _Entries(clusters)
        for _, tile_nK in tiles:
            if kernel:
                s_K += kernel(tile_nK, lamb, a_K, dtype)
                continue
            q_nK = _plan(tile_nK, lamb, a_K)
            s_K += q_nK.sum(0).to(s_K)
            if curved:
                kept.add(q_nK.numpy())
        return s_K.cpu(), kept.overlap() if curved else None

    sums_K = torch.zeros_like(a_K)
    overlap_KK = np.zeros((clusters, clusters) if curved else 0)
    for part_K, part_KK in map_spans(rows, work, None if kernel else dtype, square=curved):
        sums_K += part_K
        if part_KK is not None:
            # By the row: all at once would take copies of what may be K^2 entries.
            for row, (first, end) in enumerate(pairwise(part_KK.indptr)):
                overlap_KK[row, part_KK.indices[first:end]] += part_KK.data[first:end]
    # The number of rows goes along: one exchange between processes a read.
    sums = parallel.sum_of(torch.cat([sums_K, sums_K.new_tensor([rows.shape[0]])]))
    s_K = sums[:-1] / sums[-1]
    log_s_K = s_K.log()
    dead = (s_K < _UNDERFLOW[dtype]).nonzero()[:, 0]
    if len(dead):
        log_s_K[dead] = _log_sizes(rows, lamb, a_K, dead)
    hessian_KK = None
    if curved:
        hessian_KK = _of_overlap(torch.from_numpy(overlap_KK), int(sums[-1]))
    return Point(a_K, log_s_K, hessian_KK)


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


def _plan(tile_nK: Tensor, lamb: float, a_K: Tensor) -> Tensor:
    """softmax_k(lambda score_ik + a_k) of a tile."""
    return torch.softmax(torch.add(a_K.to(tile_nK), tile_nK, alpha=lamb), 1)


def _log_sizes(rows: Rows, lamb: float, a_K: Tensor, columns: Tensor) -> Tensor:
    def work(tiles: Iterator[tuple[int, Tensor]]) -> Tensor:
        logs = torch.full((len(columns),), -torch.inf, dtype=a_K.dtype, device=rows.device)
        for _, tile_nK in tiles:
            z_nK = torch.add(a_K.to(tile_nK), tile_nK, alpha=lamb)
            log_q = z_nK[:, columns] - torch.logsumexp(z_nK, 1, keepdim=True)
            logs = torch.logaddexp(logs, torch.logsumexp(log_q, 0))
        return logs.cpu()

    logs = torch.stack(list(map_spans(rows, work)))
    return parallel.logsumexp_of(torch.logsumexp(logs, 0)) - math.log(total(rows))


def laplacian(rows: Rows, lamb: float, a_K: Tensor, sparse: bool) -> Tensor:
    """The Hessian of F over `rows`, (K, K) float64, from products in float32, or in
    bfloat16 where that is faster: it only decides the direction of a step.

    Its rows sum to zero, so the diagonal is taken from the rest of each row: s_k less
    the mean of q_ik^2 would cancel where rows are all but decided. `sparse` leaves out
    entries q_ik below `NEGLIGIBLE`; what is left is still positive semidefinite.
    """
    if rows.device.type != "cpu":
        return _laplacian_on_device(rows, lamb, a_K)
    if sparse:
        hessian_KK = soft_sizes(rows, lamb, a_K, torch.float32, curved=True).hessian_KK
        assert hessian_KK is not None
        return hessian_KK
    clusters = rows.shape[1]
    overlap_KK = torch.zeros(clusters, clusters, dtype=torch.float64)

    def gram(tiles: Iterator[tuple[int, Tensor]]) -> Tensor:
        q_nK = torch.cat([_plan(tile_nK, lamb, a_K) for _, tile_nK in tiles])
        return _upper_gram(q_nK.bfloat16() if FAST_BFLOAT16 else q_nK)

    for part_KK in map_spans(rows, gram, torch.float32):
        overlap_KK += part_KK
    overlap_KK = overlap_KK.triu() + overlap_KK.triu(1).T
    return _of_overlap(overlap_KK, total(rows))


def _of_overlap(overlap_KK: Tensor, count: int) -> Tensor:
    """The Hessian from the sum of q_i q_i^T over this process's rows; `count`: of all."""
    parallel.sum_of(overlap_KK)
    overlap_KK.fill_diagonal_(0.0).div_(-count)
    return overlap_KK.diagonal_scatter(-overlap_KK.sum(1))


class _Entries:
    """What is not negligible of the plans of a span of rows."""

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters
        self._values: list[np.ndarray] = []
        self._columns: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def add(self, q_nK: np.ndarray) -> None:
        """Those of one tile."""
        flat = q_nK.ravel()
        kept = np.flatnonzero(flat > NEGLIGIBLE)
        row, column = np.divmod(kept, self.clusters)
        self._values.append(flat[kept].astype(np.float32))
        self._columns.append(column.astype(np.int32))
        self._counts.append(np.bincount(row, minlength=len(q_nK)))

    def overlap(self) -> csr_array:
        """Their q^T q, above and below the diagonal alike."""
        ends = np.concatenate([[0], *self._counts]).cumsum(dtype=np.int32)
        parts = np.concatenate(self._values), np.concatenate(self._columns), ends
        kept = csr_array(parts, (len(ends) - 1, self.clusters))
        # Symmetric: by the column is by the row.
        product = kept.T @ kept
        return csr_array((product.data, product.indices, product.indptr), product.shape)


def _upper_gram(q_nK: Tensor) -> Tensor:
    """q^T q on and above the diagonal, by blocks; below it nothing, which saves a third."""
    clusters = q_nK.shape[1]
    gram_KK = q_nK.new_zeros(clusters, clusters)
    step = max(-(-clusters // _GRAM_BLOCKS), _GRAM_LEAST)
    for start in range(0, clusters, step):
        block_nk = q_nK[:, start : start + step]
        gram_KK[start : start + step, start:] = block_nk.T @ q_nK[:, start:]
    return gram_KK


def _laplacian_on_device(rows: Rows, lamb: float, a_K: Tensor) -> Tensor:
    """The same on a GPU, whose dense products are faster than sparse ones would be."""
    clusters = rows.shape[1]

    def gram(tiles: Iterator[tuple[int, Tensor]]) -> Tensor:
        gram_KK = torch.zeros(clusters, clusters, device=rows.device)
        for _, tile_nK in tiles:
            q_nK = _plan(tile_nK, lamb, a_K).bfloat16()
            gram_KK += q_nK.T @ q_nK
        return gram_KK

    overlap_KK = torch.zeros(clusters, clusters, dtype=torch.float64, device=rows.device)
    for part_KK in map_spans(rows, gram, torch.float32):
        overlap_KK += part_KK
    return _of_overlap(overlap_KK.cpu(), total(rows))


def breadth(rows: Rows, lamb: float, a_K: Tensor) -> float:
    """Root mean square number of clusters with a share of a row that is not negligible.

    Of some rows, evenly spread.
    """
    q_nK = _plan(evenly(rows, _SOME).tile(0, _SOME, torch.float32), lamb, a_K)
    square_n = (q_nK > NEGLIGIBLE).sum(1).double().square()
    return math.sqrt(float(parallel.mean_of(square_n.cpu())))
