"""The plan at potentials, kept whole: soft sizes nearby from two products, without a read.

N rows (images), K columns (clusters), n rows of one tile.

With q_i the plan of row i at potentials a, that at a + d is q_ik e^{d_k} / sum_l q_il e^{d_l}:
that of sparse rows (see `plans`), but of all entries, so that nothing is left out. It costs a
third of what exponentials do. Source: Sinkhorn with the kernel absorbed (Schmitzer 2019).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sela_cli.tiles import CPU, Rows, finite, map_in_pool, map_spans, room, softmax, tile_rows

# Potentials may have moved so far: entries that were too small for a number are negligible still.
_NEAR = 20.0
# Of a tile of two products: it is in the cache for the second, and each call has so much to do
# that what it takes to make one (a third of the time with half as many) hardly counts.
_TILE_VALUES = 1 << 20
# Rows that are added up as numbers of the plan's kind.
_BLOCK = 64


class DensePlan:
    """softmax_k(lambda score_ik + a_k) of this process's rows, as numbers of `dtype`."""

    def __init__(self, rows: Rows, lamb: float, a_K: Tensor, dtype: torch.dtype) -> None:
        # Those that were read at.
        self.a_K, self.dtype = finite(a_K, dtype).double(), dtype
        self._plan_NK = room(rows.shape, rows.device, dtype)

        def work(tiles: Iterator[tuple[int, Tensor]]) -> None:
            for first, tile_nK in tiles:
                found_nK = self._plan_NK[first : first + len(tile_nK)]
                score_nK = torch.add(self.a_K.to(tile_nK), tile_nK, alpha=lamb)
                softmax(score_nK, out=found_nK)

        deque(map_spans(rows, work, dtype), maxlen=0)

    def near(self, a_K: Tensor) -> bool:
        """Whether it tells the plan at these potentials."""
        return float((a_K - self.a_K).abs().max()) <= _NEAR

    def sums(self, a_K: Tensor) -> Tensor:
        """sum_i q_ik at potentials nearby, (K,) float64."""
        factor_K = self._factor(a_K)
        tile = tile_rows(len(a_K), _TILE_VALUES)

        def work(first: int) -> Tensor:
            return _sums(self._plan_NK[first : first + tile], factor_K)

        sums_K = torch.zeros_like(a_K)
        for part_K in map_in_pool(work, range(0, len(self._plan_NK), tile), CPU):
            sums_K += part_K
        return sums_K * factor_K.double()

    def sums_of(self, rows_n: np.ndarray, a_K: Tensor) -> Tensor:
        """The same of the named rows, by the calling thread."""
        factor_K = self._factor(a_K)
        return _sums(self._plan_NK[torch.from_numpy(rows_n)], factor_K) * factor_K.double()

    def _factor(self, a_K: Tensor) -> Tensor:
        return (a_K - self.a_K).exp().to(self.dtype)


def _sums(plan_nK: Tensor, factor_K: Tensor) -> Tensor:
    """sum_i q_ik / sum_l q_il e^{d_l}, float64, of blocks that are short: rounding grows with
    the number of terms."""
    weights_n = 1 / (plan_nK @ factor_K)
    whole = len(plan_nK) // _BLOCK * _BLOCK
    blocks = plan_nK[:whole].view(-1, _BLOCK, len(factor_K))
    sums_bK = torch.bmm(weights_n[:whole].view(-1, 1, _BLOCK), blocks)[:, 0]
    rest_K = plan_nK[whole:].T @ weights_n[whole:]
    return sums_bK.sum(0, dtype=torch.float64) + rest_K
