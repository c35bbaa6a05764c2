"""Layers that act on the whole batch, of which each process of a job holds a part.

With them many processes train as one does: BatchNorm takes the statistics of all parts,
and dropout draws for all of them. (torch's SyncBatchNorm refuses the CPU.)
n images of this process's part, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sela_cli import parallel


class BatchNorm2d(nn.BatchNorm2d):
    """(n, C, H, W) -> (n, C, H, W), by the mean and variance over all processes."""

    def forward(self, values: Tensor) -> Tensor:
        """See torch's."""
        return _over_all(self, values) if _divided(self) else super().forward(values)


def _divided(module: nn.Module) -> bool:
    return module.training and parallel.size() > 1


class _Sum(torch.autograd.Function):
    """The sum of all processes' values; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return parallel.sum_of(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return parallel.sum_of(gradients[0].clone())


def _sum(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)
    return total


def _over_all(norm: nn.BatchNorm2d, values: Tensor) -> Tensor:
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    x = values.float()
    dims, shape = (0, 2, 3), (-1, 1, 1)
    here = x.new_full((1,), x.numel() / x.shape[1])
    sums = _sum(torch.cat([x.sum(dims), here]))
    total = sums[-1].detach()
    mean_C = sums[:-1] / total
    centred = x - mean_C.view(shape)
    var_C = _sum(centred.square().sum(dims)) / total
    with torch.no_grad():
        norm.num_batches_tracked += 1
        momentum = norm.momentum or 1.0 / float(norm.num_batches_tracked)
        norm.running_mean.lerp_(mean_C, momentum)
        norm.running_var.lerp_(var_C * total / (total - 1), momentum)
    normed = centred * (var_C + norm.eps).rsqrt().view(shape)
    if norm.affine:
        normed = normed * norm.weight.view(shape) + norm.bias.view(shape)
    return normed.to(values.dtype)


class Dropout(nn.Dropout):
    """Dropout with the draws of the whole batch; `divide` says which rows of it are here.

    On the CPU an element costs a random byte, an eighth of torch's time: p counts in 256ths.
    """

    rows_n: Tensor | None = None
    total = 0

    def forward(self, values: Tensor) -> Tensor:
        """See torch's."""
        if not self.training:
            return values
        if self.rows_n is None and values.device.type != "cpu":
            return super().forward(values)
        factors = self._factors((self.total or len(values), *values.shape[1:]), values)
        return values * (factors if self.rows_n is None else factors[self.rows_n])

    def _factors(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """0 with probability p, else 1 / (1 - p)."""
        if like.device.type != "cpu":
            return functional.dropout(
                torch.ones(shape, dtype=like.dtype, device=like.device), self.p
            )
        count = math.prod(shape)
        words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(1 << 63), None)
        kept = words.view(torch.uint8)[:count].view(shape) >= round(256 * self.p)
        return kept.to(like.dtype) / (1 - self.p)


def divide(network: nn.Module, rows_n: Tensor, total: int) -> None:
    """Tell the network that it sees these rows of batches of `total`."""
    for module in network.modules():
        if isinstance(module, Dropout):
            module.rows_n, module.total = rows_n, total
