"""Passes over a matrix of scores: small tiles, several spans of them at a time.

N rows (images), K columns (clusters), n rows of one tile.

Torch's own threads meet at a barrier after every operation, which on tiles this small
costs more than the work, and on a busy machine a hundred times more. Here every worker
takes a span of rows of its own, with one thread, and results come back in the order of
the rows: a pass gives the same bits whatever the number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

S = TypeVar("S")
T = TypeVar("T")

# A megabyte of float64: it stays in the cache from one operation to the next.
_TILE_ELEMENTS = 1 << 17
_SPAN_ELEMENTS = 1 << 21


class Rows(Protocol):
    """An N x K matrix of finite scores in float64.

    Scores are log-probabilities up to a constant of each row: logits will do. Both
    methods are called from several threads.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        ...

    def tile(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1, (n, K), a fresh tensor that the caller may change."""
        ...

    def take(self, rows_n: np.ndarray) -> Tensor:
        """The named rows, (n, K); `rows_n` is ascending."""
        ...


def map_spans(rows: Rows, work: Callable[[Iterator[tuple[int, Tensor]]], T]) -> Iterator[T]:
    """`work` of each span of rows, in order. It is given the span's tiles, one at a time,
    as (number of the first row, tile_nK), and runs in a thread of its own."""
    count, clusters = rows.shape
    tile = tile_rows(clusters)
    span = tile * max(1, _SPAN_ELEMENTS // (tile * clusters))

    def tiles(first: int) -> Iterator[tuple[int, Tensor]]:
        end = min(first + span, count)
        for start in range(first, end, tile):
            yield start, rows.tile(start, min(start + tile, end))

    return _in_order(work, map(tiles, range(0, count, span)))


def map_rows(rows: Rows, rows_n: np.ndarray, work: Callable[[Tensor], T]) -> Iterator[T]:
    """`work` of the named rows (ascending), a span of them at a time, in order."""
    size = max(1, _SPAN_ELEMENTS // rows.shape[1])
    parts = [rows_n[at : at + size] for at in range(0, len(rows_n), size)]
    return _in_order(lambda part_n: work(rows.take(part_n)), parts)


def _in_order(work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Results as a plain map gives them, worked out in the pool, a few ahead."""
    workers = torch.get_num_threads()
    pool = _pool(workers)
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def tile_rows(clusters: int) -> int:
    """Rows of a tile."""
    return max(1, _TILE_ELEMENTS // clusters)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    # The setting is the calling thread's, but also what later threads start with.
    pool.submit(int).result()
    torch.set_num_threads(workers)
    return pool
