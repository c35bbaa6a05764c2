"""Sums over the processes of one job; each process alone when there is no job."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def _job() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if _job() else 0


def size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if _job() else 1


def sum_of(value: Tensor) -> Tensor:
    """The sum of every process's `value`, the same bits in each of them; in its place."""
    if _job():
        distributed.all_reduce(value)
    return value


def mean_of(values_nK: Tensor) -> Tensor:
    """The mean over all processes' rows, some of which may have none; float64."""
    count = values_nK.new_tensor([len(values_nK)], dtype=torch.float64)
    sums = sum_of(torch.cat([values_nK.double().sum(0).reshape(-1), count]))
    return (sums[:-1] / sums[-1]).reshape(values_nK.shape[1:])


def logsumexp_of(value: Tensor) -> Tensor:
    """log sum exp of every process's `value`."""
    if not _job():
        return value
    parts = [torch.empty_like(value) for _ in range(size())]
    distributed.all_gather(parts, value)
    return torch.logsumexp(torch.stack(parts), 0)


def any_of(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    return bool(sum_of(torch.tensor(int(flag)))) if _job() else flag


def first_says(flag: bool) -> bool:
    """The first process's `flag`, by which all go."""
    return any_of(flag and rank() == 0)
