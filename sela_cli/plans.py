"""The plans of rows that are nearly decided, kept as sparse rows: soft sizes without a read.

K columns (clusters) of the score matrix, n rows of a block.

With q_i the plan of row i at potentials a, that at a + d is q_ik e^{d_k} / sum_l q_il e^{d_l}:
what the score matrix was read for is in the plan. Entries that are negligible are left
out, so that this holds near a only. What is found in memory is checked, and what was left
out made up for, by the next read (`newton`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csc_array, csr_array, vstack
from torch import Tensor

from sela_cli import parallel
from sela_cli.machine import has_fast_bfloat16
from sela_cli.tiles import CPU, SQUARE_WORKERS, map_in_pool

# Smaller entries are left out of Hessians, and of plans that have many of them.
NEGLIGIBLE = 1e-4
# Numbers that there is room for at first: so many that they lie apart from small ones.
_GROWING = 1 << 16
# Entries of a block for each cluster, at least: adding up its product takes time too.
_BLOCK = 256
# Blocks of columns that a dense product is made of, and the columns of one at least.
_GRAM_BLOCKS, _GRAM_LEAST = 4, 128


class Take(NamedTuple):
    """Which plans are wanted: of every so many of the rows, the entries above `least`."""

    every: int = 1
    least: float = NEGLIGIBLE


# All of the plan, which a problem keeps (see `dense`).
WHOLE = Take(least=0.0)


class Plans:
    """Plans at potentials `a_K`, of rows of all processes: this one's in blocks."""

    def __init__(self, a_K: Tensor, taken: Take, blocks: list[csr_array]) -> None:
        self.taken = taken
        self.a_K, self._blocks = a_K, _merged(blocks, _BLOCK * len(a_K))
        own = sum(block.shape[0] for block in blocks), sum(block.nnz for block in blocks)
        self.rows, self.entries = parallel.sum_of(torch.tensor(own)).tolist()

    def soft_sizes(self, a_K: Tensor) -> Tensor:
        """s_K at other potentials, float64."""
        factor_K = self._factor(a_K)
        sums_K = self._summed(self._blocks, partial(_sums, factor_K=factor_K))
        return sums_K * torch.from_numpy(factor_K) / self.rows

    def laplacian(self, a_K: Tensor, every: int = 1, sparse: bool = True) -> Tensor:
        """The Hessian of F at other potentials, of every so many of the rows; `sparse`: from
        sparse products. (K, K) float64, as that of `semidual.laplacian`."""
        factor_K = self._factor(a_K).astype(np.float32)

        def overlap(block: csr_array) -> tuple[int, Any]:
            part = _moved(block[::every] if every > 1 else block, factor_K)
            if sparse:
                return part.shape[0], part.T @ part
            return part.shape[0], gram(torch.from_numpy(part.toarray()))

        rows, overlap_KK = 0, torch.zeros(len(a_K), len(a_K), dtype=torch.float64)
        for count, part_KK in map_in_pool(overlap, self._blocks, CPU, SQUARE_WORKERS):
            rows += count
            if sparse:
                _add(overlap_KK.numpy(), part_KK)
            else:
                overlap_KK += part_KK
        return hessian_of(overlap_KK, rows)

    def products(self, a_K: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The same Hessian of all of the rows by its products with vectors, and its diagonal:
        in double precision, and without a matrix of K x K."""
        factor_K = self._factor(a_K)
        moved = partial(_moved, factor_K=factor_K)
        parts = list(map_in_pool(moved, self._blocks, CPU, SQUARE_WORKERS))
        # So that the rows of the Hessian sum to zero though entries are left out.
        whole_K = self._summed(parts, lambda part: part.T @ (part @ np.ones_like(factor_K)))
        squares_K = self._summed(parts, _squares)

        def product(x_K: Tensor) -> Tensor:
            moved_K = self._summed(parts, lambda part: part.T @ (part @ x_K.numpy()))
            return (whole_K * x_K - moved_K) / self.rows

        return product, (whole_K - squares_K) / self.rows

    def _summed(self, parts: list[csr_array], work: Callable[[csr_array], np.ndarray]) -> Tensor:
        """Over the rows of all processes."""
        sums_K = np.zeros(len(self.a_K))
        for part_K in map_in_pool(work, parts, CPU):
            sums_K += part_K
        return parallel.sum_of(torch.from_numpy(sums_K))

    def _factor(self, a_K: Tensor) -> np.ndarray:
        factor_K: np.ndarray = (a_K - self.a_K).exp().numpy()
        return factor_K


class Entries:
    """Plans of some rows, tile by tile."""

    def __init__(self, clusters: int) -> None:
        self._clusters = clusters
        # Sparse products of double precision with single would copy all entries each time.
        self._values = _Growing(np.float64)
        self._columns, self._counts = _Growing(np.int32), _Growing(np.int32)
        # Kept from tile to tile: memory that is new costs as much as to compare.
        self._above = np.empty(0, bool)

    def add(self, q_nK: np.ndarray, least: float) -> None:
        """Those of one tile."""
        flat = q_nK.ravel()
        if len(self._above) < len(flat):
            self._above = np.empty(len(flat), bool)
        found = np.flatnonzero(np.greater(flat, least, out=self._above[: len(flat)]))
        self._values.add(flat[found])
        # In 32 bits NumPy divides many at a time.
        short = found.astype(np.int32)
        row = short // self._clusters
        self._columns.add(short - row * self._clusters)
        self._counts.add(np.bincount(row, minlength=len(q_nK)))

    def block(self) -> csr_array:
        """All of them."""
        ends = np.concatenate([[0], self._counts.all()]).cumsum(dtype=np.int32)
        parts = self._values.all(), self._columns.all(), ends
        return csr_array(parts, (len(ends) - 1, self._clusters))


class _Growing:
    """Numbers that come piece by piece. Pieces kept each for itself would lie between the
    tiles that are freed, so that those never fit where others were."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._array, self._used = np.empty(0, dtype), 0

    def add(self, piece: np.ndarray) -> None:
        end = self._used + len(piece)
        if end > len(self._array):
            self._array.resize(max(end, 2 * len(self._array), _GROWING), refcheck=False)
        self._array[self._used : end] = piece
        self._used = end

    def all(self) -> np.ndarray:
        self._array.resize(self._used, refcheck=False)
        return self._array


def _add(sum_KK: np.ndarray, product: csc_array) -> None:
    """By the row: all at once would take copies of what may be K^2 entries."""
    # Symmetric: by the column is by the row.
    for row, (first, end) in enumerate(pairwise(product.indptr)):
        sum_KK[row, product.indices[first:end]] += product.data[first:end]


def _merged(blocks: list[csr_array], least: int) -> list[csr_array]:
    """The same rows in blocks of so many entries."""
    merged: list[csr_array] = []
    waiting: list[csr_array] = []
    for number, block in enumerate(blocks):
        waiting.append(block)
        if sum(part.nnz for part in waiting) >= least or number == len(blocks) - 1:
            merged.append(vstack(waiting, format="csr") if len(waiting) > 1 else block)
            waiting = []
    return merged


def _sums(block: csr_array, factor_K: np.ndarray) -> np.ndarray:
    """sum_i q_ik / sum_l q_il e^{d_l}: the soft sizes, but for e^{d_k} and the count."""
    sums_K: np.ndarray = block.T @ (1 / (block @ factor_K))
    return sums_K


def _moved(block: csr_array, factor_K: np.ndarray) -> csr_array:
    """The plans where the potentials have changed, without negligible entries, as numbers of
    the factors' kind."""
    # Torch's leaves other threads the interpreter's lock.
    chosen = torch.index_select(torch.from_numpy(factor_K), 0, torch.from_numpy(block.indices))
    values = chosen.numpy()
    values *= block.data
    values *= np.repeat(1 / (block @ factor_K), np.diff(block.indptr))
    # A third of the time that scipy takes to eliminate zeros.
    kept = np.flatnonzero(values > NEGLIGIBLE)
    ends = np.searchsorted(kept, block.indptr).astype(block.indptr.dtype)
    return csr_array((values[kept], block.indices[kept], ends), block.shape)


def _squares(part: csr_array) -> np.ndarray:
    """sum_i q_ik^2."""
    sums_K: np.ndarray = np.bincount(part.indices, part.data**2, minlength=part.shape[1])
    return sums_K


def gram(q_nK: Tensor) -> Tensor:
    """q^T q by blocks, those below the diagonal as those above, which saves a third.

    In bfloat16 where the processor is made for it: a Hessian only says where to go.
    """
    q_nK = q_nK.bfloat16() if has_fast_bfloat16() else q_nK
    clusters = q_nK.shape[1]
    gram_KK = q_nK.new_zeros(clusters, clusters)
    step = max(-(-clusters // _GRAM_BLOCKS), _GRAM_LEAST)
    for start in range(0, clusters, step):
        end = start + step
        block_kK = q_nK[:, start:end].T @ q_nK[:, start:]
        # Rounding of the two halves differs, and what is not symmetric may have no factor.
        block_kk = block_kK[:, :step]
        block_kk.copy_(block_kk.triu() + block_kk.triu(1).T)
        gram_KK[start:end, start:] = block_kK
        gram_KK[start:, start:end] = block_kK.T
    return gram_KK


def hessian_of(overlap_KK: Tensor, rows: int) -> Tensor:
    """The Hessian from the sum of q_i q_i^T over this process's rows, in the same place.

    Its rows sum to zero, so the diagonal is taken from the rest of each row: s_k less the
    mean of q_ik^2 would cancel where rows are all but decided.
    """
    parallel.sum_of(overlap_KK)
    count = int(parallel.sum_of(torch.tensor(rows)))
    overlap_KK.fill_diagonal_(0.0).div_(-count)
    overlap_KK.diagonal().copy_(-overlap_KK.sum(1))
    return overlap_KK
