"""Randomness as a function of a seed and of a place in the work, so that no state is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


def seed_of(seed: int, purpose: str, number: int) -> int:
    """A seed of its own for every purpose and number."""
    text = f"{seed}/{purpose}/{number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")


def generator_of(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator of its own for every purpose and number."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, number))


def batches(
    seed: int, purpose: str, count: int, size: int, first: int, last: int
) -> Iterator[Tensor]:
    """The rows of batches first..last-1, of `size` of `count` rows; each epoch in its own order.

    Batches are whole: what is left over waits for the next epoch's order.
    """
    order, order_epoch = torch.empty(0), -1
    for step in range(first, last):
        epoch, place = divmod(step, max(1, count // size))
        if epoch != order_epoch:
            order = torch.randperm(count, generator=generator_of(seed, purpose, epoch))
            order_epoch = epoch
        yield order[place * size : (place + 1) * size]
