"""What a label solve may keep in memory, of what is allowed and of what a GPU has.

K clusters; all sizes in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sela_cli.errors import UsageError
from sela_cli.scores import Scores
from sela_cli.tiles import SQUARE_WORKERS, InMemory, Resident, Rows

# Python and torch without a matrix, and for each row its labels, its margin, its maximum and
# copies of some.
_BASE, _ROW = 700 << 20, 96
# Of a GPU: torch's own, and the tiles being worked on; and for each pair of clusters, the
# losses, Hessians and samples.
_DEVICE_BASE = 4 << 30
_DEVICE_MATRICES = 256
# One part in so many of what is left is for the plans that Newton's steps go by.
_PLANS = 4
# Newton's small sample, for each pair of clusters.
_SAMPLE = 16
# Beyond this a matrix of K x K, whose factor grows with K^3, is never worth it.
_SQUARE_CLUSTERS = 4096


@dataclass(frozen=True)
class Budget:
    """For `rows` and heads of `clusters` each, `most` in all; `newton`: whether steps go by a
    Hessian; `resident`: scores that are in memory in any case."""

    rows: int
    clusters: int
    most: int
    newton: bool
    resident: int = 0

    def check(self, balanced: bool) -> None:
        """Raises UsageError where labels, exactly balanced ones or others, can't be had."""
        least = self._least + (self._balancing if balanced else 0)
        if least > self.most:
            mend = f"allow {math.ceil(least / 2**20)}M"
            if balanced and self._least <= self.most:
                mend += ", or use --assign argmax"
            if self.resident:
                mend += "; scores written by numpy.save, by the row, are read a part at a time"
            allowed = f"{round(self.most / 2**20, 3):g}M"
            raise UsageError(
                f"--max-memory {allowed} is too little for {self.rows} rows and "
                f"{self.clusters} clusters",
                mend,
            )

    @property
    def square(self) -> bool:
        """Whether Newton's matrices of K x K fit."""
        return self.clusters <= _SQUARE_CLUSTERS and self._least + self._curvature <= self.most

    @property
    def unused(self) -> int:
        """Left for scores and plans."""
        solving = 0
        if self.newton:
            solving = self._curvature if self.square else self.clusters**2 * _SAMPLE
        return max(self.most - self._least - max(self._balancing, solving), 0)

    @property
    def plans(self) -> int:
        """For plans; the same whether scores are kept or not, so that the labels are."""
        return self.unused // _PLANS

    def spare(self, device: torch.device) -> int:
        """Left for the scores, in memory or in that of the GPU."""
        if device.type == "cpu":
            return self.unused - self.plans
        # What a training before this has left to torch is free too, but for some fragments.
        left = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + left
        return free - _DEVICE_BASE - _DEVICE_MATRICES * self.clusters**2

    def kept(self, rows: Rows, taken: int) -> Rows:
        """The rows read once and kept, where they fit beside all else; or as they are.

        In float32, or on a GPU as they are stored. `taken`: what is in use already.
        """
        spare = self.spare(rows.device)
        if rows.device.type != "cpu":
            size = rows.tile(0, 0, None).element_size()
            return Resident.of(rows) if _bytes(rows.shape, size) <= spare else rows
        return InMemory.of(rows) if _bytes(rows.shape) + taken <= spare else rows

    def keep_features(self, scores: Scores, device: torch.device) -> int:
        """Read the features once for all heads where they fit. Returns what they take of what
        is allowed: nothing where they are on a GPU.

        Beside the scores of a head at a time, or else in their place: keeping the scores saves
        more, as making them again costs a product in every pass. For the widest head.
        """
        if scores.features is None:
            return 0
        rows, spare = scores.features.shape[0], self.spare(device)
        taken = _bytes(scores.features.shape, scores.features.size)
        one_head = _bytes((rows, self.clusters))
        both = len(scores.heads) > 1 and taken + one_head <= spare
        if both or (one_head > spare and taken <= spare):
            scores.features.keep(device)
            return taken if device.type == "cpu" else 0
        return 0

    @property
    def _least(self) -> int:
        """What any labelling takes."""
        return _BASE + self.rows * _ROW + self.resident

    @property
    def _balancing(self) -> int:
        """The losses between clusters, and what is made of them."""
        return self.clusters**2 * 8 * 3

    @property
    def _curvature(self) -> int:
        """Newton's Hessian and its factors, and every worker's sparse product: the entries,
        what they give, and that of the span before."""
        return self.clusters**2 * (20 * SQUARE_WORKERS + 48)


def _bytes(shape: tuple[int, int], size: int = 4) -> int:
    # A quarter more: samples, and what the allocator keeps.
    return shape[0] * shape[1] * size * 5 // 4
