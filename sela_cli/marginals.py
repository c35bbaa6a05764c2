"""What the columns of a plan are to sum to: given shares, or any between two bounds.

K columns (clusters). For potentials a the wanted shares r(a) minimise r.a + penalty(r) over
what is allowed, so that the semi-dual's gradient is s(a) - r(a) (see `semidual`). Given
shares are r whatever a is. Between bounds the penalty is KL(r | h), which makes r smooth:
r_k = c h_k exp(-a_k) cut to its bounds, with the c at which all sum to 1. Source: Chizat et
al. 2018 (scaling algorithms for other constraints than given marginals).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Protocol

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

# A share within this of its bound, relatively, is at it.
_AT = 1e-9


class Marginal(Protocol):
    """Wanted shares, float64."""

    def at(self, a_K: Tensor) -> Tensor:
        """r(a)."""
        ...

    def scaled_to(self, a_K: Tensor, log_s_K: Tensor) -> Tensor:
        """What Sinkhorn's step makes of the shares s(a): those that minimise its part of F."""
        ...

    def free(self, a_K: Tensor) -> Tensor | None:
        """The f in -dr/da = diag(f) - f f^T / sum f: the shares that meet no bound, and zeros.
        None where r does not depend on a."""
        ...

    def levelled(self, a_K: Tensor) -> Tensor:
        """Potentials with one price for all that meet no bound, as without the penalty."""
        ...


class Given:
    """Shares r_K, positive, which sum to 1."""

    def __init__(self, r_K: Tensor) -> None:
        self._r_K = r_K

    def at(self, a_K: Tensor) -> Tensor:
        """r, whatever a is."""
        return self._r_K

    def scaled_to(self, a_K: Tensor, log_s_K: Tensor) -> Tensor:
        """r."""
        return self._r_K

    def free(self, a_K: Tensor) -> None:
        """None."""

    def levelled(self, a_K: Tensor) -> Tensor:
        """As they are."""
        return a_K


class Between:
    """Shares between `low_K` and `high_K`, positive, those nearest to the prior `h_K` first."""

    def __init__(self, h_K: Tensor, low_K: Tensor, high_K: Tensor) -> None:
        self._low_K, self._high_K = low_K, high_K
        self._log_h_K = h_K.log()
        self._log_low_K, self._log_high_K = low_K.log().numpy(), high_K.log().numpy()

    def at(self, a_K: Tensor) -> Tensor:
        """r(a)."""
        return self._cut(self._log_h_K - a_K)

    def scaled_to(self, a_K: Tensor, log_s_K: Tensor) -> Tensor:
        """Shares r = s e^d with r = r(a + d)."""
        return self._cut((log_s_K - a_K + self._log_h_K) / 2)

    def free(self, a_K: Tensor) -> Tensor | None:
        """Those that meet no bound; None where all do."""
        r_K = self.at(a_K)
        free_K = torch.where(self._is_free(r_K), r_K, 0.0)
        return free_K if free_K.any() else None

    def levelled(self, a_K: Tensor) -> Tensor:
        """With the mean price of those that meet no bound, weighted by their shares."""
        r_K = self.at(a_K)
        free_K = self._is_free(r_K)
        if not free_K.any():
            return a_K
        level = (r_K * a_K)[free_K].sum() / r_K[free_K].sum()
        return torch.where(free_K, level, a_K)

    def _is_free(self, r_K: Tensor) -> Tensor:
        return (r_K > self._low_K * (1 + _AT)) & (r_K < self._high_K * (1 - _AT))

    def _cut(self, log_r_K: Tensor) -> Tensor:
        """exp(log r + c) cut to the bounds, with the c at which all sum to 1.

        By NumPy: torch's threads take longer to meet than this takes.
        """
        log_r = log_r_K.numpy()
        # Where a share leaves its lower bound and where it meets its upper one, by c.
        turns = np.sort(np.append(self._log_low_K - log_r, self._log_high_K - log_r))

        def cut(c: float) -> np.ndarray:
            return np.clip(log_r + c, self._log_low_K, self._log_high_K)

        place = bisect_left(turns, 1.0, key=lambda c: np.exp(cut(c)).sum())
        c = turns[min(place, len(turns) - 1)]
        if 0 < place < len(turns):
            # Between two turns the same shares are free: they have what others leave.
            between = cut((turns[place - 1] + c) / 2)
            free = (between > self._log_low_K) & (between < self._log_high_K)
            if free.any():
                c = np.log(1 - np.exp(between[~free]).sum()) - logsumexp(log_r[free])
        r_K = torch.from_numpy(np.exp(cut(c)))
        return r_K / r_K.sum()
