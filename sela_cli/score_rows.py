"""The rows of a score matrix as the solver wants them: logits, checked, less their maximum.

N rows (images), K clusters, n rows of one tile.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sela_cli.errors import BadData
from sela_cli.scores import Matrix, Which
from sela_cli.tiles import CPU, FARTHEST, less, widened

INPUT_KINDS = ("logits", "probabilities")

# Stands for a probability of exactly zero, so that any row can still go anywhere.
_LEAST_PROBABILITY = float(np.finfo(np.float64).tiny)
# Scores farther below a row's maximum count as so far: sums of some of them are finite, and in
# double precision their products with lambda.
_FARTHEST = {torch.float32: FARTHEST, torch.float64: -(2.0**996)}
# A row whose sum and maximum are smaller has none such.
_FAR = 1e37


class ScoreRows:
    """A matrix as rows for the solver, every value checked the first time it is read."""

    def __init__(
        self, matrix: Matrix, path: str, input_kind: str = "logits", device: torch.device = CPU
    ) -> None:
        self.matrix, self.path, self.input_kind, self.device = matrix, path, input_kind, device
        # NaN where a row has not been read yet.
        self._maximum_N1 = torch.full((matrix.shape[0], 1), torch.nan, dtype=torch.float64)
        # Whether some scores are so far from others that sums of differences may overflow.
        self._far = False

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.matrix.shape

    def tile(self, start: int, stop: int, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """Rows start..stop-1, (n, K); logits as they are stored where `dtype` is None."""
        rows = slice(start, stop)
        return self._scores(self.matrix.tensor(rows, self.device), rows, dtype)

    def take(self, rows_n: np.ndarray, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """The named rows, (n, K)."""
        return self._scores(self.matrix.tensor(rows_n, self.device), rows_n, dtype)

    def _scores(self, stored_nK: Tensor, rows: Which, dtype: torch.dtype | None) -> Tensor:
        logits = self.input_kind == "logits"
        tile_nK = widened(stored_nK, dtype or torch.float32) if logits else _exact(stored_nK)
        maximum_n1 = self._maximum_N1[rows]
        unread = bool(maximum_n1.isnan().any())
        if unread:
            total_n = self._checked(tile_nK, rows)
        if not logits:
            tile_nK = tile_nK.clamp(min=_LEAST_PROBABILITY).log_()
        if unread:
            maximum_n1 = tile_nK.amax(1, keepdim=True).to(maximum_n1)
            self._maximum_N1[rows] = maximum_n1
            if (total_n.abs() > _FAR).any() or (maximum_n1.abs() > _FAR).any():
                self._far = True
        if dtype is None and not self._far:
            return stored_nK if tile_nK.dtype == torch.float32 else tile_nK
        rows_nK = less(tile_nK, maximum_n1.to(tile_nK), stored_nK, dtype or torch.float64)
        return rows_nK.clamp_(min=_FARTHEST[rows_nK.dtype]) if self._far else rows_nK

    def _checked(self, tile_nK: Tensor, rows: Which) -> Tensor:
        """The sum of each row, which has been looked at."""
        total_n = tile_nK.sum(1)
        if self.input_kind == "probabilities":
            bad_n = (tile_nK < 0).any(1) | ~(total_n > 0) | tile_nK.isinf().any(1)
            problem = "not probabilities (negative, all zero, NaN or infinite)"
            mend = "leave out --input-kind if these are logits"
        else:
            # A sum is finite only if all its terms are, and quicker than looking at each.
            bad_n = ~total_n.isfinite()
            if bad_n.any():
                bad_n = ~tile_nK.isfinite().all(1)
            problem = "NaN or infinite"
            mend = "mend or drop the row; zeros among probabilities need --input-kind probabilities"
        if bad_n.any():
            first = int(bad_n.nonzero()[0, 0])
            row = rows.start + first if isinstance(rows, slice) else int(rows[first])
            raise BadData(f"{self.path}: '{self.matrix.name}', row {row}: {problem}", mend)
        return total_n


def _exact(stored_nK: Tensor) -> Tensor:
    """As float64, also numbers so small that workers flush them to zero."""
    wide_nK = stored_nK.double()
    if stored_nK.dtype == torch.float32:
        # Those without an exponent are multiples of 2^-149.
        bits_nK = stored_nK.view(torch.int32)
        small_nK = (bits_nK > 0) & (bits_nK < 1 << 23)
        wide_nK[small_nK] = bits_nK[small_nK].double() * 2.0**-149
    return wide_nK
